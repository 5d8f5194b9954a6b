from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from most_ray.data.plan import distinct_names
from most_ray.evaluation.beam import BeamSearch
from most_ray.evaluation.decode import Forward, SearchOptions, count_routing, decode
from most_ray.evaluation.scoring import record_losses
from most_ray.records.template import IGNORE
from tests.support.builders import IDS, asr, make_store, tiny_model

STOP = [IDS.eos, IDS.end_audio]


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.concatenate([[0], rng.integers(3, 802, int(rng.integers(3, 30)))]).astype(np.int32) for _ in range(11)]


def generated(model: torch.nn.Module, prompt: np.ndarray, cap: int, **keywords: object) -> list[int]:
    """By transformers' generate, alone."""
    ids = torch.from_numpy(prompt.astype(np.int64)).unsqueeze(0)
    out = model.generate(ids, max_new_tokens=cap, do_sample=False, eos_token_id=STOP, pad_token_id=IDS.pad, **keywords)  # type: ignore[operator]
    return [token for token in out[0, len(prompt) :].tolist() if token not in (*STOP, IDS.pad)]


def test_it_is_the_librarys_greedy_decoding(prompts: list[np.ndarray]) -> None:
    """Against transformers' generate, one prompt at a time; left padding and the batch change nothing (promise 24 of docs/promises.md)."""
    model = tiny_model(3).eval()
    caps = [4 + index % 5 for index in range(len(prompts))]
    expected = [generated(model, prompt, cap) for prompt, cap in zip(prompts, caps, strict=True)]
    for batch_size in (1, 4, 16):
        found = decode(Forward(model), prompts, STOP, caps, SearchOptions(batch_size, 1, 1.0))
        assert [result.tokens for result in found] == expected
        assert all((result.stop is None) == (len(result.tokens) == cap) for result, cap in zip(found, caps, strict=True))


@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (4, 0.0), (3, 2.0)])
def test_it_is_the_librarys_beam_search(prompts: list[np.ndarray], beams: int, penalty: float) -> None:
    """Against transformers' generate; the batch changes nothing. Ends come often, and more likely the longer the penalty wants it."""
    model = tiny_model(4).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
        model.lm_head.weight[IDS.eos] *= 3.0
    caps = [4 + index % 7 for index in range(len(prompts))]
    keywords = {"num_beams": beams, "length_penalty": penalty}
    expected = [generated(model, prompt, cap, **keywords) for prompt, cap in zip(prompts, caps, strict=True)]
    for batch_size in (1, 4, 16):
        found = decode(Forward(model), prompts, STOP, caps, SearchOptions(batch_size, beams, penalty))
        assert [result.tokens for result in found] == expected
    assert {result.stop for result in found} == {None, IDS.eos}


def test_beams_find_what_greed_misses() -> None:
    """A made-up language: the best first token leads into a poor end. Wide enough, the search finds the best of all sequences."""
    log = np.log
    table = {(): [0.6, 0.4, 1e-9], (0,): [0.4, 0.35, 0.25], (1,): [0.05, 0.05, 0.9], "else": [0.1, 0.1, 0.8]}  # token 2 ends

    def search(width: int) -> tuple[list[int], int | None]:
        beams, rows = BeamSearch(width, [2], cap=4, length_penalty=0.0), [()] * width
        while not beams.done:
            likely = [table.get(row, table["else"]) for row in rows]  # type: ignore[call-overload]
            parents, tokens = beams.advance([list(log(row)) for row in likely], [[0, 1, 2]] * width)
            rows = [(*rows[parent], token) for parent, token in zip(parents, tokens, strict=True)]  # type: ignore[misc]
        return beams.best()

    assert search(2) == ([1], 2)  # 0.4 * 0.9, against 0.6 * 0.25 and 0.6 * 0.4 * 0.8
    assert search(1)[0] != [1]


def test_a_record_without_room_for_an_answer_has_none(prompts: list[np.ndarray]) -> None:
    found = decode(Forward(tiny_model(3).eval()), prompts[:2], STOP, [0, 3], SearchOptions(64, 1, 1.0))
    assert found[0].tokens == [] and found[0].stop is None and len(found[1].tokens) > 0


def test_every_selection_is_counted_and_neither_padding_nor_ended_rows_are(prompts: list[np.ndarray]) -> None:
    model = tiny_model(3).eval()
    caps = [2 + index % 4 for index in range(len(prompts))]  # rows of a batch end at different times
    loads = []
    for batch_size in (1, 11):
        with count_routing(model) as load:
            produced = decode(Forward(model), prompts, [], caps, SearchOptions(batch_size, 1, 1.0))
        loads.append(load)
    assert [len(output.tokens) for output in produced] == caps
    tokens = sum(len(prompt) + cap - 1 for prompt, cap in zip(prompts, caps, strict=True))  # the last one is produced, not read
    assert torch.equal(loads[0], loads[1]) and int(loads[0].sum()) == tokens * 2 * 2
    assert int(loads[0][:, 0, 4:].sum()) == int(loads[0][:, 1, :4].sum()) == 0


def test_a_records_loss_is_the_plain_one(tmp_path: Path) -> None:
    store = make_store(tmp_path, "a", [asr(i, 3 + i) for i in range(9)])
    model = tiny_model().eval()
    expected = []
    for row in range(len(store)):
        ids = torch.from_numpy(store.input_ids(row).astype(np.int64)).unsqueeze(0)
        labels = ids.clone()
        labels[:, : int(store.prompt_lengths[row])] = IGNORE
        expected.append(float(model(input_ids=ids, labels=labels).loss.detach()) * int((labels != IGNORE).sum()))
    assert record_losses(Forward(model), store, range(9), tokens_per_batch=300) == pytest.approx(expected, rel=1e-5)


def test_sets_are_told_apart() -> None:
    groups = ["asr"] * 3
    assert distinct_names([Path("/a/test"), Path("/b/test"), Path("/c/dev")], groups) == ["a/test", "b/test", "dev"]
    assert distinct_names([Path("/x/a/t"), Path("/y/a/t")], groups) == ["x/a/t", "y/a/t"]
    assert distinct_names([Path("/a/t"), Path("/b/t")], ["asr", "tts"]) == ["t", "t"]
    assert distinct_names([Path(".")], ["asr"]) == [Path.cwd().name]
