"""Ranks that fail alone, hang or are interrupted, in jobs that are launched, each with a hard limit.

What a watch makes of what it sees is tested without any, in test_watch.py.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from launch import IS_OPEN_MPI, mpirun
from mpicoll.mpi import record

GUARDED = """
import time
from pathlib import Path
from mpi4py import MPI
from mpicoll import UserError
from mpicoll.job import guard
from mpicoll.job.guard import ends_job
comm = MPI.COMM_WORLD
with ends_job(comm):
"""


def job(tmp_path, body, ranks=3, **options):
    (tmp_path / "job.py").write_text(GUARDED + textwrap.indent(textwrap.dedent(body), "    "))
    return mpirun(ranks, [sys.executable, "job.py"], tmp_path, **options)


def test_one_rank_raising_ends_the_job_with_its_traceback(tmp_path):
    done = job(
        tmp_path,
        """
        if comm.rank == 1:
            raise RuntimeError("only here")
        comm.Barrier()
        """,
    )
    assert done.status != 0
    assert "mpicoll: rank 1 failed:\nTraceback" in done.err
    assert "RuntimeError: only here" in done.err
    assert done.err.count("Traceback") == 1


# What the others wait in, which no barrier of ours may meet.
WAITING = "comm.Barrier() if comm.rank == 0 else comm.Ibarrier().Wait()\nprint('passed')"


@pytest.mark.parametrize("error", ["guard.ARRIVE = 0.5; raise UserError('only here')", "raise SystemExit(3)"])
def test_an_error_of_one_rank_ends_the_job_too(tmp_path, error):
    done = job(tmp_path, f"if comm.rank == 2: {error}\n{WAITING}")
    assert done.status != 0
    assert "passed" not in done.out
    assert "mpicoll: rank 2 failed:\nTraceback" in done.err


def test_afterwards_signals_are_the_programs_again(tmp_path):
    (tmp_path / "job.py").write_text(
        GUARDED
        + textwrap.dedent(
            """\
                pass
            import os, signal
            guard.LEAVE = 0.3
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            assert signal.set_wakeup_fd(-1) == -1
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                print("handled")
            time.sleep(0.6)
            print("carrying on")
            """
        )
    )
    done = mpirun(1, [sys.executable, "job.py"], tmp_path)
    assert (done.status, done.out) == (0, "handled\ncarrying on\n")


@pytest.mark.parametrize("where", ["comm.Recv(bytearray(1), 1 - comm.rank)", "time.sleep(1000)"])
def test_ctrl_c_ends_ranks_inside_mpi_and_outside(tmp_path, where):
    def interrupt(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)

    body = f"comm.Barrier()\nif comm.rank == 0: print('waiting', flush=True)\n{where}"
    done = job(tmp_path, body, ranks=2, meanwhile=interrupt)
    assert done.status != 0
    assert IS_OPEN_MPI or "mpicoll: interrupted" in done.err
    assert "Traceback" not in done.err


def test_a_hanging_test_fails_with_the_stacks_of_all_ranks(tmp_path):
    (tmp_path / "test_hang.py").write_text(
        "import pytest\n"
        "from mpi4py import MPI\n"
        "@pytest.mark.mpi\n"
        "def test_hang():\n"
        "    assert MPI.COMM_WORLD.rank != 1\n"
        "    MPI.COMM_WORLD.Barrier()  # rank 1 never comes\n"
        "@pytest.mark.mpi\n"
        "def test_hang_as_well():\n"
        "    MPI.COMM_WORLD.Recv(bytearray(1), source=1)\n"
    )
    limits = ["-o", "faulthandler_timeout=1", "-o", "timeout=1.5", "-o", "timeout_method=thread"]
    done = mpirun(3, [sys.executable, "-m", "pytest", "--only-mpi", *limits, "test_hang.py"], tmp_path)
    assert done.status != 0
    assert done.err.count('test_hang.py", line 6 in test_hang') == 2  # ranks 0 and 2
    assert "line 9 in test_hang_as_well" in done.err  # rank 1 went on


# mpicoll.guard: in a library's user's program, one line.

WATCHED = """
import os, signal, sys, threading, time
import numpy as np
import mpicoll
from mpi4py import MPI
from mpicoll.job import watch

