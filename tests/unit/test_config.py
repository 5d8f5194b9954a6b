from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from most_ray import config as configuration
from most_ray.config import RunConfig, add_flags, config_from, flag_values, load_config, read_yaml, to_yaml
from most_ray.errors import ConfigError

ORIGINAL_FLAGS = [
    "model_name_or_path",
    "train_asr_dirs",
    "train_tts_dirs",
    "val_asr_dirs",
    "val_tts_dirs",
    "output_dir",
    "wandb_project",
    "train_batch_size",
    "gradient_accumulation_steps",
    "fp16",
    "use_modality_aware_routing",
    "text_expert_indices",
    "audio_expert_indices",
    "resume_from_checkpoint",
    "ignore_optimizer_state",
    "ep_size",
    "asr_tts_mix_ratio",
    "save_steps",
    "eval_steps",
    "bf16",
    "gradient_checkpointing",
    "learning_rate",
    "warmup_steps",
    "lr_scheduler",
]


def parse(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return flag_values(parser.parse_args(list(words)))


@pytest.mark.parametrize("flag", ORIGINAL_FLAGS)
def test_every_flag_of_the_original_is_there(flag: str) -> None:
    assert flag in RunConfig.__dataclass_fields__


def test_the_originals_command_line_parses() -> None:
    line = (
        "--model_name_or_path user/MoST --train_asr_dirs a b --train_tts_dirs c --val_asr_dirs d --val_tts_dirs e --output_dir ./outputs "
        "--wandb_project most-training --train_batch_size 1 --gradient_accumulation_steps 16 --fp16 --use_modality_aware_routing "
        "--text_expert_indices 0,1,2,3 --audio_expert_indices 4,5,6,7 --resume_from_checkpoint x --ignore_optimizer_state --ep_size 2"
    )
    config = config_from(parse(*line.split()))
    assert config.train_asr_dirs == ("a", "b") and config.text_expert_indices == (0, 1, 2, 3)
    assert config.fp16 and config.use_modality_aware_routing and config.ignore_optimizer_state and config.ep_size == 2


def test_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = " ".join(parser.format_help().split())
    for name in RunConfig.__dataclass_fields__:
        after = text.split(f" --{name} ", 2)[-1]
        assert (f"--{name}" in text and "(default" in after.split(" --", 1)[0]) or "sets the default" in after, name


@pytest.mark.parametrize(("key", "near"), [("learnig_rate", "learning_rate"), ("train_asr_dir", "train_asr_dirs"), ("epsize", "ep_size")])
def test_an_unknown_key_names_the_nearest_known_one(key: str, near: str) -> None:
    """Promise 38 of docs/promises.md: a typo never becomes a default."""
    with pytest.raises(ConfigError, match=f"{key}.*Did you mean '{near}'"):
        config_from({key: 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": "ten"}, "whole number"),
        ({"max_steps": 1.5}, "whole number"),
        ({"max_steps": 0}, "at least 1"),
        ({"fp16": "perhaps"}, "neither true nor false"),
        ({"learning_rate": "fast"}, "is not a number"),
        ({"learning_rate": -1}, "above 0"),
        ({"learning_rate": "inf"}, "not finite"),
        ({"max_grad_norm": "nan"}, "not finite"),
        ({"aux_loss_alpha": -1}, "must not be negative"),
        ({"name": "a\0b"}, "NUL"),
        ({"lr_scheduler": "cosin"}, "Did you mean 'cosine'"),
        ({"asr_tts_mix_ratio": 1.5}, "0..1"),
        ({"fp16": True, "bf16": True}, "exclude each other"),
        ({"name": "../elsewhere"}, "plain folder name"),
        ({"name": ".."}, "plain folder name"),
        ({"name": "x" * 256}, "255 bytes"),
        ({"name": "é" * 128}, "255 bytes"),
        ({"name": "a\nb"}, "acts on"),
        ({"name": "\x1b[31mred"}, "acts on"),
        ({"name": "\u202egnp.exe"}, "acts on"),
        ({"name": "\udcff"}, "no text"),
        ({"text_expert_indices": "0,a"}, "whole number"),
        ({"train_asr_dirs": ["a", "b"], "train_asr_weights": [1.0]}, "one positive weight"),
        ({"ignore_optimizer_state": True}, "needs resume_from_checkpoint"),
        ({"model_name_or_path": None}, "needs a value"),
        ({"num_workers": "3,2"}, "fewest and the most"),
        ({"num_workers": "0"}, "number from 1 on"),
        ({"num_workers": [1, 2, 3]}, "fewest and the most"),
        ({"keep_best": 1}, "needs eval_steps and a validation set"),
        ({"best_metric": "bleu"}, "neither wer nor loss"),
        ({"failure_window_s": -1}, "must not be negative"),
        ({"max_skipped_steps": 0}, "at least 1"),
        ({"check_replicas_steps": -1}, "must not be negative"),
    ],
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from(values)


def test_a_configuration_comes_through_a_pipe_that_was_opened() -> None:
    """As a sweep gives its trials theirs (by /dev/stdin), and a shell by `<(command)`."""
    reader, writer = os.pipe()
    os.write(writer, b"max_steps: 7\n")
    os.close(writer)
    assert read_yaml(f"/dev/fd/{reader}") == {"max_steps": "7"}
    os.close(reader)


def test_yaml_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-3\ntrain_asr_dirs: [x]\nmax_steps: 5\neval_steps: null\n")
    config = load_config(path, {"max_steps": "7", "bf16": "true"})
    assert (config.learning_rate, config.train_asr_dirs, config.max_steps, config.bf16) == (1e-3, ("x",), 7, True)
    (tmp_path / "d.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "d.yaml") == config


@pytest.mark.parametrize(("content", "message"), [("a: [", "not YAML"), ("- 1", "key: value"), (None, "cannot be read")])
def test_bad_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_each_field_stands_in_one_section() -> None:
    names = [name for section in configuration.SECTIONS for name in section.__dataclass_fields__]
    assert sorted(names) == sorted(RunConfig.__dataclass_fields__) and len(set(names)) == len(names)


def test_credentials_in_places_are_not_written_down() -> None:
    config = config_from({"train_asr_dirs": ["s3://key:secret@bucket/a?region=x", "plain/a"], "store_dir": "s3://key:secret@bucket/store"})
    shown = str(config.redacted())
    assert "secret" not in shown and "plain/a" in shown and "bucket/a" in shown


@pytest.mark.parametrize(("given", "expected"), [("4", (4,)), (4, (4,)), ("2,4", (2, 4)), ([2, 4], (2, 4)), (None, None)])
def test_numbers_of_workers(given: Any, expected: Any) -> None:
    assert config_from({"num_workers": given}).num_workers == expected
