"""A trained model reads other data as it read those it was trained on."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from safetensors import safe_open
from safetensors.numpy import save_file

from mpicoll import Comm, UserError
from mpicoll.cli import main
from mpicoll.train.checkpoint import latest
from mpicoll.train.data import load
from mpicoll.train.readers.raw import Schema
from mpicoll.train.run import run
from mpicoll.train.run_folder import HEADER, MODEL, read_model
from mpicoll.train.settings import Settings

POINTS = [[n % 3 == 0, 5 * (n % 3 == 1), 9 * (n % 3 == 2)] for n in range(30)]  # of three classes
Y = [n % 3 for n in range(30)]


def table(columns: str, header: bool = True, labels: Sequence[str] = "pqr") -> str:
    """A csv file of these columns: a, b, c or 0, 1, 2 are features, and what is called otherwise is the label."""
    names = {"a": 0, "b": 1, "c": 2, "0": 0, "1": 1, "2": 2}
    rows = [
        ",".join(str(int(point[names[name]])) if name in names else labels[label] for name in columns.split(","))
        for point, label in zip(POINTS, Y, strict=True)
    ]
    return "\n".join([columns] * header + rows) + "\n"


def sparse(base: int, columns: tuple[int, ...] = (0, 1, 2)) -> str:
    lines = [[f"{n + base}:{int(point[n])}" for n in columns if point[n]] for point in POINTS]
    return "".join(f"{label} {' '.join(line)}\n" for label, line in zip(Y, lines, strict=True))


def trained(folder: Path, name: str, text: str, **given: Any) -> Path:
    (folder / name).write_text(text)
    settings = Settings(
        **{
            "data": str(folder / name),
            "model": "softmax",
            "epochs": 15,
            "checkpoint": 15,
            "out": str(folder / "run"),
            **given,
        }
    )
    run(Comm(MPI.COMM_SELF), settings)
    return folder / "run"


def predict(model: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str], list[str]]:
    """Status, output and errors of the command."""
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status = main(["predict", str(model), "--data", str(data)])
    out, err = capfd.readouterr()
    return status, out.splitlines(), err.splitlines()


RIGHT = "accuracy 100.00% (30 of 30)"
UNNAMED = "mpicoll: '{}' does not name its columns: expected in the order a, b, c"

CSV: dict[str, tuple[str, list[str]]] = {
    "as it was": (table("a,b,c,label"), [RIGHT]),
    "in another order": (table("c,a,b,label"), [RIGHT]),
    "label first": (table("label,b,a,c"), [RIGHT]),
    "label in between, by another name": (table("b,y,c,a"), [RIGHT]),
    "without labels": (table("a,b,c"), []),
    "with a column of labels that is empty": (table("b,label,a,c", labels=["", "", ""]), []),
    "with quotes, and nothing in the column of labels": (table("b,a,c,label", labels=['""', "", " "]), []),
    "in another order without labels": (table("b,c,a"), []),
    "without a header": (table("a,b,c,label", header=False), [UNNAMED, RIGHT]),
    "without header and labels": (table("a,b,c", header=False), [UNNAMED]),
    "semicolons, quotes, a byte order mark": (
        "\ufeff" + table("c,b,a,label").replace(",", ";").replace("a;", '"a";', 1),
        [RIGHT],
    ),
    "a label that is not known": (
        table("a,b,c,label", labels="pqs"),
        ["mpicoll: 10 of 30 labels are none that the model knows, and count as wrong", "accuracy 66.67% (20 of 30)"],
    ),
}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on a csv file that names its columns."""
    return trained(tmp_path_factory.mktemp("named"), "d.csv", table("a,b,c,label"))


@pytest.mark.parametrize("case", CSV)
def test_columns_of_csv_files_are_taken_by_their_names(tmp_path, named, capfd, case):
    text, told = CSV[case]
    path = tmp_path / "p.csv"
    path.write_text(text, encoding="utf-8")
    status, classes, err = predict(named, path, capfd)
    assert (status, classes) == (0, ["pqr"[label] for label in Y])
    assert err == [line.format(path) for line in told]


