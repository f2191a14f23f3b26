"""The scripts of bench/ run; what they measure is not asserted."""

import ast
import importlib
import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from launch import REPOSITORY, mpirun, run

GLOO = ["gloo"] if find_spec("torch") else []


SHARED = ("shared_arrays", "shared_result")


def test_a_launch_measures_and_checks_every_result(tmp_path):
    quick = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import allreduce as b\n"
        "b.SIZES = [4, 4096]; b.SECONDS = 0; b.main()"
    )
    command = [sys.executable, "-c", quick, REPOSITORY / "bench", "--worker", "found.json"]
    done = mpirun(2, command, tmp_path)
    assert done.status == 0, done.err
    launch = json.loads((tmp_path / "found.json").read_text())
    assert (launch["ranks"], launch["wrong"]) == (2, 0)
    assert [(row["calls"], row["bytes"]) for row in launch["rows"]] == [(1, 4), (1, 4096), (10, 4), (10, 4096)]
    for row in launch["rows"]:
        names = {"mpi4py ring", "native", "auto", *SHARED, "recursive_doubling", "circulant", *GLOO}
        assert set(row["us"]) == names
        assert all(len(times) >= 11 and min(times) > 0 for times in row["us"].values())
        assert set(row["memory_share"]) == set(row["us"])
        assert min(row["memory_share"].values()) > 0


def test_a_wrong_result_is_counted(tmp_path):
    broken = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import allreduce as b; b.SIZES = [64]; b.SECONDS = 0\n"
        "b.plain_ring = lambda comm, x: None\n"
        "b.main()"
    )
    done = mpirun(2, [sys.executable, "-c", broken, REPOSITORY / "bench", "--worker", "found.json"], tmp_path)
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "found.json").read_text())["wrong"] >= 2 * 2 * 11


def script(monkeypatch, name):
    """One of ``bench/``, as a module."""
    monkeypatch.syspath_prepend(REPOSITORY / "bench")
    return importlib.import_module(name)


@pytest.fixture
def allreduce(monkeypatch):
    module = script(monkeypatch, "allreduce")
    monkeypatch.setattr(module, "SIZES", [4, 1 << 20])
    monkeypatch.setattr(module, "CALLS", (1,))
    return module


def launch(slow=1.0, ranks=2):
    """Of ring three times as fast as native at 4 B, and half as fast at 1 MiB; the machine is slow for a while."""
    while_ = np.array([1.0, 1, 1, 10, 10, 10, 10]) * slow
    rows = [
        {"calls": 1, "bytes": size, "us": {"native": (native * while_).tolist(), "ring": (ring * while_).tolist()}}
        for size, native, ring in ((4, 3, 1), (1 << 20, 100, 200))
    ]
    return {"ranks": ranks, "rows": [{**row, "memory_share": {"native": 0.25, "ring": 0.5 * slow}} for row in rows]}


def test_the_speed_is_the_ratio_within_a_repetition_and_the_spread_that_of_launches(allreduce):
    launches = [launch(), launch(2.0), launch(1.5), launch(ranks=4)]
    launches[1]["rows"][0]["us"]["ring"] = [6.0] * 7
    table = allreduce.summarize(launches)
    assert [(row["ranks"], row["bytes"], row["repetitions"]) for row in table] == [
        *((2, 4, 21), (2, 1 << 20, 21)),
        *((4, 4, 7), (4, 1 << 20, 7)),
    ]
    assert [row["ring"] for row in table] == [[3, 3, 10], [0.5, 0.5, 0.5], [3, 3, 3], [0.5, 0.5, 0.5]]
    assert table[0]["native_us"] == 45
    assert table[0]["memory_share"] == {"native": 0.25, "ring": 0.75}


def test_a_record_is_shown_and_drawn(allreduce, tmp_path, capsys):
    machine = {"cpu": "CPU", "cores": 2, "mpi4py": "4", "numpy": "2", "python": "3", "mpicoll": "1", "date": "today"}
    table = allreduce.summarize([launch(), launch(ranks=4)])
    record = {"mpi": "MPI 1", "machine": machine, "launches": 1, "wrong": 0, "table": table}
    record["memory"] = {"2": [20.0, 19.0, 21.0], "4": [10.0, 9.0, 11.0]}
    allreduce.show(record)
    out = capsys.readouterr().out
    assert (
        "| 2 ranks, one call at a time | native us | ring |\n|---:|---:|---|\n| 4 B | 30.0 | 3.00 (3.00 to 3.00) |"
        in out
    )
    assert "| 4 ranks, more than cores, one call at a time |" in out
    assert "bandwidth, 20.0 GB/s a rank (19.0 to 21.0), at 1 MiB: native 0.25, ring 0.50" in out
    for row in table:
        row["auto"] = row["ring"]
    allreduce.draw([record, record], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_what_small_calls_cost_is_measured(tmp_path):
    quick = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import overhead as b\nb.REPETITIONS, b.CALLS = 2, 5; b.main()"
    )
    done = mpirun(2, [sys.executable, "-c", quick, REPOSITORY / "bench", "--worker", "found.json"], tmp_path)
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert rows["native, 4 bytes (us)"] > 0
    assert "Comm.Allreduce, over native (us)" in rows
    assert 0 < rows["flight record, begin and end of a call (us)"] < 1000


