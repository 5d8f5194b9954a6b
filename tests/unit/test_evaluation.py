"""The one evaluation: what it counts, what it refuses, and that a file scored again gives the same numbers.

Promises 23 to 27 of docs/promises.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from most_ray.cli import main
from most_ray.data.store import checksummed_json, open_store
from most_ray.errors import CheckpointError, ConfigError, DataError
from most_ray.evaluation.decode import Decoded, Forward
from most_ray.evaluation.evaluate import Directories, Evaluation, hypotheses_path, merge_shards, open_sets
from most_ray.evaluation.generate import synthesize_texts, transcribe_units
from most_ray.evaluation.hypotheses import add_normalised, evaluation_result, is_looping, rescore
from most_ray.evaluation.inline import open_external_recogniser
from most_ray.evaluation.scoring import score_shard
from most_ray.io import storage
from most_ray.model.build import load_model
from most_ray.records.record import ASR_INSTRUCTION
from most_ray.records.tokenizer import load_tokenizer, token_ids
from tests.support.builders import asr, tts, write_records
from tests.support.evaluation import SETTINGS, Scene, evaluate, make_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def evaluated(scene: Scene) -> Evaluation:
    """The scene scored once, for the tests that look at the outcome."""
    return evaluate(scene)


@pytest.fixture
def written(evaluated: Evaluation, tmp_path: Path) -> Path:
    """Its hypotheses, in a folder of the test's own beside e.json."""
    evaluated.write(tmp_path / "e.json")
    return tmp_path / "e.hypotheses.jsonl"


@pytest.mark.parametrize("beams", [1, 3])
def test_batches_and_workers_change_nothing(scene: Scene, beams: int) -> None:
    """Promises 7 and 24 of docs/promises.md: batches of 1, 3 and 8, one share or three: the same rows, figures equal to the last digit."""
    settings = replace(SETTINGS, num_beams=beams)
    reference = evaluate(scene, settings)
    assert [row["id"] for row in reference.rows[:7]] == [f"utt_{index}" for index in range(7)]
    for batch_size, world in ((1, 1), (8, 1), (3, 3), (1, 2)):
        other = evaluate(scene, replace(settings, batch_size=batch_size), world)
        for own, row in zip(reference.rows, other.rows, strict=True):
            assert {**row, "loss": 0} == {**own, "loss": 0} and row["loss"] == pytest.approx(own["loss"], rel=1e-6)
        assert other.result["overall"]["asr"]["words"] == reference.result["overall"]["asr"]["words"]
        assert other.result["routing"] == reference.result["routing"]


