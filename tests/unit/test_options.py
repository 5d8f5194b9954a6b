"""Promise of the declarations: what the program must know about a key is stated with the key, and nowhere else."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from most_ray.cli.job_files import resolve_paths
from most_ray.config import OPTIONS, RunConfig, config_from
from most_ray.errors import ConfigError
from most_ray.options import (
    ABOVE_0,
    ABOVE_1,
    AT_LEAST_1,
    BELOW_1,
    FOLDER,
    MOST_SEED,
    NOT_NEGATIVE,
    RECORDS,
    SHARE,
    Option,
    Range,
    add_flags,
    current_words,
    flag_values,
    option,
    options_of,
    parse_number,
    parse_values,
)
from most_ray.sweep.options import SWEEP_OPTIONS
from most_ray.sweep.space import parse_space
from tests.conftest import ROOT

EVERY = {**OPTIONS, **SWEEP_OPTIONS}
TEXTS = {"name", "epochs_of", "best_metric", "ray_address", "wandb_project", "wandb_tags", "wandb_group", "objectives"}  # no paths
LOCATED = [each.name for each in EVERY.values() if each.location]
# Lists of keys that say something else than what a key is: the flags that a command has, the keys that a function sets.
LISTS = {"cli/speech_commands.py", "service/tune/runner.py", "sweep/space.py"}


def example(option: Option, text: str) -> Any:
    return (text,) if option.many else text


@pytest.mark.parametrize("name", EVERY)
def test_every_number_has_a_range_and_every_path_says_what_it_is_for(name: str) -> None:
    each = EVERY[name]
    assert (each.range is not None) == (each.type in (int, float)), "a number without a range, or a range of no number"
    assert (each.location is not None) == (each.type is str and not each.choices and name not in TEXTS), "a text that may be a path"
    if each.default is None and not each.location:
        assert "(default: " in each.help, "a key that depends on something says on what"
    assert each.default in (None, ()) or not each.choices or each.default in each.choices


@pytest.mark.parametrize("name", [name for name in LOCATED if name in OPTIONS])
def test_every_path_is_redacted_and_found_in_a_job(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = OPTIONS[name]
    secret = "s3://bucket/x?access_key=AKIA&secret_key=hush"
    shown = getattr(RunConfig(**{name: example(each, secret)}).redacted(), name)
    assert "hush" not in str(shown) and "bucket/x" in str(shown)
    (tmp_path / "home" / "folder" / "y").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = resolve_paths(RunConfig(**{name: example(each, "folder/y")}), tmp_path / "home")
    assert getattr(config, name) == example(each, str(tmp_path / "home" / "folder" / "y"))


@pytest.mark.parametrize("name", [name for name, each in OPTIONS.items() if each.sweep == "shared"])
def test_what_all_trials_share_is_in_no_space(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"space.{name}: belongs to the sweep as a whole"):
        parse_space({name: [1, 2]})


@pytest.mark.parametrize(
    ("range", "inside", "outside"),
    [
        (AT_LEAST_1, [1, 7], [0, -1]),
        (NOT_NEGATIVE, [0, 0.5], [-1e-9]),
        (ABOVE_0, [1e-9], [0, -1]),
        (ABOVE_1, [1.5], [1, 0]),
        (SHARE, [0, 0.5, 1], [-0.1, 1.1]),
        (BELOW_1, [0, 0.99], [1, -0.1]),
        (OPTIONS["load_alert"].range, [0, 1.5], [1, 0.5, -1]),
    ],
)
def test_ranges(range: Range, inside: list[float], outside: list[float]) -> None:
    assert all(map(range.holds, inside)) and not any(map(range.holds, outside))


@pytest.mark.parametrize("name", [name for name, each in EVERY.items() if each.type in (int, float)])
def test_no_number_is_without_bounds(name: str) -> None:
    each = EVERY[name]
    for value in ("9" * 400, "9" * 5000, 10**400, 1e308, math.inf, math.nan, "nan", "-inf", "1e999", [10**20]):
        with pytest.raises(ConfigError, match=f"^{name} = "):
            each.check(each.parse(value))


@pytest.mark.parametrize(
    ("type_", "value", "number"),
    [
        (int, "1e3", 1000),
        (int, " 12 ", 12),
        (int, "012", 12),
        (int, 3.0, 3),
        (int, str(MOST_SEED), MOST_SEED),
        (float, "1e-4", 1e-4),
        (float, 3, 3.0),
        (float, "0." + "1" * 2000, 1 / 9),
    ],
)
def test_numbers(type_: type, value: Any, number: float) -> None:
    found = parse_number("n", type_, value)
    assert found == number and type(found) is type_


@pytest.mark.parametrize("type_", [int, float])
@pytest.mark.parametrize("value", [True, None, [1], {1: 2}, b"1", "0x10", "12:30", "2020-01-01", "one", "", "1,5", "nan", object()])
def test_no_numbers(type_: type, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^n( = .*)?: is not "):
        parse_number("n", type_, value)


def test_the_largest_number_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^num_workers = \(2, 100001\): must be at most 100,000\.$"):
        config_from({"num_workers": "2,100001"})
    with pytest.raises(ConfigError, match=r"^learning_rate = 10000000000\.0: must be at most 1e\+09\.$"):
        config_from({"learning_rate": 1e10})
    assert config_from({"seed": MOST_SEED, "num_workers": 100_000, "global_batch_size": 1_000_000}).seed == MOST_SEED


@pytest.mark.parametrize("value", ["a\udcff", "\ud800", "a\0b", ["a"], {"a": 1}, True, b"a"])
def test_no_texts(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^name = "):
        config_from({"name": value})


def test_a_list_is_in_its_range_where_every_element_is() -> None:
    with pytest.raises(ConfigError, match=r"train_asr_weights = \(1\.0, 0\.0\): must be above 0\."):
        config_from({"train_asr_dirs": ["a", "b"], "train_asr_weights": [1, 0]})


def test_a_word_of_an_earlier_version_is_read_as_todays() -> None:
    """Rows are packed rows elsewhere: the records that weights count were called so once."""
    assert config_from({"weight_unit": "rows"}) == config_from({"weight_unit": "records"}) == config_from({})
    assert current_words(OPTIONS, {"weight_unit": "rows", "name": "rows", "other": "rows"}) == {
        "weight_unit": "records",
        "name": "rows",
        "other": "rows",
    }
    assert parse_space({"weight_unit": "rows | tokens"}).dimensions[0].values == ("records", "tokens")
    with pytest.raises(ConfigError, match="is not one of its choices"):
        config_from({"weight_unit": "frames"})


def test_a_new_option_is_one_statement() -> None:
    """Its flag, its help, its checks and its place in files follow."""

    @dataclass(frozen=True)
    class Section:
        """A section."""

        new_dirs: tuple[str, ...] = option((), "directories of something", location=RECORDS)
        new_folder: str | None = option(None, "where something is kept (default: nowhere)", location=FOLDER)
        new_rate: float = option(0.5, "a share of something", range=SHARE)

    # Annotations of a local class are not found by name in its module.
    Section.__annotations__.update(new_dirs=tuple[str, ...], new_folder=str | None, new_rate=float)
    options, parser = options_of(Section), argparse.ArgumentParser()
    add_flags(parser, [Section])
    assert "a share of something (default: 0.5)" in " ".join(parser.format_help().split())
    given = flag_values(parser.parse_args(["--new_dirs", "a", "b", "--new_rate", "0.25"]), options)
    assert Section(**parse_values(options, given)) == Section(("a", "b"), None, 0.25)
    with pytest.raises(ConfigError, match=r"new_rate = 2\.0: must be in 0\.\.1\."):
        parse_values(options, {"new_rate": 2})
    with pytest.raises(ConfigError, match=r"new_rat: is no known .*Did you mean 'new_rate'"):
        parse_values(options, {"new_rat": 2})


def test_no_module_keeps_a_list_of_keys_of_its_own() -> None:
    """Of tuples, lists, sets and strings of words, three keys or more: then the declaration lacks something that a module must know."""
    found = set()
    for path in sorted((ROOT / "most_ray").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words: list[object] = []
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                words = [each.value for each in node.elts if isinstance(each, ast.Constant)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = list(node.value.split()) if all(word in EVERY for word in node.value.split()) else []
            if len({word for word in words if word in EVERY}) >= 3:
                found.add(path.relative_to(ROOT / "most_ray").as_posix())
    assert found <= LISTS


def test_the_reference_says_what_is_declared(generator: ModuleType) -> None:
    page = generator.docs_reference.configuration_markdown()
    assert "| `learning_rate` | number, above 0 | `0.0001` | yes, also during training |" in page
    assert "| `output_dir` | path or URI; written | `runs` | no |" in page
    assert "| `train_asr_dirs` | directories or URIs that exist; read | none | yes |" in page
    assert "| `reduction_factor` | number, above 1 | `3.0` |" in page


def test_the_whole_configuration_is_made_of_options() -> None:
    assert list(OPTIONS) == [field.name for field in dataclasses.fields(RunConfig)]
    assert all("help" in field.metadata for field in dataclasses.fields(RunConfig))
