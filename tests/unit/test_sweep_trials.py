"""From a trial's values to its run: settings, what makes them invalid, the winner's configuration, and what all trials will cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from most_ray.config import load_config
from most_ray.errors import ConfigError, UserError
from most_ray.sweep import trials
from most_ray.sweep.ledger import Trial
from most_ray.sweep.trials import StartModel, TrialBase, estimate, first_valid, proposals, run_name, start_key, start_keys
from tests.support.builders import tiny_config
from tests.unit.test_sweep_options import setting_of, sweep_of

OF_EVERY_TRIAL = {"max_steps": 12, "threads_per_worker": 1, "num_workers": [1], "use_gpu": False}
NO_NUMBERS = {"name", "output_dir", "store_dir", "wandb_group", "resume_from_checkpoint", "accept_data_change"}
ORDER = [3, 5, 0, 1, 7, 6, 2, 4]  # experts of the model, most text first


@pytest.mark.parametrize(
    ("values", "text", "audio"),
    [
        ({"expert_split": "contiguous", "audio_experts": 3}, [0, 1, 2, 3, 4], [5, 6, 7]),
        ({"expert_split": "interleaved", "audio_experts": 2}, [0, 1, 3, 4, 5, 7], [2, 6]),
        ({"expert_split": "affinity", "audio_experts": 3}, [0, 1, 3, 5, 7], [2, 4, 6]),
        ({"audio_experts": 2}, [0, 1, 2, 3, 4, 5], [6, 7]),
        ({"expert_split": "interleaved"}, [0, 2, 4, 6], [1, 3, 5, 7]),
        ({"expert_split": "affinity"}, [0, 1, 3, 5], [2, 4, 6, 7]),
    ],
)
def test_a_split_becomes_indices(tmp_path: Path, values: dict[str, Any], text: list[int], audio: list[int]) -> None:
    """A number alone takes the last experts; a split alone as many as the model has."""
    space = {name: [value] for name, value in values.items()}
    settings = setting_of(sweep_of(tmp_path, space), ORDER, {"max_steps": 12}).settings_of(values)
    assert settings == {
        "use_modality_aware_routing": True,
        "text_expert_indices": text,
        "audio_expert_indices": audio,
        "max_steps": 12,
    }


@pytest.mark.parametrize(
    ("run", "model", "number"),
    [
        ({"audio_expert_indices": [5, 6, 7]}, {}, 3),
        ({}, {"text_expert_indices": [0, 1], "audio_expert_indices": [2, 3, 4, 5, 6, 7]}, 6),
        ({}, {"use_modality_aware_routing": False}, 4),
        ({"audio_expert_indices": [6, 7]}, {"text_expert_indices": [0, 1], "audio_expert_indices": [2, 3, 4, 5, 6, 7]}, 2),
    ],
)
def test_how_many_experts_a_split_alone_gives_to_audio(tmp_path: Path, run: dict[str, Any], model: dict[str, Any], number: int) -> None:
    """As the run says, else as the model has it, else half of them."""
    sweep = sweep_of(tmp_path, {"expert_split": ["interleaved"]}, **run)
    settings = setting_of(sweep, **model).settings_of({"expert_split": "interleaved"})
    assert len(settings["audio_expert_indices"]) == number


def test_settings_without_a_split_are_the_values(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"train_asr_weights": [{"uniform": [1, 2]}], "seed": [1, 2]})
    values = {"train_asr_weights[0]": 1.5, "seed": 2}
    assert setting_of(sweep, shared=OF_EVERY_TRIAL).settings_of(values) == {"train_asr_weights": [1.5], "seed": 2, **OF_EVERY_TRIAL}


@pytest.mark.parametrize(
    ("space", "changes", "model", "said"),
    [
        ({"audio_experts": 8}, {}, {}, r"audio_experts = 8: must be in 1\.\.7"),
        ({"audio_experts": 7}, {}, {}, "num_experts_per_tok = 2: is more than the 1 expert of text_expert_indices"),
        ({"num_experts_per_tok": 5}, {}, {}, "num_experts_per_tok = 5: is more than the 4 experts of text_expert_indices"),
        ({"num_experts_per_tok": 9}, {"use_modality_aware_routing": False}, {}, r"num_experts_per_tok = 9: must be in 1\.\.8"),
        ({"audio_experts": 6}, {"num_experts_per_tok": 3}, {}, "num_experts_per_tok = 3: is more than the 2 experts"),
        ({"audio_expert_indices": {"choice": [[7]]}}, {}, {}, "num_experts_per_tok = 2: is more than the 1 expert of audio"),
        ({"audio_expert_indices": {"choice": [[6, 7]]}}, {"text_expert_indices": [0, 1, 2]}, {}, r"experts \[3, 4, 5\] are in no group"),
        ({"text_expert_indices": {"choice": [[0, 8]]}}, {}, {}, r"text_expert_indices = \[0, 8\]: must hold different experts"),
        ({"train_asr_weights": {"choice": [[1, 2]]}}, {}, {}, "train_asr_weights = .*needs one positive weight"),
        ({"ep_size": 3}, {"num_workers": 3}, {}, "ep_size = 3: must divide"),
        ({"dp_replicate_size": 2}, {}, {}, "dp_replicate_size = 2: must divide the number of workers"),
        ({"audio_experts": 4}, {}, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1, "num_experts_per_tok": 2}, ""),
        (
            {"expert_split": "interleaved"},
            {},
            {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1, "num_experts_per_tok": 2},
            "topk_group = 1: can leave",
        ),
    ],
)
def test_a_trial_that_cannot_be_says_why(
    tmp_path: Path, space: dict[str, Any], changes: dict[str, Any], model: dict[str, Any], said: str
) -> None:
    sweep = sweep_of(tmp_path, space, **changes)
    (values,) = [{name: d.values[0] for name, d in zip(sweep.space.names, sweep.space.dimensions, strict=True)}]
    setting = setting_of(sweep, **model)
    if not said:
        assert setting.settings_of(values)
        return
    with pytest.raises(UserError, match=f"^{said}|{said}"):
        setting.settings_of(values)


@pytest.mark.parametrize(
    ("space", "changes"),
    [
        ({"audio_expert_indices": {"choice": [[5, 6, 7]]}}, {}),  # the others are text's
        ({"text_expert_indices": {"choice": [[0, 1]]}}, {}),
        ({"num_experts_per_tok": 5}, {"use_modality_aware_routing": False}),
        ({"num_experts_per_tok": 8}, {"use_modality_aware_routing": False}),
        ({"ep_size": 2}, {"num_workers": 2}),
    ],
)
def test_a_trial_that_can_be(tmp_path: Path, space: dict[str, Any], changes: dict[str, Any]) -> None:
    sweep = sweep_of(tmp_path, space, **changes)
    setting_of(sweep).settings_of({d.name: d.values[0] for d in sweep.space.dimensions})


def test_a_space_without_a_valid_trial_says_the_commonest_reason(tmp_path: Path) -> None:
    """All points of a grid are looked at; one that is valid is enough."""
    grid = {"seed": [1, 2], "num_experts_per_tok": [2, 3]}
    with pytest.raises(ConfigError) as caught:
        first_valid(setting_of(sweep_of(tmp_path, {"audio_experts": [8, 7], **grid}, search="grid")))
    assert str(caught.value) == (
        "space = ['audio_experts', 'seed', 'num_experts_per_tok']: holds no trial that can be trained: 8 were checked, and most of them "
        "fail with: audio_experts = 8: must be in 1..7: text needs experts too."
    )
    found = first_valid(setting_of(sweep_of(tmp_path, {"audio_experts": [8, 7, 2], **grid}, search="grid")))
    assert (len(found["audio_expert_indices"]), found["seed"]) == (2, 1)


def test_only_some_proposals_of_a_space_without_end_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that will be trials; of tpe, whose own are not known yet, many random ones."""
    monkeypatch.setattr(trials, "_TPE_PROPOSALS", 5)
    wrong = {"num_experts_per_tok": "98..99"}
    with pytest.raises(ConfigError, match=r"3 were checked.*num_experts_per_tok = 9\d"):
        first_valid(setting_of(sweep_of(tmp_path, wrong, max_trials=3)))
    with pytest.raises(ConfigError, match="5 were checked"):
        first_valid(setting_of(sweep_of(tmp_path, wrong, max_trials=7, search="tpe")))
    random = sweep_of(tmp_path, max_trials=3, search_seed=4)
    wanted = [random.space.proposal("random", 4, k) for k in range(5)]
    assert list(proposals(random)) == wanted[:3]
    assert list(proposals(sweep_of(tmp_path, max_trials=3, search_seed=4, search="tpe"))) == wanted
    grid = sweep_of(tmp_path, {"seed": [1, 2, 3]}, search="grid", max_trials=2)
    assert list(proposals(grid)) == [{"seed": 1}, {"seed": 2}]


