"""A sweep's configuration and its rules; and from a trial's values to its run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from most_ray.config import RunConfig, config_from
from most_ray.errors import ConfigError
from most_ray.sweep.ledger import Ledger, Objective
from most_ray.sweep.options import Sweep, SweepOptions, add_flags, flag_values, known_metrics, load_sweep, mutable
from most_ray.sweep.space import parse_space
from most_ray.sweep.trials import StartModel, TrialBase, start_keys
from tests.support.builders import tiny_config


def write(path: Path, **content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def sweep_of(folder: Path, space: Any = None, flags: Mapping[str, Any] | None = None, **changes: Any) -> Sweep:
    """A sweep with one ASR, one TTS and one text set to validate on."""
    content = {
        "name": "try",
        "output_dir": str(folder),
        "train_asr_dirs": ["data/heard"],
        "train_tts_dirs": ["data/spoken"],
        "val_asr_dirs": ["data/takes"],
        "val_tts_dirs": ["data/takes"],
        "val_text_dirs": ["data/books"],
        "eval_steps": 4,
        "max_steps": 12,
        "space": {"learning_rate": {"uniform": [0.001, 0.01]}} if space is None else space,
        **changes,
    }
    return load_sweep(write(folder / "sweep.yaml", **content), flags or {})


def setting_of(sweep: Sweep, order: Sequence[int] | None = None, shared: Mapping[str, Any] | None = None, **model: Any) -> TrialBase:
    return TrialBase(sweep, {key: StartModel(tiny_config(**model), order) for key in start_keys(sweep)}, shared or {})


# Options


def test_flags_overrule_the_file_and_the_file_its_base(tmp_path: Path) -> None:
    """A base gives every key of a run but its name; keys of the sweep and of the run may stand side by side, as flags too."""
    base = write(tmp_path / "base.yaml", name="digits", seed=1, learning_rate=0.1, weight_decay=0.2, val_asr_dirs=["base/x"], eval_steps=2)
    space = {"asr_tts_mix_ratio": [0.5, 0.6]}
    file = write(tmp_path / "s.yaml", base=str(base), learning_rate=0.3, weight_decay=0.4, max_trials=3, search="grid", space=space)
    flags = {"weight_decay": "0.5", "max_trials": "1", "objectives": ["loss", "max:wer/x"]}
    sweep = load_sweep(file, flags)
    run = sweep.run
    assert (run.seed, run.learning_rate, run.weight_decay, run.val_asr_dirs, run.eval_steps) == (1, 0.3, 0.5, ("base/x",), 2)
    assert (run.name, run.output_dir) == ("sweep", "runs")
    assert (sweep.options.max_trials, sweep.options.search, sweep.options.scheduler) == (1, "grid", "none")
    assert sweep.objectives == (Objective("loss"), Objective("wer/x", True))
    assert sweep.space == parse_space(space) and sweep.raw_space == {"asr_tts_mix_ratio": ["0.5", "0.6"]}
    assert load_sweep(file, {"name": "other"}).run.name == "other"
    assert load_sweep(file, {"base": str(write(tmp_path / "b2.yaml", val_tts_dirs=["y"], eval_steps=1))}).run.seed == 0


def test_values_are_those_that_were_given_as_their_types(tmp_path: Path) -> None:
    """Whatever a flag's text was: trials hand them on as they are."""
    sweep = sweep_of(tmp_path, flags={"eval_steps": "none", "seed": "7", "val_tts_dirs": "", "use_gpu": "false", "num_workers": "2"})
    assert {"eval_steps", "seed", "name", "max_steps"} <= set(sweep.values) and "learning_rate" not in sweep.values
    wanted = {"eval_steps": None, "seed": 7, "val_tts_dirs": (), "use_gpu": False, "num_workers": (2,)}
    assert {name: sweep.values[name] for name in wanted} == wanted
    assert config_from(sweep.values) == sweep.run


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"max_trails": 3}, "max_trails: is no known flag or configuration key. Did you mean 'max_trials'?"),
        ({"learning_rat": 3}, "learning_rat: is no known flag or configuration key. Did you mean 'learning_rate'?"),
        ({"spaces": {}}, "spaces: is no known flag or configuration key. Did you mean 'space'?"),
        ({"search": "randm"}, "search = 'randm': is not one of its choices. Did you mean 'random'?"),
        ({"max_trials": "many"}, "max_trials = 'many': is not a whole number."),
        ({"objectives": ["wer/take"]}, "objectives = 'wer/take': is not measured for trials. Did you mean 'wer/takes'?"),
        ({"objectives": ["max:los"]}, "objectives = 'los': is not measured for trials. Did you mean 'loss'?"),
        ({"objectives": ["mx:loss"]}, "objectives = 'mx:loss': is not measured for trials. Did you mean 'loss'?"),
        ({"objectives": ["outside_wer/takes"]}, "objectives = 'outside_wer/takes': is not measured for trials."),
        ({"objectives": ["loss", "max:loss"]}, "objectives = ('loss', 'max:loss'): names a metric twice."),
        ({"val_asr_dirs": [], "val_tts_dirs": [], "val_text_dirs": []}, "val_asr_dirs = (): names no validation set"),
        ({"max_trials": 0}, "max_trials = 0: must be at least 1."),
        ({"max_concurrent_trials": 0}, "max_concurrent_trials = 0: must be at least 1."),
        ({"grace_steps": 0}, "grace_steps = 0: must be at least 1."),
        ({"perturb_steps": -1}, "perturb_steps = -1: must be at least 1."),
        ({"max_hours": 0}, "max_hours = 0.0: must be above 0."),
        ({"search_seed": -1}, "search_seed = -1: must not be negative."),
        ({"reduction_factor": 1}, "reduction_factor = 1.0: must be above 1."),
        ({"num_workers": "1,2"}, "num_workers = (1, 2): must be one number"),
        ({"scheduler": "pbt", "resume_from_checkpoint": "x"}, "resume_from_checkpoint = 'x': excludes population based training"),
        ({"scheduler": "asha", "eval_steps": None}, "eval_steps: is needed: asha compares trials at their evaluations."),
        ({"scheduler": "pbt", "eval_steps": None}, "eval_steps: is needed: pbt compares"),
        ({"search": "grid"}, "space.learning_rate: has infinitely many values, so it makes no grid."),
        ({"search": "tpe", "space": {"seed": {"grid": [1, 2]}}}, "space.seed: is a grid, and tpe searches none."),
        ({"scheduler": "pbt", "search": "tpe"}, "search = 'tpe': excludes population based training"),
        ({"scheduler": "pbt", "space": {"seed": [1, 2], "adam_beta1": {"uniform": [0.8, 0.9]}}}, "space: holds nothing that can change"),
        ({"scheduler": "pbt", "perturb_steps": 6}, "perturb_steps = 6: is no multiple of eval_steps (4)."),
        ({"scheduler": "pbt", "objectives": ["loss", "wer"]}, "objectives = ('loss', 'wer'): are several"),
        ({"space": {}}, "space = {}: names no setting to try."),
        ({"learning_rate": 0}, "learning_rate = 0.0: must be above 0."),
    ],
)
def test_a_configuration_that_cannot_be(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    """One line that names the key, its value, the rule and, of a slip, the nearest."""
    with pytest.raises(ConfigError) as caught:
        sweep_of(tmp_path, **content)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"max_trials": 1, "max_concurrent_trials": 1, "grace_steps": 1, "perturb_steps": 4, "max_hours": 0.01, "search_seed": 0},
        {"reduction_factor": 1.01, "num_workers": 2},
        {"resume_from_checkpoint": "x", "scheduler": "asha"},
        {"eval_steps": None},
        {"scheduler": "pbt", "perturb_steps": 8},
        {"scheduler": "pbt", "objectives": ["max:loss"]},
        {"search": "tpe", "objectives": ["loss", "wer"]},
        {"val_asr_dirs": [], "val_tts_dirs": []},
        {"recogniser": "x", "objectives": ["outside_wer/takes"]},
        {"search": "grid", "space": {"seed": "1..3", "expert_split": {"grid": ["affinity"]}}},
    ],
)
def test_the_edge_of_what_can_be(tmp_path: Path, content: dict[str, Any]) -> None:
    sweep_of(tmp_path, **content)