{before}
mpicoll.guard(timeout={timeout}, report={report!r})
comm = mpicoll.Comm(MPI.COMM_WORLD)
x = np.ones(5)
for _ in range(150):
    mpicoll.allreduce(x, comm)
    comm.Allreduce(MPI.IN_PLACE, x, op=MPI.MAX)
    x[:] = 1
if comm.rank == 1:
    {one}
{others}
print(f"rank {{comm.rank}} is done")
"""
CALL = "mpicoll.allreduce(x, comm, algorithm='ring')"
BEFORE = 300  # calls; the record keeps fewer


def watched(tmp_path, one, others=CALL, timeout=1.2, report="", before="", ranks=3, **options):
    facts = {"one": one, "others": others, "timeout": timeout, "report": str(report), "before": before}
    (tmp_path / "job.py").write_text(WATCHED.format(**facts))
    return mpirun(ranks, [sys.executable, "job.py"], tmp_path, **options)


def account(done):
    """The account that was told, by rank."""
    told = [line for line in done.err.splitlines() if line.startswith("mpicoll:")]
    lines = [line.split(None, 4) for line in done.err.splitlines() if line.startswith("  rank ")]
    assert len(told) == 1
    return told[0], {int(rank): text for _, rank, _, _, text in lines}


def test_a_correct_program_is_left_alone(tmp_path):
    own = "MPI.COMM_WORLD.Barrier(); "  # mpi4py's own communicators have no limit
    done = watched(tmp_path, "time.sleep(1.5)", own + CALL, timeout=1)
    assert (done.status, done.err) == (0, "")
    assert all(f"rank {rank} is done" in done.out for rank in range(3))


ENDED = (124, 9, 137)  # where the launcher has to kill a rank, it may report that


def test_a_time_limit_ends_the_job_and_says_who_is_late(tmp_path):
    """And what was printed before is not lost."""
    report, printing = tmp_path / "report", "print('printed before'); "
    done = watched(
        tmp_path, f"{printing}time.sleep(1000)", printing + CALL, report=report, env={"PYTHONUNBUFFERED": ""}
    )
    assert (done.status, done.out.count("printed before")) == (124, 3)
    head, ranks = account(done)
    assert re.match(r"mpicoll: time limit of 1\.2 s: rank [02] is in call 301 on communicator 0\.1, allreduce", head)
    assert ranks[1].startswith("in no call, after call 300 on communicator 0.1, allreduce of 5")
    assert re.search(r", at .*job\.py:\d+$", ranks[1])
    for rank in (0, 2):
        assert ranks[rank].startswith("in call 301 on communicator 0.1, allreduce of 5 float64, sum, ring, at ")
        assert re.search(r", at .*job\.py:\d+$", ranks[rank])
        assert "in run" in (report / f"rank-{rank}.txt").read_text()
    compared = record.compare(report)
    assert compared[0] == "3 of 3 ranks reported"
    assert "communicator 0.1, ranks 0-2:" in compared
    assert any(line.startswith("  call 301: allreduce of 5 float64, sum, ring: ranks 0, 2") for line in compared)
    assert "  call 301: not made by rank 1" in compared


def test_ranks_that_mix_differently_do_not_take_each_others_numbers(tmp_path):
    """Graphs with the same edges and other weights, each compared before."""
    before = (
        "lazy = mpicoll.graph((np.eye(3) + 1 / 3) / 2)\n"
        "for graph in ('complete', lazy):\n"
        "    mpicoll.gossip_average(np.ones(5), MPI.COMM_WORLD, graph, step=0)"
    )
    mix = "mpicoll.gossip_average(x, comm, {}, step=0)"
    done = watched(tmp_path, mix.format("lazy"), mix.format("'complete'"), timeout=1, before=before)
    assert done.status in ENDED
    assert "is done" not in done.out
    _, ranks = account(done)
    for rank, graph in enumerate(("complete", "user's", "complete")):
        assert ranks[rank].startswith(f"in mix on a {graph} graph of 3 ranks, step 0 on communicator 0.1, round 0, at ")


def test_ranks_that_left_end_the_job_soon_and_it_says_how(tmp_path):
    """Each in its own way; the job ends as the first of them."""
    ways = {
        1: ("sys.exit(3)", "has left the program, with status 3"),
        2: ("sys.exit(0)", "has left the program"),
        3: (
            """try:
        sys.exit(3)
    except SystemExit:
        pass
    raise SystemExit""",
            "has left the program",
        ),
        4: ("sys.exit('a word')", "has left the program, with status 1"),
    }
    leaving = "\n".join(f"if comm.rank == {rank}:\n    {how}" for rank, (how, _) in ways.items())
    done = watched(tmp_path, "pass", f"{leaving}\n{CALL}", timeout=1000, before="watch.LEFT = 1", ranks=5)
    assert done.status in (3, 9, 137)
    assert "is done" not in done.out
    head, ranks = account(done)
    assert head.startswith("mpicoll: rank 1, which this call needs, is gone: rank 0 is in call 301 on communicator 0.1")
    assert {rank: ranks[rank] for rank in ways} == {rank: told for rank, (_, told) in ways.items()}


def test_nothing_is_left_of_a_job_of_which_a_rank_is_killed(tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = watched(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", env={"TMPDIR": str(temporary)})
    assert done.status in (9, 137)
    assert "is done" not in done.out
    assert [path for path in temporary.rglob("*") if "mpicoll" in path.name] == []
    assert list(Path("/dev/shm").glob("mpicoll-*")) == []


def test_leaving_together_with_a_status_is_nothing_to_tell_of(tmp_path):
    done = watched(tmp_path, "pass", "print('leaving'); sys.exit(3)", timeout=1000)
    assert (done.status, done.out.count("leaving")) == (3, 3)
    assert "mpicoll" not in done.err


# Several nodes, as they look to the ranks: these share a page with those of their own node only.

TWO_NODES = "watch.node_of, watch.LISTEN = lambda comm: comm.Split(comm.rank % 2, comm.rank), 2"


@pytest.mark.parametrize("how", ["time.sleep(1000)", "raise RuntimeError('only here')"])
def test_ranks_of_other_nodes_report_in_the_same_folder(tmp_path, how):
    report = tmp_path / "report"
    done = watched(tmp_path, how, report=report, before=TWO_NODES)
    files = {f"rank-{rank}.{kind}" for rank in range(3) for kind in ("json", "txt")}
    assert {path.name for path in report.iterdir()} == files
    compared = record.compare(report)
    assert compared[0] == "3 of 3 ranks reported"
    assert "  call 301: not made by rank 1" in compared
    if "sleep" in how:
        assert done.status in ENDED
        _, ranks = account(done)
        assert set(ranks) == {0, 1, 2}
        assert ranks[1].startswith("in no call, after call 300 on communicator 0.1, allreduce of 5")
    else:
        assert done.status in (1, 9, 137)
        assert "mpicoll: rank 1 failed:\nTraceback" in done.err
        assert done.err.count("Traceback") == 1
        assert "is done" not in done.out


def test_an_exception_in_a_thread_that_nobody_catches_ends_the_job(tmp_path):
    report = tmp_path / "report"
    how = "threading.Thread(target=lambda: 1 / 0, name='helper').start(); time.sleep(1000)"
    done = watched(tmp_path, how, timeout=0, report=report)
    assert done.status != 0
    assert "is done" not in done.out
    assert "mpicoll: rank 1 failed in helper:\nTraceback" in done.err
    assert done.err.count("Traceback") == 1
    assert {path.name for path in report.glob("*.json")} == {f"rank-{rank}.json" for rank in range(3)}


def test_an_exception_in_a_thread_ends_a_command_too(tmp_path):
    body = """
        import threading
        if comm.rank == 1:
            threading.Thread(target=lambda: 1 / 0, name="helper").start()
            time.sleep(1000)
        comm.Barrier()
        """
    done = job(tmp_path, body)
    assert done.status != 0
    assert "mpicoll: rank 1 failed in helper:\nTraceback" in done.err


def test_an_exception_after_mpi_is_finalized_is_told(tmp_path):
    (tmp_path / "job.py").write_text(
        "import mpicoll\nfrom mpi4py import MPI\nmpicoll.guard()\nMPI.Finalize()\nraise RuntimeError('at the end')\n"
    )
    done = mpirun(1, [sys.executable, "job.py"], tmp_path)
    assert done.status == 1
    assert "mpicoll: rank 0 failed after MPI was finalized\nTraceback" in done.err
    assert "RuntimeError: at the end" in done.err


def test_a_signal_to_one_rank_alone_is_told_of(tmp_path):
    before = "from mpicoll.job import guard\nguard.LEAVE = 0.3"
    done = watched(tmp_path, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(1000)", timeout=1000, before=before)
    assert done.status in (130, 9, 137)
    assert "mpicoll: rank 1 interrupted" in done.err
    assert "Traceback" not in done.err


def test_ctrl_c_ends_a_guarded_program(tmp_path):
    def interrupt(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)

    waiting = "if comm.rank == 0: print('waiting', flush=True)\n"
    done = watched(tmp_path, "time.sleep(1000)", waiting + CALL, timeout=1000, meanwhile=interrupt)
    assert done.status != 0
    assert "is done" not in done.out
    assert "Traceback" not in done.err


SUM = "mpicoll.allreduce(x, comm)"
MISTAKES = {  # what rank 1 does, and the others; and what the table says of them
    "dtype": ("mpicoll.allreduce(x.astype('f4'), comm)", SUM, "allreduce of 5 float32", "allreduce of 5 float64"),
    "count": ("mpicoll.allreduce(x[:4], comm)", SUM, "allreduce of 4 float64", "allreduce of 5 float64"),
    "operation": ("comm.Allreduce(MPI.IN_PLACE, x, op=MPI.MAX)", SUM, "5 float64, max", "5 float64, sum"),
    "root": ("comm.Bcast(x, root=1)", "comm.Bcast(x, root=2)", "native, root 1", "native, root 2"),
    "algorithm": ("mpicoll.allreduce(x, comm, algorithm='tree')", CALL, "sum, tree", "sum, ring"),
    "order": (f"comm.Bcast(x); {SUM}", f"{SUM}; comm.Bcast(x)", "bcast of 40 bytes", "allreduce of 5"),
    "a call left out": ("comm.Bcast(x)", f"{SUM}; comm.Bcast(x)", "bcast of 40 bytes", "allreduce of 5"),
    "an array in pieces": ("mpicoll.allreduce(np.ones(10)[::2], comm)", SUM, "allreduce refused, expected a", "sum"),
}


def mistaken(what: str) -> str:
    """What all do; rank 1 makes the mistake."""
    one, others, _, _ = MISTAKES[what]
    return f"""
    if comm.rank == 1:
        {one}
    else:
        {others}
