"""The interpreter of schedules: it runs all ranks in one process, on any values that can be combined.

On NumPy arrays it is the reference for tests of the MPI plan; on symbols it is half of the proof.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .schedule import Recv, Round, Schedule, ScheduleError, Send, Verb, chunk_start, is_final


def lockstep(schedule: Schedule) -> list[list[Round]]:
    """Return the rounds of all ranks, ``[t][rank]``.  Raises ``ScheduleError`` if their numbers of rounds differ."""
    by_rank = [list(schedule.rounds(rank)) for rank in range(schedule.p)]
    for rank, rounds in enumerate(by_rank):
        if len(rounds) != len(by_rank[0]):
            raise ScheduleError(f"{schedule}: rank {rank} has {len(rounds)} rounds, rank 0 has {len(by_rank[0])}")
    return [list(round_) for round_ in zip(*by_rank, strict=True)]


def span(schedule: Schedule, part: Send | Recv) -> str:
    """The chunks of a transfer as text, for error messages and pictures."""
    last = (part.hi - 1) % schedule.chunks
    return f"[{part.lo}]" if part.hi == part.lo + 1 else f"[{part.lo}..{last}]"


Held = list[list[Any]]  # what the ranks' vectors hold: [rank][chunk]


def interpret(
    schedule: Schedule,
    start: Sequence[Sequence[Any]],
    combine: Callable[[Any, Any], Any],
    copied: Callable[[int, Any], None] = lambda chunk, value: None,
) -> Held:
    """Run all ranks; ``start[rank][chunk]`` and the result are the contents of the ranks' vectors.

    ``combine(lower, higher)`` must return a new value, and so must ``*`` and ``+`` of values that are mixed.
    ``copied`` is called with each value that travels as final.  A receive without a send, or a send without a receive,
    is a deadlock (sends may be synchronous) and raises ``ScheduleError``; so does sending or reducing a chunk that is
    empty (``None``).
    """
    *_, end = interpret_rounds(schedule, start, combine, copied)
    return end


def interpret_rounds(
    schedule: Schedule,
    start: Sequence[Sequence[Any]],
    combine: Callable[[Any, Any], Any],
    copied: Callable[[int, Any], None] = lambda chunk, value: None,
) -> Iterator[Held]:
    """Yield the contents of the vectors at the beginning and after each round of ``interpret``."""
    chunks = schedule.chunks
    held = [[list(mine), *([None] * chunks for _ in range(schedule.scratch))] for mine in start]
    yield [list(buffers[0]) for buffers in held]
    for t, rounds in enumerate(lockstep(schedule)):
        mail: defaultdict[tuple[int, int], deque[tuple[Send, list[Any]]]] = defaultdict(deque)
        for rank, round_ in enumerate(rounds):
            for send in round_.sends:
                values = [held[rank][send.buffer][chunk % chunks] for chunk in range(send.lo, send.hi)]
                mail[rank, send.peer].append((send, values))
        for rank, round_ in enumerate(rounds):
            mixed: set[tuple[int, int]] = set()  # (buffer, chunk): what mixes next into it is added
            for recv in round_.recvs:
                where = f"{schedule}, round {t}: rank {rank}"
                arriving = mail[recv.peer, rank]
                if not arriving:
                    raise ScheduleError(
                        f"{where} waits for chunks {span(schedule, recv)} from rank {recv.peer} indefinitely: deadlock"
                    )
                send, values = arriving.popleft()
                if (send.lo, send.hi) != (recv.lo, recv.hi):
                    raise ScheduleError(
                        f"{where} expects chunks {span(schedule, recv)}, rank {recv.peer} sends {span(schedule, send)}"
                    )
                final = recv.peer != rank and is_final(recv)
                if send.final != final:
                    raise ScheduleError(
                        f"{where} takes chunks {span(schedule, recv)} as {'final' if final else 'partial'}, "
                        f"rank {recv.peer} sends them as {'final' if send.final else 'partial'}"
                    )
                mine = held[rank][recv.buffer]
                for chunk, value in zip(range(recv.lo, recv.hi), values, strict=True):
                    chunk %= chunks
                    if value is None or (recv.verb is not Verb.COPY and mine[chunk] is None):
                        raise ScheduleError(f"{where} gets chunk {chunk} from rank {recv.peer}: one side is empty")
                    if recv.verb is Verb.COPY:
                        mine[chunk] = value
                        if send.final:
                            copied(chunk, value)
                    elif recv.verb is Verb.MIX:
                        share = recv.weight * value
                        mine[chunk] = mine[chunk] + share if (recv.buffer, chunk) in mixed else share
                        mixed.add((recv.buffer, chunk))
                    elif recv.verb is Verb.REDUCE_BELOW:
                        mine[chunk] = combine(value, mine[chunk])
                    else:
                        mine[chunk] = combine(mine[chunk], value)
        for (src, dst), left in mail.items():
            if left:
                raise ScheduleError(
                    f"{schedule}, round {t}: rank {src} sends chunks {span(schedule, left[0][0])} to rank {dst}, "
                    "which does not receive them: deadlock"
                )
        yield [list(buffers[0]) for buffers in held]


def interpret_arrays(schedule: Schedule, vectors: Sequence[np.ndarray], combine: np.ufunc) -> list[np.ndarray]:
    """Run all ranks on one-dimensional arrays of equal length, cut into chunks as the MPI plan does; returns copies."""
    cuts = [chunk_start(len(vectors[0]), chunk, schedule.chunks) for chunk in range(1, schedule.chunks)]
    end = interpret(schedule, [np.split(vector, cuts) for vector in vectors], combine)
    return [np.concatenate(chunks) for chunks in end]
