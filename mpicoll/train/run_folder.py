"""The files of a run: each written whole or not at all, in formats that hold data and no code.

``config.toml`` (the settings), ``environment.json`` (machine, versions, data), ``metrics.jsonl`` (a line an epoch) and
``checkpoints/`` are there from the first epoch on; ``model.safetensors`` and ``summary.json`` when training has ended.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import cannot_write, error_message, replace, replacing, to_json
from ..mpi.gpu.array import in_host_memory
from .checkpoint import Checkpoint, drop_after, going_on, umask
from .data import Dataset
from .models import MODELS, Layered
from .readers.raw import Schema
from .scaling import Scaling
from .settings import Settings, written

FORMAT, HEADER = "mpicoll-model-2", "mpicoll"
CONFIG, ENVIRONMENT, METRICS, CHECKPOINTS = "config.toml", "environment.json", "metrics.jsonl", "checkpoints"
MODEL, SUMMARY = "model.safetensors", "summary.json"


def check_output(folder: Path) -> None:
    """Raise a ``UserError`` unless a run can be written to ``folder``, which must not exist or be empty.

    Nothing is left in it.
    """
    with _writable(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "already holds files" if folder.is_dir() else "is a file"
            raise UserError(f"output folder {str(folder)!r} {what}; name another one with --out")
        real = Path(os.path.realpath(folder))
        there = next(place for place in (real, *real.parents) if place.exists())
        os.rmdir(tempfile.mkdtemp(prefix=".mpicoll-", dir=there))


def begin(folder: Path, settings: Settings, environment: dict[str, Any]) -> None:
    """Make the folder of a run; a new one appears complete.

    Raises ``FileExistsError`` if another program has written to it since it was checked.
    """
    texts = {CONFIG: written(settings), ENVIRONMENT: to_json(environment, indent=1) + "\n", METRICS: ""}
    with _writable(folder):
        real = Path(os.path.realpath(folder))
        exists = real.is_dir()
        real.parent.mkdir(parents=True, exist_ok=True)
        if exists and any(real.iterdir()):
            raise FileExistsError(errno.EEXIST, "not empty", str(folder))
        partial = Path(tempfile.mkdtemp(prefix=".mpicoll-", dir=real if exists else real.parent))
        try:
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8", errors="surrogateescape")
            if exists:
                for name in texts:
                    (partial / name).rename(real / name)
            else:
                partial.chmod(0o777 & ~umask())  # mkdtemp makes it private
                try:
                    partial.rename(real)
                except OSError as error:  # ENOTEMPTY
                    raise (FileExistsError(*error.args) if real.exists() else error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def add_metrics(folder: Path, epoch: dict[str, Any]) -> None:
    """Append the line of an epoch to the metrics."""
    with _writable(folder), (folder / METRICS).open("a") as file:
        file.write(to_json(epoch) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return all lines of the metrics but an incomplete last one.  Raises ``UserError`` if they cannot be read."""
    path = folder / METRICS
    try:
        whole = path.read_text().rpartition("\n")[0]
        lines = [json.loads(line) for line in whole.splitlines()]
        for number, line in enumerate(lines, 1):
            if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
                raise ValueError(f"line {number} is not that of an epoch")
        return lines
    except (OSError, ValueError) as error:
        why = error_message(error)
        raise UserError(f"{str(path)!r} cannot be read ({why}); expected the folder of a run") from error


def resume(folder: Path, settings: Settings, checkpoint: Checkpoint) -> None:
    """Restore the folder to what it was when a checkpoint was written, except for settings that may change."""
    drop_after(checkpoint)
    kept = [line for line in read_metrics(folder) if line["epoch"] <= checkpoint.facts["epoch"]]
    with _writable(folder):
        for name in (SUMMARY, MODEL):
            (folder / name).unlink(missing_ok=True)
        replace(folder / METRICS, "".join(to_json(line) + "\n" for line in kept))
        replace(folder / CONFIG, written(settings))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other jobs.  Raises ``UserError`` if one holds it, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{str(folder)!r} is being written by another job: wait for it, or stop it") from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def finish(
    folder: Path, settings: Settings, model: Layered, params: np.ndarray, data: Dataset, summary: dict[str, Any]
) -> None:
    """Write the model, and then the summary."""
    from safetensors.numpy import save_file

    tensors = {"scaling.center": data.scaling.center, "scaling.spread": data.scaling.spread}
    tensors |= {name: np.ascontiguousarray(view) for name, view in model.tensors(in_host_memory(params)).items()}
    header = {
        "format": FORMAT,
        "model": settings.model,
        "hidden": settings.widths,
        **data.schema.facts(),
    }
    with _writable(folder):
        with replacing(folder / MODEL) as partial:
            save_file(tensors, partial, {HEADER: to_json(header)})  # of several keys the order would be random
            partial.chmod(0o666 & ~umask())  # the library makes it private
        replace(folder / SUMMARY, to_json(summary, indent=2) + "\n")


def read_model(path: Path) -> tuple[Layered, np.ndarray, Scaling, Schema]:
    """Read the model from a run's folder or its model file: model, parameters, scaling of its inputs, and schema."""
    from safetensors import safe_open

    if path.is_dir():
        path = path / MODEL
    if not path.is_file():
        raise UserError(f"model {str(path)!r} does not exist; expected the folder that a training run wrote")
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except Exception as error:  # the library has exceptions of its own for torn and foreign files
        raise UserError(f"model {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    if header.get("format") != FORMAT:
        raise UserError(f"model {str(path)!r} has format {header.get('format')!r}; expected {FORMAT!r}")
    try:
        scaling = Scaling(tensors["scaling.center"], tensors["scaling.spread"])
        features = len(scaling.center)
        schema = Schema.of({**header, "features": features})
        model = MODELS[header["model"]](features, len(schema.labels), tuple(header["hidden"]))
        dtype = next(array.dtype for name, array in tensors.items() if not name.startswith("scaling."))
        params = np.empty(model.size, dtype)
        parts = [(part, (features,)) for part in scaling]
        for name, view in model.tensors(params).items():
            parts.append((tensors[name], view.shape))
            view[:] = tensors[name]
    except (KeyError, ValueError, TypeError, IndexError, MemoryError, StopIteration) as error:
        raise UserError(f"model {str(path)!r} does not hold the parameters its header names") from error
    if any(part.shape != shape or part.dtype.kind != "f" or not np.isfinite(part).all() for part, shape in parts):
        raise UserError(
            f"model {str(path)!r} holds tensors of the wrong shape or dtype, or with infinite or nan values"
        )
    if len(schema.labels) < 2:
        raise UserError(f"model {str(path)!r} knows fewer than two classes: there is nothing to predict")
    if not (scaling.spread > 0).all():
        raise UserError(f"model {str(path)!r} holds a scaling that divides by zero")
    return model, params, scaling, schema


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:  # among them a full disk
        advice = going_on(folder) or "; name another one with --out"
        raise cannot_write(f"output folder {str(folder)!r}", error, advice) from error
