"""The files of a run: written whole or not at all, in formats that hold data and no code."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .data import Scaling
from .models import MODELS, Layered

FORMAT = "mpicoll-model-1"
MODEL, METRICS, SUMMARY = "model.safetensors", "metrics.jsonl", "summary.json"


def check_output(folder: Path) -> None:
    """A ``UserError`` unless a run can be written to ``folder``, which must not exist or be empty.

    Leaves nothing behind.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "already holds files" if folder.is_dir() else "is a file"
            raise UserError(f"output folder {str(folder)!r} {what}; name another one with --out")
        real = Path(os.path.realpath(folder))
        there = next(place for place in (real, *real.parents) if place.exists())
        os.rmdir(tempfile.mkdtemp(prefix=".mpicoll-", dir=there))
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"output folder {str(folder)!r} cannot be written ({error.strerror}); name another one with --out")


def write_run(
    folder: Path,
    name: str,
    model: Layered,
    params: np.ndarray,
    scaling: Scaling,
    summary: dict[str, Any],
    epochs: list[dict[str, Any]],
) -> None:
    """``model.safetensors``, ``metrics.jsonl`` (a line an epoch) and ``summary.json``, all at once.

    A new folder appears complete; in one that exists, empty, the files do, ``summary.json`` last.  If somebody else has
    written there since, ``FileExistsError``.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    tensors = {"scaling.center": scaling.center, "scaling.spread": scaling.spread, **model.tensors(params)}
    metadata = {"format": FORMAT, "model": name, "sizes": json.dumps(model.sizes)}
    real = Path(os.path.realpath(folder))
    exists = real.is_dir()
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        if exists and any(real.iterdir()):
            raise FileExistsError(errno.EEXIST, "not empty", str(folder))
        partial = Path(tempfile.mkdtemp(prefix=".mpicoll-", dir=real if exists else real.parent))
        try:
            save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, partial / MODEL, metadata)
            (partial / METRICS).write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
            (partial / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
            (partial / MODEL).chmod(0o666 & ~_umask())  # the library makes it private
            if exists:
                for file in (MODEL, METRICS, SUMMARY):
                    (partial / file).rename(real / file)
            else:
                partial.chmod(0o777 & ~_umask())  # mkdtemp makes it private
                partial.rename(real)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(folder) from error
        raise _not_writable(folder, error) from error
    except SafetensorError as error:  # among them a full disk
        reason = str(error).splitlines()[0]
        raise UserError(f"output folder {str(folder)!r} cannot be written ({reason}); name another one") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_model(path: Path) -> tuple[Layered, np.ndarray, Scaling]:
    """The model, its parameters and the scaling its inputs need, from a run's folder or its model file."""
    from safetensors import safe_open

    if path.is_dir():
        path = path / MODEL
    if not path.is_file():
        raise UserError(f"model {str(path)!r} does not exist; expected the folder that a training run wrote")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except Exception as error:  # the library has exceptions of its own for torn and foreign files
        raise UserError(f"model {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"model {str(path)!r} has format {metadata.get('format')!r}; expected {FORMAT!r}")
    try:
        features, *hidden, outputs = json.loads(metadata["sizes"])
        model = MODELS[metadata["model"]](
            features, max(outputs, 2), tuple(hidden)
        )  # one output tells two classes apart
        params = np.empty(model.size, tensors["layer0.weight"].dtype)
        scaling = Scaling(tensors["scaling.center"], tensors["scaling.spread"])
        parts = [(part, (model.sizes[0],)) for part in scaling]
        for name, view in model.tensors(params).items():
            parts.append((tensors[name], view.shape))
            view[:] = tensors[name]
    except (KeyError, ValueError, TypeError, IndexError, MemoryError) as error:
        raise UserError(f"model {str(path)!r} does not hold the layers its header names") from error
    if any(part.shape != shape or part.dtype.kind != "f" or not np.isfinite(part).all() for part, shape in parts):
        raise UserError(
            f"model {str(path)!r} holds tensors of the wrong shape or dtype, or with infinite or nan values"
        )
    if not (scaling.spread > 0).all():
        raise UserError(f"model {str(path)!r} holds a scaling that divides by zero")
    return model, params, scaling
