# Each target sets up by itself, in .venv, from a fresh clone: python3 (3.11 or newer) and make are all it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: docs notebooks bench digests verify test test-full test-newest oracle peers kernels gpu gpu-more ladder check bugs power mutants memory memory-grads recipe pictures clean

verify: .venv/base  ## prove every gradient on real text
	$(BIN)/refimpl verify

# Two workers, one BLAS thread each: on two cores, more threads only wait for one another.
test test-full test-newest oracle gpu gpu-more: export OPENBLAS_NUM_THREADS = 1

test: .venv/dev  ## prove it harder: properties, identities, golden values, planted bugs
	$(BIN)/python -m pytest -q -n 2

test-full: .venv/dev  ## the same tests with ten times the examples; a quarter of them by PART=1/4, 2/4, 3/4, 4/4
	REFIMPL_TEST_FULL=1 REFIMPL_TEST_PART=$(PART) $(BIN)/python -m pytest -q -n 2

# What a user gets: no constraints, and the newest Python that runs (pyenv leaves names on PATH that do not).
test-newest:  ## make test on the newest of python3.14, 3.13, 3.12 on PATH, with the newest packages
	@for python in python3.14 python3.13 python3.12; do \
	    if $$python -c '' 2>/dev/null; then \
	        echo "testing on $$($$python --version), with the newest packages"; \
	        $$python -m venv --clear .venv-newest && \
	        .venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' && \
	        exec .venv-newest/bin/python -m pytest -q -n 2; exit 1; \
	    fi; \
	done; echo "no python3.14, python3.13 or python3.12 that runs is on PATH: nothing was tested on a newer Python"

oracle: .venv/oracle  ## compare with Hugging Face's models and a training in torch, run the ops on JAX (torch may bring gigabytes of CUDA)
	$(BIN)/python -m pytest -q -n 2 tests/oracle tests/golden/test_checkpoints.py

kernels: .venv/dev  ## compile every kernel for every target into build/kernels, for machines without compilers
	REFIMPL_KERNELS=build/kernels $(BIN)/refimpl kernels

# In an environment of its own, without the constraints: verl needs an older transformers than the oracle.
# With checkouts of torchtitan (b5bcd76) and Megatron-LM (d98e8a6): REFIMPL_TORCHTITAN=… REFIMPL_MEGATRON=… make peers
peers: .venv-peers  ## compare with TRL's and verl's own losses (torch may bring gigabytes of CUDA)
	.venv-peers/bin/python -m pytest -q tests/peers

# With the Python at hand where that has what is needed (a GPU machine may have no network), else in .venv.
# gpu-more is the second list of tests/gpu.py: beside torch, compute-sanitizer, the whole model.
gpu-more: MORE = --more
gpu gpu-more:  ## the kernels' tests, the benchmark and every gradient on this machine's GPU; says so if there is no GPU
	@$(PYTHON) tests/gpu.py --only-look; case $$? in 0) ;; 3) exit 0 ;; *) exit 1 ;; esac; \
	if $(PYTHON) -c 'import cupy, cuda.bindings, hypothesis, ml_dtypes, pytest, safetensors, typer' 2>/dev/null; \
	then $(PYTHON) tests/gpu.py $(MORE); else $(MAKE) --no-print-directory .venv/gpu && $(BIN)/python tests/gpu.py $(MORE); fi

ladder: .venv/dev  ## the costs of kernels and their earlier versions, counted by the interpreter
	$(BIN)/python tests/ladder.py
	$(BIN)/python tests/shares.py

docs: .venv/docs  ## the site, in build/docs/html: derivations, API reference; warnings and dead links are errors
	@rm -rf build/docs
	$(BIN)/sphinx-build -q -W --keep-going -j auto -c docs -d build/docs/doctrees . build/docs/html
	$(BIN)/python docs/check.py build/docs/html
	@echo "the site is build/docs/html/index.html"

notebooks: .venv/docs  ## execute the notebooks; `make docs` then shows what they print and draw
	OPENBLAS_NUM_THREADS=1 $(BIN)/python docs/execute.py

check: .venv/dev  ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/dev  ## measure ops and training steps on this CPU, beside torch if `make oracle` has installed it
	$(BIN)/refimpl bench --cpu $(ARGUMENTS)

AGAINST ?= HEAD^
digests: .venv/base  ## the bits of loss and gradients on five configurations, beside those of another commit (AGAINST=)
	$(BIN)/python tests/digests.py --against $(AGAINST)

bugs: .venv/dev  ## refimpl power, with the golden values: which check catches which planted bug
	$(BIN)/python tests/kill_table.py

power: .venv/oracle  ## the same, with torch's gradcheck and JAX's check_grads beside ours
	$(BIN)/python tests/kill_table.py --others

# Half an hour to an hour, by how busy the machine is; resumes where it was interrupted.
mutants: .venv/dev  ## mutation testing on a seeded sample of 600 (ARGUMENTS=--again runs the survivors again)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/mutate.py $(ARGUMENTS)

memory: .venv/base  ## measure the peak memory of flash attention, of the fused output head and of recomputed blocks
	$(BIN)/refimpl memory

memory-grads: .venv/base  ## measure the peak memory of `refimpl grads` on V2-Lite's shape, 4 layers (14 GB of files)
	$(BIN)/refimpl memory --grads

pictures: .venv/base  ## draw the pictures of the derivations again
	$(BIN)/python derivations/pictures.py

# A quarter of an hour on two quiet cores; if interrupted, run the same command again: it resumes.
recipe: .venv/dev  ## pre-train, extend, fine-tune, reinforce and distil a tiny model; claims, pictures and report in build/recipe
	$(BIN)/refimpl recipe --out build/recipe $(ARGUMENTS)

.venv/base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (make PYTHON=...)")'
	@test -x $(BIN)/python || { echo "setting up .venv"; $(PYTHON) -m venv .venv; }
	@$(PIP) -e .
	@touch $@

.venv/dev: .venv/base
	@echo "installing the tools for tests into .venv"
	@$(PIP) -e '.[dev]'
	@touch $@

.venv/docs: .venv/dev
	@echo "installing Sphinx and Jupyter into .venv"
	@$(PIP) -e '.[docs]'
	@touch $@

.venv/gpu: .venv/dev
	@echo "installing CuPy into .venv"
	@$(PIP) -e '.[cuda13]'
	@touch $@

.venv/oracle: .venv/dev
	@echo "installing torch, transformers and JAX into .venv"
	@$(PIP) -e '.[oracle,jax]'
	@touch $@

.venv-peers: pyproject.toml
	@echo "installing torch, TRL and verl into .venv-peers"
	@test -x $@/bin/python || $(PYTHON) -m venv $@
	@$@/bin/python -m pip install --quiet --disable-pip-version-check -e '.[peers]' pytest
	@touch $@

clean:
	rm -rf .venv .venv-newest .venv-peers build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
