"""Gossip graphs, their mixing matrices, and how fast mixing on them converges.

A round of mixing replaces the vector of rank i by the sum over j of W[i, j] times the vector of rank j.  If the columns
of the mixing matrix W add up to 1, the sum over all ranks does not change (and push-sum finds the mean).  If the rows
add up to 1 as well ("doubly stochastic"), equal vectors stay equal, and rounds bring the ranks closer to the mean.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from inspect import signature
from math import isqrt
from numbers import Real
from operator import index
from typing import Any, NamedTuple

import numpy as np

TOLERANCE = 1e-9
"""By how much the sum of a row or column may miss 1: not for weights of a few digits, which would shift the mean."""

KEPT = 64
"""The edges of periods up to this are kept."""

SAMPLE = 256
"""The number of rounds that stand for a graph which never repeats."""

MAX_ROUNDS = 1 << 24
"""A graph that has not come to agree by then is said never to; ``MAX_STEPS`` where rounds must be done one by one."""
MAX_STEPS = 10_000


class Edges(NamedTuple):
    """The edges of one round: rank ``target`` adds ``weight`` times the vector of rank ``source``, its own included."""

    target: np.ndarray
    source: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph: the mixing matrices of ``p`` ranks, round by round, which repeat after ``period`` rounds, if ever.

    ``mpicoll.graph`` makes graphs.  Raises ``ValueError`` unless all weights are 0 or more, all columns add up to 1,
    and every rank has a weight above 0 in every round.
    """

    name: str
    p: int
    generate: Callable[[int], Edges]
    period: int | None = 1

    def __post_init__(self) -> None:
        for t in range(self.period or 1):
            edges, where = self.edges(t), f"{self}, round {t}"
            if not (edges.weight >= 0).all():
                raise ValueError(f"{where}: every weight must be 0 or more")
            sums = np.bincount(edges.source, edges.weight, self.p)
            rank = int(np.argmax(np.abs(sums - 1)))
            if not abs(sums[rank] - 1) <= TOLERANCE:
                raise ValueError(
                    f"{where}: what rank {rank} gives away, column {rank}, must add up to 1, but misses it by "
                    f"{sums[rank] - 1:.3g}; divide each column by its sum, in float64"
                )
            idle = np.flatnonzero(np.bincount(edges.target, minlength=self.p) == 0)
            if len(idle):
                raise ValueError(f"{where}: rank {idle[0]} takes nothing, not even of its own, and would end with zero")

    def __str__(self) -> str:
        return f"{self.name} graph of {self.p} ranks"

    @cached_property
    def doubly(self) -> bool:
        """Whether the graph is doubly stochastic: all rows add up to 1, too."""
        rounds = (self.edges(t) for t in range(self.period or 1))
        sums = [np.bincount(edges.target, edges.weight, self.p) for edges in rounds]
        return bool(np.abs(np.array(sums) - 1).max() <= TOLERANCE)

    @cached_property
    def symmetric(self) -> bool:
        """Whether the mixing matrix of every round is symmetric."""
        rounds = (self.edges(t) for t in range(self.period or 1))
        return all(_by_source(edges) == _by_source(Edges(edges.source, edges.target, edges.weight)) for edges in rounds)

    @cached_property
    def connected(self) -> bool:
        """Whether the graph is strongly connected: every rank's vector reaches every other, maybe through others."""
        rounds = [self.edges(t) for t in range(self.period or SAMPLE)]
        target = np.concatenate([edges.target for edges in rounds])
        source = np.concatenate([edges.source for edges in rounds])

        def reaches_all(start: np.ndarray, end: np.ndarray) -> bool:
            """Whether rank 0 reaches all ranks along these edges."""
            reached = np.arange(self.p) == 0
            while not reached[end[reached[start]]].all():
                reached[end[reached[start]]] = True
            return bool(reached.all())

        return reaches_all(source, target) and reaches_all(target, source)

    @cached_property
    def digest(self) -> bytes:
        """A digest of the matrices, equal for equal matrices whatever the name of the graph."""
        from hashlib import sha256  # takes 2 ms to import

        found = sha256(f"{self.p} {self.period}".encode())
        for t in range(self.period or SAMPLE):
            for array in self.edges(t):
                found.update(array.tobytes())
        return found.digest()

    def round(self, step: int) -> int:
        """The number of the round of a step, both counted from 0."""
        return step % self.period if self.period else step

    def edges(self, t: int) -> Edges:
        """The edges of round ``t``, sorted by target and then by source."""
        t = self.round(t)
        if t in self._kept:
            return self._kept[t]
        target, source, weight = self.generate(t)
        order = np.lexsort((source, target))
        order = order[weight[order] != 0]
        edges = Edges(target[order].astype(np.int64), source[order].astype(np.int64), weight[order].astype(np.float64))
        if self.period and self.period <= KEPT:
            self._kept[t] = edges
        return edges

    @cached_property
    def _kept(self) -> dict[int, Edges]:
        return {}

    def neighbors(self, rank: int, t: int) -> tuple[list[tuple[int, float]], list[int]]:
        """The ranks from which ``rank`` receives in round ``t``, with weights, itself included; and its receivers."""
        target, source, weight = self.edges(t)
        mine = target == rank
        return list(zip(source[mine].tolist(), weight[mine].tolist(), strict=True)), target[source == rank].tolist()

    def peers(self, rank: int) -> list[int]:
        """The ranks that exchange messages with ``rank`` in any round; all others, if rounds never repeat."""
        if self.period is None:
            return [other for other in range(self.p) if other != rank]
        target, source = np.concatenate([self.edges(t)[:2] for t in range(self.period)], axis=1)
        linked = np.union1d(source[target == rank], target[source == rank])
        return [int(other) for other in linked if other != rank]

    def matrix(self, t: int) -> np.ndarray:
        """The p x p mixing matrix of round ``t``; ``matrix(t)[i, j]`` is the weight that rank i gives to rank j."""
        target, source, weight = self.edges(t)
        matrix = np.zeros((self.p, self.p))
        matrix[target, source] = weight
        return matrix

    def product(self) -> np.ndarray:
        """The product of the matrices of one period, the first rightmost; that of one round if there is no period."""
        product = np.eye(self.p)
        for t in range(self.period or 1):
            product = self.matrix(t) @ product
        return product

    @cached_property
    def contraction(self) -> float:
        """The factor by which a round reduces the distance to the mean, in the long run, on average over a period.

        One minus this is the spectral gap.  For a graph that never repeats it is the root of the second eigenvalue of
        the average of W^T W over ``SAMPLE`` rounds: the factor for the root of the mean square distance.
        """
        if self.p == 1:
            return 0.0
        if self.period is None:
            squares = [self.matrix(t).T @ self.matrix(t) for t in range(SAMPLE)]
            return float(np.sqrt(np.linalg.eigvalsh(np.mean(squares, axis=0))[-2]))
        second = float(np.sort(np.abs(np.linalg.eigvals(self.product())))[-2])
        return second ** (1 / self.period) if second > 1e-12 else 0.0

    def rounds_to(self, distance: float) -> int | None:
        """The number of rounds after which the distance to the mean is at most ``distance`` times the initial one.

        This holds for any initial vectors.  ``None`` if it never does, because the graph is not connected or does not
        converge.  The distance is the root of the sum over ranks of squared distances to the mean; if only columns add
        up to 1, that of push-sum's estimates.
        """

        def apart(matrix: np.ndarray) -> float:
            with np.errstate(divide="ignore", invalid="ignore"):
                off = matrix / matrix.sum(axis=1, keepdims=True) - 1 / self.p
            return float(np.linalg.norm(off, 2)) if np.isfinite(off).all() else np.inf

        if not distance >= TOLERANCE:
            raise ValueError(f"the distance must be {TOLERANCE:g} or more, got {distance}")
        done, t, last = np.eye(self.p), 0, MAX_STEPS
        if self.period is not None and self.doubly:  # never further apart: by powers of two of periods, then one by one
            powers = [self.product()]
            while apart(powers[-1]) > distance:
                if self.period << len(powers) > MAX_ROUNDS:
                    return None
                powers.append(powers[-1] @ powers[-1])
            for n in reversed(range(len(powers) - 1)):
                further = powers[n] @ done
                if apart(further) > distance:
                    done, t = further, t + (self.period << n)
            last = t + self.period
        while apart(done) > distance:
            if t == last:
                return None
            done, t = self.matrix(t) @ done, t + 1
        return t


