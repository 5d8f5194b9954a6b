"""What a model folder may hold: names, configurations, tokenizers and weights are checked before a library reads them."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from most_ray.errors import CheckpointError, DataError
from most_ray.io import hub
from most_ray.io.run_folder import local_copy
from most_ray.model.build import check_vocabulary, load_model, read_config, read_description
from most_ray.model.configuration import parse_config
from most_ray.records import model_files
from most_ray.records.tokenizer import AUDIO_TOKENS, load_tokenizer
from tests.conftest import ROOT
from tests.support.builders import tiny_config, tiny_model
from tests.support.checkpoints import copy_tokenizer

STORED = ROOT / "tests" / "fixtures" / "run-0.1" / "stored"
LITE: dict[str, Any] = {  # config.json of deepseek-ai/DeepSeek-V2-Lite, as published
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config", "AutoModel": "modeling_deepseek.DeepseekV2Model"},
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "type": "yarn",
                     "original_max_position_embeddings": 4096},
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with its tokenizer."""
    tiny_model().save_pretrained(tmp_path / "m")
    copy_tokenizer(tmp_path / "m")
    return tmp_path / "m"


def change(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **changes}))
    return folder


# Names


def test_a_missing_folder_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told at once: nothing is fetched without the prefix."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    for name in ("most", "a/b/c", "x" * 9999, "a\0b", "-/-/"):
        with pytest.raises(CheckpointError, match=r"is neither a folder nor in this machine's cache .* hf:OWNER/NAME\.$"):
            local_copy(name)
    with pytest.raises(CheckpointError, match=r"cache .*it is hf:models/most, or, downloaded by `hf download models/most --local-dir DIR`"):
        local_copy("models/most")
    for path in ("./most", "/nowhere/most", "../most", "~/most"):
        with pytest.raises(CheckpointError, match=r"does not exist\."):
            local_copy(path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        hub.check_model_name(str(tmp_path / "file"))
    assert local_copy(str(tmp_path)) == str(tmp_path) == local_copy(f"file://{tmp_path}")
    with pytest.raises(CheckpointError, match=r"^features = 's3://\*\*\*@b/e': is not on this machine"):
        hub.model_folder("s3://u:p@b/e", "features")


def test_the_prefix_fetches_weights_and_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool) -> str:
        assert ignore_patterns == ["*/*"] and not local_files_only
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(hub, "_why_silent", lambda _: None)
    assert hub.model_folder("hf:owner/name") == str(tmp_path)
    assert [name for name, _ in asked] == ["owner/name"] and not any(".py" in each or ".bin" in each for each in asked[0][1])
    assert hub.model_folder("hf:owner/name", "features", pickled=True) == str(tmp_path)
    assert "pytorch_model.bin" in asked[-1][1]
    (tmp_path / "model.safetensors").touch()
    asked.clear()
    hub.model_folder("hf:owner/name", "features", pickled=True)
    assert len(asked) == 1


def test_a_name_in_the_cache_needs_no_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    known = {"owner/name": str(tmp_path / "config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: known.get(name))
    assert local_copy("owner/name") == str(tmp_path) == hub.cached_folder("hf:owner/name")
    assert hub.cached_folder("owner/other") is None


# Configurations


def test_published_configurations_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LITE))
    config = read_config(str(tmp_path))
    assert (config.num_hidden_layers, config.rope_parameters["rope_type"]) == (27, "yarn")  # type: ignore[index]
    assert parse_config(LITE)[1] == []
    for folder in (STORED / "init", STORED / "checkpoints" / "step-000000003", ROOT.parent / "shared/vectors/most_reference/checkpoint"):
        if folder.exists():
            values = json.loads((folder / "config.json").read_text())
            assert parse_config(values)[1] == [] and read_config(str(folder)).vocab_size == values["vocab_size"]


def test_what_is_saved_is_read_back_as_it_was(model: Path) -> None:
    found, made = read_config(str(model)).to_dict(), tiny_config().to_dict()
    assert {**found, "dtype": None, "architectures": None} == {**made, "dtype": None, "architectures": None}


