"""The paths of device arrays that do not go through host memory: which are available, and which one a call takes."""

from typing import Any

import numpy as np
from mpi4py import MPI

from ...collective import Collective
from ...tuning.rules import GPU_PATHS
from ..buffers import is_half
from ..operations import Operation
from ..request import Request
from ..shared import Node
from . import allocation, assignment, nccl
from .array import Array
from .aware import Aware, doubt
from .ipc import Ipc
from .nccl import Nccl

CALLS = 256
"""Kinds of calls whose path is noted."""

Facts = tuple[list[str], int, dict[str, str]]


class Devices:
    """What the ranks of a communicator can do on their GPUs; making it is a collective call."""

    def __init__(self, comm: MPI.Intracomm, node: Node, own: Facts) -> None:
        """``own`` are the ``facts`` of this rank."""
        found, device = comm.allgather(own), own[1]
        gpus, owned = [gpus for gpus, *_ in found], [gpus[number] for gpus, number, _ in found]
        why = _reasons([why for *_, why in found], owned, node)
        self._paths: dict[str, Ipc | Nccl | Aware] = {
            "ipc": Ipc(node, gpus, why["ipc"]),
            "nccl": Nccl(comm, device, why["nccl"]),
            "aware": Aware(comm, why["aware"]),
        }
        self.took: dict[Any, str] = {}
        """The path that the latest call of a kind took."""

    @property
    def why(self) -> dict[str, str]:
        """Why each path is unavailable, empty if it is available: equal on all ranks."""
        return {**{name: path.why for name, path in self._paths.items()}, "staged": ""}

    def paths(
        self, asked: str, row: Collective, operation: Operation, dtype: np.dtype, deterministic: bool
    ) -> list[str]:
        """The paths to try, in order; the last is always ``"staged"``.

        A collective call, which raises ``ValueError`` on all ranks if the one asked for is unavailable.
        """

        def refusal(path: str) -> str:
            differs = "" if path == "ipc" else _sums_otherwise(operation, dtype, deterministic)
            return differs or self._paths[path].refusal(row, operation, dtype)

        if asked == "auto":
            return [*(path for path in ("ipc", "nccl") if not refusal(path)), "staged"]
        if asked not in GPU_PATHS or asked == "staged":
            return ["staged"]
        if why := refusal(asked):
            raise ValueError(f"{asked} cannot do this {row.name} here: {why}")
        return [asked, "staged"]

    def run(self, path: str, request: Request) -> bool:
        """Run a request that is not empty; false, on all ranks, if its arrays cannot take this path, and nothing was
        done.  Only ``"aware"`` takes an array in host memory."""
        send, recv = request.send, request.recv
        if request.in_place and send is None and isinstance(recv, Array):
            send = recv.part(request.own.start, request.own.stop)
        return self._paths[path].run(request, send, recv)

    def remember(self, kind: Any, path: str) -> None:
        """Note the path that a call took."""
        if len(self.took) >= CALLS:
            self.took.clear()
        self.took[kind] = path

    def release(self) -> None:
        """Free what the paths have opened."""
        for path in self._paths.values():
            path.release()


def facts(device: int) -> Facts:
    """Facts of this rank: the identities of the GPUs it sees, its own one's number, and why paths are unavailable."""
    gpus = [assignment.identity(number)[1] for number in range(assignment.count())]
    return gpus, device, {"ipc": allocation.refusal(), "nccl": nccl.missing(), "aware": doubt()}


def _sums_otherwise(operation: Operation, dtype: np.dtype, deterministic: bool) -> str:
    """Why a library's reduction would have other results than ours; empty if it would not."""
    if deterministic and operation.reduces:
        return "it adds in an order of its own, and the call is to be deterministic"
    if is_half(dtype) and operation.widens:
        return f"it does not add {dtype} as float32: ask for wire='16bit', or another"
    return "" if operation.predefined else "the operation is no predefined one"


def _reasons(whys: list[dict[str, str]], owned: list[str], node: Node) -> dict[str, str]:
    """Why each path is unavailable to all ranks together."""
    if len(whys) == 1:
        return dict.fromkeys(whys[0], "one rank has nobody to share with: mpirun -n N")
    found = {}
    for path in whys[0]:
        reasons = [why[path] for why in whys]
        first = next(filter(None, reasons), "")
        found[path] = first if len({*reasons}) == 1 else f"{first} (rank {reasons.index(first)})"
    if not node.whole:
        found["ipc"] = "ranks are on several nodes"
    elif not node.shares:
        found["ipc"] = "ranks share no memory"
    if len({*owned}) < len(owned):
        found["nccl"] = "ranks share a GPU, and NCCL is for one rank on each"
    return found
