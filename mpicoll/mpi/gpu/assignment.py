"""Which GPU each rank has."""

from typing import NamedTuple

from mpi4py import MPI

from ...errors import UserError
from ..launch import node_of
from .array import cupy


class Gpu(NamedTuple):
    """The GPU of a rank: its number in this process, its name, what no other GPU has, and all ranks that have it."""

    number: int
    name: str
    identity: str
    bus: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.bus})"


def take(comm: MPI.Intracomm) -> Gpu:
    """Assign a GPU to every rank, and make it the current device: local rank modulo the GPUs that the process sees.

    Where the launcher lets each rank see one GPU of its own, it is that one.  Imports CuPy.  A collective call, which
    raises ``UserError`` on all ranks if some have no CuPy, or no GPU.
    """
    node = node_of(comm)
    local = node.rank
    node.Free()
    found, error = None, None
    try:
        found = _chosen(local)
    except UserError as raised:
        error = str(raised)
    everyone = comm.allgather((found, error))
    failed = [(rank, why) for rank, (_, why) in enumerate(everyone) if why]
    if failed:
        comm.Barrier()  # raise it together
        rank, why = failed[0]
        raise UserError(f"{why} (on rank {rank})" if rank else str(why))
    assert found is not None
    return found._replace(
        ranks=tuple(rank for rank, (other, _) in enumerate(everyone) if other.identity == found.identity)
    )


def _chosen(local: int) -> Gpu:
    try:
        import cupy as module
    except ImportError as error:
        raise UserError(
            f"a GPU needs CuPy, which cannot be imported ({error}): pip install 'mpicoll[cuda13]', or cuda12, for the "
            "driver that nvidia-smi shows"
        ) from None
    runtime = module.cuda.runtime
    try:
        number = local % max(runtime.getDeviceCount(), 1)
        module.cuda.Device(number).use()
        runtime.free(0)  # makes the context: now, and not in the middle of something
        name, unique, bus = identity(number)
    except runtime.CUDARuntimeError as error:
        raise UserError(f"there is no GPU to be used here ({error})") from None
    return Gpu(number, name, unique, bus, ())


def identity(number: int) -> tuple[str, str, str]:
    """The name of a device of this process, what no other GPU has, and its PCI address."""
    runtime = cupy().cuda.runtime
    properties, bus = runtime.getDeviceProperties(number), runtime.deviceGetPCIBusId(number)
    uuid = bytes(properties["uuid"]).hex()  # which CuPy cuts off at its first byte of 0
    return properties["name"].decode(), f"{MPI.Get_processor_name()} {bus} {uuid}", bus


def count() -> int:
    """The number of devices that this process sees."""
    return int(cupy().cuda.runtime.getDeviceCount())