def _by_source(edges: Edges) -> list[tuple]:
    return sorted(zip(edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), strict=True))


def graph(what: Any, p: int | None = None, **parameters: int) -> Graph:
    """Make a graph for ``mpicoll.gossip_average`` and ``mpicoll.PushSum``.

    Parameters
    ----------
    what
        A name: ``"butterfly"``, ``"exponential"`` (one peer a round), ``"static_exponential"``, ``"ring"``,
        ``"torus"``, ``"star"``, ``"complete"``, ``"matching"`` (random pairs; ``seed=0``), ``"base"`` (the exact mean
        after a period, for any number of ranks; ``degree=1`` peers a round).  Or a p x p mixing matrix ``W``, where
        ``W[i, j]`` is the weight that rank i gives to the vector of rank j; or several, one for each round of a period.
        Or a networkx graph on nodes 0 to p - 1, where edge u -> v means that u sends to v.  If all its edges have
        weights, loops included, they are ``W[v, u]``.  Without weights, an undirected graph gets Metropolis weights
        (doubly stochastic), and on a directed graph each rank sends equal shares to its neighbors and itself
        (column-stochastic: for push-sum).
    p
        The number of ranks.  It may be left out for a matrix or a networkx graph.
    parameters
        ``seed`` or ``degree``, for the named graphs that have them.

    Returns
    -------
    A ``Graph``.

    Raises
    ------
    TypeError, ValueError
        For an argument that is not a graph, or whose columns do not add up to 1.

    Sources: Ying et al. 2021 (exponential), Takezawa et al. 2023 (base), Zhao and Canny 2013 (butterfly), Boyd et al.
    2006 (matching), Xiao and Boyd 2004 (Metropolis weights).
    """
    if isinstance(what, Graph):
        made = what
    elif isinstance(what, str):
        if what not in _NAMED:
            raise ValueError(f"unknown graph {what!r}: expected {', '.join(_NAMED)}, a matrix or a networkx graph")
        for key in parameters:
            if key not in list(signature(_NAMED[what]).parameters)[1:]:
                raise ValueError(f"a {what} graph has no parameter {key!r}")
        try:
            counted = {key: index(value) for key, value in {"p": 0 if p is None else p, **parameters}.items()}
        except TypeError:
            raise TypeError(f"the number of ranks, {' and '.join(['p', *parameters])}, must be whole") from None
        if counted["p"] < 1:
            raise ValueError(f"a {what} graph needs the number of ranks, 1 or more")
        return _named(what, **counted)
    elif parameters:
        raise ValueError(f"{', '.join(parameters)}: only for graphs that have a name")
    else:
        made = _from_networkx(what) if hasattr(what, "is_directed") else _from_matrices(what)
    if p not in (None, made.p):
        raise ValueError(f"expected a graph of {p} ranks, got one of {made.p}")
    return made


