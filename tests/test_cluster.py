"""The emulated cluster: its hosts are such, and collectives across them are right and go the way they should."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import REPOSITORY, run
from mpicoll.algorithms import find

sys.path.insert(0, str(REPOSITORY / "bench"))
cluster = importlib.import_module("cluster")
SCRIPT = [sys.executable, REPOSITORY / "bench" / "cluster.py"]
RATE = 200e6
NOTHING = ("sleep", "0.5")  # of what ends at once, and is no MPI program, Open MPI may miss the end
BEYOND = 1.08  # what a host may send beside payload: headers, acknowledgements, barriers


@pytest.fixture(scope="module")
def launched():
    """``cluster.run`` with a time limit; where there can be no cluster, the reason why the test is skipped."""

    def on_cluster(*command, **options):
        done = cluster.run(command, timeout=60, **options)
        if done.status == cluster.SKIPPED:
            pytest.skip(done.err.strip())
        return done

    return on_cluster


@pytest.fixture(scope="module")
def found(launched, tmp_path_factory):
    """What ``across_hosts.py`` found on four hosts of two ranks each, and the traffic of all of it by host."""
    file = tmp_path_factory.mktemp("cluster") / "found.json"
    worker = [sys.executable, "-m", "mpi4py", REPOSITORY / "tests" / "across_hosts.py", file]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPICOLL_PROFILE", "none")
        done = launched(*worker, rate="200mbit")
    assert done.status == 0, done.err
    return {**json.loads(file.read_text()), "traffic": done.traffic}


def sent(found, name: str) -> list[int]:
    """Bytes of each host in one allreduce."""
    return [most for _, most in found["counted"][name][::2]]


def bytes_of(found) -> int:
    return 4 * found["count"]


def crossing(name: str) -> float:
    """The share of the vector that the host which sends most sends to others, by the schedule for these hosts."""
    schedule = find("allreduce", name).schedule(8)
    hosts = [0.0] * 4
    for rank in range(8):
        sends = [send for round_ in schedule.rounds(rank) for send in round_.sends if send.peer // 2 != rank // 2]
        hosts[rank // 2] += sum(send.hi - send.lo for send in sends) / schedule.chunks
    return max(hosts)


def is_hierarchical(found, name: str) -> bool:
    """Does each host send 2n(h - 1)/h, which is the least, and not more?"""
    least = 2 * 3 / 4 * bytes_of(found)
    return all(least <= one <= BEYOND * least for one in sent(found, name))


def test_hosts_have_names_and_memory_of_their_own(found):
    assert found["hosts"] == [[f"node{n // 2 + 1}", 2] for n in range(8)]


def test_results_are_right_across_hosts(found):
    assert found["wrong"] == [[]] * 8


@pytest.mark.parametrize("name", ["shared", "auto"])
def test_hosts_add_up_inside_first(found, name):
    assert is_hierarchical(found, name)


def test_what_does_not_is_told_from_it(found):
    assert not is_hierarchical(found, "circulant")
    assert not is_hierarchical(found, "recursive_doubling")


@pytest.mark.parametrize("name", ["ring", "halving_doubling", "circulant", "recursive_doubling"])
def test_an_algorithm_puts_on_the_wire_what_its_schedule_says(found, name):
    bytes_sent = crossing(name) * bytes_of(found)
    assert bytes_sent <= max(sent(found, name)) <= BEYOND * bytes_sent


def test_links_have_the_rate(found):
    for name in found["counted"]:
        seconds = max(seconds for seconds, _ in found["counted"][name])
        assert seconds > 0.9 * max(sent(found, name)) * 8 / RATE


def test_the_counters_tell_of_the_whole_run(found):
    assert [*found["traffic"]] == ["node1", "node2", "node3", "node4"]
    for n, traffic in enumerate(found["traffic"].values()):
        counted = sum(sent(found, name)[n] for name in found["counted"])
        assert counted < traffic.sent < 2 * counted
        assert 0.5 < traffic.received / traffic.sent < 2


def test_a_delay_is_one(launched):
    code = (
        "from mpi4py import MPI; import time; w = MPI.COMM_WORLD; w.Barrier(); start = time.monotonic()\n"
        "if w.rank % 3 == 0: w.sendrecv(0, 3 - w.rank)\n"
        "if w.rank == 0: print(time.monotonic() - start)"
    )
    done = launched(sys.executable, "-c", code, ranks_per_host=1, delay=50, rate="200mbit")
    assert done.status == 0, done.err
    assert 0.05 < float(done.out) < 1


def test_several_at_once_with_what_their_commands_print_and_their_status(launched):
    launched(*NOTHING)
    code = "from mpi4py import MPI; import sys; w = MPI.COMM_WORLD; names = w.gather(MPI.Get_processor_name())\n"
    code += "if w.rank == 0: print(*names, flush=True)\n"
    code += "w.Barrier(); sys.exit(int(sys.argv[1]))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    expected = {16: 0, 4: 3}
    job = ["--ranks-per-host", "1", "--", sys.executable, "-m", "mpi4py", "-c", code]
    started = {n: subprocess.Popen([*SCRIPT, "--hosts", str(n), *job, str(expected[n])], **pipes) for n in expected}
    for hosts, process in started.items():
        out, _ = process.communicate(timeout=60)
        assert process.returncode == expected[hosts]
        assert out.split() == [f"node{n + 1}" for n in range(hosts)]


def sleeping(seconds: str) -> list[Path]:
    """Processes that have this among their words."""
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if seconds in read(path).split("\0")]


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_one_that_is_killed(launched, number, tmp_path):
    launched(*NOTHING)
    seconds = f"{os.getpid()}{number:02}000"
    before = links(), Path("/proc/mounts").read_text()

    def kill(process):
        until = time.monotonic() + 20
        while sum("sleep" in read(path) for path in sleeping(seconds)) < 8 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(sleeping(seconds)) >= 8
        os.kill(process.pid, number)

    done = run([*SCRIPT, "--delay", "1", "--", "sleep", seconds], tmp_path, meanwhile=kill, timeout=20)
    assert done.status == (-number if number == signal.SIGKILL else 128 + number)
    until = time.monotonic() + 5
    while sleeping(seconds) and time.monotonic() < until:
        time.sleep(0.05)
    assert not sleeping(seconds)
    assert (links(), Path("/proc/mounts").read_text()) == before
    assert "Traceback" not in done.err


def links() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


@pytest.mark.parametrize(
    ("tool", "says", "message"),
    [
        ("", "", "cluster: skipped: ip is missing (Debian, Ubuntu: iproute2)\n"),
        (
            "unshare",
            "not permitted",
            "cluster: skipped: neither root's nor a user's own namespaces are to be had (",
        ),
        ("ip", "Not supported", "cluster: skipped: node1 cannot be set up: Not supported\n"),
    ],
)
def test_what_there_cannot_be_a_cluster_without_is_named(launched, tmp_path, tool, says, message):
    """With a tool that fails before all others on the path; or with none there."""
    launched(*NOTHING)
    path = str(tmp_path)
    if tool:
        (tmp_path / tool).write_text(f"#!/bin/sh\necho {says} >&2\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
        path += os.pathsep + os.environ["PATH"]
    done = run([*SCRIPT, "--", "true"], tmp_path, env={"PATH": path})
    assert (done.status, done.out) == (cluster.SKIPPED, "")
    assert done.err.startswith(message)
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rate fast", "argument --rate: 'fast' is no rate: expected one like 200mbit or 1gbit"),
        ("--rate 0mbit", "argument --rate: '0mbit' is no rate"),
        ("--delay -1", "argument --delay: '-1' is no time: expected milliseconds, 0 or more"),
        ("--hosts 5", "argument --hosts: invalid choice: 5 (choose from 4, 8, 16)"),
        (
            "--counters no/where.json",
            "argument --counters: 'no/where.json' cannot be written: name a file",
        ),
    ],
)
def test_wrong_usage(options, message, tmp_path):
    done = run([*SCRIPT, *options.split(), "--", "true"], tmp_path)
    assert done.status == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == []
