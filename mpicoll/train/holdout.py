"""Random choice of the samples to hold out, independent of how samples are spread over ranks."""

from fractions import Fraction

import numpy as np
from mpi4py import MPI


def held_out(y: np.ndarray, classes: int, share: float, seed: list[int], comm: MPI.Intracomm) -> np.ndarray:
    """Return which of this rank's samples are held out, given their classes ``y``; a collective call.

    The samples of all ranks are ordered by class, and within a class by their numbers.  The sequence is cut into pieces
    of 1 / ``share`` samples, and one sample is drawn from each complete piece.  If all samples of a class were drawn,
    its first one is not held out.
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
    """The 63-bit numbers at these places of the sequence splitmix64 (Steele et al., 2014).

    Any rank can compute each of them without those before it.
    """
    word = np.uint64
    z = np.random.SeedSequence(seed).generate_state(1, word) + (places.astype(word) + word(1)) * word(
        0x9E3779B97F4A7C15
    )
    z = (z ^ (z >> word(30))) * word(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> word(27))) * word(0x94D049BB133111EB)
    return ((z ^ (z >> word(31))) >> word(1)).astype(np.int64)
