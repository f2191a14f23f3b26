"""What mpicoll keeps with a communicator, and running plans on it."""

import warnings
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from mpi4py import MPI

from ..algorithms import find
from ..collective import COLLECTIVES, Collective
from ..errors import UserError, reason
from ..graphs import Graph
from ..schedule import MIX, Schedule
from ..tuning.fingerprint import Fingerprint, machine
from ..tuning.profile import find_profile
from ..tuning.rules import Rule, Rules
from . import launch, record
from .agreement import Agreement, Header, Headers
from .attach import INTERRUPTED, attach, attached, check, interrupted, named, world_ranks
from .gpu import staging
from .launch import library_name
from .operations import Operation
from .plan import Bound, Plan
from .progress import Handle, advance_all, check_thread, driving, exchange, inside, under_way
from .select import defaults, tuned
from .shared import Node

if TYPE_CHECKING:
    from .gpu.devices import Devices

T = TypeVar("T")

ACROSS_WHOLE = 32 << 10
"""Bytes of a piece up to which nodes send it whole to each other."""

COPIED = 16 << 10
"""Bytes of a vector up to which it is copied to memory for which the rounds are bound already, and back."""

MAX_PLANS = 64
"""Plans kept per communicator; the one not used for longest goes first."""

BUSY = "another thread is in a collective on this communicator: give each thread a communicator of its own"

BLOCKING_TAG = 0
HANDLE_TAGS = range(1, 8192)  # one each, in turn: several may be pending on one communicator
MIXING_TAGS = range(8192, 16384)  # by graph and step: ranks that mix differently do not take each other's vectors
PERSISTENT_TAGS = range(16384, 32768)  # one each, for good; MPI guarantees tags up to 32767


