"""A sweep's trial, as Ray Tune holds it: a small actor around a run like any other, `most-ray train` in a process of its own.

The run is a driver by itself, so Ray counts all that it starts to its own job and takes it away when the process ends, however it ends:
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
from typing import Any, BinaryIO

import ray
import yaml
from ray import tune

from most_ray.errors import STOPPED
from most_ray.io import storage
from most_ray.io.journal import decoded
from most_ray.io.run_folder import COMMIT, RunFolder, step_uri
from most_ray.sweep.ledger import intervals_of, kept_uri, metrics_of

logger = logging.getLogger(__name__)
_LOOK_EVERY_S, _LOOK_EVERY_REMOTE_S = 1.0, 10.0  # for new lines of metrics
_LEAVE_S = 180.0  # for a run to write a checkpoint and go
_LEASE_S = 2 * _LEAVE_S  # without a word, after which a run's slot is another's
LOG = "train.log"
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up here: nothing may be loaded between fork and exec
# What carries a trial out, behind the interpreter. -P: modules of that name in the working directory are not taken.
TRAIN = ("-P", "-m", "most_ray.cli", "train", "--config", "/dev/stdin")
_POINTER = "checkpoint.json"
_TAIL = 200  # bytes by which a place in metrics.jsonl is known again: they hold the step and the time
_ENDED: dict[str, Any] = {}
_OF_RAY_WORKERS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RAY_JOB_ID", "RAY_RAYLET_PID")  # set for the actor, not for a driver


class Slots:
    """Room for `count` runs at once, where more trials are under way than that and take turns. A run that is not heard of has left."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._held: dict[str, float] = {}

    def take(self, run: str) -> bool:
        """Whether a run may be, or go on being, carried out; to be asked again within `_LEASE_S` seconds."""
        now = time.monotonic()
        self._held = {other: heard for other, heard in self._held.items() if now - heard < _LEASE_S}
        if run not in self._held and len(self._held) >= self._count:
            return False
        self._held[run] = now
        return True

    def leave(self, run: str) -> None:
        self._held.pop(run, None)


