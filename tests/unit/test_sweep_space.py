"""What a sweep tries: how a space is written, what the k-th trial is, and which experts a split gives to audio."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from most_ray.errors import ConfigError
from most_ray.sweep.space import Dimension, Space, parse_space
from most_ray.sweep.splits import SPLITS, rank_experts, split_experts

FLOATS = st.floats(1e-12, 1e12, allow_nan=False)
SHARES = st.floats(0, 1, exclude_max=True)


def space_of(text: str) -> Space:
    """A space as it stands in a file."""
    return parse_space(yaml.safe_load(text))


def only(text: str) -> Dimension:
    (dimension,) = space_of(text).dimensions
    return dimension


@pytest.mark.parametrize(
    ("text", "kind", "values"),
    [
        ("seed: {choice: [3, 1, 2]}", "choice", (3, 1, 2)),
        ("seed: {grid: [3, 1]}", "grid", (3, 1)),
        ("seed: [3, 1]", "choice", (3, 1)),
        ("seed: 7", "choice", (7,)),
        ("seed: 3 | 1", "choice", (3, 1)),
        ("lr_scheduler: linear | cosine", "choice", ("linear", "cosine")),
        ("lr_scheduler: cosine", "choice", ("cosine",)),
        ("learning_rate: [1.0e-3, 1e-4, '0.5']", "choice", (1e-3, 1e-4, 0.5)),
        ("seq_aux: [true, false]", "choice", (True, False)),
        ("num_experts_per_tok: {choice: [null, 2]}", "choice", (None, 2)),
        ("expert_split: affinity | interleaved", "choice", ("affinity", "interleaved")),
        ("expert_split: {grid: [contiguous, interleaved, affinity]}", "grid", SPLITS),
        ("audio_experts: [2, 3]", "choice", (2, 3)),
        ("text_expert_indices: {choice: [[0, 1], [0, 1, 2]]}", "choice", ([0, 1], [0, 1, 2])),
        ("text_expert_indices: 0,1 | 0,1,2 | 3", "choice", ([0, 1], [0, 1, 2], 3)),
        ("train_asr_weights: {choice: [null, [1, 2]]}", "choice", (None, [1.0, 2.0])),
        ("train_text_dirs: {choice: ['', a]}", "choice", ([], "a")),
    ],
)
def test_listed_values_in_every_spelling(text: str, kind: str, values: tuple[Any, ...]) -> None:
    """Values get the key's type; a list's element stands for itself, several of them for a list."""
    dimension = only(text)
    assert (dimension.kind, dimension.values) == (kind, values)
    assert [type(value) for value in dimension.values] == [type(value) for value in values]
    assert dimension.listed == values and not dimension.continuous


@pytest.mark.parametrize(
    ("text", "kind", "low", "high"),
    [
        ("learning_rate: {uniform: [0.1, 0.5]}", "uniform", 0.1, 0.5),
        ("learning_rate: {uniform: 1..2}", "uniform", 1, 2),
        ("learning_rate: {loguniform: [1e-4, 1.0e-2]}", "loguniform", 1e-4, 1e-2),
        ("aux_loss_alpha: {uniform: [0, 1]}", "uniform", 0, 1),
        ("train_asr_weights: {uniform: [0.5, 2]}", "uniform", 0.5, 2),
        ("audio_experts: {randint: [2, 6]}", "randint", 2, 6),
        ("audio_experts: 2..6", "randint", 2, 6),
        ("audio_experts: ' 2 .. 2 '", "randint", 2, 2),
        ("seed: {randint: 0..9999}", "randint", 0, 9999),
        ("learning_rate: 1..3", "randint", 1, 3),
    ],
)
def test_ranges_in_every_spelling(text: str, kind: str, low: float, high: float) -> None:
    dimension = only(text)
    assert (dimension.kind, dimension.low, dimension.high, dimension.values) == (kind, low, high, ())
    assert dimension.continuous == (kind != "randint")
    assert dimension.listed == (tuple(range(int(low), int(high) + 1)) if kind == "randint" else None)


def test_a_list_with_ranges_in_it() -> None:
    """Its elements are dimensions of their own; what stands alone stays, as the key's type."""
    space = space_of("train_asr_weights: [{uniform: [0.5, 2]}, 1, {choice: [3, 4]}]\nseed: 1..2")
    assert space.names == ["train_asr_weights[0]", "train_asr_weights[2]", "seed"]
    values = {"train_asr_weights[0]": 0.75, "train_asr_weights[2]": 4.0, "seed": 2}
    assert space.settings(values) == {"train_asr_weights": [0.75, 1.0, 4.0], "seed": 2}
    assert isinstance(space.settings(values)["train_asr_weights"][1], float)


