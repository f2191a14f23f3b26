"""Checks of settings: each is in its range, and all are compatible with each other, the data and the ranks."""

from collections.abc import Collection
from dataclasses import asdict

import numpy as np

from ..errors import UserError
from ..pipeline import PIPELINES
from ..tuning.rules import GPU_PATHS
from .batches import normalized
from .optimizers import OPTIMIZERS, SCHEDULES
from .settings import DEVICES, DTYPES, MOMENTA, Settings, expected, flag, shown
from .strategies import STRATEGIES
from .strategies.average import OUTER

CHOICES: dict[str, Collection[str]] = {
    "strategy": STRATEGIES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "outer": OUTER,
    "momenta": MOMENTA,
    "dtype": DTYPES,
    "device": DEVICES,
    "pipeline": PIPELINES,
}


def check(settings: Settings) -> None:
    """Raise a ``UserError`` for a setting that is out of range or belongs to another strategy than the chosen one."""
    for name, value in asdict(settings).items():
        if value is not None and (wanted := expected(name, value)) is not None:
            raise UserError(f"{flag(name)} must be {wanted}, got {shown(value)}")
    for name, known in CHOICES.items():
        value = getattr(settings, name)
        if value is not None and value not in known:
            raise UserError(f"{flag(name)} must be one of {', '.join(known)}, got {value!r}")
    for name in {name: None for strategy in STRATEGIES.values() for name in strategy.options}:
        if getattr(settings, name) is not None and name not in STRATEGIES[settings.strategy].options:
            owners = ", ".join(other for other, strategy in STRATEGIES.items() if name in strategy.options)
            raise UserError(f"{flag(name)} is not for the {settings.strategy} strategy, but for {owners}: leave it out")
    if settings.device != "gpu" and settings.algorithm in GPU_PATHS:
        raise UserError(f"--algorithm {settings.algorithm} is for --device gpu: take another, or that device")


def check_split(settings: Settings) -> None:
    """Raise a ``UserError`` for a setting that cannot be used with a split model."""
    if not STRATEGIES[settings.strategy].in_step:  # they do not see the same samples in the same step
        others = ", ".join(name for name, strategy in STRATEGIES.items() if strategy.in_step)
        raise UserError(f"--grid with pipe or tensor is not for the {settings.strategy} strategy, but for {others}")


def weights_of(settings: Settings, p: int, sharded: bool) -> list[float] | None:
    """The initial weights of the ``p`` ranks' shares of each batch, which add up to 1; ``None`` for equal shares."""
    given = settings.balance
    if given is None:
        return None
    for there, name, why in (
        (sharded, "--shards", "each rank has data of its own"),
        (settings.delays is not None, "--delays", "times are drawn"),
        (settings.staleness == "inf", "--staleness inf", "ranks take shares when they are ready"),
        (settings.strategy == "ad-psgd", "ad-psgd", "ranks take shares when they are ready"),
    ):
        if there:
            raise UserError(f"--balance has nothing to share out with {name}, where {why}: leave one of them out")
    if given == "auto":
        return p * [1 / p]
    try:
        weights = [float(weight) for weight in given.split(",")]
    except ValueError:
        weights = []
    if len(weights) != p or not all(0 < weight < np.inf for weight in weights):
        raise UserError(
            f"--balance must be auto, or {p} positive number(s), one for each rank, as 2,1,1; got {given!r}"
        )
    return normalized(weights)
