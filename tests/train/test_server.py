"""The parameter server's arithmetic, and whom it answers when."""

from typing import Any

import numpy as np
import pytest

from mpicoll.train.optimizers import OPTIMIZERS
from mpicoll.train.server import HEAD, Packet, Server

N = 5


def made(workers: int, staleness: float, optimizer: str = "sgd", momentum: float = 0.0, **given: Any) -> Server:
    params = np.arange(N, dtype=np.float64)
    rule = OPTIMIZERS[optimizer](N, params.dtype, momentum=momentum)
    return Server(params, rule, workers, staleness, **given)


def gradient(value: float = 1.0, **numbers: float) -> Packet:
    packet = Packet(N, np.dtype("f8"))
    packet.body[:] = value
    packet.say(**{"step": 0, "samples": 1, "length": 4, "lr": 0.5, "number": 0, **numbers})
    return packet


def send(server: Server, worker: int, packet: Packet) -> dict[int, Packet]:
    """And the answers to it."""
    return {one: server.answer(one) for one in server.take(worker, packet)}


def test_a_packet_is_one_message_that_says_what_it_was_told():
    packet = Packet(3, np.dtype("f4"))
    packet.say(**{name: n + 0.5 for n, name in enumerate(HEAD)})
    packet.body[:] = [7, 8, 9]
    other = Packet(3, np.dtype("f4"))
    other.raw[:] = packet.raw
    assert [getattr(other, name) for name in HEAD] == [n + 0.5 for n in range(len(HEAD))]
    np.testing.assert_array_equal(other.body, [7, 8, 9])
    with pytest.raises(AttributeError, match="colour"):
        _ = packet.colour


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_synchronous_steps_take_the_whole_batch_in_whatever_order_it_comes(workers):
    ends = []
    for turn in range(3):
        server = made(workers, 0, "adam", 0.9)
        for step in range(4):
            for n in range(workers):
                worker = (n + turn * step) % workers
                packet = gradient(np.sin(worker + 7 * step), step=step, samples=worker + 1)
                answers = send(server, worker, packet)
                assert len(answers) == (workers if n == workers - 1 else 0)
            assert {answer.step for answer in answers.values()} == {step + 1}
        ends.append(server.params.tobytes())
    assert len(set(ends)) == 1
    assert server.optimizer.steps == 4


def test_the_synchronous_mean_is_weighted_by_samples():
    server = made(2, 0)
    send(server, 0, gradient(6, samples=3))
    send(server, 1, gradient(2, samples=1))
    np.testing.assert_allclose(server.params, np.arange(N) - 0.5 * 8 / 4)


def test_nobody_is_answered_who_would_run_too_far_ahead():
    server = made(2, 2)
    assert [list(send(server, 0, gradient())) for _ in range(3)] == [[0], [0], []]
    assert list(send(server, 1, gradient())) == [0, 1]
    assert list(send(server, 0, gradient())) == []
    answers = {0: server.answer(0)} if server.finish(1) == [0] else {}
    assert (answers[0].number, answers[0].clock) == (4, 4)  # who has finished holds up nobody
    unbounded = made(2, np.inf)
    assert all(list(send(unbounded, 0, gradient())) == [0] for _ in range(50))


def test_each_gradient_is_a_share_of_a_step_when_it_arrives():
    server = made(4, 3)
    send(server, 2, gradient(8.0))  # the mean gradient is 4 * 8 / 4, and the learning rate a fourth
    np.testing.assert_allclose(server.params, np.arange(N) - 0.5 / 4 * 8)
    before = server.params.copy()
    send(server, 1, gradient(8.0, samples=0))
    np.testing.assert_array_equal(server.params, before)
    assert server.clocks == [0, 1, 1, 0]


def test_the_staler_the_slower():
    server = made(2, np.inf, slow_down=True)
    answer = send(server, 0, gradient())[0]
    for _ in range(3):
        send(server, 1, gradient())
    before = server.params.copy()
    send(server, 0, gradient(1.0, number=answer.number))  # three others came in between: 1.5 steps of two workers
    np.testing.assert_allclose(before - server.params, 0.5 / 2 * (2 / 4) / (1 + 3 / 2))


def test_delay_compensation():
    server = made(2, np.inf, compensate=0.3)
    first = send(server, 0, gradient())[0]
    seen = first.body.copy()
    for _ in range(3):
        send(server, 1, gradient(2.0))
    second = send(server, 0, gradient(1.0, number=first.number))[0]
    before, g = server.params.copy(), 2 * 3.0 / 4
    send(server, 1, gradient(2.0))
    moved = server.params.copy()
    third = send(server, 0, gradient(3.0, number=first.number + 1))[0]
    wanted = g + 0.3 * g * g * (moved - before)
    np.testing.assert_allclose(moved - third.body, 0.5 / 2 * wanted, rtol=1e-12)
    assert second.number == 2
    assert not np.allclose(seen, before)


def test_late_gradients_are_dropped_and_early_ones_kept():
    server = made(3, 0, backups=1)
    assert list(send(server, 0, gradient(4.0))) == []
    assert list(send(server, 2, gradient(8.0))) == [0, 2]
    np.testing.assert_allclose(server.params, np.arange(N) - 0.5 * 12 / 2)
    after = server.params.copy()
    answer = send(server, 1, gradient(1e6))  # of step 0, which is done
    assert answer[1].step == 1
    np.testing.assert_array_equal(server.params, after)
    assert list(send(server, 0, gradient(1.0, step=2))) == []  # of a step that is to come
    assert list(send(server, 2, gradient(1.0, step=1))) == []
    assert list(send(server, 1, gradient(1.0, step=1))) == [1, 2]
    assert list(send(server, 1, gradient(1.0, step=2))) == [0, 1]
    assert server.optimizer.steps == 3


@pytest.mark.parametrize("staleness", [0, 1, np.inf])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_worker_is_plain(staleness, optimizer):
    """Whatever is done about staleness: there is none."""
    careful = {"compensate": 0.5, "slow_down": True} if staleness else {}
    server = made(1, staleness, optimizer, 0.9, **careful)
    params, rule = np.arange(N, dtype=np.float64), OPTIMIZERS[optimizer](N, np.dtype("f8"), momentum=0.9)
    for step in range(6):
        packet = gradient(np.cos(step), step=step, samples=4, number=step)
        rule.step(params, packet.body / 4, 0.5)
        assert list(send(server, 0, packet)) == [0]
    np.testing.assert_array_equal(server.params, params)
