"""What a run is told; the command line's options, and their defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """One training run.  ``batch_size`` is global; ``out`` and ``threads`` of ``None`` mean: choose."""

    data: str = "digits"
    model: str = "mlp"
    strategy: str = "sync"
    algorithm: str = "auto"
    epochs: int = 30
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    seed: int = 0
    dtype: str = "float32"
    threads: int | None = None
    out: str | None = None
