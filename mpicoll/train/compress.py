"""Compression with error feedback: ranks send little of a vector, and keep the rest for the next time.

What a rank does not send of a vector is its residual, and is added to its next one (Seide et al. 2014, Stich et al.
2018): so nothing is lost, it only comes later, and the sum of all that was sent stays within a residual of the sum of
all that there was.  That holds for vectors which mean the same each time: means, not sums over ever other numbers of
samples.

Nothing here communicates.  All ranks decode the same numbers and add them up in the same order, elementwise and without
BLAS (see ``optimizers``), and so end with the same bits.  So they do on GPUs that are of one kind: there sums, of which
only PowerSGD has some that ranks must agree in, are CuPy's, of new arrays, since the order of additions may depend on
where one begins in memory.

Arrays are where the vector is, and nothing is read back from a GPU but by TopK, which has to know how many elements it
has found.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ..errors import UserError
from .optimizers import at_once

Views = dict[str, np.ndarray]
Tensors = Callable[[np.ndarray], Views]
"""Views of a model's flat vector, by name."""

BYTE = np.dtype(np.uint8)


class Ranks(Protocol):
    """The collective calls that compressors make."""

    def allreduce(self, arrays: Sequence[np.ndarray], op: str) -> None:
        """Combine, in place, with the same bits on all ranks."""

    def allgather(self, array: np.ndarray) -> np.ndarray:
        """The arrays of all ranks, shape (p, *array.shape); a collective call."""