def test_where_a_trials_run_lies(tmp_path: Path) -> None:
    """In the sweep's folder beside the others; token stores are those of the sweep, and W&B groups the trials."""
    setting = setting_of(sweep_of(tmp_path, seed=5))
    config = setting.config({"learning_rate": 0.5, "max_steps": 3}, "007-1")
    assert config.run_uri == f"{tmp_path}/try/trials/007-1"
    assert (config.store_dir, config.wandb_group) == (f"{tmp_path}/store", "try")
    assert (config.learning_rate, config.max_steps, config.seed, config.eval_steps) == (0.5, 3, 5, 4)
    own = setting_of(sweep_of(tmp_path, store_dir="s3://b/store", wandb_group="g")).config({}, "1")
    assert (own.store_dir, own.wandb_group) == ("s3://b/store", "g")
    assert (run_name(7), run_name(7, 1), run_name(1234, 2)) == ("007", "007-1", "1234-2")


@pytest.mark.parametrize("space", [{"learning_rate": {"uniform": [0.1, 0.2]}}, {"expert_split": ["affinity"], "audio_experts": [3]}])
def test_the_winner_as_a_run_of_its_own(tmp_path: Path, space: dict[str, Any]) -> None:
    """It equals the trial's configuration in everything that changes numbers."""
    sweep = sweep_of(tmp_path, space, seed=5, text_mix_ratio=0.0, train_asr_weights=[1.0], asr_tts_mix_ratio=0.1, max_steps=100)
    setting = setting_of(sweep, ORDER, OF_EVERY_TRIAL)
    settings = setting.settings_of(sweep.space.proposal("random", 0, 0) or {})
    trial = Trial(3, ["003"], settings=settings, parents=[None])
    text = setting.best_yaml(trial, "Trial 3: wer = 0.1")
    assert text.startswith("# Trial 3: wer = 0.1\n")
    (tmp_path / "best.yaml").write_text(text, encoding="utf-8")
    found, wanted = vars(load_config(tmp_path / "best.yaml")), vars(setting.config(settings, "003"))
    assert {name for name in found if found[name] != wanted[name]} <= NO_NUMBERS
    assert (found["name"], found["output_dir"], found["resume_from_checkpoint"]) == ("try-best-003", str(tmp_path), None)
    assert found["max_steps"] == 12  # those that the trials made
    assert "adam_beta1" not in text


