"""A sweep's trial in Ray Tune: a small actor that starts `most-ray train` in a process of its own and reports its evaluations.

The run is a Ray driver itself. Ray counts everything that it starts to its job and removes it when the process ends, however it ends, so
nothing that a trial has started outlives it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune

from most_ray.errors import EXIT_STOPPED
from most_ray.io import storage
from most_ray.io.journal import Follower
from most_ray.io.json_values import parse_json
from most_ray.io.run_folder import COMMIT, RunFolder, step_uri
from most_ray.runs.run_lock import is_held
from most_ray.sweep.ledger import intervals_of, kept_uri, metrics_of

logger = logging.getLogger(__name__)
# The run's command after the interpreter. -P: modules of these names in the working directory are not imported.
TRAIN = ("-P", "-m", "most_ray.cli", "train", "--config", "/dev/stdin")
LOG = "train.log"  # output of the run's process, in the run's folder
_POLL_S, _POLL_REMOTE_S = 1.0, 10.0  # seconds between two looks for new lines of metrics.jsonl
_STOP_S = 180.0  # seconds for a run to write a checkpoint and end
_LEASE_S = 2 * _STOP_S  # seconds after which a run that did not renew its slot has lost it
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # loaded here: nothing may be loaded between fork and exec
_POINTER = "checkpoint.json"  # Tune's checkpoint of a trial: the run and the step
_ENDED: dict[str, Any] = {}  # stands for the end of the run among its evaluations
_OF_RAY_WORKERS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RAY_JOB_ID", "RAY_RAYLET_PID")  # set for the actor, not for a driver


class Slots:
    """Lets at most `count` runs train at once where there are more trials. A run that does not renew its slot has lost it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._held: dict[str, float] = {}  # when each run last renewed its slot, on the monotonic clock

    def acquire(self, run: str) -> bool:
        """Take or renew a run's slot; returns whether it has one. To be called again within `_LEASE_S` seconds."""
        now = time.monotonic()
        self._held = {other: renewed for other, renewed in self._held.items() if now - renewed < _LEASE_S}
        if run not in self._held and len(self._held) >= self._count:
            return False
        self._held[run] = now
        return True

    def release(self, run: str) -> None:
        self._held.pop(run, None)


