"""The cards of a report: the model, its data, and how the run was started; what a run does not say is unknown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from most_ray.config import config_from
from most_ray.model.build import PRESETS, count_parameters
from most_ray.model.configuration import MostConfig
from most_ray.records.data_card import data_card
from most_ray.report.cards import cards, hours, parameters
from most_ray.report.cells import Cell, Content
from most_ray.report.collect import RunData, collect
from most_ray.report.page import page
from most_ray.runs.environment import command_line
from most_ray.runs.lifecycle import sources_of
from tests.support.builders import asr, text, tts, write_records
from tests.support.report_data import describe_records, write_run
from tests.support.report_html import EVIL, Elements


def plain(content: Content) -> str:
    """A cell's text, lines joined by slashes."""
    if content is None or isinstance(content, str):
        return content or "-"
    if isinstance(content, Cell):
        return " ".join(part for part in (content.text, content.small) if part)
    assert not hasattr(content, "kind")
    return " / ".join(map(plain, content))  # type: ignore[arg-type]


def shown(runs: list[RunData]) -> dict[str, str]:
    """The first run's values by their names."""
    return {plain(row[0]): plain(row[1]) for card in cards(runs) for row in card.rows}


def run_of(folder: Path, **config: Any) -> RunData:
    write_run(folder, steps=8, **config)
    describe_records(folder)
    return collect([str(folder)])[0]


def test_the_model_is_described_by_its_sizes(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", model_name_or_path="tiny", weight_decay=0.1, lr_scheduler="cosine", optimizer_state="int8")
    found = shown([run])
    assert found["Preset or starting model"] == "tiny"
    assert found["Parameters"] == "1,166,720 / 724,352 of them for each token"
    assert found["Layers"] == "4, the first without experts" and found["Hidden size"] == "128"
    assert found["Experts of a layer"] == "8 routed: 3 for text, 5 for speech; 1 shared"
    assert found["Experts for a token"] == "top 2 of its modality's, and the shared one"
    assert found["Vocabulary"] == "700 tokens, 502 of them of speech"
    assert found["Precision"] == "bfloat16"
    assert found["Optimizer"] == "AdamW / learning rate 0.0003, cosine, weight decay 0.1, moments in int8"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 32},
        {"q_lora_rank": 16, "attention_bias": True},
        {"n_shared_experts": 2, "first_k_dense_replace": 0},
        {"first_k_dense_replace": 9},
        {"num_experts_per_tok": 1, "use_modality_aware_routing": False},
        {"use_balance_bias": True},
    ],
)
def test_parameters_are_counted_as_the_model_has_them(changes: dict[str, Any]) -> None:
    sizes = {key: value for key, value in PRESETS["tiny"].items() if key != "text_vocab_size"}
    config = MostConfig(**{**sizes, "vocab_size": 700, "first_audio_token": 100, "last_audio_token": 601, **changes})
    found = parameters(config.to_dict())
    assert found and found[0] == count_parameters(config, "")
    layers = max(0, config.num_hidden_layers - config.first_k_dense_replace)
    unused = layers * (config.n_routed_experts - config.num_experts_per_tok) * 3 * config.hidden_size * config.moe_intermediate_size
    assert found[1] == found[0] - unused


@pytest.mark.parametrize("config", [{}, {"hidden_size": "many"}, {"vocab_size": None}])
def test_a_config_that_lacks_a_size_has_no_count(config: dict[str, Any]) -> None:
    assert parameters(config) is None


def test_the_data_are_described_by_source(tmp_path: Path) -> None:
    found, (table,) = shown([run_of(tmp_path / "run")]), cards([run_of(tmp_path / "run")])[1].tables
    assert found["Speech for training"] == "recognition: 2.00 h 40.0 min without speed copies"
    assert found["Speakers"] == "4 in training / 5 in validation, 1 of them unseen in training"
    assert (found["Units"], found["Encoder"], found["Licence"]) == ("6, 50 a second, repeats kept", "tones", "CC BY 4.0")
    assert [[plain(cell) if cell else cell for cell in row] for row in table.rows] == [
        ["asr/train_asr", "training", "9,000", "50.0%", "2.00 h", "4", "CC BY 4.0"],
        ["asr/dev_clean", "validation", "200", "", "about 2.00 h", "4", None],
    ]


@pytest.mark.parametrize(("seconds", "text_"), [(30, "0.5 min"), (3600, "1.00 h"), (36_000, "10.0 h"), (3.6e6, "1,000.0 h")])
def test_hours_have_the_digits_that_tell(seconds: float, text_: str) -> None:
    assert hours(seconds) == text_


