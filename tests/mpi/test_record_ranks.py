import re

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll.mpi import record

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P not in (2, 3), reason="two ranks show it")]


def test_calls_that_may_wait_are_recorded(comm):
    pair = comm.Split(0 if comm.rank < 2 else MPI.UNDEFINED)
    if comm.rank >= 2:
        return
    ours = mpicoll.Comm(pair)
    x, y, other = np.ones(3), np.ones(3), 1 - ours.rank
    group = ours.Get_group()
    record.calls.clear()
    for make in (
        ours.Dup,
        ours.Clone,
        lambda: ours.Split(0),
        lambda: ours.Split_type(MPI.COMM_TYPE_SHARED),
        lambda: ours.Create(group),
        lambda: ours.Create_group(group),
        lambda: ours.Create_cart([2]),
    ):
        make().Free()
    request = ours.Irecv(y, other)
    ours.Barrier()  # it is there on both
    ours.Rsend(x, other)
    request.Wait()
    ours.Sendrecv_replace(x, other, 0, other, 0)
    ours.Isend(x, other)
    ours.Mprobe(other).Recv(y)
    ours.isend("x", other)
    ours.mprobe(other).recv()
    mpicoll.gossip_average(x, ours, step=0)
    mpicoll.iallreduce(x, ours, algorithm="ring").wait()
    assert not record.inside
    told = [re.sub(r"communicator \d+\.\d+", "ours", str(entry)) for entry in record.calls]
    waiting = [
        *("Dup", "Clone", "Split", "Split_type", "Create", "Create_group", "Create_cart", "Barrier"),
        *("Rsend", "Sendrecv_replace", "Mprobe", "mprobe"),
    ]
    assert told[:12] == [f"{name} on ours" for name in waiting]
    assert told[12].startswith("call 1 on ours, mix, ")
    assert "exponential" in told[12]
    assert told[13].startswith("mix on ")
    assert told[14:] == ["waiting for a handle of ours on ours"]
    pair.Free()
