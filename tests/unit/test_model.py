from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import most_ray  # noqa: F401
from most_ray.data.plan import Plan
from most_ray.errors import CheckpointError, ConfigError
from most_ray.model.build import RoutingOverrides, from_deepseek, init_model, load_model, read_config, save_model
from most_ray.model.compat import enable_activation_checkpointing
from most_ray.model.modeling import MostForCausalLM
from most_ray.records.template import IGNORE, PADDING
from most_ray.records.tokenizer import load_tokenizer, train_tokenizer
from tests.support.builders import IDS, make_plan, tiny_config, tiny_model
from tests.unit.test_plan import LAYOUT


def fused_gradient(parameters: dict[str, torch.nn.Parameter], name: str) -> torch.Tensor:
    """The gradient of one of the original's parameters; experts are fused here."""
    if ".experts." not in name:
        return parameters[name].grad  # type: ignore[return-value]
    prefix, rest = name.split(".experts.")
    expert, which = int(rest.split(".")[0]), rest.split(".")[1]
    if which == "down_proj":
        return parameters[f"{prefix}.experts.down_proj"].grad[expert]  # type: ignore[index]
    gate, up = parameters[f"{prefix}.experts.gate_up_proj"].grad[expert].chunk(2)  # type: ignore[index]
    return gate if which == "gate_proj" else up


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_originals_checkpoint_gives_the_originals_numbers(shared: Path, implementation: str) -> None:
    """Loaded by path as it is: model_type MoST, per-expert keys, old-style rope_scaling."""
    folder = shared / "vectors" / "most_reference"
    vectors = load_file(folder / "vectors.safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint", experts_implementation=implementation, attn_implementation="eager", dtype=torch.float32
    )
    inputs = {"input_ids": vectors["model.input_ids"], "modality": vectors["model.marks"], "use_cache": False}
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(model.eval()(**inputs).logits, vectors["model.eval_logits"], **close)
    output = model.train()(**inputs, labels=vectors["model.labels"])
    torch.testing.assert_close(output.logits, vectors["model.train_logits"], **close)
    torch.testing.assert_close((output.loss - output.aux_loss).view(1), vectors["model.train_loss"], **close)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    gradients = [name for name in vectors if name.startswith("grad.")]
    assert len(gradients) == 5
    for name in gradients:
        torch.testing.assert_close(fused_gradient(parameters, name.removeprefix("grad.")), vectors[name], **close)


def test_our_loader_reads_the_originals_folder_too(shared: Path) -> None:
    folder = shared / "vectors" / "most_reference"
    vectors = load_file(folder / "vectors.safetensors")
    model = load_model(str(folder / "checkpoint")).eval()
    logits = model(input_ids=vectors["model.input_ids"], modality=vectors["model.marks"], use_cache=False).logits
    torch.testing.assert_close(logits, vectors["model.eval_logits"], rtol=0, atol=1e-5)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(tmp_path)