@lru_cache(maxsize=64)
def _named(name: str, p: int, **parameters: int) -> Graph:
    return _NAMED[name](p, **parameters)


def _from_matrices(what: Any) -> Graph:
    try:
        matrices = np.asarray(what)
    except ValueError:
        matrices = np.empty(())
    if matrices.dtype.kind not in "biuf":
        matrices = np.empty(())
    if matrices.ndim == 2:
        matrices = matrices[np.newaxis]
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2] or not matrices.size:
        raise TypeError(
            "expected the name of a graph, a square matrix of real numbers or several, or a networkx graph, got "
            + (f"shape {matrices.shape}" if matrices.ndim else type(what).__name__)
        )
    matrices = matrices.astype(np.float64)  # a copy: the caller's may change

    def edges(t: int) -> Edges:
        target, source = np.nonzero(matrices[t])
        return Edges(target, source, matrices[t, target, source])

    return Graph("user's", matrices.shape[1], edges, len(matrices))


def _from_networkx(what: Any) -> Graph:
    p = len(what)
    if p < 1 or set(what.nodes) != set(range(p)):
        raise ValueError(f"the nodes of the networkx graph must be the ranks: the numbers 0 to {max(p - 1, 0)}")
    if what.is_multigraph():
        raise ValueError("a networkx graph with several edges between two nodes is not supported")
    listed = list(what.edges(data="weight"))
    if not what.is_directed():
        listed += [(v, u, weight) for u, v, weight in listed if u != v]
    weights = [weight for *_, weight in listed]
    source, target = np.array([edge[:2] for edge in listed], np.int64).reshape(-1, 2).T
    if not weights or all(weight is None for weight in weights):
        if not what.is_directed():
            return _metropolis("user's", p, source, target)
        others = source != target
        source, target = (np.append(ends[others], np.arange(p)) for ends in (source, target))
        return _static("user's", p, Edges(target, source, 1 / np.bincount(source)[source]))
    if any(weight is None for weight in weights):
        raise ValueError("the networkx graph has weights on some edges only")
    if not all(isinstance(weight, Real) for weight in weights):
        raise TypeError("the weights of a networkx graph must be real numbers")
    return _static("user's", p, Edges(target, source, np.array(weights, float)))


