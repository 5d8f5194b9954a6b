"""The engine by itself: under torchrun or in one process, on a machine where there is no Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from most_ray.config import config_from
from most_ray.errors import TopologyError
from most_ray.io.journal import read_journal
from most_ray.metrics.schema import check_line
from most_ray.runs.first_checks import placed
from most_ray.train.run import train
from tests.conftest import ROOT
from tests.end_to_end.faults.harness import flags_of
from tests.support.builders import asr, text, tts, write_records
from tests.support.tracking import shown_by_tensorboard, times_logged, wandb_rows

# What a machine without Ray would say to `import ray`, then the module as torchrun would start it.
_FORBID_RAY = "import sys, runpy; sys.modules['ray'] = None; runpy.run_module('most_ray.train.run', run_name='__main__', alter_sys=True)"


def command(tmp_path: Path, ranks: int, name: str, **flags: object) -> list[str]:
    script = tmp_path / "without_ray.py"
    script.write_text(_FORBID_RAY)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(script), *flags_of(tmp_path, name, max_steps=8, save_steps=4, **flags)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False)


def lines(tmp_path: Path, name: str) -> list[dict[str, float]]:
    return read_journal(tmp_path / name / "metrics.jsonl", "train")


TRACKED = {"tensorboard": "true", "wandb_project": "p", "wandb_mode": "offline"}


def check_tracked(folder: Path, steps: dict[str, Iterable[int]]) -> None:
    """W&B and TensorBoard have these metrics at these steps, and every metric once per step."""
    shown, logged = shown_by_tensorboard(folder), times_logged(wandb_rows(folder))
    assert set(shown.values()) == {1} and {count for counts in logged.values() for count in counts.values()} == {1}
    for name, expected in steps.items():
        assert {step for tag, step in shown if tag == name} == set(logged[name]) == set(expected), name


def small_data(root: Path) -> dict[str, object]:
    """Flags of a run on a few records of each task, evaluated on others."""
    sets = {"asr": [asr(i, 3 + i * 7 % 30) for i in range(24)], "tts": [tts(i, 3 + i * 11 % 30) for i in range(24)]}
    sets["text"] = [text(i) for i in range(8)]
    flags: dict[str, object] = {}
    for task, records in sets.items():
        half = len(records) // 2
        flags[f"train_{task}_dirs"] = str(write_records(root / f"train_{task}", records[:half]))
        flags[f"val_{task}_dirs"] = str(write_records(root / f"val_{task}", records[half:]))
    noise = dict.fromkeys(("unit_swap_prob", "unit_replace_prob", "unit_drop_prob"), 0)
    return {**flags, **noise, "text_mix_ratio": 0.2, "global_batch_size": 12, "train_batch_size": 2, "logging_steps": 1}


def test_a_run_is_tracked_evaluated_and_finished_as_under_ray(tmp_path: Path) -> None:
    """Two ranks share the experts; the figures are those of `most-ray evaluate` on the exported model, to the last digit."""
    flags = {**small_data(tmp_path / "data"), "eval_steps": 4, "eval_workers": 2, "max_new_units": 40, "max_new_tokens": 20}
    done = run(command(tmp_path, 2, "whole", ep_size=2, **flags, **TRACKED))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("eval_workers and eval_gpus are not used") == 1
    for part in ("every 4 steps and at the end, in between steps", "evaluation of step 4: WER", "step 8/8  loss", "Word error rate"):
        assert part in done.stdout, part
    folder = tmp_path / "whole"
    scored = read_journal(folder / "metrics.jsonl", "evaluation")
    assert [line["step"] for line in scored] == [4, 8]
    assert [problem for line in read_journal(folder / "metrics.jsonl") for problem in check_line(line)] == []
    check_tracked(folder, {"train/loss": range(1, 9), "eval/asr/val_asr/wer": (4, 8), "layers/text/worst_max_over_mean": (8,)})
    result = json.loads((folder / "evaluation.json").read_bytes())
    assert result["sets"] == scored[-1]["sets"] and json.loads((folder / "summary.json").read_bytes())["sets"] == result["sets"]
    for name in ("hypotheses.jsonl", "report.html", "environment.json", "config.yaml"):
        assert (folder / name).stat().st_size, name
    # Each names the same file from where it is itself.
    apart, again = (
        {name: {**section, "rejected_file": Path(section["rejected_file"]).name} for name, section in sets.items()}
        for sets in (result["sets"], evaluated(tmp_path, folder / "export", flags))
    )
    assert apart == again
    again = run(command(tmp_path, 2, "whole", ep_size=2, **flags, **TRACKED))
    assert again.returncode == 0 and "is complete (8 steps); nothing to do" in again.stdout


def evaluated(root: Path, model: Path, flags: dict[str, object]) -> dict[str, object]:
    """The figures of `most-ray evaluate` by set."""
    words = [sys.executable, "-m", "most_ray.cli", "evaluate", "--model", str(model), "--output", str(root / "again.json")]
    words += ["--store_dir", str(root / "store"), "--batch_size", "3"]
    for name in ("max_new_units", "max_new_tokens"):
        words += [f"--{name}", str(flags[name])]
    for task in ("asr", "tts", "text"):
        words += [f"--{task}_dirs", str(flags[f"val_{task}_dirs"])]
    done = run(words)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads((root / "again.json").read_bytes())["sets"])


def test_torchrun_and_one_process_train_the_same(tmp_path: Path) -> None:
    for ranks in (1, 2):
        done = run(command(tmp_path, ranks, f"r{ranks}", ep_size=ranks))
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "r1.trace").read_bytes() == (tmp_path / "r2.trace").read_bytes()
    losses = [[line["loss"] for line in lines(tmp_path, f"r{ranks}")] for ranks in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 8
    assert (tmp_path / "r2" / "export" / "config.json").exists()
    assert [p.parent.name for p in sorted((tmp_path / "r2").glob("checkpoints/*/commit.json"))] == ["step-000000004", "step-000000008"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_stops_behind_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 75, a checkpoint of the step that it had come to; the same command resumes the run, its trackers included."""
    words = command(tmp_path, 1, "ended", logging_steps=1, **TRACKED)
    trace = tmp_path / "ended.trace"
    default = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests in the background may have it ignored
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=default) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "starting after step" in line:
                break
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(timeout=120) == 75, rest
    assert re.search(r"most-ray: stopped: the checkpoint of step \d+ was written\.", rest)
    done = len(trace.read_text().splitlines())
    assert 1 <= done < 8 and (tmp_path / "ended" / "checkpoints" / f"step-{done:09d}" / "commit.json").exists()
    assert run(words).returncode == 0
    assert [line["step"] for line in lines(tmp_path, "ended")] == list(range(1, 9))
    check_tracked(tmp_path / "ended", {"train/loss": range(1, 9)})


