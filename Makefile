# Every target sets up .venv by itself. On a machine without a GPU the CPU build of torch saves some gigabytes:
#   make train TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: train test chaos cluster sweep bench an4 check format digits-data clean

train: .venv/.installed  ## train on the spoken digits, evaluate, export: runs/digits
	$(BIN)/most-ray train --config jobs/configs/digits.yaml

# Tests that start Ray mostly wait for processes to come up: they run beside the others, but for two files, which make the halves even.
ALONE := tests/end_to_end/test_without_ray.py tests/service/test_sweep.py
test: .venv/.installed  ## all tests
	@sh .ci/chromium.sh
	@sh .ci/prometheus.sh
	@sh .ci/slurm.sh
	@$(BIN)/python -m pytest tests/service tests/end_to_end $(addprefix --ignore ,$(ALONE)) > .test-ray.log 2>&1 & ray=$$!; \
	$(BIN)/python -m pytest tests/unit tests/browser tests/golden tests/distributed $(ALONE); first=$$?; \
	wait $$ray; second=$$?; cat .test-ray.log; test $$first = 0 -a $$second = 0

chaos: .venv/.installed  ## whole runs killed, resized, preempted and resumed, about 50 minutes: what is left stays equal
	$(BIN)/python -m pytest tests/chaos
	$(BIN)/python -m tests.end_to_end.faults --kills 20 --saves 20

cluster: .venv/.installed  ## real clusters of this machine: jobs, Slurm, Prometheus, hosts that are cut off; needs root, about 20 minutes
	@sh .ci/chromium.sh
	@sh .ci/prometheus.sh
	@sh .ci/slurm.sh
	$(BIN)/python -m pytest tests/cluster

sweep: .venv/.installed  ## which experts for speech, and how much of each task: 8 trials, 10 to 20 minutes: runs/sweep-digits
	$(BIN)/most-ray sweep --config jobs/configs/sweep-digits.yaml

bench: .venv/.installed  ## all benchmarks: data, training against its peers, saving, what Ray and evaluations cost, units; about an hour: runs/bench/*.json
	rm -rf runs/bench/digits
	$(BIN)/python -m tests.benchmarks.ingest
	$(BIN)/python -m tests.benchmarks.packing
	$(BIN)/python -m tests.benchmarks.resume
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

check: .venv/.installed  ## lint, format, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed  ## what `check` would complain of, mended where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

digits-data: .venv/.installed  ## jobs/data/digits from the recordings: make digits-data FSDD=DIR
	BIN=$(BIN) sh jobs/data/digits/make.sh "$(FSDD)"

.venv/.installed: pyproject.toml .ci/venv.sh .ci/get_pip.py
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" sh .ci/venv.sh

clean:  ## everything that was made, runs included
	rm -rf .venv runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
