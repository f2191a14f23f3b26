"""Data sets: the samples that a rank holds, the facts that all ranks know, and how they are loaded."""

import warnings
import zlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ..errors import UserError
from ..mpi.together import on_all, on_root
from . import objects, readers
from .holdout import held_out
from .labels import classes_by_label, ordered_labels
from .meaning import assumptions, common_classes, common_features
from .readers.raw import Raw, Schema, share
from .scaling import Scaling

if TYPE_CHECKING:
    from scipy.sparse import csr_array

TEST_SHARE = 0.2
"""The share of the samples that is held out, unless the data bring a test set of their own or another one is named."""


class Part(NamedTuple):
    """The samples of one set (training, validation or test) that this rank holds.

    ``x`` is (samples here, features), scaled, C-contiguous, of the run's dtype; ``y`` (samples here,), int64,
    classes from 0.  ``start`` is the number, among all of the set, of the first one here; ``total`` the number of
    samples of the set on all ranks together, not counted twice.
    """

    x: "np.ndarray | csr_array"
    y: np.ndarray
    start: int
    total: int

    def __repr__(self) -> str:
        kind = "sparse" if hasattr(self.x, "indptr") else "dense"
        return f"<Part: {len(self.y)} of {self.total} samples, {kind} {self.x.shape} {self.x.dtype}>"


class Dataset(NamedTuple):
    """The samples that this rank holds, and what all ranks know of them.

    ``schema`` is the meaning of features and classes, which a model keeps; in a run that is resumed it is the one from
    before.  Unless ``sharded``, every rank holds all samples; ``counts`` are the training samples that each rank holds.
    Validation and test set may be empty.  ``name`` is the source and ``layout`` its layout (see ``Raw``).  ``drawn``
    tells whether the test set was drawn from the samples; ``assumed`` are lines on what had to be assumed, since the
    data do not say it.
    """

    train: Part
    validation: Part
    test: Part
    schema: Schema
    scaling: Scaling
    sharded: bool
    counts: tuple[int, ...]
    name: str = "arrays"
    layout: str | None = None
    drawn: bool = False
    assumed: tuple[str, ...] = ()

    def __repr__(self) -> str:
        train, validation, test = self[:3]
        held = f", in {len(self.counts)} shards, here {len(train.y)}, {len(validation.y)} and {len(test.y)}"
        return (
            f"<Dataset {self.name!r}: {train.total} training, {validation.total} validation and {test.total} test "
            f"samples{held if self.sharded else ''}; {self.features} features, {self.classes} classes, {train.x.dtype}>"
        )

    def mapped(self, change: Callable[[Part], Part]) -> "Dataset":
        """The data set with ``change`` applied to its three sets, one after another."""
        train, validation, test = map(change, (self.train, self.validation, self.test))
        return self._replace(train=train, validation=validation, test=test)

    @property
    def features(self) -> int:
        """The number of features."""
        return self.schema.features

    @property
    def labels(self) -> np.ndarray:
        """The label of each class."""
        return self.schema.labels

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.schema.labels)


def load(
    source: str,
    comm: MPI.Intracomm,
    dtype: np.dtype,
    *,
    test: str | None = None,
    shards: bool = False,
    test_share: float | None = None,
    validation: float = 0.0,
    seed: int = 0,
    known: Schema | None = None,
    scaling: Scaling | None = None,
) -> Dataset:
    """The data set, of which every rank gets all, or if ``shards`` a share of its own; a collective call.

    ``source`` is what ``readers.read`` takes.  The test set is the one it brings, else the file ``test``, else
    ``test_share`` of its samples; of the other samples, ``validation`` is the share for validation.  Both are drawn at
    random, from each class the same share to within two samples, and no class whole.  They depend on ``seed`` and on
    the samples' order and classes, not on who reads them.

    With ``known`` and ``scaling``, those of a run that is resumed, columns and labels mean what they meant there, and
    the data set keeps what is known; else what the source says.  Known data without a scaling, sparse ones, have none.
    Columns of a second file are those of the source, by name where both have names, and counted from 0 or 1 as there.

    With ``shards`` no rank reads or holds what is not its own, where the format allows; where it does not, rank 0 reads
    and hands out.  Whatever is wrong with the data is one ``UserError``, raised by every rank.
    """
    assemble = partial(
        _assemble,
        source,
        test,
        dtype=dtype,
        test_share=test_share,
        validation=validation,
        seed=seed,
        ranks=comm.size,
        known=known,
        scaling=scaling,
    )
    if shards:
        raw = _own_share(source, comm, known)
        test_set = _own_share(test, comm, known or _columns_of(raw)) if test else None
        return assemble(raw, test_set, comm)
    held: list[Dataset] = []

    def prepare() -> None:
        raw = readers.read(source, known=known)
        test_set = readers.read(test, known=known or _columns_of(raw)) if test else None
        held.append(assemble(raw, test_set, MPI.COMM_SELF))

    on_root(comm, prepare)
    data = objects.broadcast(comm, held[0] if held else None)
    return data._replace(sharded=False, counts=comm.size * data.counts)


