"""Checkpoints: folders that appear whole or not at all, in formats that hold data and no code.

``checkpoints/epoch-00000012/`` holds ``manifest.json`` (where training was, what its bits depend on, and the SHA-256 of
every file) and ``rank-N.safetensors`` for every rank, or for rank 0 only if all ranks hold the same.  Ranks that hold a
model together write one file with the whole model.  A checkpoint is written under another name, synchronised to disk,
and renamed once every rank has written its part.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple, TypeVar

import numpy as np
from mpi4py import MPI

from ..errors import UserError
from ..files import cannot_write, error_message, to_json
from ..mpi.gpu.array import in_host_memory
from ..mpi.together import on_all, on_root
from .readers.raw import Schema

FORMAT = "mpicoll-checkpoint-1"
MANIFEST = "manifest.json"
KEPT = 3
"""The number of latest checkpoints that are kept: if one turns out to be damaged, there is one before it."""

NAME = re.compile(r"epoch-\d{8}")

FACTS: dict[str, tuple[type, ...]] = {
    "epoch": (int,),
    "step": (int,),
    "seconds": (float, int),
    "optimizer_steps": (int,),
    "best": (list, type(None)),  # validation loss, epoch
    "weights": (list, type(None)),  # of ranks' shares, if they are not even
    "ranks": (int,),
    "settings": (dict,),
    "environment": (dict,),
    "schema": (dict, type(None)),  # of the data; earlier versions did not keep it, nor
    "scaling": (list, type(None)),  # centers and spreads of dense ones
    "mixed": (bool, type(None)),  # whether training data became others on the way
    "files": (dict,),
}
"""What a manifest says, and of what kind that is."""

T = TypeVar("T")


class Checkpoint(NamedTuple):
    """A checkpoint that was found and looks complete; ``tensors(rank)`` reads and checks a rank's part."""

    path: Path
    facts: dict[str, Any]
    files: dict[str, str]

    @property
    def ranks(self) -> int:
        """The number of ranks that wrote it, or of groups of ranks that held a model together."""
        return int(self.facts["ranks"])

    def tensors(self, rank: int) -> dict[str, np.ndarray]:
        """Read the tensors of a rank, or those of rank 0 if all ranks held equal ones."""
        from safetensors.numpy import load_file

        name = _file(rank) if _file(rank) in self.files else _file(0)
        path = self.path / name
        with _readable(self.path, name):
            with path.open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
            if digest != self.files[name]:
                raise ValueError("it is torn, or was changed")
            return load_file(path)


def save(
    folder: Path, comm: MPI.Intracomm, facts: dict[str, Any], tensors: dict[str, np.ndarray], number: int | None
) -> Path:
    """Write a checkpoint into ``folder``, and return its path; a collective call.

    A rank writes the file with this ``number``, or none if it is ``None``; rank 0 writes number 0.  If any rank cannot
    write its part, nothing is left and all ranks raise the same ``UserError``.
    """
    from safetensors.numpy import save_file

    final = folder / f"epoch-{facts['epoch']:08}"
    partial = folder / f".{final.name}.partial"

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)  # of a job that was killed
        partial.mkdir(parents=True)

    def write() -> tuple[str, str] | None:
        if number is None:
            return None
        path = partial / _file(number)
        save_file({name: np.ascontiguousarray(in_host_memory(value)) for name, value in tensors.items()}, path)
        path.chmod(0o666 & ~umask())  # the library makes it private
        _synchronize(path)
        with path.open("rb") as file:
            return path.name, file_digest(file, "sha256").hexdigest()

    def finish(written: list[tuple[str, str] | None]) -> None:
        manifest = partial / MANIFEST
        files = dict(file for file in written if file)
        manifest.write_text(to_json({"format": FORMAT, **facts, "files": files}, indent=1))
        _synchronize(manifest)
        _synchronize(partial)
        partial.chmod(0o777 & ~umask())
        _set_aside([final] if final.exists() else [])
        partial.rename(final)
        _synchronize(folder)
        _set_aside(_listed(folder)[:-KEPT])

    try:
        on_root(comm, lambda: _writing(final, prepare))
        written = comm.allgather(on_all(comm, lambda: _writing(final, write)))
        on_root(comm, lambda: _writing(final, lambda: finish(written)))
    except UserError as error:
        if comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        advice = comm.bcast(going_on(folder.parent) if comm.rank == 0 else None)
        raise UserError(f"{error}{advice}") from error
    return final