def test_what_importing_costs_is_measured_as_installed(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    overhead = script(monkeypatch, "overhead")
    monkeypatch.setattr(overhead, "PROCESSES", 1)
    where = "import json, mpicoll, sys; print(json.dumps([mpicoll.__cached__, sys.flags.dont_write_bytecode]))"
    monkeypatch.setattr(overhead, "START", where)
    ((cached, unwritten),) = overhead.starts()
    assert not cached.startswith(str(REPOSITORY))
    assert not unwritten


PYTORCH = """import sys; sys.path.insert(0, sys.argv.pop(1)); import pytorch as b
b.SUBJECTS = {"random": b.Subject(None, (16,), 0.01, 4, 2)}
"""


def beside_pytorch(tmp_path, more=""):
    """A quick launch of bench/pytorch.py, and what is done before it to break it."""
    command = [sys.executable, "-c", f"{PYTORCH}{more}b.main()", REPOSITORY / "bench"]
    done = mpirun(2, [*command, "--subject", "random", "--seed", "1", "--worker", "found.json"], tmp_path)
    assert done.status == 0, done.err
    return json.loads((tmp_path / "found.json").read_text())


@pytest.mark.skipif(not GLOO, reason="needs torch, which make bench-gloo installs")
def test_training_beside_pytorch_is_the_same_training(tmp_path):
    launch = beside_pytorch(tmp_path)
    assert launch["apart"] < 1e-4
    assert 0 < launch["waiting"] <= launch["agreeing"] < 1
    assert all(len(found) == 3 and min(found) > 0 for found in launch["seconds"].values())


@pytest.mark.skipif(not GLOO, reason="needs torch, which make bench-gloo installs")
@pytest.mark.parametrize("broken", ["Distributed", "Replicated"])
def test_training_that_does_not_agree_is_told_from_one_that_does(tmp_path, broken):
    alone = f"b.{broken}.__init__ = lambda self, *args, **kwargs: b.Theirs.__init__(self, *args, **kwargs)\n"
    alone += f"b.{broken}.step, b.{broken}.batches = b.Theirs.step, b.Theirs.batches\n"
    assert beside_pytorch(tmp_path, alone)["apart"] > 0.1


@pytest.fixture
def pytorch(monkeypatch):
    return script(monkeypatch, "pytorch")


def launched_beside_pytorch(module, slow=1.0):
    """The sides of DistributedDataParallel three times and twice as slow as ours; the machine is slow for a while."""
    while_ = np.array([100.0, 1, 1, 10]) * slow
    sides = {module.OURS: 2, module.REPLICA: 2, module.THEIRS: 6, module.TUNED: 4}
    sides |= dict.fromkeys(module.ALONE.values(), 1)
    seconds = {side: (time * while_).tolist() for side, time in sides.items()}
    launch = {"subject": "fashion-mnist", "ranks": 2, "parameters": 9, "algorithm": "ring", "mpi": "MPI 1"}
    looks = {side: [[1.0, 0.5], [0.5, 0.7], [0.4, 0.9], [0.4, 0.8]] for side in module.ALONE}
    looks[module.TUNED] = [[1.1, 0.5], [0.5, 0.9], [0.4, 0.7], [0.4, 0.8]]
    return {**launch, "apart": 1e-6, "agreeing": 0.5, "waiting": 0.1, "seconds": seconds, "looks": looks}


def test_the_ratio_of_steps_is_that_within_a_round(pytorch):
    (row,) = pytorch.summarize([launched_beside_pytorch(pytorch, slow) for slow in (1, 1, 3)])
    assert list(row["ratio"].values()) == [[1, 1, 1], [1, 1, 1], [3, 3, 3], [2, 2, 2]]
    assert row["agreement"][pytorch.TUNED] == [0.75, 0.75, 0.75]
    assert row["ms"][pytorch.OURS] == [2000, 2000, 6000]


def test_seconds_to_an_accuracy_are_all_blocks_up_to_the_first_that_has_it(pytorch):
    (row,) = pytorch.summarize([launched_beside_pytorch(pytorch, slow) for slow in (1, 3)])
    steps = pytorch.SUBJECTS["fashion-mnist"].steps
    assert row["after"][pytorch.OURS] == [3 * steps] * 3
    assert row["after"][pytorch.TUNED] == [2 * steps] * 3
    assert row["until"][pytorch.OURS] == [102 * 2 * 2 * steps, 102 * 2 * steps, 102 * 2 * 3 * steps]
    assert row["sooner"][pytorch.THEIRS] == [3, 3, 3]
    assert row["sooner"][pytorch.TUNED] == [round(101 * 4 / 204, 3)] * 3
    assert row["curves"][pytorch.THEIRS] == 0
    assert row["curves"][pytorch.TUNED] == pytest.approx(0.1 / 4)


def test_a_record_beside_pytorch_is_shown_and_drawn(pytorch, tmp_path, capsys):
    machine = {"cpu": "CPU", "cores": 2, "mpi4py": "4", "numpy": "2", "torch": "2", "python": "3", "mpicoll": "1"}
    table = pytorch.summarize([launched_beside_pytorch(pytorch)])
    record = {"mpi": "MPI 1", "machine": {**machine, "date": "today"}, "launches": 1, "table": table}
    pytorch.show(record)
    out = capsys.readouterr().out
    assert "| DistributedDataParallel | 6000.00 (6000.00 to 6000.00) | 3.00 (3.00 to 3.00) |" in out
    assert "Test losses are 2.5% apart" in out
    pytorch.draw(record, tmp_path / "pytorch.png")
    assert (tmp_path / "pytorch.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def averaging(monkeypatch):
    return script(monkeypatch, "averaging")


def test_averaging_is_measured_with_emulated_devices(tmp_path):
    quick = """import sys; sys.path.insert(0, sys.argv.pop(1)); import averaging as b
b.DATA, b.COMMON["epochs"], b.LRS, b.EVERY = "digits", 1, (0.01, 1e30), (4,)
b.HOSTS, b.BATCH, b.SAMPLE, b.BLOCK, b.ACCURACY = (1, 2), 5, 1e-3, 8, 0.5
b.main()
"""
    runs = {}
    for part in ("often", "faster"):
        command = [sys.executable, "-c", quick, REPOSITORY / "bench", "--part", part, "--seed", "0"]
        done = mpirun(2, [*command, "--worker", f"{part}.json"], tmp_path)
        assert done.status == 0, done.err
        runs[part] = json.loads((tmp_path / f"{part}.json").read_text())["runs"]
    assert [(run["lr"], run["outer"], run["every"]) for run in runs["often"]] == [
        (lr, *way) for lr in (0.01, 1e30) for way in ((None, None), ("mean", 4), ("slowmo", 4))
    ]
    assert [run["loss"] is not None for run in runs["often"]] == 3 * [True] + 3 * [False]
    assert [run["ranks"] for run in runs["faster"]] == [1, 2, 2, 2]
    for one in runs["faster"]:
        assert np.diff([0, *one["seconds"]]).min() >= 8 * 5 * 1e-3
        assert one["accuracy"][-1] >= 0.5 > max([0, *one["accuracy"][:-1]])


def averaged(module, slow=1.0):
    """Launches of both parts: ranks at half of their speed alone; averages of many steps have diverged."""
    ways = [(None, None), *((outer, every) for outer in module.OUTERS for every in module.EVERY)]
    reached, diverged = {"loss": 0.2, "accuracy": 0.8}, {"loss": None, "accuracy": 0.0}
    often = [
        {"lr": lr, "outer": outer, "every": every, **(diverged if every == 128 else reached)}
        for lr in module.LRS
        for outer, every in ways
    ]
    facts = {"algorithm": "ring", "accuracy": [0.1, 0.1, 0.9]}
    faster = [
        {"ranks": p, "strategy": name, "seconds": (np.array([9.0, 10, 11]) * slow * min(p, 2)).tolist(), **facts}
        for p in module.HOSTS
        for name in module.SCALED
        if p > 1 or name == "sync"
    ]
    return {"often": [{"runs": often}], "faster": [{"runs": faster, "parameters": 1000}]}


def test_a_speedup_is_beside_one_rank_with_the_same_seed(averaging):
    launches = [averaged(averaging, slow) for slow in (1, 1, 5)]
    table = averaging.summarize({part: [launch[part][0] for launch in launches] for part in ("often", "faster")})
    rows = [row for row in table if row["part"] == "faster"]
    assert len(rows) == 1 + 4 * len(averaging.SCALED)
    for row in rows:
        p = row["ranks"]
        assert row["speedup"] == [p / 2, p / 2, p / 2] if p > 1 else [1, 1, 1]
        assert row["sooner"] == [0.5, 0.5, 0.5] if p > 1 else [1, 1, 1]
        assert row["after"] == [3 * averaging.BLOCK] * 3
    assert [row["diverged"] for row in table if row["part"] == "often" and row["every"] == 128] == [3, 3, 3, 3]


def test_a_prediction_is_of_computing_and_of_bytes_at_the_rate_of_a_link(averaging, monkeypatch):
    monkeypatch.setattr(averaging, "RATE", "1mbit")
    monkeypatch.setattr(averaging, "BATCH", 10)
    monkeypatch.setattr(averaging, "SAMPLE", 0.1)
    # 31250 floats are a megabit: two ranks send one of them each in a second, as long as they compute
    assert averaging.predicted(31250, 1, 1) == 1
    assert averaging.predicted(31250, 2, 1) == 1
    assert averaging.predicted(31250, 2, 4) == pytest.approx(2 / 1.25)


def test_an_accuracy_that_was_not_reached_is_told(averaging):
    launches = averaged(averaging)
    launches["faster"][0]["runs"][-1]["accuracy"] = [0.1]
    with pytest.raises(SystemExit, match="16 ranks, average, every 32 steps: an accuracy of 0"):
        averaging.summarize(launches)


def test_a_record_of_averaging_is_shown_and_drawn(averaging, tmp_path, capsys):
    table = averaging.summarize(averaged(averaging))
    record = {"mpi": "MPI 1", "machine": {"cpu": "CPU", "cores": 2}, "parameters": 1000, "seeds": 1, "table": table}
    averaging.show(record)
    out = capsys.readouterr().out
    assert "| mean | 0.1 | 32 | 0.2 (0.2 to 0.2) | 80.0% (80.0% to 80.0%) |" in out
    assert "| mean | 0.1 | 128 | diverged |  |" in out
    averaging.draw(record, tmp_path / "averaging.png")
    assert (tmp_path / "averaging.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def grids(monkeypatch):
    return script(monkeypatch, "grids")


def test_grids_are_measured_with_emulated_devices(tmp_path):
    quick = """import sys; sys.path.insert(0, sys.argv.pop(1)); import grids as b
b.FLOPS, b.CASES, b.LAYERS = 1e5, {"few": b.Case("few", 12, 8, 2, 1, 2)}, 2
b.main()
"""
    command = [sys.executable, "-c", quick, REPOSITORY / "bench", "--case", "few"]
    done = mpirun(2, [*command, "--worker", "found.json"], tmp_path)
    assert done.status == 0, done.err
    runs = {one["grid"]: one for one in json.loads((tmp_path / "found.json").read_text())["runs"]}
    assert set(runs) == {"data=2", "pipe=2", "tensor=2"}
    for one in runs.values():
        assert len(one["ms"]) == 3
        assert min(one["ms"]) >= ((4 + 6) * 12 * 12 + 6 * 12 * 16) * 8 / 2 / 1e5 * 1e3
        assert one["loss"] == pytest.approx(runs["data=2"]["loss"], rel=1e-5)
    assert runs["pipe=2"]["held"] == 2


def test_what_a_grid_takes_is_predicted(grids, monkeypatch):
    monkeypatch.setattr(grids, "FLOPS", 1e6)
    monkeypatch.setattr(grids, "RATE", "1mbit")
    case = grids.Case("", 50, 64, 4, 1, 1)
    device = (4 + 7 * 6) * 50 * 50 + 6 * 50 * grids.CLASSES  # for each sample
    for axes in case.grids:
        found = grids.predicted(case, axes)
        assert found["device"] == pytest.approx(device * 64 / 4 / 1e3, rel=1e-3)
        if axes[1] == 1:
            assert found["ms"] == pytest.approx(found["device"], rel=1e-3)
        else:
            assert found["ms"] > found["device"] / (1 - found["bubble"])  # stages are not all alike
    # Four hosts of a rank: 2 * 3/4 of what is added up goes by each link.
    there = case._replace(hosts=4)
    parameters = 8 * 51 * 50 + 51 * grids.CLASSES
    sums = 4 * 64 * 50 * (4 + 4)  # bytes: outputs of layers 1, 3, 5 and 7, and errors by inputs of layers 2, 4, 6 and 8
    assert grids.predicted(there, (4, 1, 1))["ms"] == pytest.approx(
        device * 16 / 1e3 + 1.5 * 4 * parameters * 8 / 1e3, rel=1e-3
    )
    assert grids.predicted(there, (1, 1, 4))["ms"] == pytest.approx(device * 16 / 1e3 + 1.5 * sums * 8 / 1e3, rel=1e-3)
    assert grids.predicted(there, (1, 4, 1))["ms"] > grids.predicted(case, (1, 4, 1))["ms"]


def found_of_grids(module, slow=1.0):
    """A launch of each case: the more stages, the slower."""
    return {
        name: {
            "parameters": 1000,
            "runs": [
                {
                    "grid": f"pipe={pipe}",
                    "axes": (data, pipe, tensor),
                    "ms": [10.0 * pipe * slow, 11.0 * pipe * slow, 12.0 * pipe * slow],
                    "loss": 2.0,
                    "sent": 1e3 if pipe == 1 else None,
                    "held": pipe,
                }
                for data, pipe, tensor in case.grids
                if tensor == 1
            ],
        }
        for name, case in module.CASES.items()
    }


def test_grids_are_compared_within_a_launch(grids, tmp_path, capsys):
    launches = [found_of_grids(grids, slow) for slow in (1, 1, 5)]
    by_case = {name: [launch[name] for launch in launches] for name in grids.CASES}
    table = grids.summarize(by_case)
    first = [row for row in table if row["case"] == "small"]
    assert [row["grid"] for row in first] == ["pipe=1", "pipe=2", "pipe=4", "pipe=8"]
    assert [row["speed"] for row in first] == [[1 / n] * 3 for n in (1, 2, 4, 8)]
    assert first[1]["ms"] == [22, 22, 110]
    parameters = dict.fromkeys(grids.CASES, 1000)
    record = {"mpi": "MPI 1", "machine": {"cpu": "CPU", "cores": 2}, "parameters": parameters, "table": table}
    grids.show(record)
    assert "| pipe=2 | 8 | 11% |  | 22 (22 to 110) |" in capsys.readouterr().out
    grids.draw(record, tmp_path / "grids.png")
    assert (tmp_path / "grids.png").read_bytes().startswith(b"\x89PNG")
    by_case["large"][2]["runs"][0]["loss"] = 2.1
    with pytest.raises(SystemExit, match="large: grids do not train the same model"):
        grids.summarize(by_case)


@pytest.fixture
def network(monkeypatch):
    module = script(monkeypatch, "network")
    near = module.Experiment(4, (1 << 20, 4 << 20), ("native", "auto"), rate="200mbit")
    far = module.Experiment(8, (4, 64), ("native", "auto"), delay=1)
    hosts = module.Experiment(4, (4 << 20,), ("native", "auto"), 2, "200mbit")
    monkeypatch.setattr(module, "EXPERIMENTS", {"near": near, "far": far, "hosts": hosts})
    return module


def on_network(module, slow=1.0):
    """Native at half of the links' rate of 25 MB/s, and as much too slow; auto twice as fast, sending a tenth more."""
    launches = {}
    for name, experiment in module.EXPERIMENTS.items():
        rows = []
        for size in experiment.sizes:
            least = 2 * size * (experiment.hosts - 1) / experiment.hosts
            us = least / 25 * 2 * slow
            sent = {"native": 2 * least, "auto": 1.1 * least} if experiment.rate else {}
            rows.append({"bytes": size, "us": {"native": [us, us, 9 * us], "auto": [us / 2, us / 2, us]}, "sent": sent})
        launches[name] = {"mpi": "MPI 1", "rows": rows}
    return launches


def test_the_share_of_the_wire_is_that_of_the_least_bytes(network):
    slowly, quickly = on_network(network, 2), on_network(network)
    table = network.summarize({name: [quickly[name], quickly[name], slowly[name]] for name in quickly})
    assert [(row["experiment"], row["bytes"]) for row in table] == [
        *(("near", 1 << 20), ("near", 4 << 20), ("far", 4), ("far", 64), ("hosts", 4 << 20))
    ]
    for row in table:
        assert row["auto"] == [2, 2, 2]
        assert ("wire" in row) == (row["experiment"] != "far")
        if "wire" in row:
            assert row["wire"] == {"native": [0.5, 0.25, 0.5], "auto": [1, 0.5, 1]}
            assert row["sent"] == {"native": [2, 2, 2], "auto": [1.1, 1.1, 1.1]}


def test_a_record_of_the_network_is_shown_and_drawn(network, tmp_path, capsys):
    table = network.summarize({name: [launch] for name, launch in on_network(network).items()})
    machine = {"cpu": "CPU", "cores": 2, "mpi4py": "4", "mpicoll": "1", "date": "today"}
    record = {"mpi": "MPI 1", "machine": machine, "launches": 1, "wrong": 0, "table": table}
    network.show(record)
    out = capsys.readouterr().out
    assert "near: share of the links' rate" in out
    assert "| 1 MiB | 125.83 | 50% (50% to 50%) | 100% (100% to 100%) |" in out
    assert "at 4 MiB: native 200% (200% to 200%), auto 110% (110% to 110%)" in out
    assert "| 64 B | 0.01 | 2.00 (2.00 to 2.00) |" in out
    network.draw(record, tmp_path / "network.png")
    assert (tmp_path / "network.png").read_bytes().startswith(b"\x89PNG")


def test_a_launch_on_the_cluster_measures_and_checks_every_result(tmp_path):
    quick = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import network as b; b.SECONDS, b.MINIMUM = 0, 2\n"
        "b.EXPERIMENTS['tiny'] = b.Experiment(4, (4 << 10,), ('native', 'auto', 'ring'), 2, '1gbit'); b.main()"
    )
    worker = [sys.executable, "-m", "mpi4py", "-c", quick, REPOSITORY / "bench", "--experiment", "tiny"]
    cluster = [sys.executable, REPOSITORY / "bench" / "cluster.py", "--rate", "1gbit", "--"]
    done = run([*cluster, *worker, "--worker", "found.json"], tmp_path)
    if done.status == 77:
        pytest.skip(done.err.strip())
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == 0
    assert found["environment"]
    (row,) = found["rows"]
    assert {*row["us"]} == {"native", "auto", "ring", *GLOO}
    assert all(len(us) >= 2 and min(us) > 0 for us in row["us"].values())
    assert 1.75 * 4096 < row["sent"]["ring"] < 20_000


BUTTERFLY = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import butterfly as b\n"
    "b.SMALL, b.EXPERIMENTS, b.TRIAL, b.BATCH = 'powerlaw:512x64:8', {'tiny': b.Experiment(4)}, 2, 8\nb.main()"
)


def test_strategies_reach_the_loss_that_matrices_foretell(tmp_path):
    command = [sys.executable, "-c", BUTTERFLY, REPOSITORY / "bench", "--experiment", "tiny"]
    run([*command, "--launches", "1", "--worker", "chosen.json"], tmp_path)
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    for kind in ("logistic", "svm"):
        for of in chosen[kind]["strategies"].values():
            assert all(loss <= chosen[kind]["target"] for _, loss in of["runs"])
    chosen["svm"]["strategies"]["butterfly"]["runs"][0][1] *= 1.01
    (tmp_path / "other.json").write_text(json.dumps(chosen))
    for file, wrong in (("chosen.json", 0), ("other.json", 1)):
        done = mpirun(4, [*command, "--seed", "0", "--chosen", file, "--worker", "found.json"], tmp_path)
        assert done.status == 0, done.err
        found = json.loads((tmp_path / "found.json").read_text())
        assert found["wrong"] == wrong
        assert found["seconds"]["svm"].keys() == chosen["svm"]["strategies"].keys()
        assert all(seconds > 0 for of in found["seconds"].values() for seconds in of.values())


def test_time_to_a_loss_is_compared_within_a_launch(monkeypatch, tmp_path, capsys):
    butterfly = script(monkeypatch, "butterfly")
    launches, chosen = {}, {}
    for name, at in butterfly.EXPERIMENTS.items():
        steps = {one: 100 if one == "allreduce" else 200 for one in butterfly.strategies(at.ranks)}
        of = {one: {"lr": 8.0, "runs": [[count, 0.5]] * 3} for one, count in steps.items()}
        chosen[name] = {kind: {"least": 0.4, "target": 0.5, "strategies": of} for kind in butterfly.MODELS}
        launches[name] = []
        for slow in (1, 10, 2):
            seconds = {one: slow * (6 if one == "allreduce" else 2) for one in steps}
            trial = {"native": 2.0, "recursive_doubling": 1.0, "halving_doubling": 3.0}
            launches[name].append({"trial": trial, "seconds": dict.fromkeys(butterfly.MODELS, seconds)})
    table = butterfly.summarize(launches, chosen)
    rows = {row["strategy"]: row for row in table if (row["experiment"], row["model"]) == ("16 hosts, 5 ms", "svm")}
    assert rows["butterfly"]["speed"] == [3, 3, 3]
    assert rows["butterfly"]["ms"] == [20, 10, 100]
    assert {one: row["foretold"] for one, row in rows.items()} == {
        **{"allreduce": 1, "butterfly": 2, "gossip, exponential": 2, "gossip, ring": 2},
        **{"average, every 2": 1, "average, every 4": 2},
    }
    rates = [row["foretold"] for row in table if (row["experiment"], row["model"]) == ("8 hosts, 100 Mbit/s", "svm")]
    assert rates == [1, 0.875, 0.875, 0.438, 1, 1.5]
    machine = {"cpu": "CPU", "cores": 2, "mpicoll": "1", "date": "today"}
    record = {"mpi": "MPI 1", "machine": machine, "launches": 3, "wrong": 0, "table": table}
    butterfly.show(record)
    assert "| butterfly | 8 | 200 | 20.00 | 4.00 | 3.00 (3.00 to 3.00) | 2.00 |" in capsys.readouterr().out
    butterfly.draw(record, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


ON_GPU = """
import sys
sys.path.insert(0, BENCH)
import gpu as b
if "--worker" not in sys.argv:
    sys.executable = "./python"
b.__file__, b.RANKS, b.TRAINED, b.BOXES = __file__, [2], [], [4096]
b.SECONDS, b.MINIMUM = 0, 2
b.main()
"""
FAKE = """
import kernels
import mpicoll.measure.machine
import pytest
def prepare(fake):
    kernels.add(fake, pytest.MonkeyPatch())
    mpicoll.measure.machine.COPIED = 1 << 16
"""


def on_gpu(tmp_path, *options, devices="1"):
    """bench/gpu.py on a GPU that is none, tests/fakecupy."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {REPOSITORY}/tests/fakecupy "$@"\n')
    python.chmod(0o755)
    (tmp_path / "small.py").write_text(FAKE)
    (tmp_path / "bench.py").write_text(ON_GPU.replace("BENCH", repr(str(REPOSITORY / "bench"))))
    env = {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "FAKECUPY_WITH": "small", "FAKECUPY_DEVICES": devices}
    return run([sys.executable, "bench.py", *options], tmp_path, env=env)


def test_arrays_on_a_gpu_are_measured_recorded_and_drawn(tmp_path, monkeypatch):
    options = ["--sizes", "64", "12000", "--launches", "1", "--out", "found.json"]
    done = on_gpu(tmp_path, *options)
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "found.json").read_text())
    assert (record["gpu"]["name"], record["wrong"]) == ("Fake GPU", 0)
    calls = [row for row in record["table"] if "box" not in row]
    assert [(row["in_place"], row["bytes"]) for row in calls] == [(p, n) for n in (64, 12000) for p in (False, True)]
    for row in calls:
        assert [row[name]["way"] for name in ("native", "ipc", "staged")] == ["", "ipc", "staged"]
        assert row["native"]["speed"] == [1, 1, 1]
        assert min(row["ipc"]["us"]) > 0
    boxes = [(row["box"], row["shared"], row["bytes"], [*row["staged"]]) for row in record["table"] if "box" in row]
    assert boxes == [(4096, shared, 12000, ["us", "share", "way"]) for shared in (True, False)]
    assert on_gpu(tmp_path, "--show", "found.json").out == done.out
    script(monkeypatch, "gpu").draw(record, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_boxes_have_the_size_that_is_asked_for(monkeypatch):
    from mpicoll.mpi.gpu import staging

    before = staging.BUFFER, staging.register
    with script(monkeypatch, "gpu").boxes(4096, shared=False) as locked:
        assert staging.BUFFER == 4096
        assert not staging.register(np.zeros(1))
        assert locked == [False]
    assert (staging.BUFFER, staging.register) == before


def test_without_a_gpu_nothing_is_launched_or_written(tmp_path):
    failed = on_gpu(tmp_path, "--out", "found.json", devices="0")
    assert (failed.status, failed.out) == (1, "")
    assert failed.err.startswith("mpicoll: there is no GPU to be used here (cudaErrorInsufficientDriver")
    assert failed.err.count("\n") == 1
    assert not (tmp_path / "found.json").exists()


def test_shares_and_steps_are_summarized_over_launches(monkeypatch, capsys):
    gpu = script(monkeypatch, "gpu")

    def launch(us, **more):
        row = {"implementation": "ipc", "in_place": True, "bytes": 1 << 20, "way": "ipc", "median": us}
        native = {**row, "implementation": "native", "way": "", "median": 70.0, "memory_share": 0.1, "speed": 1.0}
        ipc = {**row, "memory_share": 5 / us, "speed": 70 / us}
        boxes = [{**ipc, "implementation": "staged", "speed": None, "box": 4096, "shared": True}]
        return {"ranks": 2, "rows": [native, {**ipc, **more}, *boxes], "gradient_us": 1000.0}

    rows = gpu.summarize([launch(10.0), launch(7.0, way="staged"), launch(14.0)], {1: [3.0], 2: [4.0, 5.0]})
    ipc = {"us": [10, 7, 14], "share": [0.5, 0.357, 0.714], "speed": [7, 5, 10], "way": "ipc, staged"}
    assert rows[0]["ipc"] == ipc
    assert [row.get("agreement") for row in rows] == [None, None, [0, 0, 0], [0.225, 0.2, 0.25]]
    machine = {"cpu": "CPU", "cores": 2, "mpi4py": "4", "numpy": "2", "python": "3", "mpicoll": "1", "date": "today"}
    versions = {"name": "GPU", "cupy": "14", "cuda_runtime": "13.0", "cuda_driver": "13.0"}
    link = {"copy": 3000.0, "to_host": 50.0, "from_host": 51.0}
    counts = {"launches": 3, "wrong": 0, "parameters": 20, "refused": {"nccl": "it is not there"}}
    gpu.show({"mpi": "MPI", "machine": machine, "gpu": versions, "gpu_memory": link, **counts, "table": rows})
    out = capsys.readouterr().out
    assert "| 1 MiB | 70.0 | 10.0 by ipc, staged | 7.00 (5.00 to 10.00) | 0.50 (0.36 to 0.71) | - | - | - |\n" in out
    assert "| 2 ranks, 1 MiB, 4 KiB that ranks share | 10.0 by ipc | 0.50 (0.36 to 0.71) |\n" in out
    assert "| 2 rank(s), 20 parameters | 4.5 (4 to 5) | 0.225 (0.2 to 0.25) |\n" in out


# ---- what is needed is looked for before anything is measured

SCRIPTS = sorted(path.stem for path in (REPOSITORY / "bench").glob("*.py") if path.stem not in ("cluster", "common"))


def measured(*args, **more):
    raise AssertionError("something is measured already")


def alone(monkeypatch, tmp_path, name, *options):
    """A script that writes to a folder of the test's, and measures nothing."""
    module, shared = script(monkeypatch, name), script(monkeypatch, "common")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    for one in (module, shared):
        monkeypatch.setattr(one, "RESULTS", tmp_path / "results", raising=one is shared)
        monkeypatch.setattr(one, "PICTURE", tmp_path / "picture.png", raising=False)
    for job in ("launched", "written", "launch", "starts", "step", "train", "check"):
        monkeypatch.setattr(module, job, measured, raising=False)
    return module


def without_data(module, monkeypatch, tmp_path):
    if hasattr(module, "SUBJECTS"):
        monkeypatch.setattr(module, "SUBJECTS", {"random": module.SUBJECTS["random"]._replace(data="gone.npz")})
    else:
        monkeypatch.setattr(module, "DATA", "gone.npz")


def without_package(name):
    def prepare(module, monkeypatch, tmp_path):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")

    return prepare


def without_commands(module, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def without_mpirun(module, monkeypatch, tmp_path):
    without_commands(module, monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))


def without_its_own_mpirun(module, monkeypatch, tmp_path):
    """One that starts processes which MPI lets believe to be alone."""
    fake = tmp_path / "bin" / "mpirun"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nshift 2\nSLURM_STEP_NUM_TASKS=2 exec "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))


def without_folder(module, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "PICTURE", tmp_path / "gone" / "picture.png")


NEEDS = [
    ("pytorch", without_data, "'gone.npz' does not exist"),
    ("stragglers", without_data, "'gone.npz' does not exist"),
    ("strategies", without_data, "'gone.npz' does not exist"),
    ("pytorch", without_package("torch"), "the package torch is missing: pip install torch$"),
    ("butterfly", without_package("scipy"), "the package scipy is missing: pip install scipy$"),
    ("grids", without_package("matplotlib"), "the package matplotlib is missing"),
    ("network", without_commands, "77"),  # which says what is missing
    ("overhead", without_mpirun, "there is no mpirun: install an MPI beside this Python"),
    ("allreduce", without_its_own_mpirun, "the launcher started 2 rank.s., but .* sees only 1"),
    ("strategies", without_folder, "'.*/gone/picture.png' cannot be written: name a file in a folder "),
]


@pytest.mark.parametrize(("name", "prepare", "said"), NEEDS, ids=lambda part: getattr(part, "__name__", None))
def test_what_is_missing_is_told_before_anything_is_measured(monkeypatch, tmp_path, capfd, name, prepare, said):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    module = alone(monkeypatch, tmp_path, name)
    if prepare is without_data:
        monkeypatch.setattr(module, "MODULES", ())  # which may be missing here
    prepare(module, monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match=said) as ended:
        module.main()
    told = str(ended.value) if ended.value.code != 77 else capfd.readouterr().err
    assert told.strip().count("\n") == 0
    assert not list((tmp_path / "results").glob("*")) if (tmp_path / "results").exists() else True


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_record_that_is_not_there_is_told_in_a_line(monkeypatch, tmp_path, capsys, name):
    module = alone(monkeypatch, tmp_path, name, "--show", "gone.json")
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "--show: 'gone.json' is no file: name one that was recorded" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_packages_that_a_script_imports_are_looked_for(name):
    source = ast.parse((REPOSITORY / "bench" / f"{name}.py").read_text())
    imported, looked = set(), set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            imported |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODULES":
            looked = {*ast.literal_eval(node.value)}
    theirs = {one.partition(".")[0] for one in imported} - {"numpy", "mpi4py", "mpicoll", "cluster", "common", *SCRIPTS}
    theirs -= {*sys.stdlib_module_names}
    theirs -= {"torch", "matplotlib"} if name in ("allreduce", "network") else set()  # where it is, and for --plot
    assert theirs <= looked
    assert any(isinstance(node, ast.Call) and ast.unparse(node.func) == "look_first" for node in ast.walk(source))


# ---- what was measured is recorded, whatever comes after it

MACHINE = {"cpu": "CPU", "cores": 2, "mpi4py": "4", "numpy": "2", "torch": "2", "python": "3", "mpicoll": "1"}
MACHINE |= {"kernel": "6", "date": "today"}
SPEED = {"copy": 1.0, "to_host": 1.0, "from_host": 1.0}


def option(args, name):
    return args[args.index(name) + 1]


def found_by(module, name):
    """What stands in for the functions of a script that measure."""
    mpi = {"mpi": "MPI 1"}
    if name == "allreduce":
        return {"launched": lambda file, ranks: {**launch(ranks=ranks), **mpi, "wrong": 0, "memory": {"add": 9.0}}}
    if name == "averaging":
        parts = {part: {**found[0], **mpi, "parameters": 1000} for part, found in averaged(module).items()}
        return dict.fromkeys(("launched", "written"), lambda *args, **env: parts[option(args, "--part")])
    if name == "butterfly":
        strategies = {at.ranks: module.strategies(at.ranks) for at in module.EXPERIMENTS.values()}
        names = {one for of in strategies.values() for one in of}
        of = {one: {"lr": 8.0, "runs": [[100, 0.5]] * 3} for one in names}
        chosen = {kind: {"least": 0.4, "target": 0.5, "strategies": of} for kind in module.MODELS}
        seconds = dict.fromkeys(module.MODELS, dict.fromkeys(names, 2.0))
        trial = dict.fromkeys(module.ALGORITHMS, 1.0)
        return {
            "written": lambda *args, **env: chosen,
            "launch": lambda *args: {**mpi, "wrong": 0, "trial": trial, "seconds": seconds},
        }
    if name == "gpu":
        row = {"in_place": True, "bytes": 1 << 20, "median": 7.0, "memory_share": 0.1, "speed": 1.0}
        rows = [{**row, "implementation": one, "way": one} for one in ("native", "ipc", "staged")]
        gpu = {"gpus": [{"name": "GPU"}], "cupy": "14", "cuda_runtime": "13", "cuda_driver": "13"}
        facts = {"gpu_memory": SPEED, "memory": {}, "gpu": gpu, "refused": {}, "wrong": 0, "gradient_us": 1.0}
        return {
            "check": lambda: None,
            "launched": lambda file, ranks, *sizes: {**mpi, "ranks": ranks, "rows": rows, **facts},
            "step": lambda ranks, folder: 5.0,
        }
    if name == "grids":
        of = {case: {**found, **mpi} for case, found in found_of_grids(module).items()}
        return dict.fromkeys(("launched", "written"), lambda *args, **env: of[option(args, "--case")])
    if name == "network":
        by_size = {"native": [4.0, 4.0], "auto": [2.0, 2.0]}

        def across(one):
            rows = [{"bytes": n, "us": by_size, "sent": {"native": n}} for n in module.EXPERIMENTS[one].sizes]
            return {**mpi, "environment": {}, "wrong": 0, "rows": rows}

        return {"launch": across}
    if name == "overhead":
        return {"starts": lambda: [{"import (ms)": 1.0}], "launched": lambda *args: {**mpi, "rows": {"call (us)": 1.0}}}
    if name == "pytorch":
        return {"launched": lambda *args: {**launched_beside_pytorch(module), "subject": option(args, "--subject")}}
    if name == "stragglers":
        run = {**mpi, "seconds": [1.0, 2.0], "loss": [0.5, 0.1], "accuracy": 0.9, "staleness": [1, 2]}
        return {"launched": lambda *args: run}
    assert name == "strategies"
    run = {**mpi, "ranks": 4, "test_accuracy": 0.9, "seconds": 2.0, "bytes_sent_per_rank": 8, "out": "run"}
    return {"train": lambda *args: {**run, "per_rank": [{"messages": 3}]}}


def ends_after(monkeypatch, module, name, launches, error):
    """So many launches, then an error."""
    done = []

    def counted(measure):
        def count(*args, **more):
            if len(done) == launches:
                raise error
            done.append(measure(*args, **more))
            return done[-1]

        return count

    monkeypatch.setattr(module, "look_first", lambda *args, **more: None)
    monkeypatch.setattr(module, "SIZES", [4, 1 << 20], raising=False)
    monkeypatch.setattr(module, "CALLS", (1,), raising=False)
    monkeypatch.setattr(module, "machine", lambda: MACHINE)
    for job, measure in found_by(module, name).items():
        monkeypatch.setattr(module, job, measure if job == "check" else counted(measure))
    monkeypatch.setattr(module.random, "sample", lambda of, count: [*of]) if hasattr(module, "random") else None
    return done


FAILED = [
    (subprocess.CalledProcessError(3, "mpirun"), 1, "a launch has ended with status 3"),
    (subprocess.CalledProcessError(77, "cluster"), 77, "a launch has ended with status 77"),
    (subprocess.TimeoutExpired("mpirun", 600), 1, "a launch has not ended in 600 s"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (SystemExit("mpicoll: the data are gone"), 1, "mpicoll: the data are gone"),
    (ValueError("no JSON"), 1, "ValueError: no JSON"),
]
ENDS = [*((name, 5, FAILED[0]) for name in SCRIPTS), *(("pytorch", 2, of) for of in FAILED[1:])]


@pytest.mark.parametrize(("name", "launches", "failed"), ENDS)
def test_what_was_measured_before_a_launch_failed_is_recorded(monkeypatch, tmp_path, capsys, name, launches, failed):
    module = alone(monkeypatch, tmp_path, name)
    error, status, why = failed
    done = ends_after(monkeypatch, module, name, launches, error)
    with pytest.raises(SystemExit) as ended:
        module.main()
    (path,) = (tmp_path / "results").iterdir()
    record = json.loads(path.read_text())
    assert path.match(f"{name}*-unfinished.json")
    assert (ended.value.code, record["failed"], len(done)) == (status, why, launches)
    assert record.get("table") or record["found"]
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith(f"{name}.py: {why}; what was measured before is recorded")
    assert out or "found" in record
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_is_recorded_where_nothing_was_measured(monkeypatch, tmp_path, capsys, name):
    module = alone(monkeypatch, tmp_path, name)
    ends_after(monkeypatch, module, name, 0, FAILED[0][0])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith(f"{name}.py: {FAILED[0][2]}; nothing was measured before\n")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("later", ["summarize", "show"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_was_measured_is_recorded_though_what_is_made_of_it_fails(monkeypatch, tmp_path, name, later):
    module = alone(monkeypatch, tmp_path, name)
    ends_after(monkeypatch, module, name, -1, None)

    def fails(*args, **more):
        raise ZeroDivisionError

    monkeypatch.setattr(module, later, fails)
    with pytest.raises(ZeroDivisionError):
        module.main()
    (path,) = (tmp_path / "results").iterdir()
    record = json.loads(path.read_text())
    assert record["table"] if later == "show" else record["found"]
    assert path.name.endswith("-unfinished.json") == (later == "summarize")
