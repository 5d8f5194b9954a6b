"""Promise 24 of docs/promises.md: rates that mean what they say, against counts by hand and jiwer's own."""

from __future__ import annotations

import time
import unicodedata
from typing import Any

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from most_ray.evaluation.wer import NORMALISERS, bootstrap_interval, character_counts, confusions, error_rate, normaliser, word_counts

# reference, hypothesis, then by hand: word (substitutions, deletions, insertions, words), character errors and characters
BY_HAND = [
    ("one two three", "one too three", (1, 0, 0, 3), 1, 13),
    ("four five", "four", (0, 1, 0, 2), 5, 9),
    ("six", "six seven", (0, 0, 1, 1), 6, 3),
    ("", "eight nine", (0, 0, 2, 0), 10, 0),
    ("zero", "", (0, 1, 0, 1), 4, 4),
    ("", "", (0, 0, 0, 0), 0, 0),
    ("über straße", "uber straße", (1, 0, 0, 2), 1, 11),
    ("日本 語", "日本 御", (1, 0, 0, 2), 1, 4),
    ("it's 25 o'clock", "its 25 oclock", (2, 0, 0, 3), 2, 15),
    ("a b c d", "b c d e", (0, 1, 1, 4), 4, 7),
]


def test_counts_by_hand_and_by_jiwer() -> None:
    """Empty references and hypotheses, Unicode, numbers, apostrophes."""
    references, hypotheses = [row[0] for row in BY_HAND], [row[1] for row in BY_HAND]
    words, characters = word_counts(references, hypotheses), character_counts(references, hypotheses)
    for index, (_, _, expected, character_errors, length) in enumerate(BY_HAND):
        found = (words.substitutions[index], words.deletions[index], words.insertions[index], words.reference[index])
        assert found == expected, BY_HAND[index]
        assert (characters.errors[index], characters.reference[index]) == (character_errors, length), BY_HAND[index]
    figures = error_rate(words)
    assert (figures["substitutions"], figures["deletions"], figures["insertions"], figures["reference"]) == (5, 3, 4, 18)
    assert figures["rate"] == 12 / 18 == jiwer.wer(references, hypotheses)
    assert error_rate(characters)["rate"] == 34 / 66 == jiwer.cer(references, hypotheses)


def test_what_has_no_rate_has_none() -> None:
    assert error_rate(word_counts([], []))["rate"] is None
    silent = error_rate(word_counts(["", ""], ["a", "b c"]))
    assert silent == {"rate": None, "interval": None, "substitutions": 0, "deletions": 0, "insertions": 3, "reference": 0}


