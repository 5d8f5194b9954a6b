"""What the product takes of torch, transformers and Ray is what the installed releases have."""

from __future__ import annotations

from pathlib import Path

import pytest

from most_ray.errors import ConfigError
from most_ray.model import compat
from tests.support.library_names import changes, leaned_on, read_kept, release_of, signature, sources


def test_every_name_is_called_as_it_was_when_the_product_was_written() -> None:
    """Each name that is subclassed, decorated with or called with positional arguments. What fails here is a release that changed one:
    look at its uses before its new signature is added."""
    kept = read_kept()
    told = changes(leaned_on(sources(), kept), kept)
    assert not told, "\n".join(["", *told])


SOURCE = """
import torch.nn.functional as F
import torch
from torch import nn
Base = nn.Module

def late():
    import ray
    from transformers.utils import can_return_tuple as decorated
    class Own(nn.Linear):
        def forward(self, x):
            return F.pad(x, (0, 1), value=1.0)
        def extra_repr(self):
            return ""
        @decorated
        async def of_its_own(self): ...
    class Again(Own):
        def extra_repr(self):
            return map(torch.index_select, [torch.float32], key=torch.logaddexp)
    class Named(Base):
        def forward(self): ...
    @ray.remote
    class Actor(torch.utils.data.Dataset[int]):
        def __getitem__(self, index): ...
    ray.get(ray.put(1))
    F.gelu(input=1)
    dataset.map_batches(late)
    bytes.decode("x")
    self._tokenizer.decode([1])
"""


@pytest.fixture
def used(tmp_path: Path) -> dict[str, list[str]]:
    (tmp_path / "source.py").write_text(SOURCE)
    return leaned_on([tmp_path / "source.py"])


def test_names_are_found_in_the_sources(used: dict[str, list[str]]) -> None:
    """By whatever alias, in functions too; methods that the base class has, of subclasses' subclasses too, and some of objects; what
    decorates, functions that are handed on; no calls by keyword alone, no name that was not imported."""
    assert used == {
        "torch.nn.Linear.__init__": ["source.py:10", "source.py:17"],
        "torch.nn.Linear.forward": ["source.py:11"],
        "torch.nn.Linear.extra_repr": ["source.py:13", "source.py:18"],
        "torch.nn.Module.__init__": ["source.py:20"],
        "torch.nn.Module.forward": ["source.py:21"],
        "torch.nn.functional.pad": ["source.py:12"],
        "torch.index_select": ["source.py:19"],
        "torch.logaddexp": ["source.py:19"],
        "torch.utils.data.Dataset.__init__": ["source.py:23"],
        "torch.utils.data.Dataset.__getitem__": ["source.py:24"],
        "transformers.utils.can_return_tuple": ["source.py:15"],
        "transformers.PreTrainedTokenizerFast.decode": ["source.py:29"],
        "ray.remote": ["source.py:22"],
        "ray.get": ["source.py:25"],
        "ray.put": ["source.py:25"],
        "ray.data.Dataset.map_batches": ["source.py:27"],
    }


def test_a_change_is_a_sentence(used: dict[str, list[str]]) -> None:
    kept = {name: [signature(name)] for name in used}
    assert changes(used, kept) == []
    torch, ray = release_of("torch.x"), release_of("ray.x")
    (told,) = changes(used, {**kept, "torch.nn.functional.pad": ["(input, value=, pad=)"]})
    assert told == (
        f"{torch} takes (input, pad, mode=, value=), where torch.nn.functional.pad took (input, value=, pad=): look at its use in "
        "source.py:12, then run python -m tests.support.library_names."
    )
    (told,) = changes({**used, "ray.gone": ["source.py:1"]}, {**kept, "ray.gone": ["(x)"]})
    assert told.startswith(f"{ray} has no such name, where ray.gone took (x): look at its use in source.py:1,")
    (told,) = changes(used, {name: kept[name] for name in kept if name != "ray.put"})
    assert told.startswith("ray.put is used in source.py:25 and is not in library_signatures.json")
    (told,) = changes(used, {**kept, "torch.old": ["(x)"]})
    assert told.startswith("torch.old is in library_signatures.json and is not used any more")
    # Of several releases each may have its own; one that had none yet says nothing of those to come.
    assert changes(used, {**kept, "ray.put": ["(value)", *kept["ray.put"], "none in ray 1.0"]}) == []
    assert changes({"ray.gone": ["source.py:1"]}, {"ray.gone": ["(x)", f"none in {ray}"]}) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch.nn.functional.pad", "(input, pad, mode=, value=)"),
        ("torch.index_select", "index_select(input, dim, index, *, out=None)"),  # a builtin
        (
            "torch.utils.checkpoint.checkpoint",
            "(function, *args, use_reentrant=, context_fn=, determinism_check=, debug=, early_stop=, **kwargs)",
        ),
        ("ray.kill", "(actor, *, no_restart=)"),
    ],
)
def test_signatures(name: str, expected: str) -> None:
    """Order, defaults and stars; neither annotations nor values, which may change without harm."""
    assert signature(name) == expected


def test_more_than_one_worker_needs_a_library_that_lays_models_out(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_workers(1)
    monkeypatch.setattr(compat, "SUPPORTS_MANY_WORKERS", False)
    compat.check_workers(1)
    with pytest.raises(ConfigError, match=r"num_workers = 2: needs transformers 5\.23 or later.*pip install 'transformers>=5\.23'"):
        compat.check_workers(2)
