"""``mpicoll doctor``: of jobs that are well, of those that are not, and of machines that are not this one."""

import ctypes
import json
import re
import sys
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import mpicoll
from launch import IS_OPEN_MPI, REPOSITORY, mpirun, run
from mpicoll.cli import doctor as said
from mpicoll.cli.app import app
from mpicoll.job import doctor
from mpicoll.job.doctor import Findings
from mpicoll.mpi import launch
from mpicoll.mpi.gpu.assignment import Gpu
from mpicoll.tuning.fingerprint import Fingerprint, machine
from mpicoll.tuning.profile import Profile, write_profile
from mpicoll.tuning.rules import Rule

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
DOCTOR = ["mpicoll", "doctor"]
TOPICS = ["mpicoll", "launcher", "environment", "mpi4py", "MPI", "threads", "1 node(s)", "profile", "GPUs"]


def labels(text):
    return [line[: said.WIDTH].strip() for line in text.splitlines() if line[: said.WIDTH].strip()]


def test_alone_all_is_well(tmp_path):
    done = run(DOCTOR, tmp_path, env=NO_GPU)
    assert (done.status, done.err) == (0, "")
    *lines, last = done.out.splitlines()
    assert last == "all is well"
    assert [label for label in labels("\n".join(lines)) if label != "paths"] == TOPICS
    assert lines[0].startswith(f"mpicoll     {mpicoll.__version__}, Python ")
    assert "launcher    none: one process" in done.out
    assert re.search(r"\n            loaded from /\S*/libmpi[^/]*\.so[.\d]*\n", done.out)
    assert "profile     none: MPICOLL_PROFILE says that none is wanted" in done.out


def test_a_job_of_several_ranks(tmp_path):
    env = {**NO_GPU, "MPICOLL_TIMEOUT": "99", "MPICOLL_PROFILE": str(tmp_path)}
    done = mpirun(3, DOCTOR, tmp_path, env=env)
    assert (done.status, done.err) == (0, "")
    assert done.out.count("\nMPI ") == 1
    name = "Open MPI's mpirun" if IS_OPEN_MPI else "MPICH's mpirun (hydra)"
    assert f"\nlauncher    {name}: 3 rank(s)\n" in done.out
    assert "\nenvironment MPICOLL_PROFILE=" in done.out
    assert "\n            MPICOLL_TIMEOUT=99\n" in done.out
    assert re.search(r"\n1 node\(s\) +\S+: rank", done.out)
    assert "ranks share memory without a name, through /proc" in done.out
    assert re.search(r"\nprofile     none; \S+1x3\.json: there is none: mpirun -n 3 mpicoll tune makes it\n", done.out)


def test_ways_of_arrays_on_gpus_are_those_of_collectives(tmp_path):
    done = mpirun(2, [sys.executable, REPOSITORY / "tests" / "fakecupy", "-m", *DOCTOR], tmp_path, env=NO_GPU)
    assert done.status == 0, done.err
    assert "\npaths       staged: yes\n" in done.out
    assert "\n            ipc: yes\n" in done.out
    assert "\n            nccl: no, ranks share a GPU, and NCCL is for one rank on each\n" in done.out
    assert done.out.splitlines()[-1].startswith("doubtful:   up to 2 ranks share a GPU")


def test_json_is_the_same_as_one_object(tmp_path):
    one_core = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    job = f"{one_core}\nfrom mpicoll.cli import main\nraise SystemExit(main(['doctor', '--json']))\n"
    (tmp_path / "job.py").write_text(job)
    different = '[ -n "$PMI_RANK$OMPI_COMM_WORLD_RANK" ] && [ $((PMI_RANK + OMPI_COMM_WORLD_RANK)) = 1 ] && '
    different += f"export MPICOLL_CHECK=off; exec {sys.executable} job.py"
    done = mpirun(2, ["bash", "-c", different], tmp_path, env=NO_GPU)
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["mpi"]["ranks"] == found["launcher"]["ranks"] == 2
    assert found["mpi"]["threads"] == {"asked": "multiple", "given": "multiple"}
    assert [node["ranks"] for node in found["nodes"]] == [[0, 1]]
    assert found["profile"] == {
        "file": None,
        "in_force": False,
        "why": "MPICOLL_PROFILE says that none is wanted",
    }
    assert set(found["paths"]) == {"staged", "ipc", "nccl", "aware"}
    assert all(found["paths"].values())  # there is no GPU
    assert found["wrong"] == []
    crowded, differing = found["doubtful"]
    assert crowded.startswith("more ranks than cores: 2 on 1 of ")
    assert differing == "MPICOLL_ variables are not the same everywhere: rank 1 differ from rank 0 (--json has them)"
    assert set(found["differing"]["variables"]) == {"rank 0", "rank 1"}