WRONG = [
    ("learning_rat: [0.1]", "space.learning_rat: is not a configuration key. Did you mean 'learning_rate'?"),
    ("audio_expert: 2..3", "space.audio_expert: is not a configuration key. Did you mean 'audio_experts'?"),
    ("5: [1]", "space.5: is not a configuration key."),
    ("max_step: [1]", "space.max_step: is not a configuration key."),
    *(
        (f"{key}: [1]", f"space.{key}: belongs to the sweep as a whole, not to a trial.")
        for key in ("name", "max_steps", "eval_steps", "save_steps", "num_workers", "val_asr_dirs", "output_dir", "epochs", "normaliser")
    ),
    ("learning_rate: {}", "space.learning_rate = {}: is not one of choice, grid, uniform, loguniform, randint."),
    ("learning_rate: {normal: [0, 1]}", "space.learning_rate = {'normal': [0, 1]}: is not one of"),
    ("learning_rate: {uniform: [0, 1], grid: [1]}", "space.learning_rate = {'grid': [1], 'uniform': [0, 1]}: is not one of"),
    ("learning_rate: {choice: 0.1}", "space.learning_rate = 0.1: is not a list of values."),
    ("learning_rate: {grid: []}", "space.learning_rate = []: is not a list of values."),
    ("learning_rate: {choice: [0.1, '1e-1']}", "space.learning_rate = [0.1, 0.1]: names a value twice."),
    ("learning_rate: [-1, 1]", "space.learning_rate = -1: must be above 0."),
    ("train_asr_weights: {choice: [[1, 2], [0, 1]]}", "space.train_asr_weights = [0, 1]: must be above 0."),
    ("learning_rate: {uniform: [1, 1" + "0" * 400 + "]}", "space.learning_rate = [1, 10000"),
    ("learning_rate: [fast]", "space.learning_rate = 'fast': is not a number."),
    ("learning_rate: 0.1..0.5", "space.learning_rate = '0.1..0.5': is not a number."),
    ("seed: [1.5]", "space.seed = 1.5: is not a whole number."),
    ("seed: null", "space.seed: needs a value."),
    ("lr_scheduler: linear | cosin", "space.lr_scheduler = 'cosin': is not one of its choices. Did you mean 'cosine'?"),
    ("expert_split: odd", "space.expert_split = 'odd': is not a way to split experts."),
    ("expert_split: affinit", "space.expert_split = 'affinit': is not a way to split experts. Did you mean 'affinity'?"),
    ("expert_split: 1..2", "space.expert_split = 1: is not a way to split experts."),
    ("audio_experts: [0, 2]", "space.audio_experts = 0: must be a number of experts, at least 1."),
    ("audio_experts: [true]", "space.audio_experts = True: must be a number of experts"),
    ("audio_experts: [2.5]", "space.audio_experts = 2.5: must be a number of experts"),
    ("audio_experts: 0..3", "space.audio_experts = 0: must be a number of experts"),
    (
        "audio_experts: {uniform: [1, 3]}",
        "space.audio_experts = [1, 3]: cannot be uniform: audio_experts is not a fraction. Use randint or choice.",
    ),
    ("seed: {loguniform: [1, 3]}", "space.seed = [1, 3]: cannot be loguniform: seed is not a fraction."),
    ("lr_scheduler: 1..2", "space.lr_scheduler = 1: is not one of its choices."),
    ("learning_rate: {uniform: [0.5, 0.1]}", "space.learning_rate = [0.5, 0.1]: must ascend."),
    ("learning_rate: {loguniform: [0, 0.1]}", "space.learning_rate = [0, 0.1]: must ascend from above 0."),
    ("seed: 6..2", "space.seed = [6, 2]: must ascend."),
    ("learning_rate: {uniform: [0.1]}", "space.learning_rate = [0.1]: is not two numbers, the lowest and the highest."),
    ("learning_rate: {uniform: 0.1}", "space.learning_rate = 0.1: is not two numbers"),
    ("learning_rate: {uniform: [0.1, .inf]}", "space.learning_rate = [0.1, inf]: is not two numbers"),
    ("learning_rate: {uniform: [a, 1]}", "space.learning_rate = ['a', 1]: is not two numbers"),
    ("learning_rate: {uniform: [null, 1]}", "space.learning_rate = [None, 1]: is not two numbers"),
    ("learning_rate: {uniform: [false, true]}", "space.learning_rate = [False, True]: is not two numbers"),
    ("seed: {randint: [0.5, 2]}", "space.seed = [0.5, 2]: are not integers."),
    ("seed: {randint: [0, 2.5]}", "space.seed = [0, 2.5]: are not integers."),
    ("seed: 0..10000", "space.seed = [0, 10000]: holds more than 10000 values. Use uniform or loguniform."),
    (
        "train_asr_weights: [1.0, 2.0]",
        "space.train_asr_weights = [1.0, 2.0]: tries nothing: no element of the list is a choice or a range.",
    ),
    ("train_asr_weights: [{uniform: [2, 1]}]", "space.train_asr_weights[0] = [2, 1]: must ascend."),
    ("train_asr_weights: [{uniform: [1, 2]}, null]", "space.train_asr_weights[1]: is not one element of the list."),
    ("train_asr_weights: [{uniform: [1, 2]}, [1, 2]]", "space.train_asr_weights[1] = [1, 2]: is not one element of the list."),
    ("train_asr_weights: [{uniform: [1, 2]}, many]", "space.train_asr_weights = 'many': is not a number."),
    ("text_expert_indices: [{uniform: [0, 2]}]", "space.text_expert_indices[0] = [0, 2]: cannot be uniform"),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[text for text, _ in WRONG])