STRANGE_CSV = {
    "has a column 'id'; expected those of the training set: a, b, c": "id,a,b,c,label\n1,1,0,0,p\n",
    "has a column 'd'; expected": "a,b,d,label\n1,0,0,p\n",
    "has a column 'A'; expected": "A,b,c\n1,0,0\n",
    "has no column 'b'; expected": "c,a,label\n1,0,p\n",
    "has a column 'a' twice (columns 1 and 4): name each column once": "a,b,c,a,label\n1,0,0,1,p\n",
    "has 5 columns; the model was trained on 3 features: expected as many, and perhaps a label": "1,0,0,0,p\n",
    "has 2 columns; the model was trained on 3 features": "1,p\n",
    "has 1 columns; the model was trained on 3 features": "1\n",
    "line 1: nothing; expected features": "",
}


@pytest.mark.parametrize("message", STRANGE_CSV)
def test_csv_files_of_other_columns_are_refused(tmp_path, named, capfd, message):
    (tmp_path / "p.csv").write_text(STRANGE_CSV[message])
    status, classes, err = predict(named, tmp_path / "p.csv", capfd)
    assert (status, classes, len(err)) == (1, [], 1)
    assert message in err[0]


NUMBERS = "mpicoll: line 1 of '{}', in which all names are numbers, is taken for a header"
OTHERS: dict[str, tuple[str, dict[str, list[str] | None]]] = {
    "the last column is the label, by its name": (
        table("a,b,c,kind"),
        {table("kind,c,b,a"): [RIGHT], table("c,b,a"): [], table("a,b,c,sort"): None, table("y,c,a,b"): [RIGHT]},
    ),
    "names that are numbers": (
        table("0,1,2,label"),
        {table("2,0,1"): [NUMBERS], table("label,2,1,0"): [RIGHT], table("0,1,2"): [NUMBERS]},
    ),
    "no names": (
        table("a,b,c,label", header=False),
        {
            table("a,b,c", header=False): [],
            table("a,b,c,label", header=False): [RIGHT],
            table("a,b,c"): [
                "mpicoll: the training set does not name its columns: those of '{}' are taken in their order"
            ],
            table("a,b", header=False): None,
            table("a,b,c,label").replace("b", "a", 1): None,
        },
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_the_training_set_names_is_what_counts(tmp_path, capfd, case):
    text, files = OTHERS[case]
    model = trained(tmp_path, "d.csv", text)
    for other, told in files.items():
        (tmp_path / "p.csv").write_text(other)
        status, classes, err = predict(model, tmp_path / "p.csv", capfd)
        if told is None:
            assert (status, classes, len(err)) == (1, [], 1)
        else:
            assert (status, classes) == (0, ["pqr"[label] for label in Y])
            assert err == [line.format(tmp_path / "p.csv") for line in told]


SVM: dict[str, tuple[int, str, str]] = {
    "from 0, and column 0 is not there": (0, sparse(0, (1, 2)), RIGHT),
    "from 0, and only the last is there": (0, sparse(0, (2,)), "accuracy 66.67% (20 of 30)"),
    "from 1": (1, sparse(1), RIGHT),
    "from 1, and column 1 is not there": (1, sparse(1, (1, 2)), RIGHT),
    "from 1, and there is a 0": (1, sparse(0), "has a column 0; in the training set columns were counted from 1"),
    "from 0, and there is one too many": (0, sparse(1), "has 4 features; the model was trained on 3"),
    "from 1, and there is one too many": (1, sparse(2), "has 4 features; the model was trained on 3"),
}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("case", SVM)
def test_columns_of_svmlight_files_are_counted_as_in_the_training_set(tmp_path, capfd, case, shards):
    base, text, told = SVM[case]
    model = trained(tmp_path, "d.svm", sparse(base), shards=shards)
    (tmp_path / "p.svm").write_text(text)
    status, classes, (err,) = predict(model, tmp_path / "p.svm", capfd)
    assert told in err
    assert status == (not told.startswith("accuracy"))
    assert len(classes) == (30 if told.startswith("accuracy") else 0)


def test_models_of_before_and_of_arrays_tell_what_they_do_not_know(tmp_path, capfd):
    model = trained(tmp_path, "d.svm", sparse(0))
    with safe_open(model / MODEL, "numpy") as file:
        header = json.loads(file.metadata()[HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    for name in ("features", "columns", "label", "base"):
        del header[name]
    save_file(tensors, tmp_path / "old", {HEADER: json.dumps(header)})
    (tmp_path / "p.svm").write_text(sparse(0, (1, 2)))
    _, _, err = predict(tmp_path / "old", tmp_path / "p.svm", capfd)
    assert err[0] == (
        f"mpicoll: the model does not say how columns are numbered: those of '{tmp_path}/p.svm' are counted from 1"
    )
    np.savez(tmp_path / "p.npz", X=np.array(POINTS, float))
    status, classes, err = predict(tmp_path / "old", tmp_path / "p.npz", capfd)
    assert (status, classes, err) == (0, [str(label) for label in Y], [])


@pytest.mark.parametrize("texts", [("0.0", "1.0"), ("-1", "+1"), ("00", "1"), ("0e0", "2.50")])
def test_labels_of_models_of_before_are_numbers_if_they_look_like_it(tmp_path, capfd, texts):
    """As they were read then: their files have not changed."""
    rows = [(int(n % 3 == 0) * 9, n % 2, texts[n % 3 == 0]) for n in range(40)]
    text = "".join(f"{x},{z},{label}\n" for x, z, label in [("x", "z", "label"), *rows])
    model = trained(tmp_path, "d.csv", text)
    with safe_open(model / MODEL, "numpy") as file:
        header = json.loads(file.metadata()[HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    for name in ("features", "columns", "label", "base"):
        del header[name]
    numbers = sorted(map(float, texts))
    header["labels"] = [int(n) if n.is_integer() else n for n in numbers]
    assert list(map(float, texts)) == numbers  # classes are in the order that they had
    save_file(tensors, tmp_path / "old", {HEADER: json.dumps(header)})
    status, _, err = predict(tmp_path / "old", tmp_path / "d.csv", capfd)
    assert status == 0
    assert not [line for line in err if "count as wrong" in line]
    assert any("100.00%" in line for line in err)


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "columns": lambda header: header["columns"].pop(),
    "base": lambda header: header.update(base=7),
    "labels": lambda header: header.update(labels=[["p"], ["q"], ["r"]]),
    "kinds of labels": lambda header: header.update(labels=[None, True, {}]),
    "names": lambda header: header.update(columns=[1, 2, 3]),
    "names that come twice": lambda header: header.update(columns=["a", "b", "a"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_header_that_does_not_fit_is_refused(tmp_path, named, what):
    with safe_open(named / MODEL, "numpy") as file:
        header = json.loads(file.metadata()[HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    WRONG[what](header)
    save_file(tensors, tmp_path / "m", {HEADER: json.dumps(header)})
    with pytest.raises(UserError, match="does not hold the parameters its header names"):
        read_model(tmp_path / "m")


@pytest.mark.parametrize("shards", [False, True])
def test_a_test_file_goes_by_names_too(tmp_path, shards):
    (tmp_path / "d.csv").write_text(table("a,b,c,label"))
    (tmp_path / "t.csv").write_text(table("c,label,a,b"))
    names = [str(tmp_path / name) for name in ("d.csv", "t.csv")]
    data = load(names[0], MPI.COMM_SELF, np.dtype("f8"), test=names[1], shards=shards)
    np.testing.assert_array_equal(data.test.x, data.train.x)
    assert (data.schema.columns, data.schema.label) == (("a", "b", "c"), "label")


@pytest.mark.parametrize("shards", [False, True])
def test_a_run_that_is_resumed_reads_its_data_as_before(tmp_path, shards):
    """Of the same content in another order, and of others."""
    model = trained(tmp_path, "d.csv", table("a,b,c,label"), shards=shards, epochs=3, checkpoint=1)
    crc = latest(model).facts["environment"]["data_crc32"]
    given = {"model": "softmax", "shards": shards, "epochs": 5, "out": str(model), "data": str(tmp_path / "e.csv")}
    for text, message in {
        "a,b,label\n" + "1,0,p\n0,1,q\n" * 9: "has no column 'c'",
        table("a,b,c,label", labels="pqs"): "has the label s, the run only p, q, r",
        table("a,b,c"): "has no labels",
    }.items():
        (tmp_path / "e.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            run(Comm(MPI.COMM_SELF), Settings(**given), resume=model)
    (tmp_path / "e.csv").write_text(table("c,label,a,b"))
    summary = run(Comm(MPI.COMM_SELF), Settings(**given), resume=model)
    assert summary["data_crc32"] == crc
    assert summary["changed"] == []
    before = read_model(model)[2]
    (tmp_path / "e.csv").write_text(table("c,label,a,b").replace("9", "99"))
    summary = run(Comm(MPI.COMM_SELF), Settings(**{**given, "epochs": 6}), resume=model)
    assert "the test set drawn from it may hold samples that were trained on" in summary["assumed"][0]
    assert any(line.startswith("data_crc32") for line in summary["changed"])
    np.testing.assert_array_equal(read_model(model)[2], before)  # the scaling


@pytest.mark.parametrize("shards", [False, True])
def test_a_resumed_run_counts_columns_as_before(tmp_path, shards):
    model = trained(tmp_path, "d.svm", sparse(0), shards=shards, epochs=3, checkpoint=1)
    (tmp_path / "e.svm").write_text(sparse(0, (1, 2)))
    given = {"model": "softmax", "shards": shards, "epochs": 5, "out": str(model), "data": str(tmp_path / "e.svm")}
    summary = run(Comm(MPI.COMM_SELF), Settings(**given), resume=model)
    assert "the test set drawn from it may hold samples" in summary["assumed"][0]
    facts = latest(model).facts
    assert facts["scaling"] is None
    assert facts["schema"] == {"features": 3, "labels": [0, 1, 2], "columns": None, "label": None, "base": 0}


UNNAMED_SET = "the training set does not name its columns: those of '{}' are taken in their order"
RESUMED: dict[str, tuple[str, str, list[str]]] = {
    "names, and none any more": (table("a,b,c,label"), table("a,b,c,label", header=False), [UNNAMED[9:]]),
    "no names, and some now": (table("a,b,c,label", header=False), table("a,b,c,label"), [UNNAMED_SET]),
    "no names, and others now": (table("a,b,c,label", header=False), table("c,b,a,label"), [UNNAMED_SET, "drawn"]),
    "names, and another order without": (
        table("a,b,c,label"),
        table("c,b,a,label", header=False),
        [UNNAMED[9:], "drawn"],
    ),
    "labels by another name": (table("a,b,c,kind"), table("c,b,y,a"), []),
    "the same samples in another order": (
        table("a,b,c,label"),
        "\n".join(["a,b,c,label", *reversed(table("a,b,c,label", header=False).splitlines())]),
        ["drawn"],
    ),
    "fewer samples": (table("a,b,c,label"), table("a,b,c,label")[:-24], ["drawn"]),
    "the same": (table("a,b,c,label"), table("b,c,label,a"), []),
}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_keeps_what_it_knew_and_tells_what_it_assumes(tmp_path, case, shards):
    text, other, told = RESUMED[case]
    model = trained(tmp_path, "d.csv", text, shards=shards, epochs=2, checkpoint=1)
    facts = latest(model).facts["schema"]
    (tmp_path / "e.csv").write_text(other)
    given = {"model": "softmax", "shards": shards, "epochs": 3, "out": str(model), "data": str(tmp_path / "e.csv")}
    summary = run(Comm(MPI.COMM_SELF), Settings(**given), resume=model)
    drawn = (
        "the run has had other training samples than '{}' gives, so that the test set drawn from it may hold samples "
        "that were trained on: name a test set with --test FILE, or train anew"
    )
    expected = [drawn if line == "drawn" else line for line in told]
    assert summary["assumed"] == [line.format(given["data"]) for line in expected]
    assert latest(model).facts["schema"] == facts
    again = run(Comm(MPI.COMM_SELF), Settings(**{**given, "epochs": 4}), resume=model)
    assert again["assumed"] == summary["assumed"]  # it is still so
    assert read_model(model)[3].facts() == Schema.of(facts).facts()


def test_a_resumed_run_with_a_test_file_draws_none(tmp_path):
    """Columns of that file go by the names that are known, even if the data have none any more."""
    model = trained(tmp_path, "d.csv", table("a,b,c,label"), epochs=5, checkpoint=1)
    (tmp_path / "e.csv").write_text(table("a,b,c,label", header=False) + "1,0,0,p\n")
    (tmp_path / "t.csv").write_text(table("c,label,a,b"))
    given = {"model": "softmax", "epochs": 15, "out": str(model), "data": str(tmp_path / "e.csv")}
    summary = run(Comm(MPI.COMM_SELF), Settings(**given, test=str(tmp_path / "t.csv")), resume=model)
    assert summary["assumed"] == [UNNAMED[9:].format(given["data"])]
    assert summary["test_accuracy"] == 1


def test_a_validation_set_that_is_drawn_from_other_data_is_told(tmp_path):
    (tmp_path / "t.csv").write_text(table("a,b,c,label"))
    given = {"model": "softmax", "validation": 0.2, "test": str(tmp_path / "t.csv")}
    model = trained(tmp_path, "d.csv", table("a,b,c,label"), **{**given, "epochs": 1, "checkpoint": 1})
    (tmp_path / "e.csv").write_text(table("a,b,c,label")[:-24])
    settings = Settings(**given, data=str(tmp_path / "e.csv"), epochs=2, out=str(model))
    (line,) = run(Comm(MPI.COMM_SELF), settings, resume=model)["assumed"]
    assert "so that the validation set drawn from it may" in line
    assert line.endswith("trained on: train anew")


@pytest.mark.parametrize("shards", [False, True])
def test_it_is_told_when_a_test_file_or_the_training_set_has_no_names(tmp_path, shards):
    (tmp_path / "named.csv").write_text(table("a,b,c,label"))
    (tmp_path / "bare.csv").write_text(table("a,b,c,label", header=False))
    named, bare = (str(tmp_path / name) for name in ("named.csv", "bare.csv"))
    for data, test, told in [
        (named, bare, (UNNAMED[9:].format(bare),)),
        (bare, named, (UNNAMED_SET.format(named),)),
        (named, str(tmp_path / "named.csv").replace("named", "./named"), ()),
    ]:
        found = load(data, MPI.COMM_SELF, np.dtype("f8"), test=test, shards=shards)
        assert found.assumed == told


def test_sparse_data_that_become_dense_are_not_scaled(tmp_path):
    model = trained(tmp_path, "d.svm", sparse(1), epochs=2, checkpoint=1)
    (tmp_path / "e.csv").write_text(table("a,b,c,label", labels="012"))
    given = {"model": "softmax", "epochs": 3, "out": str(model), "data": str(tmp_path / "e.csv")}
    run(Comm(MPI.COMM_SELF), Settings(**given), resume=model)
    np.testing.assert_array_equal(read_model(model)[2], [[0] * 3, [1] * 3])
    assert read_model(model)[3].base == 1


def test_the_default_data_are_for_models_of_them(tmp_path, named, capfd):
    capfd.readouterr()
    assert main(["predict", str(named)]) == 1
    err = capfd.readouterr().err
    assert err == f"mpicoll: '{named}' was not trained on the digits: name the data with --data FILE\n"


@pytest.mark.parametrize(
    ("share", "before", "message"),
    [
        (0.2, None, None),
        (None, 0.2, None),
        (0.3, None, "--test-share is 0.3, and was not given: of a resumed run only"),
        (None, 0.3, "--test-share is not given, and was 0.3: of a resumed run only"),
        (0.2, 0.0, "--test-share is 0.2, and was 0.0: of a resumed run only"),
    ],
)
def test_a_setting_may_be_named_by_its_default_when_a_run_is_resumed(tmp_path, share, before, message):
    model = trained(tmp_path, "d.csv", table("a,b,c,label"), epochs=1, test_share=before)
    settings = Settings(data=str(tmp_path / "d.csv"), model="softmax", epochs=2, out=str(model), test_share=share)
    if message is None:
        assert run(Comm(MPI.COMM_SELF), settings, resume=model)["test_samples"] == 6
        return
    with pytest.raises(UserError, match=message):
        run(Comm(MPI.COMM_SELF), settings, resume=model)
