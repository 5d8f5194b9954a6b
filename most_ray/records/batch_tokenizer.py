"""Text to token ids in batches, each word tokenised once where that cannot change an id."""

from __future__ import annotations

import hashlib
import json
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


class BatchTokenizer:
    """Text to ids in batches. Marker spellings inside a user's text stay text. Picklable, so that ingest tasks can carry it.

    Tokenizers cut a text before they look for tokens, and most never join what a single space divides. Where this one's parts are
    known not to (`divides_at_spaces`), and probes agree, the ids of words are kept: most words come again and again, and a text is put
    together several times as fast as it is tokenised.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._digest = hashlib.blake2b(self._tokenizer.to_str().encode(), digest_size=16).digest()
        self._known = _known_words(self._digest)
        self._many_new = True  # of the last texts, so likely of the next: then all are searched for new words before any is put together
        if self._known.divisible is None:
            self._known.divisible = divides_at_spaces(self._tokenizer) and self._agrees(_PROBES)
        self._by_words = self._known.divisible

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_known"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._known = _known_words(self._digest)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._by_words:
            return self._whole(texts)
        sample = texts[:: max(1, len(texts) // _SAMPLES)]
        if not self._agrees(sample):  # what was made so far may be wrong too: no part of a store may be
            raise CheckpointError("tokenizer", None, "gives other ids for whole texts than for their words, which it was thought not to.")
        return self._words(texts)

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _agrees(self, texts: Sequence[str]) -> bool:
        return self._words(texts) == self._whole(texts)

    def _words(self, texts: Sequence[str]) -> list[list[int]]:
        first, later = self._known.first, self._known.later
        if len(later) > _CACHED_WORDS:
            first.clear()
            later.clear()
        known = later.__getitem__
        ids: list[list[int]] = []
        rest: list[tuple[int, list[str] | None]] = []  # texts with words that are new, or that cannot be divided
        all_words = [_divide(text) for text in texts]
        size = len(later)
        if self._many_new:
            self._learn_from([words for words in all_words if words])
        for place, words in enumerate(all_words):
            try:
                ids.append([] if words is None else [*first[words[0]], *chain.from_iterable(map(known, words[1:]))])
            except KeyError:
                ids.append([])
                rest.append((place, words))
            else:
                if words is None:
                    rest.append((place, None))
        self._learn_from([words for _, words in rest if words])
        self._many_new = len(later) - size > len(texts) // 4
        whole = iter(self._whole([texts[place] for place, words in rest if words is None]))
        for place, words in rest:
            ids[place] = next(whole) if words is None else [*first[words[0]], *chain.from_iterable(map(known, words[1:]))]
        return ids

    def _learn_from(self, divided: Sequence[list[str]]) -> None:
        self._learn(self._known.first, {words[0] for words in divided}, "")
        self._learn(self._known.later, set(chain.from_iterable(words[1:] for words in divided)), " ")

    def _learn(self, known: dict[str, list[int]], words: set[str], before: str) -> None:
        """Tokenise words that are new, many as one text: a call for each would cost several times as much. Not those that end in a
        space, which may make a token with the next."""
        new = sorted(words - known.keys())
        alone = [word for word in new if not before or word[-1].isspace()]
        known |= zip(alone, self._whole([before + word for word in alone]), strict=True)
        new = [word for word in new if word not in known]
        for start in range(0, len(new), _TOGETHER):
            some = new[start : start + _TOGETHER]
            encoding = self._tokenizer.encode(before + before.join(some), add_special_tokens=False)
            starts = np.fromiter((first for first, _ in encoding.offsets), np.int64)
            ends = np.cumsum([len(word) + 1 for word in some])
            cuts = np.searchsorted(starts, ends).tolist()
            ids = encoding.ids
            known |= {word: ids[a:b] for word, (a, b) in zip(some, pairwise([0, *cuts]), strict=True)}


@dataclass
class _Known:
    """The ids of words that a text begins with, of words that stand behind a space, and whether texts may be put together from them (None:
    not tried yet)."""

    first: dict[str, list[int]] = field(default_factory=dict)
    later: dict[str, list[int]] = field(default_factory=dict)
    divisible: bool | None = None


@lru_cache(maxsize=4)
def _known_words(digest: bytes) -> _Known:
    """What this process knows of a tokenizer: the tasks that it runs one after the other share it."""
    del digest
    return _Known()


def _divide(text: str) -> list[str] | None:
    """The words between single spaces; None where the text is not plain enough to be sure of them. Other white space stays inside a
    word, and so does a space at the very end."""
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
    """Texts of every printable character beside every other across a space, and of words of every kind; always the same."""
    kinds = (string.ascii_lowercase, string.ascii_uppercase, string.ascii_letters, string.digits, string.punctuation, string.printable[:94])
    draw = random.Random(0)
    words = ["".join(draw.choices(draw.choice(kinds), k=draw.randint(1, 8))) for _ in range(8 * n)]
    joined = [" ".join(words[8 * i : 8 * i + draw.randint(1, 8)]) for i in range(n)]
    pairs = [
        " ".join(f"{one}{kind} {other}{kind}" for other in string.printable[:94]) for one in string.printable[:94] for kind in ("", "a")
    ]
    return joined + pairs + [f"User: Say it.\n{text}\n\nAssistant: " for text in joined[: n // 4]]


_PROBES = _probes()
_SAMPLES = 2  # texts of each batch that are tokenised both ways
_CACHED_WORDS = 1 << 19
_TOGETHER = 256  # new words that are tokenised as one text


_LOCAL_NORMALISERS = ("Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "BertNormalizer")  # of ASCII, each character by itself
_CUTTERS = ("ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")


def divides_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is of parts that cannot join what a single space divides, nor change it for what stands beyond the space.
    Where in doubt: no."""
    content = json.loads(tokenizer.to_str())
    cutters = list(_parts_of(content.get("pre_tokenizer"), "pretokenizers"))
    normalisers = list(_parts_of(content.get("normalizer"), "normalizers"))
    return (
        all(part["type"] in _LOCAL_NORMALISERS for part in normalisers)
        and bool(cutters)
        and all(part["type"] in _CUTTERS and _names_no_space(part) for part in cutters)
        and not any(_reaches_out(token) for token in content.get("added_tokens", []))
        and all(_cut_at_spaces(tokenizer, text) for text in _PROBES)
    )


