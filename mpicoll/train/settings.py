"""Settings of a run: the options of the command line and keys of configuration files, and their defaults."""

from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from sys import float_info
from typing import Any, get_args, get_type_hints

from ..errors import UserError
from ..files import to_json


@dataclass(frozen=True)
class Settings:
    """One training run.  ``None`` means: choose, or what the strategy has as its default."""

    # what is learned
    data: str = "digits"
    test: str | None = None
    test_share: float | None = None
    validation: float = 0.0
    shards: bool = False
    model: str = "mlp"
    hidden: str | None = None
    # how the model is split
    grid: str | None = None
    cut: str | None = None
    micro: int | None = None
    pipeline: str | None = None
    recompute: bool = False
    # how ranks agree; those of one strategy only are in its ``options``
    strategy: str = "sync"
    algorithm: str = "auto"
    balance: str | None = None
    every: int | None = None
    sync_epochs: int | None = None
    outer: str | None = None
    outer_lr: float | None = None
    outer_momentum: float | None = None
    graph: str | None = None
    mix_first: bool | None = None
    momenta: str | None = None
    compress: str | None = None
    staleness: str | None = None
    backups: int | None = None
    compensate: float | None = None
    slow_down: bool | None = None
    delays: int | None = None
    workers: int | None = None
    # how a rank steps
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float | None = None
    schedule: str = "constant"
    warmup: int = 0
    # for how long, and what else
    epochs: int = 30
    batch_size: int = 64
    patience: int | None = None
    checkpoint: int = 1
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    out: str | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of hidden layers; none for the model's own choice."""
        return _numbers(self.hidden)

    @property
    def cuts(self) -> tuple[int, ...] | None:
        """The first layers of stages; none to cut by cost."""
        return None if self.cut is None else _numbers(self.cut)


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in (text or "").split(",") if number)


LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "micro": 1,
    "every": 1,
    "sync_epochs": 0,
    "backups": 0,
    "compensate": 0,
    "delays": 0,
    "workers": 1,
    "warmup": 0,
    "patience": 1,
    "threads": 1,
    "checkpoint": 0,
    "seed": 0,
}
"""The smallest values of numbers."""

MOMENTA = ("keep", "average", "reset")
DTYPES = ("float32", "float64")
DEVICES = ("cpu", "gpu")

NOT_SAVED = ("out",)
"""Settings that a run does not write to its configuration file: another run is not to go to the same folder."""

OF_PIPELINES = ("cut", "micro", "pipeline", "recompute")
"""Settings that are for grids with stages only."""

MAY_CHANGE = ("epochs", "patience", "checkpoint", "threads", "data", "test", "graph", "balance", "grid", *OF_PIPELINES)
"""Settings that may change when a run is resumed: how long it is, where data are, and which rank has how much."""

LARGE = 2**64
"""Whole numbers are below this, so that a configuration file that holds them can be read again."""

NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@cache
def kind_of(name: str) -> type:
    """The type of a setting, if it is given."""
    hint = get_type_hints(Settings)[name]
    return (get_args(hint) or (hint,))[0]


def expected(name: str, value: Any) -> str | None:
    """What a setting must be, if ``value`` is not that; ``None`` if it will do.  Its type, and how large a number."""
    kind, least = kind_of(name), LEAST.get(name)
    accepted: Any = {int: Integral, float: Real}.get(kind, kind)
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool) or (kind is str and "\0" in value):
        return NAMES[kind]
    if kind is int and value >= LARGE:
        return "below 2^64"
    if kind is float and not abs(value) <= float_info.max:
        return "finite"
    return f"at least {least}" if least is not None and value < least else None


def shown(value: Any) -> str:
    """A value in an error, cut short."""
    try:
        return repr(value)[:40]
    except ValueError:  # Python does not print these
        return "one of thousands of digits"


def flag(name: str) -> str:
    """The option of the command line for a setting."""
    return "--" + name.replace("_", "-")


def read_settings(path: Path) -> dict[str, Any]:
    """The keys and values of a TOML file; a ``UserError`` if it cannot be read, or names what there is not."""
    import tomllib
    from difflib import get_close_matches

    try:
        given = tomllib.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))  # paths may be no text
    except OSError as error:
        raise UserError(f"configuration {str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets, among others
        raise UserError(f"configuration {str(path)!r} is not TOML: {error}") from error
    known = [field.name for field in fields(Settings)]
    settings: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise UserError(f"configuration {str(path)!r} has an unknown key {key!r}: {hint}")
        if name in settings:
            raise UserError(f"configuration {str(path)!r} has {name!r} twice, with - and with _: leave one of them out")
        kind = kind_of(name)
        value = str(value) if kind is str and type(value) is int else value
        if (wanted := expected(name, value)) is not None:
            raise UserError(f"configuration {str(path)!r}: {key} must be {wanted}, got {shown(value)}")
        settings[name] = kind(value)
    return settings


def written(settings: Settings) -> str:
    """The text of a TOML file from which ``read_settings`` reads these settings."""
    named = [(field.name, getattr(settings, field.name)) for field in fields(Settings) if field.name not in NOT_SAVED]
    # Of a text, a finite number or a truth value JSON is TOML too, but for one character.
    lines = (f"{name} = {to_json(value, ensure_ascii=False)}\n" for name, value in named if value is not None)
    return "".join(lines).replace("\x7f", "\\u007f")