def test_a_winner_that_went_on_from_another(tmp_path: Path) -> None:
    """Begins with the checkpoint that its last run began with; nothing of it shows credentials."""
    uri = "s3://key:hunter2@bucket/x"
    setting = setting_of(sweep_of(tmp_path, output_dir=uri, store_dir=uri, train_tts_dirs=[uri]))
    parents: list[dict[str, Any] | None] = [None, {"trial": 1, "run": "001", "step": 8}, {"trial": 3, "run": "003-1", "step": 40}]
    text = setting.best_yaml(Trial(2, ["002", "002-1", "002-2"], settings={"learning_rate": 0.5}, parents=parents), "why")
    content = yaml.safe_load(text)
    assert content["resume_from_checkpoint"] == "s3://***@bucket/x/try/kept/003-1/step-000000040"
    assert content["accept_data_change"] is True and content["learning_rate"] == 0.5
    assert "hunter2" not in text


def test_starting_models_of_a_space(tmp_path: Path) -> None:
    """One for each model that is tried, of a preset for each seed; each knows its own experts' order."""
    space = {"model_name_or_path": ["tiny", "/m"], "seed": "1..2", "expert_split": ["affinity"]}
    sweep = sweep_of(tmp_path, space)
    keys = start_keys(sweep)
    assert [json.loads(key) for key in keys] == [
        {"model_name_or_path": "tiny", "seed": 1},
        {"model_name_or_path": "tiny", "seed": 2},
        {"model_name_or_path": "/m"},
    ]
    assert start_key(sweep, {"seed": 2, "model_name_or_path": "/m", "expert_split": "affinity"}) == keys[2]
    orders = [ORDER, ORDER[::-1], list(range(8))]
    setting = TrialBase(sweep, {key: StartModel(tiny_config(), order) for key, order in zip(keys, orders, strict=True)}, {})
    values = {"model_name_or_path": "tiny", "seed": 2, "expert_split": "affinity"}
    assert setting.settings_of(values)["audio_expert_indices"] == sorted(ORDER[:4])
    assert setting.settings_of({**values, "model_name_or_path": "/m"})["audio_expert_indices"] == [4, 5, 6, 7]
    assert start_keys(sweep_of(tmp_path)) == ["{}"]
    assert start_keys(sweep_of(tmp_path, {"seed": [1, 2]})) == ['{"seed": 1}', '{"seed": 2}']
    assert start_keys(sweep_of(tmp_path, {"seed": [1, 2]}, model_name_or_path="/m")) == ["{}"]


