"""Data: what all ranks agree on, the split, the scaling, and which samples a rank holds and visits."""

import pickle
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from mpi4py import MPI

from ..errors import UserError
from ..mpi.together import on_all, on_root
from . import formats
from .formats import Raw, Schema, listed, share

if TYPE_CHECKING:
    from scipy.sparse import csr_array

T = TypeVar("T")

TEST_SHARE = 0.2
"""The share of the samples that is held out, unless the data bring a test set of their own or another one is named."""

MANY = 20
"""More different labels than this are no classes if they are not integers, or if most samples have one of their own."""

MEASURED = 8
"""Fewer samples than this in an epoch do not tell how fast a rank is."""

GOLDEN = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, are spread as evenly as those of any number."""

BROADCAST_BYTES = 2**28  # a message; counts past 2^31 fail on some MPIs


class Scaling(NamedTuple):
    """Features become (x - center) / spread; ``fit`` makes the training set span 2 in each, with mean zero."""

    center: np.ndarray
    spread: np.ndarray

    @classmethod
    def fit(cls, x: "np.ndarray | csr_array", comm: MPI.Intracomm = MPI.COMM_SELF) -> "Scaling":
        """The scaling that suits the samples of all ranks; a constant feature becomes zero.  Sparse samples are left as
        they are: they would not be sparse any more."""
        samples, features = x.shape
        if not isinstance(x, np.ndarray):
            return cls.none(features)
        low, high, mean = np.full(features, np.inf), np.full(features, -np.inf), np.zeros(features)
        if samples:
            low, high = x.min(axis=0).astype(np.float64), x.max(axis=0).astype(np.float64)
            mean = x.sum(axis=0, dtype=np.float64)
        comm.Allreduce(MPI.IN_PLACE, low, MPI.MIN)
        comm.Allreduce(MPI.IN_PLACE, high, MPI.MAX)
        comm.Allreduce(MPI.IN_PLACE, mean, MPI.SUM)
        mean /= comm.allreduce(samples)
        spread = high / 2 - low / 2
        return cls(mean, np.where(spread > 0, spread, 1.0))

    @classmethod
    def none(cls, features: int) -> "Scaling":
        """The scaling that changes nothing."""
        return cls(np.zeros(features), np.ones(features))

    def apply(self, x: "np.ndarray | csr_array", dtype: np.dtype) -> Any:
        """Scaled samples, a new array; sparse ones stay so if they need not be centred."""
        if not isinstance(x, np.ndarray):
            if not self.center.any():
                return type(x)(x.multiply(1 / self.spread), dtype=dtype)
            x = x.toarray()
        scaled = np.empty(x.shape, dtype)
        for first in range(0, len(x), 4096):  # so that not all of them are needed in float64
            rows = slice(first, first + 4096)
            scaled[rows] = (x[rows] - self.center) / self.spread
        return scaled


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
    """What this rank holds, and what all ranks know.

    ``labels[class]`` is what the data call the class.  Unless ``sharded``, every rank holds all samples; ``counts``
    are the training samples that each rank holds.  Validation and test set may be empty.  ``columns``, ``label`` and
    ``base`` are as in ``formats.Raw``, or as a run that is resumed had them, ``name`` is the source and ``layout`` its.
    ``drawn`` tells whether the test set was drawn from the samples; ``assumed`` are lines on what had to be assumed,
    since the data do not say it.
    """

    train: Part
    validation: Part
    test: Part
    features: int
    classes: int
    scaling: Scaling
    labels: np.ndarray
    sharded: bool
    counts: tuple[int, ...]
    columns: tuple[str, ...] | None = None
    label: str | None = None
    base: int | None = None
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

    @property
    def schema(self) -> Schema:
        """What a model trained on these data keeps of them."""
        return Schema(self.features, self.labels, self.columns, self.label, self.base)


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

    ``source`` is what ``formats.read`` takes.  The test set is the one it brings, else the file ``test``, else
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
        raw = formats.read(source, known=known)
        test_set = formats.read(test, known=known or _columns_of(raw)) if test else None
        held.append(assemble(raw, test_set, MPI.COMM_SELF))

    on_root(comm, prepare)
    data = _broadcast(comm, held[0] if held else None)
    return data._replace(sharded=False, counts=comm.size * data.counts)


def fingerprint(data: Dataset, comm: MPI.Intracomm) -> str:
    """Of the training samples, to see whether they have changed; a collective call.  Depends on shards."""
    found = 0
    held = (data.train.x, data.train.y) if data.sharded or comm.rank == 0 else ()  # else it is what rank 0 holds
    for array in held:
        pieces = [array] if isinstance(array, np.ndarray) else [array.data, array.indices, array.indptr]
        for piece in pieces:
            found = zlib.crc32(np.ascontiguousarray(piece).view(np.uint8).data, found)
    return ".".join(f"{one:08x}" for one in (comm.allgather(found) if data.sharded else [comm.bcast(found)]))


def untrained(data: Dataset, comm: MPI.Intracomm) -> list[Any]:
    """The labels of classes without a training sample; a collective call."""
    found = np.bincount(data.train.y, minlength=data.classes)
    return data.labels[(comm.allreduce(found) if data.sharded else found) == 0].tolist()


def from_arrays(
    x: "np.ndarray | csr_array", y: np.ndarray, comm: MPI.Intracomm | None = None, *, test: int = 0
) -> Dataset:
    """A data set of arrays at hand, taken as they are, with the last ``test`` samples for testing.

    ``x`` is (samples, features), ``y`` (samples,): the same on all ranks; or, with ``comm``, each rank's own, as many
    features on all, and the call is a collective one.  What ``y`` means is the model's affair.
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
        features=features,
        classes=classes,
        scaling=Scaling.none(features),
        labels=np.arange(classes),
        sharded=comm is not None,
        counts=tuple(count for count, _ in shares),
    )


