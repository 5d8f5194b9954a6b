"""Words are tokenised once: the ids are those of the plain tokenizer, whatever the text, or the tokenizer is used plainly."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from most_ray.records.batch_tokenizer import BatchTokenizer, _word_cache
from most_ray.records.tokenizer import BOS, EOS, PAD, add_audio_tokens, train_tokenizer

SENTENCES = [
    "CHAPTER ONE MISSUS RACHEL LYNDE IS SURPRISED",
    "User: Transcribe the following speech into text.\nhello there\n\nAssistant: ",
    "it's 12:30, isn't it? e-mail me@x.org (now)",
    "naïve café 東京 x",
    "two  spaces",
    " leading",
    "tab\tand\x1cseparators\x7f",
]


def plain(encoder: BatchTokenizer, texts: list[str]) -> list[list[int]]:
    return encoder._whole(texts)


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return add_audio_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD))


def trained(model: Any, trainer: Any, pre: Any, normalizer: Any = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre
    if normalizer:
        backend.normalizer = normalizer
    backend.train_from_iterator(SENTENCES * 5, trainer)
    return wrapped(backend)


def with_token(text: str, **how: bool) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(SENTENCES * 5, 600)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False, **how)])
    return tokenizer


def kinds() -> dict[str, PreTrainedTokenizerFast]:
    special = [BOS, EOS, PAD, "<unk>"]
    bpe = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    bytes_ = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    deepseek = [Regex(r"[\r\n]"), Regex(r"\s?\p{L}+"), Regex(r"\s?[!-/:-~]+"), Regex(r"[一-龥]+"), Regex(r"\p{N}")]
    return {
        "byte level": train_tokenizer(SENTENCES * 5, 600),
        "deepseek": trained(
            models.BPE(),
            bytes_,
            pre_tokenizers.Sequence(
                [*(pre_tokenizers.Split(r, "isolated") for r in deepseek), pre_tokenizers.ByteLevel(False, use_regex=False)]
            ),
        ),
        "metaspace": trained(models.BPE(unk_token="<unk>"), bpe, pre_tokenizers.Metaspace()),
        "lower case": trained(models.BPE(unk_token="<unk>"), bpe, pre_tokenizers.Whitespace(), normalizers.Lowercase()),
        "two words normalised to one": trained(
            models.BPE(), bytes_, pre_tokenizers.ByteLevel(False), normalizers.Replace("it's 12", "its12")
        ),
        "a token of two words": with_token("is SURPRISED"),
        "a token that eats spaces": with_token("CHAPTER", lstrip=True),
        "a token of whole words": with_token("hello", single_word=True),
        "two words by name": trained(
            models.BPE(),
            bytes_,
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(r"RACHEL LYNDE|\s?\S+|\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            ),
        ),
        "symbols left together": trained(
            models.BPE(),
            bytes_,
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            ),
        ),
        "joins words": trained(models.BPE(), bytes_, pre_tokenizers.ByteLevel(False, use_regex=False)),
        "joins numbers": trained(
            models.BPE(),
            bytes_,
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(r"\p{L}+ \p{N}+|\s?\S+|\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            ),
        ),
    }


ENCODERS = {name: BatchTokenizer(tokenizer) for name, tokenizer in kinds().items()}


@pytest.mark.parametrize("kind", ENCODERS)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(SENTENCES),
            st.text(max_size=40),
            st.text(st.characters(max_codepoint=127), max_size=60),
            st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8), max_size=12).map(" ".join),
        ),
        max_size=20,
    )
)
def test_ids_are_the_plain_tokenizers(kind: str, texts: list[str]) -> None:
    encoder = ENCODERS[kind]
    assert encoder(texts) == plain(encoder, texts)
    assert encoder(texts) == plain(encoder, texts), "the second time, with all words known"


def test_it_is_used_where_it_holds_and_nowhere_else() -> None:
    assert {name for name, encoder in ENCODERS.items() if encoder._by_words} == {"byte level", "deepseek", "lower case"}


def test_an_encoder_travels_without_its_words() -> None:
    """What a process has learnt stays there, for the next encoder of the same tokenizer."""
    encoder = BatchTokenizer(train_tokenizer(SENTENCES, 400))
    expected = encoder(SENTENCES)
    sent = pickle.dumps(encoder)
    again = pickle.loads(sent)
    assert again._cache is encoder._cache and again(SENTENCES) == expected
    _word_cache.cache_clear()
    assert not pickle.loads(sent)._cache.later and pickle.loads(sent)(SENTENCES) == expected


def test_decoding_gives_the_text_back() -> None:
    tokenizer = train_tokenizer(SENTENCES, 600)
    assert isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    for text, ids in zip(SENTENCES, BatchTokenizer(tokenizer)(SENTENCES), strict=True):
        assert tokenizer.decode(ids) == text
