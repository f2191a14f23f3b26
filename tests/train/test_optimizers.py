"""Optimizers, learning rates and clipping: textbook values, and the same bits wherever vectors lie."""

import math
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mpicoll import UserError
from mpicoll.train import optimizers
from mpicoll.train.optimizers import OPTIMIZERS, SCHEDULES, Optimizer, clip, learning_rate

every_optimizer = pytest.mark.parametrize("name", list(OPTIMIZERS))
BETA2, EPSILON = 0.97, 1e-3
STATE = {  # with momentum
    "sgd": {"velocity"},
    "nesterov": {"velocity"},
    "adagrad": {"sum_square"},
    "rmsprop": {"mean_square", "velocity"},
    "adam": {"first_moment", "second_moment"},
    "adamw": {"first_moment", "second_moment"},
}


def make(name: str, size: int, dtype: str = "f8", **options: float) -> Optimizer:
    return OPTIMIZERS[name](size, np.dtype(dtype), **{"beta2": BETA2, "epsilon": EPSILON, **options})


def textbook(name: str, x: float, grads: list[float], lrs: list[float], momentum: float, decay: float) -> list[float]:
    """Where one parameter goes, by the recurrences as they are published, unrolled: no state is kept between steps."""
    path, seen = [], []
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), 1):
        seen.append(g if name == "adamw" else g + decay * x)
        velocity = sum(momentum ** (t - 1 - n) * past for n, past in enumerate(seen))
        squares = sum((1 - BETA2) * BETA2 ** (t - 1 - n) * past**2 for n, past in enumerate(seen))
        if name == "sgd":
            x -= lr * velocity
        elif name == "nesterov":
            x -= lr * (seen[-1] + momentum * velocity)
        elif name == "adagrad":
            x -= lr * seen[-1] / (math.sqrt(sum(past**2 for past in seen)) + EPSILON)
        elif name == "rmsprop":
            roots = [
                math.sqrt(sum((1 - BETA2) * BETA2 ** (m - n) * seen[n] ** 2 for n in range(m + 1))) for m in range(t)
            ]
            x -= lr * sum(momentum ** (t - 1 - n) * seen[n] / (roots[n] + EPSILON) for n in range(t))
        else:
            x -= lr * decay * x if name == "adamw" else 0
            mean = (1 - momentum) * velocity / (1 - momentum**t)
            x -= lr * mean / (math.sqrt(squares / (1 - BETA2**t)) + EPSILON)
        path.append(x)
    return path


def inputs(size: int, steps: int = 6) -> tuple[np.ndarray, np.ndarray, list[float]]:
    rng = np.random.default_rng(0)
    return rng.normal(size=size), rng.normal(size=(steps, size)), [0.1, 0.1, 0.05, 0.2, 0.01, 0.1][:steps]


@every_optimizer
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_are_the_textbook_ones(name, momentum, decay, monkeypatch):
    """Blocks of 4, so that 10 parameters are two and a half of them."""
    monkeypatch.setattr(optimizers, "BLOCK", 4)
    start, grads, lrs = inputs(10)
    optimizer, params = make(name, 10, momentum=momentum, weight_decay=decay), start.copy()
    path = []
    for grad, lr in zip(grads, lrs, strict=True):
        optimizer.step(params, grad.copy(), lr)
        path.append(params.copy())
    expected = np.transpose([textbook(name, start[n], list(grads[:, n]), lrs, momentum, decay) for n in range(10)])
    np.testing.assert_allclose(path, expected, rtol=1e-12, atol=1e-13)
    assert optimizer.steps == 6
    for changed in ({"momentum": 0.7, "decay": decay}, {"momentum": momentum, "decay": 0.2}):
        if name == "adagrad" and changed["decay"] == decay:
            continue  # has no momentum
        other = [textbook(name, start[n], list(grads[:, n]), lrs, **changed)[-1] for n in range(10)]
        assert not np.allclose(path[-1], other, rtol=1e-4)  # the comparison tells settings apart


