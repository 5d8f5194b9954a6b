"""An export as users of transformers run it, by the names that the installed release has, and by those it had before."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

import most_ray  # noqa: F401
from most_ray.evaluation.decode import Forward, SearchOptions, decode
from most_ray.model.build import init_model, save_model
from most_ray.model.compat import CACHE, resolve_cache
from most_ray.records.tokenizer import load_tokenizer
from tests.support.builders import WORDS

TEXT = "User: seven eight\n\nAssistant: "


@pytest.fixture(autouse=True)
def told(told: list[object]) -> Iterator[list[object]]:
    """Beside what the log has, every warning, whoever's call it is about."""
    transformers.utils.logging.warning_once.cache_clear()  # it says each thing once in a process
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: told.append(message)  # type: ignore[assignment]
        yield told


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = init_model("tiny", [" ".join(WORDS), TEXT], folder / "init")
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)  # a fresh model hardly prefers any token
    save_model(model, load_tokenizer(str(folder / "init")), folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def model(export: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(export).eval()


@pytest.fixture(scope="module")
def tokenizer(export: Path) -> Any:
    return AutoTokenizer.from_pretrained(export)


@pytest.fixture(scope="module")
def inputs(tokenizer: Any) -> Any:
    return tokenizer(TEXT, return_tensors="pt", add_special_tokens=False)


def generate(model: Any, inputs: Any, **keywords: Any) -> list[int]:
    output = model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False, **keywords})
    return output[0, inputs.input_ids.shape[1] :].tolist()


def stop_tokens(model: Any) -> list[int]:
    return list(model.generation_config.eos_token_id)


@pytest.mark.parametrize(
    "keywords", [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"}]
)
def test_greedily_it_is_our_own_decoding(model: Any, inputs: Any, keywords: dict[str, Any]) -> None:
    """With each kind of cache and without one."""
    prompt = inputs.input_ids[0].numpy()
    (expected,) = decode(Forward(model), [prompt], stop_tokens(model), [12], SearchOptions(64, 1, 1.0))
    assert len(expected.tokens) > 3
    assert generate(model, inputs, disable_compile=True, **keywords)[: len(expected.tokens)] == expected.tokens


@pytest.mark.parametrize("beams", [2, 4])
def test_by_beams_it_is_our_own_search(model: Any, inputs: Any, beams: int) -> None:
    (expected,) = decode(Forward(model), [inputs.input_ids[0].numpy()], stop_tokens(model), [12], SearchOptions(64, beams, 1.0))
    assert generate(model, inputs, num_beams=beams)[: len(expected.tokens)] == expected.tokens


def test_a_batch_of_unequal_prompts_is_each_alone(model: Any, tokenizer: Any) -> None:
    texts = [TEXT, "User: nine\n\nAssistant: ", "one two three four five six"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    outputs = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, batch.input_ids.shape[1] :]
    for text, output in zip(texts, outputs.tolist(), strict=True):
        alone = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        assert generate(model, alone, max_new_tokens=6, min_new_tokens=6) == output


def test_sampling_and_assistance(model: Any, inputs: Any, told: list[object]) -> None:
    """Samples come again with their seed; what another model, or the prompt itself, drafts is checked to be what greed finds."""
    torch.manual_seed(0)
    first = generate(model, inputs, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    assert generate(model, inputs, do_sample=True, num_return_sequences=2) == first
    greedy = generate(model, inputs)
    assert generate(model, inputs, assistant_model=copy.deepcopy(model)) == generate(model, inputs, prompt_lookup_num_tokens=3) == greedy
    told.clear()  # the library's assistant calls `generate` in a way that the library deprecates


def test_by_pipeline(model: Any, tokenizer: Any, inputs: Any) -> None:
    speak = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = speak(TEXT, max_new_tokens=6, do_sample=False, add_special_tokens=False, return_full_text=False)
    assert answer["generated_text"] == tokenizer.decode(generate(model, inputs, max_new_tokens=6), skip_special_tokens=True)


@torch.no_grad()
def step_by_step(model: Any, ids: torch.Tensor, name: str, cache: Any = None) -> torch.Tensor:
    """Logits (S, V), the prompt's but its last token's at once, the last one's by the cache, handed on by `name`."""
    first = model(input_ids=ids[:, :-1], use_cache=True, **({name: cache} if cache is not None else {}))
    last = model(input_ids=ids[:, -1:], use_cache=True, **{name: getattr(first, name)})
    assert getattr(last, name) is getattr(first, name) and getattr(last, name).get_seq_length() == ids.shape[1]
    assert last[name] is first[name]
    return torch.cat([first.logits[0], last.logits[0]])


@pytest.mark.parametrize("given", [False, True])
def test_with_a_cache_each_token_has_the_logits_it_has_without(model: Any, inputs: Any, given: bool) -> None:
    cache = DynamicCache(config=model.config) if given else None
    with torch.no_grad():
        expected = model(**inputs, use_cache=False)
    assert getattr(expected, CACHE) is None
    torch.testing.assert_close(step_by_step(model, inputs.input_ids, CACHE, cache), expected.logits[0], rtol=0, atol=1e-5)


def test_the_older_name_of_the_cache_is_taken(model: Any, inputs: Any, told: list[object]) -> None:
    """Code that was written for a release before 5.24, to the bit."""
    old, new = (step_by_step(model, inputs.input_ids, name, DynamicCache(config=model.config)) for name in ("past_key_values", CACHE))
    assert torch.equal(old, new)
    assert generate(model, inputs, past_key_values=DynamicCache(config=model.config)) == generate(model, inputs)
    told.clear()


def test_two_caches_are_one_too_many(model: Any, inputs: Any) -> None:
    first, second = DynamicCache(config=model.config), DynamicCache(config=model.config)
    assert resolve_cache(first, None) is resolve_cache(None, first) is resolve_cache(first, first) is first
    assert resolve_cache(None, None) is None
    with pytest.raises(ValueError, match=rf"two caches were given: pass one \(to generate\(\) as {CACHE},"):
        model(**inputs, cache=first, past_key_values=second)


def test_in_bfloat16_and_saved_again(model: Any, export: Path, inputs: Any, tmp_path: Path) -> None:
    """A copy in half precision generates; what is saved again is what was loaded, tensor by tensor."""
    half = AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16 and len(generate(half, inputs, min_new_tokens=4)) >= 4
    for name, loaded in (("full", model), ("half", half)):
        loaded.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=loaded.dtype).state_dict()
        assert {key: value.dtype for key, value in again.items()} == {key: value.dtype for key, value in loaded.state_dict().items()}
        assert all(torch.equal(again[key], value) for key, value in loaded.state_dict().items())
