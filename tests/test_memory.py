"""Memory that ranks share: where arrays are found in it, and what becomes of it in jobs that end badly."""

import gc
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from launch import IS_OPEN_MPI, run
from mpicoll.algorithms import ALGORITHMS
from mpicoll.interpreter import interpret_arrays
from mpicoll.mpi import memory
from mpicoll.mpi.memory import NOWHERE, PAGE, Pool, Window, place_of, share
from mpicoll.mpi.shared import additions

JOB = """
import os, time
import numpy as np
from mpi4py import MPI
import mpicoll
from mpicoll.mpi import memory, shared
world = mpicoll.Comm(MPI.COMM_WORLD)
rank, p = world.rank, world.size
assert world._state.shares
def calls(n, seed=0):
    rng, total = np.random.default_rng(seed), p * (p + 1) // 2
    for _ in range(n):
        size = int(rng.integers(1, 60_000))
        x = world.full(size, rank + 1.0) if rng.integers(2) else np.full(size, rank + 1.0)
        world.Allreduce(MPI.IN_PLACE, x)
        assert (x == total).all()
        x[:] = rank + 1
        assert (world.allreduce_shared(x) == total).all()
        world.Bcast(x, size % p)
        assert (x == size % p + 1).all()
"""


def job(folder, body, ranks=3, before="", under=(), **options):
    (folder / "job.py").write_text(before + JOB + textwrap.dedent(body))
    return run([*under, "mpirun", "-n", str(ranks), sys.executable, "job.py"], folder, **options)


@pytest.mark.parametrize("p", [*range(2, 34), 48, 63, 64, 65])
def test_additions_are_in_the_canonical_order(p):
    values = list(np.random.default_rng(p).normal(size=(p, 50)))
    arrays = [*values, *np.full((1 + p, 50), np.nan)]
    for lower, higher, into in additions(p):
        assert into >= p  # operands stay
        arrays[into] = arrays[lower] + arrays[higher]
    expected = interpret_arrays(ALGORITHMS["allreduce"]["recursive_doubling"].schedule(p), values, np.add)[0]
    assert arrays[p].tobytes() == expected.tobytes()
    assert max(into for *_, into in additions(p)) <= p + p.bit_length()  # so much scratch


@pytest.fixture
def window():
    made = Window(1, mmap.mmap(-1, 6 * PAGE), (30, 10, 20), 1)
    yield made
    made.forget()
    assert memory._ordered == ()


