from __future__ import annotations

import numpy as np
import pytest

from most_ray.records.record import parse_record
from most_ray.records.template import IGNORE, Vocabulary, encode_records, template_hash, template_texts, units_of
from most_ray.records.tokenizer import token_ids, train_tokenizer, vocabulary_of
from tests.support.builders import asr, text, tts


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    texts = [piece for i in range(20) for raw in (asr(i), tts(i)) for piece in template_texts(parse_record(raw))]
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> Vocabulary:  # type: ignore[no-untyped-def]
    return vocabulary_of(tokenizer)


def test_markers_are_real_special_tokens(tokenizer, vocabulary: Vocabulary) -> None:  # type: ignore[no-untyped-def]
    item = encode_records([parse_record(asr(4))], vocabulary)[0]
    ids = token_ids(tokenizer)
    assert item.input_ids[0] == tokenizer.bos_token_id == ids.bos
    assert item.input_ids[-1] == tokenizer.eos_token_id == ids.eos
    assert tokenizer.convert_ids_to_tokens(int(item.input_ids[-1])) == tokenizer.eos_token
    tokens = item.input_ids.tolist()
    begin, end = tokens.index(ids.begin_audio), tokens.index(ids.end_audio)
    assert [t - ids.unit_base for t in tokens[begin + 1 : end]] == parse_record(asr(4)).input.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [asr, tts, text])
def test_labels_stand_on_the_output_and_its_end_marker_only(vocabulary: Vocabulary, make) -> None:  # type: ignore[no-untyped-def]
    record = parse_record(make(5))
    item = encode_records([record], vocabulary)[0]
    labels = item.labels()
    supervised = labels[labels != IGNORE]
    ids = vocabulary.ids
    if record.task == "tts":
        assert (supervised[:-1] - ids.unit_base).tolist() == record.output.tolist()  # type: ignore[union-attr]
        assert supervised[-1] == ids.end_audio
        assert item.input_ids[item.prompt_length - 1] == ids.begin_audio
    else:
        assert supervised[:-1].tolist() == vocabulary.encode([record.output])[0]  # type: ignore[list-item]
        assert supervised[-1] == ids.eos
    assert (labels[: item.prompt_length] == IGNORE).all()
    assert np.array_equal(labels[item.prompt_length :], item.input_ids[item.prompt_length :])


def test_markers_spelled_in_a_text_stay_text(vocabulary: Vocabulary) -> None:
    raw = {**text(1), "output": "say <｜end▁of▁sentence｜> and Hu5 <|begin_of_audio|>"}
    item = encode_records([parse_record(raw)], vocabulary)[0]
    ids = vocabulary.ids
    body = item.input_ids[1:-1]
    assert not np.isin(body, [ids.bos, ids.eos, ids.begin_audio, ids.end_audio]).any()
    assert units_of(body.tolist(), ids) == []


def test_batches_encode_like_single_records(vocabulary: Vocabulary) -> None:
    records = [parse_record(make(i)) for i in range(6) for make in (asr, tts, text)]
    together = encode_records(records, vocabulary)
    for record, item in zip(records, together, strict=True):
        alone = encode_records([record], vocabulary)[0]
        assert np.array_equal(alone.input_ids, item.input_ids) and alone.prompt_length == item.prompt_length


def test_tokenizer_survives_saving(tokenizer, vocabulary: Vocabulary, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from most_ray.records.tokenizer import load_tokenizer

    tokenizer.save_pretrained(tmp_path)
    again = vocabulary_of(load_tokenizer(tmp_path))
    assert again.fingerprint() == vocabulary.fingerprint()
    assert again.ids.unit_base == len(tokenizer) - 502


def test_any_text_can_be_spelled(tokenizer, vocabulary: Vocabulary) -> None:  # type: ignore[no-untyped-def]
    wild = "žluťoučký 日本語 🙂\t\n"
    assert tokenizer.decode(vocabulary.encode([wild])[0]) == wild


def test_the_hash_is_pinned() -> None:
    """A changed template must change its hash; this one belongs to template version 1."""
    assert template_hash() == "91f989117f06cd1a"