def test_a_wrong_spelling_names_key_value_and_rule(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(text)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [None, {}, [], "learning_rate", [{"seed": 1}]])
def test_no_space_at_all(raw: Any) -> None:
    with pytest.raises(ConfigError, match=r"^space.*names no setting to try"):
        parse_space(raw)


@pytest.mark.parametrize("routing", ["audio_experts: 2..3", "expert_split: [affinity]"])
@pytest.mark.parametrize(
    "other", ["text_expert_indices: [{choice: [0, 1]}]", "audio_expert_indices: 6", "use_modality_aware_routing: [false]"]
)
def test_what_a_split_settles_is_no_dimension_beside_it(routing: str, other: str) -> None:
    """A value that the split overrules would stand in the ledger without having been tried."""
    with pytest.raises(ConfigError, match=rf"space = \['{other.split(':')[0]}'\]: is set by .* too\. Leave one"):
        space_of(f"{routing}\n{other}")
    assert space_of(other).names


@pytest.mark.parametrize(
    "text",
    [
        "model_name_or_path: ['s3://key:hunter2@bucket/model', tiny]",
        "train_asr_dirs: {choice: [['s3://b/x?access_key=a&secret_key=hunter2', y], [z]]}",
        "train_asr_dirs: ['gs://hunter2@bucket/x', {choice: [y, z]}]",
        "train_asr_dirs: [y, {choice: [x, 'gs://hunter2@bucket/x']}]",
    ],
)
def test_credentials_are_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="holds credentials, which the ledger would keep") as caught:
        space_of(text)
    assert "hunter2" not in str(caught.value)
    assert str(caught.value).startswith(f"space.{text.split(':')[0]}")


@pytest.mark.parametrize(
    ("text", "described"),
    [
        ("seed: {grid: [2, 1]}", {"name": "seed", "kind": "grid", "values": [2, 1]}),
        ("learning_rate: {loguniform: [0.1, 1]}", {"name": "learning_rate", "kind": "loguniform", "low": 0.1, "high": 1}),
        ("audio_experts: 2..3", {"name": "audio_experts", "kind": "randint", "low": 2, "high": 3}),
    ],
)
def test_a_dimension_as_the_ledger_has_it(text: str, described: dict[str, Any]) -> None:
    assert only(text).described() == described


@given(low=FLOATS, high=FLOATS, share=SHARES, kind=st.sampled_from(["uniform", "loguniform"]))
@example(low=0.2167, high=0.6388, share=0.0, kind="loguniform")
@example(low=0.0209, high=0.0388, share=1 - 2**-53, kind="loguniform")
def test_a_value_lies_in_its_range(low: float, high: float, share: float, kind: Any) -> None:
    """Also where rounding would lead out of it; from the lowest at 0 upwards."""
    low, high = sorted((low, high))
    dimension = Dimension("learning_rate", kind, low=low, high=high)
    assert low <= dimension.quantile(share) <= high
    assert dimension.quantile(0.0) == pytest.approx(low) and dimension.quantile(1.0) == pytest.approx(high)