def fingerprint(data: Dataset, comm: MPI.Intracomm) -> str:
    """Return a checksum of the training samples, which depends on how they are sharded; a collective call."""
    found = 0
    held = (data.train.x, data.train.y) if data.sharded or comm.rank == 0 else ()  # else it is what rank 0 holds
    for array in held:
        pieces = [array] if isinstance(array, np.ndarray) else [array.data, array.indices, array.indptr]
        for piece in pieces:
            found = zlib.crc32(np.ascontiguousarray(piece).view(np.uint8).data, found)
    return ".".join(f"{one:08x}" for one in (comm.allgather(found) if data.sharded else [comm.bcast(found)]))


def untrained(data: Dataset, comm: MPI.Intracomm) -> list[Any]:
    """Return the labels of classes without a training sample; a collective call."""
    found = np.bincount(data.train.y, minlength=data.classes)
    return data.labels[(comm.allreduce(found) if data.sharded else found) == 0].tolist()


def from_arrays(
    x: "np.ndarray | csr_array", y: np.ndarray, comm: MPI.Intracomm | None = None, *, test: int = 0
) -> Dataset:
    """Make a data set of arrays, without copying or scaling them; the last ``test`` samples are the test set.

    ``x`` has shape (samples, features) and ``y`` shape (samples,).  Without ``comm`` they are the same on all ranks.
    With ``comm`` each rank has samples of its own, with the same number of features, and the call is collective.  The
    meaning of ``y`` is up to the model.
    """
    train, features, classes = len(y) - test, x.shape[1], int(y.max(initial=-1)) + 1
    shares = [(train, test)] if comm is None else comm.allgather((train, test))
    before = (0, 0) if comm is None else np.sum([(0, 0), *shares[: comm.rank]], axis=0).tolist()
    totals = np.sum(shares, axis=0).tolist()
    classes = classes if comm is None else comm.allreduce(classes, MPI.MAX)
    return Dataset(
        train=Part(x[:train], y[:train], before[0], totals[0]),
        validation=Part(x[:0], y[:0], 0, 0),
        test=Part(x[train:], y[train:], before[1], totals[1]),
        schema=Schema(features, np.arange(classes)),
        scaling=Scaling.none(features),
        sharded=comm is not None,
        counts=tuple(count for count, _ in shares),
    )


def read(source: str, known: Schema | None = None) -> tuple[Raw, np.ndarray | None]:
    """All that a source holds, for one process, and the labels of its classes, if it has any.

    With ``known``, a model's schema, columns and labels are the model's: labels that it does not know become class -1.
    What contradicts it is a ``UserError``, and what had to be assumed a warning.  Arrays hold classes, not labels.
    """
    raw = common_features(source, readers.read(source, known=known), MPI.COMM_SELF, known)
    labels = None
    if raw.y is not None and not raw.verbatim:
        labels = np.arange(raw.y.max() + 1)
    elif raw.y is not None:
        labels = ordered_labels(source, np.unique(raw.y)) if known is None else known.labels
        as_numbers = known is not None and known.as_numbers
        raw = raw._replace(y=classes_by_label(raw.y, labels, as_numbers), verbatim=False)
    told = list(assumptions(source, raw, known)) if known else []
    if known and raw.y is not None:
        strange = np.count_nonzero((raw.y < 0) | (raw.y >= len(known.labels)))
        if strange:
            told.append(f"{strange} of {len(raw.y)} labels are none that the model knows, and count as wrong")
    for line in told:
        warnings.warn(line, RuntimeWarning, stacklevel=2)
    return raw, labels


def _columns_of(raw: Raw) -> Schema | None:
    """The schema by which a second csv file is read, if this is one."""
    if not (raw.verbatim and isinstance(raw.x, np.ndarray)):
        return None
    return Schema(raw.x.shape[1], np.arange(0), raw.columns, raw.label)


def _own_share(source: str, comm: MPI.Intracomm, known: Schema | None) -> Raw:
    """This rank's share of a source, which it reads itself, or else gets from rank 0; a collective call."""
    if on_root(comm, lambda: readers.divisible(source)):
        return on_all(comm, lambda: readers.read(source, comm.rank, comm.size, known))
    held: list[Raw] = []
    on_root(comm, lambda: held.append(readers.read(source, known=known)))

    def cut(rank: int) -> Raw:
        whole = held[0]
        x, y, x_test, y_test = (
            None if array is None else array[share(array.shape[0], rank, comm.size)] for array in whole[:4]
        )
        return whole._replace(x=x, y=y, x_test=x_test, y_test=y_test)

    return objects.scatter(comm, cut)


