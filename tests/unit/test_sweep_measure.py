"""What is measured of a starting model: which experts carry text, and how long a step takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from most_ray.data.batch import Batch, open_plan
from most_ray.model.build import RoutingOverrides, load_model
from most_ray.model.modeling import MostForCausalLM
from most_ray.optim.train_state import TrainState
from most_ray.records.template import AUDIO, TEXT
from most_ray.runs.job import Job
from most_ray.sweep import measure
from most_ray.sweep.measure import measure_affinity, step_seconds, text_load, texts_of
from tests.support.builders import IDS, tiny_model
from tests.support.runs import prepare_small
from tests.support.training import CPU

LAYERS, EXPERTS, TOP_K = 2, 8, 2  # of the tiny model: those with routed experts


@pytest.fixture(scope="module")
def plain() -> MostForCausalLM:
    """A model that is routed without regard to modality."""
    model: MostForCausalLM = tiny_model(use_modality_aware_routing=False).eval()
    return model


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Of a run on ASR, TTS and text records, four steps of 23."""
    return prepare_small(tmp_path_factory.mktemp("small")).job


def texts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(3, IDS.unit_base, length) for length in lengths]


def by_hand(model: MostForCausalLM, given: list[np.ndarray]) -> np.ndarray:
    """Selections (L, E) of each text by itself, out of what the routers chose."""
    count = np.zeros((LAYERS, EXPERTS), np.int64)
    chosen: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(lambda module, args, output: chosen.append(output[2])) for gate in gates]
    for text in given:
        chosen.clear()
        with torch.no_grad():
            model.model(torch.from_numpy(text)[None], use_cache=False)
        for layer, indices in enumerate(chosen):
            np.add.at(count[layer], indices.numpy().ravel(), 1)
    for hook in hooks:
        hook.remove()
    return count


def test_every_selection_of_every_layer_is_counted(plain: MostForCausalLM) -> None:
    """As the routers' own choices, text by text: so padding counts nowhere, wherever the texts lie."""
    given = texts(5, 1, 17, 9)
    load, tokens = text_load(plain, iter(given), CPU)
    assert tokens == 32 and load.shape == (LAYERS, EXPERTS)
    assert (load.sum(1) == tokens * TOP_K).all()
    assert (load == by_hand(plain, given)).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_the_load_does_not_depend_on_batches(plain: MostForCausalLM, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    given = texts(*range(1, 20))
    whole, tokens = text_load(plain, iter(given), CPU)
    monkeypatch.setattr(measure, "_ROWS", rows)
    load, again = text_load(plain, iter(given), CPU)
    assert again == tokens == sum(range(1, 20))
    assert (load == whole).all()


def test_texts_are_the_records_without_their_speech(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record of the plan in its order, its text tokens in theirs; no more steps than the run has, and enough texts are enough."""
    plan = open_plan(job.plan)
    found = list(texts_of(plan, job))
    assert len(found) == job.total_steps * job.plan.global_batch_size
    records = [(s, r) for step in range(1, job.total_steps + 1) for s, r in zip(plan.step(step).sources, plan.step(step).rows, strict=True)]
    speech = 0
    for text, (source, row) in zip(found, records, strict=True):
        ids = plan.stores[source].input_ids(int(row))
        outside = [token for token in ids.tolist() if not job.layout.first_audio <= token <= job.layout.last_audio]
        assert text.tolist() == outside and outside
        speech += len(ids) - len(outside)
    assert speech
    for enough in (1, len(found[0]), len(found[0]) + 1, sum(map(len, found[:30])) - 1):
        monkeypatch.setattr(measure, "TEXT_TOKENS", enough)
        some = list(texts_of(plan, job))
        assert sum(map(len, some[:-1])) < enough <= sum(map(len, some))
        assert all((a == b).all() for a, b in zip(some, found, strict=False))


def test_affinity_of_a_model(job: Job) -> None:
    """Its texts through its own weights, whatever experts its configuration gives to text; twice the same."""
    found = measure_affinity(job, CPU)
    assert found == measure_affinity(job, CPU)
    model = load_model(job.model_path, RoutingOverrides(use_modality_aware_routing=False)).eval()
    given = list(texts_of(open_plan(job.plan), job))
    load, tokens = text_load(model, iter(given), CPU)
    assert found.tokens == tokens == sum(map(len, given))
    assert found.share == pytest.approx((load / load.sum(1, keepdims=True)).mean(0))
    assert sum(found.share) == pytest.approx(1)
    assert found.order == sorted(range(len(found.share)), key=lambda expert: -found.share[expert])
    aware = load_model(job.model_path).config
    assert aware.use_modality_aware_routing and sum(found.share[e] for e in aware.audio_expert_indices) > 0


def test_audio_tokens_do_not_count(plain: MostForCausalLM) -> None:
    """Of a text that has some after all, those of the text alone."""
    row = np.concatenate([np.arange(10, 20), np.arange(IDS.unit_base, IDS.unit_base + 5)])
    load, _ = text_load(plain, iter([row]), CPU)
    output = plain.model(torch.from_numpy(row)[None], use_cache=False)
    assert (load == output.expert_load[:, TEXT].numpy()).all() and output.expert_load[:, AUDIO].sum() == LAYERS * 5 * TOP_K
    assert (load.sum(1) == 10 * TOP_K).all()


def test_text_lies_on_both_sides_of_the_audio_tokens(job: Job) -> None:
    """As in vocabularies that have grown behind them."""
    first = job.layout.first_audio
    plan, narrow = open_plan(job.plan), replace(job, layout=replace(job.layout, last_audio=first + 9))
    ids = [plan.stores[s].input_ids(int(r)) for s, r in zip(plan.step(1).sources, plan.step(1).rows, strict=True)]
    for given, text in zip(ids, texts_of(plan, narrow), strict=False):
        assert text.tolist() == [token for token in given.tolist() if token not in range(first, first + 10)]


def test_a_step_is_timed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of the run's first ones, each a whole optimizer step as the run makes it; threads are given back."""
    seen: list[tuple[int, int, bool]] = []
    run_step = measure.run_step

    def spy(state: TrainState, batch: Batch, *rest: Any) -> Any:
        seen.append((batch.step, torch.get_num_threads(), state.model.model.layers[0].gradient_checkpointing))
        return run_step(state, batch, *rest)

    monkeypatch.setattr(measure, "run_step", spy)
    clock: Iterator[float] = iter([0.0, 9.0, 10.0, 15.0, 20.0, 23.0, 30.0, 34.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    threads = torch.get_num_threads()
    assert step_seconds(replace(job, threads=threads + 1), CPU) == 3.0
    assert seen == [(step, threads + 1, False) for step in (1, 2, 3, 4)]
    assert torch.get_num_threads() == threads
    seen.clear()
    clock = iter([0.0, 2.0])
    config = replace(job.config, gradient_checkpointing=True)
    assert step_seconds(replace(job, total_steps=1, config=config), CPU) == 2.0
    assert seen == [(1, job.threads, True)]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_step_that_does_not_fit_has_no_time(job: Job, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(measure, "run_step", fail)
    threads = torch.get_num_threads()
    assert step_seconds(replace(job, threads=threads + 1), CPU) is None
    assert torch.get_num_threads() == threads
