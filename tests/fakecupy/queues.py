"""Streams as queues of what is to be done, and when it is done."""

from collections import deque
from collections.abc import Callable

from . import now


class Queue:
    """What is to be done on a stream, in order."""

    def __init__(self, device: int, waits_for_null: bool) -> None:
        self.device, self.waits_for_null = device, waits_for_null
        self.works: deque[Callable[[], object]] = deque()
        self.put_in = self.done = 0
        now.fake.queues.append(self)

    def put(self, work: Callable[[], object]) -> None:
        with now.fake.lock:
            null = now.fake.streams.get((0, self.device))
            first = []
            if self is null:
                first = [q for q in now.fake.queues if q.device == self.device and q.waits_for_null]
            elif self.waits_for_null and null is not None:
                first = [null]
            waits = [(queue, queue.put_in) for queue in first if queue.works]
            self.works.append(lambda: (*(queue.run(upto) for queue, upto in waits), work()))
            self.put_in += 1
            if now.fake.mode == "eager":
                self.run()
            while now.fake.mode == "random" and now.fake.random.random() < 0.5:
                queue = now.fake.random.choice(now.fake.queues)
                queue.run(queue.done + 1)

    def run(self, upto: int | None = None) -> None:
        with now.fake.lock:
            while self.works and (upto is None or self.done < upto):
                self.done += 1
                self.works.popleft()()
