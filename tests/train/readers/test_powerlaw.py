"""Sparse samples that are made up."""

import numpy as np

from datafiles import together
from mpicoll.train import readers


def test_powerlaw_is_what_it_says():
    raw = readers.read("powerlaw:4000x2000:20")
    x, y = raw.x, raw.y
    assert not isinstance(x, np.ndarray)
    assert y is not None
    np.testing.assert_allclose(x.power(2).sum(axis=1), 1)
    assert x.has_canonical_format
    assert 18 < x.nnz / 4000 < 22
    assert 0.45 < y.mean() < 0.55
    often = np.sort(np.bincount(x.indices, minlength=2000))[::-1] / 4000
    np.testing.assert_allclose(often[490] / often[90], 101 / 501, rtol=0.1)  # Zipf's law; only rare words come once
    other = readers.read("powerlaw:300x2000:20")
    assert (x[:300] != other.x).nnz == 0
    np.testing.assert_array_equal(y[:300], other.y)
    for ranks in (2, 3, 5, 301):
        found, classes = together([readers.read("powerlaw:300x2000:20", rank, ranks) for rank in range(ranks)], 2000)
        np.testing.assert_array_equal(found, other.x.toarray())
        np.testing.assert_array_equal(classes, other.y)


def test_powerlaw_can_be_learnt():
    from sklearn.linear_model import SGDClassifier

    raw = readers.read("powerlaw:3000x400:10")
    assert raw.y is not None
    fitted = SGDClassifier(loss="log_loss", random_state=0).fit(raw.x[:2000], raw.y[:2000])
    assert 0.8 < fitted.score(raw.x[2000:], raw.y[2000:]) < 0.96
