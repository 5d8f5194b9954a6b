from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moto.server import ThreadedMotoServer
from pyarrow import fs
from safetensors.torch import load_file
from torch import nn

from most_ray import storage
from most_ray.data.plan import Plan
from most_ray.errors import CheckpointError
from most_ray.model.tokenizer import train_tokenizer
from most_ray.train import checkpoint, shards, writer
from most_ray.train.export import export_checkpoint
from most_ray.train.shards import Staging, part_of
from most_ray.train.state import TrainState
from most_ray.train.writer import CheckpointWriter
from tests.support.builders import WORDS, tiny_model
from tests.support.gloo import run_ranks
from tests.support.training import bare_state, full_weights, loss_of, make, save_to, steps


def save(
    place: str | Path, state: TrainState, files: Callable[[Path], None] = lambda _: None, may_commit: Callable[[], bool] = lambda: True
) -> None:
    made = CheckpointWriter(background=False)
    made.save(str(place), state, {}, files, may_commit)
    made.close()


def small(value: float = 0.0) -> Any:
    """A state of a few numbers around `value`, which every weight holds."""
    model = nn.Linear(40, 60)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return bare_state(model)


def saved_at(checkpoints: str | Path, *steps: int) -> list[str]:
    """Checkpoints of these steps, each with its step in its weights."""
    for step in steps:
        state = small(float(step))
        state.step = step
        save(checkpoint.step_place(str(checkpoints), step), state)
    return [checkpoint.step_place(str(checkpoints), step) for step in steps]


def weight_in(place: str | Path) -> float:
    state = small(-1.0)
    checkpoint.load(place, state)
    values = {float(value) for parameter in state.model.parameters() for value in parameter.detach().flatten()}
    assert len(values) == 1
    return values.pop()


@pytest.mark.parametrize("options", [{}, {"fp16": True}])
def test_what_follows_a_restore_is_what_would_have_followed(model_dir: str, plan: Plan, tmp_path: Path, options: dict[str, bool]) -> None:
    """Bit for bit, twice in a row, over an epoch's boundary (promises 1, 37)."""
    dtype = torch.float16 if options else None
    straight = make(model_dir, **options)
    expected = steps(straight, plan, 9, dtype=dtype)
    assert plan.cursor(9).epoch > 1.0 > plan.cursor(4).epoch
    state = make(model_dir, **options)
    results = steps(state, plan, 4, dtype=dtype)
    for stop in (7, 9):
        save_to(tmp_path / f"step-{state.step}", state, plan)
        torch.manual_seed(99)
        again = make(model_dir, **options)
        content = checkpoint.load(tmp_path / f"step-{state.step}", again)
        assert content["cursor"]["step"] == again.step == state.step
        state = again
        results += steps(state, plan, stop - state.step, dtype=dtype)
    assert [loss_of(r) for r in results] == [loss_of(r) for r in expected]
    assert [r.learning_rate for r in results] == [r.learning_rate for r in expected]
    for name, weight in full_weights(straight).items():
        assert torch.equal(weight, full_weights(state)[name]), name


def test_random_state_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "c", small())
    expected = torch.rand(3)
    torch.manual_seed(1)
    checkpoint.load(tmp_path / "c", small())
    assert torch.equal(torch.rand(3), expected)


def test_buffers_come_back_where_they_are_stored(tmp_path: Path) -> None:
    state = small()
    state.buffers["load"] = torch.arange(6).view(2, 3)
    state.skipped_in_row = 2
    save(tmp_path / "c", state)
    again = small()
    again.buffers.update(load=torch.zeros(2, 3, dtype=torch.int64), newer=torch.full((2,), 7))
    checkpoint.load(tmp_path / "c", again)
    assert torch.equal(again.buffers["load"], torch.arange(6).view(2, 3)) and again.buffers["newer"].tolist() == [7, 7]
    assert again.skipped_in_row == 2
    again.buffers["load"] = torch.zeros(3, 3, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r"holds state.load in shape \(2, 3\)"):
        checkpoint.load(tmp_path / "c", again)


