"""Ranks that fail alone, hang or are interrupted: each job is launched apart, with a hard limit."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from launch import IS_OPEN_MPI, mpirun

GUARDED = """
import time
from mpi4py import MPI
from mpicoll import UserError
from mpicoll.mpi.guard import ends_job, on_root
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
    assert done.seconds < 20
    assert "mpicoll: rank 1 failed:\nTraceback" in done.err
    assert "RuntimeError: only here" in done.err
    assert done.err.count("Traceback") == 1


def test_a_user_error_of_one_rank_ends_the_job_too(tmp_path):
    done = job(
        tmp_path,
        """
        if comm.rank == 2:
            raise UserError("only here")
        comm.Barrier()
        """,
    )
    assert done.status != 0
    assert "mpicoll: rank 2 failed:\nTraceback" in done.err


def test_an_error_on_the_root_is_raised_by_all(tmp_path):
    done = job(
        tmp_path,
        """
        def action():
            raise UserError("from the root")
        try:
            on_root(comm, action)
        except UserError as error:
            assert comm.allgather(str(error)) == ["from the root"] * 3
        assert on_root(comm, lambda: comm.rank + 5) == 5
        """,
    )
    assert (done.status, done.err) == (0, "")


def test_ranks_may_come_late_to_an_error_of_the_root(tmp_path):
    done = job(
        tmp_path,
        """
        def action():
            raise UserError("from the root")
        time.sleep(6 * (comm.rank == 1))
        on_root(comm, action)
        """,
    )
    assert "mpicoll: rank" not in done.err
    assert done.err.count("UserError: from the root") == 3  # Python's own, at the end of the program


@pytest.mark.parametrize("others", ["comm.Barrier()", "comm.Ibarrier().Wait()"])
def test_leaving_by_sys_exit_on_one_rank_ends_the_job(tmp_path, others):
    done = job(tmp_path, f"if comm.rank == 1: raise SystemExit(3)\n{others}")
    assert done.status != 0
    assert done.seconds < 20
    assert "mpicoll: rank 1 failed" in done.err


def test_a_lonely_error_does_not_meet_a_barrier_of_the_program(tmp_path):
    done = job(
        tmp_path,
        """
        if comm.rank == 1:
            raise UserError("only here")
        comm.Ibarrier().Wait()
        print("passed")
        """,
    )
    assert done.status != 0
    assert "passed" not in done.out
    assert "mpicoll: rank 1 failed" in done.err


def test_afterwards_signals_are_the_programs_again(tmp_path):
    (tmp_path / "job.py").write_text(
        GUARDED
        + textwrap.dedent(
            """\
                pass
            import os, signal
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            assert signal.set_wakeup_fd(-1) == -1
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                print("handled")
            time.sleep(2)
            print("carrying on")
            """
        ).replace("    pass", "    pass", 1)
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
    assert done.seconds < 20
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
    limits = ["-o", "faulthandler_timeout=2", "-o", "timeout=5", "-o", "timeout_method=thread"]
    done = mpirun(3, [sys.executable, "-m", "pytest", "--only-mpi", *limits, "test_hang.py"], tmp_path)
    assert done.status != 0
    assert done.seconds < 40
    assert done.err.count('test_hang.py", line 6 in test_hang') == 2  # ranks 0 and 2
    assert "line 9 in test_hang_as_well" in done.err  # rank 1 went on
