"""Which part of a model's layers each rank has: stages along the axis ``pipe``, shards along ``tensor``."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..pipeline import cut
from ..schedule import chunk_start
from .models import Layered


class Piece(NamedTuple):
    """The part of a layer that a rank has: rows and columns of the weight, and elements of the bias, perhaps none."""

    layer: int
    rows: slice
    columns: slice
    bias: slice

    def of(self, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return views of this part of weight and bias, given the tensors of the whole model."""
        weight, bias = tensors[f"layer{self.layer}.weight"], tensors[f"layer{self.layer}.bias"]
        return [weight[self.rows, self.columns], bias[self.bias]]


def stages_of(model: Layered, stages: int, cuts: Sequence[int] | None) -> list[range]:
    """The layers of each stage: about equal numbers of weights, unless ``cuts`` names the first layers of stages."""
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


def is_cut_by_inputs(model: Layered, layer: int) -> bool:
    """Whether a layer is cut over shards by its inputs; else it is cut by its outputs."""
    return layer % 2 == 1 or len(model.sizes) == 2


def check_shards(model: Layered, shards: int) -> None:
    """Raise a ``UserError`` unless each of the ``shards`` gets a part of every layer."""
    for layer, (inputs, outputs) in enumerate(pairwise(model.sizes)):
        by_inputs = is_cut_by_inputs(model, layer)
        there, what = (inputs, "inputs") if by_inputs else (outputs, "outputs")
        if there < shards:
            of = "there are features" if by_inputs and not layer else f"layer {layer} has {what}"
            raise UserError(f"--grid tensor={shards} is more shards than {of}, {there}: take tensor={there} or fewer")


def piece_of(model: Layered, layer: int, shard: int, shards: int) -> Piece:
    """The part of a layer in a shard; the first shard holds the bias of a layer that is cut by inputs."""
    inputs, outputs = model.sizes[layer : layer + 2]

    def mine(width: int) -> slice:
        return slice(chunk_start(width, shard, shards), chunk_start(width, shard + 1, shards))

    if is_cut_by_inputs(model, layer):
        return Piece(layer, mine(inputs), slice(0, outputs), slice(0, outputs if shard == 0 else 0))
    return Piece(layer, slice(0, inputs), mine(outputs), mine(outputs))
