"""A cluster on one machine: hosts of their own on a network whose links have a rate, and a delay if asked for.

    python bench/cluster.py --hosts 4 --rate 200mbit -- mpicoll bench allreduce   two ranks on each of four hosts
    python bench/cluster.py --hosts 8 --ranks-per-host 1 --delay 1 -- python job.py

runs the command on every rank, under the mpirun beside this Python (else the one on PATH) with a file from hostfiles/,
and passes on what it prints and its exit status.  A host is a set of namespaces, for network, name, System V IPC and
/dev/shm, so that MPI libraries find nothing in common but files, processes and cores; its eth0 is plugged into a
switch.  All of that is inside namespaces again: it takes no more than ``unshare`` allows, root or not, ends with this
process even if that is killed, leaves nothing behind, and several clusters may run side by side.

Where it cannot be made, one line on standard error says what is missing, and the exit status is 77.  docs/clusters.md
has more.  ``run`` does the same from Python.
"""

import argparse
import contextlib
import fcntl
import heapq
import json
import math
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

SKIPPED = 77  # exit status where there can be no cluster; Automake's tests use it for the same
HOSTFILES = Path(__file__).parents[1] / "hostfiles"
NODES = {4: "four-nodes", 8: "eight-nodes", 16: "sixteen-nodes"}
LAYOUTS = {1: "-one-rank", 2: ""}  # how names of hostfiles say how many ranks a host has
RATE = re.compile(r"([\d.]+)([kmg]?)bit")
MTUS = (9000, 1500)  # bytes of a frame: jumbo, as on clusters; in those of 1500, one byte in 23 is a header
QUEUE = "200ms"  # what a port of the switch holds at most: as good as never does it drop anything
SLACK = 0.5e-3  # seconds of a link's rate that may pass at once, beside a frame: the kernel's timers are no finer

RUN = Path("/run/mpicoll")  # in a file system of the cluster's own
ENTER = RUN / "ssh"
SSH = """#!/bin/sh
# Stands in for ssh: enters a host.  MPI launchers call it with options, which mean nothing here, a host and a command.
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec nsenter --net --uts --ipc --mount --target "$(cat %s/"$host")" sh -c "$*"
"""
HOST = """hostname "$0" && mount -t tmpfs tmpfs /dev/shm && ip link set lo up \
&& echo reno > /proc/sys/net/ipv4/tcp_congestion_control && echo ready && exec sleep infinity"""
"""What a host does.  Reno is the only congestion control that all kernels allow here."""

LAUNCHER = {"LAUNCHER": "ssh", "LAUNCHER_EXEC": str(ENTER), "IFACE": "eth0"}
MPIS = {  # by which option mpirun takes which hostfile, and the environment that it and its ranks need
    "mpich": (
        ("-f", "mpich"),
        {
            **{f"HYDRA_{name}": value for name, value in LAUNCHER.items()},
            # UCX, its default, gets over too, but takes turns in sending and receiving what is large: twice as slow.
            "MPIR_CVAR_CH4_NETMOD": "ofi",
            "FI_PROVIDER": "tcp",
            "FI_TCP_MAX_INJECT": "65536",  # bytes that go without an answer first, which takes two delays
            # Hosts share cores: ranks that wait sleep a little, instead of keeping others from working.
            "MPIR_CVAR_CH4_PROGRESS_THROTTLE": "1",
            "MPIR_CVAR_CH4_PROGRESS_THROTTLE_NO_PROGRESS_COUNT": "16",
        },
    ),
    "impi": (
        ("-machinefile", "mpich"),
        {**{f"HYDRA_{name}": value for name, value in LAUNCHER.items()}, "FI_PROVIDER": "tcp", "I_MPI_WAIT_MODE": "1"},
    ),
    "openmpi": (
        ("--hostfile", "openmpi"),
        {
            "PRTE_MCA_plm_ssh_agent": str(ENTER),
            "PRTE_MCA_prte_tmpdir_base": str(RUN),  # numbers of processes, which name folders there, are not unique
            "PRTE_MCA_hwloc_default_binding_policy": "none",  # all hosts have all cores
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
    ),
}
ELSEWHERE = "PRTE_MCA_rmaps_default_mapping_policy"  # what one machine needs puts all ranks on the first host


class Skipped(Exception):  # noqa: N818  nobody's error
    """No cluster can be emulated here; the text says why."""


# ---- from outside


class Traffic(NamedTuple):
    """Bytes on a host's link, headers included, the launcher's with them.

    The kernel counts a burst of frames that go one after another as one frame, with one header.
    """

    sent: int
    received: int


class Outcome(NamedTuple):
    """The outcome of a command: its exit status, or ``SKIPPED`` if there was no cluster; and the traffic by host."""

    status: int
    out: str
    err: str
    traffic: dict[str, Traffic]


def run(
    command: Sequence[str | Path],
    hosts: int = 4,
    ranks_per_host: int = 2,
    rate: str | None = None,
    delay: float = 0,
    timeout: float | None = None,
) -> Outcome:
    """Run a command on all ranks of a cluster; arguments are the options of the command line.

    Raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds.
    """
    options = ["--hosts", hosts, "--ranks-per-host", ranks_per_host, "--delay", delay]
    options += ["--rate", rate] if rate else []
    with tempfile.TemporaryDirectory() as folder:
        counters = Path(folder, "traffic.json")
        words = [sys.executable, __file__, *options, "--counters", counters, "--", *command]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=timeout)
        found = json.loads(counters.read_text()) if counters.exists() else {}
    traffic = {host: Traffic(**of) for host, of in found.items()}
    return Outcome(done.returncode, done.stdout, done.stderr, traffic)