def test_a_base_may_hold_a_runs_keys_alone(tmp_path: Path) -> None:
    base = write(tmp_path / "b.yaml", max_trials=3)
    with pytest.raises(ConfigError, match=r"^max_trials: is no known flag or configuration key"):
        sweep_of(tmp_path, base=str(base))
    with pytest.raises(ConfigError, match=r"^config = .*nowhere\.yaml': cannot be read"):
        sweep_of(tmp_path, base=str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("changes", "objective"),
    [
        ({}, "wer/takes"),
        ({"val_asr_dirs": ["a/b/x", "c/d/x"]}, "wer/b/x"),
        ({"val_asr_dirs": []}, "loss"),
        ({"val_asr_dirs": [], "val_tts_dirs": []}, "loss"),
    ],
)
def test_the_objective_where_none_is_named(tmp_path: Path, changes: dict[str, Any], objective: str) -> None:
    assert sweep_of(tmp_path, **changes).objectives == (Objective(objective),)


def test_what_can_be_an_objective(tmp_path: Path) -> None:
    """All figures of the evaluations, in the order of the sets, and the numbers of training."""
    found = known_metrics(sweep_of(tmp_path).run)
    of_sets = "wer/takes cer/takes cycle_wer/takes unit_error_rate/takes loss/asr/takes perplexity/asr/takes loss/tts/takes"
    of_sets += " perplexity/tts/takes duration_ratio/tts/takes loss/text/books perplexity/text/books loss wer"
    assert [name for name in found if not name.startswith("train/")] == of_sets.split()
    trained = {name for name in found if name.startswith("train/")}
    assert {"train/loss", "train/grad_norm", "train/epoch", "train/tokens", "train/samples"} <= trained
    assert not trained & {"train/kind", "train/step", "train/time", "train/mix", "train/layers", "train/expert_load"}
    assert "wer" not in known_metrics(sweep_of(tmp_path, val_asr_dirs=[]).run)
    assert "outside_wer/takes" in known_metrics(sweep_of(tmp_path, recogniser="whisper").run)


