"""Models that are split over ranks: a grid of ranks, layers in shards, stages of a pipeline.

Each parameter is on one rank of the group that holds a model, and all of the group see the same samples.  Groups
differ in theirs: how ranks that hold the same part agree, be it by gradients or by models, is a strategy's affair.

* Along ``tensor``, layers are cut (Shoeybi et al. 2019, Megatron): by outputs, which leaves each rank with some of
  them, and the next one by inputs, so that a rank needs those which it has.  Ranks add up what comes out of a layer cut
  by inputs, and on the way back the gradient by the inputs of a layer cut by outputs.
* Along ``pipe``, each rank has a stage: layers that follow one another.  Batches are cut into micro-batches, so that
  stages need not wait for each other all the time; in which order they do them is a schedule (see ``pipeline``).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from math import gcd, inf, sqrt
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ..errors import UserError
from ..mpi import gpu, launch, record
from ..mpi.collectives import allgather, allreduce, bcast
from ..mpi.comm import Comm
from ..mpi.engine import last
from ..mpi.state import state_of
from ..pipeline import PIPELINES, Kind, cut
from ..schedule import chunk_start
from .formats import share
from .models import Batch, Layer, Layered, Loss, Sums, backward, classes_of, cross_entropy, forward, hinge, log_loss
from .optimizers import clip
from .sent import Sent, finished, gathering

if TYPE_CHECKING:
    from scipy.sparse import csr_array

EXAMPLE = "data=2,pipe=2,tensor=2"


class Sizes(NamedTuple):
    """How many ranks there are along each axis of a grid; or where in it a rank is."""

    data: int
    pipe: int
    tensor: int

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis, size in self._asdict().items() if size > 1]
        return ",".join(named) or "data=1"

    @property
    def group(self) -> int:
        """Over how many ranks a model is split."""
        return self.pipe * self.tensor


def sizes_of(text: str | None, ranks: int) -> Sizes:
    """Of the grid that ``text`` describes, such as ``data=2,pipe=2,tensor=2``, in any order; by default all is data.

    An axis that is left out is of one rank, ``data`` of as many as remain.  A ``UserError`` unless it is one of so many
    ``ranks``.
    """
    given: dict[str, int] = {}
    for part in (f"data={ranks}" if text is None else text).split(","):
        axis, _, number = (piece.strip() for piece in part.partition("="))
        if axis not in Sizes._fields:
            raise UserError(f"--grid has axes {', '.join(Sizes._fields)}, as {EXAMPLE}; got {axis!r}")
        if axis in given or not number.isdecimal() or int(number) < 1:
            raise UserError(f"--grid must give each axis at least 1 rank, and once, as {EXAMPLE}; got {text!r}")
        given[axis] = int(number)
    pipe, tensor = given.get("pipe", 1), given.get("tensor", 1)
    sizes = Sizes(given.get("data", max(ranks // (pipe * tensor), 1)), pipe, tensor)
    if sizes.data * sizes.group != ranks:
        shards = gcd(tensor, ranks)
        stages = gcd(pipe, ranks // shards)
        fits = Sizes(ranks // (shards * stages), stages, shards)
        raise UserError(
            f"--grid {text} is one of {sizes.data * sizes.group} rank(s), and there are {ranks}: take {fits}, or other "
            "axes with that product"
        )
    return sizes


class Grid:
    """The ranks of ``world`` as a grid of these ``sizes``; made by all of them together.

    ``at`` is where this rank is.  ``data``, ``pipe`` and ``tensor`` are the ranks beside it along each axis, and
    ``group`` those that hold a model together, stage by stage; each a communicator of its own.  Neighbors along
    ``tensor``, who have most to tell each other, are side by side in a node as far as there is room; then come those
    along ``data``, then those along ``pipe``.
    """

    def __init__(self, world: MPI.Intracomm, sizes: Sizes) -> None:
        self.world, self.sizes = world, sizes
        node = launch.node_of(world)
        nodes = world.allgather(node.bcast(world.rank))  # by the lowest rank there
        node.Free()
        place = sorted(range(world.size), key=lambda rank: (nodes[rank], rank)).index(world.rank)
        rest, tensor = divmod(place, sizes.tensor)
        pipe, data = divmod(rest, sizes.data)
        self.at = Sizes(data, pipe, tensor)

        def beside(color: int) -> Comm:
            made: Any = world.Split(color, place)
            return Comm(made, deterministic=True)

        self.data = beside(pipe * sizes.tensor + tensor)
        self.pipe = beside(data * sizes.tensor + tensor)
        self.tensor = beside(pipe * sizes.data + data)
        self.group = beside(data)

    @property
    def leads(self) -> bool:
        """Of its group, is this rank the one that speaks for it?"""
        return self.at.pipe == self.at.tensor == 0

    def free(self) -> None:
        """Give the communicators back; a collective call."""
        for comm in (self.data, self.pipe, self.tensor, self.group):
            comm.Free()


class Piece(NamedTuple):
    """Where in a layer's weight the part of a rank is, and in its bias, which may be elsewhere."""

    layer: int
    rows: slice
    columns: slice
    bias: slice

    def of(self, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Views: weight and bias."""
        weight, bias = tensors[f"layer{self.layer}.weight"], tensors[f"layer{self.layer}.bias"]
        return [weight[self.rows, self.columns], bias[self.bias]]


class Split:
    """A rank's part of a model, which is a ``Model`` itself: of the parameters that it has.

    All ranks of a group call ``loss_and_grad``, ``predict``, ``norm``, ``clip`` and ``whole`` together, the first two
    with the same samples, of which each needs no more than ``own_features``.  Losses are those of the whole model, the
    same bits on all ranks of the group.

    Layers, numbered from 0, are cut along ``tensor`` by outputs if their number is even, else by inputs; a model of one
    layer by inputs, that is, by features.  Along ``pipe`` stages are as even as can be, counting inputs times outputs,
    unless ``cuts`` name the first layer of each but the first.  Gradients of ``micro`` micro-batches, which differ by
    a sample at most, by default as many as there are stages, are added up in their order.  ``pipeline`` names a row of
    ``PIPELINES``.  With ``recompute`` a stage keeps only its input of each until it needs the rest.

    ``first`` is this rank's first layer; ``held`` of how many micro-batches it has held the activations at most; and
    ``spent`` what it took to tell each other about layers, losses and norms.  ``layout`` says how layers are cut, and
    is the same for the same parts.

    On a GPU all arrays are CuPy's, but for whole vectors, which are in host memory, as are parts of these.
    """

    def __init__(
        self,
        model: Layered,
        grid: Grid,
        *,
        cuts: Sequence[int] | None = None,
        micro: int | None = None,
        pipeline: str = "1f1b",
        recompute: bool = False,
    ) -> None:
        self.model, self.grid = model, grid
        self.micro = grid.sizes.pipe if micro is None else micro
        self.recompute, self.held, self.spent = recompute, 0, Spent()
        self._beside, self._group = _Talk(grid.tensor, self.spent), _Talk(grid.group, self.spent)
        stages = _stages(model, grid.sizes.pipe, cuts)
        _check_shards(model, grid.sizes.tensor)
        self._everyones = [
            [_piece(model, layer, shard, grid.sizes.tensor) for layer in stage]
            for stage in stages
            for shard in range(grid.sizes.tensor)
        ]
        self.layout = ",".join(f"{stage[0]}-{stage[-1]}" for stage in stages) + f" in {grid.sizes.tensor}"
        self._pieces = self._everyones[grid.group.rank]
        self.first = self._pieces[0].layer
        whole = model.tensors(np.empty(model.size, np.bool_))  # of which only shapes are looked at
        self._shapes = [view.shape for piece in self._pieces for view in piece.of(whole)]
        self.size = sum(view.size for piece in self._pieces for view in piece.of(whole))
        self.is_first, self.is_last = grid.at.pipe == 0, grid.at.pipe == grid.sizes.pipe - 1
        self._last_rank = (grid.sizes.pipe - 1) * grid.sizes.tensor  # of the group, one that knows the outputs
        self._shard = self._pieces[-1].columns  # of the outputs, where this is the last stage
        self._outputs_are_cut = self.is_last and self._shard != slice(0, model.sizes[-1])
        if self._outputs_are_cut and model.loss not in SHARDED:
            raise UserError("--grid tensor cuts the outputs, and this loss may need all: take a layer more, or fewer")
        row = PIPELINES[pipeline]
        self._tasks = cache(lambda micro: tuple(row.generate(grid.at.pipe, grid.sizes.pipe, micro)))

    # What a model must offer.

    def initial(self, rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
        """See ``Model``: this rank's part of what the whole model would begin with."""
        return self.part(self.model.initial(rng, dtype))

    def loss_and_grad(self, params: np.ndarray, batch: Batch, grad: np.ndarray) -> Sums:
        """See ``Model``; collective in the group."""
        parts = _cut(len(batch.y), self.micro)
        work = _Work(self, params, batch, grad, parts)
        for kind, m in self._tasks(len(parts)):
            if kind is Kind.FORWARD:
                work.forward(m)
                self.held = max(self.held, len(work.held))
            else:
                work.backward(m)
        work.flow.end()
        sums = work.sums if self.grid.group.rank == self._last_rank else np.zeros_like(work.sums)
        loss, correct = self._group.allreduce(sums)
        return Sums(loss, correct)

    @np.errstate(all="ignore")  # an overflow is an infinite output
    def predict(self, params: np.ndarray, x: "np.ndarray | csr_array") -> np.ndarray:
        """See ``Model``; collective in the group."""
        parts, layers = _cut(x.shape[0], self.micro), self.layers(params)
        flow = self.flow(parts, params, [Kind.FORWARD])
        classes = np.zeros(x.shape[0], np.int64, like=params)
        for part in parts:
            inputs = x[part] if self.is_first else flow.take(Kind.FORWARD)
            outputs = forward(layers, inputs, self.first, self.complete_outputs)[-1]
            if self.is_last:
                shard = self.shard_of(outputs)
                classes[part] = shard.classes if shard else classes_of(outputs)
            else:
                flow.send(Kind.FORWARD, outputs)
        flow.end()
        bcast(classes, self.grid.group, self._last_rank)
        return classes

    def tensors(self, params: np.ndarray) -> dict[str, np.ndarray]:
        """As those of the model: views of this rank's vector, which they cover."""
        return {name: view for name, view in self._named(params) if view.size}

    # From this rank's part of a vector to the whole, and back.

    def own_features(self, x: "np.ndarray | csr_array") -> Any:
        """Of samples, the features that this rank needs: its own, all, or none in later stages."""
        wanted = self._pieces[0].rows if self.is_first else slice(0, 0)
        if wanted == slice(0, x.shape[1]):
            return x
        return x[:, wanted].copy()  # the whole is to be forgotten

    def whole(self, vector: np.ndarray) -> np.ndarray:
        """The vector of the whole model, of this rank's and the others', a new array; collective in the group."""
        gathered = self.gathered(vector)
        whole, at = np.empty_like(gathered), 0
        tensors = self.model.tensors(whole)
        for piece in (piece for pieces in self._everyones for piece in pieces):
            for view in piece.of(tensors):
                view[...] = gathered[at : at + view.size].reshape(view.shape)
                at += view.size
        return whole

    def gathered(self, vector: np.ndarray) -> np.ndarray:
        """The vectors of all ranks of the group, of any lengths, one after another; collective in the group."""
        own = gpu.in_host_memory(vector)
        sizes = self.grid.group.allgather(own.size)
        found = np.empty(sum(sizes), own.dtype)
        self.grid.group.Allgatherv(own, [found, sizes])
        return found

    def own(self, gathered: np.ndarray, size: int) -> np.ndarray:
        """The opposite: this rank's, of that size; collective in the group."""
        end = self.grid.group.scan(size)
        return gathered[end - size : end]

    def part(self, whole: np.ndarray) -> np.ndarray:
        """This rank's part of a vector of the whole model, a new array."""
        tensors = self.model.tensors(whole)
        return np.concatenate([view.ravel() for piece in self._pieces for view in piece.of(tensors)])

    def norm(self, grad: np.ndarray) -> float:
        """Of the whole gradient, the root of its sum of squares; collective in the group."""
        square = np.square([clip(grad, inf)])  # which finds the norm of this part, and leaves it as it is
        return sqrt(self._group.allreduce(square)[0])

    def clip(self, grad: np.ndarray, limit: float) -> float:
        """As ``optimizers.clip``, by the norm of the whole gradient; collective in the group."""
        norm = self.norm(grad)
        if limit < norm < inf:
            grad *= limit / norm
        return norm

    def _named(self, params: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        at, names = 0, (f"layer{piece.layer}.{what}" for piece in self._pieces for what in ("weight", "bias"))
        for name, shape in zip(names, self._shapes, strict=True):
            size = int(np.prod(shape))
            yield name, params[at : at + size].reshape(shape)
            at += size

    def layers(self, params: np.ndarray) -> list[Layer]:
        """This rank's part of each that it has a part of."""
        views = [view for _, view in self._named(params)]
        return list(zip(views[::2], views[1::2], strict=True))

    # What ranks tell each other.

    def shard_of(self, outputs: np.ndarray) -> "_Shard | None":
        """Of the last layer's outputs, unless they are all of them."""
        return _Shard(outputs, self._shard, self._beside) if self._outputs_are_cut else None

    def complete_outputs(self, n: int, outputs: np.ndarray) -> None:
        """Of layer ``n``."""
        if _is_cut_by_inputs(self.model, n):
            self._beside.allreduce(outputs)

    def complete_errors(self, n: int, error: np.ndarray) -> None:
        """By the inputs of layer ``n``."""
        if not _is_cut_by_inputs(self.model, n):
            self._beside.allreduce(error)

    def flow(self, parts: Sequence[slice], params: np.ndarray, kinds: Iterable[Kind]) -> "_Flow":
        """Between this stage and its neighbors: which kinds of messages, about which parts of a batch."""
        lengths, widths = [part.stop - part.start for part in parts], {}
        if not self.is_first:
            widths[Kind.FORWARD] = self._shapes[0][0]
        if not self.is_last:
            widths[Kind.BACKWARD] = self._shapes[-2][1]
        shapes = {kind: [(n, widths[kind]) for n in lengths] for kind in kinds if kind in widths}
        return _Flow(self.grid.pipe, params, shapes, self.spent)


class _Work:
    """One batch in this stage, cut into ``parts``: what is ``held`` of each until it goes back, and, in the last stage,
    ``sums``, the loss and the correct predictions.  ``grad`` is written."""

    def __init__(
        self, split: Split, params: np.ndarray, batch: Batch, grad: np.ndarray, parts: Sequence[slice]
    ) -> None:
        self.split, self.batch, self.parts, self.grad = split, batch, parts, grad
        self.layers, self.grads = split.layers(params), split.layers(grad)
        self.more = np.empty_like(grad) if len(parts) > 1 else grad  # of a micro-batch, to be added
        self.flow, self.sums = split.flow(parts, params, Kind), np.zeros(2, like=params)
        self.held: dict[int, tuple[list[Any], Any]] = {}  # inputs of layers, gradient by the outputs
        if not parts:
            grad[:] = 0

    def forward(self, m: int) -> None:
        """Micro-batch ``m`` comes from the stage before, and goes to the next."""
        split = self.split
        x = self.batch.x[self.parts[m]] if split.is_first else self.flow.take(Kind.FORWARD)
        self.held[m] = [x], None
        if split.recompute and split.is_last:  # which has nobody to send outputs to
            return
        inputs, result = self._ahead(m, x)
        if not split.is_last:
            self.flow.send(Kind.FORWARD, result)
        if not split.recompute:
            self.held[m] = inputs, result if split.is_last else None

    def backward(self, m: int) -> None:
        """The error of micro-batch ``m`` comes from the next stage, and goes to the one before."""
        split, (inputs, error) = self.split, self.held.pop(m)
        if split.recompute:
            inputs, error = self._ahead(m, inputs[0])
        errors = [error if split.is_last else self.flow.take(Kind.BACKWARD)]
        del error  # and so it is gone once a layer has gone back
        into = split.layers(self.more) if m else self.grads
        error = backward(self.layers, inputs, errors.pop(), into, split.first, split.complete_errors)
        if m:
            self.grad += self.more
        if not split.is_first:
            self.flow.send(Kind.BACKWARD, error)

    def _ahead(self, m: int, x: Any) -> tuple[list[Any], np.ndarray]:
        """The inputs of layers, and the outputs; in the last stage their error instead, the gradient of the loss by
        them."""
        values = forward(self.layers, x, self.split.first, self.split.complete_outputs)
        outputs = values.pop()
        if not self.split.is_last:
            return values, outputs
        y = self.batch.y[self.parts[m]]
        if shard := self.split.shard_of(outputs):
            classes, (loss, error) = shard.classes, SHARDED[self.split.model.loss](shard, y)
        else:
            classes, (loss, error) = classes_of(outputs), self.split.model.loss(outputs, y)
        self.sums[0] += loss
        self.sums[1] += np.count_nonzero(classes == y)
        return values, error


class Spent(Sent):
    """Seconds of a rank with others that hold the same model, those of them that it waited for messages from another
    stage, and what it sent."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.seconds = self.waiting = 0.0
        self.bytes_sent = self.messages = 0


class _Talk:
    """Collectives of the ranks in ``comm``, and what they cost is added to ``spent``.  One rank alone does nothing.

    On a GPU they begin when what is to be added up is there.
    """

    def __init__(self, comm: MPI.Intracomm, spent: Spent) -> None:
        self._comm, self._spent = comm, spent

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """The sums, in place."""
        return x if self._comm.size == 1 else self._timed("allreduce", x, lambda: allreduce(x, self._comm))

    def allgather(self, x: np.ndarray) -> np.ndarray:
        """Those of all ranks, in a new dimension in front."""
        if self._comm.size == 1:
            return x[np.newaxis]
        return self._timed("allgather", x, lambda: allgather(x, self._comm, algorithm=gathering(x)))

    def _timed(self, collective: str, x: np.ndarray, call: Callable[[], np.ndarray]) -> np.ndarray:
        finished(x)
        start = perf_counter()
        result = call()
        self._spent.seconds += perf_counter() - start
        key = self, collective, x.size, x.dtype, type(x)
        self._spent.accounted(key, lambda: last(self._comm))
        return result


class _Flow:
    """Messages between a stage and its neighbors in ``comm``: outputs come from the stage before and go to the next,
    errors the other way.

    ``shapes`` are those of the arrays that come, in the order of micro-batches; they are where ``like`` is, and of its
    dtype.  There is always a receive posted for the next one of a kind, and sends are waited for at the ``end`` only,
    so that no stage waits for another to receive.

    To and from a GPU they go by way of page-locked memory, which CuPy keeps for the next ones.  What is sent is waited
    for to be there, since MPI reads it; what comes is copied on the current stream, without waiting.
    """

    def __init__(
        self, comm: MPI.Intracomm, like: np.ndarray, shapes: dict[Kind, list[tuple[int, int]]], spent: Spent
    ) -> None:
        self._comm, self._like, self._spent = comm, like, spent
        self._on_host = isinstance(like, np.ndarray)
        self._from = {Kind.FORWARD: comm.rank - 1, Kind.BACKWARD: comm.rank + 1}
        self._to = {Kind.FORWARD: comm.rank + 1, Kind.BACKWARD: comm.rank - 1}
        self._shapes = {kind: iter(found) for kind, found in shapes.items()}
        self._coming: dict[Kind, tuple[np.ndarray, MPI.Request]] = {}
        self._going: list[tuple[np.ndarray, MPI.Request]] = []  # which must stay as they are until they have been sent
        for kind in shapes:
            self._post(kind)

    def _post(self, kind: Kind) -> None:
        shape = next(self._shapes[kind], None)
        if shape is not None:
            array = self._memory(shape)
            self._coming[kind] = array, self._comm.Irecv(array, self._from[kind], TAGS[kind])

    def _memory(self, shape: tuple[int, int]) -> np.ndarray:
        """Where MPI can write to."""
        dtype = self._like.dtype
        if self._on_host:
            return np.empty(shape, dtype)
        return gpu.pinned(shape[0] * shape[1] * dtype.itemsize).view(dtype).reshape(shape)

    def take(self, kind: Kind) -> np.ndarray:
        """The next one that comes."""
        array, request = self._coming.pop(kind)
        self._wait(request, f"waiting for {NAMES[kind]} of another stage")
        self._forget()
        self._post(kind)
        if self._on_host:
            return array
        there = np.empty(array.shape, array.dtype, like=self._like)
        gpu.deliver(array, gpu.Array(there))
        return there

    def send(self, kind: Kind, array: np.ndarray) -> None:
        """To the neighbor that this kind goes to; nobody may write to the array any more."""
        self._forget()
        if not array.flags.c_contiguous:  # as a sparse matrix times a dense one is on a GPU, where it comes by columns
            array = array.copy(order="C")
        host = array if self._on_host else gpu.staged(gpu.Array(array), load=True)
        self._going.append((host, self._comm.Isend(host, self._to[kind], TAGS[kind])))
        self._spent.count(host.nbytes, 1)

    def _forget(self) -> None:
        """What has been sent."""
        self._going = [sent for sent in self._going if not sent[1].Test()]

    def end(self) -> None:
        """Wait until all has been sent."""
        for _, request in self._going:
            self._wait(request, "waiting for another stage to receive")
        self._going.clear()

    def _wait(self, request: MPI.Request, what: str) -> None:
        if not request.Test():
            finished(self._like)  # while the GPU computes, it is not this that is waited for
            start = perf_counter()
            with record.during(what, state_of(self._comm)):
                while not request.Test():
                    os.sched_yield()  # MPI itself would not, and the other stage may need this core
            took = perf_counter() - start
            self._spent.seconds, self._spent.waiting = self._spent.seconds + took, self._spent.waiting + took


TAGS = {Kind.FORWARD: 1, Kind.BACKWARD: 2}
NAMES = {Kind.FORWARD: "outputs", Kind.BACKWARD: "errors"}


def _cut(samples: int, micro: int) -> list[slice]:
    """A batch as micro-batches, none of them empty."""
    parts = min(micro, samples)
    return [share(samples, m, parts) for m in range(parts)]


def _stages(model: Layered, stages: int, cuts: Sequence[int] | None) -> list[range]:
    """The layers of each."""
    layers = len(model.sizes) - 1
    if stages > layers:
        raise UserError(
            f"--grid pipe={stages} is more stages than the model has layers, {layers}: take pipe={layers}, or more "
            "hidden layers"
        )
    if cuts is None:
        return cut([inputs * outputs for inputs, outputs in pairwise(model.sizes)], stages)
    bounds = [0, *cuts, layers]
    if len(cuts) != stages - 1 or any(lo >= hi for lo, hi in pairwise(bounds)):
        raise UserError(
            f"--cut must name the first layer of each stage but the first, {stages - 1} number(s) from 1 to "
            f"{layers - 1}, ascending; got {','.join(map(str, cuts))}"
        )
    return [range(lo, hi) for lo, hi in pairwise(bounds)]


def _is_cut_by_inputs(model: Layered, layer: int) -> bool:
    return layer % 2 == 1 or len(model.sizes) == 2


def _check_shards(model: Layered, shards: int) -> None:
    """All of them must have something of every layer."""
    for layer, (inputs, outputs) in enumerate(pairwise(model.sizes)):
        by_inputs = _is_cut_by_inputs(model, layer)
        there, what = (inputs, "inputs") if by_inputs else (outputs, "outputs")
        if there < shards:
            of = "there are features" if by_inputs and not layer else f"layer {layer} has {what}"
            raise UserError(f"--grid tensor={shards} is more shards than {of}, {there}: take tensor={there} or fewer")


def _piece(model: Layered, layer: int, shard: int, shards: int) -> Piece:
    """What a rank has of a layer.  A bias that is added to sums over all shards is the first one's."""
    inputs, outputs = model.sizes[layer : layer + 2]

    def mine(width: int) -> slice:
        return slice(chunk_start(width, shard, shards), chunk_start(width, shard + 1, shards))

    if _is_cut_by_inputs(model, layer):
        return Piece(layer, mine(inputs), slice(0, outputs), slice(0, outputs if shard == 0 else 0))
    return Piece(layer, slice(0, inputs), mine(outputs), mine(outputs))


class _Shard:
    """Of ``outputs`` of samples those in ``shard``, the others being on other ranks; a collective call of these.

    ``highest`` is of each sample the highest of all outputs, and ``classes`` the first that has it.
    """

    def __init__(self, outputs: np.ndarray, shard: slice, ranks: _Talk) -> None:
        self.outputs, self.shard, self.ranks = outputs, shard, ranks
        own = np.stack([outputs.max(axis=1), shard.start + outputs.argmax(axis=1)]).astype(np.float64)
        everyones = ranks.allgather(own)  # shape (shards, 2, samples)
        samples = np.arange(len(outputs), like=outputs)
        self.highest, classes = everyones[everyones[:, 0].argmax(axis=0), :, samples].T
        self.classes = classes.astype(np.int64)


def _cross_entropy(shard: _Shard, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """See ``cross_entropy``."""
    outputs, own = shard.outputs, y - shard.shard.start
    outputs -= shard.highest[:, np.newaxis]
    error = np.exp(outputs)
    here = (own >= 0) & (own < outputs.shape[1])  # is the truth in this shard?
    truth = np.arange(len(y), like=y), np.where(here, own, 0)
    sums = np.stack([error.sum(axis=1), np.where(here, outputs[truth], 0)])
    normalizer, likelihood = shard.ranks.allreduce(sums)
    error /= normalizer[:, np.newaxis]
    error[truth] -= here
    return np.sum(np.log(normalizer) - likelihood, dtype=np.float64), error


def _separate(loss: Loss, shard: _Shard, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """Of a loss that is a sum over outputs, each for a class of its own."""
    own = y - shard.shard.start
    if shard.outputs.shape[1] == 1:  # which a loss would take for the one that stands for class 1 of two
        own = (own == 0).astype(y.dtype)
    part, error = loss(shard.outputs, own)
    return shard.ranks.allreduce(np.reshape(part, 1))[0], error


SHARDED: dict[Loss, Callable[[_Shard, np.ndarray], tuple[Any, np.ndarray]]] = {
    cross_entropy: _cross_entropy,
    log_loss: partial(_separate, log_loss),
    hinge: partial(_separate, hinge),
}
"""Losses where outputs are cut: from a shard to the loss over all shards, and the gradient by the outputs in this one.
Collective calls."""