@every_optimizer
def test_float32_follows_float64_and_stays_float32(name):
    start, grads, lrs = inputs(50)
    params, single = start.copy(), start.astype("f4")
    optimizer, single_optimizer = make(name, 50, weight_decay=0.1), make(name, 50, "f4", weight_decay=0.1)
    for grad, lr in zip(grads, lrs, strict=True):
        optimizer.step(params, grad.copy(), lr)
        single_optimizer.step(single, grad.astype("f4"), lr)
    assert {single.dtype, *(vector.dtype for vector in single_optimizer.state.values())} == {np.dtype("f4")}
    np.testing.assert_allclose(single, params, rtol=1e-4, atol=1e-5)
    again, again_optimizer = start.astype("f4"), make(name, 50, "f4", weight_decay=0.1)
    for grad, lr in zip(grads, lrs, strict=True):
        again_optimizer.step(again, grad.astype("f4"), np.float64(lr))  # a NumPy scalar changes nothing
    np.testing.assert_array_equal(again, single)


@every_optimizer
def test_state_is_written_in_place_and_a_step_allocates_no_vector(name):
    params, grads, lrs = inputs(100_000)
    optimizer = make(name, len(params), momentum=0.5, weight_decay=0.1)
    assert set(optimizer.state) == STATE[name]
    before = dict(optimizer.state)
    tracemalloc.start()
    for grad, lr in zip(grads, lrs, strict=True):
        optimizer.step(params, grad, lr)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000  # bytes; a block has half a million
    for key, vector in before.items():
        assert optimizer.state[key] is vector
        assert vector.shape == params.shape
        assert vector.any()


def test_without_momentum_there_is_no_velocity():
    assert [set(make(name, 3, momentum=0.0).state) for name in ("sgd", "nesterov")] == [set(), set()]
    assert set(make("rmsprop", 3, momentum=0.0).state) == {"mean_square"}


@every_optimizer
def test_a_new_optimizer_with_the_old_state_goes_on_to_the_same_bits(name):
    params, grads, _ = inputs(20)
    optimizer = make(name, 20, weight_decay=0.01)
    for grad in grads[:3]:
        optimizer.step(params, grad.copy(), 0.1)
    resumed, resumed_params = make(name, 20, weight_decay=0.01), params.copy()
    for key, vector in optimizer.state.items():
        resumed.state[key][:] = vector
    resumed.steps = optimizer.steps
    for grad in grads[3:]:
        optimizer.step(params, grad.copy(), 0.1)
        resumed.step(resumed_params, grad.copy(), 0.1)
    np.testing.assert_array_equal(resumed_params, params)


def test_bias_correction_needs_the_steps():
    for name in ("adam", "adamw"):
        (params, grads, _), late = inputs(20), make(name, 20)
        early, early_params = make(name, 20), params.copy()
        late.steps = 3
        late.step(params, grads[0].copy(), 0.1)
        early.step(early_params, grads[0].copy(), 0.1)
        assert not np.allclose(params, early_params)


def placed(values: np.ndarray) -> Iterator[np.ndarray]:
    """Copies at several alignments, down to such as no element should have."""
    for offset in (0, 4, 8, 12, 16, 20, 32, 56, 1, 7):
        raw = np.zeros(values.nbytes + 64, np.uint8)
        view = raw[offset : offset + values.nbytes].view(values.dtype)
        view[:] = values
        yield view


def test_the_placements_tell_a_sum_that_follows_the_address():
    """What a library does that adds up to a boundary first, then in vector registers."""

    def peeled(view: np.ndarray) -> float:
        head = -view.ctypes.data % 64 // view.itemsize
        return float(np.sum(view[:head]) + np.sum(view[head:]))

    for dtype in ("f4", "f8"):
        assert len({peeled(view) for view in placed(np.random.default_rng(3).normal(size=1001).astype(dtype))}) > 1


