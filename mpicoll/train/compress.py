"""Compression with error feedback: ranks send little of a vector, and keep the rest for the next time.

What a rank does not send of a vector is its residual, and is added to its next one (Seide et al. 2014, Stich et al.
2018): so nothing is lost, it only comes later, and the sum of all that was sent stays within a residual of the sum of
all that there was.  That holds for vectors which mean the same each time: means, not sums over ever other numbers of
samples.

Nothing here communicates.  All ranks decode the same numbers and add them up in the same order, elementwise and without
BLAS (see ``optimizers``), and so end with the same bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ..errors import UserError
from .optimizers import BLOCK

Tensors = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Views of a model's flat vector, by name."""


class Ranks(Protocol):
    """What it takes to agree: both are collective calls."""

    def allreduce(self, arrays: Sequence[np.ndarray], op: str) -> None:
        """Combine, in place, with the same bits on all ranks."""

    def allgather(self, array: np.ndarray) -> np.ndarray:
        """Those of all ranks, shape (p, *array.shape)."""


class Compressor:
    """For vectors of ``size`` elements, at least one, of float32 or float64.

    ``state`` holds what it keeps from one vector to the next, written in place: the ``residual``, which is this rank's
    own, and what all ranks hold alike.
    """

    def __init__(self, size: int, dtype: np.dtype) -> None:
        self.residual = np.zeros(size, dtype)
        self.state = {"residual": self.residual}

    def add_up(self, vector: np.ndarray, exact: np.ndarray, ranks: Ranks) -> None:
        """Put into ``vector``, shape (size,), the sum of what all ranks send of theirs, and into ``exact``, of the same
        dtype and few elements, the sum of all of theirs; a collective call.

        Of each rank, what it sends and its new residual add up to ``vector`` and the old one.  Where a number is not
        finite, so are some of the sum.
        """
        raise NotImplementedError


class Code(Compressor):
    """A code of fixed length for each vector, which ranks gather: these need not be linear.

    ``pace`` is how fast models may approach each other by ``Differences`` in it, as found by simulation.
    """

    pace = 1.0

    fields: np.dtype
    """Of what it sends."""

    def add_up(self, vector: np.ndarray, exact: np.ndarray, ranks: Ranks) -> None:
        """See ``Compressor``."""
        sent = np.empty((), [("exact", vector.dtype, exact.shape), ("code", self.fields)])
        sent["exact"] = exact
        self.send(vector, sent["code"])
        gathered = ranks.allgather(sent.reshape(1).view(np.uint8))
        vector[:] = 0
        exact[:] = 0
        for row in gathered.reshape(-1).view(sent.dtype):
            exact += row["exact"]
            self.decode(row["code"], vector, 1)

    def resized(self, size: int) -> "Code":
        """Another of its kind."""
        return type(self)(size, self.residual.dtype)

    def send(self, vector: np.ndarray, code: np.ndarray) -> None:
        """Fill ``code`` with what is to be sent, and keep the rest."""
        self.residual += vector
        self.encode(self.residual, code)
        self.decode(code, self.residual, -1)

    def encode(self, vector: np.ndarray, code: np.ndarray) -> None:
        """Fill the fields of ``code``."""
        raise NotImplementedError

    def decode(self, code: np.ndarray, into: np.ndarray, times: int) -> None:
        """Add what it stands for, ``times`` 1 or -1."""
        raise NotImplementedError


class Differences:
    """Codes of how models differ from what neighbors know of them (CHOCO-SGD: Koloskova et al. 2019).

    Of each neighbor two vectors are ``known``: what it has heard of this rank's model, and what was heard of its own;
    both have the same bits at its end.  A rank sends a code of what its model is beyond the first, and then moves by
    the way from the first to the second, times the weight of the neighbor: where weights are symmetric, that takes from
    one model what it adds to the other, whatever codes leave out.  It moves by ``code.pace`` of it only, since what has
    been left out would else add up.
    """

    def __init__(self, code: Code, params: np.ndarray, peers: list[int]) -> None:
        self.code, self._at = code, {peer: n for n, peer in enumerate(peers)}
        self.known = np.empty((len(peers), 2, params.size), params.dtype)
        self.begin(params)

    def begin(self, params: np.ndarray) -> None:
        """From a model that all ranks have."""
        self.known[:] = params

    def encode(self, params: np.ndarray, peer: int) -> np.ndarray:
        """What to send to it, bytes."""
        own = self.known[self._at[peer], 0]
        code = np.zeros((), self.code.fields)
        self.code.encode(np.subtract(params, own, out=self.code.residual), code)
        self.code.decode(code, own, 1)
        return code.reshape(1).view(np.uint8)

    def mix(self, params: np.ndarray, came: dict[int, np.ndarray], weights: dict[int, float]) -> None:
        """Go towards what is known of those from whom codes came, in place."""
        way = self.code.residual
        for peer, code in sorted(came.items()):
            own, other = self.known[self._at[peer]]
            self.code.decode(code.view(self.code.fields)[0], other, 1)
            np.subtract(other, own, out=way)
            way *= self.code.pace * weights[peer]
            params += way


