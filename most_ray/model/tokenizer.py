"""Tokenizers that hold text, speech units and audio markers: a small one of our own, or DeepSeek's with the units added."""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from most_ray.errors import CheckpointError
from most_ray.records import N_UNITS
from most_ray.template import TokenIds, Vocabulary

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜pad｜>"
BEGIN_AUDIO, END_AUDIO = "<|begin_of_audio|>", "<|end_of_audio|>"
AUDIO_TOKENS = (*(f"[Hu{unit}]" for unit in range(N_UNITS)), BEGIN_AUDIO, END_AUDIO)


class TextEncoder:
    """Text to ids in batches. Marker spellings inside a user's text stay text. Picklable, so that ingest tasks can carry it.

    Tokenizers cut a text before they look for tokens, and none in use here ever joins what a single space divides. Where that holds
    for this tokenizer (probed once, and again on samples), the ids of words are kept: most words come again and again, and a text is
    put together ten times as fast as it is tokenised.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._digest = hashlib.blake2b(self._tokenizer.to_str().encode(), digest_size=16).digest()
        # A text's first word, and those that stand behind a space.
        self._first, self._later = _known_words(self._digest)
        self._by_words = True
        self._by_words = self._agrees(_PROBES)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_first", "_later")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._first, self._later = _known_words(self._digest)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._by_words:
            return self._whole(texts)
        sample = texts[:: max(1, len(texts) // _SAMPLES)]
        if not self._agrees(sample):
            self._by_words = False
            return self._whole(texts)
        return self._words(texts)

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _agrees(self, texts: Sequence[str]) -> bool:
        return self._words(texts) == self._whole(texts)

    def _words(self, texts: Sequence[str]) -> list[list[int]]:
        if len(self._later) > _CACHED_WORDS:
            self._first.clear()
            self._later.clear()
        known = self._later.__getitem__
        ids: list[list[int]] = []
        rest: list[tuple[int, list[str] | None]] = []  # texts with words that are new, or that cannot be divided
        for place, text in enumerate(texts):
            words = _divide(text)
            try:
                ids.append([] if words is None else [*self._first[words[0]], *chain.from_iterable(map(known, words[1:]))])
            except KeyError:
                ids.append([])
                rest.append((place, words))
            else:
                if words is None:
                    rest.append((place, None))
        divided = [words for _, words in rest if words]
        self._learn(self._first, {words[0] for words in divided}, "")
        self._learn(self._later, set(chain.from_iterable(words[1:] for words in divided)), " ")
        whole = iter(self._whole([texts[place] for place, words in rest if words is None]))
        for place, words in rest:
            ids[place] = next(whole) if words is None else [*self._first[words[0]], *chain.from_iterable(map(known, words[1:]))]
        return ids

    def _learn(self, known: dict[str, list[int]], words: set[str], before: str) -> None:
        """Tokenise words that are new, many as one text: a call for each would cost several times as much."""
        new = sorted(words - known.keys())
        if not before:
            known |= zip(new, self._whole(new), strict=True)
            return
        for start in range(0, len(new), _TOGETHER):
            some = new[start : start + _TOGETHER]
            encoding = self._tokenizer.encode(before + before.join(some), add_special_tokens=False)
            starts = np.fromiter((first for first, _ in encoding.offsets), np.int64)
            ends = np.cumsum([len(word) + 1 for word in some])
            cuts = np.searchsorted(starts, ends).tolist()
            ids = encoding.ids
            known |= {word: ids[a:b] for word, (a, b) in zip(some, pairwise([0, *cuts]), strict=True)}


Words = dict[str, list[int]]


@lru_cache(maxsize=4)
def _known_words(digest: bytes) -> tuple[Words, Words]:
    """The words that this process knows of a tokenizer: the tasks that it runs one after the other share them."""
    del digest
    return {}, {}


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
    """Texts of every printable character in words of every kind, always the same."""
    kinds = (string.ascii_lowercase, string.ascii_uppercase, string.ascii_letters, string.digits, string.punctuation, string.printable[:94])
    draw = random.Random(0)
    words = ["".join(draw.choices(draw.choice(kinds), k=draw.randint(1, 8))) for _ in range(8 * n)]
    joined = [" ".join(words[8 * i : 8 * i + draw.randint(1, 8)]) for i in range(n)]
    return joined + [f"User: Say it.\n{text}\n\nAssistant: " for text in joined[: n // 4]]


_PROBES = _probes()
_SAMPLES = 2  # texts of each batch that are tokenised both ways
_CACHED_WORDS = 1 << 19
_TOGETHER = 256  # new words that are tokenised as one text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` text tokens (any text can be spelled), then 500 units and the audio markers."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left")
    return add_audio_tokens(tokenizer)


def add_audio_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Append the units and markers that are not there yet, as special tokens behind the text vocabulary."""
    known = tokenizer.get_vocab()
    missing = [AddedToken(token, special=True, normalized=False) for token in AUDIO_TOKENS if token not in known]
    tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerFast) -> TokenIds:
    """Where the special tokens and units stand.

    Raises:
        CheckpointError: a marker or a unit is missing, or the units are not in one run.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in AUDIO_TOKENS if token not in vocabulary]
    if missing:
        raise CheckpointError(
            "tokenizer",
            missing[0],
            f"is not in the vocabulary ({len(missing)} audio tokens are missing).",
            "Use init-model first.",
        )
    base = vocabulary["[Hu0]"]
    if any(vocabulary[f"[Hu{unit}]"] != base + unit for unit in range(N_UNITS)):
        raise CheckpointError("tokenizer", "[Hu0]..[Hu499]", "the units are not in one run of ids.")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise CheckpointError("tokenizer", None, "has no begin- or end-of-sentence token.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return TokenIds(tokenizer.bos_token_id, tokenizer.eos_token_id, pad, vocabulary[BEGIN_AUDIO], vocabulary[END_AUDIO], unit_base=base)


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """What the template and ingest need of a tokenizer."""
    content = tokenizer.backend_tokenizer.to_str().encode()
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    return Vocabulary(token_ids(tokenizer), TextEncoder(tokenizer), digest)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model directory.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError("model_name_or_path", str(directory), f"has no usable tokenizer ({error}).") from error
