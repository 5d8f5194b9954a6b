from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from scipy import stats

from most_ray.sweep.effects import Effect, dimensions_of, effects, level_name
from most_ray.sweep.ledger import Ledger, Objective, Result, Trial

WER = Objective("wer")
SPLIT = {"name": "expert_split", "kind": "choice", "values": ["even", "odd", "half"]}
MIX = {"name": "mix", "kind": "uniform", "low": 0.0, "high": 1.0}
AUDIO = {"name": "audio_experts", "kind": "randint", "low": 2, "high": 9}


def ledger(dimensions: Sequence[Any], trials: Sequence[tuple[dict[str, Any], Mapping[int, float]]], **changes: Any) -> Ledger:
    """Trials as (values, WER by step)."""
    made = {}
    for number, (values, by_step) in enumerate(trials, 1):
        run = f"{number:03d}"
        results = [Result(run, step, {"wer": value}, {}) for step, value in by_step.items()]
        made[number] = Trial(number, [run], values, {}, [None], results, **changes)
    return Ledger({"dimensions": list(dimensions)}, made)


def split_ledger(**levels: Sequence[float]) -> Ledger:
    """All trials at step 10, by the value of their split."""
    return ledger([SPLIT], [({"expert_split": name}, {10: value}) for name, values in levels.items() for value in values])


def only(found: list[Effect]) -> Effect:
    (effect,) = found
    return effect


def labels(effect: Effect) -> list[tuple[str, int, float]]:
    return [(level.label, level.trials, level.mean) for level in effect.levels]


def test_a_levels_mean_and_interval_are_students() -> None:
    """1, 2, 3: mean 2, standard error sqrt(1/3), t of 2 degrees of freedom 4.302653; 2, 4: mean 3, standard error 1, t 12.706205."""
    effect = only(effects(split_ledger(even=[1, 2, 3], odd=[2, 4]), WER))
    assert (effect.dimension, effect.step) == ("expert_split", 10)
    assert labels(effect) == [("even", 3, 2.0), ("odd", 2, 3.0)]
    assert effect.levels[0].interval == pytest.approx((2 - 4.302653 * math.sqrt(1 / 3), 2 + 4.302653 * math.sqrt(1 / 3)), rel=1e-6)
    assert effect.levels[1].interval == pytest.approx((3 - 12.706205, 3 + 12.706205), rel=1e-6)


def test_the_difference_is_largest_minus_smallest_with_welchs_interval() -> None:
    a, b = [2.0, 4.0, 4.5], [1.0, 2.0, 3.0, 1.5]
    difference = only(effects(split_ledger(even=b, odd=a, half=[2.5, 2.6]), WER)).difference
    assert difference
    assert (difference.largest.label, difference.smallest.label) == ("odd", "even")
    assert difference.value == pytest.approx(3.5 - 1.875)
    wanted = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert difference.interval == pytest.approx((wanted.low, wanted.high))


def test_welchs_degrees_of_freedom_by_hand() -> None:
    """Squares of the standard errors 1/3 and 1: (4/3)^2 / ((1/3)^2 / 2 + 1 / 1) = 1.684211 degrees of freedom."""
    difference = only(effects(split_ledger(even=[1, 2, 3], odd=[2, 4]), WER)).difference
    assert difference and difference.interval
    reach = stats.t.ppf(0.975, 1.6842105263) * math.sqrt(4 / 3)
    assert difference.interval == pytest.approx((1 - reach, 1 + reach))


def test_a_single_trial_has_a_mean_and_no_interval() -> None:
    effect = only(effects(split_ledger(even=[1, 2], odd=[5]), WER))
    assert effect.levels[1].interval is None
    assert effect.difference
    assert (effect.difference.value, effect.difference.interval) == (3.5, None)
    assert only(effects(split_ledger(even=[1, 2]), WER)).difference is None


def test_without_any_spread_intervals_are_points() -> None:
    effect = only(effects(split_ledger(even=[1, 1], odd=[1, 1]), WER))
    assert effect.levels[0].interval == (1.0, 1.0)
    assert effect.difference
    assert (effect.difference.largest.label, effect.difference.smallest.label) == ("even", "odd")
    assert (effect.difference.value, effect.difference.interval) == (0.0, (0.0, 0.0))


def test_trials_are_compared_at_the_last_step_that_all_of_them_reached() -> None:
    """A trial stopped at step 20 is compared with what the others had there, not with what they came to."""
    trials = [({"expert_split": "even"}, {10: 9.0, 20: 5.0, 30: 1.0}), ({"expert_split": "odd"}, {10: 9.0, 20: 4.0})]
    effect = only(effects(ledger([SPLIT], trials), WER))
    assert effect.step == 20
    assert labels(effect) == [("even", 1, 5.0), ("odd", 1, 4.0)]


