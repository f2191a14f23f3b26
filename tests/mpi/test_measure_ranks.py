"""The engine of mpicoll bench: what is right is found right, what is wrong is counted, and all ranks agree."""

from dataclasses import replace
from itertools import pairwise, product

import fakecupy
import kernels
import numpy as np
import pytest
from ml_dtypes import bfloat16
from mpi4py import MPI

from mpicoll import Comm
from mpicoll.algorithms import ALGORITHMS
from mpicoll.errors import UserError
from mpicoll.measure import compete as competition
from mpicoll.measure import machine as this_machine
from mpicoll.measure import timing
from mpicoll.measure.compete import PASSES, compete, untuned
from mpicoll.measure.contestants import WithMemory, implementations, implementations_on_gpu
from mpicoll.measure.machine import (
    GpuMemory,
    check_gpu_memory,
    check_memory,
    environment,
    fingerprint,
    gpu_bandwidth,
    gpu_environment,
    memory_bandwidth,
)
from mpicoll.measure.metrics import gpu_memory_share
from mpicoll.measure.task import Task, placements
from mpicoll.measure.testdata import OPS
from mpicoll.measure.timing import SYNC, Result, Settings, measure
from mpicoll.mpi.engine import account
from mpicoll.mpi.gpu.array import cupy
from mpicoll.mpi.gpu.assignment import take
from mpicoll.mpi.launch import library_name
from mpicoll.mpi.state import state_of
from mpicoll.pipeline import PIPELINES, Kind, Pipeline, gpipe
from mpicoll.schedule import ScheduleError
from mpicoll.train import bubble
from mpicoll.tuning.fingerprint import machine

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > 3, reason="three ranks show what more would, and sooner")]
COLLECTIVES = ("allreduce", "reduce", "bcast", "reduce_scatter", "allgather")
QUICK = Settings(max_time=0, min_reps=2, warmup=0, seed=7)
several = pytest.mark.skipif(P < 2, reason="alone, doing nothing is right")


def in_order(found):
    return [(one.name, one.in_place, one.task, len(one.us)) for one in found]


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_all_that_the_table_has_is_right_at_every_count(comm, collective):
    counts = [0, 1, P - 1, P + 1, 2 * P, 40009]
    tasks = [Task(collective, count, np.dtype("f4"), root=P - 1) for count in counts]
    found = measure(comm, implementations(comm, collective, np.dtype("f4"), "header"), tasks, QUICK)
    shared = ["shared", "shared_arrays", "shared_result"][: 3 if collective == "allreduce" else 2] if P > 1 else []
    names = ["auto", "native", *shared, *ALGORITHMS[collective]]
    expected = []
    for task in tasks:
        where = placements(task, P, (False, True))
        expected += [(name, place, task, 2) for place in where for name in names] + [("null", where[0], task, 2)]
    assert in_order(found) == expected
    assert sum(one.wrong for one in found) == 0
    assert all((one.us > 0).all() for one in found)
    everybody = comm.allgather([(one.us.tolist(), one.wrong) for one in found])
    assert everybody == everybody[:1] * P


@pytest.mark.skipif(P != 3, reason="takes long, and one number of ranks shows it")
@pytest.mark.parametrize("collective", ["allreduce", "reduce_scatter"])
def test_every_operation_and_dtype_is_known_exactly(comm, collective):
    for dtype in map(np.dtype, ("i1", "u1", "i4", "f8", "f2", bfloat16)):
        calls = implementations(comm, collective, dtype, "off")
        assert ("native" in calls) is (dtype not in (np.dtype("f2"), np.dtype(bfloat16)))
        some = {
            name: call for name, call in calls.items() if name in ("auto", "native", "recursive_doubling", "halving")
        }
        found = measure(comm, some, [Task(collective, 37, dtype, op) for op in OPS], QUICK)
        assert [one for one in found if one.wrong] == []


@pytest.mark.parametrize("collective", ["bcast", "allgather"])
def test_what_is_only_moved_may_be_anything(comm, collective):
    dtype = np.dtype(bfloat16)
    found = measure(comm, implementations(comm, collective, dtype, "off"), [Task(collective, 37, dtype)], QUICK)
    assert "native" in {one.name for one in found}
    assert [one for one in found if one.wrong] == []


