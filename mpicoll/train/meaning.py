"""The common meaning of the shares of all ranks: columns, classes, and what must be assumed about them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mpi4py import MPI

from ..errors import UserError, listed
from ..mpi.together import on_all
from .labels import MANY, classes_by_label, label_texts, ordered_labels
from .readers.raw import Raw, Schema
from .readers.texts import is_number


def common_features(source: str, raw: Raw, comm: MPI.Intracomm, known: Schema | None, test: str | None = None) -> Raw:
    """Return a rank's share with the features of all shares together, which must be those of ``known``."""
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
    raw = raw if dense else _common_columns(source, raw, comm, known, test)
    if known is not None and raw.x.shape[1] != known.features:
        raise UserError(f"{source!r} has {raw.x.shape[1]} features; the model was trained on {known.features}")
    return raw


def _described(facts: tuple[int, bool, int, list[int] | None, tuple[str, ...] | None]) -> str:
    sets, _, extent, fixed, columns = facts
    features = f", {' and '.join(map(str, fixed))} features" if fixed else ""
    features += f" {listed(columns)}" if columns else ""
    return f"{'a test set and ' if sets > 1 else ''}{extent} bytes or samples{features}"


def _common_columns(source: str, raw: Raw, comm: MPI.Intracomm, known: Schema | None, test: str | None) -> Raw:
    """Return a share of sparse samples, training and test, with as many columns as all shares and ``known`` need.

    Files number columns from 1, unless ``known`` says otherwise or the training set has a column 0; a ``test`` set must
    not contradict.
    """
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


def common_classes(source: str, raw: Raw, comm: MPI.Intracomm, known: Schema | None) -> tuple[Raw, np.ndarray]:
    """Return a share with classes in ``y`` and ``y_test``, and the labels of these classes.

    Labels are those of ``known``, or else all labels that occur, sorted as numbers or as text.
    """
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
        on_all(comm, lambda: ordered_labels(source, own))  # so that measurements do not travel
        labels = ordered_labels(source, np.unique(np.concatenate(comm.allgather(own))))
    else:
        labels = known.labels
    if len(labels) > max(MANY, samples // 2):
        raise UserError(f"{source!r} has {len(labels)} different labels for {samples} samples; expected classes")
    classes, test_classes = classes_by_label(y, labels), None if y_test is None else classes_by_label(y_test, labels)

    def check() -> None:
        if classes.min(initial=0) < 0:
            (strange,) = label_texts(y[classes < 0][:1])
            raise UserError(f"{source!r} has the label {strange}, the run only {listed(label_texts(labels))}")
        if y_test is not None and test_classes is not None and test_classes.min(initial=0) < 0:
            (strange,) = label_texts(y_test[test_classes < 0][:1])
            raise UserError(f"the test set has the label {strange}, {source!r} only {listed(label_texts(labels))}")

    on_all(comm, check)
    return raw._replace(y=classes, y_test=test_classes, verbatim=False), labels


def assumptions(source: str, raw: Raw, known: Schema) -> Iterator[str]:
    """Lines that say what is assumed about columns which the training set, ``known`` or the source does not name."""
    if raw.base is not None and known.base is None:
        yield f"the model does not say how columns are numbered: those of {source!r} are counted from {raw.base}"
    if raw.columns is not None and raw.label is None and all(map(is_number, raw.columns)):
        yield f"line 1 of {source!r}, in which all names are numbers, is taken for a header"
    if raw.columns is None and known.columns is not None:
        yield f"{source!r} does not name its columns: expected in the order {listed(known.columns)}"
    if raw.columns is not None and known.columns is None:
        yield f"the training set does not name its columns: those of {source!r} are taken in their order"


def _largest(y: np.ndarray | None) -> int:
    return -1 if y is None else int(y.max(initial=-1))