def _static(name: str, p: int, edges: Edges) -> Graph:
    return Graph(name, p, lambda t: edges)


def _metropolis(name: str, p: int, source: np.ndarray, target: np.ndarray) -> Graph:
    """Metropolis weights of an undirected graph: 1 / (1 + the larger of two degrees), the rest for the rank itself."""
    apart = source != target
    links = np.append(source[apart] * p + target[apart], target[apart] * p + source[apart])
    a, b = np.divmod(np.unique(links), p)
    degree = np.bincount(a, minlength=p)
    weight = 1 / (1 + np.maximum(degree[a], degree[b]))
    own = 1 - np.bincount(a, weight, p)
    ranks = np.arange(p)
    return _static(name, p, Edges(np.append(a, ranks), np.append(b, ranks), np.append(weight, own)))


def _ring(p: int) -> Graph:
    ranks = np.arange(p)
    return _metropolis("ring", p, ranks, (ranks + 1) % p)


def _torus(p: int) -> Graph:
    """The torus graph, as square as p allows; a ring if p is prime."""
    height = max(n for n in range(1, isqrt(p) + 1) if p % n == 0)
    width = p // height
    ranks = np.arange(p)
    row, column = np.divmod(ranks, width)
    right, below = row * width + (column + 1) % width, (row + 1) % height * width + column
    return _metropolis("torus", p, np.append(ranks, ranks), np.append(right, below))


def _star(p: int) -> Graph:
    return _metropolis("star", p, np.zeros(p, int), np.arange(p))


def _complete(p: int) -> Graph:
    return _static("complete", p, _from_shifts(p, range(1, p)))


def _from_shifts(p: int, offsets: Iterable[int]) -> Edges:
    """Rounds in which every rank takes equal shares of itself and of the ranks at these distances before it."""
    shifts = np.array([0, *offsets])
    target = np.repeat(np.arange(p), len(shifts))
    return Edges(target, (target - np.tile(shifts, p)) % p, np.full(len(target), 1 / len(shifts)))


def _exponential(p: int) -> Graph:
    """The one-peer exponential graph: in each round a peer 1, 2, 4, ... ranks away."""
    return Graph("exponential", p, lambda t: _from_shifts(p, [1 << t] if p > 1 else []), max((p - 1).bit_length(), 1))


def _static_exponential(p: int) -> Graph:
    """The static exponential graph: the peers 1, 2, 4, ... ranks away in every round."""
    return _static("static_exponential", p, _from_shifts(p, [1 << n for n in range((p - 1).bit_length())]))


def _butterfly(p: int) -> Graph:
    """The butterfly graph, one stage per round, if p is a power of two; otherwise the exponential graph."""
    if p & (p - 1):
        return replace(_exponential(p), name="butterfly")
    return Graph("butterfly", p, lambda t: _in_pairs(np.arange(p) ^ (1 << t) % p), max(p.bit_length() - 1, 1))


def _matching(p: int, seed: int = 0) -> Graph:
    """The matching graph: random pairs; if the number of ranks is odd, one of them is alone."""
    if seed < 0:
        raise ValueError(f"the seed of a matching graph must be 0 or more, got {seed}")

    def edges(t: int) -> Edges:
        order = np.random.default_rng((seed, t)).permutation(p)
        partner = np.arange(p)
        first, second = order[: p - 1 : 2], order[1::2]
        partner[first], partner[second] = second, first
        return _in_pairs(partner)

    return Graph(f"matching (seed {seed})", p, edges, None)


def _in_pairs(partner: np.ndarray) -> Edges:
    """A round in which each rank takes half of its own vector and half of its peer's; all of its own without a peer."""
    ranks = np.arange(len(partner))
    paired = partner != ranks
    target, source = np.append(ranks, ranks[paired]), np.append(ranks, partner[paired])
    return Edges(target, source, np.append(1 - paired / 2, np.full(paired.sum(), 0.5)))


_Links = list[list[tuple[int, int, float]]]  # for each round, who takes how much of each other's


