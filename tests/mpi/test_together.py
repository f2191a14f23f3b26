import time

import pytest
from mpi4py import MPI

from mpicoll import UserError
from mpicoll.job.guard import ends_job
from mpicoll.mpi.together import on_all, on_root

P = MPI.COMM_WORLD.size
pytestmark = pytest.mark.mpi


def test_on_root_gives_all_the_same_and_raises_on_all(comm):
    assert on_root(comm, lambda: comm.rank + 5) == 5

    def fail() -> None:
        raise UserError("from the root")

    with pytest.raises(UserError, match="from the root"):
        on_root(comm, fail)


def test_ranks_may_come_late_to_an_error_of_the_root(comm, monkeypatch):
    """All leave ``ends_job`` by it at once: nobody has to wait for the others, and ends the job."""
    monkeypatch.setattr("mpicoll.job.guard.ARRIVE", 0.3)

    def fail() -> None:
        raise UserError("from the root")

    def come() -> None:
        time.sleep(0.6 * (comm.rank == P - 1))
        on_root(comm, fail)

    with pytest.raises(UserError, match="from the root"), ends_job(comm):
        come()


def test_on_all_gives_each_its_own_and_raises_the_lowest(comm):
    assert on_all(comm, lambda: comm.rank) == comm.rank

    def fail() -> None:
        if comm.rank >= P // 2:
            raise UserError(f"rank {comm.rank} has no file")

    with pytest.raises(UserError) as caught:
        on_all(comm, fail)
    assert str(caught.value) == f"rank {P // 2} has no file" + (f" (on rank {P // 2})" if P > 1 else "")
