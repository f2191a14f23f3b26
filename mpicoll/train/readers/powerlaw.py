"""Sparse samples of two classes that follow a power law, made up in the likeness of RCV1."""

import re
from typing import Any

import numpy as np

from ...errors import UserError
from .raw import Raw, share

BLOCK = 256  # samples drawn together


def read_powerlaw(source: str, rank: int, ranks: int) -> Raw:
    """This rank's share of ``powerlaw``, or ``powerlaw:SAMPLESxFEATURES:NONZEROS``: sparse samples of two classes.

    They are like RCV1's training set (20,242 news stories, 47,236 words, about 75 of them in each; Lewis et al., 2004):
    Zipf's law, the k-th word in proportion to 1 / (k + 10), in columns of no particular order; stories of different
    length; weights (1 + log occurrences) * log(1 + 1 / share of stories with the word), and rows of norm 1.  Unlike it:
    words come independently of each other, there are no topics, and the label is whether a linear function of the 256
    most frequent words is above its median, turned round for a twentieth of the samples; so no model is right in
    more than 95 %, but for luck, and one that learns from all words is less so.
    Sample n is the same whatever the number of samples and of ranks.
    """
    from scipy.sparse import csr_array, vstack

    fields = re.fullmatch(r"powerlaw(?::(\d+)x(\d+)(?::(\d+))?)?", source)
    if fields is None:
        raise UserError(
            f"{source!r}: expected powerlaw or powerlaw:SAMPLESxFEATURES or powerlaw:SAMPLESxFEATURES:NONZEROS"
        )
    samples, features = int(fields[1] or 20_242), int(fields[2] or 47_236)
    nonzeros = int(fields[3]) if fields[3] else max(1, min(75, features // 4))
    if not (1 <= samples < 2**53 and 4 <= features <= 2**24 and 1 <= nonzeros <= features // 4):
        raise UserError(
            f"{source!r}: expected at least 1 sample, 4 to {2**24} features, and 1 to {max(features // 4, 1)} nonzeros"
        )
    rng = np.random.default_rng([features, nonzeros])
    share_of_words = 1 / np.arange(11.0, features + 11)
    share_of_words /= share_of_words.sum()
    columns = rng.permutation(features)
    rule = np.zeros(features)
    rule[columns[:256]] = rng.normal(size=min(256, features))
    # The number of words that a story needs to have that number of different ones.
    words = np.geomspace(1, 1000 * features, 60)
    different = np.array([_at_least_one(share_of_words, n).sum() for n in words])
    weights = np.empty(features)
    weights[columns] = np.log1p(1 / _at_least_one(share_of_words, float(np.interp(nonzeros, different, words))))
    upto = np.cumsum(share_of_words)

    def block(number: int) -> tuple[Any, np.ndarray, np.ndarray]:
        """Samples, their scores by the rule, and whether each label is turned round."""
        rng = np.random.default_rng([features, nonzeros, number])
        wanted = nonzeros * np.exp(0.5 * rng.normal(size=BLOCK) - 0.125)  # its mean is nonzeros
        lengths = np.maximum(1, np.interp(wanted, different, words)).astype(np.int64)
        drawn = np.minimum(np.searchsorted(upto, rng.random(lengths.sum())), features - 1)
        cells, times = np.unique(np.repeat(np.arange(BLOCK), lengths) * features + columns[drawn], return_counts=True)
        row, column = cells // features, cells % features
        values = (1 + np.log(times)) * weights[column]
        values /= np.sqrt(np.bincount(row, values**2))[row]
        ends = np.cumsum(np.bincount(row, minlength=BLOCK))
        x = csr_array((values, column.astype(np.int32), np.append(0, ends).astype(np.int32)), shape=(BLOCK, features))
        return x, x @ rule, rng.random(BLOCK) < 0.05

    own = share(samples, rank, ranks)
    middle = np.median(block(0)[1])  # so that there are about as many of both classes
    xs, ys = [csr_array((0, features))], [np.empty(0, np.int64)]
    for number in range(own.start // BLOCK, -(-own.stop // BLOCK)):
        first = number * BLOCK
        here = slice(max(own.start - first, 0), min(own.stop - first, BLOCK))
        x, score, turned = block(number)
        xs.append(x[here])
        ys.append(((score > middle) ^ turned)[here].astype(np.int64))
    return Raw(csr_array(vstack(xs, format="csr")), np.concatenate(ys), extent=samples)


def _at_least_one(chances: np.ndarray, draws: float) -> np.ndarray:
    """The probability that each comes up at least once in ``draws`` draws."""
    return -np.expm1(draws * np.log1p(-chances))