@given(st.lists(st.tuples(st.text("ab ", max_size=12), st.text("ab ", max_size=12)), min_size=1, max_size=8))
def test_a_sets_rate_is_jiwers(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = [" ".join(r.split()) for r, _ in pairs], [" ".join(h.split()) for _, h in pairs]
    for counts, own in ((word_counts, jiwer.wer), (character_counts, jiwer.cer)):
        figures = error_rate(counts(references, hypotheses))
        if figures["reference"]:
            assert figures["rate"] == own(references, hypotheses)
            low, high = figures["interval"]
            assert 0 <= low <= high


def test_normalisers() -> None:
    texts = ["Hello,  World!", "It's the colour of Mr. O'Neil's twenty-one", "Größe [noise] (laughs)", " 3\t4 ", "zero [Hu12] one"]
    assert [normaliser("none")(text) for text in texts] == [
        "Hello, World!",
        "It's the colour of Mr. O'Neil's twenty-one",
        "Größe [noise] (laughs)",
        "3 4",
        "zero speechtoken one",
    ]
    assert [normaliser("basic")(text) for text in texts] == [
        "hello world",
        "it s the colour of mr o neil s twenty one",
        "größe",
        "3 4",
        "zero speechtoken one",
    ]
    assert [normaliser("whisper-english")(text) for text in texts[:2]] == ["hello world", "it is the color of mister 0 neil is 21"]
    assert set(NORMALISERS) == {"none", "basic", "whisper-english"}


def test_speech_in_a_transcription_is_an_error_under_every_normaliser() -> None:
    """Normalisers drop what stands in brackets; a model that answers with units must not pass for right."""
    for name in NORMALISERS:
        clean = normaliser(name)
        assert error_rate(word_counts([clean("one")], [clean("one[Hu7][Hu90]<|begin_of_audio|>")]))["insertions"] == 3


def test_the_interval_is_the_bootstraps() -> None:
    """Against one with other draws, for sets small and large; wide where there is little."""
    rng = np.random.default_rng(7)
    errors, words = rng.poisson(0.3, 400), rng.integers(1, 9, 400)
    low, high = bootstrap_interval(errors, words)
    draws = rng.integers(400, size=(20_000, 400))
    expected, narrower = (np.percentile(errors[draws].sum(1) / words[draws].sum(1), ends) for ends in ([2.5, 97.5], [5.0, 95.0]))
    noise = 0.3 * np.abs(narrower - expected).min()
    assert (low, high) == pytest.approx(tuple(expected), abs=noise)
    assert low < errors.sum() / words.sum() < high
    assert bootstrap_interval(errors, words) == [low, high]  # the same for the same records
    few = bootstrap_interval(errors[:20], words[:20])
    assert few[1] - few[0] > 2 * (high - low)
    assert bootstrap_interval(np.array([1]), np.array([4])) == [0.25, 0.25]
    many = np.zeros(300_000, np.int64)
    assert bootstrap_interval(many, many + 1, resamples=20) == [0.0, 0.0]


def test_confusions() -> None:
    found = confusions(["one two", "one two", "three", ""], ["one too", "one too", "", "four"], most=3)
    assert found == [["two", "too", 2], ["", "four", 1], ["three", "", 1]]
    assert confusions([], []) == []


@pytest.mark.parametrize(
    ("reference", "hypothesis", "words"),
    [
        ("हिन्दी में बोलो", "हन्द में बला", (2, 3)),  # Hindi: other vowel signs are other words
        ("น้ำ เก้า", "นำ เก้า", (1, 2)),  # Thai: a tone mark
        ("كَتَبَ", "كُتِبَ", (1, 1)),  # Arabic: wrote, was written
        ("שָׁלוֹם", "שלום", (1, 1)),
        ("நன்றி", "நன்றி", (0, 1)),
        ("ọ́ x̂", "ọ́ x̂", (0, 2)),  # marks for which there is no composed letter
        ("می‌خواهم", "می‌خواهم", (0, 1)),
    ],
)
def test_marks_are_part_of_their_words(reference: str, hypothesis: str, words: tuple[int, int]) -> None:
    clean = normaliser("basic")
    for form in ("NFC", "NFD"):
        found = error_rate(word_counts([clean(reference)], [clean(unicodedata.normalize(form, hypothesis))]))
        assert (found["substitutions"], found["deletions"], found["insertions"], found["reference"]) == (words[0], 0, 0, words[1])


def test_forms_of_a_letter_and_marks_without_one_count_as_before() -> None:
    clean = normaliser("basic")
    assert [clean(text) for text in ("葛\U000e0100飾", "1\ufe0f\u20e3 ❤\ufe0f ok", "\u0301a", "Ünï")] == ["葛飾", "1 ok", "a", "ünï"]


@pytest.mark.parametrize("apostrophe", "'\u2019\u2018\u201b\u02bc\uff07\u00b4`")
def test_typographic_apostrophes_are_apostrophes(apostrophe: str) -> None:
    written = "I'm sure it's Peter's, we don't".replace("'", apostrophe)
    assert normaliser("whisper-english")(written) == "i am sure it is peter is we do not"
    assert normaliser("basic")(written) == "i m sure it s peter s we don t"


@given(st.text(st.sampled_from("abİé日()[]<> '.,1½\u00a0\u200d-"), max_size=40))
def test_other_texts_are_normalised_as_whispers_do(text: str) -> None:
    from transformers.models.whisper import english_normalizer as whisper

    if "İ" not in text:  # its small form has a mark
        assert normaliser("basic")(text) == " ".join(whisper.BasicTextNormalizer()(text).split())


@pytest.mark.parametrize("name", NORMALISERS)
@pytest.mark.parametrize(
    "text",
    ["(" * 50_000, "[<" * 25_000, "( " * 25_000, " " * 50_000 + "'", "a" + "\u0300\u0316" * 25_000, "7" * 5000, "9" * 4299 + " trillion"],
    ids=["parens", "brackets", "blanks", "apostrophe", "marks", "digits", "spoken"],
)
def test_no_text_takes_long_or_fails(name: Any, text: str) -> None:
    began = time.process_time()
    normaliser(name)(text)
    assert time.process_time() - began < 3.0
