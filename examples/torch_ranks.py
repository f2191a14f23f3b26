"""A PyTorch module and optimizer, trained on all ranks by any strategy that goes in step:

    mpirun -n 4 python -m mpi4py examples/torch_ranks.py average

Handwritten digits, and an ordinary training loop but for three lines: ``Replica``, ``batches``, ``step``.
"""

import sys

import torch
from mpi4py import MPI
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import mpicoll.torch


def main() -> None:
    """Train on four fifths of the digits, and read the others."""
    comm = MPI.COMM_WORLD
    strategy = sys.argv[1] if len(sys.argv) > 1 else "average"
    torch.set_num_threads(1)  # a rank; more of them share the cores
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    held_out = torch.arange(len(x)) % 5 == 4
    x, y, x_test, y_test = x[~held_out], y[~held_out], x[held_out], y[held_out]

    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    replica = mpicoll.torch.Replica(model, optimizer, comm, strategy)
    for epoch in range(10):
        for mine in replica.batches(len(x), 64, epoch):
            loss = cross_entropy(model(x[mine]), y[mine])
            loss.backward()
            replica.step()

    with replica.consensus(), torch.no_grad():  # the model that all ranks agree on
        right = (model(x_test).argmax(dim=1) == y_test).float().mean()
    if comm.rank == 0:
        print(f"{comm.size} rank(s), {strategy}: {100 * right:.1f}% of {len(x_test)} read right")


if __name__ == "__main__":
    main()