def read(source: str, known: Schema | None = None) -> tuple[Raw, np.ndarray | None]:
    """All that a source holds, for one process, and the labels of its classes, if it has any.

    With ``known``, a model's schema, columns and labels are the model's: labels that it does not know become class -1.
    What contradicts it is a ``UserError``, and what had to be assumed a warning.  Arrays hold classes, not labels.
    """
    raw = _agree(source, formats.read(source, known=known), MPI.COMM_SELF, known)
    labels = None
    if raw.y is not None and not raw.verbatim:
        labels = np.arange(raw.y.max() + 1)
    elif raw.y is not None:
        labels = _values(source, np.unique(raw.y)) if known is None else known.labels
        as_numbers = known is not None and known.as_numbers
        raw = raw._replace(y=_classes(raw.y, labels, as_numbers), verbatim=False)
    told = list(_assumptions(source, raw, known)) if known else []
    if known and raw.y is not None:
        strange = np.count_nonzero((raw.y < 0) | (raw.y >= len(known.labels)))
        if strange:
            told.append(f"{strange} of {len(raw.y)} labels are none that the model knows, and count as wrong")
    for line in told:
        warnings.warn(line, RuntimeWarning, stacklevel=2)
    return raw, labels


def _assumptions(source: str, raw: Raw, known: Schema) -> Iterator[str]:
    """What has to be assumed of columns, where the training set that is ``known`` or the source does not say it."""
    if raw.base is not None and known.base is None:
        yield f"the model does not say how columns are numbered: those of {source!r} are counted from {raw.base}"
    if raw.columns is not None and raw.label is None and all(map(formats.is_number, raw.columns)):
        yield f"line 1 of {source!r}, in which all names are numbers, is taken for a header"
    if raw.columns is None and known.columns is not None:
        yield f"{source!r} does not name its columns: expected in the order {listed(known.columns)}"
    if raw.columns is not None and known.columns is None:
        yield f"the training set does not name its columns: those of {source!r} are taken in their order"