class Fields:
    """Arrays, by name, side by side in a vector of bytes: as a structured dtype would have it, but CuPy knows none.

    Each begins at a multiple of 8 bytes, since a GPU reads no number elsewhere, and so does the next such vector.
    """

    def __init__(self, **arrays: tuple[np.dtype, int]) -> None:
        """Lay out ``arrays``: for each name its dtype and number of elements."""
        self.nbytes = 0
        self._places: dict[str, tuple[slice, np.dtype]] = {}
        for name, (dtype, count) in arrays.items():
            end = self.nbytes + dtype.itemsize * count
            self._places[name] = slice(self.nbytes, end), dtype
            self.nbytes = -(-end // 8) * 8

    def of(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """Views of such a vector."""
        return {name: memory[place].view(dtype) for name, (place, dtype) in self._places.items()}


class Compressor:
    """For vectors of ``size`` elements, at least one, of float32 or float64, in host memory or where ``like`` is.

    ``state`` holds what it keeps from one vector to the next, written in place: the ``residual``, which is this rank's
    own, and what all ranks hold alike.
    """

    def __init__(self, size: int, dtype: np.dtype, like: np.ndarray | None = None) -> None:
        self.residual = np.zeros(size, dtype, like=like)
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

    fields: Fields
    """Of what it sends, which is ``fields.nbytes`` bytes, and given to its methods as views."""

    def add_up(self, vector: np.ndarray, exact: np.ndarray, ranks: Ranks) -> None:
        """See ``Compressor``."""
        message = Fields(exact=(exact.dtype, exact.size), code=(BYTE, self.fields.nbytes))
        memory = np.zeros(message.nbytes, np.uint8, like=vector)
        sent = message.of(memory)
        sent["exact"][:] = exact
        self.send(vector, self.fields.of(sent["code"]))
        gathered = ranks.allgather(memory)
        vector[:] = 0
        exact[:] = 0
        for row in gathered:
            came = message.of(row)
            exact += came["exact"]
            self.decode(self.fields.of(came["code"]), vector, 1)

    def resized(self, size: int) -> "Code":
        """Another of its kind."""
        return type(self)(size, self.residual.dtype, self.residual)

    def send(self, vector: np.ndarray, code: Views) -> None:
        """Fill ``code`` with what is to be sent, and keep the rest."""
        self.residual += vector
        self.encode(self.residual, code)
        self.decode(code, self.residual, -1)

    def encode(self, vector: np.ndarray, code: Views) -> None:
        """Fill the fields of ``code``."""
        raise NotImplementedError

    def decode(self, code: Views, into: np.ndarray, times: int) -> None:
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
        self.known = np.empty((len(peers), 2, params.size), params.dtype, like=params)
        self.begin(params)

    def begin(self, params: np.ndarray) -> None:
        """From a model that all ranks have."""
        self.known[:] = params

    def encode(self, params: np.ndarray, peer: int) -> np.ndarray:
        """What to send to it, bytes."""
        own = self.known[self._at[peer], 0]
        message = np.zeros(self.code.fields.nbytes, np.uint8, like=params)
        code = self.code.fields.of(message)
        self.code.encode(np.subtract(params, own, out=self.code.residual), code)
        self.code.decode(code, own, 1)
        return message

    def mix(self, params: np.ndarray, came: dict[int, np.ndarray], weights: dict[int, float]) -> None:
        """Go towards what is known of those from whom codes came, in place."""
        way = self.code.residual
        for peer, message in sorted(came.items()):
            own, other = self.known[self._at[peer]]
            self.code.decode(self.code.fields.of(message), other, 1)
            np.subtract(other, own, out=way)
            way *= self.code.pace * weights[peer]
            params += way


class Half(Code):
    """float16, of the vector over a power of two that is its largest magnitude's, so that nothing overflows.

    Off by at most 2^-11 of an element, or 2^-25 of the largest if that is more; the residual is exact.
    """

    def __init__(self, size: int, dtype: np.dtype, like: np.ndarray | None = None) -> None:
        super().__init__(size, dtype, like)
        self.fields = Fields(scale=(dtype, 1), halves=(np.dtype(np.float16), size))

    def encode(self, vector: np.ndarray, code: Views) -> None:
        """See ``Code``."""
        largest = np.maximum(np.max(vector), -np.min(vector))
        _, exponent = np.frexp(largest)  # what is not finite is so in any units
        code["scale"][:] = np.ldexp(np.ones_like(largest), exponent - 1)
        for block in _blocks(vector):
            code["halves"][block] = vector[block] / code["scale"]

    def decode(self, code: Views, into: np.ndarray, times: int) -> None:
        """See ``Code``."""
        for block in _blocks(into):
            into[block] += code["halves"][block].astype(into.dtype) * (times * code["scale"])


class Sign(Code):
    """A bit for each element, its sign, and their mean magnitude (EF-signSGD: Karimireddy et al. 2019)."""

    def __init__(self, size: int, dtype: np.dtype, like: np.ndarray | None = None) -> None:
        super().__init__(size, dtype, like)
        self.fields = Fields(scale=(dtype, 1), bits=(BYTE, -(-size // 8)))
        self.pace = 0.6

    def encode(self, vector: np.ndarray, code: Views) -> None:
        """See ``Code``."""
        code["scale"][:] = np.mean(np.abs(vector), dtype=np.float64)
        code["bits"][:] = np.packbits(vector >= 0)

    def decode(self, code: Views, into: np.ndarray, times: int) -> None:
        """See ``Code``."""
        scale = times * code["scale"]
        for block in _blocks(into):
            part = into[block]
            bits = np.unpackbits(code["bits"][block.start // 8 : -(-block.stop // 8)])[: part.size]
            part += np.where(bits, scale, -scale)


class TopK(Code):
    """The ``share`` of all elements that has the largest magnitudes, at least one; of equals the first.

    They are sent as they are, and the others are the residual.
    """

    def __init__(self, size: int, dtype: np.dtype, share: float, like: np.ndarray | None = None) -> None:
        self.share, self.k = share, max(math.ceil(share * size), 1)
        self.pace = min(3 * self.k / size, 1)
        super().__init__(size, dtype, like)
        self.fields = Fields(values=(dtype, self.k), places=(np.min_scalar_type(size - 1), self.k))

    def resized(self, size: int) -> "TopK":
        """See ``Code``."""
        return TopK(size, self.residual.dtype, self.share, self.residual)

    def encode(self, vector: np.ndarray, code: Views) -> None:
        """See ``Code``."""
        magnitude = np.abs(vector)
        magnitude[np.isnan(magnitude)] = np.inf  # it must not stay behind
        least = np.partition(magnitude, -self.k)[-self.k]
        places = np.flatnonzero(magnitude >= least)
        if len(places) > self.k:
            found = magnitude[places]
            places = np.concatenate([places[found > least], places[found == least]])[: self.k]
        code["places"][:] = places
        code["values"][:] = vector[places]

    def decode(self, code: Views, into: np.ndarray, times: int) -> None:
        """See ``Code``."""
        into[code["places"].astype(np.int64)] += times * code["values"]  # no place is there twice


class PowerSGD(Compressor):
    """Matrices M as a product of two factors of ``rank`` rows, P^T Q (Vogels et al. 2019): a step of power iteration,
    which begins with the Q of the time before.

        P = orthonormal rows of the sum of all ranks' Q M^T;  Q = the sum of all ranks' P M

    Both are linear in M, so that ranks add them up, however many there are.  A rank sends P^T (P M) of its own M, and
    keeps what is left.  What is no matrix, or one that factors would not make smaller, travels as it is.
    """

    def __init__(
        self,
        size: int,
        dtype: np.dtype,
        rank: int,
        tensors: Tensors,
        seed: int,
        like: np.ndarray | None = None,
    ) -> None:
        super().__init__(size, dtype, like)
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
        self._dense = np.asarray(np.flatnonzero(dense), like=like)
        # Where the factors of each matrix end, in one vector.
        self._ps, self._qs = (
            (rank * np.cumsum(lengths)).tolist()
            for lengths in zip(*(matrix.shape for matrix in self._matrices), strict=True)
        )
        q = np.random.default_rng(seed).normal(size=self._qs[-1]).astype(dtype)
        self.state["q"] = np.asarray(q, like=like)

    def _gets_smaller(self, view: np.ndarray) -> bool:
        return view.ndim == 2 and self.rank * sum(view.shape) < view.size

    def _views(self, vector: np.ndarray) -> list[np.ndarray]:
        views = self._tensors(vector)
        return [views[name] for name in self._names]

    def _factors(self, vector: np.ndarray, ends: list[int]) -> list[np.ndarray]:
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
            lengths = _norms(q)
            none = lengths == 0
            scaled = q / np.where(none, 1, lengths)  # or it would grow and vanish as gradients do
            kept[:] = np.where(none, kept, scaled)  # or it would find nothing ever again


def _add_product(p: np.ndarray, q: np.ndarray, into: np.ndarray) -> None:
    """Add p^T q, for p of shape (rank, rows) and q (rank, columns); without BLAS."""
    step = max(at_once(into.size, into) // into.shape[1], 1)
    for start in range(0, into.shape[0], step):
        block = into[start : start + step]
        for column, row in zip(p, q, strict=True):
            block += column[start : start + step, np.newaxis] * row


def _orthonormal(p: np.ndarray) -> np.ndarray:
    """Its rows made so, by Gram and Schmidt in float64; those that add nothing to the ones before become zero."""
    rows, before = p.astype(np.float64), _norms(p)
    for n, row in enumerate(rows):
        for _ in range(2):  # twice is enough (Giraud et al. 2005)
            for other in rows[:n]:
                row -= np.sum(row * other) * other
        left, length = _norms(row), before[n]
        left = np.where(left <= 100 * float(np.finfo(p.dtype).eps) * length, np.inf, left)
        row /= np.where(np.isfinite(length), left, np.nan)
    return rows.astype(p.dtype)


def _norms(rows: np.ndarray) -> np.ndarray:
    """The norm of each row, shape (rows, 1), or of a single one, shape (1,)."""
    return np.sqrt(np.sum(np.square(rows, dtype=np.float64), axis=-1, keepdims=True))


def _blocks(vector: np.ndarray) -> list[slice]:
    step = at_once(vector.size, vector)
    return [slice(start, min(start + step, vector.size)) for start in range(0, vector.size, step)]


def compressor(
    text: str, size: int, dtype: np.dtype, tensors: Tensors | None, seed: int, like: np.ndarray | None = None
) -> Compressor:
    """The one that ``text`` describes, as ``--compress`` has it; a ``UserError`` if there is none.

    ``tensors`` are the model's, if it has any, and ``seed`` is that of random numbers all ranks have in common.
    """
    kind, _, number = text.partition(":")
    if text == "16bit":
        return Half(size, dtype, like)
    if text == "sign":
        return Sign(size, dtype, like)
    try:
        if kind == "topk" and 0 < float(number) <= 1:
            return TopK(size, dtype, float(number), like)
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
    return PowerSGD(size, dtype, rank, tensors, seed, like)