"""


def assert_told(heard: list[str], what: str, call: int) -> None:
    """The same on all ranks, with what each has called, and which call on this communicator it was."""
    _, _, told, told_of_others = MISTAKES[what]
    assert heard == heard[:1] * 3
    assert re.search(f"ranks 0, 2 +call {call}: .*{told_of_others}", heard[0])
    assert re.search(f"rank 1 +call {call}: .*{told}", heard[0])


def test_a_mistake_of_one_rank_is_told_on_all(tmp_path):
    """One after the other in one job, which goes on because it catches them."""
    body = "MPI.COMM_WORLD.Barrier()\n"
    for n, what in enumerate(MISTAKES):
        body += f"""
comm = mpicoll.Comm(MPI.COMM_WORLD.Dup())
try:{mistaken(what)}
except Exception as error:
    open(f"heard-{n}-{{comm.rank}}", "w").write(str(error.__cause__ or error))
MPI.COMM_WORLD.Barrier()  # all have
"""
    done = watched(tmp_path, "pass", body, timeout=1000)
    assert (done.status, done.out.count("is done"), "MismatchError" in done.err) == (0, 3, False), done.err
    for n, what in enumerate(MISTAKES):
        assert_told([(tmp_path / f"heard-{n}-{rank}").read_text() for rank in range(3)], what, 1)


@pytest.mark.parametrize("what", ["dtype", "an array in pieces"])
def test_a_mistake_that_nobody_catches_ends_the_job(tmp_path, what):
    body = f"""