def _cut_at_spaces(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the text is cut before each of its single spaces."""
    cuts = set(chain.from_iterable(span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)))
    return all(place in cuts for place in range(1, len(text) - 1) if text[place] == " " and not text[place + 1].isspace())


def _parts_of(part: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    if part and part["type"] == "Sequence":
        for inner in part[name]:
            yield from _parts_of(inner, name)
    elif part:
        yield part


def _names_no_space(part: dict[str, Any]) -> bool:
    """Of a pre-tokenizer. A regular expression may name a space only as something optional in front, and white space only by itself;
    whether its classes join words is seen from probes of every character beside every other."""
    if part["type"] != "Split":
        return not part.get("add_prefix_space", False)
    pattern = part["pattern"].get("Regex")
    if pattern is None or part["behavior"] not in ("Isolated", "Removed") or part.get("invert"):
        return False
    plain = re.sub(r"\[\^?(?:\\.|[^\]\\])*\]", "C", pattern)  # classes
    plain = re.sub(r"(?:^|(?<=[|(]))(?: |\\s)\?", "", plain)  # an optional space in front
    plain = re.sub(r"(?:^|(?<=[|(]))\\s[+*](?:\(\?!\\S\)|\$|C[+*]?)?(?=[|)]|$)", "", plain)  # runs of white space by themselves
    return " " not in plain and "\\s" not in plain and "(?<" not in plain


def _reaches_out(token: dict[str, Any]) -> bool:
    """Of an added token: special ones are not looked for in a user's text."""
    if token["special"]:
        return False
    return " " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
