# Every target sets up .venv by itself, from the locks in .ci/locks: PYTHON, TORCH and TORCH_INDEX are explained in .ci/venv.sh.
export PYTHON TORCH TORCH_INDEX
BIN := .venv/bin
.NOTPARALLEL:
.DEFAULT_GOAL := help

.PHONY: help train test quick bad-inputs coverage test-newest test-oldest chaos cluster sweep bench an4 check docs format lock sbom audit digits-data clean asked

help:  ## this list
	@echo "make TARGET [VARIABLE=VALUE]: each sets up .venv by itself"
	@echo
	@awk -F ':.*  ## ' '/^[a-z0-9-]+:.*  ## / { printf "  %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3.12        the interpreter of .venv"
	@echo "  TORCH=cuda|cpu           the build of torch (default: cuda where there is an NVIDIA GPU)"
	@echo "  TORCH_INDEX=URL          any other build of torch"
	@echo "  KEEP=1                   of lock: change only what must change"
	@echo "  AN4=DIR, FSDD=DIR        recordings, of an4 and of digits-data"

train: .venv/.installed  ## train on the spoken digits, evaluate, export: runs/digits
	$(BIN)/most-ray train --config jobs/configs/digits.yaml

# What the model is in every release of transformers that pyproject.toml allows: run on the oldest too.
FLOOR := $(addprefix tests/unit/test_,$(addsuffix .py,generation decode model routing step checkpoint evaluation encoder library_names))
# A file's tests stay in one process, for they share what they have built. Long files go first: each is named once, or pytest would sort
# them. Those with Ray have processes of their own, and each process has a Ray of its own: its threads outlive it, and start another.
XDIST := -n 2 --dist loadfile --no-loadscope-reorder
LONGEST := tests/service/test_sweep.py tests/service/test_training.py tests/end_to_end/faults/test_faults.py
RAY := $(LONGEST) $(filter-out $(LONGEST),$(wildcard $(addsuffix /test_*.py,tests/service tests/end_to_end tests/end_to_end/*)))
test: .venv/.installed-dev .venv-floor/.installed  ## all tests
	@sh .ci/chromium.sh
	@sh .ci/prometheus.sh
	@sh .ci/slurm.sh
	@$(BIN)/python -m pytest $(XDIST) $(RAY); ray=$$?; \
	$(BIN)/python -m pytest $(XDIST) tests/distributed tests/golden tests/browser tests/unit; all=$$?; \
	PYTHONPATH=.venv-floor $(BIN)/python -m pytest $(XDIST) $(FLOOR); floor=$$?; \
	test $$ray = 0 -a $$all = 0 -a $$floor = 0

quick: .venv/.installed-dev  ## the unit tests that take no more than seconds each: about 3 minutes on two cores
	$(BIN)/python -m pytest -q $(XDIST) -m "not slow and not s3" tests/unit

bad-inputs: .venv/.installed-dev  ## every command on hundreds of bad inputs, each in a process and a folder of its own
	$(BIN)/python -m pytest -q -n 2 tests/bad_inputs

coverage: .venv/.installed-dev  ## which lines of most_ray the unit and distributed tests run: htmlcov/index.html
	$(BIN)/python -m pytest -q $(XDIST) --cov --cov-report=html --cov-report=term:skip-covered tests/unit tests/distributed

test-newest:  ## the unit tests with the newest releases that pyproject.toml allows, in .venv-newest
	@sh .ci/venv.sh newest
	@.venv-newest/bin/python .ci/lock.py --compare
	.venv-newest/bin/python -m pytest tests/unit

# transformers 5.22 has one worker alone: what works there, `make test` tries.
test-oldest: .venv/.installed-dev  ## the unit tests with the oldest releases that pyproject.toml allows, in .venv-oldest: 3 GB for torch
	@echo ".venv-oldest: the oldest of each range"
	@$(BIN)/uv venv --quiet --clear --seed --python $(BIN)/python .venv-oldest
	@$(BIN)/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable ".[dev]" "transformers>=5.23"
	.venv-oldest/bin/python -m pytest tests/unit

chaos: .venv/.installed-dev  ## whole runs killed, resized, preempted and resumed, about 50 minutes: what is left stays equal
	$(BIN)/python -m pytest tests/chaos
	$(BIN)/python -m tests.end_to_end.faults --kills 20 --saves 20

cluster: .venv/.installed-dev  ## real clusters of this machine: jobs, Slurm, Prometheus, hosts that are cut off; needs root, about 20 minutes
	@sh .ci/chromium.sh
	@sh .ci/prometheus.sh
	@sh .ci/slurm.sh
	$(BIN)/python -m pytest tests/cluster

sweep: .venv/.installed  ## which experts for speech, and how much of each task: 8 trials, 10 to 20 minutes: runs/sweep-digits
	$(BIN)/most-ray sweep --config jobs/configs/sweep-digits.yaml

bench: .venv/.installed-dev  ## all benchmarks: data, training against its peers, saving, what Ray and evaluations cost, units; about an hour: runs/bench/*.json
	rm -rf runs/bench/digits
	$(BIN)/python -m tests.benchmarks.ingest
	$(BIN)/python -m tests.benchmarks.packing
	$(BIN)/python -m tests.benchmarks.resume
	$(BIN)/python -m tests.benchmarks.startup
	$(BIN)/most-ray train --config jobs/configs/digits.yaml --max_steps 60 --output_dir runs/bench --name digits --val_asr_dirs ""
	$(BIN)/python -m tests.benchmarks.stream --run runs/bench/digits
	$(BIN)/python -m tests.benchmarks.save
	$(BIN)/python -m tests.benchmarks.overhead
	$(BIN)/python -m tests.benchmarks.validation
	$(BIN)/python -m tests.benchmarks.speech
	$(BIN)/python -m tests.benchmarks.train
	$(BIN)/python -m tests.benchmarks.loss_memory
	$(BIN)/python -m tests.benchmarks.exchange
	$(BIN)/python -m tests.benchmarks.cost

an4: .venv/.installed  ## from AN4's recordings to the word error rate on eight held-out speakers: make an4 AN4=DIR
	BIN=$(BIN) sh tests/benchmarks/an4.sh "$(AN4)"

check: .venv/.installed-dev  ## lint, format, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/prose.py
	$(BIN)/python .ci/docs.py --check
	$(BIN)/python -m pip check

# The variable: mkdocs-material 9.7.2 and newer print at each build that MkDocs has no future.
docs: .venv/.installed-dev  ## the documentation as a site, site/index.html: every warning is an error
	$(BIN)/python .ci/docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/.installed-dev  ## what `check` would complain of, fixed where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

digits-data: .venv/.installed  ## jobs/data/digits from the recordings: make digits-data FSDD=DIR
	BIN=$(BIN) sh jobs/data/digits/make.sh "$(FSDD)"

LOCKS := .ci/venv.sh .ci/get_pip.py pyproject.toml $(wildcard .ci/locks/*.txt)
# A Python or a build of torch that is named may be another than the environment has.
ASKED := $(if $(strip $(PYTHON)$(TORCH)$(TORCH_INDEX)),asked)
.venv/.installed: $(LOCKS) $(ASKED)
	@sh .ci/venv.sh run
.venv/.installed-dev: $(LOCKS) $(ASKED)
	@sh .ci/venv.sh dev
asked:

.venv-floor/.installed: .ci/locks/floor.txt .venv/.installed-dev
	@echo ".venv-floor: the oldest transformers that pyproject.toml allows"
	@rm -rf .venv-floor && $(BIN)/python -m pip install -qq --no-user --no-deps --require-hashes --target .venv-floor --requirement .ci/locks/floor.txt
	@touch $@

# Of what the image installs; TORCH=cpu: without CUDA.
MATERIALS = $(BIN)/python .ci/materials.py
sbom: .venv/.installed-dev  ## a bill of materials of the locks, in CycloneDX: sbom.json
	$(MATERIALS) sbom sbom.json --torch $(or $(TORCH),cuda)

audit: .venv/.installed-dev  ## known vulnerabilities in the locks' versions, as OSV's database has them, where it can be reached
	$(MATERIALS) audit --torch $(or $(TORCH),cuda)

lock:  ## .ci/locks again, from the newest releases that pyproject.toml allows; KEEP=1: only what must change
	@test -x $(BIN)/uv || sh .ci/venv.sh dev
	$(BIN)/python .ci/lock.py $(if $(KEEP),--keep)

clean:  ## everything that was made, runs included
	rm -rf .venv .venv-newest .venv-oldest .venv-floor runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache site sbom.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