def test_arrays_are_found_by_their_memory(window):
    x = window.lend(2 * PAGE).view("f8")
    offsets = [(x, 0), (x[3:], 24), (x[5:9], 40), (x.reshape(4, -1)[1], PAGE // 2), (x.view("u1")[1:], 1)]
    for view, offset in offsets:
        assert place_of(view) == (1, offset)
    assert place_of(np.frombuffer(memoryview(x), "i4")[2:]) == (1, 8)
    for other in (np.zeros(3), np.zeros(3)[1:], x.copy(), x + 1, x[::2].copy()):
        assert place_of(other) is NOWHERE
    for stranger in (0, 2):  # parts of other ranks are not this one's to give
        assert place_of(window.parts[stranger][:8]) is NOWHERE


def test_a_part_is_lent_until_the_last_view_is_gone(window):
    x = window.lend(800).view("f8").reshape(10, 10)
    view = x[3, 2:5]
    del x
    gc.collect()
    assert window.lent
    assert memory._bases
    del view
    assert not window.lent
    assert not memory._bases


def test_parts_by_process(window):
    assert window.parts_of((30, 10, 20)) is window.parts
    first, second = window.parts_of((20, 30))
    assert first is window.parts[2]
    assert second is window.parts[0]
    assert window.parts_of((10, 40)) is None
    assert window.parts_of((10, 40)) is None  # as remembered


def test_windows_are_used_again_if_they_fit():
    pool = Pool(MPI.COMM_SELF, (1,))
    x = pool.empty(PAGE)
    first = place_of(x).window
    assert x.nbytes == PAGE
    x.fill(7)
    del x
    assert place_of(pool.empty(PAGE - 5)).window == first
    assert place_of(pool.empty(10)).window == first  # one page is the least there is
    x = pool.empty(10)
    y = pool.empty(3 * PAGE)
    assert place_of(x).window == first != place_of(y).window
    del x, y
    pool.empty(0)
    z = pool.empty(100 * PAGE)  # too large for all there is, which is given back
    assert list(memory.windows) == [place_of(z).window]
    pool.trim()
    assert not memory.windows


def test_more_memory_than_there_is_is_none(monkeypatch):
    pool = Pool(MPI.COMM_SELF, (1,))
    assert pool.empty(1 << 62) is None
    monkeypatch.setattr(memory, "available", lambda: PAGE)
    assert pool.empty(memory.LITTLE) is None
    x = pool.empty(PAGE)
    assert x is not None
    pool.trim()
    assert 0 < memory.available() < 1 << 50


@pytest.mark.parametrize("make", [memory.nameless, memory.in_shm, memory.temporary])
def test_memory_has_no_name(make, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    handles, before = os.listdir("/proc/self/fd"), ours()
    shared = share(MPI.COMM_SELF, 3 * PAGE + 1, (make,))
    assert shared is not None
    assert bytes(shared) == bytes(3 * PAGE + 1)
    assert ours(tmp_path) == before
    del shared
    assert os.listdir("/proc/self/fd") == handles


def test_memory_that_is_refused_is_asked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    asked = []

    def refuses():
        asked.append(1)
        raise OSError

    def of_another_machine():
        asked.append(2)
        handle, _ = memory.temporary()
        other = tmp_path / "other"
        other.touch()
        return handle, str(other)

    handles = os.listdir("/proc/self/fd")
    assert share(MPI.COMM_SELF, PAGE, (refuses, of_another_machine)) is None
    assert asked == [1, 2]
    assert os.listdir("/proc/self/fd") == handles
    assert share(MPI.COMM_SELF, PAGE, (refuses, memory.temporary)) is not None


# ---- jobs


def ours(*folders: Path) -> list[Path]:
    return [path for folder in (Path("/dev/shm"), *folders) for path in folder.glob("*mpicoll*")]


def test_more_ranks_than_cores(tmp_path):
    done = job(tmp_path, "calls(40)\nprint('done')", ranks=8)
    assert (done.status, done.out.count("done"), done.err) == (0, 8, "")


@pytest.mark.parametrize("maker", ["nameless", "in_shm"])
def test_a_rank_that_is_killed_leaves_nothing(tmp_path, maker):
    def kill(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        time.sleep(0.3)
        os.kill(number, signal.SIGKILL)

    body = """
    memory.MEMORY = memory.%s,
    world = world.Dup()
    assert world._state.shares
    calls(2)
    x, y = world.zeros(50_000), np.zeros(50_000)  # made once: a file in /dev/shm has a name until all have opened it
    if rank == 1: print(os.getpid(), flush=True)
    while True:
        world.Allreduce(x, y)
        world.allreduce_shared(x)
    """
    (tmp_path / "temporary").mkdir()
    env = {"TMPDIR": str(tmp_path / "temporary")}
    before = ours()
    done = job(tmp_path, body % maker, env=env, meanwhile=kill)
    assert done.status != 0
    assert ours(tmp_path / "temporary") == before


@pytest.mark.parametrize("call", ["world.Allreduce(MPI.IN_PLACE, x)", "world.allreduce_shared(x)", "world.Bcast(x)"])
def test_the_time_limit_names_who_is_late(tmp_path, call):
    body = f"""
    mpicoll.guard(timeout=1)
    x = world.zeros(50_000)
    {call}
    world.Barrier()
    if rank == 1: time.sleep(60)
    {call}
    """
    done = job(tmp_path, body)
    assert done.status != 0
    assert "mpicoll: time limit of 1 s: rank" in done.err
    assert re.search(r"\n  rank 1 +\d\.\d s  in no call, after Barrier on", done.err), done.err
    assert done.err.count(" of 50000 float64") + done.err.count(" of 400000 bytes") >= 2
    assert done.seconds < 30


def test_an_exception_on_one_rank_ends_the_job(tmp_path):
    body = """
    mpicoll.guard()
    calls(5)
    if rank == 2: raise RuntimeError("only here")
    calls(1_000_000)
    """
    done = job(tmp_path, body)
    assert done.status != 0
    assert "mpicoll: rank 2 failed:\nTraceback" in done.err
    assert done.err.count("Traceback") == 1


def test_ctrl_c_ends_ranks_that_take_turns(tmp_path):
    def interrupt(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)

    body = """
    mpicoll.guard()
    if rank == 0: print("going", flush=True)
    calls(1_000_000)
    """
    done = job(tmp_path, body, meanwhile=interrupt)
    assert done.status != 0
    assert IS_OPEN_MPI or "mpicoll: interrupted" in done.err
    assert "AssertionError" not in done.err


def test_a_call_that_was_interrupted_is_the_last(tmp_path):
    body = """
    import signal, threading
    x = world.zeros(50_000)
    def interrupt(*args): raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, interrupt)
    if rank == 0:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            world.Allreduce(MPI.IN_PLACE, x)
        except KeyboardInterrupt:
            pass
        for call, *args in ((world.Allreduce, MPI.IN_PLACE, x), (world.allreduce_shared, x), (world.empty, 3)):
            try:
                call(*args)
            except RuntimeError as error:
                print(str(error).partition(":")[0], flush=True)
        os._exit(7)
    time.sleep(0.6)
    world.Allreduce(MPI.IN_PLACE, x)
    """
    done = job(tmp_path, body)
    refusal = "an earlier call on this communicator was interrupted by an exception, and its messages may"
    assert done.out.count(refusal) == 3


SMALL = """
import subprocess
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 0:  # when MPI has what it needs
    subprocess.run("mount -t tmpfs -o size=1m none /dev/shm".split(), check=True)
MPI.COMM_WORLD.Barrier()
from mpicoll.mpi import memory
if MEMORY: memory.MEMORY = MEMORY
"""


def may_mount() -> bool:
    return (
        os.getuid() == 0
        and shutil.which("unshare") is not None
        and not subprocess.run(["unshare", "-m", "true"]).returncode
    )


@pytest.mark.skipif(not may_mount(), reason="mounts a file system")
@pytest.mark.parametrize("named", [False, True])
def test_a_little_dev_shm_is_enough(tmp_path, named):
    body = """
    import warnings
    assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 1 << 20
    x = np.full(100_000, rank + 1.0)
    world.Allreduce(MPI.IN_PLACE, x)
    assert (x == p * (p + 1) // 2).all()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        y = world.full(100_000, rank + 1.0)
        calls(10)
        z = world.full(3000, rank + 1.0)
    if rank == 0: print(bool(told))
    for array in (y, z):
        world.Allreduce(MPI.IN_PLACE, array)
        assert (array == p * (p + 1) // 2).all()
    if rank == 0: print(memory.place_of(y).window > 0, memory.place_of(z).window > 0)
    assert not [name for name in os.listdir("/dev/shm") if "mpicoll" in name]
    """
    before = SMALL.replace("MEMORY: ", "True: " if named else "False: ").replace("= MEMORY", "= (memory.in_shm,)")
    done = job(tmp_path, body, before=before, under=("unshare", "-m"))
    assert done.status == 0, done.err
    assert done.out == ("True\nFalse True\n" if named else "False\nTrue True\n")