try:{mistaken(what)}
except Exception as error:
    open(f"heard-{{comm.rank}}", "w").write(str(error.__cause__ or error))
    MPI.COMM_WORLD.Barrier()  # all have
    raise
"""
    done = watched(tmp_path, "pass", body, timeout=1000)
    assert_told([(tmp_path / f"heard-{rank}").read_text() for rank in range(3)], what, BEFORE + 1)
    assert (done.status, done.out.count("is done")) == (1, 0)
    assert "MismatchError: ranks do not make the same call on this communicator:\n" in done.err


def test_a_guard_lasts_as_long_as_its_block_and_leaves_nothing(tmp_path):
    (tmp_path / "job.py").write_text(
        textwrap.dedent(
            """\
            import glob, signal, socket, sys, threading, time
            import mpicoll
            from mpi4py import MPI
            before = sys.excepthook, threading.excepthook, signal.getsignal(signal.SIGTERM), threading.active_count()
            for _ in range(2):
                with mpicoll.guard(timeout=5) as guard:
                    assert mpicoll.allreduce(1, MPI.COMM_WORLD) == 3
                    assert glob.glob("/dev/shm/mpicoll-*") == []
                    assert threading.active_count() > before[3]
                time.sleep(0.1)
                after = sys.excepthook, threading.excepthook, signal.getsignal(signal.SIGTERM), threading.active_count()
                assert after == before
            for wrong in ({"timeout": -1}, {"timeout": float("nan")}):
                try:
                    mpicoll.guard(**wrong)
                except ValueError as error:
                    assert str(error).startswith("timeout must be a number of seconds, 0 or more, got")
                else:
                    raise AssertionError(wrong)
            def hooks():
                numbers = signal.SIGINT, signal.SIGTERM
                return [sys.excepthook, threading.excepthook, sys.exit, *map(signal.getsignal, numbers)]
            was = hooks()
            for first in (0, 1):  # in whatever order
                guards = [mpicoll.guard(), mpicoll.guard()]
                held = hooks()
                assert not any(now is then for now, then in zip(held, was))
                guards.pop(first).release()
                assert hooks() == held
                guards.pop().release()
                assert hooks() == was
                assert signal.set_wakeup_fd(-1) == -1
            guard = mpicoll.guard()
            sys.excepthook, wake = lambda *args: None, socket.socketpair()
            for end in wake:
                end.setblocking(False)
            signal.set_wakeup_fd(wake[0].fileno())
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            changed = hooks()
            guard.release()
            guard.release()
            assert hooks() == [changed[0], *was[1:4], signal.SIG_IGN]  # the program's own are left alone
            assert signal.set_wakeup_fd(-1) == wake[0].fileno()
            def generator():
                with mpicoll.guard():
                    yield
            for _ in generator():
                break  # which closes it
            print("fine")
            """
        )
    )
    done = mpirun(3, [sys.executable, "job.py"], tmp_path)
    assert (done.status, done.out.count("fine"), done.err) == (0, 3, "")


def test_training_has_a_time_limit(tmp_path):
    """One rank is stopped in the middle of it."""

    def stop(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert any(re.match(r" +1 +\d+ ", line) for line in process.stdout)  # the first epoch is done
        pids = subprocess.run(["pgrep", "-f", f"job.py train .*{tmp_path}"], capture_output=True, text=True)
        ranks = [pid for pid in pids.stdout.split() if b"PMI_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        assert len(ranks) == 1
        os.kill(int(ranks[0]), signal.SIGSTOP)

    if IS_OPEN_MPI:
        return
    np.savez(tmp_path / "data.npz", X=np.arange(200.0).reshape(100, 2), y=np.arange(100) % 2)  # faster than digits
    (tmp_path / "job.py").write_text(
        "from mpicoll.cli import main\nfrom mpicoll.job import watch\nwatch.GRACE = 1\nraise SystemExit(main())\n"
    )
    train = ["train", "--data", "data.npz", "--epochs", "10000000", "--timeout", "1", "--out", str(tmp_path / "run")]
    done = mpirun(2, [sys.executable, "job.py", *train], tmp_path, meanwhile=stop)
    assert done.status in ENDED
    assert re.search("mpicoll: time limit of 1 s: rank 0 is in (call |[a-z ]+ on communicator)", done.err)
    assert re.search(r"rank 1 +[0-9.]+ s  stopped for", done.err)
    assert not (tmp_path / "run" / "model.safetensors").exists()


FINE = {  # what a guarded program may do
    "handle signals, fork, and let go": """
        import multiprocessing
        context = multiprocessing.get_context("fork")
        for _ in range(3):
            child = context.Process(target=time.sleep, args=(1000,))
            child.start()
            time.sleep(0.1)
            child.terminate()
            child.join()
            assert child.exitcode == -signal.SIGTERM, child.exitcode

        wake = signal.set_wakeup_fd(-1)  # Ctrl-C
        signal.set_wakeup_fd(wake)
        try:
            os.write(wake, bytes([signal.SIGINT]))  # two at once are handled at once
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            time.sleep(0.8)  # saving

        first, second = mpicoll.guard(), mpicoll.guard()
        first.release()
        second.release()

        other = mpicoll.guard()  # which is let go on one rank
        if comm.rank == 1:
            other.release()
            time.sleep(1)
        mpicoll.allreduce(x, comm)

        signal.signal(signal.SIGTERM, lambda number, frame: print("saving"))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.8)
        """,
    "leave early what it has done its part of": """
        slow = MPI.Op.Create(lambda a, b, datatype: time.sleep(1), commute=True)
        comm.Reduce(x, np.empty_like(x), slow, 0)
        """,
    "leave after more communicators than are counted, while others are in what it has done its part of": """
        from mpicoll.mpi import record
        for n in range(record.COUNTED):
            record.begin(record.Entry("x", f"communicator 7.{n}", (0, 1), 1))
            record.end()
        time.sleep(0.3 * (comm.rank == 0))
        comm.reduce(1, lambda a, b: time.sleep(1))
        """,
}


@pytest.mark.parametrize("what", FINE)
def test_a_guarded_program_may(tmp_path, what):
    (tmp_path / "job.py").write_text(
        "import os, signal, sys, time\nimport numpy as np\nimport mpicoll\nfrom mpi4py import MPI\n"
        "from mpicoll.job import guard, watch\nwatch.LEFT, guard.LEAVE = 0.3, 0.4\n"
        "mpicoll.guard(timeout=20)\ncomm = mpicoll.Comm(MPI.COMM_WORLD)\nx = np.ones(3)\nmpicoll.allreduce(x, comm)\n"
        + textwrap.dedent(FINE[what])
        + "print('fine')\n"
    )
    done = mpirun(2, [sys.executable, "job.py"], tmp_path)
    assert (done.status, done.out.count("fine")) == (0, 2), done.err


def test_a_job_that_is_suspended_goes_on(tmp_path):
    def suspend(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        pids = [int(pid) for pid in subprocess.check_output(["pgrep", "-f", f"{tmp_path}/job.py"], text=True).split()]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(1.5)

    (tmp_path / "job.py").write_text(
        "import time\nimport numpy as np\nimport mpicoll\nfrom mpi4py import MPI\n"
        "from mpicoll.job import watch\nwatch.SILENT = 0.5\nmpicoll.guard(timeout=1)\n"
        "comm = mpicoll.Comm(MPI.COMM_WORLD)\nx = np.ones(3)\n"
        "if comm.rank == 0: print('waiting', flush=True)\n"
        "end = time.monotonic() + 2.5\n"
        "while mpicoll.allreduce(float(time.monotonic() < end), comm): pass\n"
        "print('fine')\n"
    )
    done = mpirun(2, [sys.executable, str(tmp_path / "job.py")], tmp_path, meanwhile=suspend)
    assert (done.status, done.out.count("fine")) == (0, 2), done.err