def test_weights_alone(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    """ignore_optimizer_state: a new run from the weights."""
    state = make(model_dir)
    steps(state, plan, 3)
    save_to(tmp_path / "c", state, plan)
    fresh = make(model_dir)
    checkpoint.load(tmp_path / "c", fresh, with_optimizer=False)
    assert fresh.step == 0 and fresh.scheduler.get_last_lr()[0] == 0.0
    assert all(float(v["exp_avg"].abs().sum()) == 0.0 for v in fresh.optimizer.state.values())
    assert all(torch.equal(w, full_weights(state)[n]) for n, w in full_weights(fresh).items())


def test_state_says_what_wrote_it(tmp_path: Path) -> None:
    state = small()
    made = CheckpointWriter(background=False)
    made.save(str(tmp_path / "c"), state, {"template": "abc"}, lambda _: None, lambda: True)
    content = checkpoint.read_state(tmp_path / "c")
    assert content["template"] == "abc" and content["n_tensors"] == 2
    assert content["tensor_bytes"] == 4 * (3 * (40 * 60 + 60) + 2)
    assert content["versions"].keys() == {"most_ray", "torch", "transformers", "python"}
    assert content["versions"]["torch"] == torch.__version__
    assert content["ranks"] == {"world_size": 1, "meshes": []}


def test_every_type_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Odd sizes, scalars, empty and scattered ones; safetensors reads the file too."""
    torch.manual_seed(0)
    tensors = {
        "bytes": torch.arange(13, dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "long": torch.tensor(2**62 + 1),
        "flags": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 4),
        "scattered": torch.randn(6, 5).t()[1:, ::2],
        "plain": torch.randn(4, 3),
        "infinite": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    orders = {"plain": [2, 3, 0, 1], "brain": [6, 5, 4, 3, 2, 1, 0]}
    parts = [part_of(name, tensor, orders.get(name)) for name, tensor in tensors.items()]
    staging = Staging()
    staging.plan(parts)
    staging.copy(torch.get_num_threads())
    size, _ = staging.write(tmp_path / "file.safetensors")
    assert size == (tmp_path / "file.safetensors").stat().st_size == staging.nbytes
    stored = load_file(tmp_path / "file.safetensors")
    assert torch.equal(stored["plain"], tensors["plain"][:2]) and torch.equal(stored["plain#1"], tensors["plain"][2:])
    with (tmp_path / "file.safetensors").open("rb") as stream:
        index = shards.index_of({"file.safetensors": shards.read_header(stream)})
    assert [list(chunk.offsets) for chunk in index["plain"].metadata.chunks] == [[2, 0], [0, 0]]
    empty = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    live = [part_of(name, tensor, orders.get(name)) for name, tensor in empty.items()]
    shards.read_parts(live, index, lambda name: tmp_path / name, lambda _: None)
    for name, tensor in tensors.items():
        assert torch.equal(empty[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)), name
    logical = torch.zeros(4, 3)  # without an order: as the files have it
    shards.read_parts([part_of("plain", logical)], index, lambda name: tmp_path / name, lambda _: None)
    assert torch.equal(logical, tensors["plain"][[2, 3, 0, 1]])


def test_large_tensors_are_copied_whole_by_several_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        tensors = [torch.randn(size) for size in (5, 5_000_000, 1, 3_000_001, 70)]  # more than a few times CHUNK
        staging = Staging()
        staging.plan([part_of(str(number), tensor) for number, tensor in enumerate(tensors)])
        staging.copy(torch.get_num_threads())
        staging.write(tmp_path / "file.safetensors")
    finally:
        torch.set_num_threads(before)
    stored = load_file(tmp_path / "file.safetensors")
    assert all(torch.equal(stored[str(number)], tensor) for number, tensor in enumerate(tensors))


def test_a_folder_without_its_marker_is_no_checkpoint(tmp_path: Path) -> None:
    places = saved_at(tmp_path, 1, 2, 3)
    assert checkpoint.committed(str(tmp_path)) == places
    assert [checkpoint.step_of(place) for place in places] == [1, 2, 3]
    (Path(places[2]) / checkpoint.COMMIT).unlink()
    assert checkpoint.committed(str(tmp_path)) == places[:2]
    with pytest.raises(CheckpointError, match="never completed"):
        checkpoint.load(places[2], small())
    assert checkpoint.newest_intact(str(tmp_path)) == (places[1], [])
    assert checkpoint.prune(str(tmp_path), 1) == [1]
    assert checkpoint.committed(str(tmp_path)) == places[1:2]
    assert Path(places[2]).exists(), "a checkpoint under way is newer than all complete ones"
    saved_at(tmp_path, 3)  # a dead attempt's folder is written anew
    assert weight_in(checkpoint.committed(str(tmp_path))[-1]) == 3.0
    with pytest.raises(CheckpointError, match="is not named step-NNNNNNNNN"):
        checkpoint.step_of(str(tmp_path))


def test_what_a_dead_attempt_left_is_no_part_of_the_next_one(tmp_path: Path) -> None:
    place = Path(checkpoint.step_place(str(tmp_path), 1))
    place.mkdir()
    (place / "rank-00007.safetensors").write_bytes(b"of a larger group")
    saved_at(tmp_path, 1)
    assert sorted(checkpoint.read_marker(str(place))["files"]) == ["rank-00000.safetensors", "state.json"]
    assert weight_in(place) == 1.0


def test_a_deletion_that_is_cut_off_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = saved_at(tmp_path, 1, 2)

    def cut_off(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(str(tmp_path), 1)
    assert checkpoint.committed(str(tmp_path)) == places[1:]


def test_the_best_and_the_evaluated_are_kept(tmp_path: Path) -> None:
    saved_at(tmp_path, 1, 2, 3, 4, 5, 6)
    (tmp_path / "step-000000002" / checkpoint.COMMIT).unlink()  # what a dead attempt left
    (tmp_path / "step-other").mkdir()
    assert checkpoint.prune(str(tmp_path), 1, 1, {1: 0.5, 3: 0.1, 4: 0.2}, {4}) == [1, 5]
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "4", "6", "r"]


def test_an_attempt_that_was_replaced_cannot_commit(tmp_path: Path) -> None:
    for answers in ([False], [True, False]):  # asked before anything is touched, and again before the marker
        with pytest.raises(CheckpointError, match="replaced by a newer one"):
            save(tmp_path / "c", small(), may_commit=lambda answers=answers: answers.pop(0) if answers else False)
        assert not answers and not (tmp_path / "c" / checkpoint.COMMIT).exists()


def test_a_replaced_attempt_leaves_the_newer_ones_checkpoint_alone(tmp_path: Path) -> None:
    save(tmp_path / "c", small())
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    for may_commit in (lambda: False, lambda: True):
        with pytest.raises(CheckpointError, match="replaced by a newer one"):
            save(tmp_path / "c", small(), may_commit=may_commit)
        assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


def test_float16_after_float32_begins_with_a_fresh_scale(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    save_to(tmp_path / "c", make(model_dir), plan)
    state = make(model_dir, fp16=True)
    checkpoint.load(tmp_path / "c", state)
    assert state.loss_scale.enabled and state.loss_scale.scale == 2.0**16


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)


def garbage(path: Path) -> None:
    path.write_bytes(b'{"step": 3, "fi')


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (cut, "rank-00000.safetensors", "rank-00000.safetensors has [0-9,]+ bytes, not"),
        (flip, "rank-00000.safetensors", "rank-00000.safetensors has other content than was written"),
        (flip, "state.json", "state.json has other content"),
        (Path.unlink, "rank-00000.safetensors", "rank-00000.safetensors is missing"),
        (Path.unlink, "state.json", "state.json is missing"),
        (cut, "commit.json", "commit.json is cut off or garbage"),
        (garbage, "commit.json", "commit.json is cut off or garbage"),
        (lambda path: path.write_bytes(b""), "commit.json", "commit.json is cut off or garbage"),
        (lambda path: path.write_text("[]"), "commit.json", "commit.json is cut off or garbage"),
        (lambda path: path.write_text('{"format": 2, "step": 3, "files": {"a": 1}}'), "commit.json", "commit.json is cut off or garbage"),
    ],
)
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, damage: Callable[[Path], None], file: str, message: str
) -> None:
    """(Promise 8 of the issue: torn in the middle, ignored, named.)"""
    places = saved_at(tmp_path, 1, 2)
    assert [checkpoint.damage(place, deep=True) for place in places] == [None, None]
    damage(Path(places[1]) / file)
    place, ((torn, reason),) = checkpoint.newest_intact(str(tmp_path))
    assert place == places[0] and torn == places[1] and pytest.approx(weight_in(place)) == 1.0
    assert re.match(message, reason), reason
    checkpoint.revoke(places[1])
    assert checkpoint.committed(str(tmp_path)) == places[:1]
    saved_at(tmp_path, 2)
    assert checkpoint.newest_intact(str(tmp_path)) == (places[1], [])


def test_only_the_asked_share_is_hashed(tmp_path: Path) -> None:
    (place,) = saved_at(tmp_path, 1)
    flip(Path(place) / "rank-00000.safetensors")  # the first of two files
    assert checkpoint.damage(place) is None
    assert checkpoint.damage(place, 0, 2, deep=True) and checkpoint.damage(place, 1, 2, deep=True) is None
    assert checkpoint.newest_intact(str(tmp_path), deep_bytes=1000) == (place, [])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for damage in (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), garbage, Path.unlink):
        (place,) = saved_at(tmp_path, 1)
        damage(Path(place) / "rank-00000.safetensors")
        with pytest.raises(CheckpointError, match=r"damaged file \(.*rank-00000.safetensors.*Delete it to go on from an older one"):
            checkpoint.load(place, small())
        shutil.rmtree(place)
    (place,) = saved_at(tmp_path, 1)
    garbage(Path(place) / "commit.json")
    with pytest.raises(CheckpointError, match=r"commit\.json is cut off"):
        checkpoint.read_state(place)


def test_a_tensor_that_is_there_in_part_is_refused(tmp_path: Path) -> None:
    tensor = torch.zeros(4, 3)
    staging = Staging()
    staging.plan([shards.Part("x", (4, 3), tensor.dtype, (shards.Rectangle((0, 0), tensor[:2]),), owned=True)])
    staging.copy(torch.get_num_threads())
    staging.write(tmp_path / "a")
    with (tmp_path / "a").open("rb") as stream:
        index = shards.index_of({"a": shards.read_header(stream)})
    with pytest.raises(shards.DamagedFileError, match="only 6 of 12 values of x"):
        shards.read_parts([part_of("x", tensor)], index, lambda name: tmp_path / name, lambda _: None)


def test_nothing_is_pickled(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    save_to(tmp_path / "c", make(model_dir), plan)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["commit.json", "rank-00000.safetensors", "state.json"]
    assert all(json.loads((tmp_path / "c" / name).read_text()) for name in names if name.endswith(".json"))


def test_a_checkpoint_of_another_model_or_format_is_refused(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    place = tmp_path / "step-000000000"
    save_to(place, make(model_dir), plan)
    for changes, message in (
        ({"n_routed_experts": 4}, "in shape"),
        ({"num_hidden_layers": 4}, "lacks"),
        ({"num_hidden_layers": 2}, "unknown"),
    ):
        other = tmp_path / message.split()[-1]
        tiny_model(**changes, **({"text_expert_indices": None} if "n_routed_experts" in changes else {})).save_pretrained(other)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(place, make(str(other)))
    marker = json.loads((place / checkpoint.COMMIT).read_text())
    for number, content in ((99, {**marker, "format": 99}), (1, {"step": 0})):  # as the version before wrote it
        (place / checkpoint.COMMIT).write_text(json.dumps(content))
        for read in (lambda: checkpoint.read_state(place), lambda: checkpoint.newest_intact(str(tmp_path))):
            with pytest.raises(CheckpointError, match=f"format {number}, not 2"):
                read()


def test_tensors_that_are_missing_since_the_save_are_told(tmp_path: Path) -> None:
    save(tmp_path / "c", small())
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    (tmp_path / "c" / "state.json").write_text(json.dumps({**state, "n_tensors": 3}))
    with pytest.raises(CheckpointError, match="2 of 3 model tensors"):
        checkpoint.load(tmp_path / "c", small())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The copy is that of the call's moment, from the first save on; the next save waits for the one before."""
    going, state = threading.Event(), small(1.0)
    made = CheckpointWriter()
    content = {"seen": [1]}
    for step in (1, 2):
        state.step = step
        made.save(str(tmp_path / f"step-00000000{step}"), state, content, lambda _: going.wait(10) and None, lambda: True)
        content["seen"].append(2)
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(1.0)
        if step == 1:
            assert made.poll() == [] and not (tmp_path / "step-000000001" / checkpoint.COMMIT).exists()
            threading.Timer(0.3, going.set).start()
    made.wait()
    assert [(saved.step, saved.place) for saved in made.poll()] == [(step, str(tmp_path / f"step-00000000{step}")) for step in (1, 2)]
    assert made.poll() == []
    assert 0.2 < made.stall_seconds < 5.0, "the second save waited for the first"
    made.close()
    assert [weight_in(tmp_path / f"step-00000000{step}") for step in (1, 2)] == [1.0, 2.0]
    assert checkpoint.read_state(tmp_path / "step-000000001")["seen"] == [1]


def test_with_overlap_the_next_optimizer_step_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, gate = shards._copy, threading.Event()
    monkeypatch.setattr(shards, "_copy", lambda *arguments: gate.wait(10) and copy(*arguments))
    state, made = small(1.0), CheckpointWriter(overlap=True)
    for step in (1, 2):
        gate.clear()
        expected = state.model.weight.detach().clone()
        made.save(str(tmp_path / str(step)), state, {}, lambda _: None, lambda: True)
        stalled = made.stall_seconds
        state.model(torch.ones(3, 40)).sum().backward()
        threading.Timer(0.3, gate.set).start()
        state.optimizer.step()
        assert made.stall_seconds - stalled > 0.2 and not torch.equal(state.model.weight, expected)
        made.wait()
        again = small()
        checkpoint.load(tmp_path / str(step), again)
        assert torch.equal(again.model.weight, expected)
    made.close()
    state.optimizer.step()


def test_an_error_in_the_background_comes_with_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, made = small(), CheckpointWriter()

    def broken(_: Path) -> None:
        raise RuntimeError("no tokenizer")

    calls: list[Callable[[], Any]] = [made.wait, lambda: made.save(str(tmp_path / "d"), state, {}, lambda _: None, lambda: True)]
    for number, call in enumerate(calls):
        made.save(str(tmp_path / f"c{number}"), state, {}, broken, lambda: True)
        with pytest.raises(CheckpointError, match=r"could not be written on rank 0 \(no tokenizer\)"):
            call()
        assert made.poll() == [] and not (tmp_path / f"c{number}").exists()
    made.save(str(tmp_path / "c"), state, {}, broken, lambda: True)
    while made._thread is not None and made._thread.is_alive():
        threading.Event().wait(0.01)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        made.poll()
    monkeypatch.setattr(writer, "together", lambda work, group: 1 / 0)  # as when a rank is lost in a collective
    made.save(str(tmp_path / "c"), state, {}, lambda _: None, lambda: True)
    with pytest.raises(RuntimeError, match="was not completed"):
        made.wait()
    made.close()


def test_the_first_save_needs_no_new_memory_after_prepare(tmp_path: Path) -> None:
    state, staging = small(), Staging()
    made = CheckpointWriter()
    made.prepare(state)
    buffer = made._staging._buffer
    made.save(str(tmp_path / "c"), state, {}, lambda _: None, lambda: True)
    assert made._staging._buffer is buffer and len(buffer) > len(staging._buffer) == 0
    made.close()


def test_storage_that_fails_for_a_moment_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]
    write = Staging.write

    def failing(self: Staging, path: Path) -> tuple[int, str]:
        written = write(self, path)
        if failures:
            raise failures.pop()
        return written

    monkeypatch.setattr(storage, "sleep", lambda _: None)
    monkeypatch.setattr(Staging, "write", failing)
    saved_at(tmp_path, 4)
    assert not failures and weight_in(checkpoint.committed(str(tmp_path))[0]) == 4.0


