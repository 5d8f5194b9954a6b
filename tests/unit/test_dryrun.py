"""`most-ray train --dry_run`: memory, checkpoints and time against what is really there, and every mistake in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Shard

from most_ray.checkpoint.writer import CheckpointWriter
from most_ray.cli import main
from most_ray.config import RunConfig, config_from
from most_ray.distributed.topology import Topology
from most_ray.errors import CheckpointError, ConfigError
from most_ray.metrics.flops import model_flops
from most_ray.model.configuration import MostConfig
from most_ray.model.modeling import MostForCausalLM
from most_ray.model.packed import pack_rows
from most_ray.optim.train_state import make_state
from most_ray.planner import dry_run as dry_run_module
from most_ray.planner import sampling
from most_ray.planner.dry_run import dry_run
from most_ray.planner.hardware import device_of
from most_ray.planner.memory import ForwardPass, ModelShapes, Moments, checkpoint_bytes, checkpoint_sizes, memory_of
from most_ray.planner.published_sizes import PUBLISHED, published_name
from most_ray.records.template import IGNORE
from most_ray.runs.resolve import make_stores, prepare_run
from most_ray.train.recompute import apply_recompute
from tests.support.builders import asr, tiny_config, tiny_model, tts, write_records

ALONE = Topology(1, 1, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """asr, tts: 60 records each; plain: a DeepSeek-V2 folder as its makers publish one, without weights."""
    folder = tmp_path_factory.mktemp("data")
    for name, make in (("asr", asr), ("tts", tts)):
        write_records(folder / name, [make(index, 5 + index % 3) for index in range(60)])
        os.utime(folder / name / "records.jsonl", (1e9, 1e9))  # of files that have just changed the store keeps no digests
    tokenizer = dry_run_module.train_tokenizer(["some words"], 300)
    plain = type(tokenizer)(tokenizer_object=tokenizers_without_speech(tokenizer), bos_token="<s>", eos_token="</s>")
    plain.save_pretrained(folder / "plain")
    (folder / "plain" / "config.json").write_text(json.dumps({"model_type": "deepseek_v2", **PUBLISHED["deepseek-ai/DeepSeek-V2-Lite"]}))
    return folder


def tokenizers_without_speech(tokenizer: Any) -> Any:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith(("[Hu", "<|"))]
    return type(tokenizer.backend_tokenizer).from_str(json.dumps(content))


def config_of(data: Path, **changes: Any) -> RunConfig:
    options: dict[str, Any] = {
        "train_asr_dirs": [str(data / "asr")],
        "train_tts_dirs": [str(data / "tts")],
        "val_asr_dirs": [str(data / "asr")],
    }
    options |= {"output_dir": str(data / "runs"), "max_seq_length": 128, "global_batch_size": 8, "train_batch_size": 2}
    return config_from({**options, **changes})


# Memory


def test_weights_gradients_and_moments_by_hand() -> None:
    """Dense weights over all shards, experts over expert-parallel ranks and then over those that share them; replicas hold the same."""
    shapes = ModelShapes(tiny_config())  # 3 layers, 2 with 8 experts of 2 * 16 x 32 and 32 x 16
    experts = 2 * 8 * (2 * 16 * 32 + 32 * 16)
    dense = shapes.count - experts
    assert shapes.parameters_on(ALONE, 0) == shapes.count == sum(p.numel() for p in tiny_model().parameters())
    load = ForwardPass(rows=2, length=64, supervised=50, half=False, on_gpu=True)
    alone = memory_of(shapes, ALONE, load)
    assert (alone.weights, alone.gradients, alone.moments) == (4 * shapes.count, 4 * shapes.count, 8 * shapes.count)
    assert alone.gathered == alone.copies == 0 and alone.logits == 50 * 832 * 8
    assert memory_of(shapes, ALONE, dataclasses.replace(load, moment=1.0)).moments == 2 * shapes.count
    for topology in (Topology(1, 4, 2), Topology(1, 4, 4), Topology(1, 4, 1), Topology(2, 4, 2)):
        # Every first dimension of this model is a multiple of 4.
        assert memory_of(shapes, topology, load).weights == dense + experts
    shared = sum(shape.numel() for name, shape in shapes.parameters.items() if name.startswith("model.layers.1."))
    head, owned = 4 * (832 * 32 + 32), shared - experts // 2 + experts // 8
    for ep, layer in ((1, 4 * shared), (4, 4 * owned)):
        assert memory_of(shapes, Topology(1, 4, ep), load).gathered == max(4 * layer, 2 * layer + 2 * head)


def test_weights_in_half_precision_are_those_of_linear_layers_and_a_layers_experts() -> None:
    """What autocast casts: not embeddings, norms, routers, nor the head, which lowers a block at a time."""
    shapes = ModelShapes(tiny_config())
    left = ("embed_tokens", "norm", ".gate.", ".experts.", "lm_head")
    names = {name: name.replace("shared_experts", "") for name in shapes.parameters}
    cast = sum(shapes.parameters[name].numel() for name, short in names.items() if not any(part in short for part in left))
    memory = memory_of(shapes, ALONE, ForwardPass(1, 64, 10, half=True, on_gpu=True))
    assert memory.copies == 2 * (cast + 8 * 3 * 16 * 32) and memory.logits == 10 * 832 * 12
    assert memory_of(shapes, Topology(1, 4, 4), ForwardPass(1, 64, 10, half=True, on_gpu=True)).copies == 2 * (cast + 2 * 3 * 16 * 32)


def test_logits_do_not_grow_with_the_vocabulary() -> None:
    """Beyond what the head computes at once."""
    load = ForwardPass(1, 4096, 4096, half=True, on_gpu=True)
    small, large = (memory_of(ModelShapes(tiny_config(vocab_size=size)), ALONE, load).logits for size in (8192, 102_400))
    assert large == small == 8 * (1 << 23)


@pytest.mark.parametrize("topology", [Topology(1, 5, 1), Topology(1, 8, 4), Topology(2, 6, 2), Topology(1, 16, 8)])
def test_ranks_hold_every_row_once(topology: Topology) -> None:
    """As torch cuts them, also where they do not divide; the first rank never holds less than another."""
    shapes = ModelShapes(tiny_config(n_routed_experts=8))
    for name, shape in shapes.parameters.items():
        held = [shapes.rows(name, topology, rank) for rank in range(topology.fsdp)]
        assert sorted(row for rows in held for row in rows) == list(range(shape[0]))
        assert len(held[0]) == max(map(len, held))
        if topology.ep == 1:
            pieces, _ = Shard(0)._split_tensor(torch.arange(shape[0]), topology.fsdp, with_padding=False)
            assert [list(rows) for rows in held] == [piece.tolist() for piece in pieces]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": 28}, {"first_k_dense_replace": 2, "n_shared_experts": 2, "num_experts_per_tok": 3, "v_head_dim": 8}],
    ids=["plain", "compressed queries", "other sizes"],
)
def test_activations_are_what_autograd_keeps(changes: dict[str, Any], half: bool) -> None:
    """Within a fiftieth, on a CPU; with selective recomputation, of what it saves too."""
    config = tiny_config(**changes)
    load = ForwardPass(*ROWS, 0, half, on_gpu=False)
    memory = memory_of(ModelShapes(config), ALONE, load)
    none, selective = (bytes_kept(config, half, kind) for kind in ("none", "selective"))
    assert memory.activations == pytest.approx(none, rel=0.02)
    saved = none - selective
    again = saved / config.num_hidden_layers  # of the one layer that the backward pass is at
    assert memory.selective == pytest.approx(selective + again, rel=0.02)
    assert memory.activations - memory.selective == pytest.approx(saved - again, rel=0.02)
    assert memory.recomputed < memory.selective < memory.activations


ROWS = (8, 120)


def bytes_kept(config: MostConfig, half: bool, recompute: Literal["none", "selective"]) -> int:
    """What a forward pass saves for the backward pass, weights and their copies apart."""
    torch.manual_seed(0)  # the same choice of experts each time
    model = MostForCausalLM(config).train()
    apply_recompute(model, recompute)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    copies = {tuple(reversed(parameter.shape)) for parameter in model.parameters() if parameter.dim() == 2}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        uri = tensor.untyped_storage().data_ptr()
        if uri not in own and not (half and tensor.dtype is torch.bfloat16 and tuple(tensor.shape) in copies):
            kept[uri] = tensor
        return tensor

    def keep_given(_: object, args: object, given: dict[str, Any]) -> None:
        for tensor in (given["hidden_states"], given["position_embeddings"], given["records"].gather, given["records"].restore):
            keep(tensor)

    if recompute == "selective":  # what is to be made again keeps what it was given, of which the hooks are not told
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(keep_given, with_kwargs=True)
    rows = np.random.default_rng(0).integers(3, 800, ROWS).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(80), np.arange(40)]), (len(rows), 1)).astype(np.int32)
    modality = ((rows >= config.first_audio_token) & (rows <= config.last_audio_token)).astype(np.int8)
    packed = pack_rows(rows, np.full_like(rows, IGNORE), positions, modality)
    autocast = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.model(
            input_ids=packed.input_ids, position_ids=packed.positions, modality=packed.modality, records=packed.records, use_cache=False
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("name", "parameters"), [("deepseek-ai/DeepSeek-V2-Lite", 15_706_484_224), ("deepseek-ai/DeepSeek-V2", 235_741_434_880)]
)
def test_published_sizes(name: str, parameters: int) -> None:
    """The papers' 15.7 and 236 billion parameters, of which a token activates 2.4 and 21 (arXiv 2405.04434, sections 2 and B)."""
    config = MostConfig(**PUBLISHED[name])
    assert ModelShapes(config).count == parameters
    flops = model_flops(config)
    assert (flops.per_token + flops.per_target) / 2e9 == pytest.approx({27: 2.4, 60: 21}[config.num_hidden_layers], rel=0.03)
    assert published_name(name) == name
    assert published_name("any/where/most-v2-lite") == "deepseek-ai/DeepSeek-V2-Lite" and published_name("any/where/most") is None


