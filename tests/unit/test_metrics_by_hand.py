"""A run's metrics computed anew: from its trace, its records and its checkpoints, record by record, unpacked, with the definitions
written out."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from most_ray.checkpoint import catalog, reader
from most_ray.distributed.devices import measured_peak
from most_ray.metrics.flops import model_flops
from most_ray.metrics.schema import check_line
from most_ray.model.build import load_model
from most_ray.model.routing import MostRouter
from most_ray.optim.train_state import make_state
from most_ray.records.record import TASKS
from most_ray.runs.job import overrides_of
from most_ray.runs.resolve import Prepared
from tests.support.runs import go, lines_of, numbers_in, prepare_small
from tests.support.training import CPU

STEPS, LOGGING = 6, 2
SOURCES = {"asr/heard": 0.45, "tts/spoken": 0.3, "text/written": 0.25}  # and what was asked for


@dataclass
class Tally:
    """Sums over the records of some steps."""

    losses: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TASKS, 0.0))
    targets: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TASKS, 0))
    aux: list[float] = field(default_factory=list)
    norm: float = 0.0
    tokens: int = 0
    pairs: int = 0
    rows: int = 0
    ids: list[str] = field(default_factory=list)
    load: Any = 0  # (L, 2, E)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    prepared = prepare_small(tmp_path_factory.mktemp("run"), max_steps=STEPS, logging_steps=LOGGING)
    assert go(prepared)
    return prepared


@pytest.fixture(scope="module")
def trace(run: Prepared) -> list[list[str]]:
    """Record ids of each step."""
    assert run.job.config.trace_records
    return [json.loads(line)["records"] for line in Path(run.job.config.trace_records).read_text().splitlines()]


def records_of(prepared: Prepared) -> dict[str, tuple[str, str, np.ndarray, int]]:
    """Source, task, tokens and length of the prompt of each record."""
    found = {}
    for name, store in zip(prepared.plan.names, prepared.plan.stores, strict=True):
        for row in range(len(store)):
            record_id, tokens = store.record(row)
            found[record_id] = (name, store.task, tokens.copy(), int(store.prompt_lengths[row]))
    return found


def weights_after(prepared: Prepared, step: int) -> Any:
    config = prepared.job.config
    state = make_state(load_model(prepared.job.model_path, overrides_of(config)), config, STEPS)
    if step:
        reader.load(catalog.step_uri(prepared.folder.checkpoints, step), state, with_optimizer=False)
    return state.model.train()


def balance(logits: torch.Tensor, audio: torch.Tensor, config: Any, load: np.ndarray) -> torch.Tensor:
    """Balance loss of a record in one layer (DeepSeek-V2, eq. 12-14); its selections go into `load` (2, E). logits: (S, E)."""
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    for position, is_audio in enumerate(audio.tolist()):
        allowed[position, config.audio_expert_indices if is_audio else config.text_expert_indices] = True
    probabilities = logits.softmax(-1).masked_fill(~allowed, 0.0)
    chosen = probabilities.topk(config.num_experts_per_tok, -1).indices
    for is_audio, experts in zip(audio.tolist(), chosen.tolist(), strict=True):
        load[int(is_audio), experts] += 1
    n_tokens, n_experts = logits.shape
    share = torch.bincount(chosen.flatten(), minlength=n_experts) / (n_tokens * config.num_experts_per_tok)
    return (n_experts * share * probabilities.mean(0)).sum()


def rows_needed(lengths: list[int], room: int) -> int:
    """Best fit, longest first."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, left in enumerate(free) if left >= length]
        if fitting:
            free[min(fitting, key=lambda index: free[index])] -= length
        else:
            free.append(room - length)
    return len(free)


def tally_step(prepared: Prepared, records: dict[str, Any], ids: list[str], step: int, tally: Tally) -> None:
    """Add a step to the tally: the second forward (and backward) pass over its records, one by one."""
    model, config = weights_after(prepared, step - 1), prepared.job.config
    layers = [module for module in model.modules() if isinstance(module, MostRouter)]
    logits: list[torch.Tensor] = []
    for router in layers:
        router.register_forward_hook(lambda _module, _inputs, output: logits.append(output[0]))
    weight = {"asr": config.asr_loss_weight, "tts": 1.0, "text": 1.0}
    denominator = sum(weight[records[i][1]] * (len(records[i][2]) - records[i][3]) for i in ids)
    load = np.zeros((len(layers), 2, model.config.n_routed_experts), np.int64)
    aux_of_step = 0.0
    for record_id in ids:
        _, task, tokens, prompt = records[record_id]
        logits.clear()
        ids_ = torch.from_numpy(tokens).long()
        predicted = model(input_ids=ids_[None], use_cache=False).logits[0, prompt - 1 : -1].log_softmax(-1)
        loss = -predicted.gather(1, ids_[prompt:, None]).sum()
        audio = (ids_ >= model.config.first_audio_token) & (ids_ <= model.config.last_audio_token)
        balances = [balance(of_layer, audio, model.config, load[index]) for index, of_layer in enumerate(logits)]
        aux = config.aux_loss_alpha * torch.stack(balances).sum() / len(ids)
        (loss * weight[task] / denominator + aux).backward()
        tally.losses[task] += loss.item()
        tally.targets[task] += len(tokens) - prompt
        tally.tokens += len(tokens)
        tally.pairs += len(tokens) * (len(tokens) + 1) // 2
        aux_of_step += aux.item()
    tally.aux.append(aux_of_step)
    tally.norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    tally.rows += rows_needed([len(records[i][2]) for i in ids], config.max_seq_length)
    tally.ids += ids
    tally.load = tally.load + load


