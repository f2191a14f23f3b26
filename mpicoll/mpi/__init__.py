"""The engine: the only code, with train/, that imports mpi4py (which initialises MPI)."""