def test_a_file_scored_again_gives_the_same_numbers(
    evaluated: Evaluation, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hypotheses_path(tmp_path / "e.json") == written
    assert main(["evaluate", "--rescore", str(written), "--output", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "e.json").read_bytes()
    assert "asr/spoken: WER 450.0% [342.9%, 514.3%]  CER" in capsys.readouterr().out
    raw = rescore(str(written), "none")
    assert raw["settings"]["normaliser"] == "none"
    assert raw["sets"]["asr/spoken"]["characters"] != evaluated.result["sets"]["asr/spoken"]["characters"]


def test_settings_are_stored_without_credentials(scene: Scene) -> None:
    settings = replace(SETTINGS, recogniser="s3://user:sekret@b/whisper", vocoder="s3://user:sekret@b/v")
    stored = evaluate(scene, settings).header["settings"]
    assert (stored["recogniser"], stored["normaliser_version"]) == ("s3://***@b/whisper", 2) and "sekret" not in str(stored)


def test_the_command_is_the_same_function(scene: Scene, evaluated: Evaluation, tmp_path: Path) -> None:
    uris = [flag for task in ("asr", "tts", "text") for flag in (f"--{task}_dirs", *getattr(scene.directories, task))]
    limits = ["--max_new_tokens", "12", "--max_new_units", "20", "--batch_size", "3"]
    assert main(["evaluate", "--model", scene.model, *uris, *limits, "--output", str(tmp_path / "e.json")]) == 0
    result, own = json.loads((tmp_path / "e.json").read_text()), json.loads(json.dumps(evaluated.result))
    for values in (result, own):
        for section in values["sets"].values():
            section.pop("rejected_file")
    assert result == own


def test_speech_is_decoded_and_recognised_again(scene: Scene) -> None:
    """What text-to-speech is judged by, from rows worked out by hand; and the outside recogniser hears the decoded units."""
    asked: list[list[int]] = []

    def outside(spoken: Any) -> list[str]:
        asked.extend(map(list, spoken))
        return ["zero"] * len(spoken)

    evaluation = evaluate(scene, outside=outside)
    rows = [row for row in evaluation.rows if row["task"] == "tts"]
    assert [row["text"] for row in rows] == ["zero", "one", "two"]
    assert sorted(" ".join(map(str, units)) for units in asked) == sorted(row["hypothesis"] for row in rows)
    section = evaluation.result["sets"]["tts/to_speak"]
    assert section["outside"]["substitutions"] == 2 and section["outside"]["rate"] == 2 / 3
    assert section["duration_ratio"] == sum(len(row["hypothesis"].split()) for row in rows) / (4 + 5 + 6)
    assert evaluation.header["settings"]["asr_instruction"] == ASR_INSTRUCTION
    # One runs into the cap, two end with the sentence's marker, which is no end of audio.
    assert [(row["ended"], row["hit_cap"]) for row in rows] == [(False, True), (False, False), (False, False)]


def test_a_sound_that_is_held_is_no_loop(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units may be kept with their repeats; the same said in text is a loop."""
    ids = token_ids(load_tokenizer(scene.model))
    held = Decoded([ids.unit_base + 5] * 12, ids.end_audio)
    monkeypatch.setattr("most_ray.evaluation.generate.decode", lambda forward, prompts, *_: [held for _ in prompts])
    sets = evaluate(scene).result["sets"]
    assert (sets["tts/to_speak"]["loop_rate"], sets["tts/to_speak"]["end_of_audio_rate"]) == (0.0, 1.0)
    assert (sets["asr/spoken"]["loop_rate"], sets["asr/spoken"]["foreign_rate"]) == (1.0, 1.0)


def test_rates_by_hand() -> None:
    """Promise 25 of docs/promises.md: rates of empty, looping and capped outputs, among all others."""

    def row(**values: Any) -> dict[str, Any]:
        common = {
            "row": 0,
            "kind": "hypothesis",
            "id": "x",
            "loss": 2.0,
            "supervised_tokens": 4,
            "looping": False,
            "foreign": 0,
            "ended": True,
        }
        return add_normalised({**common, **values}, "basic")

    rows = [
        row(set="asr/a", task="asr", reference="one two", hypothesis="one two"),
        row(set="asr/a", task="asr", reference="three", hypothesis=" ", ended=False, loss=4.0),
        row(set="asr/b", task="asr", reference="four", hypothesis="four four four", looping=True, foreign=2),
        row(set="tts/c", task="tts", text="five", recognised="five", reference="1 2 3 4", hypothesis="1 2 9", hit_cap=False),
        row(set="tts/c", task="tts", text="six", recognised="", reference="5 6", hypothesis="", ended=False, hit_cap=True, foreign=3),
        row(set="text/d", task="text", loss=1.0, supervised_tokens=2),
    ]
    names = {"asr/a": "asr", "asr/b": "asr", "tts/c": "tts", "text/d": "text"}
    header = {"settings": {}, "routing": {}, "sets": {name: {"task": task, "rejected": 0} for name, task in names.items()}}
    result = evaluation_result(header, rows)
    assert result["wer"] == {"a": 1 / 3, "b": 2.0}
    a, b, c, d = (result["sets"][name] for name in names)
    assert (a["loss"], a["perplexity"]) == (6 / 8, pytest.approx(math.exp(0.75)))
    assert (a["empty_rate"], a["length_cap_rate"], a["loop_rate"], a["foreign_rate"]) == (0.5, 0.5, 0.0, 0.0)
    assert b["length_cap_rate"] == 0.0
    assert (b["loop_rate"], b["foreign_rate"], b["words"]["insertions"]) == (1.0, 1.0, 2)
    assert (c["units"]["rate"], c["cycle"]["rate"], c["duration_ratio"]) == (4 / 6, 0.5, 0.5)
    assert (c["end_of_audio_rate"], c["length_cap_rate"], c["foreign_rate"]) == (0.5, 0.5, 0.5)
    assert (d["loss"], d["perplexity"], d["supervised_tokens"]) == (0.5, pytest.approx(math.exp(0.5)), 2) and "words" not in d
    overall = result["overall"]["asr"]
    assert overall["words"]["rate"] == 3 / 4 and overall["records"] == 3 and overall["loss"] == 8 / 12
    assert [sample["id"] for sample in result["samples"]] == ["x"] * 5


def test_loops() -> None:
    assert is_looping([5] * 8) and not is_looping([5] * 7)
    assert is_looping([9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 7]) and not is_looping([1, 2, 3, 1, 2, 3, 1, 2, 3, 4])
    assert not is_looping([]) and not is_looping(list(range(100)))
    assert is_looping(list(range(30)) * 4) and not is_looping(list(range(40)) * 4)


def test_records_that_are_missing_or_doubled_are_an_error(scene: Scene) -> None:
    """Promise 7 of docs/promises.md: every record is scored exactly once, counted."""
    model, tokenizer = load_model(scene.model), load_tokenizer(scene.model)
    sets = open_sets(model.config, tokenizer, scene.model, scene.directories, SETTINGS, scene.stores)
    first, second = (score_shard(Forward(model), tokenizer, sets, SETTINGS, rank, 2) for rank in range(2))
    with pytest.raises(DataError, match="7 of 12"):
        merge_shards([first], sets, SETTINGS, model.config, tokenizer, scene.model)
    with pytest.raises(DataError, match="scored twice"):
        merge_shards([first, second, second], sets, SETTINGS, model.config, tokenizer, scene.model)


def test_a_file_is_not_written_over_itself(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written.rename(tmp_path / "kept.jsonl")
    before = path.read_bytes()
    assert main(["evaluate", "--rescore", str(path), "--output", str(path)]) == 2
    assert path.read_bytes() == before and "it would be lost" in capsys.readouterr().err


class WithOptions(MemoryFileSystem):
    """A file system whose URIs need an option, as s3://bucket/key?region=eu."""

    protocol = "optioned"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("optioned://", "memory://").removesuffix("?region=eu")))


SEVERAL_LINES = [
    {**tts(0), "id": "a", "instruction": "Please say\nthis text.", "input": "one two"},
    {**tts(0), "id": "b", "instruction": "Say.", "input": "three\nfour"},
    {**tts(0), "id": "c", "instruction": "Say\nit\nnow.", "input": "\nfive\n\nsix"},
    {**tts(0), "id": "d", "instruction": "Say.", "input": "seven"},
]


def test_instructions_and_texts_of_several_lines(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token store knows where an instruction ends, in parts too that follow one another; records are not read again."""
    spoken = asr(1, 6, "five") | {"instruction": "Write down\nwhat is said."}
    folders = [str(write_records(tmp_path / "heard", [spoken])), str(write_records(tmp_path / "told", SEVERAL_LINES))]
    again = [record | {"id": f"{record['id']}_2", "output": f"{record['output']}[Hu1]"} for record in SEVERAL_LINES[::-1]]
    write_records(tmp_path / "told", again, "more.jsonl")
    changed = replace(scene, directories=Directories((folders[0],), (folders[1],)), stores=str(tmp_path / "stores"))
    monkeypatch.delattr("most_ray.evaluation.scoring.read_raw")
    evaluation = evaluate(changed)
    texts = {(row["row"], row["id"]): row["text"] for row in evaluation.rows if row["task"] == "tts"}
    assert len(texts) == 8 and all(
        text == {r["id"]: r["input"] for r in [*SEVERAL_LINES, *again]}[name] for (_, name), text in texts.items()
    )
    assert evaluation.header["settings"]["asr_instruction"] == "Write down\nwhat is said."


def test_stores_of_the_version_before_ask_the_records(scene: Scene, tmp_path: Path) -> None:
    """They do not say where an instruction ends: the records do, also where their URI holds what is not shown."""
    fsspec.register_implementation("optioned", WithOptions, clobber=True)
    uri = f"optioned://{tmp_path.name}/told?region=eu"
    content = "".join(json.dumps(record) + "\n" for record in SEVERAL_LINES)
    storage.write_bytes(storage.join(uri, "records.jsonl"), content.encode())
    changed = replace(scene, directories=Directories((), (uri,)), stores=str(tmp_path / "stores"))
    new = evaluate(changed)
    (path,) = (tmp_path / "stores").glob("*/manifest.json")
    manifest = json.loads(path.read_bytes())
    assert manifest.pop("instruction_lines") and "region" not in manifest["source"]
    path.write_bytes(checksummed_json({key: value for key, value in manifest.items() if key != "digest"}))
    open_store.cache_clear()
    for evaluation in (new, evaluate(changed)):
        assert [row["text"] for row in evaluation.rows] == [record["input"] for record in SEVERAL_LINES]


def test_a_loss_that_is_no_number_is_null(scene: Scene, tmp_path: Path) -> None:
    model = load_model(scene.model)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    evaluation = evaluate(scene, model=model)
    evaluation.write(tmp_path / "e.json")
    assert "NaN" not in (tmp_path / "e.json").read_text() + (tmp_path / "e.hypotheses.jsonl").read_text()
    assert evaluation.result["sets"]["asr/spoken"]["loss"] is None
    assert json.dumps(rescore(str(tmp_path / "e.hypotheses.jsonl"))) == json.dumps(evaluation.result)


def test_another_template_or_other_units_are_refused_with_both_hashes(scene: Scene, tmp_path: Path) -> None:
    """Promises 26 and 27 of docs/promises.md."""
    model, tokenizer = load_model(scene.model), load_tokenizer(scene.model)
    known = model.config.template_hash
    model.config.template_hash = "0123456789abcdef"
    with pytest.raises(CheckpointError, match=rf"template = '0123456789abcdef'.*{known}"):
        evaluate(scene, model=model)
    model.config.template_hash, model.config.units_identity = known, "feedfeedfeedfeed"
    other = write_records(tmp_path / "spoken", [asr(1)])
    manifest = {"features": "mfcc", "kmeans": "aa" * 16}
    (other / "units.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"units = '(?P<own>[0-9a-f]{16})'.*'feedfeedfeedfeed'"):
        open_sets(model.config, tokenizer, scene.model, Directories((str(other),)), SETTINGS, str(tmp_path / "stores"))


def _cut(lines: list[str]) -> list[str]:
    return lines[1:]


def _no_json(lines: list[str]) -> list[str]:
    return [lines[0], "{", *lines[1:]]


def _no_reference(lines: list[str]) -> list[str]:
    return [lines[0], lines[1].replace('"reference"', '"referense"'), *lines[2:]]


def _other_set(lines: list[str]) -> list[str]:
    return [lines[0], lines[1].replace("asr/spoken", "asr/elsewhere"), *lines[2:]]


def _short(lines: list[str]) -> list[str]:
    return lines[:-1]


def _doubled(lines: list[str]) -> list[str]:
    return [*lines, lines[-1]]


def _replaced(old: str, new: str, line: int = 1) -> Callable[[list[str]], list[str]]:
    def change(lines: list[str]) -> list[str]:
        assert old in lines[line], old
        return [*lines[:line], lines[line].replace(old, new), *lines[line + 1 :]]

    return change


def _future(lines: list[str]) -> list[str]:
    return [lines[0].replace('"format": 1', '"format": 9'), *lines[1:]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, ":1.*is not a settings line"),
        (_no_json, ":2.*is not JSON"),
        (_no_reference, ":2.*has no field 'reference'"),
        (_other_set, ":2.*belongs to no set of line 1"),
        (_future, "has format 9"),
        (lambda _: [], "is empty"),
        (_short, r"holds 1 record of text/written, 1 different ones; 2 were evaluated"),
        (_doubled, r"holds 3 records of text/written, 2 different ones; 2 were evaluated"),
        (_replaced('"reference": "zero zero"', '"reference": null'), ":2.*has None in field 'reference'"),
        (_replaced('"set": "asr/spoken"', '"set": ["asr"]'), ":2.*in field 'set'"),
        (_replaced('"supervised_tokens": 5', '"supervised_tokens": "5"'), ":2.*in field 'supervised_tokens'"),
        (_replaced('"rejected": 0', '"rejection": 0', line=0), ":1.*has no field 'rejected'"),
        (_replaced('"leaked"', '"leeked"', line=0), ":1.*has no field 'leaked'"),
    ],
)
def test_a_file_that_cannot_be_scored_is_named_with_its_line(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[list[str]], list[str]], message: str
) -> None:
    written.write_text("".join(f"{line}\n" for line in damage(written.read_text().splitlines())))
    with pytest.raises(DataError, match=message):
        rescore(str(written))
    assert main(["evaluate", "--rescore", str(written), "--output", str(tmp_path / "again.json")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rescore", "nowhere.jsonl"], "rescore = 'nowhere.jsonl': does not exist"),
        (["--rescore", "x", "--model", "y"], "takes neither a model nor directories"),
        (["--asr_dirs", "x"], "model: is needed"),
        (["--model", "./nowhere", "--asr_dirs", "x"], "does not exist"),
        (["--model", "x"], "name at least one directory"),
        (["--model", "x", "--asr_dirs", "x", "--num_beams", "0"], "num_beams = 0: must be at least 1"),
        (["--model", "x", "--asr_dirs", "x", "--length_penalty", "nan"], "length_penalty = 'nan': is not finite"),
        (["--model", "x", "--asr_dirs", "x", "--gpus", "1"], "gpus = 1.0: is for several workers"),
        (["--model", "x", "--asr_dirs", "x", "--output", "s3://bucket/e.json"], "is not a local path"),
        (["--model", "x", "--asr_dirs", "x", "--output", "e.hypotheses.jsonl"], "is a name of hypotheses"),
        (["--model", "x", "--asr_dirs", "x", "--normaliser", "whisper"], "normaliser"),
        (["--model", "x", "--asr_dirs", "x", "--normalizer", "basic"], "is no known flag"),
    ],
)
def test_wrong_uses(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--output", str(tmp_path / "e.json"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_single_request_is_answered_as_in_an_evaluation(scene: Scene, evaluated: Evaluation) -> None:
    """Promise 26 of docs/promises.md: `transcribe` and `synthesize` use one template and one cap; an answer does not depend on others."""
    rows = evaluated.rows
    forward, tokenizer = Forward(load_model(scene.model)), load_tokenizer(scene.model)
    forward.model.eval()
    spoken = [row for row in rows if row["task"] == "tts"]
    for row in spoken:
        (said,) = synthesize_texts(forward, tokenizer, [row["text"]], SETTINGS.generation)
        assert " ".join(map(str, said.units)) == row["hypothesis"] and (said.stop is None) == row["hit_cap"]
        heard, nothing = transcribe_units(forward, tokenizer, [said.units, []], SETTINGS.generation)
        assert heard.text == row["recognised"] and nothing.text == ""
    with pytest.raises(DataError, match="positions"):
        transcribe_units(forward, tokenizer, [[1] * 5000], SETTINGS.generation)


def test_what_judges_speech_is_found_or_missed_before_anything_runs(tmp_path: Path) -> None:
    """Nothing named, nothing opened; a vocoder alone is a slip; a recogniser wants a vocoder, the model's own or a named one."""
    uri = str(tmp_path)
    assert open_external_recogniser(SETTINGS, uri, "0123") is None
    with pytest.raises(ConfigError, match="only with a recogniser"):
        open_external_recogniser(replace(SETTINGS, vocoder="v"), uri, "0123")
    with pytest.raises(CheckpointError, match="prepare vocoder"):
        open_external_recogniser(replace(SETTINGS, recogniser="r"), uri, "0123")
    with pytest.raises(CheckpointError, match="vocoder"):
        open_external_recogniser(replace(SETTINGS, recogniser="r", vocoder=str(tmp_path / "none")), uri, "0123", use_gpu=False)