# Checkpoints


@pytest.mark.parametrize("moments", ["float32", "int8"])
@pytest.mark.parametrize("changes", [{}, {"use_balance_bias": True, "seq_aux": False}], ids=["plain", "with buffers"])
def test_checkpoint_bytes_are_those_of_a_checkpoint(tmp_path: Path, changes: dict[str, Any], moments: Moments) -> None:
    """The rank's file to the byte, the folder to a fiftieth."""
    if moments == "int8":
        pytest.importorskip("torchao")
    model, config = tiny_model(**changes), config_from({"optimizer_state": moments})
    writer = CheckpointWriter(background=False)
    writer.save(str(tmp_path / "step-000000001"), make_state(model, config, 10), {}, lambda _: None, lambda: True)
    writer.close()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "step-000000001").iterdir()}
    found = checkpoint_bytes(model.config, ALONE, moments)
    assert found == sizes["rank-00000.safetensors"] == checkpoint_sizes(ModelShapes(model.config), ALONE, moments)[0]
    assert found == pytest.approx(sum(sizes.values()), rel=0.02)


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_checkpoints_are_as_large_on_any_layout(moments: Moments) -> None:
    """But for headers: a rank of four writes a fourth; another replica next to nothing."""
    shapes = ModelShapes(tiny_config(hidden_size=512, intermediate_size=2048, moe_intermediate_size=512))
    _, alone = checkpoint_sizes(shapes, ALONE, moments)
    for topology in (Topology(1, 4, 1), Topology(1, 4, 2), Topology(2, 4, 4)):
        first, total = checkpoint_sizes(shapes, topology, moments)
        assert total == pytest.approx(alone, rel=0.01) and 4 * first == pytest.approx(total, rel=0.01)


