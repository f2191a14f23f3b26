"""mpi4py's own tests of collectives, with a ``mpicoll.Comm`` in place of ``MPI.COMM_WORLD``, and nothing else changed.

Usage: ``mpirun -n N python tests/mpi4py_suite.py FOLDER [MODULE ...]``, where the folder is that of mpi4py's tests (in
its source distribution; ``make test-mpi4py`` fetches it).  They use arrays of several libraries, and objects in host
memory that say they are on a GPU.  Left out are their own producers of DLPack, which crash NumPy.
"""

import importlib
import os
import sys
import unittest

from mpi4py import MPI

import mpicoll

MODULES = ("test_cco_buf", "test_cco_vec", "test_cco_nb_buf")


def main(folder: str, *modules: str) -> int:
    """Run them; the exit status."""
    sys.path.insert(0, folder)
    ours = mpicoll.Comm(MPI.COMM_WORLD)
    setattr(MPI, "COMM_WORLD", ours)  # noqa: B010
    backends = importlib.import_module("arrayimpl").ArrayBackends
    backends[:] = [backend for backend in backends if not backend.__name__.startswith("DLPack")]
    suite = unittest.defaultTestLoader.loadTestsFromNames(modules or MODULES)
    with open(os.devnull, "w") as nowhere:
        stream = sys.stderr if ours.rank == 0 else nowhere
        result = unittest.TextTestRunner(stream, verbosity=0).run(suite)
    for test, trace in result.failures + result.errors:
        print(f"rank {ours.rank}: {test}\n{trace}", file=sys.stderr, flush=True)
    if ours.rank == 0:
        print(f"mpi4py: {result.testsRun - len(result.failures + result.errors)} passed at {ours.size} ranks")
    return int(not result.wasSuccessful())


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: mpirun -n N python tests/mpi4py_suite.py FOLDER [MODULE ...]")
    sys.exit(main(*sys.argv[1:]))
