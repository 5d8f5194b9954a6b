"""A run that resumes says what has changed since its checkpoint; weights in another model, and runs that train nothing, are errors."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from most_ray.checkpoint import catalog
from most_ray.errors import CheckpointError, ConfigError
from most_ray.runs.first_checks import completed_line
from most_ray.runs.lifecycle import begin_run, is_complete
from most_ray.runs.resolve import Prepared, _check_trained
from most_ray.train import step
from most_ray.train.step import TrainingDivergedError
from tests.support.runs import go, lines_of, prepare_small

Prepare = Callable[..., Prepared]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps that was stopped after two of them."""
    root = tmp_path_factory.mktemp("runs")
    assert not go(prepare_small(root, save_steps=2), stop_at=2)
    return root


@pytest.fixture
def prepare(two_steps: Path, tmp_path: Path) -> Prepare:
    """Prepares the rest of that run, in a copy of its own, with other values."""
    root = shutil.copytree(two_steps, tmp_path / "runs")
    return lambda **changes: prepare_small(root, **{"save_steps": 2, **changes})


def test_nothing_has_changed(prepare: Prepare) -> None:
    prepared = prepare(save_steps=1, keep_last=3, logging_steps=1, max_skipped_steps=7)
    said = ["max_skipped_steps (20 -> 7)", "save_steps (2 -> 1)", "keep_last (100 -> 3)"]
    assert (prepared.done_steps, prepared.changed, prepared.also_changed) == (2, [], said)
    assert go(prepared)
    first, second = lines_of(prepared, "start")
    assert [line["exact"] for line in (first, second)] == [True, True]
    assert (first["also_changed"], second["also_changed"]) == ([], said), "what changes no step is named too"
    kept = [yaml.safe_load((prepared.folder.local / line["config"]).read_text()) for line in (first, second)]
    assert [line["config"] for line in (first, second)] == ["attempts/001.yaml", "attempts/002.yaml"]
    assert [each["save_steps"] for each in kept] == [2, 1] and kept[0].keys() == kept[1].keys()


def test_a_setting_of_the_data_is_named_with_its_values_and_is_not_exact(prepare: Prepare) -> None:
    prepared = prepare(seed=5, accept_data_change=True, threads_per_worker=1, logging_steps=2)
    assert prepared.changed == ["seed (0 -> 5)"]
    assert prepared.also_changed == ["accept_data_change (False -> True)", "logging_steps (1 -> 2)"]


def test_a_changed_length_is_named_once(prepare: Prepare) -> None:
    prepared = prepare(max_steps=6)
    assert (prepared.changed, prepared.also_changed) == (["total_steps (4 -> 6)"], [])


def test_credentials_are_in_no_kept_configuration_and_in_no_change(prepare: Prepare) -> None:
    prepared = prepare(ray_address="ray://user:secret@there:10001", save_steps=3)
    assert not go(prepared, stop_at=3)
    written = (prepared.folder.local / "attempts" / "002.yaml").read_text()
    changes = [*prepared.also_changed, *lines_of(prepared, "start")[-1]["also_changed"]]
    assert "ray://***@there:10001" in written and any("ray://***@there:10001" in each for each in changes)
    assert "secret" not in written and not any("secret" in each for each in changes)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("learning_rate", 1e-3, "learning_rate (0.003 -> 0.001)"),
        ("weight_decay", 0.5, "weight_decay (0.01 -> 0.5)"),
        ("adam_beta1", 0.8, "adam_beta1 (0.9 -> 0.8)"),
        ("adam_beta2", 0.9, "adam_beta2 (0.95 -> 0.9)"),
        ("adam_epsilon", 1e-6, "adam_epsilon (1e-08 -> 1e-06)"),
        ("lr_scheduler", "linear", "lr_scheduler ('cosine' -> 'linear')"),
        ("warmup_steps", 3, "warmup_steps (2 -> 3)"),
        ("asr_loss_weight", 1, "asr_loss_weight (3.0 -> 1.0)"),
        ("max_grad_norm", 0, "max_grad_norm (1.0 -> 0.0)"),
        ("balance_bias_rate", 0.1, "balance_bias_rate (0.0 -> 0.1)"),
        ("bf16", True, "bf16 (False -> True)"),
        ("aux_loss_alpha", 0, "aux_loss_alpha (0.02 -> 0.0)"),
        ("seq_aux", False, "seq_aux (True -> False)"),
        ("num_experts_per_tok", 1, "num_experts_per_tok (2 -> 1)"),
        ("max_steps", 5, "total_steps (4 -> 5)"),
    ],
)
def test_a_changed_setting_is_named(prepare: Prepare, name: str, value: Any, said: str) -> None:
    assert prepare(**{name: value}).changed == [said]


def test_what_has_changed_is_in_the_line_of_the_start_and_is_told_once(prepare: Prepare) -> None:
    changes = {"learning_rate": 1e-3, "text_expert_indices": [0, 1, 2, 7]}
    prepared = prepare(**changes)
    assert not go(prepared, stop_at=3)
    said = ["text_expert_indices ([0, 1, 2, 3] -> [0, 1, 2, 7])", "audio_expert_indices ([4, 5, 6, 7] -> [3, 4, 5, 6])"]
    said.append("learning_rate (0.003 -> 0.001)")
    first, second = lines_of(prepared, "start")
    assert first["exact"] and (second["exact"], second["changed"]) == (False, said) and prepared.changed == said
    assert prepare(**changes).changed == []


