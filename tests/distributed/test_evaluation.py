"""Evaluation by ranks that share one model: every layout decodes what one process does, and training goes on as if nothing had been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from most_ray.data.batch import open_plan
from most_ray.data.plan import PlanSpec
from most_ray.evaluation.inline import EvaluationJob, InlineEvaluation
from most_ray.evaluation.scoring import EvaluationSettings
from tests.support.builders import make_plan
from tests.support.evaluation import SETTINGS, Scene, evaluate, make_scene
from tests.support.gloo import run_ranks
from tests.support.training import full_rows, make, steps

LAYOUTS = {2: [(1, 2, 1), (1, 2, 2)], 4: [(1, 4, 2), (2, 2, 2)]}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PlanSpec:
    return make_plan(tmp_path_factory.mktemp("data"), batch=5).spec


def job_of(scene: Scene, settings: EvaluationSettings) -> EvaluationJob:
    return EvaluationJob(scene.directories, settings, scene.stores, 1, 0.0)


def scored(scene: Scene, settings: EvaluationSettings, topologies: list[tuple[int, int, int]], root: str) -> list[Any]:
    lines = []
    for topology in topologies:
        model = make(scene.model, topology).model
        evaluation = InlineEvaluation(job_of(scene, settings), f"{root}/{topology}", scene.model)
        line = evaluation(model, 5)
        lines.append(line)
    return lines


@pytest.mark.parametrize("world", sorted(LAYOUTS))
def test_every_record_is_decoded_once_and_alike_on_any_layout(world: int, scene: Scene, tmp_path: Path) -> None:
    """Promises 7 and 20 of docs/promises.md: 7, 3 and 2 records on 2 and 4 ranks, by greedy search and beams: no hang, nothing doubled."""
    for settings in (SETTINGS, replace(SETTINGS, batch_size=2, max_new_tokens=9, max_new_units=9, num_beams=3)):
        alone = evaluate(scene, settings).result
        answers = run_ranks(world, scored, scene, settings, LAYOUTS[world], str(tmp_path))
        assert all(line is None for answer in answers[1:] for line in answer)
        for line in answers[0]:
            assert line["kind"] == "evaluation" and line["step"] == 5
            for name, section in alone["sets"].items():
                assert line["sets"][name]["loss"] == pytest.approx(section["loss"], abs=1e-5)
                exact = {key: value for key, value in section.items() if key not in ("loss", "perplexity")}
                assert {key: line["sets"][name][key] for key in exact} == exact
            assert line["samples"] == alone["samples"] and line["wer"] == alone["wer"]


def trained(scene: Scene, spec: PlanSpec, topology: tuple[int, int, int], root: str, between: bool) -> dict[str, torch.Tensor]:
    state = make(scene.model, topology)
    plan = open_plan(spec)
    steps(state, plan, 2)
    if between:
        InlineEvaluation(job_of(scene, SETTINGS), root, scene.model)(state.model, 2)
        assert all(isinstance(parameter, DTensor) for parameter in state.model.parameters()), "weights are shards again"
    steps(state, plan, 2)
    return {name: full_rows(state, name, parameter) for name, parameter in state.model.named_parameters()}


def test_an_evaluation_in_between_changes_nothing(scene: Scene, spec: PlanSpec, tmp_path: Path) -> None:
    """Weights equal to the bit after two steps more."""
    with_, without = (run_ranks(2, trained, scene, spec, (1, 2, 2), str(tmp_path), between)[0] for between in (True, False))
    assert with_.keys() == without.keys()
    assert all(torch.equal(with_[name], without[name]) for name in with_)