def rebalanced(weights: Sequence[float], measured: Sequence[tuple[int, float]], total: int) -> list[float]:
    """The weights of ranks in the next epoch, adding up to 1 as they did in the last, of ``total`` samples; of each
    rank it is known on how many of them it has spent how many seconds.

    Half of the way to their speeds.  Weights that stay as they are give all ranks the same time a step, even if some of
    it does not depend on the number of samples.  A rank that has done too few samples to tell keeps its weight, and
    none falls so low that it would have too few.
    """
    known = [rank for rank, (samples, seconds) in enumerate(measured) if samples >= MEASURED and seconds > 0]
    speeds = {rank: measured[rank][0] / measured[rank][1] for rank in known}
    theirs, whole = sum(weights[rank] for rank in known), sum(speeds.values())  # NumPy's sums depend on the machine
    new = [(w + speeds[rank] / whole * theirs) / 2 if rank in speeds else w for rank, w in enumerate(weights)]
    least = min(2 * MEASURED / total, 1 / len(weights))
    return normalized([max(weight, least) for weight in new])


def normalized(weights: Sequence[float]) -> list[float]:
    """The same but for a factor, and adding up to 1."""
    largest = max(weights)
    scaled = [weight / largest for weight in weights]  # of which the sum is finite
    return [weight / sum(scaled) for weight in scaled]


