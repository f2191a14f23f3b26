"""``mpicoll train --device gpu``, from the command line: what it says, and what it leaves behind."""

import json
import sys

import numpy as np

from launch import REPOSITORY, mpirun

ON_FAKE = [sys.executable, str(REPOSITORY / "tests" / "fakecupy"), "-m", "mpicoll", "train"]
NO_CUPY = "import sys; sys.modules['cupy'] = None; from mpicoll.cli import main; sys.exit(main())"
SMALL = ["--model", "softmax", "--batch-size", "512", "--algorithm", "ring"]
SHARED = "mpicoll: ranks 0-1 share Fake GPU (0000:01:00.0): more ranks than GPUs here; they take turns\n"


def test_the_command(tmp_path):
    from safetensors.numpy import load_file

    done = mpirun(2, [*ON_FAKE, *SMALL, "--device", "gpu", "--epochs", "1", "--out", "gpu"], tmp_path)
    assert (done.status, done.err) == (0, SHARED)
    assert "\nranks 0-1 on Fake GPU (0000:01:00.0)\n" in done.out
    assert json.loads((tmp_path / "gpu/environment.json").read_text())["cupy"] == "14.2.0"

    refused = mpirun(2, [*ON_FAKE, "--device", "cpu", "--epochs", "2", "--resume", "gpu"], tmp_path)
    assert refused.status == 1
    assert refused.err.startswith("mpicoll: --device is 'cpu', and was 'gpu': of a resumed run only --epochs, ")

    two = {"FAKECUPY_DEVICES": "2"}
    resumed = mpirun(2, [*ON_FAKE, "--epochs", "2", "--resume", "gpu"], tmp_path, env=two)
    assert (resumed.status, resumed.err) == (0, "")
    assert "\nrank 0 on Fake GPU (0000:01:00.0); rank 1 on Fake GPU (0000:02:00.0)\n" in resumed.out
    assert "  not as before, and bits may differ: gpu [" in resumed.out

    host = mpirun(2, [*ON_FAKE, *SMALL, "--epochs", "2", "--out", "cpu"], tmp_path)
    assert (host.status, host.err) == (0, "")
    assert "GPU" not in host.out
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("gpu", "cpu"))
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=1e-4, atol=1e-6)


def test_without_a_gpu_it_says_so_in_a_line_and_writes_nothing(tmp_path):
    options = [*SMALL, "--device", "gpu", "--out", "out"]
    for command, env, said in (
        ([sys.executable, "-c", NO_CUPY, "train"], {}, "a GPU needs CuPy, which cannot be imported ("),
        (ON_FAKE, {"FAKECUPY_DEVICES": "0"}, "there is no GPU to be used here (cudaErrorInsufficientDriver: "),
    ):
        done = mpirun(2, [*command, *options], tmp_path, env=env)
        assert done.status == 1
        (line,) = done.err.splitlines()
        assert line.startswith(f"mpicoll: {said}")
        assert list(tmp_path.iterdir()) == []