def test_unknown_keys_are_named_and_not_used(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(model, mine={"deep": 1}, base_model_tp_plan={"x": "y"})
    with caplog.at_level(logging.WARNING):
        config, again = read_config(str(model)), read_config(str(model))
    assert not hasattr(config, "mine") and config.base_model_tp_plan == again.base_model_tp_plan != {"x": "y"}
    assert [record.message for record in caplog.records] == [f"{model}/config.json: base_model_tp_plan, mine: not known, not used"]


@pytest.mark.parametrize("kernels", ["owner/repo", "owner/repo@main:kernel", "flash_attention_2", ["eager"], {"": "owner/repo"}, 7])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"])
def test_config_json_chooses_no_kernels(model: Path, key: str, kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the fix `owner/repo` reached the loader of the hub's kernels."""
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *_, **__: pytest.fail("a kernel was asked for"))
    change(model, **{key: kernels})
    with pytest.raises(CheckpointError, match=rf"config\.json that chooses code to load: {key} is .*eager"):
        load_model(str(model))


def test_the_librarys_own_implementations_are_kept(model: Path) -> None:
    change(model, attn_implementation="eager", experts_implementation="grouped_mm")
    loaded = load_model(str(model))
    assert (loaded.config._attn_implementation, loaded.config._experts_implementation) == ("eager", "grouped_mm")
    with pytest.raises(CheckpointError, match=r"text\.attn_implementation|attn_implementation is 'o/r'"):
        model_files.check_chooses_no_code({"text_config": [{"attn_implementation": "o/r"}]}, model, "config.json")


def test_memory_is_not_allocated_for_what_a_configuration_says(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(model, hidden_size=1 << 14, intermediate_size=1 << 18)
    monkeypatch.setattr("most_ray.model.build.MostForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(CheckpointError, match=r"describes a model of [0-9,]+ weights, and its files hold [0-9,]+\."):
        load_model(str(model))
    assert model_files.weight_shapes(model)["lm_head.weight"] == (832, 32)


def test_an_index_leads_to_files_of_its_folder_only(model: Path) -> None:
    whole, names = load_model(str(model)), dict.fromkeys(model_files.weight_shapes(model), "a.safetensors")
    (model / "model.safetensors").rename(model / "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    again = load_model(str(model))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | {"model.ghost": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor that its model\.safetensors\.index\.json names, the first model\.ghost"):
        load_model(str(model))
    for wrong in ("../m/a.safetensors", "/etc/passwd", "a.bin", 7, None):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | {"lm_head.weight": wrong}}))
        with pytest.raises(CheckpointError, match="weight_map does not name"):
            load_model(str(model))