class TrialActor(tune.Trainable):
    """Each `step` returns the run's next evaluation or, where there is none yet, only the step of the last one: Tune waits for one call
    before it makes the next, and a stop must not wait for an evaluation.

    A result holds `step`, `details` (JSON of metrics and intervals) and a value of each objective as `objective_0`, `objective_1`, ...; the
    result at the end of the run holds `done`, and `failed` with a reason where the run did not reach its last step.

    Args of `setup`:
        config: the trial's specification under "spec", see search.py. Tune writes it to disk.
        common: an object of Ray, which is not written to disk, because it may hold credentials: values (of the run, the same for all
            trials), sweep_uri, objectives (names of metrics), directory (where the run starts), train (its command), environment
            (variables of the driver), slots (an actor of `Slots`, or None).
    """

    def setup(self, config: dict[str, Any], common: Mapping[str, Any]) -> None:
        spec = config["spec"]
        self._run, self._sweep_uri = str(spec["run"]), str(common["sweep_uri"])
        self._objectives: list[str] = list(common["objectives"])
        self._slots, self._environment = common["slots"], dict(common["environment"])
        self._command, self._directory = [sys.executable, *common["train"]], str(common["directory"])
        self._values = {**common["values"], **spec["settings"], "name": self._run}
        if parent := spec.get("parent"):
            uri = kept_uri(self._sweep_uri, parent["run"], parent["step"])
            self._values |= {"resume_from_checkpoint": uri, "accept_data_change": True}
        self._folder = RunFolder(storage.join(str(self._values["output_dir"]), self._run))
        self._last = int(spec.get("after", 0))  # step of the last result
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: Iterator[dict[str, Any] | None] = iter(())
        self._metrics = Follower(self._folder.at("metrics.jsonl"))
        self._log_start = 0  # bytes of the log that earlier starts have written
        self._trained: dict[int, dict[str, Any]] = {}  # `train` lines of steps that will be evaluated

    def step(self) -> dict[str, Any]:
        if self._slots is not None and not ray.get(self._slots.acquire.remote(self._run)):
            time.sleep(_POLL_S)
            return {"step": self._last}
        if self._process is None:
            if is_held(self._folder.uri):  # by its process of before, whose actor was lost: it still writes a checkpoint
                time.sleep(_POLL_S)
                return {"step": self._last}
            self._process = self._start()
            self._lines = self._evaluations()
        line = next(self._lines, _ENDED)
        if line is None:
            time.sleep(_POLL_REMOTE_S if self._folder.remote else _POLL_S)
            return {"step": self._last}
        if line is _ENDED:
            code = self._process.wait()
            if code == EXIT_STOPPED:  # not by the sweep, but as where its node is taken away: Tune starts the trial again
                raise RuntimeError(f"run {self._run} was asked to stop, not by the sweep")
            return {"step": self._last, "done": True, **({"failed": self._reason(code)} if code else {})}
        return self._result(line)

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the run. Its configuration is passed by standard input: on a command line or in a file its credentials could be seen."""
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RAY_WORKERS} | self._environment
        with (self._folder.local / LOG).open("ab") as log:
            self._log_start = log.tell()
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self._directory if os.path.isdir(self._directory) else None,  # relative paths are taken from where the sweep runs
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which asks its trials to stop
                preexec_fn=functools.partial(_stop_with_parent, os.getpid()) if _PRCTL else None,
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stream:  # a run that has ended already is reported by its exit code
            stream.write(yaml.safe_dump(self._values).encode())
        return process

    def _evaluations(self) -> Iterator[dict[str, Any] | None]:
        """The run's evaluations as they are written, None where there is no new one yet; ends with the run."""
        assert self._process is not None
        while True:
            ended = self._process.poll() is not None  # looked up before the lines are read, so that the last ones are among them
            yield from self._new_lines()
            if ended:
                return
            yield None

    def _new_lines(self) -> list[dict[str, Any]]:
        """Evaluations after the last reported step that were written since the last call, by step, each with its step's `train` line under
        "train"."""
        evaluations: dict[int, dict[str, Any]] = {}
        for line in self._metrics.new_lines():
            step, every = line.get("step", 0), self._values.get("eval_steps")
            evaluated = step == self._values.get("max_steps") or (every is not None and step % int(every) == 0)
            if line.get("kind") == "train" and evaluated:
                self._trained[step] = line
            elif line.get("kind") == "evaluation":
                evaluations[step] = line
        return [{**line, "train": self._trained.get(step)} for step, line in sorted(evaluations.items()) if step > self._last]

    def _result(self, line: dict[str, Any]) -> dict[str, Any]:
        self._last = int(line["step"])
        metrics = metrics_of(line, line.get("train"))
        details = json.dumps({"metrics": metrics, "intervals": intervals_of(line)})
        values = {f"objective_{index}": metrics[name] for index, name in enumerate(self._objectives) if name in metrics}
        return {"step": self._last, "details": details, **values}

    def _reason(self, code: int) -> str:
        """Why the run ended before its last step, in one line: its own error, else its last line of output, else its exit code."""
        if code < 0:
            name = signal.Signals(-code).name
            return f"its process was ended by {name}" + (", as the kernel does where memory runs out" if name == "SIGKILL" else "")
        lines: list[str] = []
        with contextlib.suppress(OSError):  # the exit code is reported instead
            lines = (self._folder.local / LOG).read_bytes()[self._log_start :].decode("utf-8", "replace").strip().splitlines()
        own = next((line for line in reversed(lines) if line.startswith("most-ray: ")), lines[-1] if lines else "")
        return storage.redact(own.removeprefix("most-ray: ")) or f"exit code {code}"

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep the run's checkpoint of the last result, which other trials may begin with after the run itself has deleted it."""
        source = step_uri(self._folder.checkpoints, self._last)
        target = kept_uri(self._sweep_uri, self._run, self._last)
        if self._last and storage.exists(source) and not storage.exists(target):
            _copy_checkpoint(source, target)
        (Path(checkpoint_dir) / _POINTER).write_text(json.dumps({"run": self._run, "step": self._last}), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """A trial that was paused continues after its last reported step; one that takes over another's checkpoint begins its own run."""
        pointer = parse_json((Path(checkpoint) / _POINTER).read_text(encoding="utf-8"))
        if pointer["run"] == self._run:
            self._last = max(self._last, int(pointer["step"]))

    def cleanup(self) -> None:
        """Stop the run, if it still trains: it writes a checkpoint, from which it is resumed later."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                logger.warning("run %s did not stop within %g s and was killed", self._run, _STOP_S)
                process.kill()
                process.wait()
        if process.returncode not in (0, EXIT_STOPPED):
            logger.warning("run %s: %s", self._run, self._reason(process.returncode))
        self._folder.push(LOG)
        if self._slots is not None:
            ray.get(self._slots.release.remote(self._run))


def _stop_with_parent(parent: int) -> None:
    """Called between fork and exec: lets the kernel ask the run to stop when the actor is killed (prctl(2), PR_SET_PDEATHSIG)."""
    assert _PRCTL is not None
    _PRCTL(1, signal.SIGTERM)
    if os.getppid() != parent:  # the actor was killed before that
        os._exit(EXIT_STOPPED)


def _copy_checkpoint(source: str, target: str) -> None:
    """Copy a checkpoint's folder to another URI, completely or not at all. On a file system its files are hard links: they never change."""
    if storage.is_remote(source):
        with tempfile.TemporaryDirectory(prefix="most_ray-kept-") as scratch:
            for entry in storage.list_files(source, ("",)):
                (Path(scratch) / entry.name).parent.mkdir(parents=True, exist_ok=True)
                storage.download(entry.uri, Path(scratch) / entry.name)
            storage.publish(Path(scratch), target, COMMIT)
        return
    temporary = storage.local(target).with_name(f".{storage.base_name(target)}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(storage.local(source), temporary, copy_function=_link_or_copy)
    storage.publish(temporary, target, COMMIT)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)