def test_the_middle_of_each_distribution() -> None:
    assert only("learning_rate: {uniform: [1, 3]}").quantile(0.25) == 1.5
    assert only("learning_rate: {loguniform: [0.01, 1]}").quantile(0.5) == pytest.approx(0.1)
    assert [only("audio_experts: 2..4").quantile(share) for share in (0, 0.33, 0.34, 0.66, 0.67, 0.999, 1.0)] == [2, 2, 3, 3, 4, 4, 4]
    assert [only("seed: [9, 5]").quantile(share) for share in (0, 0.49, 0.5, 1.0)] == [9, 9, 5, 5]


MIXED = """
learning_rate: {loguniform: [1.0e-4, 1.0e-2]}
asr_tts_mix_ratio: {uniform: [0.3, 0.8]}
audio_experts: 2..6
lr_scheduler: [linear, cosine, constant]
"""


@given(seed=st.integers(0, 2**64), k=st.integers(0, 10**6))
def test_a_random_proposal_is_of_space_seed_and_number_alone(seed: int, k: int) -> None:
    first = space_of(MIXED).proposal("random", seed, k)
    again = space_of(MIXED)
    again.proposal("random", seed + 1, k + 1)
    assert again.proposal("random", seed, k) == first
    assert again.proposal("random", seed, k + 1) != first != again.proposal("random", seed + 1, k)
    assert again.proposal("random", seed, k + 1) != again.proposal("random", seed + 1, k)
    assert first is not None
    assert 1e-4 <= first["learning_rate"] <= 1e-2 and 0.3 <= first["asr_tts_mix_ratio"] <= 0.8
    assert first["audio_experts"] in range(2, 7) and first["lr_scheduler"] in ("linear", "cosine", "constant")
    assert {name: type(value) for name, value in first.items()} == {
        "learning_rate": float,
        "asr_tts_mix_ratio": float,
        "audio_experts": int,
        "lr_scheduler": str,
    }


def test_random_proposals_cover_the_space_evenly() -> None:
    """Each value of a choice and each quarter of a range equally often, and one dimension says nothing of another."""
    space = space_of(MIXED)
    drawn = [space.proposal("random", 0, k) or {} for k in range(3000)]
    quarters = Counter(int((v["asr_tts_mix_ratio"] - 0.3) / 0.125) for v in drawn)
    logs = Counter(int(2 * (math.log10(v["learning_rate"]) + 4)) for v in drawn)
    pairs = Counter((v["audio_experts"], v["lr_scheduler"]) for v in drawn)
    for counts, wanted in ((quarters, 4), (logs, 4), (pairs, 15)):
        assert len(counts) == wanted
        assert all(abs(count / 3000 - 1 / wanted) < 0.03 for count in counts.values())


def test_a_random_search_goes_round_the_grid_evenly() -> None:
    """Every point equally often, in the file's order, the last dimension fastest; what is no grid is drawn anew each time."""
    space = space_of("expert_split: {grid: [contiguous, affinity]}\nlearning_rate: {uniform: [0, 1]}\nseed: {grid: [1, 2, 3]}")
    drawn = [space.proposal("random", 0, k) or {} for k in range(12)]
    order = [(split, seed) for split in ("contiguous", "affinity") for seed in (1, 2, 3)]
    assert [(v["expert_split"], v["seed"]) for v in drawn] == order * 2
    assert len({v["learning_rate"] for v in drawn}) == 12
    without = space_of("expert_split: [contiguous, affinity]\nlearning_rate: {uniform: [0, 1]}\nseed: [1, 2, 3]")
    assert [v["learning_rate"] for v in drawn] == [(without.proposal("random", 0, k) or {})["learning_rate"] for k in range(12)]