def test_end_of_sentence_may_be_several_tokens(model: Path, tmp_path: Path) -> None:
    """As in configurations of models for chats; saving failed."""
    from most_ray.model.build import save_model

    config, tokenizer = read_description(str(change(model, eos_token_id=[1, 2])))
    loaded = load_model(str(model))
    assert config.eos_token_id == [1, 2]
    save_model(loaded, tokenizer, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"] == [1, 2, 801]


# Tokenizers


def test_the_units_are_where_the_configuration_has_audio(model: Path) -> None:
    """Before the fix nothing compared the two: all audio went to the text experts."""
    config, tokenizer = read_description(str(model))
    for first, last in ((100002, 100503), (301, 802), (300, 800), (0, 801), (900, 901)):
        config.first_audio_token, config.last_audio_token = first, last
        with pytest.raises(
            CheckpointError, match=rf"audio tokens {first}\.\.{last} by its config\.json, .* by its tokenizer .* 300\.\.801"
        ):
            check_vocabulary(config, tokenizer, "m")
    config.first_audio_token, config.last_audio_token = 300, 830  # ids that no token has may be in it
    check_vocabulary(config, tokenizer, "m")
    config.vocab_size = 801
    with pytest.raises(CheckpointError, match=r"ids up to 801, and by its config\.json 801 embeddings"):
        check_vocabulary(config, tokenizer, "m")


def test_a_panic_of_the_tokenizers_library_is_an_error_of_the_users(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A panic is no Exception, and writes lines of its own to standard error."""

    class PanicException(BaseException):
        pass

    def panic() -> None:
        with model_files.loading(DataError, "f", "v", "is bad"), model_files.no_panic_output():
            os.write(2, b"thread panicked at src/lib.rs\n")
            raise PanicException("index out of range")

    with pytest.raises(DataError, match=r"^f = 'v': is bad \(index out of range\)\. Get it"):
        panic()
    assert capfd.readouterr().err == ""
    with model_files.no_panic_output():
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"
    with pytest.raises(KeyboardInterrupt), model_files.loading(DataError, "f", "v", "is bad"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "broken",
    [
        "", "[]", "{}", "7", '{"model": null}', '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "[" * 3000,
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', '{"model": {"type": "WordLevel", "vocab": {"a": -1}}}',
        '{"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 9}}',
    ],
)  # fmt: skip
def test_broken_tokenizers_are_told_in_one_line(model: Path, broken: str, capfd: pytest.CaptureFixture[str]) -> None:
    (model / "tokenizer.json").write_text(broken)
    with pytest.raises(CheckpointError, match="has no usable tokenizer"):
        load_tokenizer(model)
    assert capfd.readouterr().err == ""


def test_a_tokenizer_is_that_of_tokenizer_json(model: Path) -> None:
    """Whatever class the configuration names: one that is not known, one that builds another tokenizer from the vocabulary, or code."""
    own = load_tokenizer(model)
    for name in ("TokenizersBackend", "LlamaTokenizerFast", "BertTokenizer", "Nobody"):
        change(model, "tokenizer_config.json", tokenizer_class=name, auto_map={"AutoTokenizer": ["own.Own", None]})
        found = load_tokenizer(model)
        assert type(found) is type(own) and found.backend_tokenizer.to_str() == own.backend_tokenizer.to_str()
    for key, value in {"vocab_file": "/etc/passwd", "fast_tokenizer_files": ["x"], "mine": {"a": 1}, "bos_token": ["a"]}.items():
        shutil.copy(STORED / "init" / "tokenizer_config.json", model)
        change(model, "tokenizer_config.json", **{key: value})
        with pytest.raises(CheckpointError, match=f"with a value that is not known: {key} is"):
            load_tokenizer(model)
    assert len(AUDIO_TOKENS) == 502


# Weights


def test_only_safetensors_are_read(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors, and pytorch_model\.bin is not read: pickled") as refusal:
        load_model(str(model))
    assert "weights_only" not in str(refusal.value)


def test_two_sets_of_weights_are_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    (model / "model.safetensors.index.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert [model_files.weight_files(model)[0].name for _ in range(2)] == ["model.safetensors"] * 2
    assert [record.message for record in caplog.records] == [
        f"{model} holds model.safetensors and model.safetensors.index.json: the former is read"
    ]


def test_numbers_that_no_model_has(tmp_path: Path) -> None:
    model_files.check_sizes(
        {"vocab_size": 1 << 20, "pad_token_id": -1, "ignore_index": -100, "hidden_act": "gelu", "layers": None}, tmp_path, "features"
    )
    for wrong in ({"num_hidden_layers": 10**9}, {"a": [{"encoder_layers": 2000}]}, {"hidden_size": 1 << 40}, {"hidden_size": -(1 << 40)}):
        with pytest.raises(CheckpointError, match=r"beyond [0-9,]+\."):
            model_files.check_sizes(wrong, tmp_path, "features")


def test_what_is_read_in_place_of_the_weights_is_refused(tmp_path: Path) -> None:
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    model_files.check_model_files(tmp_path)
    for name in ("adapter_config.json", ".metadata"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(CheckpointError, match=f"it holds {re.escape(name)}"):
            model_files.check_model_files(tmp_path)
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "added_tokens.json")
    with pytest.raises(CheckpointError, match=r"holds added_tokens\.json, a pipe or a device"):
        model_files.check_model_files(tmp_path)
