"""The house: imports point only downwards, and importing mpicoll loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mpicoll"

# From the bottom up. A module may import what stands on earlier lines, or beside it on its own line's left.
LAYERS = [
    ["errors"],
    ["files", "statistics", "collective"],
    ["schedule"],
    ["graphs"],
    [
        "algorithms.fold",
        "algorithms.ring",
        "algorithms.circulant",
        "algorithms.bruck",
        "algorithms.chain",
        "algorithms.parts",
    ],
    ["algorithms.doubling", "algorithms.tree", "algorithms.mixing", "algorithms"],
    ["cost", "interpreter", "verify", "pipeline", "draw"],
    [
        "tuning",
        "tuning.rules",
        "tuning.fingerprint",
        "tuning.format",
        "tuning.profile",
        "tuning.measurements",
        "tuning.fit",
    ],
    ["mpi"],
    [
        "mpi.launch",
        "mpi.native",
        "mpi.together",
        "mpi.memory",
        "mpi.gpu",
        "mpi.gpu.driver",
        "mpi.gpu.array",
        "mpi.gpu.sparse",
        "mpi.gpu.assignment",
        "mpi.gpu.allocation",
        "mpi.gpu.mappings",
        "mpi.gpu.staging",
        "mpi.buffers",
        "mpi.operations",
        "mpi.shared",
        "mpi.gpu.kernel",
        "mpi.gpu.launching",
        "mpi.plan",
        "mpi.record",
        "mpi.select",
        "mpi.agreement",
        "mpi.attach",
        "mpi.progress",
        "mpi.compiled",
        "mpi.request",
        "mpi.gpu.ipc",
        "mpi.gpu.nccl",
        "mpi.gpu.probe",
        "mpi.gpu.aware",
        "mpi.gpu.devices",
        "mpi.state",
        "mpi.paths",
        "mpi.engine",
        "mpi.sharing",
        "mpi.collectives",
        "mpi.nonblocking",
        "mpi.mixing",
    ],
    ["mpi.comm"],
    ["job", "job.watch", "job.guard", "job.blas", "job.doctor"],
    [
        "measure",
        "measure.task",
        "measure.machine",
        "measure.testdata",
        "measure.contestants",
        "measure.timing",
        "measure.metrics",
        "measure.compete",
    ],
    ["train"],
    ["train.settings", "train.models", "train.optimizers"],
    [
        "train.readers.raw",
        "train.readers.texts",
        "train.readers.opening",
        "train.readers.arrays",
        "train.readers.lines",
        "train.readers.csv",
        "train.readers.svmlight",
        "train.readers.powerlaw",
        "train.readers",
    ],
    [
        "train.scaling",
        "train.holdout",
        "train.labels",
        "train.meaning",
        "train.objects",
        "train.data",
        "train.batches",
    ],
    ["train.traffic", "train.transfer", "train.server", "train.compress"],
    ["train.grid", "train.pieces", "train.group", "train.flow", "train.sharded", "train.split", "train.bubble"],
    [
        "train.strategies.base",
        "train.strategies.sync",
        "train.strategies.average",
        "train.strategies.mixing",
        "train.strategies.transport",
        "train.strategies.staleness",
        "train.strategies.exchange",
        "train.strategies.asynchronous",
        "train.strategies.pairwise",
        "train.strategies",
    ],
    ["train.checkpoint", "train.checks", "train.loop", "train.snapshot", "train.run_folder", "train.run"],
    ["torch"],
    [
        "cli.numbers",
        "cli.output",
        "cli.bench_formats",
        "cli.pictures",
        "cli.bench_pipeline",
        "cli.bench",
        "cli.doctor",
        "cli.plot",
        "cli.predict",
        "cli.report",
        "cli.show",
        "cli.train",
        "cli.tune",
        "cli.verify",
    ],
    ["cli.app", "cli"],
    ["__main__"],
]
ORDER = [module for layer in LAYERS for module in layer]
EXTERNAL = {  # who may import what from outside; the standard library and NumPy are for all above the schedule
    "mpi4py": ("mpi.", "job.", "measure", "train.", "torch"),
    "scipy": ("train.readers.", "train.data", "train.scaling", "train.models", "train.split"),
    "sklearn": ("train.readers.",),
    "safetensors": ("train.run_folder", "train.checkpoint"),
    "threadpoolctl": ("job.blas", "job.doctor"),
    "torch": ("torch",),
    "cupy": ("mpi.gpu",),
    "cupyx": ("mpi.gpu",),
    "ml_dtypes": ("mpi.buffers", "cli.numbers"),
    "click": ("cli",),
    "tqdm": ("cli.train",),
    "matplotlib": ("cli.pictures", "cli.plot"),
}


def imports(source: str, module: str, package: bool) -> list[tuple[str, bool]]:
    """(what is imported, relative or not); names imported from a package count as its modules where they are."""
    found = []
    parts = [*module.split("."), ""] if package else module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module or "", False))
        elif isinstance(node, ast.ImportFrom):
            base = [*parts[: -node.level], *([node.module] if node.module else [])]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                if inner != "__version__":
                    found.append((inner if inner in ORDER else ".".join(base) or inner, True))
    return found


def violations(source: str, module: str, package: bool = False) -> list[str]:
    bad = []
    for name, relative in imports(source, module, package):
        if name == "_node" and module == "mpi.native":
            continue  # which is compiled, and imports nothing of the package
        if relative:
            if name not in ORDER or ORDER.index(name) >= ORDER.index(module):
                bad.append(f"{module} imports {name}, which is not below it")
        elif name.split(".")[0] not in sys.stdlib_module_names:
            top = name.split(".")[0]
            free = top == "numpy" and not module.startswith(("errors", "files", "schedule", "algorithms"))
            if not free and not module.startswith(EXTERNAL.get(top, ())):
                bad.append(f"{module} imports {top}")
    return bad


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def test_every_module_has_its_place():
    assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER, ids=lambda module: f"mpicoll.{module}")
def test_imports_point_downwards(module):
    path = modules()[module]
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


def test_a_wrong_import_is_found():
    assert violations("from ..mpi.plan import Plan", "algorithms.ring") == [
        "algorithms.ring imports mpi.plan, which is not below it"
    ]
    assert violations("from ..train import data", "mpi.plan") == ["mpi.plan imports train.data, which is not below it"]
    assert violations("import mpi4py", "verify") == ["verify imports mpi4py"]
    assert violations("import numpy as np", "algorithms.ring") == ["algorithms.ring imports numpy"]
    assert violations("import cupy", "mpi.plan") == ["mpi.plan imports cupy"]
    assert violations("from .. import cli", "train.loop") == ["train.loop imports cli, which is not below it"]
    assert violations("from . import allreduce", "verify") == ["verify imports allreduce, which is not below it"]
    assert violations("from . import ring\nimport os", "algorithms", package=True) == []


def loaded_by(statement: str) -> set[str]:
    code = f"import sys, mpi4py, numpy; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_mpicoll_is_light():
    assert loaded_by("import mpicoll") == {"mpicoll"}
    heavy = {"sklearn", "scipy", "click", "tqdm", "safetensors", "threadpoolctl", "cupy"}
    loaded = loaded_by("import mpicoll; mpicoll.allreduce; mpicoll.ALGORITHMS")
    assert "mpicoll.mpi.plan" in loaded
    assert not heavy & loaded


def test_torch_is_asked_for_in_one_line_where_it_is_missing():
    code = "import sys; sys.modules['torch'] = None; import mpicoll; import mpicoll.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    wanted = "ImportError: mpicoll.torch needs PyTorch, which is missing: pip install 'mpicoll[torch]'"
    assert done.stderr.splitlines()[-1] == wanted
