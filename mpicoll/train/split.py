"""Models that are split over ranks: layers in shards, stages of a pipeline.

A group of ranks holds a model: each parameter is on one of its ranks, and all of them see the same samples.  Different
groups see different samples; a strategy combines the gradients or models of ranks that hold the same part.

* Along ``tensor``, layers are cut (Megatron: Shoeybi et al. 2019).  A layer is cut by outputs, so that each rank
computes
  some of them; the next layer is cut by inputs, so that a rank needs only the inputs that it has.  The outputs of a
  layer cut by inputs are summed over ranks, and in the backward pass the gradient by the inputs of a layer cut by
  outputs.
* Along ``pipe``, each rank has a stage: consecutive layers.  Batches are cut into micro-batches, so that stages work at
  the same time; the order of their tasks is a schedule (see ``pipeline``).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..mpi.collectives import bcast
from ..mpi.gpu.array import in_host_memory
from ..pipeline import PIPELINES, Kind
from .flow import Flow
from .grid import Grid
from .group import Collectives, Spent
from .models import Batch, Layer, Layered, Sums, backward, classes_of, forward
from .optimizers import clip
from .pieces import check_shards, is_cut_by_inputs, piece_of, stages_of
from .readers.raw import share
from .sharded import SHARDED, Shard

if TYPE_CHECKING:
    from scipy.sparse import csr_array


class Split:
    """A rank's part of a model, which is a ``Model`` itself with the parameters of that part.

    All ranks of a group call ``loss_and_grad``, ``predict``, ``norm``, ``clip`` and ``whole`` together, the first two
    with the same samples, of which a rank needs ``own_features`` only.  Losses are those of the whole model, with the
    same bits on all ranks of the group.

    Along ``tensor``, layers 0, 2, 4, ... are cut by outputs and layers 1, 3, 5, ... by inputs; a model of one layer is
    cut by inputs, that is, by features.  Along ``pipe``, stages have about equal numbers of weights unless ``cuts``
    names the first layer of each stage after the first.  A batch is cut into ``micro`` micro-batches (by default the
    number of stages), which differ by at most one sample; their gradients are summed in order.  ``pipeline`` names a
    row of ``PIPELINES``.  With ``recompute`` a stage stores only the input of each micro-batch, and recomputes the
    rest.

    ``first`` is this rank's first layer; ``held`` the largest number of micro-batches whose activations it has held;
    ``spent`` the cost of communication about layers, losses and norms.  ``layout`` says how layers are cut: equal texts
    mean equal parts.

    On a GPU all arrays are CuPy's, except whole vectors and their parts, which are in host memory.
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
        self._beside, self._group = Collectives(grid.tensor, self.spent), Collectives(grid.group, self.spent)
        stages = stages_of(model, grid.sizes.pipe, cuts)
        check_shards(model, grid.sizes.tensor)
        self._everyones = [
            [piece_of(model, layer, shard, grid.sizes.tensor) for layer in stage]
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
        """Return this rank's part of the whole model's initial parameters."""
        return self.part(self.model.initial(rng, dtype))

    def loss_and_grad(self, params: np.ndarray, batch: Batch, grad: np.ndarray) -> Sums:
        """Return the summed loss and correct predictions, and write this part's gradient; collective in the group."""
        parts = micro_batches(len(batch.y), self.micro)
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
        """Return the predicted class of each sample; collective in the group."""
        parts, layers = micro_batches(x.shape[0], self.micro), self.layers(params)
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
        """Views of this rank's vector, which they cover, by the names of the model's tensors."""
        return {name: view for name, view in self._named(params) if view.size}

    # From this rank's part of a vector to the whole, and back.

    def own_features(self, x: "np.ndarray | csr_array") -> Any:
        """The features of samples that this rank needs: its shard, all, or none in later stages."""
        wanted = self._pieces[0].rows if self.is_first else slice(0, 0)
        if wanted == slice(0, x.shape[1]):
            return x
        return x[:, wanted].copy()  # the whole is to be forgotten

    def whole(self, array: np.ndarray) -> np.ndarray:
        """The array of the whole model, gathered along the last axis, in host memory; collective in the group."""
        return _by_rows(array, self._whole, self.model.size)

    def part(self, array: np.ndarray) -> np.ndarray:
        """This rank's part of an array of the whole model, which is cut along the last axis; a new array."""
        return _by_rows(array, self._part, self.size)

    def _whole(self, vector: np.ndarray) -> np.ndarray:
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
        own = in_host_memory(vector)
        sizes = self.grid.group.allgather(own.size)
        found = np.empty(sum(sizes), own.dtype)
        self.grid.group.Allgatherv(own, [found, sizes])
        return found

    def own(self, gathered: np.ndarray, size: int) -> np.ndarray:
        """This rank's vector, of that size, among those that are ``gathered``; collective in the group."""
        end = self.grid.group.scan(size)
        return gathered[end - size : end]

    def _part(self, whole: np.ndarray) -> np.ndarray:
        tensors = self.model.tensors(whole)
        return np.concatenate([view.ravel() for piece in self._pieces for view in piece.of(tensors)])

    def norm(self, grad: np.ndarray) -> float:
        """The Euclidean norm of the whole gradient; collective in the group."""
        square = np.square([clip(grad, inf)])  # which finds the norm of this part, and leaves it as it is
        return sqrt(self._group.allreduce(square)[0])

    def clip(self, grad: np.ndarray, limit: float) -> float:
        """Clip by the norm of the whole gradient, as ``optimizers.clip`` does; collective in the group."""
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
        """This rank's part of each layer that it has a part of."""
        views = [view for _, view in self._named(params)]
        return list(zip(views[::2], views[1::2], strict=True))

    # Communication in the group.

    def shard_of(self, outputs: np.ndarray) -> Shard | None:
        """The ``Shard`` of these outputs of the last layer; ``None`` if they are all outputs."""
        return Shard(outputs, self._shard, self._beside) if self._outputs_are_cut else None

    def complete_outputs(self, n: int, outputs: np.ndarray) -> None:
        """Sum the outputs of layer ``n`` over its shards, in place, if each has a part of the sums."""
        if is_cut_by_inputs(self.model, n):
            self._beside.allreduce(outputs)

    def complete_errors(self, n: int, error: np.ndarray) -> None:
        """Sum the gradient by the inputs of layer ``n`` over its shards, in place, if each has a part of the sums."""
        if not is_cut_by_inputs(self.model, n):
            self._beside.allreduce(error)

    def flow(self, parts: Sequence[slice], params: np.ndarray, kinds: Iterable[Kind]) -> Flow:
        """Messages between this stage and its neighbors, of these ``kinds``, for each of the ``parts`` of a batch."""
        lengths, widths = [part.stop - part.start for part in parts], {}
        if not self.is_first:
            widths[Kind.FORWARD] = self._shapes[0][0]
        if not self.is_last:
            widths[Kind.BACKWARD] = self._shapes[-2][1]
        shapes = {kind: [(n, widths[kind]) for n in lengths] for kind in kinds if kind in widths}
        return Flow(self.grid.pipe, params, shapes, self.spent)


class _Work:
    """One batch in this stage, cut into ``parts``; ``grad`` is written.

    ``held`` holds the activations of each micro-batch until its error arrives; ``sums`` of the last stage are the loss
    and the correct predictions.
    """

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
        """Compute micro-batch ``m`` forward: receive it from the stage before, and send it to the next."""
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
        """Compute micro-batch ``m`` backward: receive its error from the next stage, and send it to the one before."""
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
        """Return the inputs of layers and the outputs; in the last stage, not the outputs but their error."""
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


def micro_batches(samples: int, micro: int) -> list[slice]:
    """The ranges of micro-batches in a batch, none of them empty."""
    parts = min(micro, samples)
    return [share(samples, m, parts) for m in range(parts)]


def _by_rows(array: np.ndarray, convert: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
    """Return a new array by applying ``convert`` to each vector along the last axis; the vectors get that size."""
    rows = array.reshape(-1, array.shape[-1])
    found = np.empty((len(rows), size), array.dtype)
    for row, into in zip(rows, found, strict=True):
        into[:] = convert(row)
    return found.reshape(*array.shape[:-1], size)