def latest(run: Path) -> Checkpoint:
    """Return the latest checkpoint in a run's folder, or ``run`` itself if that is the folder of a checkpoint.

    Raises ``UserError`` if there is none, or it is damaged or of another format or version; the error names the
    checkpoint before it.
    """
    if not (run / "checkpoints").is_dir() and NAME.fullmatch(run.resolve().name):
        return _open(run.resolve())
    found = _listed(run / "checkpoints")
    if not found:
        raise UserError(f"{str(run)!r} holds no checkpoint to resume from: remove it, and start the run anew")
    return _open(found[-1])


def going_on(run: Path) -> str:
    """How to resume the run in a folder, as the end of a line; empty if it has no checkpoint."""
    return f"; go on with mpicoll train --resume {quote(str(run))}" if _listed(run / "checkpoints") else ""


def drop_after(checkpoint: Checkpoint) -> None:
    """Remove later checkpoints: a run that is resumed from this one no longer continues to them."""
    folder = checkpoint.path.parent
    for left in folder.glob(".epoch-*"):  # by jobs that were killed
        shutil.rmtree(left, ignore_errors=True)
    with _writable(checkpoint.path):
        _set_aside([other for other in _listed(folder) if other.name > checkpoint.path.name])


def umask() -> int:
    """The file mode mask of this process: the permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("epoch-*") if NAME.fullmatch(path.name))


def _set_aside(paths: list[Path]) -> None:
    """Remove folders by renaming them first, so that a job that is killed leaves no part of one under its name."""
    aside = [path.rename(path.with_name(f".{path.name}.old")) for path in paths]
    for path in aside:
        shutil.rmtree(path, ignore_errors=True)


def _open(path: Path) -> Checkpoint:
    with _readable(path, MANIFEST):
        facts = json.loads((path / MANIFEST).read_text())
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            what = facts.get("format") if isinstance(facts, dict) else None
            raise ValueError(f"its format is {what!r}; this version reads {FORMAT!r}")
        for name, kinds in FACTS.items():
            if type(facts.get(name)) not in kinds:
                raise ValueError(f"{name} is {facts.get(name)!r}")
        schema = facts.get("schema") and Schema.of(facts["schema"])
        if schema and facts.get("scaling") and np.array(facts["scaling"], np.float64).shape != (2, schema.features):
            raise ValueError(f"its scaling is not that of {schema.features} features")
        files = facts.pop("files")
        if _file(0) not in files or len(files) not in (1, facts["ranks"]):
            raise ValueError(f"it names the files of {len(files)} of {facts['ranks']} ranks")
        missing = [name for name in files if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
    return Checkpoint(path, facts, files)


@contextmanager
def _readable(path: Path, part: str) -> Iterator[None]:
    """Turn errors while a part of the checkpoint ``path`` is read into a ``UserError`` that offers the one before."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        before = [other for other in _listed(path.parent) if other.name < path.name]
        offer = f"; resume from the one before with --resume {before[-1]}" if before else ""
        raise UserError(f"checkpoint {str(path)!r} cannot be used ({part}: {error_message(error)}){offer}") from error


def _writing(path: Path, action: Callable[[], T]) -> T:
    with _writable(path):
        return action()


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(f"checkpoint {str(path)!r}", error, ": training stops") from error


def _file(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _synchronize(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