def test_affinity_of_models_that_trials_would_make(tmp_path: Path) -> None:
    """A preset's tokenizer is made of a trial's records: other directories for each trial make other models than the one measured."""
    split = {"expert_split": ["affinity"]}
    for moved in ({"train_asr_dirs": {"choice": ["a", "b"]}}, {"train_tts_dirs": [{"choice": ["a", "b"]}, "c"]}):
        with pytest.raises(ConfigError, match=rf"^space\.{next(iter(moved))}.*: gives a preset another tokenizer"):
            start_keys(sweep_of(tmp_path, {**split, **moved}))
        assert start_keys(sweep_of(tmp_path, {**split, **moved}, model_name_or_path="/m")) == ["{}"]
        assert start_keys(sweep_of(tmp_path, moved)) == ["{}"]
    assert start_keys(sweep_of(tmp_path, {**split, "train_asr_weights": [{"uniform": [1, 2]}]})) == ["{}"]


def test_what_a_sweep_will_cost(tmp_path: Path) -> None:
    """By hand: nine trials of 90 steps, rungs at 10, 30 and 90 of which a third goes on: 9 x 10 + 3 x 20 + 1 x 60."""
    asha = sweep_of(tmp_path, scheduler="asha", grace_steps=10)
    found = estimate(asha, 90, 9, 2, 2.0)
    assert (found.fewest_steps, found.most_steps) == (90 + 60 + 60, 810)
    assert found.fewest_hours == pytest.approx((210 * 2 + 9 * 30) / 2 / 3600)
    assert found.most_hours == pytest.approx((810 * 2 + 9 * 30) / 2 / 3600)
    unknown = estimate(asha, 90, 9, 2, None)
    assert (unknown.fewest_steps, unknown.fewest_hours, unknown.most_hours) == (210, None, None)
    plain = estimate(sweep_of(tmp_path, grace_steps=10), 90, 9, 2, 2.0)
    assert (plain.fewest_steps, plain.most_steps, plain.fewest_hours) == (810, 810, plain.most_hours)


@pytest.mark.parametrize(
    ("n_trials", "grace", "total", "factor", "steps"),
    [
        (2, 10, 90, 3.0, 2 * 10 + 80),  # the best is never stopped
        (1, 10, 90, 3.0, 90),
        (0, 10, 90, 3.0, 0),
        (4, 100, 90, 3.0, 4 * 90),  # the first rung lies behind the last step
        (8, 4, 12, 2.0, 8 * 4 + 4 * 4 + 2 * 4),  # the last rung at 8
    ],
)
def test_fewest_steps_by_hand(tmp_path: Path, n_trials: int, grace: int, total: int, factor: float, steps: int) -> None:
    sweep = sweep_of(tmp_path, scheduler="asha", grace_steps=grace, reduction_factor=factor)
    assert estimate(sweep, total, n_trials, 1, None).fewest_steps == steps