def test_how_many_trials_there_are(tmp_path: Path) -> None:
    grid = {"seed": [1, 2, 3], "lr_scheduler": ["linear", "cosine"]}
    assert sweep_of(tmp_path).max_trials == 10
    assert sweep_of(tmp_path, max_trials=20).max_trials == 20
    assert sweep_of(tmp_path, grid, search="grid").max_trials == 6
    assert sweep_of(tmp_path, {"seed": "1..12"}, search="grid").max_trials == 12
    assert sweep_of(tmp_path, grid, search="grid", max_trials=4).max_trials == 4
    assert sweep_of(tmp_path, grid, search="grid", max_trials=40).max_trials == 6
    assert sweep_of(tmp_path, {"seed": {"grid": [1, 2]}}, max_trials=40).max_trials == 40


def test_steps_between_decisions(tmp_path: Path) -> None:
    """Of each scheduler those between evaluations where nothing else is said."""
    assert (sweep_of(tmp_path).grace_steps, sweep_of(tmp_path).perturb_steps) == (4, 4)
    own = sweep_of(tmp_path, grace_steps=3, perturb_steps=8)
    assert (own.grace_steps, own.perturb_steps) == (3, 8)
    never = sweep_of(tmp_path, eval_steps=None)
    assert (never.grace_steps, never.perturb_steps) == (1, 1)


def test_what_population_based_training_changes(tmp_path: Path) -> None:
    """Ranges that a run can take up in the middle, also in a list; neither choices nor what its optimizer's state depends on."""
    space = {
        "learning_rate": {"loguniform": [0.001, 0.01]},
        "train_asr_weights": [{"uniform": [1, 2]}, {"choice": [1, 2]}],
        "asr_tts_mix_ratio": [0.5, 0.6],
        "adam_beta2": {"uniform": [0.9, 0.99]},
        "seed": "1..3",
    }
    assert mutable(parse_space(space)) == ["learning_rate", "train_asr_weights[0]"]


def test_the_written_sweep_is_the_same_sweep(tmp_path: Path) -> None:
    """Also without its base's file; defaults are left out."""
    base = write(tmp_path / "base.yaml", seed=3, train_text_dirs=["t"], text_mix_ratio=0.25, val_asr_dirs=["x"])
    space = {"train_asr_weights": [{"uniform": [0.5, 2]}], "expert_split": "affinity | interleaved", "audio_experts": "2..6"}
    changes = {"max_hours": 2, "objectives": ["max:loss", "wer"], "search_seed": 5, "scheduler": "asha", "num_workers": 2}
    sweep = sweep_of(tmp_path, space, {"seed": "4"}, base=str(base), **changes)
    base.unlink()
    written = sweep.to_yaml()
    (tmp_path / "again.yaml").write_text(written, encoding="utf-8")
    again = load_sweep(tmp_path / "again.yaml", {})
    assert again.run == sweep.run and dict(again.values) == {**sweep.values}
    assert (again.space, again.raw_space, again.objectives) == (sweep.space, sweep.raw_space, sweep.objectives)
    assert again.options == replace(sweep.options, base=None)
    assert list(yaml.safe_load(written))[:2] == ["name", "output_dir"]
    assert not {"base", "search", "max_trials", "adam_beta1"} & set(yaml.safe_load(written))
    assert again.to_yaml() == written


