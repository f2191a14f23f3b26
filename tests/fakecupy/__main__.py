"""``python tests/fakecupy -m MODULE ARGUMENTS`` runs a module with the fake CuPy."""

import importlib
import os
import runpy
import sys
from pathlib import Path

import pytest

sys.path[0] = str(Path(__file__).parents[1])  # not this folder, whose files are parts of a package

import fakecupy  # noqa: E402

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "-m":
        sys.exit("usage: python tests/fakecupy -m MODULE ARGUMENTS")
    mode, devices = os.environ.get("FAKECUPY_MODE", "lazy"), int(os.environ.get("FAKECUPY_DEVICES", "1"))
    fake = fakecupy.install(pytest.MonkeyPatch(), mode, devices)  # to the end, when communicators may still use it
    if "FAKECUPY_WITH" in os.environ:
        importlib.import_module(os.environ["FAKECUPY_WITH"]).prepare(fake)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