def test_a_run_of_an_earlier_version_says_what_it_knows(tmp_path: Path) -> None:
    """No cards.json, no command: unknown, without an error; the model by its export, the units by the run's folder speech/."""
    folder = write_run(tmp_path / "run", steps=8)
    names = shown(collect([str(folder)]))
    assert all(names[name] == "-" for name in ("Parameters", "Speech for training", "Speakers", "Licence", "Command"))
    model = json.loads((describe_records(write_run(tmp_path / "other", steps=8)) / "cards.json").read_text())["model"]
    (folder / "checkpoints" / "step-000000004").mkdir(parents=True)
    (folder / "checkpoints" / "step-000000004" / "config.json").write_text(json.dumps({**model, "hidden_size": 64}))
    (folder / "speech").mkdir()
    (folder / "speech" / "units.json").write_text(
        json.dumps({"identity": {"features": "hubert", "settings": {"layer": 9}}, "encoder": "x"})
    )
    assert shown(collect([str(folder)]))["Hidden size"] == "64"
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text(json.dumps(model))
    found = shown(collect([str(folder)]))
    assert (found["Hidden size"], found["Encoder"], found["Units"]) == ("128", "hubert, layer 9, x", "-")


@pytest.mark.parametrize(
    "content", ["[", "[]", '{"model": [], "data": {"training": [1, {"name": 2}], "speakers": 3}}', '{"data": {"training": 4}}']
)
def test_a_damaged_file_of_cards_is_no_error(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    (folder / "cards.json").write_text(content)
    assert 'id="card-model"' in page(collect([str(folder)]))


def test_the_run_says_when_and_by_which_commands(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=400)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    starts = [line for line in lines if line["kind"] == "start"]
    for start, command in zip(starts, ("most-ray train --config a.yaml", "most-ray train --config a.yaml --max_steps 400"), strict=True):
        start["command"] = command
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = shown(collect([str(folder)]))
    assert found["Begun"] == "2001-09-09 01:46 UTC" and found["Ended"] == "2001-09-09 01:54 UTC"
    assert found["Command"] == "most-ray train --config a.yaml / most-ray train --config a.yaml --max_steps 400"
    assert found["Device"] == "2 x Some GPU"
    assert found["Versions"] == "torch 2.13.0, transformers 5.20.1, ray 2.60.0, Python 3.11.9"


def test_a_run_that_goes_on_has_no_end(tmp_path: Path) -> None:
    (run,) = collect([str(write_run(tmp_path / "run", steps=40, done=False))])
    assert shown([run])["Ended"].endswith("last line; it is not complete")


def test_several_runs_have_a_column_each(tmp_path: Path) -> None:
    one, two = run_of(tmp_path / "one"), collect([str(write_run(tmp_path / "two", steps=4))])[0]
    assert all(len(row) == 3 for card in cards([one, two]) for row in card.rows)
    (table,) = cards([one, two])[1].tables
    assert [plain(row[1]) for row in table.rows] == ["one", "one"]


def test_what_a_user_wrote_never_becomes_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4, model_name_or_path=EVIL)
    source = {"name": EVIL, "records": 1, "licence": EVIL, "units": {"features": EVIL, "encoder": EVIL}}
    (folder / "cards.json").write_text(json.dumps({"data": {"training": [source]}}))
    assert not any("onerror" in attributes for _, attributes in Elements(page(collect([str(folder)]))).found)


# What a run writes down.


def spoken(index: int, **metadata: Any) -> dict[str, Any]:
    return {**asr(index), "metadata": metadata}


def card_of(root: Path, **directories: list[Path]) -> dict[str, Any]:
    config = config_from({key: [str(folder) for folder in folders] for key, folders in directories.items()})
    counts = [
        sum(1 for file in folder.glob("*.jsonl") for _ in file.open())
        for key in directories
        if "train" in key
        for folder in directories[key]
    ]
    return data_card(sources_of(config, counts))


