"""What a watch goes by: the page that ranks share, and the record of the calls that they make."""

import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll.job.watch import ALARM, GONE, INSIDE, Page, page_bytes, shared_page
from mpicoll.mpi import memory, record

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > 5, reason="five ranks show what more would, and sooner")]
OURS = r"communicator \d+\.\d+"


def refuse() -> tuple[int, str]:
    raise OSError


PAGES = {  # by which means the ranks of a node come to a page
    "memory": {},
    "a file": {"nameless": refuse},
    "another process of that number": {"nameless": lambda: (os.memfd_create("x"), "/dev/null")},
    "none": {"nameless": refuse, "temporary": refuse},
}


@pytest.mark.parametrize("how", PAGES)
def test_wherever_the_page_is_it_has_no_name(comm, folder, monkeypatch, how):
    """So that nothing is left of it, however the job ends."""
    for name, make in PAGES[how].items():
        monkeypatch.setattr(memory, name, make)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    page = shared_page(comm)
    assert page.ranks == ([comm.rank] if how == "none" and P > 1 else list(range(P)))
    page.write(comm.rank, 1.0, 2.0, INSIDE, f"told by {comm.rank}")
    comm.Barrier()
    assert [page.read(rank)[4] for rank in page.ranks] == [f"told by {rank}" for rank in page.ranks]
    if comm.rank == 0:
        page.set(ALARM, 5)
    comm.Barrier()
    assert page.get(ALARM) == (5 if 0 in page.ranks else 0)
    assert [path for path in folder.rglob("*") if "mpicoll" in path.name] == []
    assert list(Path("/dev/shm").glob("mpicoll-*")) == []


MISSED = {  # what all do first, the call that the others make when one has left, and how it is told of
    "its first": ((), "allreduce", f"call 1 on {OURS}, allreduce of 5 float64, sum, (native|shared)"),
    "on a plain communicator": ((), "allreduce on a plain one", "making a communicator of ours"),
    "not compared": (("allreduce",), "Barrier", f"Barrier on {OURS}"),
    "on another communicator": (
        ("allreduce", "allreduce on another"),
        "allreduce",
        f"call 2 on {OURS}, allreduce of 5 float64, sum, (native|shared)",
    ),
    "of a graph": (("Barrier",), "gossip_average", f"call 1 on {OURS}, mix"),
}


@pytest.mark.skipif(P == 1, reason="nobody waits for others")
@pytest.mark.parametrize("what", MISSED)
def test_a_rank_that_is_gone_is_noticed_in_whatever_call_that_needs_it(comm, monkeypatch, what):
    monkeypatch.setattr(record, "made", {})
    before, call, told = MISSED[what]
    ours, x = mpicoll.Comm(comm), np.ones(5)
    other, plain = ours.Dup(), comm.Dup()
    calls = {
        "allreduce": lambda: mpicoll.allreduce(x, ours),
        "allreduce on another": lambda: mpicoll.allreduce(x, other),
        "allreduce on a plain one": lambda: mpicoll.allreduce(x, plain),
        "Barrier": ours.Barrier,
        "gossip_average": lambda: mpicoll.gossip_average(x, ours, step=0),
    }
    for name in before:
        calls[name]()
    page = Page([7], bytearray(page_bytes(1)))  # what a rank that leaves now says
    page.write(7, 0.0, 0.0, GONE, "has left the program", made=record.counted())
    record.clear()
    calls[call]()
    entry = record.recorded()[0]
    assert re.match(told, str(entry))
    assert page.has_missed(7, entry)
    if entry.where:
        page.write(7, 0.0, 0.0, GONE, "has left the program", made=record.counted())
        assert not page.has_missed(7, entry)
    for one in (other, plain):
        one.Free()
