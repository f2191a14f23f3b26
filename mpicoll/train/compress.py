"""Compression with error feedback: ranks send a short code of a vector, and keep the residual for the next vector.

The residual is what the code leaves out of a vector; it is added to the next vector (Seide et al. 2014, Stich et al.
2018).  So nothing is lost, only delayed: the sum of all that was sent differs from the sum of all vectors by one
residual.  This requires vectors that mean the same each time: means, not sums over different numbers of samples.

Nothing here communicates.  All ranks decode the same numbers and sum them in the same order, elementwise and without
BLAS (see ``optimizers``), so they end with the same bits.  On GPUs this holds for GPUs of one kind: the sums inside
PowerSGD are CuPy's there, over newly allocated arrays, since their order may depend on the alignment.

Arrays are on the device of the vector.  Only TopK reads from a GPU: the number of elements that it has found.
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
    """The collective calls that a compressor needs."""

    def allreduce(self, arrays: Sequence[np.ndarray], op: str) -> None:
        """Combine, in place, with the same bits on all ranks."""

    def allgather(self, array: np.ndarray) -> np.ndarray:
        """The arrays of all ranks, shape (p, *array.shape); a collective call."""


class Fields:
    """Named arrays side by side in a vector of bytes, like a structured dtype, which CuPy does not have.

    Each array begins at a multiple of 8 bytes, since a GPU reads aligned numbers only, and so does the next vector.
    """

    def __init__(self, **arrays: tuple[np.dtype, int]) -> None:
        """Lay out ``arrays``, which holds for each name a dtype and a number of elements."""
        self.nbytes = 0
        self._places: dict[str, tuple[slice, np.dtype]] = {}
        for name, (dtype, count) in arrays.items():
            end = self.nbytes + dtype.itemsize * count
            self._places[name] = slice(self.nbytes, end), dtype
            self.nbytes = -(-end // 8) * 8

    def of(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """The named arrays as views of a vector of bytes."""
        return {name: memory[place].view(dtype) for name, (place, dtype) in self._places.items()}


class Compressor:
    """A compressor of vectors with ``size`` (at least 1) float32 or float64 elements, on the device of ``like``.

    ``state`` holds the arrays that it keeps from one vector to the next and writes in place: the ``residual``, which is
    this rank's own, and arrays that are equal on all ranks.
    """

    def __init__(self, size: int, dtype: np.dtype, like: np.ndarray | None = None) -> None:
        self.residual = np.zeros(size, dtype, like=like)
        self.state = {"residual": self.residual}

    def add_up(self, vector: np.ndarray, exact: np.ndarray, ranks: Ranks) -> None:
        """Replace ``vector`` by the sum of all ranks' codes, and ``exact`` by its exact sum; a collective call.

        Parameters
        ----------
        vector
            Shape (size,).  On each rank, the code that it sends and its new residual add up to ``vector`` and the old
            residual.
        exact
            A few more numbers of the same dtype, which are not compressed.
        ranks
            The collective calls to use.

        If a number is not finite, neither is the sum.
        """
        raise NotImplementedError


class Code(Compressor):
    """A code of fixed length for each vector.  Ranks gather the codes of all ranks, so it need not be linear.

    ``pace`` is the step size of ``Differences`` with this code, as found by simulation.
    """

    pace = 1.0

    fields: Fields
    """The fields of a code, which is ``fields.nbytes`` bytes long and passed to the methods as views."""

    def add_up(self, vector: np.ndarray, exact: np.ndarray, ranks: Ranks) -> None:
        """Gather the codes of all ranks, and sum the vectors that they stand for (see ``Compressor.add_up``)."""
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
        """Return a code of this kind for vectors of another size."""
        return type(self)(size, self.residual.dtype, self.residual)

    def send(self, vector: np.ndarray, code: Views) -> None:
        """Fill ``code`` with the code of ``vector`` plus the residual, and update the residual."""
        self.residual += vector
        self.encode(self.residual, code)
        self.decode(code, self.residual, -1)

    def encode(self, vector: np.ndarray, code: Views) -> None:
        """Fill the fields of ``code`` from a vector."""
        raise NotImplementedError

    def decode(self, code: Views, into: np.ndarray, times: int) -> None:
        """Add the vector that ``code`` stands for, ``times`` 1 or -1."""
        raise NotImplementedError


class Differences:
    """Codes of the difference between a model and what neighbors know of it (CHOCO-SGD: Koloskova et al. 2019).

    For each neighbor two vectors are ``known``: what the neighbor knows of this rank's model, and what this rank knows
    of the neighbor's model.  Both ranks hold the same bits.  A rank sends a code of the difference between its model
    and the first vector.  Then it moves by the difference of the second and the first vector, times the weight of the
    neighbor and ``code.pace``.  If weights are symmetric, this adds to one model what it takes from the other, whatever
    codes leave out.  The pace limits the error of what is left out, which would accumulate otherwise.
    """

    def __init__(self, code: Code, params: np.ndarray, peers: list[int]) -> None:
        self.code, self._at = code, {peer: n for n, peer in enumerate(peers)}
        self.known = np.empty((len(peers), 2, params.size), params.dtype, like=params)
        self.begin(params)

    def begin(self, params: np.ndarray) -> None:
        """Start from a model that all ranks hold."""
        self.known[:] = params

    def encode(self, params: np.ndarray, peer: int) -> np.ndarray:
        """Return the bytes to send to a neighbor."""
        own = self.known[self._at[peer], 0]
        message = np.zeros(self.code.fields.nbytes, np.uint8, like=params)
        code = self.code.fields.of(message)
        self.code.encode(np.subtract(params, own, out=self.code.residual), code)
        self.code.decode(code, own, 1)
        return message

    def mix(self, params: np.ndarray, came: dict[int, np.ndarray], weights: dict[int, float]) -> None:
        """Move the model, in place, towards the neighbors from which codes have arrived."""
        way = self.code.residual
        for peer, message in sorted(came.items()):
            own, other = self.known[self._at[peer]]
            self.code.decode(self.code.fields.of(message), other, 1)
            np.subtract(other, own, out=way)
            way *= self.code.pace * weights[peer]
            params += way


class Half(Code):
    """float16 of the vector, divided by the power of two of its largest magnitude, so that nothing overflows.

    The error of an element is at most 2^-11 of it, or 2^-25 of the largest element; the residual is exact.
    """

    def __init__(self, size: int, dtype: np.dtype, like: np.ndarray | None = None) -> None:
        super().__init__(size, dtype, like)
        self.fields = Fields(scale=(dtype, 1), halves=(np.dtype(np.float16), size))

    def encode(self, vector: np.ndarray, code: Views) -> None:
        """Divide by the power of two, and round to float16."""
        largest = np.maximum(np.max(vector), -np.min(vector))
        _, exponent = np.frexp(largest)  # a number that is not finite stays so in any units
        code["scale"][:] = np.ldexp(np.ones_like(largest), exponent - 1)
        for block in _blocks(vector):
            code["halves"][block] = vector[block] / code["scale"]

    def decode(self, code: Views, into: np.ndarray, times: int) -> None:
        """Add the float16 numbers times the power of two."""
        for block in _blocks(into):
            into[block] += code["halves"][block].astype(into.dtype) * (times * code["scale"])


class Sign(Code):
    """The sign of each element, one bit, and the mean magnitude (EF-signSGD: Karimireddy et al. 2019)."""

    def __init__(self, size: int, dtype: np.dtype, like: np.ndarray | None = None) -> None:
        super().__init__(size, dtype, like)
        self.fields = Fields(scale=(dtype, 1), bits=(BYTE, -(-size // 8)))
        self.pace = 0.6

    def encode(self, vector: np.ndarray, code: Views) -> None:
        """Store the signs, eight in a byte, and the mean magnitude."""
        code["scale"][:] = np.mean(np.abs(vector), dtype=np.float64)
        code["bits"][:] = np.packbits(vector >= 0)

    def decode(self, code: Views, into: np.ndarray, times: int) -> None:
        """Add the mean magnitude with the stored signs."""
        scale = times * code["scale"]
        for block in _blocks(into):
            part = into[block]
            bits = np.unpackbits(code["bits"][block.start // 8 : -(-block.stop // 8)])[: part.size]
            part += np.where(bits, scale, -scale)


class TopK(Code):
    """The ``share`` of the elements with the largest magnitudes, at least one element; among equals, the first.

    These elements are sent exactly; the others are the residual.
    """

    def __init__(self, size: int, dtype: np.dtype, share: float, like: np.ndarray | None = None) -> None:
        self.share, self.k = share, max(math.ceil(share * size), 1)
        self.pace = min(3 * self.k / size, 1)
        super().__init__(size, dtype, like)
        self.fields = Fields(values=(dtype, self.k), places=(np.min_scalar_type(size - 1), self.k))

    def resized(self, size: int) -> "TopK":
        """Return a code with this share for vectors of another size."""
        return TopK(size, self.residual.dtype, self.share, self.residual)

    def encode(self, vector: np.ndarray, code: Views) -> None:
        """Store the largest elements and their places."""
        magnitude = np.abs(vector)
        magnitude[np.isnan(magnitude)] = np.inf  # a nan must be sent
        least = np.partition(magnitude, -self.k)[-self.k]
        places = np.flatnonzero(magnitude >= least)
        if len(places) > self.k:
            found = magnitude[places]
            places = np.concatenate([places[found > least], places[found == least]])[: self.k]
        code["places"][:] = places
        code["values"][:] = vector[places]

    def decode(self, code: Views, into: np.ndarray, times: int) -> None:
        """Add the stored elements at their places."""
        into[code["places"].astype(np.int64)] += times * code["values"]  # places are distinct


class PowerSGD(Compressor):
    """PowerSGD: a matrix M is sent as a product P^T Q of two factors of ``rank`` rows (Vogels et al. 2019).

    Each vector is one step of power iteration, which starts from the previous Q:

        P = orthonormal rows of the sum of all ranks' Q M^T;  Q = the sum of all ranks' P M

    Both are linear in M, so that an allreduce sums them for any number of ranks.  A rank has then sent P^T (P M) of its
    own M; the rest is its residual.  Vectors, and matrices that factors would not make smaller, are sent exactly.
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
        """The factors in a vector, each of shape (rank, rows or columns of the matrix)."""
        return [factor.reshape(self.rank, -1) for factor in np.split(vector, ends)[: len(ends)]]

    def add_up(self, vector: np.ndarray, exact: np.ndarray, ranks: Ranks) -> None:
        """Sum the factors of all ranks by two allreduces (see ``Compressor.add_up``)."""
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
            scaled = q / np.where(none, 1, lengths)  # or factors would grow and vanish with the gradients
            kept[:] = np.where(none, kept, scaled)  # or the iteration would stay at zero