def test_the_written_sweep_holds_no_credentials(tmp_path: Path) -> None:
    secret = "s3://key:hunter2@bucket/x?endpoint_override=hunter2"
    uris = {"output_dir": secret, "store_dir": secret, "train_asr_dirs": [secret, "y"], "model_name_or_path": secret}
    sweep = sweep_of(tmp_path, **uris)
    assert "hunter2" in sweep.run.output_dir
    assert "hunter2" not in sweep.to_yaml()
    assert yaml.safe_load(sweep.to_yaml())["train_asr_dirs"] == ["s3://***@bucket/x?***", "y"]


def test_flags_of_the_command_line(tmp_path: Path) -> None:
    """The sweep's own beside a run's; those that are not given stay away, and of others' none is taken."""
    from most_ray import config

    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    add_flags(parser)
    config.add_flags(parser)
    words = "--config x --max_trials 3 --objectives wer/a max:loss --scheduler asha --learning_rate 0.1 --val_asr_dirs a b"
    found = flag_values(parser.parse_args(words.split()))
    assert found == {
        "max_trials": "3",
        "objectives": ["wer/a", "max:loss"],
        "scheduler": "asha",
        "learning_rate": "0.1",
        "val_asr_dirs": ["a", "b"],
    }
    shown = " ".join(parser.format_help().split())
    assert all(f"--{f.name} " in shown for f in fields(SweepOptions))


def test_no_key_is_the_sweeps_and_the_runs() -> None:
    assert not {f.name for f in fields(SweepOptions)} & {f.name for f in fields(RunConfig)}


def test_a_sweep_of_an_earlier_version_is_the_same_sweep(tmp_path: Path) -> None:
    """What the ledger has kept is compared in today's words; keys that change no trial may differ."""
    from most_ray.service.tune.runner import _check_unchanged, _fixed

    sweep = sweep_of(tmp_path)
    fixed = _fixed(sweep)
    assert fixed["weight_unit"] == "records" and not {"output_dir", "max_trials", "keep_last", "wandb_tags"} & {*fixed}
    for changes, message in (({"weight_unit": "rows"}, None), ({"weight_unit": "tokens"}, "weight_unit"), ({"seed": 3}, "seed")):
        file: Any = SimpleNamespace(ledger=Ledger({"fixed": {**fixed, **changes}}, {}))
        if message is None:
            _check_unchanged(sweep, file)
        else:
            with pytest.raises(ConfigError, match=message):
                _check_unchanged(sweep, file)


def test_a_sweep_of_an_earlier_version_has_the_same_space(tmp_path: Path) -> None:
    """It kept numbers, of whose text this version keeps what stands in the file; another number is another space."""
    from most_ray.service.tune.runner import _check_unchanged, _fixed

    sweep = sweep_of(tmp_path, {"learning_rate": {"uniform": [0.001, 0.01]}, "train_batch_size": "2..4", "fp16": [True, False]})
    kept = {**_fixed(sweep), "space": {"learning_rate": {"uniform": [1e-3, 0.01]}, "train_batch_size": "2..4", "fp16": [True, False]}}
    assert sweep.raw_space["learning_rate"] == {"uniform": ["0.001", "0.01"]}
    _check_unchanged(sweep, SimpleNamespace(ledger=SimpleNamespace(sweep={"fixed": kept})))  # type: ignore[arg-type]
    kept["space"]["learning_rate"] = {"uniform": [0.002, 0.01]}
    with pytest.raises(ConfigError, match="value of space"):
        _check_unchanged(sweep, SimpleNamespace(ledger=SimpleNamespace(sweep={"fixed": kept})))  # type: ignore[arg-type]


def test_numbers_of_a_space_are_written_without_quotes(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"learning_rate": ["0.001", "1e-4"], "warmup_steps": ["10", "012"]})
    assert yaml.safe_load(sweep.to_yaml())["space"] == {"learning_rate": [0.001, "1e-4"], "warmup_steps": [10, "012"]}