def forward_batch(model: MostForCausalLM, plan: Plan, step: int, rows: int) -> dict[str, Any]:
    """Loss sum, balance sum and load of a whole step in packs of `rows` rows."""
    from most_ray.data.batch import rank_batch

    batch = rank_batch(plan, step, 0, 1, rows, LAYOUT)
    totals: dict[str, Any] = {"loss": 0.0, "aux": 0.0, "load": 0, "count": 0}
    for index in range(len(batch.input_ids)):
        arrays = {
            "input_ids": batch.input_ids[index],
            "position_ids": batch.positions[index],
            "labels": batch.labels[index],
            "modality": batch.modality[index],
        }
        output = model(**{k: torch.from_numpy(v.astype(np.int64)) for k, v in arrays.items()}, use_cache=False, token_losses_only=True)
        totals["loss"] += output.token_losses.double().sum()
        totals["aux"] += output.aux_sum.double()
        totals["load"] += output.expert_load
        totals["count"] += len(output.token_losses)
    return totals


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_records_have_the_loss_they_have_alone(plan: Plan, attention: str) -> None:
    """Positions and attention restart at each record; so do balance losses and loads."""
    model = tiny_model()
    model.set_attn_implementation(attention)
    model.train()
    step = plan.step(2)
    packed = forward_batch(model, plan, 2, rows=2)
    loss, aux, load, count = 0.0, 0.0, torch.zeros_like(packed["load"]), 0
    for source, row in zip(step.sources, step.rows, strict=True):
        store = plan.stores[source]
        tokens = torch.from_numpy(store.input_ids(int(row)).astype(np.int64)).unsqueeze(0)
        labels = tokens.clone()
        labels[:, : int(store.prompt_lengths[row])] = IGNORE
        output = model(input_ids=tokens, labels=labels, use_cache=False, token_losses_only=True)
        loss += output.token_losses.double().sum()
        aux += output.aux_sum.double()
        load += output.expert_load
        count += len(output.token_losses)
    assert packed["count"] == count == sum(step.n_supervised)
    torch.testing.assert_close(packed["loss"], loss, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(packed["aux"], aux, rtol=1e-5, atol=1e-5)
    assert torch.equal(packed["load"], load)


def test_padding_changes_neither_loss_nor_load(plan: Plan) -> None:
    """Promise 21 of docs/promises.md."""
    model = tiny_model().train()
    few, many = forward_batch(model, plan, 3, rows=1), forward_batch(model, plan, 3, rows=5)
    torch.testing.assert_close(few["loss"], many["loss"], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(few["aux"], many["aux"], rtol=1e-5, atol=1e-6)
    assert torch.equal(few["load"], many["load"])
    assert int(few["load"].sum()) == plan.step(3).n_tokens * 2 * 2  # top-2 in each of two layers


def test_gradient_checkpointing_changes_nothing(plan: Plan) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            enable_activation_checkpointing(model)
        totals = forward_batch(model, plan, 1, rows=3)
        (totals["loss"] + totals["aux"]).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=1e-7)


@pytest.mark.parametrize("token", [5, IDS.unit_base + 3])
def test_a_batch_of_one_modality_trains(token: int) -> None:
    """Promise 12 of docs/promises.md, within one process: the other group's experts get gradients of zero, not an error."""
    model = tiny_model().train()
    ids = torch.full((2, 6), token)
    output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    grad = model.model.layers[1].mlp.experts.down_proj.grad
    used = grad.abs().sum((1, 2)) > 0
    group = slice(0, 4) if token == 5 else slice(4, 8)
    assert used[group].any() and int(used.sum()) == int(used[group].sum())


def test_a_row_of_padding_alone_has_no_loss_and_finite_gradients() -> None:
    model = tiny_model().train()
    ids = torch.full((1, 8), IDS.pad)
    output = model(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        modality=torch.full_like(ids, PADDING),
        position_ids=torch.arange(8).unsqueeze(0),
        use_cache=False,
        token_losses_only=True,
    )
    (output.token_losses.sum() + output.aux_sum).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_routing_off_is_plain_deepseek() -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    model = tiny_model(use_modality_aware_routing=False, text_expert_indices=None, audio_expert_indices=None).eval()
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    plain = DeepseekV2ForCausalLM(DeepseekV2Config(**values)).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(3, 800, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    init_model("tiny", ["User: hello\n", "\n\nAssistant: ", "seven"], folder, seed=3)
    return folder


def test_save_and_load_are_bit_exact(saved: Path, tmp_path: Path) -> None:
    """Promise 17 of docs/promises.md: nothing is lost between our layout and Hugging Face's."""
    model = load_model(str(saved))
    save_model(model, load_tokenizer(saved), tmp_path)
    with safe_open(saved / "model.safetensors", "pt") as a, safe_open(tmp_path / "model.safetensors", "pt") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        assert any(".experts.7.down_proj.weight" in key for key in a.keys())  # noqa: SIM118
        assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118
    for (name, one), two in zip(model.state_dict().items(), load_model(str(tmp_path)).state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_the_same_seed_gives_the_same_model(saved: Path, tmp_path: Path) -> None:
    init_model("tiny", ["User: hello\n", "\n\nAssistant: ", "seven"], tmp_path, seed=3)
    assert (tmp_path / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()


def test_the_tiny_preset_is_about_one_million(saved: Path) -> None:
    model = load_model(str(saved))
    assert 0.8e6 < model.num_parameters() < 1.6e6 and model.config.n_routed_experts == 8


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "shape of one expert"])
def test_a_missing_extra_or_misshapen_weight_is_an_error(saved: Path, tmp_path: Path, change: str) -> None:
    """Promise 17 of docs/promises.md: a converter that drops an expert must not go unseen."""
    tensors = load_file(saved / "model.safetensors")
    key = "model.layers.1.mlp.experts.5.down_proj.weight"
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "extra":
        tensors["model.layers.9.norm.weight"] = torch.zeros(3)
    elif change == "shape":
        tensors["model.norm.weight"] = torch.zeros(3)
    else:
        tensors[key] = torch.zeros(3, 3)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        load_model(str(tmp_path))


def test_a_dropped_expert_is_an_error(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if "layers.1.mlp.experts.5." not in name}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        load_model(str(tmp_path))


def test_overrides(saved: Path) -> None:
    config = read_config(str(saved), RoutingOverrides(use_modality_aware_routing=True, audio_expert_indices=(0, 1, 6)))
    assert config.text_expert_indices == [2, 3, 4, 5, 7]
    with pytest.raises(ConfigError, match="in no group"):
        read_config(str(saved), RoutingOverrides(text_expert_indices=(0, 1), audio_expert_indices=(2, 3)))


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model_name_or_path"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="type 'llama'"):
        read_config(str(tmp_path))


def test_from_deepseek(tmp_path: Path) -> None:
    """A DeepSeek-V2 folder in the published layout, whose vocabulary ends where the units begin."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    texts = ["User: Transcribe.\n", "\n\nAssistant: ", "seven eight"]
    tokenizer = train_tokenizer(texts, 300)
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer.to_str()
    import json

    content = json.loads(backend)
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith(("[Hu", "<|"))]
    from tokenizers import Tokenizer

    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )
    values = tiny_config().to_dict()
    keep = {k: values[k] for k in DeepseekV2Config().to_dict() if k in values and k not in ("model_type", "architectures")}
    torch.manual_seed(0)
    source = DeepseekV2ForCausalLM(DeepseekV2Config(**{**keep, "vocab_size": len(plain)}))
    source.save_pretrained(tmp_path / "deepseek")
    plain.save_pretrained(tmp_path / "deepseek")
    model = from_deepseek(str(tmp_path / "deepseek"), tmp_path / "most")
    assert model.config.first_audio_token == len(plain) and model.config.vocab_size >= len(plain) + 502
    again = load_model(str(tmp_path / "most"))
    old = source.state_dict()["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(again.state_dict()["model.layers.1.mlp.experts.down_proj"], old)
    assert torch.equal(again.state_dict()["lm_head.weight"][: len(plain)], source.state_dict()["lm_head.weight"])
    assert AutoConfig.from_pretrained(tmp_path / "most").text_expert_indices == [0, 1, 2, 3]


def test_balance_biases_are_saved_loaded_and_used(tmp_path: Path) -> None:
    """Through our loader and the library's, in half precision too: their steps would drown in its rounding."""
    model = tiny_model(use_balance_bias=True).eval()
    plain = tiny_model().eval()
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    bias = torch.tensor([0.0, 1.0, -1.0, 1.001, 0.3, 0.0, 0.3001, 0.0])
    model.state_dict()[name].copy_(bias)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, IDS.unit_base + 1, 9, IDS.unit_base + 4, IDS.unit_base + 9]])
    for again in (load_model(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert again.config.use_balance_bias and torch.equal(again.state_dict()[name], bias)
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)
    assert not torch.allclose(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-3)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half.state_dict()[name], bias)