def _assemble(
    source: str,
    test: str | None,
    raw: Raw,
    test_set: Raw | None,
    comm: MPI.Intracomm,
    dtype: np.dtype,
    test_share: float | None,
    validation: float,
    seed: int,
    ranks: int,
    known: Schema | None,
    scaling: Scaling | None,
) -> Dataset:
    """Make the data set of the shares that the ranks of ``comm`` have read; a collective call.

    ``ranks`` is the number of ranks that train with it.
    """

    columns = known or _columns_of(raw)

    def check() -> Raw:
        for name, found in ((source, raw), (test, test_set)):
            if found is not None and found.y is None:
                what = "labels" if found.verbatim else "array 'y'"
                raise UserError(f"data file {name!r} has no {what}: training needs a label for each sample")
        if test_share is not None and (test is not None or raw.x_test is not None):
            has = f"{source!r} brings a test set of its own" if test is None else f"{test!r} is the test set"
            raise UserError(f"{has}: leave out --test-share")
        if test is None or test_set is None:
            return raw
        if test == source or test.startswith("powerlaw"):
            raise UserError(f"{test!r} cannot be the test set of {source!r}: expected a file of other samples")
        if raw.x_test is not None:
            raise UserError(f"{source!r} brings a test set of its own: leave out {test!r}")
        if test_set.x_test is not None:
            raise UserError(f"{test!r} brings a test set of its own; expected a file that holds one set of samples")
        if type(raw.x) is not type(test_set.x) or raw.verbatim != test_set.verbatim:
            raise UserError(f"{test!r} is not of the same kind as {source!r}: expected a test set in the same format")
        return raw._replace(x_test=test_set.x, y_test=test_set.y, extent=raw.extent + test_set.extent)

    raw = common_features(source, on_all(comm, check), comm, known, test)
    raw, labels = common_classes(source, raw, comm, known)
    assumed = list(assumptions(source, raw, known)) if known else []
    if test_set is not None and test is not None and columns:
        assumed += assumptions(test, test_set, columns)
    x, y, x_test, y_test = raw[:4]
    assert y is not None
    trains = np.ones(len(y), np.bool_)
    drawn = x_test is None
    if x_test is None or y_test is None:
        out = held_out(y, len(labels), TEST_SHARE if test_share is None else test_share, [seed, 1], comm)
        x_test, y_test, trains = x[out], y[out], ~out
    validates = np.zeros(len(y), np.bool_)
    validates[trains] = held_out(y[trains], len(labels), validation, [seed, 2], comm)
    trains &= ~validates
    sets = [(x[trains], y[trains]), (x[validates], y[validates]), (x_test, y_test)]
    counts = np.array(comm.allgather([len(y) for _, y in sets]))
    totals = counts.sum(axis=0).tolist()
    if totals[0] < ranks:
        raise UserError(
            f"{source!r} has {totals[0]} training samples for {ranks} ranks; start at most {max(totals[0], 1)} ranks"
        )

    seen = np.flatnonzero(comm.allreduce(np.bincount(y, minlength=len(labels))))
    if len(seen) < 2:
        raise UserError(
            f"{source!r} has samples of one class only, {labels[seen[0]]}: expected two at least, or there is nothing "
            "to learn"
        )

    def scale(scaling: Scaling) -> list[Any]:
        scaled = [scaling.apply(x, dtype) for x, _ in sets]
        if not all(np.isfinite(x if isinstance(x, np.ndarray) else x.data).all() for x in scaled):
            raise UserError(f"{source!r} has features that overflow {dtype} when scaled; make the values smaller")
        return scaled

    with np.errstate(all="ignore"):  # what overflows is reported
        fitted = scaling or (Scaling.none(x.shape[1]) if known else Scaling.fit(sets[0][0], comm))
        scaled = on_all(comm, lambda: scale(fitted))
    starts = counts[: comm.rank].sum(axis=0).tolist()
    train, validating, testing = (
        Part(x, y, start, total) for x, (_, y), start, total in zip(scaled, sets, starts, totals, strict=True)
    )
    held = tuple(counts[:, 0].tolist())
    return Dataset(
        train,
        validating,
        testing,
        known or Schema(x.shape[1], labels, raw.columns, raw.label, raw.base),
        fitted,
        True,
        held,
        source,
        raw.layout,
        drawn,
        tuple(assumed),
    )
