from commands import run_here
from mpicoll.algorithms import ALGORITHMS


def test_verify_names_collectives_and_algorithms(tmp_path):
    done = run_here(["mpicoll", "verify", "--max-ranks", "5", "bcast", "ring"], tmp_path)
    proved = [line.split()[:2] for line in done.out.splitlines()[1:-1]]
    assert proved == [
        ["allreduce", "ring"],
        *(["bcast", name] for name in ALGORITHMS["bcast"]),
        ["reduce_scatter", "ring"],
        ["allgather", "ring"],
        ["mix", "ring"],
    ]