@every_optimizer
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_same_bits_wherever_the_vectors_lie(name, dtype, monkeypatch):
    monkeypatch.setattr(optimizers, "BLOCK", 1000)
    rng = np.random.default_rng(2)
    start, grads = rng.normal(size=3331).astype(dtype), rng.normal(size=(3, 3331)).astype(dtype)
    results = set()
    for shift, params in enumerate(placed(start)):
        optimizer = make(name, len(start), dtype, weight_decay=0.01)
        for key, vector in optimizer.state.items():
            optimizer.state[key] = list(placed(vector))[shift]
        for grad in grads:
            optimizer.step(params, list(placed(grad))[-shift], 0.1)
        results.add(params.tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_clipping_gives_the_same_bits_wherever_the_gradient_lies(dtype):
    grad = np.random.default_rng(3).normal(size=100_003).astype(dtype)
    results = {(clip(view, 1.5), view.tobytes()) for view in placed(grad)}
    assert len(results) == 1


def test_settings_that_no_rule_can_use_are_refused():
    for options, message in [
        ({"momentum": 1.0}, "momentum is 1.0; expected at least 0 and less than 1"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"beta2": math.nan}, "beta2 is nan; expected at least 0 and less than 1"),
        ({"epsilon": 0.0}, "epsilon is 0.0; expected a number above 0"),
        ({"epsilon": math.inf}, "epsilon is inf"),
        ({"weight_decay": -1.0}, "weight decay is -1.0; expected a number of at least 0"),
        ({"weight_decay": math.nan}, "weight decay is nan"),
    ]:
        with pytest.raises(UserError, match=message):
            make("sgd", 3, **options)


RATES: dict[str, Callable[[int], float]] = {  # after n of 8 steps
    "constant": lambda n: 1,
    "linear": lambda n: (8 - n) / 8,
    "cosine": lambda n: math.cos(math.pi * n / 16) ** 2,
    "step": lambda n: [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01][n],
}


def test_every_schedule_is_tested():
    assert set(RATES) == set(SCHEDULES)


@pytest.mark.parametrize("schedule", list(RATES))
def test_learning_rates(schedule):
    expected = [0.5 * RATES[schedule](n) for n in range(9)]
    plain = [learning_rate(schedule, 0.5, step, 8, 0) for step in range(9)]
    assert plain == pytest.approx(expected, abs=1e-15)
    assert plain[0] == 0.5
    warmed = [learning_rate(schedule, 0.5, step, 12, 4) for step in range(13)]
    assert warmed[:4] == [0.125, 0.25, 0.375, 0.5]
    assert warmed[4:] == plain  # the schedule proper, from its beginning
    assert learning_rate(schedule, 0.5, 100, 12, 4) == plain[-1]  # longer than was said
    assert all(type(rate) is float for rate in warmed)


@pytest.mark.parametrize("schedule", list(RATES))
def test_warm_up_of_one_step_of_all_steps_and_of_more(schedule):
    assert [learning_rate(schedule, 0.5, step, 9, 1) for step in range(10)] == [
        0.5,
        *(learning_rate(schedule, 0.5, step, 8, 0) for step in range(9)),
    ]
    assert [learning_rate(schedule, 1.0, step, 4, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert [learning_rate(schedule, 1.0, step, 2, 4) for step in range(2)] == [0.25, 0.5]
    assert learning_rate(schedule, 1.0, 0, 0, 0) == 1


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="schedule 'cos' is unknown; expected one of constant, linear, cosine, step"):
        learning_rate("cos", 0.1, 0, 10, 0)


def test_clipping_scales_what_is_too_long_and_nothing_else():
    grad = np.array([3.0, 4, 0])
    assert clip(grad, 5) == 5
    np.testing.assert_array_equal(grad, [3, 4, 0])
    assert clip(grad, 2.5) == 5
    np.testing.assert_array_equal(grad, [1.5, 2, 0])
    assert clip(np.zeros(3), 1) == 0
    assert clip(np.empty(0), 1) == 0
    long = np.full(200_000, 0.1, "f4")  # several blocks
    assert clip(long, 1) == pytest.approx(math.sqrt(200_000 * float(np.float32(0.1)) ** 2), rel=1e-12)
    assert clip(long, 9) == pytest.approx(1, rel=1e-6)


def test_clipping_float32_sums_in_float64():
    grad = np.array([3e30, 4e30], "f4")  # squares overflow float32
    assert clip(grad, 5) == pytest.approx(5e30)
    np.testing.assert_allclose(grad, [3, 4], rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_clipping_hides_nothing_that_is_not_finite(bad):
    grad = np.array([1.0, bad, 2.0])
    assert not math.isfinite(clip(grad, 0.5))
    np.testing.assert_array_equal(grad, [1, bad, 2])