def _base(p: int, degree: int = 1) -> Graph:
    """The base-(degree + 1) graph of Takezawa et al.: most ranks are averaged in cliques, the rest through these."""
    if degree < 1:
        raise ValueError(f"the degree of a base graph must be 1 or more, got {degree}")
    degree = min(degree, max(p - 1, 1))
    smooth = max(n for n in range(1, p + 1) if p % n == 0 and _is_smooth(n, degree + 1))
    rest = p // smooth
    ranks = range(p)
    by_blocks = _side_by_side(_simple_base(ranks[start : start + rest], degree) for start in range(0, p, rest))
    by_blocks += _side_by_side(_hypercube(ranks[start::rest], degree) for start in range(rest))
    rounds = min(by_blocks, _simple_base(ranks, degree), key=len) or [[]]

    def edges(t: int) -> Edges:
        links = np.array(rounds[t], float).reshape(-1, 3)
        a, b, weight = links[:, 0].astype(int), links[:, 1].astype(int), links[:, 2]
        target, source, shares = np.append(a, b), np.append(b, a), np.append(weight, weight)
        own = 1 - np.bincount(target, shares, p)
        return Edges(np.append(target, ranks), np.append(source, ranks), np.append(shares, own))

    return Graph("base" if degree == 1 else f"base (degree {degree})", p, edges, len(rounds))


def _is_smooth(n: int, largest: int) -> bool:
    """Whether a number has no prime factor above a limit."""
    for factor in range(2, largest + 1):
        while n % factor == 0:
            n //= factor
    return n == 1


@lru_cache(maxsize=256)
def _factors(n: int, largest: int) -> tuple[int, ...]:
    """The fewest factors of a smooth number, none of them above a limit."""
    if n == 1:
        return ()
    return min(
        ((f, *_factors(n // f, largest)) for f in range(largest, 1, -1) if n % f == 0 and _is_smooth(n // f, largest)),
        key=len,
    )


def _side_by_side(parts: Iterable[_Links]) -> _Links:
    """Merge the rounds of disjoint groups of ranks, which happen at the same time."""
    merged: _Links = []
    for rounds in parts:
        merged += [[] for _ in range(len(rounds) - len(merged))]
        for t, links in enumerate(rounds):
            merged[t] += links
    return merged


def _hypercube(ranks: range, degree: int) -> _Links:
    """Rounds that reach the mean in as many rounds as p has factors: cliques along one dimension after another."""
    rounds: _Links = []
    stride = 1
    for factor in _factors(len(ranks), degree + 1):
        cliques = [
            range(start + offset, start + offset + stride * factor, stride)
            for start in range(0, len(ranks), stride * factor)
            for offset in range(stride)
        ]
        rounds.append([(ranks[a], ranks[b], 1 / factor) for clique in cliques for a in clique for b in clique if a < b])
        stride *= factor
    return rounds


def _simple_base(ranks: range, degree: int) -> _Links:
    """The simple base-(degree + 1) graph: groups have the sizes of the digits of p in base degree + 1.

    First each group averages within itself.  Then, group by group, the ranks of all later groups exchange with one rank
    in each block of this group, with weights that leave the later ones with the mean of all; then its blocks average.
    """
    base, p = degree + 1, len(ranks)
    groups: list[tuple[int, range]] = []  # (blocks, ranks), the largest first
    start, unit = 0, 1
    while unit * base <= p:
        unit *= base
    while unit:
        blocks = (p - start) // unit
        if blocks:
            groups.append((blocks, ranks[start : start + blocks * unit]))
            start += blocks * unit
        unit //= base
    rounds = _side_by_side(_hypercube(group, degree) for _, group in groups)
    t, start = len(rounds), 0
    for blocks, group in groups[:-1]:
        later, size = ranks[start + len(group) :], len(group) // blocks
        weight = len(group) / (blocks * (p - start))
        parts = [group[first : first + size] for first in range(0, len(group), size)]
        meeting = [(rank, part[n], weight) for n, rank in enumerate(later) for part in parts]
        averaging = _side_by_side(_hypercube(part, degree) for part in parts)
        rounds = _side_by_side([rounds, [*([[]] * t), meeting, *averaging]])
        start += len(group)
        t += 1
    return rounds


_NAMED: dict[str, Callable[..., Graph]] = {
    "butterfly": _butterfly,
    "exponential": _exponential,
    "static_exponential": _static_exponential,
    "ring": _ring,
    "torus": _torus,
    "star": _star,
    "complete": _complete,
    "matching": _matching,
    "base": _base,
}
