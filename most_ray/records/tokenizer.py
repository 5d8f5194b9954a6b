"""Tokenizers of text, speech units and audio markers: a small one trained here, or a pretrained one with the units added."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from most_ray.errors import CheckpointError, count_of, redact, shown
from most_ray.records.batch_tokenizer import BatchTokenizer
from most_ray.records.model_files import check_chooses_no_code, loading, no_panic_output, read_json_object
from most_ray.records.record import N_UNITS
from most_ray.records.template import TokenIds, Vocabulary

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜pad｜>"
BEGIN_AUDIO, END_AUDIO = "<|begin_of_audio|>", "<|end_of_audio|>"
AUDIO_TOKENS = (*(f"[Hu{unit}]" for unit in range(N_UNITS)), BEGIN_AUDIO, END_AUDIO)
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_PROBE = "User: Transcribe the following speech into text.\n\n\nAssistant: seven"
# Keys of tokenizer_config.json whose values are neither plain nor tokens, and what they are. (Plain values of unknown keys are kept only.)
_STRUCTURED: dict[str, type | tuple[type, ...]] = {
    "added_tokens_decoder": dict,
    "additional_special_tokens": list,
    "auto_map": (dict, list),  # names code, which is not loaded
    "chat_template": (dict, list),
    "extra_special_tokens": (dict, list),
    "model_input_names": list,
    "model_specific_special_tokens": dict,
    "sp_model_kwargs": dict,
}
_OTHER_FILES = frozenset(  # arguments of the library's class by which it would read other files than tokenizer.json
    {"fast_tokenizer_files", "merges", "merges_file", "post_processor", "tokenizer_file", "tokenizer_object", "tokenizer_padding"}
    | {"tokenizer_truncation", "vocab", "vocab_file"}
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` text tokens, which encodes any text; the units and the audio markers follow."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left")
    return add_audio_tokens(tokenizer)


def add_audio_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Append the units and audio markers that the tokenizer lacks, as special tokens after its vocabulary. Returns the tokenizer."""
    known = tokenizer.get_vocab()
    missing = [AddedToken(token, special=True, normalized=False) for token in AUDIO_TOKENS if token not in known]
    tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerFast) -> TokenIds:
    """The ids of the special tokens and of the units.

    Raises:
        CheckpointError: a marker or a unit is missing, or the units' ids are not consecutive.
    """
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in AUDIO_TOKENS if token not in vocabulary]:
        rule = f"is not in the vocabulary (missing: {count_of(len(missing), 'audio token')})."
        raise CheckpointError("tokenizer", missing[0], rule, "Use init-model first.")
    base = vocabulary["[Hu0]"]
    if any(vocabulary[f"[Hu{unit}]"] != base + unit for unit in range(N_UNITS)):
        raise CheckpointError("tokenizer", "[Hu0]..[Hu499]", "the units are not in one run of ids.")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise CheckpointError("tokenizer", None, "has no begin- or end-of-sentence token.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return TokenIds(tokenizer.bos_token_id, tokenizer.eos_token_id, pad, vocabulary[BEGIN_AUDIO], vocabulary[END_AUDIO], unit_base=base)


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """What the template and ingest need of a tokenizer, ready to be sent to other processes."""
    digest = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=8).hexdigest()
    return Vocabulary(token_ids(tokenizer), BatchTokenizer(tokenizer), digest)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model directory from its tokenizer.json: the class that tokenizer_config.json names could be built from other
    files, or be code.

    Raises:
        CheckpointError: it has none that can be loaded, or one that cannot encode a text.
    """
    _check_tokenizer_config(directory)
    unusable = loading(CheckpointError, "model_name_or_path", str(directory), "has no usable tokenizer")
    with unusable, no_panic_output():
        if not (Path(directory) / _TOKENIZER).is_file():
            raise ValueError(f"it holds no {_TOKENIZER}")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), trust_remote_code=False)
        if not tokenizer.encode(_PROBE, add_special_tokens=False):
            raise ValueError("it finds no token in a text")
    return tokenizer


def _check_tokenizer_config(directory: str | Path) -> None:
    """Raise CheckpointError if tokenizer_config.json has a key by which other files or code would be loaded, or values that no key has."""
    values = read_json_object(directory, _TOKENIZER_CONFIG) or {}
    check_chooses_no_code(values, directory, _TOKENIZER_CONFIG)
    for key, value in values.items():
        kinds = _STRUCTURED.get(key)
        plain = value is None or isinstance(value, str | int | float) or (key.endswith("_token") and isinstance(value, dict))
        if key in _OTHER_FILES or not (isinstance(value, kinds) if kinds and value is not None else plain):
            rule = f"has a {_TOKENIZER_CONFIG} with a value that is not known: {key} is {shown(value)[:200]}."
            raise CheckpointError("model_name_or_path", redact(str(directory)), rule, f"Remove {key} from it.")
