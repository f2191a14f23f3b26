"""What one rank reads from a source, and what training keeps of its meaning."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array


class Raw(NamedTuple):
    """One rank's share of a source, checked: ``x`` (samples, features), finite, and ``y`` (samples,).

    ``y`` holds classes from 0.  If ``verbatim`` it holds the labels of the file (text of a csv file, numbers of an
    svmlight file), and the columns of a sparse ``x`` are numbered as in the file, as many as this share needs: what
    they mean depends on the other shares.  ``extent``, bytes or samples of the whole source, is the same for all
    shares.  ``columns`` and ``label`` are the names, all different, of a csv file's features and labels, if it has a
    header; ``base`` is the number of an svmlight file's first column, once that is known.  ``layout`` says of a csv
    file where its labels are, and whether line 1 is a header.
    """

    x: "np.ndarray | csr_array"
    y: np.ndarray | None
    x_test: "np.ndarray | csr_array | None" = None
    y_test: np.ndarray | None = None
    verbatim: bool = False
    extent: int = 0
    columns: tuple[str, ...] | None = None
    label: str | None = None
    base: int | None = None
    layout: str | None = None

    def __repr__(self) -> str:
        sets = ((name, getattr(self, name)) for name in ("x", "y", "x_test", "y_test"))
        return f"<Raw: {', '.join(f'{name} {array.shape} {array.dtype}' for name, array in sets if array is not None)}>"


class Schema(NamedTuple):
    """The meaning of training data, kept by the model so that other data are read in the same way.

    ``labels[class]`` is the label of the class in the data; ``columns``, ``label`` and ``base`` are those of ``Raw``,
    ``None`` where the data did not say.
    """

    features: int
    labels: np.ndarray
    columns: tuple[str, ...] | None = None
    label: str | None = None
    base: int | None = None
    as_numbers: bool = False
    """Whether the labels were read by an earlier version, which took text that looks like a number for one."""

    def facts(self) -> dict[str, Any]:
        """The contents as JSON values."""
        own = {name: value for name, value in self._asdict().items() if name != "as_numbers"}
        return {**own, "labels": self.labels.tolist()}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Schema":
        """The schema with these ``facts``; invalid ones raise ``ValueError``, ``KeyError`` or ``TypeError``."""
        features, labels, columns = facts["features"], np.array(facts["labels"]), facts.get("columns")
        label, base = facts.get("label"), facts.get("base")
        if labels.ndim != 1 or labels.dtype.kind not in "ifU" or base not in (None, 0, 1):
            raise ValueError(f"labels {labels.dtype} of shape {labels.shape}, base {base}")
        if columns is not None and (len(columns) != features or not all(isinstance(name, str) for name in columns)):
            raise ValueError(f"{len(columns)} names of {features} features")
        if columns is not None and len(set(columns)) < features:
            raise ValueError("a name of two features")
        names = None if columns is None else tuple(columns)
        return cls(features, labels, names, label, base, "columns" not in facts)


def share(samples: int, rank: int, ranks: int) -> slice:
    """The range of this rank's samples, in an even split of ``samples`` over ``ranks``."""
    return slice(samples * rank // ranks, samples * (rank + 1) // ranks)
