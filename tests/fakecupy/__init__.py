"""A CuPy without a GPU, in which a mistake in the order of streams becomes a wrong number.

``with fakecupy.installed() as fake`` (or ``fake = fakecupy.install(monkeypatch)``) puts it where ``import cupy`` finds
it: names and arguments are those of CuPy 14.  ``python tests/fakecupy -m mpicoll train --device gpu`` runs a module
with it, in the mode of the environment variable ``FAKECUPY_MODE``, with ``FAKECUPY_DEVICES`` devices, after
``prepare(fake)`` of the module that ``FAKECUPY_WITH`` names, if it does (which adds kernels, for example).

Streams are queues of what is to be done.  When it is done is the mode:

* ``lazy``: at the last moment, when somebody waits for it.  Who reads without waiting reads what was there before.
* ``eager``: when it is put there.  What is put there too early takes effect too early.
* ``random``: any time in between; ``seed`` says which.

Memory of devices is host memory that other processes can map; pointers to it lead nowhere, so that whoever follows one
crashes.  New and freed memory holds bytes of 255: NaN, -1.  An array that is dropped while another stream still needs
it has them too, and so has page-locked memory from the moment on that nobody refers to it.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

from . import now
from .driver import Library, forget_driver
from .errors import CUDARuntimeError
from .fake import MODES, Fake

__all__ = ["MODES", "CUDARuntimeError", "Fake", "current", "install", "installed"]


def current() -> Fake:
    """The fake that is installed."""
    return now.fake


def install(
    monkeypatch: Any,
    mode: str = "lazy",
    devices: int = 1,
    gpus: tuple[int, ...] | None = None,
    nccl: Any = None,
    seed: int = 0,
) -> Fake:
    """Put a fake where CuPy would be, until pytest's ``monkeypatch`` takes it away again.

    A process sees ``devices`` GPUs; ``gpus`` says which ones of its node they are, so that those of two processes may
    differ.  Without any, the driver is missing.  ``nccl`` is the communicator of MPI by which NCCL is done.
    """
    now.fake = fake = Fake(mode, tuple(range(devices)) if gpus is None else tuple(gpus), nccl, seed)
    for name, module in fake.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    forget_driver()
    return fake


@contextlib.contextmanager
def installed(**arguments: Any) -> Iterator[Fake]:
    """A fake that is there as long as a ``with`` lasts; arguments are those of ``install``."""
    import pytest

    with pytest.MonkeyPatch.context() as monkeypatch:
        fake = install(monkeypatch, **arguments)
        try:
            yield fake
        finally:
            fake.uninstall()
