"""The pool that device memory is taken from, and other allocators."""

import contextlib
from collections.abc import Iterator
from typing import Any

from . import now
from .allocation import UNIT, Allocation
from .runtime import runtime
from .streams import Device, get_current_stream

CHUNK = 1 << 20  # what arrays of up to a quarter of it share


class PooledMemory:
    """A block; its memory is handed out again when it is dropped, to arrays of the same stream."""

    def __init__(self, allocation: Allocation, offset: int, size: int, stream: int) -> None:
        self.size, self.device_id, self.ptr = size, allocation.device, allocation.base + offset
        self._allocation, self._offset, self._stream, self._fake = allocation, offset, stream, now.fake
        allocation.blocks += 1

    def __del__(self) -> None:
        if self._fake is not now.fake or now.fake is None:
            return
        a, start = self._allocation, self._offset
        a.blocks -= 1
        if a.kind == "plain":
            now.fake.freed.setdefault((self.device_id, self._stream, self.size), []).append((a, start))
        elif a.blocks == 0:
            a.free()
        queue = now.fake.streams.get((self._stream, -1)) or now.fake.streams.get((self._stream, self.device_id))
        if queue:
            queue.put(lambda: a.memory[start : start + self.size].fill(255))


class MemoryPointer:
    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr = mem, (mem.ptr if mem else 0) + offset
        self.device_id = mem.device_id if mem else runtime.getDevice()

    def __add__(self, offset: int) -> "MemoryPointer":
        return MemoryPointer(self.mem, self.ptr - (self.mem.ptr if self.mem else 0) + offset)

    @property
    def device(self) -> Device:
        return Device(self.device_id)


class MemoryPool:
    def malloc(self, size: int) -> MemoryPointer:
        if not size:
            return MemoryPointer(None, 0)
        size, device, stream = -(-size // UNIT) * UNIT, runtime.getDevice(), get_current_stream().ptr
        now.fake.queue(stream)  # which must be there
        freed = now.fake.freed.get((device, stream, size))
        if freed:
            allocation, start = freed.pop()
            return MemoryPointer(PooledMemory(allocation, start, size, stream), 0)
        if size > CHUNK // 4:
            return MemoryPointer(PooledMemory(Allocation(size, device), 0, size, stream), 0)
        chunk = now.fake.chunks.get((device, stream))
        if chunk is None or chunk.used + size > chunk.size:
            chunk = now.fake.chunks[device, stream] = Allocation(CHUNK, device)
        chunk.used += size
        return MemoryPointer(PooledMemory(chunk, chunk.used - size, size, stream), 0)

    def free_all_blocks(self, stream: Any = None) -> None:
        for device in range(len(now.fake.gpus)):  # as freeing does
            for queue in [q for q in now.fake.queues if q.device == device]:
                queue.run()
        now.fake.freed.clear()
        now.fake.chunks = {key: chunk for key, chunk in now.fake.chunks.items() if chunk.blocks}
        for a in [a for a in now.fake.allocations.values() if not (a.blocks or a.opened)]:
            a.free()


default_pool = MemoryPool()


def malloc_managed(size: int) -> MemoryPointer:
    return _unpooled("managed", size)


def malloc_async(size: int) -> MemoryPointer:
    return _unpooled("async", size)


def _malloc(size: int) -> MemoryPointer:
    return _unpooled("raw", size)


def _unpooled(kind: str, size: int) -> MemoryPointer:
    size, device = -(-max(size, 1) // UNIT) * UNIT, runtime.getDevice()
    return MemoryPointer(PooledMemory(Allocation(size, device, kind), 0, size, get_current_stream().ptr), 0)


def alloc(size: int) -> MemoryPointer:
    return getattr(now.local(), "allocator", default_pool.malloc)(size)


def set_allocator(allocator: Any = None) -> None:
    now.local().allocator = allocator or _malloc


@contextlib.contextmanager
def using_allocator(allocator: Any = None) -> Iterator[None]:
    before = getattr(now.local(), "allocator", default_pool.malloc)
    set_allocator(allocator)
    try:
        yield
    finally:
        set_allocator(before)