def test_steps_that_only_some_evaluated_are_no_common_ones() -> None:
    trials = [({"expert_split": "even"}, {10: 9.0, 25: 5.0, 30: 1.0}), ({"expert_split": "odd"}, {10: 8.0, 20: 4.0})]
    assert only(effects(ledger([SPLIT], trials), WER)).step == 10
    assert effects(ledger([SPLIT], [({"expert_split": "even"}, {10: 1.0}), ({"expert_split": "odd"}, {20: 1.0})]), WER) == []


def test_trials_without_results_do_not_count_and_failed_ones_with_results_do() -> None:
    trials = [({"expert_split": "even"}, {10: 1.0, 20: 2.0}), ({"expert_split": "odd"}, {}), ({"expert_split": "half"}, {10: 3.0})]
    made = ledger([SPLIT], trials)
    made.trials[2].state = made.trials[3].state = "failed"
    effect = only(effects(made, WER))
    assert effect.step == 10
    assert labels(effect) == [("even", 1, 1.0), ("half", 1, 3.0)]


def test_what_is_no_number_is_no_result() -> None:
    trials = [({"expert_split": "even"}, {10: 1.0, 20: math.nan}), ({"expert_split": "odd"}, {10: 3.0, 20: 4.0})]
    assert only(effects(ledger([SPLIT], trials), WER)).step == 10
    assert effects(ledger([SPLIT], trials), Objective("loss")) == []


def test_fractions_are_two_halves_at_their_median() -> None:
    trials = [({"mix": mix}, {1: wer}) for mix, wer in ((0.9, 5.0), (0.1, 1.0), (0.5, 3.0), (0.3, 2.0), (0.7, 4.0))]
    assert labels(only(effects(ledger([MIX], trials), WER))) == [("0.1 to 0.5", 3, 2.0), ("0.7 to 0.9", 2, 4.5)]
    assert labels(only(effects(ledger([MIX], trials[:4]), WER))) == [("0.1 to 0.3", 2, 1.5), ("0.5 to 0.9", 2, 4.0)]
    assert labels(only(effects(ledger([MIX], [({"mix": 0.5}, {1: 2.0})] * 3), WER))) == [("0.5", 3, 2.0)]


def test_whole_numbers_and_choices_are_levels_in_their_own_order() -> None:
    trials = [({"audio_experts": count}, {1: float(count)}) for count in (6, 3, 6, 4)]
    assert labels(only(effects(ledger([AUDIO], trials), WER))) == [("3", 1, 3.0), ("4", 1, 4.0), ("6", 2, 6.0)]
    found = only(effects(split_ledger(half=[1.0], gone=[2.0], even=[3.0]), WER))
    assert [level.label for level in found.levels] == ["even", "half", "gone"]  # the last is not in the space any more


def test_values_that_are_written_alike_stay_apart() -> None:
    near = {"name": "rate", "kind": "grid", "values": [0.123451, 0.123452]}
    trials = [({"rate": value}, {1: value}) for value in (0.123451, 0.123452)]
    assert [level.trials for level in only(effects(ledger([near], trials), WER)).levels] == [1, 1]


def test_trials_without_the_dimension_are_left_out_of_it() -> None:
    trials = [({"mix": 0.1}, {1: 1.0}), ({"expert_split": "even"}, {1: 5.0})]
    by_name = {effect.dimension: labels(effect) for effect in effects(ledger([SPLIT, MIX, AUDIO], trials), WER)}
    assert by_name == {"expert_split": [("even", 1, 5.0)], "mix": [("0.1", 1, 1.0)]}


def test_trials_that_went_on_from_another_have_no_effects() -> None:
    made = split_ledger(even=[1, 2], odd=[2, 4])
    assert effects(made, WER)
    made.trials[1].runs.append("001-1")
    assert effects(made, WER) == []


def test_a_ledger_without_anything_has_no_effects() -> None:
    assert effects(Ledger({}, {}), WER) == []
    assert effects(ledger([], [({}, {1: 1.0})]), WER) == []


def test_dimensions_that_are_described_incompletely_are_passed_over() -> None:
    odd = [None, {}, {"name": "a"}, {"name": "a", "kind": "new", "values": [1]}, {"name": "a", "kind": "choice"}, {**MIX, "low": "x"}]
    odd += [{"name": "a", "kind": ["choice"], "values": [1]}, {"name": "a", "kind": "choice", "values": 3}, {**MIX, "high": math.inf}]
    found = dimensions_of(Ledger({"dimensions": [*odd, MIX, SPLIT]}, {}))
    assert [(dimension.name, dimension.continuous) for dimension in found] == [("mix", True), ("expert_split", False)]
    assert dimensions_of(Ledger({"dimensions": "x"}, {})) == []


@pytest.mark.parametrize(
    ("value", "name"),
    [(0.00031234567, "0.0003123"), (3, "3"), (True, "true"), (None, "none"), ("a b", "a b"), ([0.5, 1], "0.5, 1"), ({"b": 1}, '{"b": 1}')],
)
def test_values_are_named_shortly(value: Any, name: str) -> None:
    assert level_name(value) == name
