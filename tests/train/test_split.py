"""Models that are split over ranks: what does not fit, and jobs from outside."""

import json
import os
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import mpirun, run
from mpicoll import UserError
from mpicoll.train.grid import Sizes, sizes_of
from mpicoll.train.models import MODELS, Layered
from mpicoll.train.split import Split


def on(model: Layered, **given: Any) -> Split:
    """On the first rank of a grid of these sizes, without the others."""
    sizes = Sizes(1, given.pop("pipe", 1), given.pop("tensor", 1))
    beside = SimpleNamespace(rank=0, size=sizes.group)
    grid: Any = SimpleNamespace(sizes=sizes, at=Sizes(0, 0, 0), group=beside, tensor=beside, pipe=beside)
    return Split(model, grid, **given)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (MODELS["softmax"](4, 3, ()), {"pipe": 2}, "pipe=2 is more stages than the model has layers, 1: take pipe=1"),
        (MODELS["mlp"](4, 3, (5, 6)), {"pipe": 4}, "pipe=4 is more stages than the model has layers, 3: take pipe=3"),
        (MODELS["svm"](4, 3, ()), {"tensor": 5}, "tensor=5 is more shards than there are features, 4: take tensor=4"),
        (MODELS["mlp"](9, 3, (4,)), {"tensor": 5}, "tensor=5 is more shards than layer 0 has outputs, 4"),
        (MODELS["mlp"](9, 3, (8, 8)), {"tensor": 4}, "tensor=4 is more shards than layer 2 has outputs, 3"),
        (MODELS["mlp"](4, 3, (5, 6)), {"pipe": 2, "cuts": (1, 2)}, "--cut must name .* 1 number.s. from 1 to 2"),
        (MODELS["mlp"](4, 3, (5, 6)), {"pipe": 2, "cuts": (3,)}, "from 1 to 2, ascending; got 3"),
        (MODELS["mlp"](4, 3, (5, 6)), {"pipe": 3, "cuts": (2, 1)}, "ascending; got 2,1"),
        (Layered((4, 5, 6, 3), lambda outputs, y: (0, outputs)), {"tensor": 2}, "--grid tensor cuts the outputs"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(model, given, message):
    with pytest.raises(UserError, match=message):
        on(model, **given)


def test_stages_are_cut_by_cost_and_shards_share_the_parameters_out():
    model = MODELS["mlp"](100, 10, (20, 20, 20))
    assert on(model, pipe=2).size == 101 * 20  # 2000 of 3000 multiplications a sample
    assert on(model, pipe=2, cuts=(3,)).size == 101 * 20 + 2 * 21 * 20
    assert on(model, tensor=2).size == 101 * 10 + 10 * 20 + 20 + 21 * 10 + 10 * 10 + 10
    assert on(MODELS["softmax"](7, 3, ()), tensor=2).size == 3 * 3 + 3


TRAIN = ["mpicoll", "train", "--json", "--hidden", "64,32"]


def test_grids_reach_95_percent_each_going_on_from_the_one_before(tmp_path):
    """And a single rank goes on from the last, and predicts."""
    options, epochs = ["--out", "run", "--micro", "3", "--recompute", "--cut", "2"], 0
    for grid in ("data=2,pipe=2", "tensor=2,pipe=2", "data=2,tensor=2"):
        epochs += 5
        done = mpirun(4, [*TRAIN, *options, "--grid", grid, "--epochs", str(epochs)], tmp_path)
        assert (done.status, done.err) == (0, "")
        summary = json.loads(done.out.splitlines()[-1])
        assert summary["test_accuracy"] >= 0.95
        assert summary["grid"] == str(sizes_of(grid, 4))
        assert len(summary["per_rank"]) == 4
        parameters = summary["parameters"] * sizes_of(grid, 4).data
        assert sum(summary["parameters_held"]) == parameters
        held = rf"grid {summary['grid']}: {min(summary['parameters_held'])} to \d+ parameters a rank\n"
        assert re.search(held, done.out)
        assert epochs == 5 or re.search("bits may differ: grid data=2,pipe=2|tensor=2 -> ", done.out)
        if options[0] == "--out":
            assert max(summary["parameters_held"]) == 65 * 64 + 65 * 32  # of the first two layers
        options = ["--resume", "run"]
    alone = run([*TRAIN, *options, "--grid", "data=1", "--epochs", str(epochs + 1)], tmp_path)
    assert (alone.status, alone.err) == (0, "")
    assert "bits may differ: grid data=2,tensor=2 -> None\n" in alone.out
    predicted = run(["mpicoll", "predict", "run", "--data", "digits"], tmp_path)
    assert float(re.findall(r"accuracy ([\d.]+)%", predicted.err)[0]) > 95


def test_what_a_command_line_gets_wrong_is_one_line(tmp_path):
    for ranks, options, message in (
        (1, "--micro 2", "--micro is for stages, as --grid pipe=2 makes them: leave it out"),
        (1, "--cut 1-3", "'1-3' is not a list of layers like 1 or 1,3"),
        (2, "--grid pipe=2 --model softmax", "pipe=2 is more stages than the model has layers, 1"),
    ):
        failed = mpirun(ranks, ["mpicoll", "train", *options.split()], tmp_path)
        assert failed.status != 0
        (line,) = [line for line in failed.err.splitlines() if message in line]
        assert line.startswith(("mpicoll: ", "Error: "))
        assert "Traceback" not in failed.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("how", ["raises", "is killed"])
def test_a_rank_that_fails_in_the_middle_of_a_pipeline_ends_the_job(tmp_path, how):
    code = """\
        import os
        import signal
        import sys
        from pathlib import Path
        from mpi4py import MPI
        from mpicoll.mpi.comm import Comm
        from mpicoll.job.guard import ends_job
        from mpicoll.train import split
        from mpicoll.train.run import run
        from mpicoll.train.settings import Settings

        comm, calls, usual = MPI.COMM_WORLD, [], split.backward

        def breaks(*args):
            calls.append(args)
            if comm.rank == 1 and len(calls) == 5:
                if sys.argv[1] == "is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ZeroDivisionError("in the second step")
            return usual(*args)

        split.backward = breaks
        with ends_job(comm):
            run(Comm(comm), Settings(grid="pipe=3", hidden="20,20", out="run"))
    """
    (tmp_path / "job.py").write_text(textwrap.dedent(code))
    failed = mpirun(3, ["python", Path("job.py"), how], tmp_path)
    assert failed.status != 0
    if how == "is killed":
        assert not (tmp_path / "run").exists()
        return
    assert "mpicoll: rank 1 failed:\nTraceback" in failed.err
    assert "ZeroDivisionError: in the second step" in failed.err
    assert failed.err.count("Traceback") == 1