def test_speed_copies_are_no_speakers_of_their_own(tmp_path: Path) -> None:
    """Nor hours of other speech; a source of synthesis beside it has the same speakers."""
    records = [spoken(index, speaker=f"s{index % 2}", duration=60.0, **({"speed": 0.9} if index >= 4 else {})) for index in range(8)]
    a = write_records(tmp_path / "a", records)
    b = write_records(tmp_path / "b", [{**tts(index), "metadata": {"speaker": "s1", "duration": 30.0}} for index in range(2)])
    c = write_records(tmp_path / "c", [spoken(9, speaker="s9", duration=6.0)])
    found = card_of(tmp_path, train_asr_dirs=[a], train_tts_dirs=[b], val_asr_dirs=[c])
    asr_, tts_ = found["training"]
    assert (asr_["name"], asr_["records"], asr_["seconds"], asr_["own_speed_seconds"], asr_["speakers"]) == ("asr/a", 8, 480.0, 240.0, 2)
    assert (tts_["name"], tts_["seconds"], tts_["speech_units"]) == ("tts/b", 60.0, 10)
    assert found["speakers"] == {"training": 2, "validation": 1} and found["unseen"] == 1
    assert (asr_["licence"], asr_["units"]) == (None, None)


def test_records_without_metadata_leave_speakers_and_hours_unknown(tmp_path: Path) -> None:
    a = write_records(tmp_path / "a", [spoken(index) for index in range(3)])
    b = write_records(tmp_path / "b", [text(index) for index in range(3)])
    found = card_of(tmp_path, train_asr_dirs=[a], train_text_dirs=[b])
    assert [(each["seconds"], each["speakers"], each["speech_units"]) for each in found["training"]] == [(None, None, 15), (None, None, 0)]
    assert found["speakers"] == {"training": None, "validation": None} and found["unseen"] is None


def test_of_a_large_source_a_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("most_ray.records.data_card._MOST_READ", 5)
    a = write_records(tmp_path / "a", [spoken(index, duration=2.0, speaker="x") for index in range(20)])
    (source,) = card_of(tmp_path, train_asr_dirs=[a])["training"]
    assert (source["read"], source["records"], source["exact"], source["seconds"], source["speech_units"]) == (5, 20, False, 40.0, 100)
    (validation,) = card_of(tmp_path, val_asr_dirs=[a])["validation"]
    assert (validation["records"], validation["exact"]) == (None, False)


def test_what_is_odd_in_records_is_no_error(tmp_path: Path) -> None:
    odd = [spoken(0, duration="long", speed=[1], speaker=["a"]), {**asr(1), "metadata": [1]}, {**asr(2), "input": 3}, 4]
    folder = write_records(tmp_path / "a", odd)
    (folder / "records.jsonl").write_text((folder / "records.jsonl").read_text() + "{cut off\n")
    (source,) = card_of(tmp_path, train_asr_dirs=[folder])["training"]
    assert source["seconds"] is None


def test_units_and_licence_are_those_of_the_manifest(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "a", [spoken(0)])
    manifest = {"identity": {"features": "hubert", "n_units": 6}, "encoder": "s3://me:sekret@b/hubert", "licence": "CC0 1.0"}
    (folder / "units.json").write_text(json.dumps(manifest))
    for named in (folder, folder / "records.jsonl"):
        (source,) = data_card(sources_of(config_from({"train_asr_dirs": [str(named)]}), [1]))["training"]
        assert source["units"] == {"features": "hubert", "n_units": 6, "encoder": "s3://***@b/hubert"} and source["licence"] == "CC0 1.0"


def test_without_a_manifest_the_licence_is_what_the_records_say(tmp_path: Path) -> None:
    records = [
        spoken(0, licence="CC0 1.0"),
        spoken(1, license="CC BY  4.0"),
        spoken(2, licence=4),
        *(spoken(i, licence=f"{i}") for i in range(3, 20)),
    ]
    (source,) = card_of(tmp_path, train_asr_dirs=[write_records(tmp_path / "a", records)])["training"]
    assert source["licence"] == "3, 4, 5, CC BY 4.0, CC0 1.0"


@pytest.mark.parametrize(
    ("argv", "shown_"),
    [
        (["/home/me/.venv/bin/most-ray", "train", "--name", "a b"], "most-ray train --name 'a b'"),
        (["/home/me/jobs/train.py", "--config", "x.yaml"], "python train.py --config x.yaml"),
        (["jobs/train.py", "--config", "x.yaml"], "python jobs/train.py --config x.yaml"),
        (
            ["most-ray", "train", "--output_dir", "s3://me:sekret@bucket/runs?key=sekret"],
            "most-ray train --output_dir 's3://***@bucket/runs?***'",
        ),
        (["most-ray", "x" * 9000], f"most-ray {'x' * 3991} ..."),
    ],
)
def test_the_command_is_kept_without_folders_of_programs_and_credentials(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], shown_: str
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert command_line() == shown_