@pytest.mark.parametrize("sync", SYNC)
def test_however_ranks_are_synchronised_and_buffers_lie(comm, sync):
    starts = []

    def watched(task, send, recv):
        starts.extend(array.ctypes.data % 4096 for array in (send, recv) if isinstance(array, np.ndarray))
        return native(task, send, recv)

    native = implementations(comm, "allreduce", np.dtype("f8"), "off")["native"]
    for unaligned in (False, True):
        starts.clear()
        settings = Settings(max_time=0, min_reps=1, warmup=1, sync=sync, off_cache=P < 3, unaligned=unaligned)
        found = measure(comm, {"native": watched}, [Task("allreduce", 5, np.dtype("f8"))], settings)
        assert sum(one.wrong for one in found) == 0
        assert set(starts) == {8 if unaligned else 0}


def test_calls_back_to_back_are_checked_by_one_more(comm):
    calls = []

    def counted(task, send, recv):
        once = native(task, send, recv)
        return lambda: (calls.append(1), once())[1]

    native = implementations(comm, "allreduce", np.dtype("f4"), "off")["native"]
    settings = Settings((True,), calls=7, max_time=0, min_reps=2, warmup=1)
    task = Task("allreduce", 1000, np.dtype("f4"))
    found = measure(comm, {"native": counted}, [task], settings)
    assert sum(one.wrong for one in found) == 0
    assert len(calls) == 3 * (7 + 1)
    assert P == 1 or measure(comm, {"wrong": nothing(comm)}, [task], settings)[0].wrong >= 3 * 900 * P


def nothing(comm):
    return lambda task, send, recv: lambda: None


def without_communication(comm):
    """Passes where all ranks have the same data."""

    def prepare(task, send, recv):
        def call():
            if recv is not None:
                recv[:] = (recv if send is MPI.IN_PLACE else send) * P

        return call

    return prepare


def remembering(comm):
    """Does it once, and then gives the same result again."""

    def prepare(task, send, recv):
        first = []

        def call():
            if not first:
                comm.Allreduce(send, recv)
                first.append(recv.copy())
            recv[:] = first[0]

        return call

    return prepare


def off_by_one_element(comm):
    def prepare(task, send, recv):
        def call():
            comm.Allreduce(send, recv)
            if comm.rank == P - 1:
                recv[-1] += 1

        return call

    return prepare


def spoiling_what_is_sent(comm):
    def prepare(task, send, recv):
        def call():
            comm.Allreduce(send, recv)
            if comm.rank == P - 1 and send is not MPI.IN_PLACE:
                send[0] = -1

        return call

    return prepare