def test_a_model_without_balance_biases_starts_with_zeros(saved: Path, tmp_path: Path) -> None:
    model = load_model(str(saved), RoutingOverrides(use_balance_bias=True))
    plain = load_model(str(saved)).state_dict()
    biases = {name: tensor for name, tensor in model.state_dict().items() if name not in plain}
    assert len(biases) == 3 and all(tensor.shape == (8,) and not tensor.any() for tensor in biases.values())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.items())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[min(biases)]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="e_score_correction_bias"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_batch_balance_takes_each_layers_load_of_the_step_before(checkpointing: bool) -> None:
    model = tiny_model(seq_aux=False).train()
    if checkpointing:
        enable_activation_checkpointing(model)
    seen: list[torch.Tensor] = []
    handles = [layer.mlp.gate.register_forward_hook(lambda *call: seen.append(call[2][3])) for layer in model.model.layers[1:]]
    ids = torch.tensor([[5, IDS.unit_base + 1, 9, IDS.unit_base + 4, IDS.unit_base + 9]])
    load = torch.tensor([[8, 0, 0, 0, 8, 0, 0, 0], [0, 2, 2, 0, 0, 6, 0, 6]])
    output = model(input_ids=ids, labels=ids, previous_load=load, use_cache=False, token_losses_only=True)
    for handle in handles:
        handle.remove()
    expected = sum(8 * (probabilities.sum(0) * row).sum() / row.sum() for probabilities, row in zip(seen, load, strict=True))
    torch.testing.assert_close(output.aux_sum, expected)
    output.aux_sum.backward()
    assert model.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0


def test_the_plan_is_made_without_torch() -> None:
    code = "import most_ray.data.plan, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