# The run


def test_a_dry_run_is_the_run(data: Path) -> None:
    """Steps, shares and the checkpoint's size are those of the run that is then prepared; and nothing was written for it."""
    config = config_of(data, name="real", max_steps=None, epochs=2, num_workers=2, ep_size=2)
    run = dry_run(config, "H100")
    assert not (data / "runs").exists() and not run.about_records and not run.about_tokens and not run.notes
    prepared = prepare_run(config)
    mix = prepared.plan.mix(prepared.job.total_steps)
    assert run.total_steps == prepared.job.total_steps and run.layout.topology == prepared.job.topology
    assert [(s.name, s.records, s.share) for s in run.sources] == [(name, 60, part["target"]) for name, part in mix.items()]
    steps = [prepared.plan.step(k) for k in range(1, run.total_steps + 1)]
    assert run.tokens == sum(step.n_tokens for step in steps) / len(steps)
    assert run.supervised == sum(sum(step.n_supervised) for step in steps) / len(steps)
    assert run.packs == sum(len(step.packs) for step in steps) / len(steps)
    model_config = ModelShapes(MostConfig.from_pretrained(prepared.job.model_path))
    assert (run.layout.checkpoint_bytes_per_rank, run.layout.checkpoint_bytes) == checkpoint_sizes(
        model_config, run.layout.topology, "float32"
    )
    assert run.first_checkpoint == run.total_steps and run.kept_bytes == 2 * run.layout.checkpoint_bytes
    assert run.seconds_to_end == pytest.approx(run.total_steps * run.layout.cost.seconds) == run.seconds_to_first_checkpoint
    assert run.layout.topology in [choice.topology for choice in run.choices]