def test_a_half_written_file_goes_where_the_folder_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a newer attempt's by then."""
    answers = [True, False]

    def full(self: Staging, path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Staging, "write", full)
    with pytest.raises(CheckpointError, match="no room left"):
        save(tmp_path / "c", small(), may_commit=lambda: answers.pop(0))
    assert list((tmp_path / "c").iterdir()) == []


def fill_the_disk(folder: str) -> list[str]:
    """With a limit on the size of files, as a quota has it: what the errors say."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    messages = []
    for number, room in enumerate((20_000, 20_000, hard)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        made = CheckpointWriter(background=number == 1)
        try:
            made.save(checkpoint.step_place(folder, 7), small(7.0), {}, lambda _: None, lambda: True)
            made.wait()
        except CheckpointError as error:
            messages.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        if number < 2:
            assert not Path(checkpoint.step_place(folder, 7)).exists()
        made.close()
    return messages


def test_a_full_disk_is_told_and_hurts_nothing(tmp_path: Path) -> None:
    place = saved_at(tmp_path, 3)[0]
    (messages,) = run_ranks(1, fill_the_disk, str(tmp_path))
    assert len(messages) == 2, "with room again, it goes on"
    for message in messages:
        assert message.startswith(f"output_dir = '{tmp_path}/step-000000007': has no room left for a checkpoint of 0 MB (File too large).")
        assert message.endswith(f"The last checkpoint is intact: {place}.")
    assert [weight_in(at) for at in checkpoint.committed(str(tmp_path))] == [3.0, 7.0]


def die_in(phase: str, place: str) -> None:
    """Save, and be killed on the way."""

    def die(*_: Any) -> Any:
        os._exit(9)

    asked: list[int] = []
    if phase == "before any file":
        Staging.write = die  # type: ignore[method-assign]
    elif phase == "in a file":
        shards.os.fsync = die
    elif phase == "between files":
        writer._Job._commit = die  # type: ignore[method-assign]
    elif phase == "in the marker":
        Path.replace = die  # type: ignore[method-assign]

    def may_commit() -> bool:
        asked.append(1)
        return len(asked) == 1 or phase != "before the marker" or die()

    save(place, small(2.0), may_commit=may_commit)


@pytest.mark.parametrize(
    ("phase", "left"),
    [
        ("before any file", []),
        ("in a file", ["rank-00000.safetensors"]),
        ("between files", ["rank-00000.safetensors"]),
        ("before the marker", ["rank-00000.safetensors", "state.json"]),
        ("in the marker", ["rank-00000.safetensors", "state.json"]),
    ],
)
def test_a_kill_in_any_phase_leaves_the_last_one_the_newest(tmp_path: Path, phase: str, left: list[str]) -> None:
    saved_at(tmp_path, 1)
    torn = checkpoint.step_place(str(tmp_path), 2)
    process = multiprocessing.get_context("forkserver").Process(target=die_in, args=(phase, torn))
    process.start()
    process.join(120)
    assert process.exitcode == 9
    assert sorted(path.name for path in Path(torn).iterdir() if not path.name.startswith(".")) == left, "it died where it was meant to"
    place, damaged = checkpoint.newest_intact(str(tmp_path))
    assert place is not None and weight_in(place) == 1.0 and damaged == []
    saved_at(tmp_path, 2)
    assert weight_in(torn) == 2.0


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("ENDPOINT_URL", s3_server)):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    fs.S3FileSystem(endpoint_override=s3_server, allow_bucket_creation=True).create_dir(name)
    return f"s3://{name}/run/checkpoints"


def test_checkpoints_behind_a_uri(bucket: str, tmp_path: Path) -> None:
    """Uploaded, listed, checked, read, pruned; scratch is left empty."""
    assert checkpoint.committed(bucket) == [] and checkpoint.newest_intact(bucket) == (None, [])
    made = CheckpointWriter(scratch=tmp_path)
    for step in (1, 2, 3):
        state = small(float(step))
        state.step = step
        files = lambda folder: (folder / "tokenizer.json").write_text("{}") and None  # noqa: E731
        made.save(checkpoint.step_place(bucket, step), state, {}, files, lambda: True)
    made.wait()
    assert [(saved.step, saved.place) for saved in made.poll()] == [(step, checkpoint.step_place(bucket, step)) for step in (1, 2, 3)]
    made.close()
    places = checkpoint.committed(bucket)
    assert [checkpoint.step_of(place) for place in places] == [1, 2, 3] and all(place.startswith("s3://") for place in places)
    state = small(-1.0)
    assert checkpoint.load(places[1], state, scratch=tmp_path)["step"] == state.step == 2
    assert weight_in(places[1]) == 2.0
    storage.write_bytes(storage.join(places[2], "tokenizer.json"), b"[]")
    assert checkpoint.newest_intact(bucket) == (
        places[1],
        [(places[2], "tokenizer.json has other content than was written (its hash differs)")],
    )
    storage.write_bytes(storage.join(places[2], "tokenizer.json"), b"[1]")
    assert "tokenizer.json has 3 bytes, not 2" in str(checkpoint.damage(places[2]))
    checkpoint.revoke(places[0])
    assert checkpoint.prune(bucket, 1) == [2]
    assert checkpoint.committed(bucket) == places[2:]
    assert {entry.name.split("/")[0] for entry in storage.list_files(bucket, ("",))} == {"step-000000003"}
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_behind_a_uri_is_exported(bucket: str, model_dir: str, plan: Plan, tmp_path: Path) -> None:
    train_tokenizer(WORDS, 300).save_pretrained(tmp_path / "tokenizer")
    state = make(model_dir)
    steps(state, plan, 1)

    def files(folder: Path) -> None:
        shutil.copytree(tmp_path / "tokenizer", folder, dirs_exist_ok=True)
        shutil.copy(Path(model_dir) / "config.json", folder)

    for number, place in enumerate((bucket + "/step-000000001", str(tmp_path / "step-000000001"))):
        save(place, state, files)
        export_checkpoint(place, tmp_path / f"export-{number}")
    one, two = (load_file(path / "model.safetensors") for path in sorted(tmp_path.glob("export-*")))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert any(".experts.7.down_proj.weight" in name for name in one)