def test_what_is_wrong_is_told_on_all_ranks_with_what_is_doubtful(tmp_path):
    env = {**NO_GPU, "MPICOLL_PROFILE": "gone.json", "MPICOLL_TRAIN_EPOCH": "5", "MPICOLL_X": "1"}
    done = mpirun(2, ["bash", "-c", "mpicoll doctor; echo status $? >&2"], tmp_path, env=env)
    assert done.err == 2 * "status 1\n"
    assert "\nMPI " in done.out
    *_, wrong, near, far = done.out.splitlines()
    assert re.fullmatch("wrong:      profile '.*gone.json' cannot be read .No such file or directory.; make .*", wrong)
    unknown = "doubtful:   the environment variable {} is unknown, and ignored"
    assert near == f"{unknown.format('MPICOLL_TRAIN_EPOCH')}: did you mean MPICOLL_TRAIN_EPOCHS?"
    assert far == unknown.format("MPICOLL_X")


def test_a_launcher_of_another_mpi(tmp_path):
    """As it looks from inside; both MPIs are in cli/test_app.py."""
    env = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}
    done = run(DOCTOR, tmp_path, env=env)
    assert (done.status, done.err) == (1, "")
    assert "\nlauncher    Open MPI's mpirun: 4 rank(s)\n" in done.out
    assert "\n            loaded from /" in done.out
    last = done.out.splitlines()[-1]
    assert re.fullmatch(r"wrong:      the launcher started 4 rank\(s\), but .*; use .*bin/mpirun", last)
    del env["OMPI_COMM_WORLD_SIZE"], env["OMPI_COMM_WORLD_RANK"]
    done = run([*DOCTOR, "--json"], tmp_path, env={"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"})
    assert (done.status, done.out) == (1, "")  # only rank 0 speaks
    done = run([*DOCTOR, "--json"], tmp_path, env={"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"})
    found = json.loads(done.out)
    assert found["launcher"] == {"name": "Slurm's srun", "ranks": 2}
    assert len(found["wrong"]) == 1
    kind = "pmix" if IS_OPEN_MPI else "pmi2"
    assert found["wrong"][0].endswith(f"use srun --mpi={kind} (srun --mpi=list shows what there is)")


def test_without_an_mpi_the_rest_is_said(tmp_path):
    done = run(DOCTOR, tmp_path, env={"MPI4PY_LIBMPI": "/no/libmpi.so"})
    assert (done.status, done.err) == (1, "")
    assert "MPI4PY_LIBMPI=/no/libmpi.so; wheels" in done.out
    assert "\nMPI         none could be loaded\n" in done.out
    assert "\nGPUs " in done.out
    last = done.out.splitlines()[-1]
    assert last.startswith("wrong:      cannot load an MPI library (")
    assert "or unset MPI4PY_LIBMPI, " in last


def test_ranks_that_never_come_are_not_waited_for(tmp_path):
    rank = "${PMI_RANK:-$OMPI_COMM_WORLD_RANK}"
    done = mpirun(2, ["bash", "-c", f"[ {rank} = 0 ] || sleep 20; exec mpicoll doctor --timeout 1"], tmp_path)
    assert done.status != 0
    assert done.seconds < 15
    assert done.out.startswith("mpicoll ")
    assert re.search("mpicoll: rank 0 on .* is ended: after 1 s it is still starting MPI; it waits for", done.err)


def test_the_limit_ends_nobody_who_comes_through(capfd):
    with doctor._limit(0.2) as doing:
        doing("sleeping")
    time.sleep(1.5)
    assert capfd.readouterr().err == ""


def test_all_variables_that_are_read_are_known():
    read = set()
    for path in (REPOSITORY / "mpicoll").rglob("*.py"):
        if path.name != "launch.py":
            read |= {*re.findall(r'"(MPICOLL_[A-Z_]+)"', path.read_text())}
    with app.make_context("mpicoll", ["show", "ring"]) as context:
        options = said.options(context)
    assert read - {*options} == {*launch.VARIABLES}
    assert {"MPICOLL_TRAIN_BATCH_SIZE", "MPICOLL_BENCH_SYNC", "MPICOLL_BENCH_MICRO", "MPICOLL_DOCTOR_TIMEOUT"} < {
        *options
    }
    assert "MPICOLL_DOCTOR_AS_JSON" not in options
    result = CliRunner(env={"MPICOLL_DOCTOR_TIMEOUT": "0"}).invoke(app, ["doctor"])
    assert "0 is not in the range" in result.output  # which is how click calls them


