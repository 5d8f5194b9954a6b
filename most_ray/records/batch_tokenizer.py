"""Tokenises texts in batches; where that cannot change an id, each distinct word is tokenised once and its ids are cached."""

from __future__ import annotations

import hashlib
import random
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from most_ray.errors import CheckpointError
from most_ray.io.json_values import parse_json


class BatchTokenizer:
    """Tokenises texts. Marker spellings inside a text stay text. Picklable, so that it can be sent to ingest tasks.

    Tokenizers split a text before they look for tokens, and most never make a token across a single space. Where this one's parts are
    known not to (`splits_at_spaces`), and sample texts confirm it, the ids of words are cached: most words recur, and joining cached
    ids is several times as fast as tokenising.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._digest = hashlib.blake2b(self._tokenizer.to_str().encode(), digest_size=16).digest()
        self._cache = _word_cache(self._digest)
        self._many_new = True  # words in the last texts, so likely in the next ones: then new words are tokenised first
        if self._cache.usable is None:
            self._cache.usable = splits_at_spaces(self._tokenizer) and self._agrees(_PROBES)
        self._by_words = self._cache.usable

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache = _word_cache(self._digest)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text.

        Raises:
            CheckpointError: the ids of words do not add up to those of a whole text, against all that is known of the tokenizer.
        """
        if not self._by_words:
            return self._whole(texts)
        sample = texts[:: max(1, len(texts) // _SAMPLES)]
        if not self._agrees(sample):  # an error, not a fallback: ids returned before may be wrong too, and no part of a store may be
            raise CheckpointError("tokenizer", None, "gives other ids for whole texts than for their words, which it was thought not to.")
        return self._words(texts)

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _agrees(self, texts: Sequence[str]) -> bool:
        return self._words(texts) == self._whole(texts)

    def _words(self, texts: Sequence[str]) -> list[list[int]]:
        first, later = self._cache.first, self._cache.later
        if len(later) > _CACHED_WORDS:
            first.clear()
            later.clear()
        known = later.__getitem__
        ids: list[list[int] | None] = []  # None: of a text with new words, or that cannot be split into words
        all_words = [_split_words(text) for text in texts]
        size = len(later)
        if self._many_new:
            self._add_words([words for words in all_words if words])
        for words in all_words:
            try:
                ids.append(None if words is None else [*first[words[0]], *chain.from_iterable(map(known, words[1:]))])
            except KeyError:
                ids.append(None)
        self._add_words([words for words, found in zip(all_words, ids, strict=True) if words and found is None])
        self._many_new = len(later) - size > len(texts) // 4
        whole = iter(self._whole([text for text, words in zip(texts, all_words, strict=True) if words is None]))
        return [
            found if found is not None else [*first[words[0]], *chain.from_iterable(map(known, words[1:]))] if words else next(whole)
            for words, found in zip(all_words, ids, strict=True)
        ]

    def _add_words(self, split_texts: Sequence[list[str]]) -> None:
        self._tokenise_new(self._cache.first, {words[0] for words in split_texts}, "")
        self._tokenise_new(self._cache.later, set(chain.from_iterable(words[1:] for words in split_texts)), " ")

    def _tokenise_new(self, known: dict[str, list[int]], words: set[str], before: str) -> None:
        """Add the words that `known` lacks, each tokenised with `before` in front of it.

        Many are tokenised as one text, since a call for each would cost several times as much; words that end in white space are
        tokenised alone, since their last token may depend on what follows.
        """
        new = sorted(words - known.keys())
        alone = [word for word in new if not before or word[-1].isspace()]
        known |= zip(alone, self._whole([before + word for word in alone]), strict=True)
        new = [word for word in new if word not in known]
        for start in range(0, len(new), _TOGETHER):
            some = new[start : start + _TOGETHER]
            encoding = self._tokenizer.encode(before + before.join(some), add_special_tokens=False)
            starts = np.fromiter((first for first, _ in encoding.offsets), np.int64)
            cuts = np.searchsorted(starts, np.cumsum([len(word) + 1 for word in some])).tolist()
            known |= {word: encoding.ids[a:b] for word, (a, b) in zip(some, pairwise([0, *cuts]), strict=True)}


@dataclass
class _WordCache:
    """Token ids of words."""

    first: dict[str, list[int]] = field(default_factory=dict)  # of words at the start of a text
    later: dict[str, list[int]] = field(default_factory=dict)  # of words after a space
    usable: bool | None = None  # whether the ids of a text are those of its words; None: not tried yet


@lru_cache(maxsize=4)
def _word_cache(digest: bytes) -> _WordCache:
    """The cache of the tokenizer with this digest, which all ingest tasks that run in this process share."""
    del digest
    return _WordCache()


def _split_words(text: str) -> list[str] | None:
    """The words between single spaces; None for a text that is not plain enough to be sure of them.

    Other white space stays inside a word, and so does a space at the very end.
    """
    if not text.isascii() or "  " in text or not text or text[0] == " ":
        return None
    words = text.split(" ")
    if not words[-1]:
        words[-2:] = [words[-2] + " "]
    if not text.isprintable():
        edges = (words[0].rstrip(" "), *words[1:-1], words[-1].rstrip(" "))
        if any(word[0].isspace() or word[-1].isspace() for word in edges if word):
            return None
    return words


def _probes(n: int = 400) -> list[str]:
    """Texts to try a tokenizer on: each printable character next to each other across a space, and words of every kind. Always equal."""
    kinds = (string.ascii_lowercase, string.ascii_uppercase, string.ascii_letters, string.digits, string.punctuation, string.printable[:94])
    draw = random.Random(0)
    words = ["".join(draw.choices(draw.choice(kinds), k=draw.randint(1, 8))) for _ in range(8 * n)]
    joined = [" ".join(words[8 * i : 8 * i + draw.randint(1, 8)]) for i in range(n)]
    shown = string.printable[:94]
    pairs = [" ".join(f"{one}{kind} {other}{kind}" for other in shown) for one in shown for kind in ("", "a")]
    return joined + pairs + [f"User: Say it.\n{text}\n\nAssistant: " for text in joined[: n // 4]]


_PROBES = _probes()
_SAMPLES = 2  # texts of each batch that are tokenised both ways
_CACHED_WORDS = 1 << 19  # a fuller cache is emptied
_TOGETHER = 256  # new words that are tokenised as one text
_LOCAL_NORMALISERS = ("Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "BertNormalizer")  # change each ASCII character by itself
_SPLITTERS = ("ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether all parts of a tokenizer are known to split at single spaces, and to treat a word the same whatever is beyond the space.

    False where in doubt.
    """
    content = parse_json(tokenizer.to_str())
    splitters = list(_parts_of(content.get("pre_tokenizer"), "pretokenizers"))
    normalisers = list(_parts_of(content.get("normalizer"), "normalizers"))
    return (
        all(part["type"] in _LOCAL_NORMALISERS for part in normalisers)
        and bool(splitters)
        and all(part["type"] in _SPLITTERS and _keeps_spaces_apart(part) for part in splitters)
        and not any(_spans_words(token) for token in content.get("added_tokens", []))
        and all(_is_split_at_spaces(tokenizer, text) for text in _PROBES)
    )


def _is_split_at_spaces(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the pre-tokenizer splits the text before each of its single spaces."""
    cuts = set(chain.from_iterable(span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)))
    return all(i in cuts for i in range(1, len(text) - 1) if text[i] == " " and not text[i + 1].isspace())


def _parts_of(part: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    """The parts of a normaliser or pre-tokenizer; those of a sequence are listed under `name`."""
    if part and part["type"] == "Sequence":
        for inner in part[name]:
            yield from _parts_of(inner, name)
    elif part:
        yield part


def _keeps_spaces_apart(part: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer names no space that could be inside a piece.

    A regular expression may have a space only as something optional in front, and white space only by itself; whether its character
    classes join words is seen from the probes of each character next to each other.
    """
    if part["type"] != "Split":
        return not part.get("add_prefix_space", False)
    pattern = part["pattern"].get("Regex")
    if pattern is None or part["behavior"] not in ("Isolated", "Removed") or part.get("invert"):
        return False
    plain = re.sub(r"\[\^?(?:\\.|[^\]\\])*\]", "C", pattern)  # classes
    plain = re.sub(r"(?:^|(?<=[|(]))(?: |\\s)\?", "", plain)  # an optional space in front
    plain = re.sub(r"(?:^|(?<=[|(]))\\s[+*](?:\(\?!\\S\)|\$|C[+*]?)?(?=[|)]|$)", "", plain)  # runs of white space by themselves
    return " " not in plain and "\\s" not in plain and "(?<" not in plain


def _spans_words(token: dict[str, Any]) -> bool:
    """Whether an added token could match more than one word. (Special tokens are not looked for in a user's text.)"""
    return not token["special"] and (" " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"])