class State:
    """A private duplicate of the communicator, so that our messages never meet the user's; the plans made so far; and
    scratch memory for whichever blocking call runs, as large as the largest that ran."""

    def __init__(self, comm: MPI.Intracomm, measured: Rules | None = None) -> None:
        """A collective call.  The rules are those ``measured``, or if none are given those of the profile for here."""
        group = comm.Get_group()
        self.user = MPI.Intracomm(comm)  # the same communicator, with the methods of mpi4py
        self.comm = MPI.Intracomm(self.user.Create(group))  # a duplicate, but for the user's attributes
        self.p, self.rank = self.comm.size, self.comm.rank
        self.name, self.world = named(self.comm)
        self.plans: dict[tuple[Any, ...], Plan] = {}
        group.Free()
        self.node = Node(self.comm, self._pause)
        everyones = [self.node.wrong] if self.node.whole else self.comm.allgather(self.node.wrong)
        if wrong := next(filter(None, everyones), ""):
            self.node.release()
            self.comm.Free()
            raise UserError(wrong)
        self.shares = self.node.whole and self.node.shares
        """Do all ranks share memory?"""
        self.layout: tuple[int, ...] = (self.p,)
        """How many ranks each node has, in the order of nodes' first ranks."""
        self.spans = not self.node.whole and self._spans()
        """Are there several nodes, on each of which several do?"""
        self.rules: Rules = {}
        """What ``"auto"`` goes by, for each collective."""
        self.decided: dict[tuple[Any, ...], Any] = {}
        """What was decided for calls like the latest ones (``mpi.engine``)."""
        self.paths: dict[Any, Any] = {}
        """The paths of requests like the latest ones (``mpi.paths``)."""
        self.last: tuple[Any, ...] = ()
        """The paths that the latest call took."""
        try:
            self.follow(self._found_rules() if measured is None else measured)
        except BaseException:
            self.node.release()
            self.comm.Free()
            raise
        self._owners: State | None = None  # of the same pieces on all nodes
        self.devices: Devices | None = None
        """What ranks can do on their GPUs, once there was a call on arrays there."""
        self._boxes: staging.StagingBuffers | None = None
        self.agreement = Agreement(self.comm, self.node if self.shares else None)
        self._fast = self.node.bind(self) if self.node.whole else None  # named in the compiled part, which looks for it
        self._record = record.follow(self._fast, self.name, self.world)
        self._graphs: set[bytes] = set()  # those found to be the same on all ranks
        self._scratch = self._copy = np.empty(0, np.uint8)
        self._interrupted = False
        self._running: Any = self._fast or Lock()
        self._handles = self._persistent = 0
        self._pending: dict[int, Handle] = {}  # pending handles, by tag
        self._users = 1  # the communicator, and handles that are not done with

    def plan(
        self,
        name: Hashable,
        schedule: Callable[[], Schedule],
        count: int,
        dtype: np.dtype,
        operation: Operation,
        cuts: tuple[int, ...] | None = None,
    ) -> Plan:
        """The plan for such a call, made now or before; one ``name``, one schedule."""
        carried, finishes = operation.carried(dtype), operation.finish is not None
        key = (name, count, dtype, carried, finishes, cuts)
        plan = self.plans.pop(key, None)
        if plan is None:
            if len(self.plans) >= MAX_PLANS:
                del self.plans[next(iter(self.plans))]
            plan = Plan(schedule(), self.rank, count, dtype, carried, finishes, cuts)
        self.plans[key] = plan  # the newest last
        return plan

    def run(self, plan: Plan, vector: np.ndarray, operation: Operation, tag: int = BLOCKING_TAG) -> None:
        """Do it now, on memory that belongs to the caller."""
        # Pending handles: other ranks may need them to go on before they join this.
        self._in_turn(self._run_driving if under_way else self._run, plan, vector, operation, tag)

    def _run(self, plan: Plan, vector: np.ndarray, operation: Operation, tag: int) -> None:
        rounds: Iterable[Bound]
        if vector.nbytes <= COPIED:
            rounds, copy = plan.kept(operation)
            copy[:] = vector
        else:
            if len(self._scratch) < plan.scratch_bytes:
                self._scratch = np.empty(plan.scratch_bytes, np.uint8)
            rounds, copy = plan.bind(vector, self._scratch, operation), None
        with np.errstate(all="ignore"):  # like MPI's own reductions; raising here would leave messages in flight
            entry = record.inside.get(get_ident())
            for n, bound in enumerate(rounds):
                if entry is not None:
                    entry.round = n
                bound.before()
                exchange(self.comm, bound, tag)
                bound.after()
        if copy is not None:
            vector[:] = copy

    def _in_turn(self, call: Callable[..., T], *args: Any) -> T:
        """Run ``call`` exclusively on this communicator; if it raises, mark the communicator unusable."""
        self.check()
        if not self._running.acquire(False):
            raise RuntimeError(BUSY)
        try:
            inside(True)
            return call(*args)
        except BaseException:
            self.interrupt()
            raise
        finally:
            self._running.release()
            inside(False)

    def _spans(self) -> bool:
        node = self.node
        first = node.comm.bcast(self.rank)
        found = self.comm.allgather((first, node.size, node.shares))
        self.layout = tuple(size for _, size in sorted({(first, size) for first, size, _ in found}))
        sizes = {first: size if shares else 1 for first, size, shares in found}
        fewest = min(sizes.values())
        firsts = [first for first, *_ in found]
        self._in_order = firsts == sorted(firsts)  # nodes, one after another
        powers = {len(sizes), *sizes.values()}
        self._canonical = self._in_order and len({*sizes.values()}) == 1 and all(n & (n - 1) == 0 for n in powers)
        node.owners = list(range(fewest))
        node.across = self._across
        return fewest > 1

    def can_share(self, collective: str, deterministic: bool, operation: Operation) -> bool:
        """May it be done in shared memory?  On several nodes the order of additions is the canonical one only where
        these, and the ranks on each, are powers of two in number."""
        if not self.spans:
            return self.shares
        order = self._canonical if deterministic else operation.commutes or self._in_order
        return COLLECTIVES[collective.removesuffix("_shared")].across and order

    def follow(self, measured: Rules) -> None:
        """From now on these are the rules, and for collectives that have none the defaults; the same on all ranks."""
        self.decided.clear()
        self.node.forget()
        self.paths.clear()
        for collective in COLLECTIVES:
            own = measured.get(collective)
            self.rules[collective] = tuned(collective, own, self.shares) if own else self.defaults(collective)

    def defaults(self, collective: str) -> tuple[Rule, ...]:
        """The rules where nobody has measured."""
        return defaults(collective, self.p, self.shares, self.spans, self.node.whole, self.node.does(collective))

    def _found_rules(self) -> Rules:
        """Those of the profile for here, if there is one: rank 0 looks, and all get what it has found."""
        if self.p == 1:
            return {}
        found: Rules | Exception = {}
        if self.rank == 0:
            try:
                here = Fingerprint(library_name(), machine(), self.layout)
                profile = find_profile(here, self.p == MPI.COMM_WORLD.size)
                found = profile.rules if profile else {}
            except Exception as error:
                found = error
        found = self.comm.bcast(found)
        if isinstance(found, Exception):
            raise found
        return found

    def join_nodes(self) -> None:
        """Make what nodes need to reduce with each other.  A collective call."""
        if self.spans and self._owners is None:
            mine = self.node.rank if self.node.rank in self.node.owners else MPI.UNDEFINED
            with driving(self.comm):
                across = self.comm.Split(mine, self.rank)
            if across != MPI.COMM_NULL:
                self._owners = State(MPI.Intracomm(across), {})  # whose algorithms are named
                across.Free()
            else:
                self._owners = self  # nothing to own, and so never asked

    def join_devices(self, device: int) -> "Devices":
        """Find out what ranks can do on their GPUs, of which this is the number of this rank's.  A collective call."""
        if self.devices is None:
            from .gpu.devices import Devices, facts

            own = self._together(lambda: facts(device), "GPUs cannot be asked what they can do")
            self.devices = self.on_node(Devices, self.comm, self.node, own)
        return self.devices

    def boxes(self, device: int) -> staging.StagingBuffers:
        """What arrays in the memory of a GPU go through: in memory that ranks share, if there is some to be locked.  A
        collective call, which raises on all ranks if one has no memory for it."""
        if self._boxes is None:
            memory = self.on_node(self.node.empty, staging.BUFFERS * staging.BUFFER) if self.node.size > 1 else None
            lacking = "page-locked memory for arrays on GPUs cannot be had"
            self._boxes = self._together(lambda: staging.allocate(memory, device), lacking)
        return self._boxes

    def _together(self, action: Callable[[], T], what: str) -> T:
        """What it returns; if it raises on one rank, an error on all of them.  A collective call."""
        found: T | None = None
        error: Exception | None = None
        try:
            found = action()
        except Exception as raised:
            error = raised
        with driving(self.comm):
            everyone = self.comm.allgather(None if error is None else reason(error))
        for rank, why in enumerate(everyone):
            if why is not None:
                raise RuntimeError(f"{what} on rank {rank}: {why}") from error
        return found  # type: ignore[return-value]

    def _across(self, piece: np.ndarray, operation: Operation) -> None:
        """Reduce ``piece`` with the other nodes, in the canonical order."""
        assert self._owners is not None
        self._owners.run(self._plan_across(len(piece), piece.dtype, operation), piece, _carried(operation))

    def _plan_across(self, count: int, dtype: np.dtype, operation: Operation) -> Plan:
        owners = self._owners
        assert owners is not None
        name = "recursive_doubling" if count * dtype.itemsize <= ACROSS_WHOLE else "halving_doubling"
        row = find("allreduce", name)
        return owners.plan(name, lambda: row.schedule(owners.p), count, dtype, _carried(operation))

    def plans_across(self, count: int, dtype: np.dtype, operation: Operation) -> list[Plan] | None:
        """Return this rank's plans with other nodes in an allreduce of ``count`` elements in shared memory; ``None`` if
        there was no such call so far, and they are not known yet."""
        if not self.spans:
            return []
        if self._owners is None:
            return None
        return [
            self._plan_across(piece, operation.carried(dtype), operation) for piece in self.node.owned(count, dtype)
        ]

    def on_node(self, call: Callable[..., T], *args: Any) -> T:
        """Do something of ``node``'s that is collective."""
        if under_way:  # what is the MPI library's in there does not drive them
            return self._in_turn(self._driven, call, *args)
        return self._in_turn(call, *args)

    def _driven(self, call: Callable[..., T], *args: Any) -> T:
        with driving(self.comm):
            return call(*args)

    def empty(self, nbytes: int) -> np.ndarray:
        """Bytes in memory that the node's ranks share, or, with a warning, of this rank's own."""
        made = self.on_node(self.node.empty, nbytes) if self.node.size > 1 else np.empty(nbytes, np.uint8)
        if made is None:
            if self.node.rank == 0:
                warnings.warn(
                    f"no memory to share for arrays of {nbytes} bytes on each of {self.node.size} ranks of a node: "
                    "they are ordinary ones, on which collectives are slower. Either memory is full, or these ranks "
                    "are in containers of their own, or of little /dev/shm (docker: --shm-size)",
                    RuntimeWarning,
                    stacklevel=7,  # who has called empty, zeros, ...
                )
            return np.empty(nbytes, np.uint8)
        return made

    def _pause(self) -> None:
        """While this rank waits for others: these may be waiting for messages of its, of ours or of the program's."""
        self.comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)
        if under_way:
            advance_all()

    def _run_driving(self, plan: Plan, vector: np.ndarray, operation: Operation, tag: int) -> None:
        handle = Handle(self, plan.bind(vector, np.empty(plan.scratch_bytes, np.uint8), operation), tag)
        try:
            handle.wait()
        except BaseException as error:
            handle.abandon(error)
            raise

    def entry(self, what: Any) -> record.Entry:
        """For the flight record: a call that comes next."""
        return record.Entry(what, self.name, self.world, self.agreement.counter.calls + 1)

    def agree(
        self,
        headers: Headers,
        detail: tuple[str, ...] | None = None,
        places: tuple[int, ...] = (),
        digest: int = 0,
    ) -> list[list[int]] | None:
        """Compare a blocking call between the ranks: a ``MismatchError`` on all of them if it is not the same; else the
        ``places`` of all.  ``digest`` is that of ``headers``, if it is known."""
        if self.p == 1:
            return None
        self.check()
        if not self._running.acquire(False):
            raise RuntimeError(BUSY)
        try:
            if under_way or interrupted:
                with driving(self.comm):
                    return self.agreement.check(headers, detail, places, digest)
            return self.agreement.check(headers, detail, places, digest)
        finally:
            self._running.release()

    def at_once(
        self,
        path: Any,
        headers: Headers,
        detail: tuple[str, ...] | None,
        compares: bool,
        send: np.ndarray,
        recv: np.ndarray,
        digest: int = 0,
    ) -> None:
        """Run a call on a path that has ``at_once``, compared between the ranks as ``agree`` does."""

        def call() -> list[Any] | None:
            number = self.agreement.number(headers, detail, digest) if compares else 0
            found: list[Any] | None = path.at_once(number, compares, send, recv)
            return found

        found = self.on_node(call)
        if found is not None:
            self._unfinished(path, headers, detail, found, send, recv)

    def unfinished(self, headers: Headers, found: list[Any], send: np.ndarray, recv: np.ndarray) -> None:
        """Do what the compiled part has left of the latest call."""
        self._unfinished(self.last[0], headers, None, found, send, recv)

    def _unfinished(
        self,
        path: Any,
        headers: Headers,
        detail: tuple[str, ...] | None,
        found: list[Any],
        send: np.ndarray,
        recv: np.ndarray,
    ) -> None:
        if found and isinstance(found[0], int):
            self.agreement.differ(found, headers, detail)
            found = []
        path.run(send, recv, found or None)

    def agree_on(self, graph: Graph) -> None:
        """Compare it, the first time that it is used."""
        if graph.digest not in self._graphs:
            headers = (Header(MIX, str(graph), f"weights {graph.digest.hex()[:8]}", "", None),)
            record.begin(self.entry(headers))
            self.agree(headers)
            self._graphs.add(graph.digest)

    def work(self, count: int, dtype: np.dtype) -> np.ndarray:
        """Memory to work on, with anything in it, which the next call takes over."""
        nbytes = count * dtype.itemsize
        if len(self._copy) < nbytes:
            self._copy = np.empty(nbytes, np.uint8)
        return self._copy[:nbytes].view(dtype)

    def one_result(
        self, row: Collective, send: np.ndarray, operation: Operation, places: list[list[int]] | None
    ) -> np.ndarray | None:
        """The one result of all ranks of the node, a flat array; ``None``, on all of them, if there is no memory for
        it."""
        memory = self.node.result(send.nbytes)
        if memory is None:
            return None
        result = memory.view(send.dtype)
        return result if self.node.run(row, send, result, operation, places=places, one=True) else None

    def check(self) -> None:
        """Raise if nothing may be started here: messages of an interrupted call would be taken for the new one's."""
        if self._interrupted:
            raise RuntimeError(INTERRUPTED)
        check_thread()

    def interrupt(self) -> None:
        """Messages may stay behind: nothing can be started any more."""
        self._interrupted = True
        self.node.forget()
        interrupted.add(self)

    def disown(self) -> None:
        """The communicator is being freed, by all ranks."""
        self.decided.clear()  # so that a call on a handle of it that is left is looked at closely
        self.node.forget()
        self.paths.clear()
        self.last = ()
        self.node.disown()

    def retain(self) -> None:
        """Another user of the private communicator."""
        self._users += 1

    def release(self) -> None:
        """One less; the last one frees it."""
        self._users -= 1
        if not self._users and not MPI.Is_finalized():
            if self._owners not in (None, self):
                self._owners.release()
            if self._boxes is not None:
                self._boxes.release()
                self._boxes = None
            if self.devices is not None:
                self.devices.release()
            record.refresh()  # what the compiled part has recorded of it goes with it
            self.node.release()
            self.comm.Free()

    def handle_tag(self) -> int:
        """A tag for one nonblocking call: the same on all ranks, which make their calls in the same order."""
        self.check()
        self._handles += 1
        tag = HANDLE_TAGS[self._handles % len(HANDLE_TAGS)]
        if tag in self._pending:  # from a round of tags ago; all ranks have started it long since
            self._pending[tag].wait()
        return tag

    def persistent_tag(self) -> int:
        """A tag for one persistent call."""
        self.check()
        if self._persistent == len(PERSISTENT_TAGS):
            raise RuntimeError(
                f"{self._persistent} persistent collectives were made on this communicator, one more than there "
                "are tags for: use a new communicator (comm.Dup())"
            )
        self._persistent += 1
        return PERSISTENT_TAGS[self._persistent - 1]

    def started(self, handle: "Handle", tag: int) -> None:
        """Keep the private communicator as long as the handle is pending, though the user's may be freed."""
        self._pending[tag] = handle
        self.retain()

    def completed(self, tag: int) -> None:
        """Let go of what ``started`` keeps."""
        del self._pending[tag]
        self.release()


def _carried(operation: Operation) -> Operation:
    """Return the operation on sums that are as wide as they will be, and not finished."""
    return replace(operation, widens=False, finish=None)


def find_state(comm: MPI.Intracomm) -> State | None:
    """The communicator's, if it has one."""
    found = attached(comm)
    return found if isinstance(found, State) else None


def state_of(comm: MPI.Intracomm) -> State:
    """The communicator's, made now (a collective call) or before."""
    state = find_state(comm)
    if state is None:
        check(comm)
        launch.check(comm)
        with (
            record.during("making a communicator of ours", ranks=world_ranks(comm)),
            driving(comm),
        ):  # other ranks may be waiting for what is pending before they come here
            state = State(comm)
        attach(comm, state)
    return state