class Driver:
    """CUDA's, with two devices, or with none."""

    def __init__(self, status=0):
        self.status = status

    def cuInit(self, flags):  # noqa: N802
        return self.status

    def cuGetErrorName(self, status, text):  # noqa: N802
        text._obj.value = b"CUDA_ERROR_NO_DEVICE"

    def cuDriverGetVersion(self, number):  # noqa: N802
        number._obj.value = 13020

    def cuDeviceGetCount(self, number):  # noqa: N802
        number._obj.value = 2

    def cuDeviceGet(self, device, n):  # noqa: N802
        device._obj.value = n

    def cuDeviceGetName(self, text, length, device):  # noqa: N802
        text.value = b"NVIDIA H200"

    def cuDeviceGetPCIBusId(self, text, length, device):  # noqa: N802
        text.value = b"0000:0%d:00.0" % device.value

    def cuDeviceTotalMem_v2(self, size, device):  # noqa: N802
        size._obj.value = 140 << 30

    def cuDeviceGetUuid(self, uuid, device):  # noqa: N802
        ctypes.memset(uuid, device.value + 1, 16)


def ranks(count, **more):
    """Facts of as many, with two GPUs, of which all have the first."""
    gpu = Gpu(0, "NVIDIA H200", "node 0000:00:00.0 01", "0000:00:00.0", tuple(range(count)))._asdict()
    own = {
        "driver": doctor._devices(Driver()),
        "host": "node",
        "mps": False,
        "cupy": {"version": "14.2", "runtime": "13.0"},
    }
    return [
        {**own, "rank": n, "gpu": gpu, "gpu_variables": {"CUDA_VISIBLE_DEVICES": f"{n % 2}"}, **more}
        for n in range(count)
    ]


def test_gpus_and_who_has_which():
    gpus = doctor._gpus(ranks(3), None)
    assert [*said._gpus(gpus)] == [
        "GPUs        2 seen; driver for CUDA 13.2; CuPy 14.2 with CUDA 13.0",
        "            node: NVIDIA H200 (0000:00:00.0), 140 GiB, GPU-01010101-0101-0101-0101-010101010101: ranks 0-2",
        "            node: NVIDIA H200 (0000:01:00.0), 140 GiB, GPU-02020202-0202-0202-0202-020202020202: no rank's",
        "            CUDA_VISIBLE_DEVICES=0 (ranks 0, 2), 1 (rank 1)",
    ]
    assert [line.split(",")[0] for line in doctor._about_gpus(gpus)] == ["up to 3 ranks share a GPU"]
    assert doctor._about_gpus(doctor._gpus(ranks(3, mps=True), None)) == []
    assert doctor._about_gpus(doctor._gpus(ranks(1), None)) == []
    [lacking] = doctor._about_gpus(doctor._gpus(ranks(2, gpu=None), "no CuPy"))
    assert lacking == "there are GPUs that cannot be used: no CuPy; the driver is for CUDA 13.2"


def test_a_driver_without_a_gpu_is_no_doubt():
    none = doctor._devices(Driver(100))
    gpus = doctor._gpus(ranks(2, driver=none, gpu=None, cupy=None, gpu_variables={}), "no GPU")
    reason = "the NVIDIA driver gives no GPU (CUDA_ERROR_NO_DEVICE)"
    assert [*said._gpus(gpus)] == [f"GPUs        none: {reason}; driver for CUDA 13.2"]
    assert doctor._about_gpus(gpus) == []


def test_paths_are_there_or_say_why_not():
    why = {"ipc": "", "nccl": "ranks share a GPU", "aware": "not asked for", "staged": ""}
    state = SimpleNamespace(join_devices=lambda number: SimpleNamespace(why=why if number == 3 else {}))
    assert doctor._paths(state, {"number": 3}, None) == why
    assert doctor._paths(state, None, "no CuPy") == dict.fromkeys(why, "no CuPy")
    assert [*said._paths({"staged": "", "ipc": "no memory"})] == [
        "paths       staged: yes",
        "            ipc: no, no memory",
    ]
    assert [*said._paths({"staged": "no GPU", "ipc": "no GPU"})] == ["paths       none for arrays on GPUs: no GPU"]