def outside(args: argparse.Namespace) -> int:
    """Continue inside new namespaces of this process, and return the exit status of what runs there."""
    tools = ["ip", "hostname", "mount", "nsenter", "setpriv", "unshare", *(["tc"] if args.rate else []), args.mpirun]
    for tool in tools:
        if not shutil.which(tool):
            raise Skipped(f"{tool} is missing" + (" (Debian, Ubuntu: iproute2)" if tool in ("ip", "tc") else ""))
    if args.delay and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise Skipped("a delay needs /dev/net/tun, which is missing or not for this user")
    unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    for user in [], ["--user", "--map-root-user"]:  # as root, or as root of a world of one's own
        tried = subprocess.run([*unshare, *user, "true"], capture_output=True, text=True)
        if tried.returncode == 0:
            break
    else:
        raise Skipped(f"neither root's nor a user's own namespaces are to be had ({tried.stderr.strip()})")
    again = [*unshare, *user, sys.executable, __file__, "--inside", *sys.argv[1:]]
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *again], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return process.wait()
    finally:
        process.kill()  # and with it, all that is in there
        process.wait()


# ---- inside


def inside(args: argparse.Namespace) -> int:
    """Make the cluster, and run the command on it; it ends when this process, the first of its namespace, does."""
    names = [f"node{n + 1}" for n in range(args.hosts)]
    try:
        hosts = build(names, args)
    except subprocess.CalledProcessError as error:
        raise Skipped(f"{' '.join(error.cmd)}: {error.stderr.strip().splitlines()[0]}") from error
    (option, suffix), environment = MPIS[args.mpi]
    hostfile = HOSTFILES / f"{NODES[args.hosts]}{LAYOUTS[args.ranks_per_host]}.{suffix}"
    launch = [args.mpirun, option, str(hostfile), "-n", str(args.hosts * args.ranks_per_host), *args.command]
    there = ["sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *launch]
    inherited = {name: value for name, value in os.environ.items() if name != ELSEWHERE}
    before = [traffic(pid) for pid in hosts]
    done = subprocess.run([*in_host(hosts[0], "--uts", "--ipc", "--mount"), *there], env={**environment, **inherited})
    after = [traffic(pid) for pid in hosts]
    if args.counters:
        pairs = zip(before, after, strict=True)
        found = [Traffic(new.sent - old.sent, new.received - old.received)._asdict() for old, new in pairs]
        args.counters.write_text(json.dumps(dict(zip(names, found, strict=True)), indent=1, allow_nan=False) + "\n")
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


def build(names: list[str], args: argparse.Namespace) -> list[int]:
    """Make hosts, names, links and the switch, and return the process that holds each host's namespaces."""
    do("mount", "-t", "tmpfs", "tmpfs", "/run")
    RUN.mkdir()
    addresses = {name: f"10.0.0.{n + 1}" for n, name in enumerate(names)}
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (RUN / "hosts").write_text("\n".join(lines) + "\n")
    do("mount", "--bind", str(RUN / "hosts"), "/etc/hosts")
    ENTER.write_text(SSH % RUN)
    ENTER.chmod(0o755)
    apart = ["unshare", "--net", "--uts", "--ipc", "--mount", "sh", "-c", HOST]
    made = [subprocess.Popen([*apart, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for name in names]
    for name, process in zip(names, made, strict=True):
        assert process.stdout
        said = process.stdout.readline().decode()
        if said != "ready\n":
            raise Skipped(f"{name} cannot be set up: {said.strip()}")
        (RUN / name).write_text(f"{process.pid}\n")
    hosts = [process.pid for process in made]
    if args.delay:
        ports = [tap(name, pid) for name, pid in zip(names, hosts, strict=True)]
    else:
        do("ip", "link", "add", "switch", "mtu", str(args.mtu), "up", "type", "bridge")
        for name, pid in zip(names, hosts, strict=True):
            peer = ["peer", "name", "eth0", "mtu", str(args.mtu), "netns", str(pid)]
            do("ip", "link", "add", name, "mtu", str(args.mtu), "master", "switch", "type", "veth", *peer)
            do("ip", "link", "set", name, "up")
            limit(name, args)
    for n, (name, pid) in enumerate(zip(names, hosts, strict=True)):
        up = ["link", "set", "eth0", "address", f"02:00:00:00:00:{n:02x}", "mtu", str(args.mtu), "up"]
        do(*in_host(pid), "ip", *up)
        do(*in_host(pid), "ip", "address", "add", f"{addresses[name]}/24", "dev", "eth0")
        limit("eth0", args, in_host(pid))
    if args.delay and not os.fork():
        switch(ports, args.delay / 1e3, args.rate)
    return hosts


def do(*command: str) -> None:
    """Run a command that must not fail."""
    subprocess.run(command, check=True, capture_output=True, text=True)


def in_host(pid: int, *more: str) -> list[str]:
    """The words before a command that is to run in a host's network, and in more of its namespaces."""
    return ["nsenter", "--target", str(pid), "--net", *more]


def limit(link: str, args: argparse.Namespace, where: Sequence[str] = ()) -> None:
    """No more than the rate goes out by this link; as little as can be at once, so that short messages count too."""
    if args.rate:
        burst = args.mtu + 14 + int(args.rate / 8 * SLACK)
        how = ["rate", f"{args.rate:.0f}bit", "burst", f"{burst}b", "latency", QUEUE]
        do(*where, "tc", "qdisc", "add", "dev", link, "root", "tbf", *how)


def traffic(pid: int | str) -> Traffic:
    """What has passed so far by the link of the host that a process is on; ``"self"`` is the one that asks."""
    (line,) = re.findall(r"eth0: *(.*)", Path(f"/proc/{pid}/net/dev").read_text())
    numbers = line.split()
    return Traffic(sent=int(numbers[8]), received=int(numbers[0]))


# ---- the switch that delays: no kernel has one without netem, and many have no netem


def tap(name: str, pid: int) -> int:
    """A host's eth0, whose frames come and go by the descriptor returned."""
    port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    iff_tap, iff_no_pi, tunsetiff = 0x0002, 0x1000, 0x400454CA
    fcntl.ioctl(port, tunsetiff, struct.pack("16sH22x", name.encode(), iff_tap | iff_no_pi))
    do("ip", "link", "set", name, "netns", str(pid), "name", "eth0")
    return port


def switch(ports: list[int], delay: float, rate: float | None) -> NoReturn:
    """Pass on each frame ``delay`` seconds after it has come, from each port at ``rate`` bits a second.

    The last byte of a host's hardware address is the number of its port.
    """
    with contextlib.suppress(PermissionError):  # other than root's it must wait for ranks that poll
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    due: list[tuple[float, int, int, bytes]] = []  # when, in which order, by which port
    free, count = [0.0] * len(ports), 0
    while True:
        wait = max(due[0][0] - time.monotonic(), 0) if due else None
        for came in select.select(ports, [], [], wait)[0]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame, now = os.read(came, 1 << 16), time.monotonic()
                    to_all = frame[0] & 1
                    for port in [port for port in range(len(ports)) if ports[port] != came] if to_all else [frame[5]]:
                        at = now + delay
                        if rate:
                            at = free[port] = max(at, free[port]) + 8 * len(frame) / rate
                        heapq.heappush(due, (at, count, port, frame))
                        count += 1
        while due and due[0][0] <= time.monotonic():
            os.write(ports[due[0][2]], heapq.heappop(due)[3])


# ---- the command line


def bits(text: str) -> float:
    """Parse a rate as tc takes it into bits per second."""
    match = RATE.fullmatch(text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: expected one like 200mbit or 1gbit")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def milliseconds(text: str) -> float:
    """Parse a delay in milliseconds."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no time: expected milliseconds, 0 or more")


def writable(name: str) -> Path:
    """A file that can be written to."""
    path = Path(name)
    if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
        raise argparse.ArgumentTypeError(f"{name!r} cannot be written: name a file in a folder of yours")
    return path


def library(mpirun: str) -> str:
    """The MPI library that ``mpirun`` belongs to, by its version text."""
    said = subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout
    for sign, mpi in (("Open MPI", "openmpi"), ("Intel", "impi"), ("HYDRA", "mpich")):
        if sign in said:
            return mpi
    raise Skipped(f"{mpirun} is neither MPICH's nor Open MPI's nor Intel MPI's: name the one it is like with --mpi")


def main() -> int:
    """Launch a command on an emulated cluster, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, choices=NODES, default=4)
    parser.add_argument("--ranks-per-host", type=int, choices=LAYOUTS, default=2)
    parser.add_argument("--rate", type=bits, help="of each link, each way, as in 200mbit; default: no limit")
    parser.add_argument("--delay", type=milliseconds, default=0, metavar="MS", help="from host to host; default: none")
    parser.add_argument("--mtu", type=int, choices=MTUS, default=MTUS[0], help="bytes of a frame")
    parser.add_argument("--mpi", choices=MPIS, help="by default what mpirun --version says")
    parser.add_argument("--counters", type=writable, metavar="FILE", help="for the bytes by host, as JSON")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # of the namespaces, already
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    beside = Path(sys.prefix, "bin", "mpirun")
    args.mpirun = str(beside) if beside.exists() else "mpirun"
    os.environ["PATH"] = f"{Path(sys.prefix, 'bin')}{os.pathsep}{os.environ['PATH']}"
    try:
        if not args.inside:
            return outside(args)
        args.mpi = args.mpi or library(args.mpirun)
        return inside(args)
    except Skipped as why:
        print(f"cluster: skipped: {why}", file=sys.stderr)
        return SKIPPED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