class Batches:
    """The steps of an epoch, and who has which samples in them.  Every sample comes once, in an order drawn anew from
    ``seed`` and ``epoch``; the last batch may be shorter.

    Where every rank holds all samples, ranks take slices of batches that do not depend on their number: even ones, or
    by ``weights``, one for each rank, within less than a sample, and over many steps exactly.  A rank with a shard of
    its own deals it out, shuffled, to all the steps in turn, the first to the step after the one where the rank below
    it ended: steps are those of unsharded data, and their batches as large as each other but for one sample.
    """

    def __init__(
        self,
        data: Dataset,
        ranks: int,
        batch_size: int,
        seed: int,
        epoch: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.steps = -(-data.train.total // batch_size)
        self._ends = None  # of the ranks' parts of a batch, as a whole of 1
        if weights and len(set(weights)) > 1:
            ends = [0.0, *accumulate(weights)]
            self._ends = [end / ends[-1] for end in ends]
        self._data, self._ranks, self._batch_size = data, ranks, batch_size
        self._order: dict[int, np.ndarray] = {}  # by rank, where each has its own
        self._seed = [seed, epoch]

    def share(self, step: int, rank: int) -> tuple[np.ndarray, int]:
        """Which samples of ``data.train`` are the share of a rank in a step, counted from 0, and how many samples the
        batch has on all ranks together.  Of sharded data a rank knows its own share only."""
        total = self._data.train.total
        if not self._data.sharded:
            if not self._order:
                rng = np.random.default_rng(self._seed)
                self._order[0], self._phase = rng.permutation(total), rng.random()
            batch = self._order[0][step * self._batch_size :][: self._batch_size]
            if self._ends:
                phase = (self._phase + step * GOLDEN) % 1  # of rounding, up or down
                lo, hi = (int(end * len(batch) + phase) for end in self._ends[rank : rank + 2])
                return batch[lo:hi], len(batch)
            turn = (rank + step) % self._ranks  # no rank is always the one with a sample more, or fewer
            return batch[share(len(batch), turn, self._ranks)], len(batch)
        if rank not in self._order:
            self._order[rank] = np.random.default_rng([*self._seed, rank]).permutation(len(self._data.train.y))
        length = -(-(total - step) // self.steps)
        return self._order[rank][(step - self._data.train.start) % self.steps :: self.steps], length


def _columns_of(raw: Raw) -> Schema | None:
    """What a second file goes by, if they are csv files."""
    if not (raw.verbatim and isinstance(raw.x, np.ndarray)):
        return None
    return Schema(raw.x.shape[1], np.arange(0), raw.columns, raw.label)


def _own_share(source: str, comm: MPI.Intracomm, known: Schema | None) -> Raw:
    """Read by each rank for itself, or else by rank 0, which then keeps only its own."""
    if on_root(comm, lambda: formats.divisible(source)):
        return on_all(comm, lambda: formats.read(source, comm.rank, comm.size, known))
    held: list[Raw] = []
    on_root(comm, lambda: held.append(formats.read(source, known=known)))

    def cut(rank: int) -> Raw:
        whole = held[0]
        x, y, x_test, y_test = (
            None if array is None else array[share(array.shape[0], rank, comm.size)] for array in whole[:4]
        )
        return whole._replace(x=x, y=y, x_test=x_test, y_test=y_test)

    return _scatter(comm, cut)


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
    """The data set whose shares the ranks of ``comm`` bring, for so many ranks to train with."""

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

    raw, labels = _agree_on_classes(source, _agree(source, on_all(comm, check), comm, known, test), comm, known)
    assumed = list(_assumptions(source, raw, known)) if known else []
    if test_set is not None and test is not None and columns:
        assumed += _assumptions(test, test_set, columns)
    x, y, x_test, y_test = raw[:4]
    assert y is not None
    trains = np.ones(len(y), np.bool_)
    drawn = x_test is None
    if x_test is None or y_test is None:
        held_out = _drawn(y, len(labels), TEST_SHARE if test_share is None else test_share, [seed, 1], comm)
        x_test, y_test, trains = x[held_out], y[held_out], ~held_out
    validates = np.zeros(len(y), np.bool_)
    validates[trains] = _drawn(y[trains], len(labels), validation, [seed, 2], comm)
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
    schema = known or Schema(x.shape[1], labels, raw.columns, raw.label, raw.base)
    return Dataset(
        train,
        validating,
        testing,
        schema.features,
        len(labels),
        fitted,
        labels,
        True,
        held,
        schema.columns,
        schema.label,
        schema.base,
        source,
        raw.layout,
        drawn,
        tuple(assumed),
    )


def _drawn(y: np.ndarray, classes: int, share: float, seed: list[int], comm: MPI.Intracomm) -> np.ndarray:
    """Which samples are drawn, of the classes ``y`` that this rank has of all ranks' samples.

    All samples are thought of as one row, class after class, and in each class in their order.  It is cut into pieces
    of 1 / ``share`` samples, and one is drawn from each piece that is whole.  A class of which all were drawn gets its
    first one back.
    """
    above, below = Fraction(share).limit_denominator(10**6).as_integer_ratio()
    own = np.bincount(y, minlength=classes)
    counts = np.array(comm.allgather(own))
    totals, before = counts.sum(axis=0), counts[: comm.rank].sum(axis=0)
    number = np.empty(len(y), np.int64)  # of each sample, among all of its class
    number[np.argsort(y, kind="stable")] = np.arange(len(y)) - np.repeat(np.cumsum(own) - own - before, own)
    place = (np.cumsum(totals) - totals)[y] + number
    if not above:
        return np.zeros(len(y), np.bool_)
    piece = place * above // below
    begin, end = -(-piece * below // above), -(-(piece + 1) * below // above)
    drawn = (piece < totals.sum() * above // below) & (place == begin + _random(seed, piece) % (end - begin))
    gone = comm.allreduce(np.bincount(y[drawn], minlength=classes)) == totals
    return drawn & ~(gone[y] & (number == 0))


def _random(seed: list[int], places: np.ndarray) -> np.ndarray:
    """The numbers of 63 bits at these places of a sequence: splitmix64 (Steele et al., 2014), of which each number can
    be had without those before it, by any rank."""
    word = np.uint64
    z = np.random.SeedSequence(seed).generate_state(1, word) + (places.astype(word) + word(1)) * word(
        0x9E3779B97F4A7C15
    )
    z = (z ^ (z >> word(30))) * word(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> word(27))) * word(0x94D049BB133111EB)
    return ((z ^ (z >> word(31))) >> word(1)).astype(np.int64)


def _agree(source: str, raw: Raw, comm: MPI.Intracomm, known: Schema | None, test: str | None = None) -> Raw:
    """The rank's share with features as all shares together have them, which must be those that are known."""
    sets = [x for x in (raw.x, raw.x_test) if x is not None]
    dense = isinstance(raw.x, np.ndarray)
    fixed = [x.shape[1] for x in sets] if dense else None
    told = comm.allgather((len(sets), raw.y is None, raw.extent, fixed, raw.columns))
    for rank, facts in enumerate(told):
        if facts != told[0]:
            raise UserError(
                f"{source!r} is not the same for all ranks: rank {rank} finds {_described(facts)}, rank 0 "
                f"{_described(told[0])}; give each node the same data"
            )
    if fixed and len(set(fixed)) > 1:
        raise UserError(f"the test set has {fixed[1]} features, {source!r} has {fixed[0]}; expected as many")
    if comm.allreduce(raw.x.shape[0]) == 0:
        raise UserError(f"data file {source!r} holds no samples")
    raw = raw if dense else _agree_on_columns(source, raw, comm, known, test)
    if known is not None and raw.x.shape[1] != known.features:
        raise UserError(f"{source!r} has {raw.x.shape[1]} features; the model was trained on {known.features}")
    return raw


def _described(facts: tuple[int, bool, int, list[int] | None, tuple[str, ...] | None]) -> str:
    sets, _, extent, fixed, columns = facts
    features = f", {' and '.join(map(str, fixed))} features" if fixed else ""
    features += f" {listed(columns)}" if columns else ""
    return f"{'a test set and ' if sets > 1 else ''}{extent} bytes or samples{features}"


def _agree_on_columns(source: str, raw: Raw, comm: MPI.Intracomm, known: Schema | None, test: str | None) -> Raw:
    """Sparse samples of all shares, training and test, with the same columns: as many as the largest number needs, and
    at least those that are known.  In a file they are counted from 1, unless that is known or the training set has a
    0; a ``test`` set must not contradict."""
    sets: list[Any] = [x for x in (raw.x, raw.x_test) if x is not None]
    ends = [comm.allreduce(x.shape[1], MPI.MAX) for x in sets]
    base = None
    if raw.verbatim:
        lowest = [comm.allreduce(int(x.indices.min(initial=1)), MPI.MIN) for x in sets]
        base = lowest[0] if known is None or known.base is None else known.base
        for name, first, end in zip((source, test), lowest, ends, strict=False):
            if first < base:
                raise UserError(f"{name!r} has a column 0; in the training set columns were counted from 1")
            most = max(ends[0], known.features + base if known else 0)
            if name == test and base < first and end > most:
                raise UserError(
                    f"{name!r} has {end} features and no column 0; the training set has {most}, and columns were "
                    "counted from 0"
                )
    features = max(ends) - (base or 0)
    if known is not None:
        features = max(features, known.features)
    if features < 1:
        raise UserError(f"data file {source!r} has no features: not one 'index:value' in it")
    sets = [type(x)((x.data, x.indices - (base or 0), x.indptr), shape=(x.shape[0], features)) for x in sets]
    return raw._replace(x=sets[0], x_test=sets[1] if len(sets) > 1 else None, base=base)


def _agree_on_classes(source: str, raw: Raw, comm: MPI.Intracomm, known: Schema | None) -> tuple[Raw, np.ndarray]:
    """Classes in ``y`` and ``y_test``, and the labels that they stand for: those that are known, or else numbers in
    their order, or text in its."""
    y, y_test = raw.y, raw.y_test
    assert y is not None
    samples = comm.allreduce(len(y))
    if not raw.verbatim:
        most, most_test = comm.allreduce(_largest(y), MPI.MAX), comm.allreduce(_largest(y_test), MPI.MAX)
        if most >= max(samples, 2):
            raise UserError(f"{source!r}: y holds {most}, more classes than samples; number the classes 0, 1, 2, ...")
        if known is not None and most >= len(known.labels):
            raise UserError(f"{source!r}: y holds {most}, the run only classes 0 to {len(known.labels) - 1}")
        if most_test > most:
            raise UserError(f"{source!r}: y_test holds {most_test}, y only classes 0 to {most}")
        return raw, np.arange(most + 1) if known is None else known.labels

    own = np.unique(y)
    if known is None:
        on_all(comm, lambda: _values(source, own))  # so that measurements do not travel
        labels = _values(source, np.unique(np.concatenate(comm.allgather(own))))
    else:
        labels = known.labels
    if len(labels) > max(MANY, samples // 2):
        raise UserError(f"{source!r} has {len(labels)} different labels for {samples} samples; expected classes")
    classes, test_classes = _classes(y, labels), None if y_test is None else _classes(y_test, labels)

    def check() -> None:
        if classes.min(initial=0) < 0:
            (strange,) = _texts(y[classes < 0][:1])
            raise UserError(f"{source!r} has the label {strange}, the run only {listed(_texts(labels))}")
        if y_test is not None and test_classes is not None and test_classes.min(initial=0) < 0:
            (strange,) = _texts(y_test[test_classes < 0][:1])
            raise UserError(f"the test set has the label {strange}, {source!r} only {listed(_texts(labels))}")

    on_all(comm, check)
    return raw._replace(y=classes, y_test=test_classes, verbatim=False), labels


def _classes(found: np.ndarray, labels: np.ndarray, as_numbers: bool = False) -> np.ndarray:
    """The place of each among the labels, by its text, or by the number that it looks like; -1 if it has none."""
    known = {text: n for n, text in enumerate(_texts(labels))}
    values, inverse = np.unique(found, return_inverse=True)
    texts = _texts(values)
    if as_numbers and labels.dtype.kind != "U":
        texts = _texts(np.array([float(text) if formats.DECIMAL.fullmatch(text) else np.nan for text in texts]))
    classes = np.array([known.get(text, -1) for text in texts], np.int64)
    return classes[inverse]


def _texts(labels: np.ndarray) -> list[str]:
    """Labels as a csv file has them; of a number, what Python writes, and of a whole one without ``.0``."""
    return [str(int(n)) if isinstance(n, float) and n.is_integer() else str(n) for n in labels.tolist()]


def _largest(y: np.ndarray | None) -> int:
    return -1 if y is None else int(y.max(initial=-1))


def _values(source: str, labels: np.ndarray) -> np.ndarray:
    """Distinct labels in the order of their classes; measurements are refused.

    Text stays as it is, so that different texts are different labels, but becomes integers if all of it is what Python
    writes for one.  It is sorted as numbers if all of it looks like numbers.
    """
    texts = labels.dtype.kind == "U"
    if texts and not all(map(formats.DECIMAL.fullmatch, labels)):
        return np.unique(labels)
    numbers = labels.astype(np.float64)
    order = np.lexsort((labels, numbers))
    labels, numbers = labels[order], numbers[order]
    if len(labels) > MANY and (numbers != np.floor(numbers)).any():
        raise UserError(f"{source!r} has labels like {', '.join(_texts(labels[:3]))}: measurements; expected classes")
    if all(map(formats.INTEGER.fullmatch, labels)) if texts else (numbers == np.floor(numbers)).all():
        return labels.astype(np.int64)
    return labels


# Moving what NumPy arrays are in: these go as they are, in messages of at most BROADCAST_BYTES.


def _dump(value: Any) -> tuple[bytes, list[np.ndarray]]:
    buffers: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(value, 5, buffer_callback=buffers.append)
    return rest, [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


def _move(arrays: list[np.ndarray], move: Callable[[np.ndarray], Any]) -> None:
    for array in arrays:
        for start in range(0, len(array), BROADCAST_BYTES):
            move(array[start : start + BROADCAST_BYTES])


def _broadcast(comm: MPI.Intracomm, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    rest, arrays = _dump(value)
    rest, sizes = comm.bcast((rest, [len(array) for array in arrays]))
    if comm.rank:
        arrays = [np.empty(size, np.uint8) for size in sizes]
    _move(arrays, lambda piece: comm.Bcast(piece, root=0))
    return pickle.loads(rest, buffers=arrays) if comm.rank else value


def _scatter(comm: MPI.Intracomm, cut: Callable[[int], T]) -> T:
    """``cut(rank)``, which rank 0 makes, on that rank."""
    if comm.rank:
        rest, sizes = comm.recv(source=0)
        arrays = [np.empty(size, np.uint8) for size in sizes]
        _move(arrays, lambda piece: comm.Recv(piece, 0))
        return pickle.loads(rest, buffers=arrays)
    for rank in range(1, comm.size):
        rest, arrays = _dump(cut(rank))
        comm.send((rest, [len(array) for array in arrays]), rank)
        _move(arrays, lambda piece, rank=rank: comm.Send(piece, rank))  # type: ignore[misc]
    return cut(0)
