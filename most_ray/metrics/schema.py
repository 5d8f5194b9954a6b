"""Every metric, declared once: what each key of metrics.jsonl means, and its names in W&B, TensorBoard, Prometheus and the report.

A new metric is a `Key` here, with a gauge and a curve in the tables after its kind where it has any, and a value where it is computed
(`train.meter` for lines of kind `train`). The trackers, Prometheus, the objectives of sweeps, the report's curves and docs/metrics.md
follow from the declaration. Figures of evaluations are in `figures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from most_ray.metrics.figures import FIGURES, SAMPLE
from most_ray.metrics.keys import Curve, Each, Fixed, Gauge, Key, Many, check_keys, undeclared, with_views

ALL = "(all)"  # the tag of a gauge that covers all tasks or all sets; no folder has this name
_NUMBER = float | None
_BY_MODALITY = "modality (text, audio)"
_NUMBERS, _COUNTS = Each(_BY_MODALITY, list[float]), Each(_BY_MODALITY, list[int])

TOPOLOGY = Fixed(
    "topology",
    {
        "dp_replicate": Key(int, "", "replicas of the model"),
        "fsdp": Key(int, "ranks", "that share a replica's weights"),
        "ep": Key(int, "ranks", "within `fsdp` that share its experts"),
    },
)

START: Mapping[str, Key] = {
    "kind": Key(Literal["start"], "", "an attempt begins: the run's first one, or one that resumes after a stop or a failure"),
    "step": Key(int, "steps", "made before this attempt"),
    "time": Key(float, "s", "Unix time"),
    "workers": Key(int, "ranks", "that train", gauge=Gauge("most_ray_workers", "Ranks")),
    "topology": Key(TOPOLOGY, "", "the layout of the ranks"),
    "device": Key(str, "", '"cpu", or the GPU\'s name'),
    "threads": Key(int, "", "CPU threads of each rank"),
    "precision": Key(Literal["float32", "bfloat16", "float16"], "", "type of matrix products; sums, weights and moments are float32"),
    "exact": Key(bool, "", "the attempt continues as an uninterrupted run would: nothing that its data or steps depend on has changed"),
    "changed": Key(list[str], "", "what has changed since the checkpoint and makes it so, settings with their values"),
    "also_changed": Key(list[str], "", "settings that have changed since the checkpoint and on which no step depends, with their values"),
    "config": Key(str, "", "the file in the run's folder with the attempt's configuration"),
    "global_batch_size": Key(int, "records", "in a step"),
    "total_steps": Key(int, "steps", "the run's goal", gauge=Gauge("most_ray_total_steps", "Steps that the run is to make")),
    "command": Key(str, "", "that was typed, without credentials"),
    "first_expert_layer": Key(int, "", "index of the first layer with experts; lists by layer begin with it"),
    "experts": Key(_COUNTS, "", "the experts that tokens of the modality may use"),
    "n_experts": Key(int, "", "routed experts of a layer"),
    "experts_per_token": Key(int, "", "routed experts that each token selects"),
    "wanted_mix": Key(Each("source", float), "share", "configured share of the source in training"),
}

_MIX_SHARE = Gauge("most_ray_mix_share", "Share of a source in what was trained on, 0 to 1", ("source",))
_MIX_TARGET = Gauge("most_ray_mix_target", "Configured share of a source, 0 to 1", ("source",))
MIX = Fixed(
    "share of a source",
    {
        "records": Key(int, "records", "trained on", over="run"),
        "tokens": Key(int, "tokens", "of these records, before noise", over="run"),
        "share": Key(
            float,
            "share",
            "of all records, or of all tokens if `weight_unit` is tokens",
            over="run",
            tracker="mix/{source}",
            gauge=_MIX_SHARE,
        ),
        "target": Key(float, "share", "configured", gauge=_MIX_TARGET),
    },
)

LAYERS = Fixed(
    "layers",
    {
        "expert_max_over_mean": Key(_NUMBERS, "ratio", "by layer; see the key of this name in the line", over="ratio"),
        "expert_entropy": Key(_NUMBERS, "0 to 1", "by layer; see the key of this name in the line", over="ratio"),
        "busiest_expert": Key(_COUNTS, "expert", "the expert with most selections, by layer", over="sum"),
    },
)

_LOSS = Gauge("most_ray_loss", "Training loss in nats per supervised token, of a task or all", ("task",))
_WITH_TOKENS = "a step that was not skipped had such tokens"


def _task_keys(task: str, records: str) -> dict[str, Key]:
    loss = f"mean cross-entropy over all supervised tokens of {records} records, unweighted"
    return {
        f"{task}_loss": Key(float, "nats per token", loss, _WITH_TOKENS, over="token mean", gauge=_LOSS, labels={"task": task}),
        f"{task}_perplexity": Key(_NUMBER, "", f"exp({task}_loss)", _WITH_TOKENS, over="token mean"),
    }


_TRAIN = {
    "kind": Key(Literal["train"], "", "training since the previous line of this kind (`logging_steps` steps; fewer at the run's end)"),
    "step": Key(int, "steps", "made, up to the end of this line"),
    "time": Key(float, "s", "Unix time"),
    "epoch": Key(float, "epochs", "of the source that was seen least", over="run"),
    "loss": Key(
        _NUMBER,
        "nats per token",
        "mean cross-entropy over all supervised tokens, unweighted; null: every step was skipped",
        over="token mean",
        gauge=_LOSS,
        labels={"task": ALL},
    ),
    "perplexity": Key(_NUMBER, "", "exp(loss); null where that is no number", over="token mean"),
    **_task_keys("asr", "ASR"),
    **_task_keys("tts", "TTS"),
    **_task_keys("text", "text-only"),
    "aux_loss": Key(
        _NUMBER, "nats", "balance loss times `aux_loss_alpha`, as added to the loss; null: every step was skipped", over="mean"
    ),
    "learning_rate": Key(float, "", "of the optimizer", over="last"),
    "grad_norm": Key(
        _NUMBER,
        "",
        "Euclidean norm of the gradient over all parameters, before clipping; of the last step that was not skipped",
        over="last",
    ),
    "skipped_steps": Key(
        int,
        "steps",
        "without an update because a loss or gradient was not finite; they count in no loss, nor in grad_norm and supervised_tokens",
        over="sum",
    ),
    "tokens": Key(int, "tokens", "of the records, prompts included, before noise", over="sum"),
    "supervised_tokens": Key(int, "tokens", "that the loss is a mean over", over="sum"),
    "samples": Key(int, "records", "trained on", over="sum"),
    "fill": Key(float, "share", "of the packed rows' positions that hold tokens", over="ratio"),
    "tokens_per_second": Key(float, "tokens/s", "`tokens` over `step_time`, stalls and waiting for data included", over="ratio"),
    "supervised_tokens_per_second": Key(float, "tokens/s", "`supervised_tokens` over the same time", over="ratio"),
    "samples_per_second": Key(float, "records/s", "`samples` over the same time", over="ratio"),
    "step_time": Key(
        float,
        "s",
        "from the previous line to this one; without the time of evaluations in between steps, and of a stopped run",
        over="mean",
        ranks="rank 0",
    ),
    "training_seconds": Key(
        float,
        "s",
        "training time of the run so far: the time of all lines up to this one, of all starts; without starting up, and without steps "
        "that a resume has cut off",
        over="run",
        ranks="rank 0",
    ),
    "run_tokens": Key(int, "tokens", "trained on by the run so far, before noise", over="run"),
    "run_records": Key(int, "records", "trained on by the run so far", over="run"),
    "run_tokens_per_second": Key(float, "tokens/s", "the run's speed so far: `run_tokens` over `training_seconds`", over="run"),
    "data_wait": Key(float, "s", "of step_time, waiting for the next batch", over="mean", ranks="rank 0"),
    "save_stall": Key(float, "s", "in which checkpoints held up training", over="sum", ranks="rank 0"),
    "mfu": Key(
        float,
        "share",
        "model FLOPs utilisation: operations of the model's matrix products, forward and backward, without padding and recomputation, "
        "over what the devices of all ranks can do in this time (PaLM, arXiv 2204.02311, appendix B). Skipped steps included. A device's "
        "peak: from its data sheet, dense, in the type of the training; for CPUs and unknown GPUs the best of some large products, "
        "measured at the start with as many threads",
        over="ratio",
    ),
    "memory_gb": Key(
        float,
        "10^9 bytes",
        "since the process began: of a GPU, what torch had allocated; without one, what was resident",
        over="max",
        ranks="rank 0",
    ),
    "expert_load": Key(
        _COUNTS,
        "selections",
        "of each expert by tokens of the modality, in all layers",
        over="sum",
        tracker="experts/load/{modality}/{expert}",
    ),
    "expert_max_over_mean": Key(
        Each(_BY_MODALITY, float),
        "ratio",
        "the busiest expert's selections over the mean of the modality's experts, in the worst layer",
        over="ratio",
        tracker="experts/max_over_mean/{modality}",
    ),
    "expert_entropy": Key(
        Each(_BY_MODALITY, float),
        "0 to 1",
        "entropy of the selections over the modality's experts, over its maximum: 1 if all experts have the same number, 0 if one has all; "
        "mean over layers",
        over="ratio",
        tracker="experts/entropy/{modality}",
    ),
    "leaked": Key(
        int, "selections", "of an expert by a token of the other modality: 0, or the routing is wrong", over="sum", tracker="experts/leaked"
    ),
    "layers": Key(LAYERS, "", "layer by layer, from the first with experts", over="sum"),
    "rank_load_max_over_mean": Key(
        float,
        "ratio",
        "the busiest expert-parallel rank's selections over the mean of the ranks, in the worst layer",
        "`ep_size` is above 1",
        over="ratio",
        tracker="experts/rank_load_max_over_mean",
    ),
    "mix": Key(Each("source", MIX), "", "what the run has trained on so far", over="run"),
}

_TRAIN_GAUGES = {
    "step": Gauge("most_ray_step", "Steps made"),
    "epoch": Gauge("most_ray_epoch", "Epochs of the source that was seen least"),
    "learning_rate": Gauge("most_ray_learning_rate", "Learning rate of the last step"),
    "grad_norm": Gauge("most_ray_gradient_norm", "Euclidean norm of the gradient before clipping"),
    "skipped_steps": Gauge("most_ray_skipped_steps", "Steps not made as a loss or gradient was not finite, in the run so far", total=True),
    "tokens_per_second": Gauge("most_ray_tokens_per_second", "Tokens of all ranks per second"),
    "step_time": Gauge("most_ray_step_seconds", "Seconds per step"),
    "data_wait": Gauge("most_ray_data_wait_seconds", "Seconds per step spent waiting for data, on rank 0"),
    "save_stall": Gauge("most_ray_save_stall_seconds", "Seconds in which checkpoints held up training, in the run so far", total=True),
    "mfu": Gauge("most_ray_mfu", "Model FLOPs utilisation, 0 to 1"),
    "memory_gb": Gauge("most_ray_memory_bytes", "Most memory since the process began, on rank 0", scale=1e9),
    "expert_max_over_mean": Gauge(
        "most_ray_expert_max_over_mean", "Busiest expert's load over its modality's mean, in the worst layer", ("modality",)
    ),
    "leaked": Gauge(
        "most_ray_leaked_selections", "Selections of an expert by a token of the other modality, in the run so far", total=True
    ),
    "rank_load_max_over_mean": Gauge(
        "most_ray_rank_load_max_over_mean", "Busiest expert-parallel rank's load over the mean, in the worst layer"
    ),
}

_TRAIN_CURVES = {
    "learning_rate": Curve("Training", "fig-learning-rate", "Learning rate", "learning rate", {"tick_format": ".1~e", "from_zero": True}),
    "grad_norm": Curve("Training", "fig-gradient-norm", "Gradient norm", "before clipping", {"smooth": True, "log": True}),
    "mfu": Curve("Speed", "fig-mfu", "Model FLOPs utilisation", "MFU", {"smooth": True, "tick_format": ".1~%", "from_zero": True}),
    "memory_gb": Curve("Speed", "fig-memory", "Memory", "GB", {"from_zero": True}),
}

TRAIN: Mapping[str, Key] = with_views(_TRAIN, "train", ("kind", "time", "layers", "mix"), _TRAIN_GAUGES, _TRAIN_CURVES)

EXPERTS: Mapping[str, Key] = {
    "kind": Key(Literal["experts"], "", "the selections of every expert; every 100 steps and at the last step"),
    "step": Key(int, "steps", "made, up to the end of this line", tracker="layers/step"),
    "time": Key(float, "s", "Unix time"),
    "steps": Key(int, "steps", "covered by this line: those since the previous line of this kind", over="sum"),
    "load": Key(
        Each(_BY_MODALITY, list[list[int]]),
        "selections",
        "by tokens of the modality, by layer (from the first with experts) and expert. Trackers get the busiest expert's selections over "
        "the mean of the modality's experts, by layer and in the worst layer",
        over="sum",
        tracker="layers/{modality}/max_over_mean/{layer}",
    ),
}

_EVALUATION = {
    "kind": Key(
        Literal["evaluation"], "", "a checkpoint was evaluated; the line may follow lines of later steps, as training continues meanwhile"
    ),
    "step": Key(int, "steps", "made when the checkpoint was written"),
    "time": Key(float, "s", "Unix time at which the evaluation ended"),
    "seconds": Key(float, "s", "that the evaluation took"),
    "wer": Key(Each("ASR set, by its folder", _NUMBER), "share", "word error rate; null: no reference words", tracker="eval/asr/{set}/wer"),
    "validation_loss": Key(
        Each("task/set", _NUMBER), "nats per token", "mean cross-entropy over supervised tokens", tracker="eval/{set}/loss"
    ),
    "sets": Key(Each("task/set", FIGURES), "", "all figures of the set"),
    "overall": Key(Each("task (asr, tts, text)", FIGURES), "", "all figures over all sets of the task; trackers call the set overall/TASK"),
    "samples": Key(Many(SAMPLE), "", "a few references and hypotheses"),
}

_EVALUATION_GAUGES = {
    "step": Gauge("most_ray_evaluation_step", "Step of the newest evaluation"),
    "seconds": Gauge("most_ray_evaluation_seconds", "Seconds that the newest evaluation took"),
}

EVALUATION: Mapping[str, Key] = with_views(_EVALUATION, "eval", ("kind", "time", "sets", "overall"), _EVALUATION_GAUGES)

FAILURE: Mapping[str, Key] = {
    "kind": Key(Literal["failure"], "", "something failed that training does not depend on; the next start tries again"),
    "step": Key(int, "steps", "that it was for"),
    "time": Key(float, "s", "Unix time"),
    "what": Key(Literal["evaluation", "tracking"], "", "that failed"),
    "reason": Key(str, "", "one line"),
}

KINDS: Mapping[str, Mapping[str, Key]] = {"start": START, "train": TRAIN, "experts": EXPERTS, "evaluation": EVALUATION, "failure": FAILURE}


def check_line(line: Mapping[str, Any]) -> list[str]:
    """What is wrong with a line: keys that are unknown or missing, values of another type. Empty if it is as declared."""
    keys = KINDS.get(str(line.get("kind")))
    return [f"kind: {line.get('kind')!r} is unknown"] if keys is None else check_keys(line, keys)


def undeclared_keys(line: Mapping[str, Any]) -> list[str]:
    """The keys of a line that are not declared; see `keys.undeclared`."""
    kind = str(line.get("kind"))
    return [f"{kind}.{name}" for name in undeclared(line, KINDS[kind])] if kind in KINDS else [kind]