def test_time_by_hand(data: Path) -> None:
    """One GPU: half of the peak in products, routers in float32 under autocast; what is kept moves four times; the optimizer's bytes."""
    options = {"max_steps": 1, "use_gpu": True, "train_batch_size": 64}
    full, half = (dry_run(config_of(data, bf16=bf16, **options), "A100") for bf16 in (False, True))
    operations, memory = full.layouts[0].operations, 0.8 * 2039e9
    routers = 3 * half.tokens * 2 * 3 * 128 * 8  # of the tiny preset: 3 layers, 8 experts
    for run, products in ((full, operations / 19.5e12), (half, (operations - routers) / 312e12 + routers / 19.5e12)):
        layout = run.layouts[0]
        kept = layout.memory.activations * run.tokens / (layout.rows * 128)
        seconds = 2 * products + 4 * kept / memory + 32 * run.parameters / memory
        assert run.layout.cost.seconds == pytest.approx(seconds) and not layout.cost.sent and layout.cost.communication == 0
    assert half.device.memory == 79 << 30


def test_an_elastic_run_has_two_layouts(data: Path) -> None:
    run = dry_run(config_of(data, num_workers=(1, 4), ep_size=2, max_steps=10), "H100")
    assert [layout.topology for layout in run.layouts] == [Topology(1, 1, 1), Topology(1, 4, 2)]
    assert run.layouts[0].memory.weights > run.layouts[1].memory.weights and run.layouts[0].passes >= run.layouts[1].passes


def test_large_data_are_sampled(data: Path, monkeypatch: pytest.MonkeyPatch, digits: Path) -> None:
    """By the first records of each directory; token stores that are there are used as they are."""
    monkeypatch.setattr(dry_run_module, "SMALL_BYTES", 0)
    monkeypatch.setattr(sampling, "SAMPLE_RECORDS", 200)
    config = config_of(data, train_asr_dirs=[str(digits / "test_speaker")], name="large", output_dir=str(data / "large"), max_steps=20)
    run = dry_run(config, "H100")
    assert run.about_records and run.about_tokens and any("about" in note for note in run.notes)
    sampled, small = run.sources
    assert small.records == 60
    make_stores(config)
    before = sorted((data / "large").rglob("*"))
    run = dry_run(config, "H100")
    exact = run.sources[0]
    assert not run.about_records and exact.records == 500 and sorted((data / "large").rglob("*")) == before
    assert sampled.records == pytest.approx(500, rel=0.1) and sampled.tokens == pytest.approx(exact.tokens, rel=0.1)


