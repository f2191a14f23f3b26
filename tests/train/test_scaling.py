"""Scaling: dense features become alike, sparse ones stay as they are."""

import numpy as np

from mpicoll.train import readers
from mpicoll.train.scaling import Scaling

F8 = np.dtype("f8")


def test_scaling_makes_features_alike_and_leaves_constant_ones_alone():
    x = np.array([[0, 5, 1e6], [4, 5, 3e6], [2, 5, 2e6]])
    np.testing.assert_allclose(Scaling.fit(x).apply(x, F8), [[-1, 0, -1], [1, 0, 1], [0, 0, 0]])
    long = np.array([[0], [2]], "g")
    assert {array.dtype for array in Scaling.fit(long)} == {F8}
    small = np.array([[-128, 0], [127, 1]], "i1")  # must not overflow in the arithmetic of its own dtype
    np.testing.assert_allclose(Scaling.fit(small).apply(small, F8), [[-1, -1], [1, 1]])
    many = np.arange(10_000.0).reshape(-1, 1)
    np.testing.assert_allclose(Scaling.fit(many).apply(many, F8), np.linspace(-1, 1, 10_000).reshape(-1, 1))


def test_scaling_keeps_sparse_samples_sparse():
    raw = readers.read("powerlaw:10x40:3")
    assert not isinstance(raw.x, np.ndarray)
    scaled = Scaling.fit(raw.x).apply(raw.x, np.dtype("f4"))
    assert (scaled.dtype, scaled.nnz) == (np.float32, raw.x.nnz)
    np.testing.assert_array_equal(scaled.toarray(), raw.x.toarray().astype("f4"))
    halved = Scaling(np.zeros(40), np.full(40, 2.0)).apply(raw.x, F8)
    np.testing.assert_array_equal(halved.toarray(), raw.x.toarray() / 2)
    centred = Scaling(np.ones(40), np.ones(40)).apply(raw.x, F8)  # a model of dense data
    np.testing.assert_array_equal(centred, raw.x.toarray() - 1)
