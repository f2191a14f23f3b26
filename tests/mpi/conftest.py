"""Rank 0 reports; what fails on another rank is printed at once, because that rank may not reach the end."""

import gc
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpicoll.mpi.attach import interrupted

WORLD = MPI.COMM_WORLD
os.environ["MPICOLL_PROFILE"] = "none"  # what this machine was tuned to is not tested

# What more than five ranks show nothing new of, and take longest for: types, lifetimes, and other calls meanwhile.
FIVE_SHOW_IT = {
    "test_allreduce.py": ("test_operations_and_dtypes",),
    "test_rooted.py": ("test_operations_and_dtypes",),
    "test_shared.py": (
        "test_communicators_and_arrays_leave_nothing",
        "test_handles_of_ours_go_on_meanwhile",
        "test_messages_of_the_program_go_on_meanwhile",
        "test_what_was_compiled_is_for_the_same_call_only",
        "test_with_the_barrier_of_the_mpi_library",
    ),
    "test_strategies.py": ("test_averaging_in_every_step_is_synchronous_sgd",),
}


ODD_SHOW_IT = {
    *("test_asynchronous.py", "test_asynchronous_gpu.py", "test_batches_ranks.py", "test_compress_ranks.py"),
    *("test_data_ranks.py", "test_loop_gpu.py", "test_loop_ranks.py", "test_measure_ranks.py", "test_run_ranks.py"),
    *("test_snapshot.py", "test_strategies.py"),
}
"""Of training, and measuring: 1 and 3 ranks of MPICH, and 2 and 4 of Open MPI, which CI has as well.  Others are there
for what collectives do with such a number."""

HAS_ALL = MPI.get_vendor()[0] == "Open MPI" or os.environ.get("MPICOLL_TEST_GPU") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what takes long, and is shown at other numbers of ranks."""
    for item in items:
        if WORLD.size > 5 and getattr(item, "originalname", "") in FIVE_SHOW_IT.get(item.path.name, ()):
            item.add_marker(pytest.mark.skip(reason="five ranks show what more would, and sooner"))
        if WORLD.size in (2, 4, 5) and not HAS_ALL and item.path.name in ODD_SHOW_IT:
            item.add_marker(pytest.mark.skip(reason="1 and 3 ranks show it, and Open MPI's 2 and 4"))


def pytest_collection_finish() -> None:
    """What was imported and collected stays: a collection of garbage need not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if WORLD.rank and reporter is not None:
        reporter._tw._file = io.StringIO()


def pytest_report_header() -> str:
    return f"{WORLD.size} ranks, {MPI.Get_library_version().splitlines()[0]}"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if WORLD.rank and report.failed:
        print(f"rank {WORLD.rank}: {report.nodeid} failed:\n{report.longreprtext}", file=sys.__stderr__, flush=True)


@pytest.fixture(autouse=True)
def _nothing_interrupted() -> Iterator[None]:
    """Small calls take another way after a call was broken off, until its communicator is freed, which is not always
    possible: no test may take it because of another."""
    yield
    interrupted.clear()


@pytest.fixture
def python_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Communicators made from now on do without the compiled part."""
    monkeypatch.setenv("MPICOLL_NATIVE", "off")


@pytest.fixture
def comm() -> Iterator[MPI.Intracomm]:
    """A communicator of the test's own, so that no test meets another's messages."""
    own = WORLD.Dup()
    yield own
    own.Free()


@pytest.fixture
def folder(comm: MPI.Intracomm) -> Iterator[Path]:
    """One temporary folder for all ranks.  (pytest's own ``tmp_path`` is cleaned up by all of them at once, and they
    get into each other's way.)"""
    made = tempfile.TemporaryDirectory() if comm.rank == 0 else None
    yield Path(comm.bcast(made and made.name))
    comm.Barrier()
    if made:
        made.cleanup()
