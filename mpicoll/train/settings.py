"""The settings of a run: options of the command line, keys of configuration files, and their defaults."""

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
    """The settings of one training run: the options of ``mpicoll train``, and the keys of its configuration file.

    ``None`` means that the option was not given: mpicoll chooses, or the strategy's default applies.  Settings that
    belong to one strategy only are refused with another one.

    Parameters
    ----------
    data
        Source of the samples: ``"digits"``, ``"fashion-mnist"``, ``"powerlaw[:SAMPLESxFEATURES[:NONZEROS]]"``, or the
        path of an .npz, csv or svmlight file, or of a folder of .npy or IDX files.
    test
        Path of a file with the test set.  By default the test set that the data bring, else ``test_share``.
    test_share
        Share of the samples to hold out as the test set, from 0 to below 1; 0.2 by default.
    validation
        Share of the training samples to hold out as the validation set, from 0 to below 1.
    shards
        Whether each rank reads and holds its own part of the data only.
    model
        Name of a row of ``models.MODELS``.
    hidden
        Widths of the hidden layers of ``"mlp"``, separated by commas; ``"256"`` by default.
    grid
        Sizes of the grid of ranks, for example ``"data=2,pipe=2,tensor=2"``; by default all ranks are along ``data``.
    cut
        First layer, counted from 0, of each stage after the first, separated by commas; by default stages are of about
        equal cost.
    micro
        Micro-batches per batch of a group, at least 1; by default the number of stages.
    pipeline
        Name of a row of ``pipeline.PIPELINES``; ``"1f1b"`` by default.
    recompute
        Whether stages store their inputs only and recompute activations.
    strategy
        Name of a row of ``strategies.STRATEGIES``: how ranks combine gradients or models.
    algorithm
        Allreduce algorithm, or a path for arrays on GPUs; ``"auto"`` sums in the canonical order.
    balance
        ``"auto"`` for shares of batches by measured speed, or a positive weight for each rank, separated by commas; by
        default shares are equal.
    every
        ``average``: steps between two averages of the models, at least 1; 8 by default.
    sync_epochs
        ``average``: number of synchronous epochs at the start.
    outer, outer_lr, outer_momentum
        ``average``: the outer optimizer, a row of ``average.OUTER``, its learning rate (above 0) and its momentum (from
        0 to below 1).
    graph
        ``gossip``, ``ad-psgd``: name of a graph (see ``mpicoll.graph``), or path of an .npy file with mixing matrices.
    mix_first
        ``gossip``: whether to mix before the optimizer's step.
    momenta
        ``average``, ``butterfly``, ``gossip``: what happens to the optimizer's state when models are combined, one of
        ``MOMENTA``.
    compress
        Compression of what is sent: ``"16bit"``, ``"sign"``, ``"topk:SHARE"`` or ``"powersgd:RANK"``; not with
        ``ad-psgd``.
    staleness
        ``async``: number of steps that a rank may be ahead of another, or ``"inf"``; 4 by default.
    backups
        ``async`` with staleness 0: number of gradients of a step that are not waited for.
    compensate
        ``async``: factor of the delay compensation (DC-ASGD), 0 or more.
    slow_down
        ``async``: whether to divide the learning rate of a gradient by 1 + its staleness.
    delays
        ``async``, ``ad-psgd``: seed of a simulation with delays drawn at random, which is reproducible.
    workers
        ``async`` with ``delays``: number of simulated workers; by default the number of ranks.
    optimizer
        Name of a row of ``optimizers.OPTIMIZERS``.
    lr, momentum, beta2, weight_decay
        The learning rate (above 0) and the other numbers of the optimizer, as PyTorch defines them.
    clip
        L2 norm to which gradients are clipped, above 0; by default they are not.
    schedule
        Name of a row of ``optimizers.SCHEDULES``: the learning rate over the whole run.
    warmup
        Steps in which the learning rate grows linearly to its full value.
    epochs
        Passes over the training set, at least 1.
    batch_size
        Samples of a step on all ranks together, at least 1.
    patience
        Epochs without a better validation loss after which training stops; by default it does not.
    checkpoint
        Epochs between two checkpoints; 0 for none.
    seed
        Seed of the initial parameters, the order of samples, and the sets held out, below 2^64.
    dtype
        Type of parameters and data, one of ``DTYPES``.
    device
        Where parameters and data are and are computed with, one of ``DEVICES``.
    threads
        BLAS threads per rank; by default its share of the node's cores.
    out
        Output folder, which must be new or empty; by default a new one under ``runs/``.

    Nothing is checked when settings are made: ``checks.check`` raises ``UserError`` for those that cannot be used.
    """

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
    # the strategy; settings of one strategy only are in its ``options``
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
        """The widths of the hidden layers; empty if the model is to choose them."""
        return _numbers(self.hidden)

    @property
    def cuts(self) -> tuple[int, ...] | None:
        """The first layer of each stage after the first; ``None`` if stages are to be of about equal cost."""
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
"""The smallest allowed value of each setting that is a whole number."""

MOMENTA = ("keep", "average", "reset")
DTYPES = ("float32", "float64")
DEVICES = ("cpu", "gpu")

NOT_SAVED = ("out",)
"""Settings that a run does not write to its configuration file: another run must not use the same folder."""

OF_PIPELINES = ("cut", "micro", "pipeline", "recompute")
"""Settings that are for grids with stages only."""

MAY_CHANGE = ("epochs", "patience", "checkpoint", "threads", "data", "test", "graph", "balance", "grid", *OF_PIPELINES)
"""Settings that may change when a run is resumed: its length, the places of data, and what each rank holds."""

LARGE = 2**64
"""Whole numbers are below this, so that a configuration file that holds them can be read again."""

NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@cache
def kind_of(name: str) -> type:
    """The type of a setting's value, ``None`` aside."""
    hint = get_type_hints(Settings)[name]
    return (get_args(hint) or (hint,))[0]


def expected(name: str, value: Any) -> str | None:
    """What a setting must be, for an error text; ``None`` if ``value`` has the right type and, if a number, range."""
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
    """A value for an error text, at most 40 characters."""
    try:
        return repr(value)[:40]
    except ValueError:  # Python does not print these
        return "one of thousands of digits"


def flag(name: str) -> str:
    """The option of the command line for a setting."""
    return "--" + name.replace("_", "-")


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a TOML file.

    Raises ``UserError`` if the file cannot be read, is not TOML, or has an unknown key, a key twice, or a wrong value.
    """
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
    """Return these settings as the text of a TOML file, which ``read_settings`` can read."""
    named = [(field.name, getattr(settings, field.name)) for field in fields(Settings) if field.name not in NOT_SAVED]
    # Of a text, a finite number or a truth value JSON is TOML too, but for one character.
    lines = (f"{name} = {to_json(value, ensure_ascii=False)}\n" for name, value in named if value is not None)
    return "".join(lines).replace("\x7f", "\\u007f")