def test_more_steps_at_a_constant_rate_change_nothing(tmp_path: Path) -> None:
    assert not go(prepare_small(tmp_path, lr_scheduler="constant"), stop_at=1)
    assert prepare_small(tmp_path, lr_scheduler="constant", max_steps=9).changed == []


def test_groups_of_experts_that_are_swapped_are_refused(prepare: Prepare) -> None:
    with pytest.raises(CheckpointError, match=r"^text_expert_indices = \[4, 5, 6, 7\]: were \[0, 1, 2, 3\] up to the checkpoint"):
        prepare(text_expert_indices=[4, 5, 6, 7])
    assert len(prepare(text_expert_indices=[0, 1, 2, 3, 4, 5]).changed) == 2


def test_weights_alone_are_refused_in_swapped_groups_too(prepare: Prepare, two_steps: Path) -> None:
    checkpoint = str(two_steps / "small" / "checkpoints" / "step-000000002")
    weights = {"name": "other", "model_name_or_path": str(two_steps / "small" / "init"), "resume_from_checkpoint": checkpoint}
    assert prepare(**weights, ignore_optimizer_state=True).changed == []
    with pytest.raises(CheckpointError, match="no expert that it was trained with would be left to text"):
        prepare(**weights, ignore_optimizer_state=True, text_expert_indices=[4, 5, 6, 7])


@pytest.mark.parametrize(("field", "value"), [("routed_scaling_factor", 2.5), ("norm_topk_prob", False), ("rms_norm_eps", 0.1)])
def test_a_model_that_computes_otherwise_is_refused(prepare: Prepare, two_steps: Path, tmp_path: Path, field: str, value: Any) -> None:
    model = shutil.copytree(two_steps / "small" / "init", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(CheckpointError, match=f"^checkpoint = .*trained with {field} = "):
        prepare(model_name_or_path=str(model))


def test_weights_that_are_not_finite_are_named_before_training(two_steps: Path, tmp_path: Path) -> None:
    model = shutil.copytree(two_steps / "small" / "init", tmp_path / "model")
    (path,) = model.glob("*.safetensors")
    weights = load_file(path)
    name = sorted(name for name in weights if "down_proj" in name)[0]
    weights[name][0, 0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    prepared = prepare_small(tmp_path, model_name_or_path=str(model))
    said = (
        r"^model_name_or_path = .*holds values that are not finite, in 1 of its tensors, the first being model\.layers\.0\.mlp\.down_proj"
    )
    with pytest.raises(CheckpointError, match=said):
        go(prepared)
    assert lines_of(prepared, "train") == [] and catalog.committed(prepared.folder.checkpoints) == []


def test_a_run_whose_every_step_is_skipped_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps than max_skipped_steps, so that none of them was the last one allowed."""
    monkeypatch.setattr(step, "grad_square", lambda _: torch.tensor(torch.inf, dtype=torch.float64))
    for _ in range(2):  # the same command makes the last step again
        prepared = prepare_small(tmp_path, max_steps=3, save_steps=1)
        with pytest.raises(TrainingDivergedError, match="step 3 is the last of 3 skipped in a row"):
            go(prepared)
        assert not is_complete(prepared)


def test_such_a_run_of_an_earlier_version_is_not_complete_either() -> None:
    with pytest.raises(CheckpointError, match=r"^checkpoint = 's3://\*\*\*@b/c': ends a run that has trained nothing: of 4 steps all were"):
        _check_trained("s3://u:p@b/c", {"step": 4, "skipped_in_row": 4}, 4)
    _check_trained("c", {"step": 4, "skipped_in_row": 3}, 4)
    _check_trained("c", {"step": 4, "skipped_in_row": 4}, 5)


def test_a_run_that_is_complete_says_what_has_no_effect(prepare: Prepare) -> None:
    assert completed_line("small", 4, prepare().changed) == "The run 'small' is complete (4 steps); nothing to do."
    said = "nothing to do. Changed since, without effect: learning_rate (0.003 -> 0.001)."
    assert completed_line("small", 4, prepare(learning_rate=1e-3).changed).endswith(said)


def test_a_warm_up_that_is_longer_than_the_run_is_told(prepare: Prepare, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "most_ray"):
        for changes in ({"warmup_steps": 3}, {"warmup_steps": 0, "warmup_ratio": 0.5}):
            prepared = prepare(**changes)
            begin_run(prepared, prepared.job.config)
        assert caplog.messages == []
        prepared = prepare(warmup_steps=60)
        begin_run(prepared, prepared.job.config)
    said = "warmup_steps: the warm-up takes 60 steps, the run has 4: the learning rate only rises, to 0.00015 at the end instead of 0.003."
    assert caplog.messages == [said]


def test_records_of_a_step_by_default_are_bounded_too(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps / "data", tmp_path / "data")
    with pytest.raises(ConfigError, match=r"^global_batch_size = 1500000: must be at most 1,000,000"):
        prepare_small(tmp_path, global_batch_size=None, train_batch_size=100_000, gradient_accumulation_steps=15)
