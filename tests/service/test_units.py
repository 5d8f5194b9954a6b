"""Recordings to units by a pool of Ray Data actors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

from most_ray.errors import DataError
from most_ray.service.tasks.unit_tasks import pool_runner, run_in_actors
from most_ray.speech.corpora.corpus import CorpusOptions
from most_ray.speech.units.corpus_parts import Part, PartTask, Runner, run_in_process
from most_ray.speech.units.features import EncoderSettings, FeatureSettings
from most_ray.speech.units.mfcc import MfccSettings
from most_ray.speech.units.prepare import UnitsJob, prepare_units

OUTPUTS = ("records.jsonl.gz", "kmeans.npy", "units.json", "rejected.jsonl")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve recordings of three speakers, one of them damaged, in parts of two."""
    monkeypatch.setattr("most_ray.speech.units.corpus_parts.PART", 2)
    folder = tmp_path / "corpus"
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = ["path\tspeaker\ttext"]
    for index in range(12):
        time = np.arange(int(16000 * (0.3 + 0.05 * index))) / 16000
        wave = 0.3 * np.sin(2 * np.pi * (150 + 60 * index) * time * (1 + time)) + 0.01 * random.normal(size=len(time))
        soundfile.write(folder / f"{index}.wav", wave.astype(np.float32), 16000)
        rows.append(f"{index}.wav\t{'abc'[index % 3]}\tword {index}")
    (folder / "5.wav").write_bytes(b"no audio")
    (folder / "transcripts.tsv").write_text("\n".join(rows) + "\n")
    return folder


def progress(items: Any, what: str, total: int) -> Any:
    return items


def made(corpus: Path, output: Path, features: FeatureSettings, runner: Callable[[int], Runner]) -> dict[str, bytes]:
    job = UnitsJob(CorpusOptions("folder", corpus), output, features, fit_kmeans=6, perturb=(0.9, 1.0))
    prepare_units(job, progress, runner)
    return {name: (output / name).read_bytes() for name in OUTPUTS}


def test_actors_make_the_same_bytes_as_one_process(ray_cluster: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MFCC, and an encoder; whatever order the parts come back in. Relative places work, though actors have another directory."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": (16,) * 7}
    transformers.HubertModel(transformers.HubertConfig(**sizes, num_conv_pos_embeddings=16)).save_pretrained(tmp_path / "hubert")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "hubert")
    monkeypatch.chdir(tmp_path)
    for name, features in (("mfcc", MfccSettings()), ("hubert", EncoderSettings("hubert", str(tmp_path / "hubert"), 1))):
        alone = made(Path("corpus"), Path(f"{name}-0"), features, lambda _: run_in_process)
        pooled = made(Path("corpus"), Path(f"{name}-2"), features, lambda _, features=features: pool_runner(features, 2, None, None))
        assert alone == pooled, name


@dataclass(frozen=True)
class _Fatal:
    """A task whose process dies, once, with a part in its hands."""

    inner: PartTask
    mark: str

    def target(self, part: Part) -> Path:
        return self.inner.target(part)

    def open(self, device: str) -> Callable[[Part], dict[str, float]]:
        make = self.inner.open(device)

        def fatal(part: Part) -> dict[str, float]:
            if part.index == 3 and not os.path.exists(self.mark):
                Path(self.mark).touch()
                os._exit(1)
            return make(part)

        return fatal


def test_a_part_whose_actor_dies_is_made_again(ray_cluster: str, corpus: Path, tmp_path: Path) -> None:
    """Nothing is lost and nothing twice."""
    alone = made(corpus, tmp_path / "alone", MfccSettings(), lambda _: run_in_process)

    def dying(_size: int) -> Runner:
        def run(work: PartTask, parts: Sequence[Part]) -> Iterator[dict[str, float]]:
            return run_in_actors(_Fatal(work, str(tmp_path / f"died-{type(work).__name__}")), parts, 2, 0.0)

        return run

    assert made(corpus, tmp_path / "dying", MfccSettings(), dying) == alone
    assert {path.name for path in tmp_path.glob("died-*")} == {"died-CollectStatistics", "died-EncodeUnits"}


@dataclass(frozen=True)
class _Refusing:
    """A task that a user has to mend something for."""

    def target(self, part: Part) -> Path:
        return Path(part.chunk)

    def open(self, device: str) -> Callable[[Part], dict[str, float]]:
        def refuse(part: Part) -> dict[str, float]:
            raise DataError("chunk", part.chunk, "is not there.", "Bring it back.")

        return refuse


def test_what_a_user_can_mend_comes_out_of_an_actor(ray_cluster: str) -> None:
    with pytest.raises(DataError, match="Bring it back"):
        list(run_in_actors(_Refusing(), [Part(0, "nowhere", 1.0, "")], 1, 0.0))
