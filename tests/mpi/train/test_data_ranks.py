"""Data on several ranks: whole or in shards, they are the same samples, and what is wrong is told by all ranks."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from datafiles import BAD, FORMATS, LABELS, csv, idx, labelled, samples, svm, write
from mpicoll import Comm, UserError
from mpicoll.train import objects, readers
from mpicoll.train.batches import Batches
from mpicoll.train.data import Dataset, load
from mpicoll.train.holdout import held_out
from mpicoll.train.readers.raw import Schema

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > 5, reason="five ranks show what more would, and sooner")]
F8 = np.dtype("f8")


def dense(x):
    return x if isinstance(x, np.ndarray) else x.toarray()


def test_the_data_are_the_same_on_all_ranks(comm, folder, monkeypatch):
    monkeypatch.setattr(objects, "MESSAGE_BYTES", 1000)
    path = str(folder / "data.npz")
    x, y = np.random.default_rng(1).normal(size=(100, 7)) * 50 + 10, np.arange(100) % 4
    if comm.rank == 0:
        np.savez(path, X=x, y=y)
    data = load(path, comm, np.dtype("f4"))
    assert len({data.train.x.tobytes() + data.test.x.tobytes() for data in comm.allgather(data)}) == 1
    out = held_out(y, 4, 0.2, [0, 1], MPI.COMM_SELF)
    assert sorted(np.bincount(y[out])) in ([5, 5, 5, 5], [4, 5, 5, 6])
    np.testing.assert_array_equal(data.test.y, y[out])
    np.testing.assert_array_equal(data.train.x, data.scaling.apply(x[~out], np.dtype("f4")))
    np.testing.assert_allclose(data.train.x.mean(axis=0, dtype="f8"), 0, atol=1e-6)
    np.testing.assert_allclose(np.ptp(data.train.x, axis=0), 2, rtol=1e-5)
    assert (data.classes, data.features, data.sharded, data.counts) == (4, 7, False, (80,) * P)
    assert [part[2:] for part in data[:3]] == [(0, 80), (0, 0), (0, 20)]
    assert data.train.x.flags.writeable
    with pytest.raises(UserError, match="does not exist"):
        load(path + "x", comm, np.dtype("f4"))


def same(comm: MPI.Intracomm, whole: Dataset, mine: Dataset) -> None:
    """Shards, one after the other, are the whole."""
    everybody = comm.allgather(mine)
    for n in range(3):
        parts, expected = [data[:3][n] for data in everybody], whole[:3][n]
        assert {part.total for part in parts} == {expected.total}
        starts = np.cumsum([0, *(len(part.y) for part in parts)])
        assert [part.start for part in parts] == starts[:-1].tolist()
        np.testing.assert_array_equal(np.concatenate([part.y for part in parts]), expected.y)
        found = np.concatenate([dense(part.x) for part in parts])
        np.testing.assert_allclose(found, dense(expected.x), rtol=1e-12, atol=1e-12)
        for part in parts:
            assert type(part.x) is type(expected.x)
            assert (part.x.dtype, part.y.dtype) == (F8, np.int64)
            assert part.x.shape == (len(part.y), whole.features)
            assert not isinstance(part.x, np.ndarray) or part.x.flags.c_contiguous
    for data in everybody:
        np.testing.assert_array_equal(data.labels, whole.labels)
        np.testing.assert_allclose(data.scaling, whole.scaling, rtol=1e-12)
        assert (data.features, data.classes, data.sharded) == (whole.features, whole.classes, True)
        assert data.counts == tuple(len(other.train.y) for other in everybody)


@pytest.mark.parametrize("count", [13, 60])
@pytest.mark.parametrize("kind", [*FORMATS, "digits", "powerlaw:600x40:3"])
def test_shards_are_the_samples_of_the_whole(comm, folder, kind, count, monkeypatch):
    """With 13 samples, some ranks hold no validation or test sample; labels -1, 0, 1 in files that have labels."""
    monkeypatch.setattr(objects, "MESSAGE_BYTES", 1000)
    source = kind
    if kind in FORMATS:
        x, y = samples(count)
        if comm.rank == 0:
            write(kind, folder, x, y - 1 if kind.startswith(("csv", "svm")) else y)
        comm.Barrier()
        source = str(folder / f"data.{kind}")
    whole = load(source, comm, F8, validation=0.3)
    mine = load(source, Comm(comm), F8, shards=True, validation=0.3)
    same(comm, whole, mine)
    assert P == 1 or len(mine.train.y) < mine.train.total
    assert whole.labels.tolist() == ([-1, 0, 1] if kind.startswith(("csv", "svm")) else list(range(whole.classes)))
    batches = Batches(mine, P, 7, 0, 1)
    taken = [mine.train.start + batches.share(step, comm.rank)[0] for step in range(batches.steps)]
    everybody = np.concatenate([np.concatenate(each) for each in comm.allgather(taken)])
    np.testing.assert_array_equal(np.sort(everybody), np.arange(mine.train.total))


@pytest.mark.parametrize("kind", ["csv", "csv.bz2", "svm", "svm.gz"])
def test_a_test_file_in_shards(comm, folder, kind):
    x, y = samples(20)
    if comm.rank == 0:
        write(kind, folder, x, y)
        write(kind, folder, x[3:8], y[3:8], "test")
    comm.Barrier()
    names = [str(folder / f"{name}.{kind}") for name in ("data", "test")]
    same(comm, load(names[0], comm, F8, test=names[1]), load(names[0], comm, F8, test=names[1], shards=True))


def test_idx_with_a_test_set_in_shards(comm, folder):
    x, y = samples(20)
    if comm.rank == 0:
        for name, rows in (("train", slice(0, 15)), ("t10k", slice(15, 20))):
            (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(x[rows].reshape(-1, 5, 1).astype("u1")))
            (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(y[rows].astype("u1")))
    comm.Barrier()
    mine = load(str(folder), comm, F8, shards=True)
    same(comm, load(str(folder), comm, F8), mine)
    assert (mine.train.total, mine.test.total) == (15, 5)


@pytest.mark.parametrize("where", [0, 19])
def test_what_one_share_shows_all_know(comm, folder, where):
    """The largest column, a column 0, a label, a label that is text: each in one line of one share."""
    x, y = samples(20)
    lines = svm(x, y).splitlines()
    lines[where] = "5 0:1 8:1"
    labels = ["1"] * 20
    labels[where] = "1?"
    if comm.rank == 0:
        (folder / "data.svm").write_text("\n".join(lines))
        (folder / "data.csv").write_text("".join(f"{n},{label}\n" for n, label in enumerate(labels)))
    comm.Barrier()
    sparse = load(str(folder / "data.svm"), comm, F8, shards=True)
    assert (sparse.features, sparse.labels.tolist()) == (9, [0, 1, 2, 5])
    assert load(str(folder / "data.csv"), comm, F8, shards=True).labels.tolist() == ["1", "1?"]


@pytest.mark.parametrize("name", LABELS)
def test_two_texts_are_two_classes_wherever_they_are_read(comm, folder, name):
    """In shards, where some ranks see what looks like numbers only."""
    texts, labels = LABELS[name]
    if comm.rank == 0:
        labelled(folder / "data.csv", sorted(texts))
    comm.Barrier()
    whole = load(str(folder / "data.csv"), comm, F8)
    mine = load(str(folder / "data.csv"), comm, F8, shards=True)
    assert whole.labels.tolist() == labels
    same(comm, whole, mine)


@pytest.mark.parametrize("shards", [False, True])
def test_all_ranks_refuse_what_contradicts_a_schema(comm, folder, shards):
    """Where one share shows it."""
    x, y = samples(20)
    text = svm(x, y)
    if comm.rank == 0:
        (folder / "zero.svm").write_text(text + "0 0:1\n")
        (folder / "wide.svm").write_text(text + "0 6:1\n")
        (folder / "label.svm").write_text(text + "7 1:1\n")
        (folder / "names.csv").write_text(csv(x, y).replace("c", "k", 1))
        (folder / "label.csv").write_text(csv(x, y) + "1,2,3,4,5,7\n")
    comm.Barrier()
    known = Schema(5, np.arange(3), tuple("abcde"), "label", 1)
    for name, message in {
        "zero.svm": "has a column 0; in the training set columns were counted from 1",
        "wide.svm": "has 6 features; the model was trained on 5",
        "label.svm": "has the label 7, the run only 0, 1, 2",
        "names.csv": "has a column 'k'; expected those of the training set: a, b, c, d, e",
        "label.csv": "has the label 7, the run only 0, 1, 2",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load(str(folder / name), comm, F8, shards=shards, known=known)
        assert len(set(comm.allgather(str(caught.value)))) == 1


@pytest.mark.parametrize("shards", [False, True])
def test_all_ranks_refuse_a_test_set_that_contradicts(comm, folder, shards):
    """In one line of one share, of files that are divided and of one that rank 0 reads."""
    x, y = samples(20)
    if comm.rank == 0:
        for first, kind in ((0, "svm"), (1, "svm"), (1, "svm.gz")):
            text = svm(x, y, first=first)
            pack = gzip.compress if kind.endswith("gz") else bytes
            (folder / f"from{first}.{kind}").write_bytes(pack(text.encode()))
            (folder / f"last{first}.{kind}").write_bytes(pack(("1 2:1\n" * 19 + f"1 {5 * (1 - first)}:1\n").encode()))
        (folder / "names.csv").write_text(csv(x, y))
        (folder / "twice.csv").write_text(csv(x, y).replace("c", "a", 1))
    comm.Barrier()
    for train, test, message in [
        ("from1.svm", "from0.svm", "from0.svm' has a column 0; in the training set columns were counted from 1"),
        ("from1.svm", "last1.svm", "last1.svm' has a column 0; in the training set columns were counted from 1"),
        ("from1.svm.gz", "last1.svm", "last1.svm' has a column 0; in the training set"),
        ("from0.svm", "from1.svm", "from1.svm' has 6 features and no column 0; the training set has 5, and columns"),
        ("from0.svm", "last0.svm", "last0.svm' has 6 features and no column 0; the training set has 5, and columns"),
        ("names.csv", "twice.csv", r"twice.csv' has a column 'a' twice .columns 1 and 3.: name each column once"),
        ("twice.csv", "names.csv", r"twice.csv' has a column 'a' twice .columns 1 and 3.: name each column once"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load(str(folder / train), comm, F8, test=str(folder / test), shards=shards)
        assert len(set(comm.allgather(str(caught.value)))) == 1


@pytest.mark.parametrize("kind", ["npz", "idx.gz", "csv.bz2"])
def test_ranks_without_a_share_to_read_read_nothing(comm, folder, kind, monkeypatch):
    x, y = samples(20)
    if comm.rank == 0:
        write(kind, folder, x, y)
    comm.Barrier()
    whole = load(str(folder / f"data.{kind}"), comm, F8)
    if comm.rank:
        monkeypatch.setattr(readers, "read", None)
        monkeypatch.setattr(readers, "divisible", None)
    same(comm, whole, load(str(folder / f"data.{kind}"), comm, F8, shards=True))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("message", BAD)
def test_all_ranks_tell_the_same_of_bad_data(comm, folder, message, shards):
    made = BAD[message](folder) if comm.rank == 0 else None
    with pytest.raises(UserError) as caught:
        load(comm.bcast(made), comm, np.dtype("f4"), shards=shards)
    told = comm.allgather(str(caught.value))
    assert len(set(told)) == 1
    assert re.search(message, told[0]), told[0]
    assert "\n" not in told[0]


@pytest.mark.parametrize("shards", [False, True])
def test_more_ranks_than_training_samples(comm, folder, shards):
    if comm.rank == 0:
        (folder / "data.csv").write_text("1,0\n" * (P - 1) + "a,b\n" * (P == 1))
    comm.Barrier()
    message = f"has {P - 1 - P // 6} training samples for {P} ranks; start at most" if P > 1 else "holds no samples"
    with pytest.raises(UserError, match=message):
        load(str(folder / "data.csv"), comm, F8, shards=shards)


@pytest.mark.skipif(P == 1, reason="needs two ranks")
def test_files_that_differ_from_rank_to_rank(comm, folder, monkeypatch):
    """As where each node has a disk of its own."""
    own = folder / str(comm.rank)
    own.mkdir()
    monkeypatch.chdir(own)
    x, y = samples(20)
    last = comm.rank == P - 1
    Path("bytes.svm").write_text(svm(x, y) + "\n" * last)
    Path("names.csv").write_text("b,y\n1,0\n" if last else "a,y\n1,0\n")
    for name in ("rows", "columns", "test"):
        Path(name).mkdir()
        np.save(f"{name}/X.npy", x)
        np.save(f"{name}/y.npy", y)
    if last:
        np.save("rows/X.npy", x[:-1])
        np.save("rows/y.npy", y[:-1])
        np.save("columns/X.npy", x[:, :-1])
        np.save("test/X_test.npy", x)
        np.save("test/y_test.npy", y)
    else:
        write("csv", own, x, y)
    size = len(svm(x, y))
    for source, message in {
        "rows": f"'rows' is not the same for all ranks: rank {P - 1} finds 19 bytes or samples, 5 features, "
        "rank 0 20 bytes or samples, 5 features; give each node the same data",
        "columns": f"rank {P - 1} finds 20 bytes or samples, 4 features, rank 0 20 bytes or samples, 5 features",
        "test": f"rank {P - 1} finds a test set and 20 bytes or samples, 5 and 5 features, rank 0 20 bytes",
        "bytes.svm": f"rank {P - 1} finds {size + 1} bytes or samples, rank 0 {size} bytes or samples",
        "names.csv": f"rank {P - 1} finds 8 bytes or samples, 1 features b, rank 0 8 bytes or samples, 1 features a;",
        "data.csv": rf"data file 'data.csv' does not exist; .* \(on rank {P - 1}\)",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load(source, comm, F8, shards=True)
        assert len(set(comm.allgather(str(caught.value)))) == 1