def _add_product(p: np.ndarray, q: np.ndarray, into: np.ndarray) -> None:
    """Add p^T q to a matrix, for p of shape (rank, rows) and q of shape (rank, columns), without BLAS."""
    step = max(at_once(into.size, into) // into.shape[1], 1)
    for start in range(0, into.shape[0], step):
        block = into[start : start + step]
        for column, row in zip(p, q, strict=True):
            block += column[start : start + step, np.newaxis] * row


def _orthonormal(p: np.ndarray) -> np.ndarray:
    """Make the rows orthonormal, by Gram-Schmidt in float64; rows that depend on earlier ones become zero."""
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
    """The norm of each row, shape (rows, 1), or of a single row, shape (1,)."""
    return np.sqrt(np.sum(np.square(rows, dtype=np.float64), axis=-1, keepdims=True))


def _blocks(vector: np.ndarray) -> list[slice]:
    step = at_once(vector.size, vector)
    return [slice(start, min(start + step, vector.size)) for start in range(0, vector.size, step)]


def compressor(
    text: str, size: int, dtype: np.dtype, tensors: Tensors | None, seed: int, like: np.ndarray | None = None
) -> Compressor:
    """Return the compressor that ``text``, a value of ``--compress``, describes.

    ``tensors`` are the tensors of the model, which PowerSGD needs; ``seed`` must be the same on all ranks.  Raises
    ``UserError`` if the text describes no compressor, or none that can be used here.
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
