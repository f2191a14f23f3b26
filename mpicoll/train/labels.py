"""Labels of classes: their order, their text, and labels that are measurements."""

import numpy as np

from ..errors import UserError
from .readers.texts import DECIMAL, INTEGER

MANY = 20
"""More different labels than this are no classes if they are not integers, or if most samples have one of their own."""


def classes_by_label(found: np.ndarray, labels: np.ndarray, as_numbers: bool = False) -> np.ndarray:
    """The class of each label, by its text or by the number that it looks like; -1 for an unknown label."""
    known = {text: n for n, text in enumerate(label_texts(labels))}
    values, inverse = np.unique(found, return_inverse=True)
    texts = label_texts(values)
    if as_numbers and labels.dtype.kind != "U":
        texts = label_texts(np.array([float(text) if DECIMAL.fullmatch(text) else np.nan for text in texts]))
    classes = np.array([known.get(text, -1) for text in texts], np.int64)
    return classes[inverse]


def label_texts(labels: np.ndarray) -> list[str]:
    """The text of labels in a csv file: numbers as Python writes them, whole numbers without ``.0``."""
    return [str(int(n)) if isinstance(n, float) and n.is_integer() else str(n) for n in labels.tolist()]


def ordered_labels(source: str, labels: np.ndarray) -> np.ndarray:
    """Return the distinct labels in the order of their classes.  Raises ``UserError`` if they are measurements.

    Labels stay text, so that different texts are different labels, unless every label is the text that Python writes
    for an integer.  They are sorted as numbers if all of them look like numbers.
    """
    texts = labels.dtype.kind == "U"
    if texts and not all(map(DECIMAL.fullmatch, labels)):
        return np.unique(labels)
    numbers = labels.astype(np.float64)
    order = np.lexsort((labels, numbers))
    labels, numbers = labels[order], numbers[order]
    if len(labels) > MANY and (numbers != np.floor(numbers)).any():
        raise UserError(
            f"{source!r} has labels like {', '.join(label_texts(labels[:3]))}: measurements; expected classes"
        )
    if all(map(INTEGER.fullmatch, labels)) if texts else (numbers == np.floor(numbers)).all():
        return labels.astype(np.int64)
    return labels
