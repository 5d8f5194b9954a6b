from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from most_ray.data.plan import distinct_names
from most_ray.evaluation.decode import count_routing, greedy
from most_ray.evaluation.evaluate import teacher_forced
from most_ray.evaluation.wer import word_errors
from most_ray.template import IGNORE
from tests.support.builders import IDS, asr, make_store, tiny_model


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.concatenate([[0], rng.integers(3, 802, int(rng.integers(3, 30)))]).astype(np.int32) for _ in range(11)]


def test_it_is_the_librarys_greedy_decoding(prompts: list[np.ndarray]) -> None:
    """Against transformers' generate, one prompt at a time; left padding and the batch change nothing (promise 24)."""
    model = tiny_model(3).eval()
    caps = [4 + index % 5 for index in range(len(prompts))]
    stop = [IDS.eos, IDS.end_audio]
    expected = []
    for prompt, cap in zip(prompts, caps, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64)).unsqueeze(0)
        out = model.generate(ids, max_new_tokens=cap, do_sample=False, eos_token_id=stop, pad_token_id=IDS.pad)[0, len(prompt) :].tolist()
        expected.append([token for token in out if token not in stop])
    for batch_size in (1, 4, 16):
        assert greedy(model, prompts, stop, caps, batch_size) == expected


def test_every_selection_is_counted_and_neither_padding_nor_ended_rows_are(prompts: list[np.ndarray]) -> None:
    model = tiny_model(3).eval()
    caps = [2 + index % 4 for index in range(len(prompts))]  # rows of a batch end at different times
    loads = []
    for batch_size in (1, 11):
        with count_routing(model) as count:
            produced = greedy(model, prompts, [], caps, batch_size)
        loads.append(count.load)
    assert [len(output) for output in produced] == caps
    tokens = sum(len(prompt) + cap - 1 for prompt, cap in zip(prompts, caps, strict=True))  # the last one is produced, not read
    assert torch.equal(loads[0], loads[1]) and int(loads[0].sum()) == tokens * 2 * 2
    assert int(loads[0][:, 0, 4:].sum()) == int(loads[0][:, 1, :4].sum()) == 0


def test_teacher_forced_loss_is_the_plain_one(tmp_path: Path) -> None:
    store = make_store(tmp_path, "a", [asr(i, 3 + i) for i in range(9)])
    model = tiny_model().eval()
    total, count = 0.0, 0
    for row in range(len(store)):
        ids = torch.from_numpy(store.input_ids(row).astype(np.int64)).unsqueeze(0)
        labels = ids.clone()
        labels[:, : int(store.prompt_lengths[row])] = IGNORE
        n = int((labels != IGNORE).sum())
        total += float(model(input_ids=ids, labels=labels).loss.detach()) * n
        count += n
    figures = teacher_forced(model, store, tokens_per_batch=300)
    assert figures["supervised_tokens"] == count
    assert figures["loss"] == pytest.approx(total / count, abs=1e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)


def test_word_errors_are_counted_over_the_set() -> None:
    errors = word_errors(["one two three", "FOUR", "five"], ["one too three", "four  four", ""])
    assert (errors.substitutions, errors.insertions, errors.deletions, errors.words, errors.records) == (1, 1, 1, 5, 3)
    assert errors.wer == pytest.approx(3 / 5)
    json.dumps(errors.as_dict())


def test_sets_are_told_apart() -> None:
    groups = ["asr"] * 3
    assert distinct_names([Path("/a/test"), Path("/b/test"), Path("/c/dev")], groups) == ["a/test", "b/test", "dev"]
    assert distinct_names([Path("/x/a/t"), Path("/y/a/t")], groups) == ["x/a/t", "y/a/t"]
    assert distinct_names([Path("/a/t"), Path("/b/t")], ["asr", "tts"]) == ["t", "t"]
    assert distinct_names([Path(".")], ["asr"]) == [Path.cwd().name]
