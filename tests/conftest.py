"""Nothing here imports MPI: tests/mpi/conftest.py is for the half that runs under mpirun."""
