"""Checkpoints over ranks, on gloo, without Ray: any layout to any other, in the background, with ranks that fail.

Promises 16, 17, 19 of docs/promises.md.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from most_ray.checkpoint import catalog, reader, shards
from most_ray.checkpoint.export import export_checkpoint
from most_ray.checkpoint.writer import CheckpointWriter
from most_ray.data.batch import open_plan
from most_ray.data.plan import PlanSpec
from most_ray.errors import CheckpointError
from most_ray.model.placement import row_order
from most_ray.optim.train_state import TrainState
from tests.support.builders import make_plan, tiny_model
from tests.support.checkpoints import copy_tokenizer
from tests.support.gloo import run_ranks
from tests.support.training import bare_state, content_of, full_weights, loss_of, make, save_to, steps

SAVED = [(1, 4, 4), (1, 4, 2), (2, 2, 2)]
LOADED = {1: [(1, 1, 1)], 2: [(1, 2, 2)], 4: [(2, 2, 2), (1, 4, 4)]}
Topology = tuple[int, int, int]


@dataclass(frozen=True)
class Setting:
    model_dir: str
    spec: PlanSpec
    folder: str


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_model().save_pretrained(root / "model")
    copy_tokenizer(root / "model")
    return Setting(str(root / "model"), make_plan(root / "data", batch=11).spec, str(root))


def named(*parts: object) -> str:
    return "-".join("".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in parts)


def logits_of(state: TrainState) -> torch.Tensor:
    """(2, 12, vocabulary), the same inputs on every rank."""
    ids = torch.cat([torch.arange(100, 106), torch.arange(400, 406)]).repeat(2, 1)
    modality = torch.tensor([0] * 6 + [1] * 6).repeat(2, 1)
    with torch.no_grad():
        return state.model(input_ids=ids, modality=modality, use_cache=False).logits.float()


def outcome(state: TrainState, spec: PlanSpec) -> dict[str, Any]:
    """All that a restored state must share with the saved one, and what comes of it."""
    moments = {name: state.optimizer.state[p]["exp_avg_sq"] for name, p in state.model.named_parameters()}
    first = next(iter(moments))
    return {
        "weights": full_weights(state),
        "moment": moments[first].full_tensor() if hasattr(moments[first], "full_tensor") else moments[first].clone(),
        "logits": logits_of(state),
        "losses": [loss_of(result) for result in steps(state, open_plan(spec), 5)],
    }


def save_all(setting: Setting) -> dict[Topology, dict[str, Any]]:
    plan = open_plan(setting.spec)
    found = {}
    for topology in SAVED:
        state = make(setting.model_dir, topology)
        order = row_order(state.model, "model.layers.1.mlp.experts.down_proj")
        assert order is not None and list(order) != sorted(order), "experts lie in another order than in files"
        steps(state, plan, 3)
        write(f"{setting.folder}/{named(topology)}", state, setting)
        found[topology] = outcome(state, setting.spec)
    return found


def write(uri: str, state: TrainState, setting: Setting) -> None:
    """As training does, with what an export needs."""

    def files(folder: Path) -> None:
        for source in Path(setting.model_dir).iterdir():
            if source.suffix == ".json":
                (folder / source.name).write_bytes(source.read_bytes())

    writer = CheckpointWriter()
    writer.save(uri, state, content_of(state, open_plan(setting.spec)), files, lambda: True)
    writer.wait()
    assert [saved.uri for saved in writer.poll()] == [uri]
    writer.close()


def load_all(setting: Setting, world: int) -> dict[tuple[Topology, Topology], dict[str, Any]]:
    """Every saved checkpoint into every layout of this many ranks; written again from there."""
    found = {}
    for saved in SAVED:
        for topology in LOADED[world]:
            torch.manual_seed(len(found))
            state = make(setting.model_dir, topology)
            with torch.no_grad():
                for parameter in state.model.parameters():
                    parameter.zero_()
            content = reader.load(f"{setting.folder}/{named(saved)}", state)
            assert content["ranks"]["world_size"] == 4 and state.step == 3
            write(f"{setting.folder}/{named(saved, topology)}", state, setting)
            found[saved, topology] = outcome(state, setting.spec)
    return found


@pytest.fixture(scope="module")
def saved(setting: Setting) -> dict[Topology, dict[str, Any]]:
    return run_ranks(4, save_all, setting)[0]


@pytest.mark.parametrize("world", LOADED)
def test_a_checkpoint_moves_to_any_layout(setting: Setting, saved: dict[Topology, dict[str, Any]], world: int) -> None:
    """Promises 16, 17 of docs/promises.md: weights and moments are bitwise identical, logits to 1e-6, losses of the next 5 steps to 1e-5,
    and what is exported from the layout that it was saved at equals what is exported after it went through another."""
    found = run_ranks(world, load_all, setting, world)[0]
    assert len(found) == len(SAVED) * len(LOADED[world])
    for (source, target), other in found.items():
        expected = saved[source]
        assert len(other["weights"]) == len(expected["weights"])
        assert all(torch.equal(other["weights"][name], weight) for name, weight in expected["weights"].items())
        assert torch.equal(other["moment"], expected["moment"])
        torch.testing.assert_close(other["logits"], expected["logits"], atol=1e-6, rtol=0)
        assert other["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        exports = [exported(setting, named(source)), exported(setting, named(source, target))]
        assert exports[0].keys() == exports[1].keys()
        assert all(torch.equal(exports[0][name], tensor) for name, tensor in exports[1].items())
        fused = [name for name in exports[0] if ".experts.3." in name]
        assert len(fused) == 2 * 3, "two layers of experts, three matrices each, under their per-expert names"


def exported(setting: Setting, name: str) -> dict[str, torch.Tensor]:
    output = Path(setting.folder) / f"export-{name}"
    export_checkpoint(f"{setting.folder}/{name}", output)
    return {key: tensor for path in output.glob("*.safetensors") for key, tensor in load_file(path).items()}


def test_files_hold_each_tensor_once_under_its_own_rows(setting: Setting, saved: dict[Topology, dict[str, Any]]) -> None:
    """Whatever the layout: chunks cover every tensor without overlap, experts at their own index, and no rank's file is much
    larger than its share."""
    for topology, expected in saved.items():
        folder = Path(setting.folder) / named(topology)
        content = reader.read_state(str(folder))
        index = reader.CheckpointFiles(str(folder)).index
        weights = {f"model.{name}": tensor for name, tensor in expected["weights"].items()}
        assert sum(name.startswith("model.") for name in index) == content["n_tensors"] == len(weights)
        for name, stored in index.items():
            assert sum(chunk.sizes.numel() for chunk in stored.metadata.chunks) == stored.metadata.size.numel(), name
            for chunk, (file, key) in zip(stored.metadata.chunks, stored.locations, strict=True):
                if name in weights:
                    region = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
                    assert torch.equal(weights[name][region], load_file(folder / file)[key]), name
        sizes = [path.stat().st_size for path in folder.glob("rank-*.safetensors")]
        writers = 4 // topology[0] if topology[0] > 1 else 4
        assert sum(size > content["tensor_bytes"] / 20 for size in sizes) == writers
        assert max(sizes) < content["tensor_bytes"] / writers * 1.2 + 100_000


def save_while_training(setting: Setting) -> list[str]:
    """The same state saved with and without a background, while the parameters change right behind the call."""
    plan = open_plan(setting.spec)
    state = make(setting.model_dir, (1, 2, 2))
    steps(state, plan, 1)
    folder = Path(setting.folder) / "background"
    save_to(folder / "step-000000001", state, plan)
    writer = CheckpointWriter()
    writer.prepare(state)
    slow(0.05)
    for attempt in range(2):  # with new buffers and with kept ones
        writer.save(str(folder / f"step-00000001{attempt}"), state, content_of(state, plan), lambda _: None, lambda: True)
        before = {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}
        assert not (folder / f"step-00000001{attempt}" / catalog.COMMIT).exists()
        steps(make(setting.model_dir, (1, 2, 2)), plan, 1)  # collectives of training beside those of the save
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.mul_(-3.0)
        writer.wait()
        assert [saved.step for saved in writer.poll()] == [1] and writer.poll() == []
        with torch.no_grad():
            for name, parameter in state.model.named_parameters():
                parameter.copy_(before[name])
    writer.close()
    return list(json.loads((folder / "step-000000001" / catalog.COMMIT).read_text())["files"])


def slow(seconds: float) -> None:
    """Writing takes a while, whatever the machine."""
    write_all = shards.write_all

    def slowly(*args: Any) -> None:
        time.sleep(seconds)
        write_all(*args)

    shards.write_all = slowly


def test_a_save_in_the_background_is_that_of_its_moment(setting: Setting) -> None:
    assert "rank-00001.safetensors" in run_ranks(2, save_while_training, setting)[0]
    folder = Path(setting.folder) / "background"
    synchronous, *others = (tensors_in(path) for path in sorted(folder.iterdir()))
    assert len(others) == 2
    for other in others:
        assert other.keys() == synchronous.keys()
        assert all(torch.equal(tensor, synchronous[key]) for key, tensor in other.items() if "random" not in key[1])


def tensors_in(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {(path.name, key): tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def fail_on_rank_1(setting: Setting) -> tuple[str, list[str], list[str]]:
    plan = open_plan(setting.spec)
    state = make(setting.model_dir, (1, 2, 1))
    folder = f"{setting.folder}/failing"
    writer = CheckpointWriter()
    write = shards.Staging.write

    def full(self: Any, path: Path) -> Any:
        path.write_bytes(b"a part of it")
        raise OSError(28, "No space left on device", str(path))

    if dist.get_rank() == 1:
        shards.Staging.write = full  # type: ignore[method-assign]
    writer.save(f"{folder}/step-000000000", state, content_of(state, plan), lambda _: None, lambda: True)
    with pytest.raises(CheckpointError) as raised:
        writer.wait()
    dist.barrier()
    left = os.listdir(folder)
    shards.Staging.write = write  # type: ignore[method-assign]
    dist.barrier()
    writer.save(f"{folder}/step-000000000", state, content_of(state, plan), lambda _: None, lambda: True)
    writer.wait()
    writer.close()
    dist.barrier()
    return str(raised.value), left, catalog.committed(folder)


def test_a_rank_that_fails_fails_the_save_on_all(setting: Setting) -> None:
    for message, left, complete in run_ranks(2, fail_on_rank_1, setting):
        assert "no room left for a checkpoint of" in message and "No space left" in message
        assert left == [], "what was written is taken away"
        assert [Path(uri).name for uri in complete] == ["step-000000000"], "the next save is not disturbed"


def find_intact(setting: Setting) -> list[Any]:
    plan = open_plan(setting.spec)
    state = make(setting.model_dir, (1, 2, 1))
    folder = Path(setting.folder) / "corrupt"
    for step in (1, 2, 3):
        state.step = step
        save_to(catalog.step_uri(str(folder), step), state, plan)
    dist.barrier()
    if dist.get_rank() == 0:
        for step, file in ((2, "rank-00001.safetensors"), (3, "rank-00000.safetensors")):
            path = Path(catalog.step_uri(str(folder), step)) / file
            data = bytearray(path.read_bytes())
            data[-200] ^= 1
            path.write_bytes(data)
    dist.barrier()
    shallow = catalog.latest_valid(str(folder), deep_bytes=0, on_all_ranks=True)
    dist.barrier()
    return [shallow, catalog.latest_valid(str(folder), on_all_ranks=True)]


def test_ranks_share_the_search_for_the_newest_intact_checkpoint(setting: Setting) -> None:
    answers = run_ranks(2, find_intact, setting)
    assert answers[0] == answers[1]
    shallow, (uri, corrupt) = answers[0]
    assert shallow[0].endswith("step-000000003") and shallow[1] == []
    assert uri.endswith("step-000000001")
    assert [Path(at).name for at, _ in corrupt] == ["step-000000003", "step-000000002"]
    assert "rank-00000.safetensors has other content" in corrupt[0][1] and "rank-00001.safetensors has other content" in corrupt[1][1]


def peak_of(folder: str, background: bool) -> tuple[float, float, float]:
    """MB: this rank's file, the growth of its resident memory in the first save, in the second."""
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    state = bare_state(model)
    writer = CheckpointWriter(background=background)
    dist.barrier()
    grown = []
    for number in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
        writer.save(f"{folder}/{number}", state, {}, lambda _: None, lambda: True)
        writer.wait()
        grown.append(memory("VmHWM") - before)
    writer.close()
    return (Path(folder) / "1" / f"rank-0000{dist.get_rank()}.safetensors").stat().st_size / 1e6, *grown  # type: ignore[return-value]


def memory(key: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024 / 1e6


@pytest.mark.parametrize("background", [True, False])
def test_memory_in_a_save_is_one_shard_at_most(tmp_path: Path, background: bool) -> None:
    """Promise 19 of docs/promises.md: 201 MB in all, half of it on each rank."""
    for shard, first, second in run_ranks(2, peak_of, str(tmp_path), background):
        assert 95 < shard < 105
        assert first < shard + 30
        assert second < 30, "the buffer is kept"