def node(host, ranks, cores, threads):
    memory = {"total": 4 << 30, "available": 1 << 30, "limit": 2 << 30}
    blas = [[{"name": "openblas", "threads": threads}]] * len(ranks)
    there = {"host": host, "ranks": ranks, "cores": cores, "blas": blas, "memory": memory}
    return {**there, "shared": None, "shm": {"total": 1 << 20, "available": 1 << 10}}


def test_nodes_are_compressed():
    lines = [*said._nodes([node("a", [0, 1, 2], [[0], [1, 2, 3], [1, 2, 3]], 4)])]
    assert lines == [
        "1 node(s)   a: rank 0 on cores 0; ranks 1-2 on cores 1-3",
        "               memory: 4 GiB, 1 GiB free; 2 GiB for this container; /dev/shm 1 MiB, 1 KiB free; "
        "ranks share none",
        "               BLAS: openblas, 4 thread(s) a rank, 12 on 4 cores: set OMP_NUM_THREADS=1 "
        "(mpicoll train needs no such setting)",
    ]
    many = [*said._nodes([node(f"n{n}", [n], [[0]], 1) for n in range(20)])]
    assert len(many) == 3 * said.SHOWN + 1
    assert many[-1].strip() == "and 12 more (--json has them)"
    assert "OMP" not in many[2]


def test_ranks_that_share_no_memory_are_told_of():
    nodes = [
        node("a", [0], [[0]], 1),
        node("b", [1, 2], [[0], [1]], 1),
        {**node("c", [3, 4], [[0], [1]], 1), "shared": "x"},
    ]
    [doubt] = doctor._about_nodes(nodes)
    assert doubt.startswith("the ranks on b share no memory, so that collectives are slower: ")


def test_which_profile_is_in_force(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "library_name", lambda: "MPICH 5.0.2")
    here, state = Fingerprint("MPICH 5.0.2", machine(), (2,)), SimpleNamespace(layout=(2,), p=2)
    file = tmp_path / "a.json"
    monkeypatch.setenv("MPICOLL_PROFILE", str(file))
    rules = {"bcast": (Rule(None, ("tree",)),)}
    write_profile(Profile(here, rules, {}), file)
    found = Findings()
    assert doctor._profile(found, state) == {"file": str(file), "in_force": True, "why": None}
    write_profile(Profile(here._replace(layout=(3,)), rules, {}), file)
    assert doctor._profile(found, state) == {"file": str(file), "in_force": False, "why": "it is for elsewhere"}
    assert (found.wrong, len(found.doubtful)) == ([], 1)
    assert found.doubtful[0].startswith(f"profile '{file}' is not used: it is of 1 node(s) x 3 rank(s), here is ")
    monkeypatch.delenv("MPICOLL_PROFILE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert doctor._profile(found, state)["why"].endswith("--out FILE: nothing can be written there")


@pytest.mark.parametrize(("ranks", "free", "told"), [("2", 1 << 20, True), ("2", 1 << 30, False), ("1", 0, False)])
def test_of_little_shared_memory_it_speaks_before_mpi_may_crash(monkeypatch, capsys, ranks, free, told):
    monkeypatch.setenv("MPI_LOCALNRANKS", ranks)
    monkeypatch.setattr(doctor, "_shm", lambda: {"available": free})
    doctor._tell_before_a_crash()
    line = "mpicoll: /dev/shm has 1024 KiB free: MPI may crash now; a container gets more by --shm-size\n"
    assert capsys.readouterr().err == (line if told else "")


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("MPICH 5.0.2", "multiple", True),
        ("MPICH 4.0.2", "multiple", True),
        ("MPICH 5.0.2", "serialized", False),
        ("MPICH 5.0.2", "single", False),
        ("Open MPI 5.0.11", "multiple", False),
        ("Intel MPI 2021.18.1", "multiple", False),
    ],
)
def test_what_threads_cost_small_messages_is_told_of_mpich(name, given, told):
    mpi = {"name": name, "ranks": 2, "files": [], "threads": {"asked": "multiple", "given": given}}
    assert ["mpi4py.rc.thread_level = 'serialized'" in line for line in said._mpi(mpi)].count(True) == told


@pytest.mark.parametrize("wrong", [[], ["the end"]])
def test_the_end(wrong):
    assert [*said.end(Findings({}, wrong))] == (["", "wrong:      the end"] if wrong else ["", "all is well"])
