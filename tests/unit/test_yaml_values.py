"""Configurations are read as they are written, and what is hostile or ambiguous in them is an error of one line."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from most_ray.config import OPTIONS, config_from, load_config, read_yaml, to_yaml
from most_ray.errors import ConfigError
from most_ray.io.yaml_values import parse_yaml
from most_ray.options import stored_values
from tests.conftest import ROOT

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("---\n", None),
        ("a: 1.10\nb: 012\nc: 12:30\nd: 2020-02-30", {"a": "1.10", "b": "012", "c": "12:30", "d": "2020-02-30"}),
        ("a: no\nb: 1_000\nc: 0x10", {"a": "no", "b": "1_000", "c": "0x10"}),
        ("a: \nb: ~\nc: null\nd: 'null'\ne: ''", {"a": None, "b": None, "c": None, "d": "null", "e": ""}),
        ("a: &x [1, {b: c}]\nd: *x", {"a": ["1", {"b": "c"}], "d": ["1", {"b": "c"}]}),
        ("a: !!str 1\nb: !!int '2'\nc: !!null x", {"a": "1", "b": "2", "c": None}),
        ("1: a\nnull: b\ntrue: c", {"1": "a", "null": "b", "true": "c"}),
        ("\ufeffa: b\r\n", {"a": "b"}),
        ("'<<': a", {"<<": "a"}),
    ],
)
def test_values_are_the_text_that_stands_there(text: str, value: Any) -> None:
    assert parse_yaml(text) == value == parse_yaml(text.encode())


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: 1\nb: 2\na: 3", r"has the key 'a' twice \(line 3\)"),
        ("s: {a: 1, a: 2}", r"has the key 'a' twice"),
        ("1: a\n'1': b", r"has the key '1' twice"),
        ("a: 1\n---\nb: 2", r"has a second document \(line 2\)"),
        ("x: {a: 1}\n<<: {b: 2}", r"merges mappings by `<<` \(line 2\)"),
        ("a: !!set {b, c}", r"the tag 'tag:yaml.org,2002:set' \(line 1\)"),
        ("a: !!binary aGVsbG8=", r"the tag 'tag:yaml.org,2002:binary'"),
        ("a: !!timestamp 2020-02-30", r"the tag 'tag:yaml.org,2002:timestamp'"),
        ("a: !!python/object/apply:os.system ['true']", r"the tag 'tag:yaml.org,2002:python"),
        ("a: !mine b", r"the tag '!mine'"),
        ("a: &a [*a]", r"an alias \*a of nothing that ends before it \(line 1\), in 'a'$"),
        ("seed: 1\nname: [[[!mine b]]]", r"the tag '!mine' \(line 2\).*, in 'name'$"),
        ("a: 1\nb: 2\na: 3", r"has the key 'a' twice \(line 3\)$"),
        ("a: *b", r"an alias \*b of nothing"),
        ("? [a, b]\n: c", r"a list or a mapping as a key"),
        ("? {a: b}\n: c", r"a list or a mapping as a key"),
        ("a: &x [b]\n? *x\n: c", r"a list or a mapping as a key"),
        ("a: " + "[" * 300_000, r"is nested more than 100 deep"),
        ("a: " + "{a: " * 3_000, r"is nested more than 100 deep"),
        ("a: &a " + "[" * 60 + "]" * 60 + "\nb: " + "[" * 60 + "*a" + "]" * 60, r"is nested more than 100 deep"),
        (BOMB, r"has more than 20,000 values"),
        ("a: [" + "1, " * 20_000 + "]", r"has more than 20,000 values"),
        ("a: '\0'", r"is not YAML"),
        ("a: [", r"is not YAML"),
        ("\ta: b", r"is not YAML"),
        ("x" * (1 << 20) + "y", r"has more than 1,048,576 bytes"),
    ],
)
def test_what_is_hostile_or_ambiguous_is_refused_at_once(text: str, rule: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=rule):
        parse_yaml(text)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_read_as_before(path: Path) -> None:
    """Both loaders give the same options: nobody has written a number there that YAML 1.1 reads as another one."""
    old = {name: value for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items() if name in OPTIONS}
    new = {name: value for name, value in read_yaml(path).items() if name in OPTIONS}
    assert {n: OPTIONS[n].parse(v) for n, v in new.items()} == {n: OPTIONS[n].parse(v) for n, v in old.items()}


@settings(max_examples=50, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/$~\ufeff"), min_size=1, max_size=20), st.floats(1e-9, 1e6)
)
def test_what_is_written_is_read_back(name: str, rate: float) -> None:
    config = config_from(
        {"wandb_group": f"g{name}", "learning_rate": rate, "fp16": True, "bf16": False, "train_asr_dirs": ["a b", name + "x"]}
    )
    assert config_from(parse_yaml(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("line", "option", "value"),
    [
        ("name: 1.10", "name", "1.10"),
        ("name: 012", "name", "012"),
        ("name: 12:30", "name", "12:30"),
        ("name: 2024-01-02", "name", "2024-01-02"),
        ("name: no", "name", "no"),
        ("warmup_steps: 012", "warmup_steps", 12),
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 1.0e+3", "max_steps", 1000),
        ("max_steps: 1_000", "max_steps", 1000),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("fp16: on", "fp16", True),
        ("fp16: yes", "fp16", True),
        ("async_save: Off", "async_save", False),
        ("async_save: NO", "async_save", False),
        ("bf16: ~", "bf16", None),
        ("eval_steps: none", "eval_steps", None),
        ("wandb_tags: [1.10, on, 012]", "wandb_tags", ("1.10", "on", "012")),
        ("num_workers: [2, 4]", "num_workers", (2, 4)),
    ],
)
def test_an_option_decides_what_a_text_is(tmp_path: Path, line: str, option: str, value: Any) -> None:
    (tmp_path / "c.yaml").write_text(line)
    found = getattr(load_config(tmp_path / "c.yaml"), option)
    assert found == value and type(found) is type(value)


NO_NUMBERS = ["max_steps: 12:30", "max_steps: 0x10", "seed: 2020-02-20", "seed: true", "max_steps: 1.5", "fp16: 2", "learning_rate: .nan"]


@pytest.mark.parametrize("line", NO_NUMBERS)
def test_what_is_no_number_is_said(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.yaml").write_text(line)
    with pytest.raises(ConfigError, match=rf"^{line.split(':')[0]} = "):
        load_config(tmp_path / "c.yaml")


def test_values_of_a_stored_run_have_their_types() -> None:
    stored = {"max_steps": "5", "learning_rate": "1e-3", "weight_unit": "rows", "seed": "many", "gone": "1"}
    assert stored_values(OPTIONS, stored) == {"max_steps": 5, "learning_rate": 1e-3, "weight_unit": "records", "seed": "many", "gone": "1"}


SEED = "name: r\ntrain_asr_dirs: [a, 'b']\nnum_workers: [1, 2]\nlearning_rate: 1.0e-4\nfp16: no\nmax_steps: &n 4\neval_steps: *n\n"
PIECES = [
    "*n",
    "&n ",
    "- ",
    "? ",
    ": ",
    "{",
    "[",
    "]",
    "!!set ",
    "<<: ",
    "---\n",
    "'",
    '"',
    "\\ud800",
    "\0",
    "\t",
    "~",
    "9" * 400,
    ".inf",
    "|",
    "%",
    "\n",
]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SEED)), st.integers(0, 5), st.sampled_from(PIECES) | st.text(max_size=4)), min_size=1, max_size=6)
)
def test_no_mutation_of_a_file_ends_in_another_error(edits: list[tuple[int, int, str]]) -> None:
    text = SEED
    for place, cut, piece in edits:
        text = text[:place] + piece + text[place + cut :]
    with contextlib.suppress(ValueError):  # as ConfigError is one, too
        if isinstance(values := parse_yaml(text), dict):
            config_from(values)