@pytest.mark.parametrize("name", ["deepseek-ai/DeepSeek-V2-Lite", "somewhere/most-v2-lite"])
def test_a_model_that_is_not_here_has_its_published_sizes(data: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And the network is not used for it."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for call in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, call, lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    run = dry_run(config_of(data, model_name_or_path=name, num_workers=8, ep_size=8, use_gpu=True, bf16=True, max_steps=5))
    assert run.parameters == 15_706_484_224 and run.about_tokens and not run.about_records
    assert any("init-model --from_deepseek hf:deepseek-ai/DeepSeek-V2-Lite" in note for note in run.notes)
    assert run.layout.checkpoint_bytes == pytest.approx(12 * run.parameters, rel=1e-3)


def test_deepseek_without_speech_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    """In a run and in a dry run, with the command that fixes it."""
    config = config_of(data, model_name_or_path=str(data / "plain"), output_dir=str(tmp_path))
    for attempt in (prepare_run, dry_run):
        with pytest.raises(CheckpointError, match=f"most-ray init-model --from_deepseek {data}/plain --output"):
            attempt(config)


# Devices


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a name, else its beginning; for a run on GPUs where there is none, an H100; else this machine's CPU, with nothing left changed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = [device_of(asked, True, torch.bfloat16, 8, 1) for asked in ("", "H100", "h100 sxm")]
    assert {device.name for device in found} == {"H100 SXM"} and found[0].half_flops == 989.4e12
    assert found[0].full_flops == pytest.approx(66.9e12) and device_of("V100", False, torch.bfloat16, 1, 1).half_flops == pytest.approx(
        15.7e12
    )
    names = {asked: device_of(asked, True, torch.bfloat16, 1, 1).name for asked in ("A10", "l4", "A100", "H200", "h100 pcie", "V100")}
    assert list(names.values()) == ["A10", "L4", "A100 80GB", "H200", "H100 PCIe", "V100 32GB"]
    threads = torch.get_num_threads()
    cpu = device_of("", False, None, 2, 1)
    assert (
        not cpu.is_gpu
        and cpu.speed is None
        and cpu.memory
        and 1e8 < cpu.full_flops == cpu.half_flops
        and torch.get_num_threads() == threads
    )
    with pytest.raises(ConfigError, match="dry_run = 'H1000': is not a known device"):
        device_of("H1000", True, None, 1, 1)


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_worker", "2"], "Did you mean 'num_workers'"),
        (["--train_asr_dirs", "nowhere", "nowhere"], "names a directory twice"),
        (["--num_workers", "4", "--ep_size", "3"], "Use one of [1, 2, 4]"),
        (["--text_expert_indices", "0,1,2", "--audio_expert_indices", "4,5,6,9"], "must hold different experts out of 0..7"),
        (["--max_seq_length", "5000"], "beyond the model's 4,096 positions"),
        (["--keep_best", "1", "--eval_steps", "5", "--best_metric", "wer/other"], "is measured on no validation set"),
        (["--model_name_or_path", "./nowhere"], "does not exist. Check the path. A dry run does not use the network."),
        (["--model_name_or_path", "nobody/nothing"], "neither a folder nor in this machine's cache"),
        (["--max_seq_length", "25"], "Fix the records or raise max_rejected_fraction."),
        (["--asr_tts_mix_ratio", "1"], "gives no share to train_tts_dirs"),
        (["--epochs_of", "other"], "is no training source"),
        (["--resume_from_checkpoint", "/nowhere"], "missing or was never completed"),
        (["--output_dir", "gopher://bucket/x"], "unknown scheme"),
        (["--dry_run", "Cray"], "is not a known device"),
        (["--from_audio", "nowhere"], "does not go with from_audio"),
    ],
)
def test_mistakes_end_in_one_line(data: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    """Exit code 2, as in the run itself, and no folder is made."""
    file = data / "mistake.yaml"
    directories = "\n".join(f"train_{task}_dirs: [{data / task}]" for task in ("asr", "tts"))
    file.write_text(f"{directories}\nval_asr_dirs: [{data / 'asr'}]\noutput_dir: {data / 'mistakes'}\nmax_seq_length: 128\n")
    source = [] if "--from_audio" in words else ["--config", str(file)]
    assert main(["train", *source, "--dry_run", *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out and not (data / "mistakes").exists()


def test_gpus_need_not_be_here(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that requests them is estimated for one; what does not fit says what to change."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ["--train_asr_dirs", str(data / "asr"), "--output_dir", str(data / "runs"), "--max_seq_length", "2048"]
    words += ["--model_name_or_path", "deepseek-ai/DeepSeek-V2-Lite", "--num_workers", "4", "--ep_size", "4", "--use_gpu", "--bf16"]
    assert main(["train", *words, "--dry_run", "A100 40"]) == 0
    shown = capsys.readouterr().out
    assert "Does not fit: " in shown and "take more workers" in shown
    assert main(["train", *words, "--train_batch_size", "2", "--num_workers", "8", "--dry_run"]) == 0
    assert "set recompute: full" in capsys.readouterr().out or not torch.cuda.is_available()