def test_a_grid_in_order_and_its_end() -> None:
    """Of a grid search every listed dimension is part, however it is written."""
    space = space_of("seed: 1..2\nlr_scheduler: [linear, cosine]\nexpert_split: {grid: [affinity]}")
    points = [(1, "linear"), (1, "cosine"), (2, "linear"), (2, "cosine")]
    wanted = [{"seed": seed, "lr_scheduler": name, "expert_split": "affinity"} for seed, name in points]
    assert [space.grid_point("grid", k) for k in range(space.grid_size("grid"))] == wanted
    assert [space.proposal("grid", 5, k) for k in range(6)] == [*wanted, None, None]
    assert (space.grid_size("random"), space.grid_point("random", 0)) == (1, {"expert_split": "affinity"})
    assert (space_of("seed: 1..2").grid_size("random"), space_of("seed: 1..2").grid_point("random", 0)) == (1, {})


# Splits


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    n_experts = draw(st.integers(2, 256))
    return n_experts, draw(st.integers(1, n_experts - 1))


@given(size=sizes(), split=st.sampled_from(SPLITS), data=st.data())
def test_groups_are_disjoint_cover_all_and_have_the_size(size: tuple[int, int], split: str, data: st.DataObject) -> None:
    n_experts, n_audio = size
    order = data.draw(st.permutations(range(n_experts))) if split == "affinity" else None
    text, audio = split_experts(split, n_experts, n_audio, order)
    assert sorted(text + audio) == list(range(n_experts))
    assert len(audio) == n_audio
    assert text == sorted(text) and audio == sorted(audio)
    assert all(type(expert) is int for expert in text + audio)
    if order is not None:
        assert set(audio) == set(order[-n_audio:])  # the least used


@given(size=sizes())
def test_interleaved_experts_lie_evenly(size: tuple[int, int]) -> None:
    """Gaps between neighbours differ by one at most, and what is left at both ends by one too."""
    n_experts, n_audio = size
    _, audio = split_experts("interleaved", n_experts, n_audio)
    gaps = np.diff(audio)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    assert abs(audio[0] - (n_experts - 1 - audio[-1])) <= 1
    assert audio[0] <= n_experts / n_audio / 2


def test_splits_of_eight_by_hand() -> None:
    assert split_experts("contiguous", 8, 3) == ([0, 1, 2, 3, 4], [5, 6, 7])
    assert split_experts("contiguous", 8, 7) == ([0], [1, 2, 3, 4, 5, 6, 7])
    assert split_experts("interleaved", 8, 4) == ([0, 2, 4, 6], [1, 3, 5, 7])
    assert split_experts("interleaved", 8, 2) == ([0, 1, 3, 4, 5, 7], [2, 6])
    assert split_experts("interleaved", 8, 3) == ([0, 2, 3, 5, 7], [1, 4, 6])
    assert split_experts("interleaved", 8, 1) == ([0, 1, 2, 3, 5, 6, 7], [4])
    assert split_experts("affinity", 8, 3, [3, 5, 0, 1, 7, 6, 2, 4]) == ([0, 1, 3, 5, 7], [2, 4, 6])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_audio", [-1, 0, 8, 9])
def test_no_group_may_be_empty(split: str, n_audio: int) -> None:
    with pytest.raises(ConfigError, match=rf"audio_experts = {n_audio}: must be in 1\.\.7: text needs experts too"):
        split_experts(split, 8, n_audio, range(8))


def test_experts_by_the_text_that_they_carry() -> None:
    """Shares of each layer first, then their mean, so that a layer with more selections counts no more; of equal ones the lower index."""
    load = np.array([[8, 0, 0, 0], [10, 30, 30, 30]])
    order, share = rank_experts(load)
    assert share == pytest.approx([(1 + 0.1) / 2, 0.15, 0.15, 0.15])
    assert order == [0, 1, 2, 3]
    assert rank_experts(np.array([[1, 3, 2, 3]])) == ([1, 3, 2, 0], pytest.approx([1 / 9, 3 / 9, 2 / 9, 3 / 9]))
    assert rank_experts(np.zeros((2, 3))) == ([0, 1, 2], [0.0, 0.0, 0.0])
    order, share = rank_experts(np.array([[1, 2]], np.int64))
    assert [type(each) for each in (*order, *share)] == [int, int, float, float]


def test_the_shipped_sweep_has_a_space(pytestconfig: pytest.Config) -> None:
    raw = yaml.safe_load((Path(pytestconfig.rootpath) / "jobs/configs/sweep-digits.yaml").read_text(encoding="utf-8"))
    assert parse_space(raw["space"]).names == ["audio_experts", "expert_split", "asr_tts_mix_ratio"]