def test_a_mistake_is_told_once_by_one_rank(tmp_path: Path) -> None:
    done = run(command(tmp_path, 2, "wrong", ep_size=3))
    assert done.returncode != 0 and done.stderr.count("topology error: ep_size = 3") == 1


def test_from_python_a_run_is_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None where it was stopped, the summary where it is complete, and silent where it is given no console."""
    flags = small_data(tmp_path / "data") | {"val_asr_dirs": "", "val_tts_dirs": "", "val_text_dirs": ""}
    values = {"output_dir": str(tmp_path), "name": "called", "max_steps": 4, "save_steps": 2, "global_batch_size": 4, "use_gpu": False}
    config = config_from({**flags, **values})
    stop = threading.Event()
    stop.set()
    assert train(config, stop=stop) is None and not (tmp_path / "called" / "summary.json").exists()
    assert [line["step"] for line in lines(tmp_path, "called")] == [1]
    summary = train(config)
    written = json.loads((tmp_path / "called" / "summary.json").read_bytes())
    assert summary == placed(written, str(tmp_path / "called")) and written["export"] == "export"
    assert summary["step"] == 4 and [line["step"] for line in lines(tmp_path, "called")] == [1, 2, 3, 4]
    metrics = (tmp_path / "called" / "metrics.jsonl").read_bytes()
    assert train(config) == summary and (tmp_path / "called" / "metrics.jsonl").read_bytes() == metrics
    assert capsys.readouterr().out == ""
    with pytest.raises(TopologyError, match="ep_size = 2"):
        train(replace(config, name="wrong", ep_size=2))