def rate_of(step: int, config: Any) -> float:
    """Linear warm-up, then half a cosine to 0; the k-th step has the rate of k - 1 steps made."""
    made, warm = step - 1, config.warmup_steps
    if made < warm:
        return float(config.learning_rate * made / warm)
    return float(config.learning_rate * 0.5 * (1 + math.cos(math.pi * (made - warm) / (STEPS - warm))))


def figures_of_experts(load: np.ndarray, config: Any) -> dict[str, Any]:
    worst, entropies = {}, {}
    groups = ((0, "text", config.text_expert_indices), (1, "audio", config.audio_expert_indices))
    for index, name, group in groups:
        used = load[:, index, group]
        worst[name] = max(row.max() / row.mean() for row in used)
        shares = [row[row > 0] / row.sum() for row in used]
        entropies[name] = float(np.mean([-(p * np.log(p)).sum() / math.log(len(group)) for p in shares]))
    return {
        "expert_load": {name: load[:, index].sum(0).tolist() for index, name, _ in groups},
        "expert_max_over_mean": worst,
        "expert_entropy": entropies,
        "leaked": int(load[:, 0, config.audio_expert_indices].sum() + load[:, 1, config.text_expert_indices].sum()),
    }


def by_hand(prepared: Prepared, trace: list[list[str]], last: int) -> dict[str, Any]:
    """The line of the steps up to `last`, without times."""
    records, tally, config = records_of(prepared), Tally(), prepared.job.config
    for step in range(last - LOGGING + 1, last + 1):
        tally_step(prepared, records, trace[step - 1], step, tally)
    model_config = weights_after(prepared, 0).config
    loss = sum(tally.losses.values()) / sum(tally.targets.values())
    by_task = {task: tally.losses[task] / tally.targets[task] for task in TASKS}
    seen = [records[i] for ids in trace[:last] for i in ids]
    count, tokens = Counter(r[0] for r in seen), Counter[str]()
    for source, _, ids, _ in seen:
        tokens[source] += len(ids)
    return {
        "loss": loss,
        **{f"{task}_loss": value for task, value in by_task.items()},
        "perplexity": math.exp(loss),
        **{f"{task}_perplexity": math.exp(value) for task, value in by_task.items()},
        "aux_loss": sum(tally.aux) / LOGGING,
        "grad_norm": tally.norm,
        "learning_rate": rate_of(last, config),
        "tokens": tally.tokens,
        "supervised_tokens": sum(tally.targets.values()),
        "samples": len(tally.ids),
        "fill": tally.tokens / (tally.rows * config.max_seq_length),
        "epoch": min(count[name] / len(store) for name, store in zip(prepared.plan.names, prepared.plan.stores, strict=True)),
        "mix": {
            name: {"records": count[name], "tokens": tokens[name], "share": count[name] / len(seen), "target": wanted}
            for name, wanted in SOURCES.items()
        },
        **figures_of_experts(tally.load, model_config),
        "flops": model_flops(model_config).of_training(tally.tokens, tally.pairs, sum(tally.targets.values())),
        "load": {name: tally.load[:, index].tolist() for index, name in enumerate(("text", "audio"))},
    }


@pytest.fixture(scope="module")
def expected(run: Prepared, trace: list[list[str]]) -> dict[int, dict[str, Any]]:
    """Each line's figures by hand, by its step."""
    return {last: by_hand(run, trace, last) for last in range(LOGGING, STEPS + 1, LOGGING)}


def test_metrics_agree_with_a_second_forward_pass(run: Prepared, expected: dict[int, dict[str, Any]]) -> None:
    """To 1e-5 relative, but where a line has fewer digits."""
    peak = measured_peak(CPU, torch.float32, run.job.threads)  # as the run has measured it, once
    lines = lines_of(run, "train")
    assert [line["step"] for line in lines] == list(expected)
    for line, by_step in zip(lines, expected.values(), strict=True):
        seconds = line["step_time"] * LOGGING
        found = {**line, "flops": line["mfu"] * seconds * peak}
        for name in by_step.keys() - {"load"}:
            rounding = 5e-5 if name in ("expert_max_over_mean", "expert_entropy") else 0.0
            assert numbers_in(found[name]) == pytest.approx(numbers_in(by_step[name]), rel=1e-5, abs=rounding), name
        for rate, amount in (("tokens_", "tokens"), ("samples_", "samples"), ("supervised_tokens_", "supervised_tokens")):
            assert line[f"{rate}per_second"] * seconds == pytest.approx(by_step[amount], rel=1e-9)


def test_steps_are_accumulated_and_packed(run: Prepared, expected: dict[int, dict[str, Any]]) -> None:
    """Otherwise the comparison above would say little: several passes in each step, several records in a row, padding, unequal tasks."""
    rows_of_a_pass, room = run.job.config.train_batch_size, run.job.config.max_seq_length
    for figures in expected.values():
        rows = figures["tokens"] / figures["fill"] / room
        assert rows > 2 * rows_of_a_pass * LOGGING and figures["samples"] > rows and figures["fill"] < 0.97
        assert len({round(figures[f"{task}_loss"], 2) for task in TASKS}) == len(TASKS)


def test_lines_of_experts_hold_every_selection(run: Prepared, expected: dict[int, dict[str, Any]]) -> None:
    (line,) = lines_of(run, "experts")
    assert line["step"] == line["steps"] == STEPS
    loads = [figures["load"] for figures in expected.values()]
    assert line["load"] == {name: np.sum([load[name] for load in loads], axis=0).tolist() for name in ("text", "audio")}


def test_every_line_is_as_documented(run: Prepared) -> None:
    lines = lines_of(run)
    assert [line["kind"] for line in lines] == ["start", "train", "train", "train", "experts"]
    assert [complaint for line in lines for complaint in check_line(line)] == []
