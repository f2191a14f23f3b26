"""Compressors by themselves: what is sent and what is kept add up to what there was."""

from collections.abc import Callable, Sequence
from threading import Barrier, Thread

import fakecupy
import numpy as np
import pytest

from mpicoll import UserError
from mpicoll.train import optimizers
from mpicoll.train.compress import Compressor, PowerSGD, compressor
from mpicoll.train.models import MODELS

MODEL = MODELS["mlp"](20, 5, (12,))
N = MODEL.size
KINDS = ["16bit", "sign", "topk:0.1", "powersgd:2"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", ["f4", "f8"])


class Together:
    """What ranks would do, for threads of one process; notes the bytes that rank 0 gives."""

    def __init__(self, p: int = 1) -> None:
        self.p, self.given, self.barrier = p, [np.empty(0)] * p, Barrier(p)
        self.nbytes: list[int] = []

    def rank(self, rank: int) -> "Rank":
        return Rank(self, rank)

    def exchange(self, rank: int, array: np.ndarray) -> np.ndarray:
        self.given[rank] = array.copy()
        if rank == 0:
            self.nbytes.append(array.nbytes)
        self.barrier.wait(10)
        found = np.stack(self.given)
        self.barrier.wait(10)
        return found


class Rank:
    def __init__(self, together: Together, rank: int) -> None:
        self._together, self._rank = together, rank

    def allreduce(self, arrays: Sequence[np.ndarray], op: str) -> None:
        assert op == "sum"
        for array in arrays:
            array[:] = np.sum(self._together.exchange(self._rank, array), axis=0)

    def allgather(self, array: np.ndarray) -> np.ndarray:
        return self._together.exchange(self._rank, array)


def made(kind: str, dtype: str = "f4", size: int = N, like: np.ndarray | None = None) -> Compressor:
    return compressor(kind, size, np.dtype(dtype), MODEL.tensors if size == N else None, 3, like)


def sent(one: Compressor, vector: np.ndarray, exact: np.ndarray | None = None) -> tuple[np.ndarray, list[int]]:
    """By a rank that is alone, decoded; and the bytes of its messages."""
    together, decoded = Together(), vector.copy()
    one.add_up(decoded, np.zeros(0, vector.dtype) if exact is None else exact, together.rank(0))
    return decoded, together.nbytes


def noise(dtype: str, step: int = 0, rank: int = 0, size: int = N) -> np.ndarray:
    return np.random.default_rng([step, rank]).normal(size=size).astype(dtype)


@every_kind
@every_dtype
def test_what_is_sent_and_what_is_kept_are_what_there_was(kind, dtype):
    one = made(kind, dtype)
    for step in range(5):
        vector, before = noise(dtype, step), one.residual.copy()
        decoded, _ = sent(one, vector)
        if kind in ("16bit", "topk:0.1"):
            np.testing.assert_array_equal(decoded + one.residual, before + vector)
        else:
            few = 30 * np.finfo(dtype).eps
            np.testing.assert_allclose(decoded + one.residual, before + vector, rtol=0, atol=few)
        assert one.residual.any()
        assert decoded.any()


@every_kind
def test_what_is_exact_travels_as_it_is(kind):
    exact = np.array([1 / 3, 1e7 + 1])
    sent(made(kind, "f8"), noise("f8"), exact)
    assert exact.tolist() == [1 / 3, 1e7 + 1]


@every_dtype
@pytest.mark.parametrize(
    ("kind", "length"),
    [
        ("16bit", lambda item: [item, 2 * N]),
        ("sign", lambda item: [item, -(-N // 8)]),
        ("topk:0.1", lambda item: [32 * item, 32 * 2]),  # of 317 elements, whose places take two bytes
        ("topk:1e-9", lambda item: [item, 2]),
        ("topk:1", lambda item: [N * item, N * 2]),
    ],
)
def test_messages_are_as_long_as_the_code(kind, dtype, length):
    assert N == 317
    whole = sum(-(-field // 8) * 8 for field in length(np.dtype(dtype).itemsize))
    assert sent(made(kind, dtype), noise(dtype))[1] == [whole]


def test_powersgd_sends_factors_and_what_is_no_matrix():
    """The weights are 20 x 12 and 12 x 5, the biases 12 and 5."""
    assert sent(made("powersgd:2"), noise("f4"))[1] == [4 * (2 * (20 + 12) + 17), 4 * (2 * (12 + 5))]
    assert sent(made("powersgd:4"), noise("f4"))[1] == [
        4 * (4 * 20 + 17 + 60),
        4 * (4 * 12),
    ]  # 4 (12 + 5) is more than 60


@every_dtype
def test_top_k_keeps_the_largest_and_of_equals_the_first(dtype):
    vector = np.array([1, -5, 3, -3, 0, 3, 2, -1, 3, 0], dtype)
    decoded, _ = sent(made("topk:0.4", dtype, 10), vector)
    assert decoded.tolist() == [0, -5, 3, -3, 0, 3, 0, 0, 0, 0]
    decoded, _ = sent(made("topk:0.3", dtype, 10), np.zeros(10, dtype))
    assert decoded.tolist() == 10 * [0]
    vector = noise(dtype)
    decoded, _ = sent(made("topk:0.1", dtype), vector)
    kept = decoded != 0
    assert kept.sum() == 32
    assert abs(vector[kept]).min() >= abs(vector[~kept]).max()
    np.testing.assert_array_equal(decoded[kept], vector[kept])


@every_dtype
@pytest.mark.parametrize("size", [1, 7, 8, 9, 2**16 + 3])  # one past a byte, and past a block
def test_sign_is_a_bit_and_their_mean_magnitude(dtype, size):
    vector = noise(dtype, size=size)
    decoded, _ = sent(made("sign", dtype, size), vector)
    np.testing.assert_array_equal(np.sign(decoded), np.sign(vector))
    np.testing.assert_allclose(abs(decoded), np.mean(abs(vector), dtype="f8"), rtol=1e-6)


@every_dtype
@pytest.mark.parametrize("power", [-140, -100, 0, 100, 126])  # beyond what float16 could hold
@pytest.mark.parametrize("size", [N, 2**16 + 3])
def test_sixteen_bits_are_off_by_little(dtype, power, size):
    both = np.ldexp(noise(dtype, size=size) / 8, power).astype(dtype)
    for small in (False, both > 0, both < 0):
        vector = np.where(small, both * 2.0**-20, both)
        decoded, _ = sent(made("16bit", dtype, size), vector)
        bound = np.maximum(abs(vector) * 2.0**-11, abs(vector).max() * 2.0**-25)
        assert (abs(decoded.astype("f8") - vector) <= bound).all()
        assert power < -120 or (decoded != vector).any()


@every_dtype
def test_powersgd_is_exact_for_matrices_of_its_rank(dtype):
    vector = np.zeros(N, dtype)
    for view in MODEL.tensors(vector).values():
        view[:] = noise(dtype, size=view.shape[-1])
        if view.ndim == 2:
            view *= noise(dtype, 1, size=len(view))[:, np.newaxis]
            view += noise(dtype, 2, size=len(view))[:, np.newaxis]
    one = made("powersgd:2", dtype)
    decoded, _ = sent(one, vector)
    np.testing.assert_allclose(decoded, vector, rtol=0, atol=200 * np.finfo(dtype).eps)
    # Rank one is less: what is left is a matrix that its factors are orthogonal to, and in time it is the largest part.
    lower = made("powersgd:1", dtype)
    for _ in range(40):
        lower.residual[:] = 0
        decoded, _ = sent(lower, vector)
    for view, whole in zip(MODEL.tensors(decoded).values(), MODEL.tensors(vector).values(), strict=True):
        if view.ndim == 2:
            values = np.linalg.svd(whole, compute_uv=False)
            assert np.linalg.norm(whole - view) == pytest.approx(values[1], rel=1e-3)


def test_powersgd_finds_again_what_was_zero():
    one = made("powersgd:2", "f8")
    assert not sent(one, np.zeros(N))[0].any()
    vector = np.ones(N)  # of rank one: the second row of P has nothing
    np.testing.assert_allclose(sent(one, vector)[0], vector, rtol=1e-12)
    assert isinstance(one, PowerSGD)
    for q in one._factors(one.state["q"], one._qs):
        assert np.linalg.norm(q, axis=1).min() > 0.5
    before = one.residual.copy()
    decoded, _ = sent(one, noise("f8"))
    np.testing.assert_allclose(decoded + one.residual, noise("f8") + before, atol=1e-12)


@every_kind
def test_in_the_long_run_nothing_is_lost(kind):
    """What was sent in all stays within a bound of what there was in all; without the residual it would not."""
    one, mean, steps = made(kind, "f4"), noise("f4"), 1600
    wanted, total, apart = np.zeros(N), np.zeros(N), []
    for step in range(1, steps + 1):
        vector = mean + noise("f4", step) / 4
        wanted += vector
        total += sent(one, vector)[0]
        apart.append(float(np.linalg.norm(total - wanted)))
    assert max(apart[steps // 2 :]) < 1.2 * max(apart[: steps // 2])
    forgetful = steps * np.linalg.norm(sent(made(kind, "f4"), mean)[0] - mean)
    assert 0 < apart[-1] < forgetful / 20


def on_all(p: int, action: Callable[[int], None]) -> None:
    threads = [Thread(target=action, args=(rank,)) for rank in range(p)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@every_kind
@pytest.mark.parametrize("p", [2, 3, 5])
def test_ranks_end_with_the_same_sum_of_what_they_send(kind, p):
    together = Together(p)
    ranks = [made(kind, "f8") for _ in range(p)]
    before = np.zeros(N)
    for step in range(3):
        sums = [noise("f8", step, rank) for rank in range(p)]
        there = before + np.sum(sums, axis=0)
        exact = [np.array([rank, 1.0]) for rank in range(p)]
        on_all(p, lambda rank: ranks[rank].add_up(sums[rank], exact[rank], together.rank(rank)))  # noqa: B023
        assert len({vector.tobytes() for vector in sums}) == 1
        assert {tuple(pair) for pair in exact} == {(p * (p - 1) / 2, p)}
        before = np.sum([one.residual for one in ranks], axis=0)
        np.testing.assert_allclose(sums[0] + before, there, rtol=0, atol=1e-12)
    assert len({one.state["q"].tobytes() for one in ranks if "q" in one.state}) <= 1


@every_kind
@every_dtype
@pytest.mark.parametrize("mode", fakecupy.MODES)
def test_in_the_memory_of_a_gpu_it_does_the_same(kind, dtype, mode, monkeypatch):
    """Without reading anything back, but for the number of elements that ``topk`` finds; and a GPU has no caches that
    blocks would have to fit in."""
    one, launches, few = made(kind, dtype), [], 30 * np.finfo(dtype).eps
    with fakecupy.installed(mode=mode) as fake:
        import cupy

        other = made(kind, dtype, like=cupy.empty(1))
        for step in range(4):
            exact, vector = np.array([1 / 3, step], dtype), noise(dtype, step)
            if step == 2:
                monkeypatch.setattr(optimizers, "BLOCK", 64)
            if step == 3:
                vector[7:] = 0  # of equals the first
                other.residual[:] = one.residual[:] = 0
            exact_there, vector_there, before = cupy.asarray(exact), cupy.asarray(vector), fake.queue(0).put_in
            decoded, nbytes = sent(one, vector, exact)
            there, nbytes_there = sent(other, vector_there, exact_there)
            assert nbytes_there == nbytes
            launches.append(fake.queue(0).put_in - before)
            assert fake.log == ["get"] * (0 if kind != "topk:0.1" else 3 if step == 3 else 1)
            np.testing.assert_allclose(there.get(), decoded, rtol=0, atol=few)
            np.testing.assert_array_equal(exact_there.get(), exact)
            for name, array in one.state.items():
                np.testing.assert_allclose(other.state[name].get(), array, rtol=0, atol=few)
            fake.log.clear()
    assert launches[1] == launches[2]


@every_kind
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@np.errstate(all="ignore")
def test_what_is_not_finite_does_not_stay_behind(kind, value):
    for place in (0, N - 1):
        vector = noise("f4")
        vector[place] = value
        assert not np.isfinite(sent(made(kind), vector)[0]).all()


@pytest.mark.parametrize(("value", "dtype"), [(3e38, "f4"), (1e200, "f8")])
@np.errstate(all="ignore")
def test_factors_that_overflow_do_not_stay_behind(value, dtype):
    """Or only the squares of their elements."""
    assert not np.isfinite(sent(made("powersgd:2", dtype), np.full(N, value, dtype))[0]).all()


@pytest.mark.parametrize(
    "text",
    "|gzip|topk|topk:|topk:0|topk:-1|topk:2|topk:nan|topk:x|sign:2|16bit:|powersgd|powersgd:0|powersgd:-1|powersgd:1.5"
    f"|powersgd:{5000 * '9'}".split("|"),
)
def test_what_will_not_do(text):
    with pytest.raises(UserError, match=r"--compress must be 16bit, sign, topk:SHARE .*, got '") as caught:
        made(text)
    assert "\n" not in str(caught.value)
    assert text[:40] in str(caught.value)


def test_powersgd_needs_matrices_that_get_smaller():
    with pytest.raises(UserError, match="--compress powersgd:9 makes no matrix of this model smaller"):
        made("powersgd:9")  # 9 (20 + 12) is more than 240
    with pytest.raises(UserError, match="--compress powersgd:1 makes no matrix of this model smaller"):
        compressor("powersgd:1", 7, np.dtype("f4"), MODELS["logistic"](6, 2, ()).tensors, 0)
    with pytest.raises(UserError, match="--compress powersgd:1 needs the matrices of a model"):
        made("powersgd:1", size=7)
