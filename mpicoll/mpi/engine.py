"""Every call: agree, record, run, deliver.

A call of the commonest forms is looked up in the communicator's cache by what was passed: which collective, the dtypes,
lengths and flags of NumPy arrays, the operation and the options.  What is found there is the path to take, and what is
compared between the ranks.  All other calls, and each of these the first time, are understood (``mpi.request``) and
decided (``mpi.paths``) anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from ..collective import ALLREDUCE, Collective
from ..errors import MismatchError
from ..tuning.rules import NATIVE
from . import record
from .agreement import LEVELS, Headers, check_level, default_level, digest_of, level_of
from .attach import attached, check_comm, interrupted, whole
from .buffers import is_half, order_of
from .operations import Operation
from .paths import Account, Path, decide, native_first
from .progress import under_way
from .request import NEW, ONE, VECTORS, Asked, Lengths, Marker, Options, Raw, Request, understand
from .select import PLAIN
from .state import State, find_state, state_of

ndarray, IN_PLACE, NOTHING = np.ndarray, MPI.IN_PLACE, Marker("nothing")  # looked up in every call

KEPT = 1024
"""Calls that a communicator remembers; the oldest goes first."""

AGAIN = 32
"""Calls after which one that the compiled part could make, and does not, is stored there again."""

BRIEF = 64 << 10
"""Bytes of the whole up to which a native call that is not compared is not recorded."""


@dataclass(eq=False, slots=True)
class Decided:
    """What the cache holds for a call: the path, and what is compared.

    ``native`` is that of the path.  ``op`` is an ``MPI.Op`` that was passed, kept so that its ``id`` is no other's;
    ``users`` says that it is user-defined, and may be freed.  ``room`` are the elements of a new array to receive.
    ``times`` it was made by Python.  ``brief`` are native calls so short that, not compared, they are not recorded.
    """

    paths: tuple[Path]
    native: Callable[[Any, Any], object] | None
    headers: Headers
    digest: int
    op: MPI.Op | None
    users: bool
    room: int
    brief: bool
    operation: Operation
    times: int = 0


def execute(
    comm: MPI.Intracomm,
    row: Collective,
    send: Any,
    recv: Any,
    op: Any,
    root: Any,
    counts: Any,
    algorithm: str = "auto",
    deterministic: bool | None = None,
    segments: int | None = None,
    wire: str | None = None,
    check: str | None = None,
    stream: Any = None,
    method: bool = True,
) -> Any:
    """Run a collective, and return what this rank receives; arguments are those of ``Asked``, ``Options``, and
    ``mpicoll.allreduce``."""
    state: Any
    try:
        if method or type(comm) is not MPI.Intracomm:
            state = comm._state  # type: ignore[attr-defined]
            if deterministic is None:
                deterministic = comm.deterministic  # type: ignore[attr-defined]
            if check is None:
                check = comm.check or level_of(comm, None)  # type: ignore[attr-defined]
        else:  # to be known by an AttributeError takes longer
            state = attached(comm) if comm else None
            if check is None:
                check = default_level()
    except AttributeError:  # no Comm
        state = attached(comm) if isinstance(comm, MPI.Comm) and comm else None
        if check is None:
            check = level_of(comm, None)
    # What is passed, told apart by all that matters but how arrays lie in memory.
    key = found = dtype = size = None
    form: Any = None
    rest: Any
    if type(recv) is ndarray:
        if send is IN_PLACE or send is None:
            dtype, size = recv.dtype, recv.size
        elif type(send) is ndarray:
            dtype, size, form = recv.dtype, recv.size, send.size
            if send.dtype is not dtype:
                dtype = None
    elif type(send) is ndarray and (recv is None or type(recv) is Marker):
        dtype, size, form = send.dtype, send.shape, recv or NOTHING
    if root is None and counts is None and segments is None and wire is None:
        rest = None
    elif (
        (root is None or type(root) is int)  # not what is equal to one
        and (segments is None or type(segments) is int)
        and (counts is None or type(counts) is tuple)
    ):
        rest = root, counts, segments, wire
    else:
        dtype = None
    if dtype is not None and stream is None:
        which = op if type(op) is str else id(op)
        key = row, which, dtype, size, form, method, algorithm, deterministic, rest
        if state is not None and not under_way and not interrupted:
            try:
                found = state.decided[key]
            except KeyError:
                pass
            except TypeError:  # for an argument without a hash, which will be refused
                key = None
    brief = found is not None and found.brief and (check == "off" or (state.p == 1 and check in LEVELS))
    if not (brief and method) and (  # mpi4py's methods look at the arrays themselves
        (type(recv) is ndarray and not recv.flags.carray) or (form is not None and not send.flags.carray)
    ):
        key = None  # which is for arrays that lie row by row, aligned, and may be written
    if (
        found is None
        or key is None
        or not (brief or check in LEVELS)
        or (found.users and not op)  # freed meanwhile
        or (recv is NEW and (recv := _room(found.room, dtype)) is NEW)
    ):
        options = Options(algorithm, bool(deterministic), segments, wire)
        return _understood(comm, row, send, recv, op, root, counts, options, check, stream, method, key)
    native = found.native
    state.last = found.paths
    try:
        if brief:
            native(send, recv)
            return recv
        compares = check != "off" and state.p > 1
        detail = ("",) if check == "full" else None  # arrays of these forms lie row by row
        (path,), headers = found.paths, found.headers
        number = state.agreement.counter.calls + 1 if compares else 0
        record.begin(record.Entry(headers, state.name, state.world, number))
        try:
            if native is not None:
                if compares:
                    state.agree(headers, detail, (), 0 if detail else found.digest)
                native(send, recv)
                return recv
            if path.at_once is not None:
                found.times += 1
                if found.times % AGAIN == 0:  # others may have come in its place
                    _learn(state, key, op, found)
                given = send if form else recv
                state.at_once(path, headers, detail, compares, given, recv, 0 if detail else found.digest)
                return recv
            given, taken, places = send, recv, None
            if compares:
                mine = ()
                if path.places is not None:
                    mine, given, taken = path.places(send, recv)
                places = state.agree(headers, detail, mine, 0 if detail else found.digest)
            result = path.run(given, taken, places)
            return result if recv is ONE else recv
        finally:
            record.end()
    except (KeyboardInterrupt, SystemExit):
        state.interrupt()
        raise


def _room(elements: int, dtype: np.dtype | None) -> Any:
    """A new array, or ``NEW`` if there is no memory for it, which all ranks are to hear of."""
    try:
        return np.empty(elements, dtype)
    except MemoryError:
        return NEW


def _understood(
    comm: MPI.Intracomm,
    row: Collective,
    send: Any,
    recv: Any,
    op: Any,
    root: Any,
    counts: Any,
    options: Options,
    level: str,
    stream: Any,
    method: bool,
    key: Any,
) -> Any:
    """Run a call that is not in the cache, and put it there if it is of one of the forms that are."""

    def calls(state: State) -> list[Request | Raw]:
        first = partial(native_first, state, row)
        return understand(Asked(comm, row, send, recv, op, root, counts, options, stream, method, first))

    def remember(state: State, path: Path, request: Request) -> None:
        if key is not None:
            _remember(state, key, send, recv, op, path, request)

    name = (
        f"{row.name}_shared"
        if recv is ONE
        else f"{row.name}v"
        if counts is VECTORS or isinstance(counts, Lengths)
        else row.name
    )
    return together(comm, level, name, send if recv is None or isinstance(recv, Marker) else recv, calls, remember)


def together(
    comm: MPI.Intracomm,
    check: str | None,
    name: str,
    x: Any,
    calls: Callable[[State], list[Any]],
    remember: Callable[[State, Path, Request], None] | None = None,
) -> Any:
    """Make ``calls``, once all ranks are seen to make the same; what they raise on this rank, others hear of.

    ``x`` is the array whose order of memory is compared in full.  Returns what the last call receives, or returns.
    """
    check_comm(comm)
    with whole(comm):
        state = state_of(comm)  # first: how to go about it depends on what ranks share
        level = level_of(comm, check)
        made: list[Any] = []
        paths: list[Path | Raw] = []
        error: Exception | None = None
        try:
            check_level(level)
            made = calls(state)
            paths = [one if isinstance(one, Raw) else decide(state, one) for one in made]
        except Exception as raised:
            error = raised
        headers: Headers = tuple([path.header for path in paths]) if error is None else f"{name} refused, {error}"
        compares = level != "off" and state.p > 1
        mine: tuple[int, ...] = ()
        if state.p > 1:  # else it waits for nobody
            number = state.agreement.counter.calls + 1 if compares else 0
            record.begin(record.Entry(headers, state.name, state.world, number))
        given = taken = places = None
        done = False
        one = paths[0] if len(paths) == 1 and error is None else None
        if isinstance(one, Path) and one.at_once is not None:
            detail = (order_of(x),) if level == "full" else None
            request = made[0]
            given = request.recv if request.send is None else request.send
            state.at_once(one, headers, detail, compares, given, request.recv)
            done = True
        elif compares:
            detail = (order_of(x),) if level == "full" else None
            if isinstance(one, Path) and one.places is not None:
                mine, given, taken = one.places(made[0].send, made[0].recv)
            try:
                places = state.agree(headers, detail, mine)
            except MismatchError as mismatch:
                if error is None:
                    raise
                raise error from mismatch  # its own, and who else is concerned
        if error is not None:
            raise error
        state.last = tuple([path for path in paths if isinstance(path, Path)])
        result = None
        for path, request in zip(paths, made, strict=True):
            if isinstance(path, Raw):
                result = path.do()
            elif done:
                result = _delivered(request, request.recv)
            elif mine:
                result = run(path, request, given, taken, places)
            else:
                result = run(path, request, request.send, request.recv, None)
        if remember is not None and len(made) == 1 and isinstance(paths[0], Path):
            remember(state, paths[0], made[0])
        return result


def run(path: Path, request: Request, send: Any, recv: Any, places: list[list[int]] | None) -> Any:
    """Run a request, and bring the result to where it is wanted."""
    return _delivered(request, path.run(send, recv, places))


def _delivered(request: Request, result: Any) -> Any:
    """Bring a result to where it is wanted, and return what the call does."""
    if request.deliver is not None:
        request.deliver()
    return result if request.result is None else request.result


def _remember(state: State, key: Any, send: Any, recv: Any, op: Any, path: Path, request: Request) -> None:
    """Keep what was decided, if another call with such arguments needs nothing else."""
    arrays = [x for x in (send, recv) if isinstance(x, np.ndarray)]
    copied = request.row.reduces and request.row.receives_part and len(arrays) < 2 and recv is not NEW
    if request.on_gpu or request.deliver is not None or copied:
        return
    if not all(x.dtype in PLAIN or (is_half(x.dtype) and path.native is None) for x in arrays):
        return
    if len(state.decided) >= KEPT:
        del state.decided[next(iter(state.decided))]
    headers = (path.header,)
    state.decided[key] = Decided(
        (path,),
        path.native,
        headers,
        digest_of(headers),
        None if isinstance(op, str) else op,
        not request.operation.predefined,
        request.result.size if recv is NEW else 0,
        path.native is not None and request.operation.predefined and request.nbytes <= BRIEF,
        request.operation,
    )
    _learn(state, key, op, state.decided[key])


def _learn(state: State, key: Any, op: Any, found: Decided) -> None:
    """Have the compiled part make such calls from now on, if it can."""
    row, _, dtype, size, form, method, algorithm, deterministic, rest = key
    usual = algorithm == "auto" and rest is None and form in (None, size) and dtype.isnative
    if usual and (found.paths[0].at_once is not None or state.p == 1):
        asked = row, method, op, dtype, size, form is None, bool(deterministic)
        state.node.learn(asked, found.operation, found.digest, found.headers, found.paths)


def last(comm: MPI.Intracomm) -> Account:
    """What the latest collective on ``comm`` did: the algorithm, and what this rank sent.  Not a collective call."""
    state = find_state(comm)
    return total([path.account() for path in state.last]) if state and state.last else Account(NATIVE, None, None)


def account(
    x: Any,
    comm: MPI.Intracomm,
    algorithm: str = "auto",
    *,
    op: str | MPI.Op = "sum",
    deterministic: bool | None = None,
) -> Account:
    """Return what an ``allreduce`` with these arguments does, without doing it.  Not a collective call.

    Nothing can be known of native calls.  In shared memory nothing is sent; what is sent between nodes, and how arrays
    in the memory of GPUs travel, is known after the first such call.

    Parameters
    ----------
    x, comm, algorithm, op, deterministic
        As for ``mpicoll.allreduce``; ``x`` is not changed.

    Returns
    -------
    An ``Account``: the algorithm by name, and the bytes and messages that this rank sends, ``None`` where they are not
    known.

    Raises
    ------
    ValueError
        For a communicator on which there was no call yet, if it is no ``mpicoll.Comm``.
    TypeError, ValueError
        As ``mpicoll.allreduce``.
    """
    check_comm(comm)
    state = find_state(comm)
    if state is None:
        raise ValueError("account: expected a mpicoll.Comm, or a communicator on which there was a call")
    ordered = getattr(comm, "deterministic", False) if deterministic is None else deterministic
    options = Options(algorithm, ordered)
    asked = Asked(comm, ALLREDUCE, MPI.IN_PLACE, x, op, None, None, options, None, False, lambda nbytes: True)
    return total([decide(state, one).account() for one in understand(asked) if isinstance(one, Request)])


def total(accounts: Sequence[Account]) -> Account:
    """The account of a call that is made of several."""
    for one in accounts:
        if one.bytes_sent is None:
            return one
    sent, messages = (sum(one[n] for one in accounts) for n in (1, 2))  # type: ignore[misc]
    return Account(", ".join(dict.fromkeys(one.algorithm for one in accounts)) or "native", sent, messages)
