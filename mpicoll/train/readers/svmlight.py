"""Files of the svmlight format: lines of ``label index:value index:value ...``."""

import io
import re
from pathlib import Path

import numpy as np

from .lines import first_line, own_lines, parsed
from .raw import Raw
from .texts import NUMBER, decoded

SVM_LINE = re.compile(
    rf"\s*(?:{NUMBER}(?:\s+qid:\S*)?(?:\s+\d+:{NUMBER})*\s*)?(?:#.*)?".encode(), re.IGNORECASE | re.DOTALL
)
"""A line of an svmlight file.  Not left to Python's ``float``, which accepts underscores."""


def read_svmlight(path: Path, rank: int, ranks: int) -> Raw:
    """This rank's share of an svmlight file; indices must increase, ``qid`` and comments are ignored."""
    from scipy.sparse import csr_array
    from sklearn.datasets import load_svmlight_file

    def parse(lines: list[bytes]) -> Raw:
        if not all(map(SVM_LINE.fullmatch, lines)):
            raise ValueError("not a number")
        # Not by the loader's own offset and length: where no line begins in a range, it reads one twice.
        try:
            x, y = load_svmlight_file(io.BytesIO(b"\n".join(lines)), zero_based=True)
        except OverflowError as error:
            raise ValueError(error) from error
        if not (np.isfinite(x.data).all() and (abs(y) < 2**53).all()):  # beyond, different integers would be equal
            raise ValueError("not finite")
        shape = (len(y), int(x.indices.max(initial=-1)) + 1)
        return Raw(csr_array((x.data, x.indices.astype(np.int32), x.indptr), shape=shape), y, verbatim=True)

    def complaint(line: bytes) -> str:
        shown = decoded(line[:40]) + ("..." if len(line) > 40 else "")
        return (
            f"{shown!r}; expected 'label index:value index:value ...', finite numbers, increasing indices, and a label "
            "below 2^53"
        )

    first_line(path)
    lines, begin, size = own_lines(path, rank, ranks)
    return parsed(path, begin, lines, parse, complaint)._replace(extent=size)