def chunks_of_others(comm):
    """The right sums in the wrong places."""

    def prepare(task, send, recv):
        def call():
            comm.Allreduce(send, recv)
            recv[:] = np.roll(recv, len(recv) // 2)

        return call

    return prepare


def without_the_last_rank(comm):
    def prepare(task, send, recv):
        def call():
            own = (recv if send is MPI.IN_PLACE else send).copy()
            if comm.rank == P - 1:
                own[:] = 0
            comm.Allreduce(own, recv)

        return call

    return prepare


def measured(comm, collective, wrong, **settings):
    calls = {"native": implementations(comm, collective, np.dtype("f4"), "off")["native"], "wrong": wrong(comm)}
    tasks = [Task(collective, 10 * P, np.dtype("f4"), root=P - 1)]
    found = measure(comm, calls, tasks, Settings(max_time=0, min_reps=3, warmup=1, **settings))
    return {(one.name, one.in_place): one.wrong for one in found}


@several
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_an_implementation_that_does_nothing_is_caught(comm, collective):
    counted = measured(comm, collective, nothing)
    for (name, place), wrong in counted.items():
        if name != "wrong":
            assert wrong == 0
        elif place and collective == "allgather":  # a rank has its own part, where it belongs
            assert wrong == 4 * 10 * P * (P - 1)
        else:
            assert 4 * 5 <= wrong <= 4 * 10 * P * P


@several
@pytest.mark.parametrize(
    "wrong", [without_communication, remembering, chunks_of_others, without_the_last_rank], ids=lambda f: f.__name__
)
def test_a_wrong_implementation_is_caught(comm, wrong):
    for (name, _), bad in measured(comm, "allreduce", wrong).items():
        assert (bad > 2 * 5) is (name == "wrong")


@pytest.mark.parametrize("wrong", [off_by_one_element, spoiling_what_is_sent], ids=lambda f: f.__name__)
def test_every_wrong_element_counts_once_warm_up_included(comm, wrong):
    in_place = 4 if wrong is off_by_one_element else 0
    expected = {("wrong", False): 4, ("wrong", True): in_place}
    assert (
        measured(comm, "allreduce", wrong) == {("native", False): 0, ("native", True): 0, ("null", False): 0} | expected
    )


def returning(comm, change):
    """Leaves what it is given alone, and returns the result."""

    def prepare(task, send, recv):
        def call():
            result = np.empty_like(recv)
            comm.Allreduce(recv if send is MPI.IN_PLACE else send, result)
            return change(result)

        return call

    return prepare


@several
@pytest.mark.parametrize(
    ("change", "wrong"),
    [(lambda x: x, 0), (lambda x: x + 1, 10 * P), (lambda x: x[:-1], 10 * P), (lambda x: None, 10 * P)],
    ids=["right", "wrong", "short", "nothing"],
)
def test_a_result_may_be_returned(comm, change, wrong):
    counted = measured(comm, "allreduce", lambda comm: returning(comm, change))
    assert counted["wrong", False] == 4 * P * wrong
    assert (counted["wrong", True] > 0) is (wrong > 0)


def test_buffers_lie_where_the_implementation_wants_them(comm):
    given, seen = [], []

    def empty(count, dtype):
        given.append(np.empty(count, dtype))
        return given[-1]

    def watched(task, send, recv):
        seen.extend(array for array in (send, recv) if isinstance(array, np.ndarray))
        return native(task, send, recv)

    native = implementations(comm, "allreduce", np.dtype("f8"), "off")["native"]
    calls = {"native": native, "one": WithMemory(watched, empty), "other": WithMemory(watched, empty)}
    for unaligned in (False, True):
        given.clear()
        seen.clear()
        settings = Settings(max_time=0, min_reps=2, warmup=0, unaligned=unaligned)
        found = measure(comm, calls, [Task("allreduce", 5, np.dtype("f8"))], settings)
        assert [one.wrong for one in found] == [0] * 7
        places = {array.ctypes.data + 8 * unaligned for array in given}
        assert len(places) == 3  # one in place; two not; both implementations use the same
        assert {array.ctypes.data for array in seen} == places


def test_data_are_new_in_every_repetition_and_results_are_not_there_before(comm):
    seen = []

    def watched(task, send, recv):
        def call():
            assert np.isnan(recv).all()
            seen.append(send.tolist())
            comm.Allreduce(send, recv)

        return call

    tasks = [Task("allreduce", 50, np.dtype("f4"))]
    measure(comm, {"watched": watched}, tasks, Settings((False,), max_time=0, min_reps=6, warmup=0, seed=1))
    assert len(seen) == 6
    assert all(before != after for before, after in pairwise(seen))
    first = comm.allgather(seen[0])
    assert all(first.count(one) == 1 for one in first)


def test_what_is_decided_is_decided_by_rank_0(comm):
    settings = Settings((True,), max_time=comm.rank * 1e5, min_reps=3 + comm.rank, warmup=comm.rank, seed=comm.rank)
    order = []

    def noted(name):
        def prepare(task, send, recv):
            def call():
                order.append((name, task.count))
                comm.Allreduce(send, recv)

            return call

        return prepare

    tasks = [Task("allreduce", count, np.dtype("f4")) for count in (1, 2, 3)]
    found = measure(comm, {name: noted(name) for name in "abcd"}, tasks, settings)
    assert {len(one.us) for one in found} == {3}
    assert comm.allgather(order) == [order] * P
    assert sorted(order) == sorted([*product("abcd", (1, 2, 3))] * 3)
    rounds = [tuple(order[n : n + 4]) for n in range(0, len(order), 4)]
    assert len({tuple(name for name, _ in one) for one in rounds}) > 1  # in an order that changes


def test_places_that_a_collective_does_not_have(comm):
    f4 = np.dtype("f4")
    assert placements(Task("bcast", 4, f4), P, (False, True)) == [True]
    assert placements(Task("reduce_scatter", P + 1, f4), P, (False, True)) == ([False] if P > 1 else [False, True])
    assert placements(Task("reduce_scatter", 2 * P, f4), P, (False, True)) == [False, True]
    with pytest.raises(UserError, match="nothing to measure at 4 elements: bcast has one buffer"):
        measure(comm, {}, [Task("bcast", 4, f4)], Settings((False,)))


def test_too_much_memory_is_refused_by_all(comm):
    check_memory(comm, 1 << 20)
    with pytest.raises(UserError, match=r"the largest size takes 1\.049e.06 GiB of memory for each of"):
        check_memory(comm, 1 << 50)


def test_the_machine(comm):
    found = memory_bandwidth(comm)
    assert comm.allgather(found) == [found] * P
    assert min(found.values()) > 0
    facts = environment(comm)
    assert bool(facts) is (comm.rank == 0)
    if facts:
        assert [device["rank"] for device in facts["devices"]] == [*range(P)]
        assert all(device["cpus"] for device in facts["devices"])


@pytest.mark.skipif(P != 2, reason="takes long, and one number of ranks shows it")
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_all_that_auto_chooses_from_competes_and_who_has_no_chance_drops_out(comm, collective, monkeypatch):
    def known(*args):
        """What was measured, with times that do not depend on how busy this machine is."""
        times = {"native": 10.0, last: 31.0} if args[2][0].count == 7 else {"native": 10.0}
        return [replace(one, us=np.full(len(one.us), times.get(one.name, 29.0))) for one in measure(*args)]

    *others, last = ALGORITHMS[collective]
    others += ["native", *(["shared"] if P > 1 and "reduce" in collective else [])]
    monkeypatch.setattr(competition, "measure", known)
    tasks = [Task(collective, count, np.dtype("f4")) for count in (7, 1000)]
    settings = Settings(max_time=0, min_reps=2, warmup=0, seed=comm.rank)
    found = compete(comm, tasks, settings)
    everywhere = dict.fromkeys(others, 2 * PASSES)
    assert [{name: len(us) for name, us in times.items()} for times in found] == [
        {**everywhere, last: 2 * 2},
        {**everywhere, last: 2 * PASSES},
    ]
    monkeypatch.setattr(competition, "HOPELESS", 2)  # and nobody runs alone
    assert {len(us) for us in compete(comm, tasks, settings)[1].values()} == {2 * 2}


def test_more_passes_are_made_while_there_is_time(comm, monkeypatch):
    def at_once(comm, subjects, tasks, settings):
        return [Result(name, True, tasks[0], np.ones(2), None, 0) for name in subjects]

    monkeypatch.setattr(competition, "measure", at_once)
    (found,) = compete(comm, [Task("bcast", 10, np.dtype("f4"))], replace(QUICK, max_time=0.5))
    (counts,) = {len(us) for us in found.values()}
    assert counts > 2 * PASSES
    assert comm.allgather(counts) == [counts] * P


def test_competitors_are_measured_and_all_ranks_know(comm):
    (found,) = compete(comm, [Task("reduce", 1000, np.dtype("f4"))], QUICK)
    plain = {name: us.tolist() for name, us in found.items()}
    assert comm.allgather(plain) == [plain] * P
    assert min(min(times) for times in plain.values()) > 0


@several
def test_a_wrong_result_ends_the_competition_on_all_ranks(comm, monkeypatch):
    made = competition.implementations
    nothing = {"native": lambda task, send, recv: lambda: None}
    monkeypatch.setattr(competition, "implementations", lambda *args: made(*args) | nothing)
    with pytest.raises(UserError, match=r"^\d+ wrong elements: native allreduce of 10 elements$"):
        compete(comm, [Task("allreduce", 10, np.dtype("f4"))], QUICK)


def test_what_is_done_without_a_profile(comm):
    ours, f4 = Comm(comm), np.dtype("f4")
    for count in (1, 1 << 15, 1 << 19, 1 << 22):
        assert untuned(comm, Task("allreduce", count, f4)) == account(np.zeros(count, "f4"), ours).algorithm
        assert untuned(comm, Task("bcast", count, f4)) == untuned(comm, Task("allgather", count, f4)) == "native"
    assert untuned(comm, Task("reduce", 1 << 22, f4)) == ("shared" if P > 1 else "native")


def test_what_a_profile_of_this_job_is_for(comm, monkeypatch):
    assert fingerprint(comm) == (library_name(), machine(), (P,))
    assert state_of(comm).layout == (P,)  # where a profile is looked for
    for layout in (lambda rank: rank // 2, lambda rank: (rank + 1) % 2, lambda rank: int(rank == 0)):
        nodes = [layout(rank) for rank in range(P)]
        monkeypatch.setattr(this_machine, "node_of", lambda comm, nodes=nodes: comm.Split(nodes[comm.rank], comm.rank))
        assert fingerprint(comm).layout == tuple(map(nodes.count, dict.fromkeys(nodes)))


# ---- on a GPU, which is none: in tests/fakecupy nothing is done before somebody waits for it

ON_GPU = replace(QUICK, device="gpu")


@pytest.fixture
def fake(comm, monkeypatch):
    with fakecupy.installed() as made:
        kernels.add(made, monkeypatch)
        made.gpu = take(comm)
        yield made


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_all_there_is_on_a_gpu_is_right_and_says_how_it_went(comm, fake, collective):
    task = Task(collective, 3 * P, np.dtype("f4"), root=P - 1)
    subjects, refused = implementations_on_gpu(comm, collective, task.dtype, "off")
    ways = dict.fromkeys(("staged", *ALGORITHMS[collective]), "staged") | {"native": ""}
    if P > 1:
        assert [*refused] == ["nccl", "aware"]
        ways |= {"auto": "ipc", "ipc": "ipc"}
    found = [one for one in measure(comm, subjects, [task], replace(ON_GPU, unaligned=True)) if one.name != "null"]
    assert {one.name for one in found} == {*subjects}
    assert sum(one.wrong for one in found) == 0
    assert {one.name: one.way for one in found} == (ways if P > 1 else dict.fromkeys(subjects, ""))


@several
def test_on_a_gpu_what_does_nothing_or_spoils_what_it_reads_is_caught(comm, fake):
    def spoiling(task, send, recv):
        call = native(task, send, recv)
        return lambda: (call(), send is MPI.IN_PLACE or send.fill(-1))

    native = implementations_on_gpu(comm, "allreduce", np.dtype("f4"), "off")[0]["native"]
    subjects = {"native": native, "nothing": nothing(comm), "spoiling": spoiling}
    found = measure(comm, subjects, [Task("allreduce", 10 * P, np.dtype("f4"))], ON_GPU)
    wrong = {(one.name, one.in_place): one.wrong for one in found}
    assert wrong["native", False] == wrong["native", True] == wrong["spoiling", True] == 0
    assert wrong["spoiling", False] == 2 * 10 * P * P
    assert min(wrong["nothing", False], wrong["nothing", True]) >= 2 * 5 * P


def test_on_a_gpu_a_call_lasts_until_the_result_is_there(comm, fake, monkeypatch):
    done, at = [], []
    clock = timing.time.perf_counter_ns
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: (at.append(len(done)), clock())[1])

    def late(task, send, recv):
        return lambda: fake.queue(cupy().cuda.get_current_stream().ptr).put(lambda: done.append(1))

    measure(comm, {"late": late}, [Task("allreduce", 1, np.dtype("f4"))], replace(ON_GPU, in_place=(True,)))
    pairs = [after - before for before, after in zip(at[::2], at[1::2], strict=True)]
    assert sorted(pairs) == [0, 0, 1, 1]  # null's, and those of late


def test_the_gpu(comm, fake, monkeypatch):
    monkeypatch.setattr(this_machine, "COPIED", 1 << 16)
    found = gpu_bandwidth(comm, fake.gpu)
    assert comm.allgather(found) == [found] * P
    assert min(found[:3]) > 0
    assert found.sharing == P
    facts = gpu_environment(comm, fake.gpu)
    assert bool(facts) is (comm.rank == 0)
    if facts:
        assert [(one["rank"], one["ranks"]) for one in facts["gpus"]] == [(rank, (*range(P),)) for rank in range(P)]
        assert (facts["cupy"], facts["cuda_driver"]) == ("14.2.0", "13.0")
    with pytest.raises(UserError, match=r"takes 1\.049e.06 GiB on Fake GPU \(0000:01:00\.0\) for each of"):
        check_gpu_memory(comm, fake.gpu, 1 << 50)


@pytest.mark.skipif(P > 1, reason="arithmetic")
def test_the_share_of_what_a_gpu_and_its_link_could_do():
    there = GpuMemory(copy=4000.0, to_host=50.0, from_host=40.0, sharing=4)
    at = 10**9, 4, 10**6, {"add": 20.0, "copy": 10.0}  # 1 GB on 4 ranks in a second

    def share(collective, through_host):
        return gpu_memory_share(collective, *at, there, through_host)

    moved = {"allreduce": 8, "reduce": 5, "bcast": 4, "reduce_scatter": 5, "allgather": 5}  # GB
    assert {name: share(name, False) for name in moved} == pytest.approx(
        {name: gb / 4000 for name, gb in moved.items()}
    )
    assert share("allreduce", True) == pytest.approx(2 / 20)  # the host adds, while 4 GB come, and go back in 4/40
    assert share("bcast", True) == pytest.approx(2 / 10)
    there = there._replace(to_host=25.0)
    assert share("reduce", True) == pytest.approx(4 / 25)
    there = there._replace(from_host=10.0)
    assert share("allreduce", True) == pytest.approx(4 / 10)


# ---- the bubble of pipelines


def bubbles(comm, *pipelines, micro=(1, 5), sizes=(0, 7)):
    cases = [bubble.Case(name, m, size) for name in pipelines for m in micro for size in sizes]
    return bubble.measure(comm, cases, 0.0, QUICK)


@several
def test_stages_do_their_tasks_in_the_order_of_the_schedule(comm, monkeypatch):
    done = []

    class Watched(bubble.Flow):
        def __init__(self, *args):
            super().__init__(*args)
            done.append([])

        def take(self, kind):
            done[-1].append(("take", kind))
            return super().take(kind)

        def send(self, kind, array):
            done[-1].append(("send", kind))
            super().send(kind, array)

    monkeypatch.setattr(bubble, "Flow", Watched)
    for name, row in PIPELINES.items():
        done.clear()
        (found,) = bubbles(comm, name, micro=[5], sizes=[7])
        assert (found.wrong, found.held) == (0, tuple(row.held(stage, P, 5) for stage in range(P)))
        assert all(len(times) == 2 and (times >= 0).all() for times in (found.seconds, found.late, found.calls))
        first, last = comm.rank == 0, comm.rank == P - 1
        ends = {Kind.FORWARD: (first, last), Kind.BACKWARD: (last, first)}  # who takes nothing, and sends nothing
        for micro in (5, 1):  # and the chain
            wanted = [
                (what, kind)
                for kind, _ in row.generate(comm.rank, P, micro)
                for what, none in zip(("take", "send"), ends[kind], strict=True)
                if not none
            ]
            assert [calls for calls in done if len(calls) == len(wanted)] == [wanted] * 2
    everybody = comm.allgather([found.seconds.tolist(), found.late.tolist(), found.handoff.tolist()])
    assert everybody == everybody[:1] * P


def out_of_order(stage, stages, micro):
    """The second stage takes what comes first for what comes second."""
    tasks = list(gpipe(stage, stages, micro))
    return iter([*tasks[1::-1], *tasks[2:]] if stage == 1 < micro else tasks)


@several
def test_a_schedule_that_is_not_what_it_says_is_found(comm, monkeypatch):
    promised = PIPELINES["1f1b"]
    rows = {
        "greedy": Pipeline("greedy", gpipe, promised.held),
        "backward": Pipeline("backward", lambda *args: reversed([*gpipe(*args)]), promised.held),
        "swapped": Pipeline("swapped", out_of_order, promised.held),
    }
    monkeypatch.setattr(bubble, "PIPELINES", rows)
    (greedy,) = bubbles(comm, "greedy", micro=[5], sizes=[7])
    said = bubble.record(greedy, 0.0)
    assert said["held"] == [5] * P != said["promised"]
    for name in ("backward", "swapped"):
        with pytest.raises(ScheduleError, match=name):
            bubbles(comm, name)
    monkeypatch.setattr(bubble, "verify", lambda schedule: None)
    (swapped,) = bubbles(comm, "swapped", micro=[5], sizes=[7])
    assert swapped.wrong >= 2 * 2