class TrialActor(tune.Trainable):
    """Each `step` brings the run's next evaluation, or, without news, nothing but the step of the last one: Tune's calls wait for each
    other, and a wish to stop must not wait for an evaluation. Results: step, details (JSON: metrics, intervals), one value per objective as
    objective_0 and on; at the end of the run done, and failed (a reason) where it was not the goal.

    The configuration is the trial's line of the ledger. `common` comes as an object of Ray, for it may hold credentials, and Tune writes
    configurations to disk: a run's values for all trials, sweep_uri, objectives, directory, train, environment (variables that the driver
    has), slots (an actor of `Slots`, or None).
    """

    def setup(self, config: dict[str, Any], common: Mapping[str, Any]) -> None:
        work = config["work"]
        self._run, self._sweep_uri = str(work["run"]), str(common["sweep_uri"])
        self._objectives: list[str] = list(common["objectives"])
        self._slots = common["slots"]
        self._environment = dict(common["environment"])
        self._command, self._directory = [sys.executable, *common["train"]], str(common["directory"])
        self._values = {**common["values"], **work["settings"], "name": self._run}
        if parent := work.get("parent"):
            uri = kept_uri(self._sweep_uri, parent["run"], parent["step"])
            self._values |= {"resume_from_checkpoint": uri, "accept_data_change": True}
        self._folder = RunFolder(storage.join(str(self._values["output_dir"]), self._run))
        self._last = int(work.get("after", 0))  # step of the last result
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: Iterator[dict[str, Any] | None] = iter(())
        self._read, self._tail = 0, b""  # bytes of metrics.jsonl that were read, and the last of them
        self._said = 0  # bytes of the log that earlier starts have written
        self._trained: dict[int, dict[str, Any]] = {}  # `train` lines of steps whose evaluations will come

    def step(self) -> dict[str, Any]:
        if self._slots is not None and not ray.get(self._slots.take.remote(self._run)):
            time.sleep(_LOOK_EVERY_S)
            return {"step": self._last}
        if self._process is None:
            self._process = self._start()
            self._lines = self._evaluations()
        line = next(self._lines, _ENDED)
        if line is None:
            time.sleep(_LOOK_EVERY_REMOTE_S if self._folder.remote else _LOOK_EVERY_S)
            return {"step": self._last}
        if line is _ENDED:
            code = self._process.wait()
            if code == STOPPED:  # by somebody else, as where its node is taken away: Tune starts the trial again
                raise RuntimeError(f"run {self._run} was asked to stop, not by the sweep")
            return {"step": self._last, "done": True, **({"failed": self._reason(code)} if code else {})}
        return self._result(line)

    def _start(self) -> subprocess.Popen[bytes]:
        """The configuration goes by standard input: on the command line or in a file it would be seen."""
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RAY_WORKERS} | self._environment
        with (self._folder.local / LOG).open("ab") as log:
            self._said = log.tell()
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self._directory if os.path.isdir(self._directory) else None,  # relative places are taken from where the sweep runs
                start_new_session=True,  # Ctrl-C is for the sweep, which asks its trials to stop
                preexec_fn=functools.partial(_end_with, os.getpid()) if _PRCTL else None,
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stream:  # one that is gone already says so by its exit code
            stream.write(yaml.safe_dump(self._values).encode())
        return process

    def _evaluations(self) -> Iterator[dict[str, Any] | None]:
        """The run's evaluations as they are written, each with its step's `train` line under "train"; None: none yet. Ends with the run."""
        assert self._process is not None
        while True:
            ended = self._process.poll() is not None  # before the lines are read: what it wrote last is among them
            yield from self._new_lines()
            if ended:
                return
            yield None

    def _new_lines(self) -> list[dict[str, Any]]:
        try:
            with storage.open_read(self._folder.at("metrics.jsonl")) as stream:
                content = self._read_on(stream)
        except FileNotFoundError:
            return []
        judged: dict[int, dict[str, Any]] = {}
        for raw in content.splitlines(keepends=True):
            line = decoded(raw) or {}
            if line.get("kind") == "train" and self._is_judged(line["step"]):
                self._trained[line["step"]] = line
            elif line.get("kind") == "evaluation":
                judged[line["step"]] = line
        return [{**line, "train": self._trained.get(step)} for step, line in sorted(judged.items()) if step > self._last]

    def _is_judged(self, step: int) -> bool:
        """Whether a step is one that an evaluation comes of."""
        every = self._values.get("eval_steps")
        return step == self._values.get("max_steps") or (every is not None and step % int(every) == 0)

    def _read_on(self, stream: BinaryIO) -> bytes:
        """Whole lines behind those that were read before; from the beginning where a restart of the run has cut the file back."""
        stream.seek(self._read - len(self._tail))
        if stream.read(len(self._tail)) != self._tail:
            self._read = 0
            stream.seek(0)
        content = stream.read()
        content = content[: content.rfind(b"\n") + 1]
        self._read += len(content)
        self._tail = content[-_TAIL:] or self._tail
        return content

    def _result(self, line: dict[str, Any]) -> dict[str, Any]:
        self._last = int(line["step"])
        metrics = metrics_of(line, line.get("train"))
        details = json.dumps({"metrics": metrics, "intervals": intervals_of(line)})
        values = {f"objective_{index}": metrics[name] for index, name in enumerate(self._objectives) if name in metrics}
        return {"step": self._last, "details": details, **values}

    def _reason(self, code: int) -> str:
        """Why the run ended short of its goal, in a line."""
        if code < 0:
            name = signal.Signals(-code).name
            return f"its process was ended by {name}" + (", as the kernel does where memory runs out" if name == "SIGKILL" else "")
        try:
            said = (self._folder.local / LOG).read_bytes()[self._said :].decode("utf-8", "replace").strip().splitlines()
        except OSError:
            said = []
        own = next((line for line in reversed(said) if line.startswith("most-ray: ")), said[-1] if said else "")
        return storage.redact(own.removeprefix("most-ray: ")) or f"exit code {code}"

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep the run's checkpoint of the last result: others may go on from it when the run itself has long forgotten it."""
        source = step_uri(self._folder.checkpoints, self._last)
        target = kept_uri(self._sweep_uri, self._run, self._last)
        if self._last and storage.exists(source) and not storage.exists(target):
            _copy(source, target)
        (Path(checkpoint_dir) / _POINTER).write_text(json.dumps({"run": self._run, "step": self._last}), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """A trial that was set aside goes on behind what it has told; one that takes up another's checkpoint begins its own run."""
        pointer = json.loads((Path(checkpoint) / _POINTER).read_text(encoding="utf-8"))
        if pointer["run"] == self._run:
            self._last = max(self._last, int(pointer["step"]))

    def cleanup(self) -> None:
        """Tune lets the trial go. A run under way writes a checkpoint, which whoever goes on begins with."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_LEAVE_S)
            except subprocess.TimeoutExpired:
                logger.warning("run %s did not stop within %g s and was killed", self._run, _LEAVE_S)
                process.kill()
                process.wait()
        if process.returncode not in (0, STOPPED):
            logger.debug("run %s: %s", self._run, self._reason(process.returncode))
        self._folder.push(LOG)
        if self._slots is not None:
            ray.get(self._slots.leave.remote(self._run))


def _end_with(parent: int) -> None:
    """Between fork and exec: should the actor be killed, the run is asked to stop (prctl(2), PR_SET_PDEATHSIG)."""
    assert _PRCTL is not None
    _PRCTL(1, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before that
        os._exit(STOPPED)


def _copy(source: str, target: str) -> None:
    """A checkpoint's folder to another place, whole or not at all; on one file system its files are shared, for nobody changes them."""
    if storage.is_remote(source):
        with tempfile.TemporaryDirectory(prefix="most_ray-kept-") as scratch:
            for entry in storage.list_files(source, ("",)):
                (Path(scratch) / entry.name).parent.mkdir(parents=True, exist_ok=True)
                storage.download(entry.uri, Path(scratch) / entry.name)
            storage.publish(Path(scratch), target, COMMIT)
        return
    temporary = storage.local(target).with_name(f".{storage.name_of(target)}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(storage.local(source), temporary, copy_function=_link)
    storage.publish(temporary, target, COMMIT)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