class Half(Code):
    """float16, of the vector over a power of two that is its largest magnitude's, so that nothing overflows.

    Off by at most 2^-11 of an element, or 2^-25 of the largest if that is more; the residual is exact.
    """

    def __init__(self, size: int, dtype: np.dtype) -> None:
        super().__init__(size, dtype)
        self.fields = np.dtype([("scale", dtype), ("halves", np.float16, (size,))])

    def encode(self, vector: np.ndarray, code: np.ndarray) -> None:
        """See ``Code``."""
        one = vector.dtype.type(1)
        _, exponent = np.frexp(max(np.max(vector), -np.min(vector)))  # what is not finite is so in any units
        code["scale"] = scale = np.ldexp(one, exponent - 1)
        for block in _blocks(vector.size):
            code["halves"][block] = vector[block] / scale

    def decode(self, code: np.ndarray, into: np.ndarray, times: int) -> None:
        """See ``Code``."""
        for block in _blocks(into.size):
            into[block] += code["halves"][block].astype(into.dtype) * (times * code["scale"])


class Sign(Code):
    """A bit for each element, its sign, and their mean magnitude (EF-signSGD: Karimireddy et al. 2019)."""

    def __init__(self, size: int, dtype: np.dtype) -> None:
        super().__init__(size, dtype)
        self.fields = np.dtype([("scale", dtype), ("bits", np.uint8, (-(-size // 8),))])
        self.pace = 0.6

    def encode(self, vector: np.ndarray, code: np.ndarray) -> None:
        """See ``Code``."""
        code["scale"] = np.mean(np.abs(vector), dtype=np.float64)
        code["bits"][:] = np.packbits(vector >= 0)

    def decode(self, code: np.ndarray, into: np.ndarray, times: int) -> None:
        """See ``Code``."""
        scale = times * code["scale"]
        for block in _blocks(into.size):
            part = into[block]
            part += np.where(np.unpackbits(code["bits"][block.start // 8 :], count=part.size), scale, -scale)


class TopK(Code):
    """Of all elements the ``share`` with the largest magnitude, of equals the first: at least one.

    They are sent as they are, and the others are the residual.
    """

    def __init__(self, size: int, dtype: np.dtype, share: float) -> None:
        self.share, self.k = share, max(math.ceil(share * size), 1)
        self.pace = min(3 * self.k / size, 1)
        place = np.min_scalar_type(size - 1)
        super().__init__(size, dtype)
        self.fields = np.dtype([("values", dtype, (self.k,)), ("places", place, (self.k,))])

    def resized(self, size: int) -> "TopK":
        """See ``Code``."""
        return TopK(size, self.residual.dtype, self.share)

    def encode(self, vector: np.ndarray, code: np.ndarray) -> None:
        """See ``Code``."""
        magnitude = np.abs(vector)
        magnitude[np.isnan(magnitude)] = np.inf  # it must not stay behind
        least = np.partition(magnitude, -self.k)[-self.k]
        above = np.flatnonzero(magnitude > least)
        equal = np.flatnonzero(magnitude == least)[: self.k - len(above)]
        code["places"][:] = places = np.concatenate([above, equal])
        code["values"][:] = vector[places]

    def decode(self, code: np.ndarray, into: np.ndarray, times: int) -> None:
        """See ``Code``."""
        into[code["places"]] += times * code["values"]


class PowerSGD(Compressor):
    """Matrices M as a product of two factors of ``rank`` rows, P^T Q (Vogels et al. 2019): a step of power iteration,
    which begins with the Q of the time before.

        P = orthonormal rows of the sum of all ranks' Q M^T;  Q = the sum of all ranks' P M

    Both are linear in M, so that ranks add them up, however many there are.  A rank sends P^T (P M) of its own M, and
    keeps what is left.  What is no matrix, or one that factors would not make smaller, travels as it is.
    """

    def __init__(self, size: int, dtype: np.dtype, rank: int, tensors: Tensors, seed: int) -> None:
        super().__init__(size, dtype)
        self.rank, self._tensors = rank, tensors
        self._names = [name for name, view in tensors(self.residual).items() if self._gets_smaller(view)]
        self._matrices = self._views(self.residual)
        if not self._matrices:
            raise UserError(
                f"--compress powersgd:{rank} makes no matrix of this model smaller: take a smaller rank, or topk, sign "
                "or 16bit"
            )
        dense = np.ones(size, bool)
        for view in self._views(dense):
            view[:] = False
        self._dense = np.flatnonzero(dense)
        rows, columns = zip(*(matrix.shape for matrix in self._matrices), strict=True)
        self._ps, self._qs = rank * np.cumsum(rows), rank * np.cumsum(columns)  # where each ends, in one vector
        self.state["q"] = np.random.default_rng(seed).normal(size=self._qs[-1]).astype(dtype)

    def _gets_smaller(self, view: np.ndarray) -> bool:
        return view.ndim == 2 and self.rank * sum(view.shape) < view.size

    def _views(self, vector: np.ndarray) -> list[np.ndarray]:
        views = self._tensors(vector)
        return [views[name] for name in self._names]

    def _factors(self, vector: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
        """That are in a vector, shape (rank, rows or columns of the matrix) each."""
        return [factor.reshape(self.rank, -1) for factor in np.split(vector, ends)[: len(ends)]]

    def add_up(self, vector: np.ndarray, exact: np.ndarray, ranks: Ranks) -> None:
        """See ``Compressor``."""
        self.residual += vector
        matrices, qs = self._matrices, self._factors(self.state["q"], self._qs)
        projected = [(q @ matrix.T).ravel() for q, matrix in zip(qs, matrices, strict=True)]
        first = np.concatenate([*projected, self.residual[self._dense], exact])
        ranks.allreduce([first], "sum")
        self.residual[self._dense] = 0
        vector[self._dense], exact[:] = np.split(first[self._ps[-1] :], [len(self._dense)])

        ps = [_orthonormal(p) for p in self._factors(first, self._ps)]
        own = [p @ matrix for p, matrix in zip(ps, matrices, strict=True)]
        for p, q, matrix in zip(ps, own, matrices, strict=True):
            _add_product(p, -q, matrix)
        second = np.concatenate([q.ravel() for q in own])
        ranks.allreduce([second], "sum")
        for p, q, view, kept in zip(ps, self._factors(second, self._qs), self._views(vector), qs, strict=True):
            view[:] = 0
            _add_product(p, q, view)
            for before, row in zip(kept, q, strict=True):
                if length := _norm(row):  # or it would find nothing ever again
                    before[:] = row / length  # or it would grow and vanish as gradients do


def _add_product(p: np.ndarray, q: np.ndarray, into: np.ndarray) -> None:
    """Add p^T q, for p of shape (rank, rows) and q (rank, columns); without BLAS."""
    step = max(BLOCK // into.shape[1], 1)
    for start in range(0, into.shape[0], step):
        block = into[start : start + step]
        for column, row in zip(p, q, strict=True):
            block += column[start : start + step, np.newaxis] * row


def _orthonormal(p: np.ndarray) -> np.ndarray:
    """Its rows made so, by Gram and Schmidt in float64; those that add nothing to the ones before become zero."""
    rows = p.astype(np.float64)
    for n, row in enumerate(rows):
        length = _norm(row)
        for _ in range(2):  # twice is enough (Giraud et al. 2005)
            for other in rows[:n]:
                row -= np.sum(row * other) * other
        left = _norm(row)
        if not math.isfinite(length):
            row[:] = np.nan
        elif left <= 100 * np.finfo(p.dtype).eps * length:
            row[:] = 0
        else:
            row /= left
    return rows.astype(p.dtype)


def _norm(row: np.ndarray) -> float:
    return math.sqrt(np.sum(np.square(row, dtype=np.float64)))


def _blocks(size: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def compressor(text: str, size: int, dtype: np.dtype, tensors: Tensors | None, seed: int) -> Compressor:
    """The one that ``text`` describes, as ``--compress`` has it; a ``UserError`` if there is none.

    ``tensors`` are the model's, if it has any, and ``seed`` is that of random numbers all ranks have in common.
    """
    kind, _, number = text.partition(":")
    if text == "16bit":
        return Half(size, dtype)
    if text == "sign":
        return Sign(size, dtype)
    try:
        if kind == "topk" and 0 < float(number) <= 1:
            return TopK(size, dtype, float(number))
        rank = int(number) if kind == "powersgd" else 0
    except ValueError:
        rank = 0
    if rank < 1:
        raise UserError(
            "--compress must be 16bit, sign, topk:SHARE with a share above 0 and at most 1, or powersgd:RANK with a "
            f"whole number from 1, got {text[:40]!r}"
        )
    if tensors is None:
        raise UserError(f"--compress {text} needs the matrices of a model, and this one has no tensors: take another")
    return PowerSGD(size, dtype, rank, tensors, seed)
