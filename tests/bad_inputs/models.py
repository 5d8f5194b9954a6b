"""Model folders, checkpoints, and what belongs to a model's speech: units.json, centroids, vocoders, speech encoders, recognisers."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.bad_inputs.harness import Case, Outcome
from tests.bad_inputs.inputs import FSDD, base, run_yaml
from tests.conftest import ROOT

Change = Callable[[Path], object]
Make = Callable[[Path], Sequence[str | Path]]
STORED = ROOT / "tests" / "fixtures" / "run-0.1"
CODE = "chooses code to load"
UNUSABLE = "config.json that cannot be used"


# What spoils a folder


def values(name: str, *removed: str, **changes: Any) -> Change:
    """Changes of keys in a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content = {key: value for key, value in {**content, **changes}.items() if key not in removed}
        (folder / name).write_text(json.dumps(content))

    return change


def config(**changes: Any) -> Change:
    return values("config.json", **changes)


def content(name: str, text: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def tokenizer(edit: Callable[[dict[str, Any]], object]) -> Change:
    """A change of tokenizer.json."""

    def change(folder: Path) -> None:
        found = json.loads((folder / "tokenizer.json").read_text())
        edit(found)
        (folder / "tokenizer.json").write_text(json.dumps(found))

    return change


def weights(edit: Callable[[dict[str, Any]], object]) -> Change:
    """A change of the tensors."""

    def change(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        found = load_file(folder / "model.safetensors")
        edit(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return change


def index(weight_map: object) -> Change:
    """An index in place of the weights."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def reserve_in_range(folder: Path) -> None:
    """The units at other ids than in config.json, as where the tokenizer held other added tokens."""
    values("config.json", first_audio_token=500, last_audio_token=1001)(folder)


# Commands on a spoilt model


def plan_of(change: Change, **keys: Any) -> Make:
    """`plan` from a copy of the model, with a change."""

    def make(folder: Path) -> Sequence[str]:
        shutil.copytree(base() / "model", folder / "m")
        change(folder / "m")
        (folder / "c.yaml").write_text(run_yaml(**{"model_name_or_path": "m", **keys}))
        return ["plan", "--config", "c.yaml", "--trace", "t.jsonl", "--steps", "1:3"]

    return make


def evaluate(change: Change, *flags: str) -> Make:
    def make(folder: Path) -> Sequence[str]:
        shutil.copytree(base() / "model", folder / "m")
        change(folder / "m")
        return ["evaluate", "--model", "m", "--asr_dirs", str(base() / "test_takes"), "--output", "e.json", *flags]

    return make


def transcribe(change: Change) -> Make:
    def make(folder: Path) -> Sequence[str]:
        shutil.copytree(base() / "model", folder / "m")
        change(folder / "m")
        return ["transcribe", "--model", "m", "--speech", str(base() / "train_asr"), str(FSDD / "0_george_0.flac")]

    return make


def deepseek(change: Change) -> Make:
    """`init-model --from_deepseek` of a copy of the model, which is one of DeepSeek's with units."""

    def make(folder: Path) -> Sequence[str]:
        shutil.copytree(base() / "model", folder / "m")
        config(model_type="deepseek_v2")(folder / "m")
        change(folder / "m")
        return ["init-model", "--from_deepseek", "m", "--output", "out"]

    return make


def named(name: str, *command: str) -> Make:
    """A command with NAME in its words replaced; `plan` where there are none."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "c.yaml").write_text(run_yaml(model_name_or_path=name))
        records = str(base() / "test_takes")
        given = command or ("plan", "--config", "c.yaml", "--trace", "t.jsonl", "--steps", "1:3")
        return [word.replace("NAME", name).replace("RECORDS", records) for word in given]

    return make


# Commands on spoilt speech assets and records


def assets(change: Change, *command: str) -> Make:
    """A command on `k`, a copy of the records with their units.json, centroids and vocoder, with a change."""

    def make(folder: Path) -> Sequence[str]:
        shutil.copytree(base() / "train_asr", folder / "k")
        change(folder / "k")
        (folder / "c.yaml").write_text(run_yaml(train_asr_dirs=["k"], unit_swap_prob=0.1))
        return [word.replace("MODEL", str(base() / "model")).replace("FLAC", str(FSDD / "0_george_0.flac")) for word in command]

    return make


PLAN = ("plan", "--config", "c.yaml", "--trace", "t.jsonl", "--steps", "1:3")
TRANSCRIBE = ("transcribe", "--model", "MODEL", "--speech", "k", "FLAC")
SYNTHESIZE = ("synthesize", "--units", "[Hu7][Hu8]", "--speech", "k", "--output", "o.wav")


def units(**changes: Any) -> Change:
    return values("units.json", **changes)


def identity(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / "units.json").read_text())
        found["identity"] |= changes
        (folder / "units.json").write_text(json.dumps(found))

    return change


def neighbour(value: Any) -> Change:
    """One neighbour of one unit."""

    def change(folder: Path) -> None:
        found = json.loads((folder / "units.json").read_text())
        found["neighbours"][3][2] = value
        (folder / "units.json").write_text(json.dumps(found))

    return change


def array(value: Any, **how: Any) -> Change:
    def change(folder: Path) -> None:
        np.save(folder / "kmeans.npy", value, **how)

    return change


def array_header(shape: str) -> Change:
    """A .npy file that announces an array of this shape and holds none."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return content("kmeans.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def vocoder(**changes: Any) -> Change:
    """Changes in what vocoder.safetensors says of itself."""

    def change(folder: Path) -> None:
        from safetensors import safe_open
        from safetensors.numpy import load_file, save_file

        with safe_open(folder / "vocoder.safetensors", "numpy") as file:
            about = json.loads(file.metadata()["vocoder"])
        tensors = load_file(folder / "vocoder.safetensors")
        save_file(tensors, folder / "vocoder.safetensors", {"vocoder": json.dumps({**about, **changes})})

    return change


def encoder(change: Change, kind: str = "hubert") -> Make:
    """`prepare kmeans` with a speech encoder in the folder e, a configuration of a small HuBERT with a change."""
    small = {"model_type": "hubert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

    def make(folder: Path) -> Sequence[str]:
        (folder / "e").mkdir()
        (folder / "e" / "config.json").write_text(json.dumps(small))
        (folder / "e" / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        change(folder / "e")
        return ["prepare", "kmeans", "--input", str(FSDD.parent), "--output", "k.npy", "--k", "4", "--features", f"{kind}:e:1"]

    return make


def recogniser(change: Change) -> Make:
    """`evaluate` with a recogniser in the folder r and a vocoder."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "r").mkdir()
        (folder / "r" / "config.json").write_text(json.dumps({"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]}))
        (folder / "r" / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        change(folder / "r")
        given = evaluate(lambda _: None, "--recogniser", "r", "--vocoder", str(base() / "train_asr" / "vocoder.safetensors"))
        return given(folder)

    return make


def seamless(change: Change) -> Make:
    """`synthesize` with a vocoder in the folder v, a configuration of SeamlessM4T's with a change."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "v").mkdir()
        (folder / "v" / "config.json").write_text(json.dumps({"model_type": "seamless_m4t"}))
        (folder / "v" / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        change(folder / "v")
        return ["synthesize", "--units", "[Hu7]", "--vocoder", "v", "--output", "o.wav"]

    return make


# Checkpoints


def stored(change: Change, *command: str) -> Make:
    """A command on a copy of a run that stopped at step 3 of 6, with a change of its checkpoint; `plan` of the run where there is none."""

    def make(folder: Path) -> Sequence[str]:
        shutil.copytree(STORED, folder / "runs")
        checkpoint = folder / "runs" / "stored" / "checkpoints" / "step-000000003"
        change(checkpoint)
        run = yaml.safe_load((folder / "runs" / "stored" / "config.yaml").read_text())
        for name in [name for name in run if name.endswith("_dirs")]:
            run[name] = [str(folder / "runs" / each) for each in run[name]]
        kept = {**run, "output_dir": str(folder / "runs"), "store_dir": str(folder / "runs" / "store")}
        (folder / "c.yaml").write_text(yaml.safe_dump({key: value for key, value in kept.items() if key != "deterministic"}))
        given = command or PLAN
        return [word.replace("STEP", str(checkpoint)) for word in given]

    return make


def committed(name: str, data: bytes) -> Change:
    """Another content of a file of a checkpoint, with the size and the hash that commit.json must have for it."""

    def change(folder: Path) -> None:
        import xxhash

        (folder / name).write_bytes(data)
        marker = json.loads((folder / "commit.json").read_text())
        marker["files"][name] = [len(data), xxhash.xxh3_128(data).hexdigest()]
        (folder / "commit.json").write_text(json.dumps(marker))

    return change


def state(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / "state.json").read_text())
        committed("state.json", json.dumps({**found, **changes}).encode())(folder)

    return change


def header(edit: Callable[[dict[str, Any]], object]) -> Change:
    """A change in the header of a checkpoint's tensors."""

    def change(folder: Path) -> None:
        data = (folder / "rank-00000.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        found = json.loads(data[8 : 8 + size])
        edit(found)
        text = json.dumps(found).encode()
        committed("rank-00000.safetensors", struct.pack("<Q", len(text)) + text + data[8 + size :])(folder)

    return change


def _entry(found: dict[str, Any], **changes: Any) -> None:
    found[next(key for key in found if key != "__metadata__")].update(changes)


def _is_untouched(folder: Path, outcome: Outcome) -> None:
    assert not (folder / "harm").exists(), "code was run"


DEEP = "[" * 2000 + "]" * 2000
CONFIGS = [
    # Values of config.json: what is wrong, the changes, what the error says.
    ("no heads", {"num_attention_heads": 0}, "num_attention_heads 0 is not a whole number in 1.."),
    ("a billion experts", {"n_routed_experts": 10**9}, "n_routed_experts 1000000000 is not"),
    ("a million layers", {"num_hidden_layers": 10**6}, "num_hidden_layers 1000000 is not"),
    ("experts of a number of 400 digits", {"n_routed_experts": 10**400}, "n_routed_experts 1000"),
    ("negative sizes", {"hidden_size": -128}, "hidden_size -128 is not"),
    ("sizes as text", {"hidden_size": "128"}, "hidden_size '128' is not a whole number"),
    ("sizes as fractions", {"hidden_size": 128.5}, "hidden_size 128.5 is not"),
    ("sizes as truth values", {"num_hidden_layers": True}, "num_hidden_layers True is not"),
    ("sizes as lists", {"kv_lora_rank": [64]}, r"kv_lora_rank \[64\] is not"),
    ("no vocabulary", {"vocab_size": 0}, "vocab_size 0 is not"),
    ("an infinite factor", {"routed_scaling_factor": float("inf")}, "routed_scaling_factor inf is not a number"),
    ("dropout above 1", {"attention_dropout": 7.0}, "attention_dropout 7.0 is not"),
    ("another activation", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not one of silu"),
    ("another choice of experts", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not one of"),
    ("another score", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not one of softmax"),
    ("experts in every second layer", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not one of 1"),
    ("groups without a number", {"topk_method": "group_limited_greedy"}, "n_group"),
    ("groups that do not divide", {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}, "do not divide"),
    ("a position embedding nobody knows", {"rope_parameters": {"rope_type": "none"}}, "rope_parameters has the type 'none'"),
    ("a position embedding as text", {"rope_parameters": "yarn"}, "rope_parameters 'yarn' is no object"),
    ("a base as text", {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta 'x', which is no number"),
    ("a base of 400 digits", {"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, "rope_theta 1000"),
    ("escapes in a position embedding", {"rope_parameters": {"rope_type": "default", "\x1b[31m": 1}}, r"has the key '\\x1b"),
    ("experts as text", {"text_expert_indices": ["a"]}, "text_expert_indices"),
    ("another model", {"model_type": "llama"}, "model of type 'llama'"),
    ("a model of a list", {"model_type": ["most"]}, r"model of type \['most'\]"),
]
SAYS_CODE = [
    # Keys by which transformers would load code, kernels or other files.
    ("kernels of the hub", config(attn_implementation="owner/repo"), "attn_implementation is 'owner/repo'"),
    ("kernels of the hub, by the inner key", config(_attn_implementation="owner/repo:kernel"), "_attn_implementation is"),
    ("kernels that may be fetched", config(attn_implementation="flash_attention_2"), "attn_implementation is 'flash_attention_2'"),
    ("kernels of experts", config(experts_implementation="owner/repo"), "experts_implementation is"),
    ("quantisation", config(quantization_config={"quant_method": "gptq"}), "quantization_config is"),
    ("another file of weights", config(transformers_weights="../w.safetensors"), "transformers_weights is"),
    ("fusions", config(fusion_config={"patch_embeddings": True}), "fusion_config is"),
    ("trust", config(trust_remote_code=True), "trust_remote_code is True"),
    ("code of generation", values("generation_config.json", custom_generate="owner/repo"), "custom_generate is 'owner/repo'"),
    ("arguments of the tokenizer", values("tokenizer_config.json", init_inputs=["x"]), "init_inputs is"),
]
FILES = [
    # Files of the folder: what is wrong, the change, what the error says.
    ("no config.json", without("config.json"), "holds no config.json"),
    ("config.json is a list", content("config.json", "[]"), "config.json that cannot be read .*no JSON object"),
    ("config.json is cut off", content("config.json", '{"model_type": "mo'), "config.json that cannot be read"),
    ("config.json is deep", content("config.json", DEEP), "nested more than 100 deep"),
    ("config.json holds 5,000 digits", content("config.json", '{"hidden_size": ' + "1" * 5000 + "}"), "config.json"),
    ("config.json is of bytes", content("config.json", b"\xff\xfe\x00"), "config.json that cannot be read"),
    ("generation_config.json is cut off", content("generation_config.json", "{"), "generation_config.json that cannot be read"),
    ("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "no usable tokenizer .*holds no tokenizer.json"),
    ("tokenizer.json is cut off", content("tokenizer.json", '{"model":'), "no usable tokenizer"),
    ("tokenizer.json is empty", content("tokenizer.json", ""), "no usable tokenizer"),
    ("tokenizer.json is deep", content("tokenizer.json", DEEP), "no usable tokenizer"),
    ("tokenizer.json of no model", tokenizer(lambda found: found.update(model=None)), "no usable tokenizer"),
    ("tokenizer.json of an unknown model", tokenizer(lambda found: found["model"].update(type="X")), "no usable tokenizer"),
    (
        "merges of tokens that are not there",
        tokenizer(lambda found: found["model"]["merges"].append(["x" * 9, "yy"])),
        "no usable tokenizer",
    ),
    ("a vocabulary of texts", tokenizer(lambda found: found["model"].update(vocab={"a": "b"})), "no usable tokenizer"),
    ("an empty vocabulary", tokenizer(lambda found: found["model"].update(vocab={}, merges=[])), "tokenizer"),
    ("added tokens that are numbers", tokenizer(lambda found: found.update(added_tokens=[1, 2])), "no usable tokenizer"),
    ("no units", tokenizer(lambda found: found.update(added_tokens=found["added_tokens"][:3])), "knows no speech units"),
    ("half of the units", tokenizer(lambda found: found.update(added_tokens=found["added_tokens"][:200])), r"is not in the vocabulary"),
    (
        "units in another order",
        tokenizer(lambda found: found["added_tokens"][3:5].reverse() or _swap(found)),
        "not in one run of ids|audio",
    ),
    ("tokenizer_config.json is a list", content("tokenizer_config.json", "[]"), "tokenizer_config.json that cannot be read"),
    ("tokens of lists", values("tokenizer_config.json", bos_token=["x"]), "bos_token is"),
    ("no begin of sentence", values("tokenizer_config.json", "bos_token"), "no begin- or end-of-sentence"),
    ("a pipe beside the tokenizer", lambda folder: os.mkfifo(folder / "special_tokens_map.json"), "holds special_tokens_map.json, a pipe"),
    ("no weights", without("model.safetensors"), "holds no model.safetensors"),
]


def _swap(found: dict[str, Any]) -> None:
    first, second = (next(token for token in found["added_tokens"] if token["content"] == f"[Hu{unit}]") for unit in (1, 2))
    first["content"], second["content"] = second["content"], first["content"]


def _markers_first(found: dict[str, Any]) -> None:
    """The audio markers before the units, as where a tokenizer held them already."""
    first, last = found["added_tokens"][3], found["added_tokens"][-2]
    first["content"], last["content"] = last["content"], first["content"]


WEIGHTS = [
    ("only pickled weights", pickled, "pytorch_model.bin is not read: pickled weights can run code"),
    ("weights are cut off", content("model.safetensors", b"\x10"), "weights that cannot be read"),
    ("weights announce a header of exabytes", content("model.safetensors", b"\xff" * 64), "weights that cannot be read"),
    ("an index of another folder", index({"lm_head.weight": "../m/weights.safetensors"}), "weight_map does not name safetensors"),
    ("an index of pickles", index({"lm_head.weight": "pytorch_model.bin"}), "weight_map does not name safetensors"),
    ("an index of a list", index(["weights.safetensors"]), "weight_map does not name safetensors"),
    ("an index of nothing", index({}), "weight_map does not name safetensors"),
    ("an index of a lost file", index({"lm_head.weight": "lost.safetensors"}), "lacks lost.safetensors"),
    ("an expert is missing", weights(lambda w: w.pop("model.layers.1.mlp.experts.3.down_proj.weight")), "mismatched|missing"),
    ("a weight of another shape", weights(lambda w: w.update({"model.norm.weight": np.ones(7, np.float32)})), "mismatched|shape"),
    ("a weight of nobody", weights(lambda w: w.update({"model.x": np.ones(7, np.float32)})), "unexpected keys, the first model.x"),
    (
        "a far larger model",
        config(hidden_size=1 << 14, intermediate_size=1 << 18),
        "describes a model of [0-9,]+ weights, and its files hold",
    ),
    ("an adapter", content("adapter_config.json", '{"base_model_name_or_path": "x/y"}'), "is an adapter of another model"),
    ("a distributed checkpoint", content(".metadata", b"\x80\x04."), "pickled objects"),
]
UNITS = [
    ("a negative neighbour", neighbour(-2), r"neighbour of unit 3 -2, not one of the units 0\.\.499"),
    ("a neighbour out of range", neighbour(500), "neighbour of unit 3 500"),
    ("a fractional neighbour", neighbour(1.5), "neighbour of unit 3 1.5"),
    ("neighbours of too few units", units(neighbours=[[1], [0]]), "neighbours those of 2 units, not of 500"),
    ("neighbours of unequal numbers", neighbour([1]), "neighbour of unit 3"),
    ("neighbours as a table", units(neighbours={"0": [1]}), "neighbours no list"),
    ("too many units", identity(n_units=501), "n_units 501"),
    ("an identity of a list", units(identity=[]), "identity that is no object"),
    ("units.json is deep", content("units.json", DEEP), "nested more than 100 deep"),
    ("units.json is a list", content("units.json", "[]"), "is no JSON object"),
    ("an infinite rate", identity(rate_hz=float("inf")), "rate_hz inf"),
    ("a reference of texts", units(reference={"mean": ["x"], "deviation": [1]}), "reference that is not a mean"),
]
KMEANS = [
    ("centroids that are objects", array(np.array([{"a": 1}], dtype=object), allow_pickle=True), "cannot be read as an array"),
    ("centroids that are numbers of a list", array(np.arange(500.0)), "holds no table of centroids"),
    ("whole centroids", array(np.ones((500, 39), np.int64)), "holds no table of centroids"),
    ("centroids that are not finite", array(np.full((500, 39), np.nan, np.float32)), "not 1..500 finite centroids"),
    ("no centroids", array(np.ones((0, 39), np.float32)), "cannot be read as an array|no table"),
    ("centroids of no features", array(np.ones((500, 0), np.float32)), "cannot be read as an array|no table"),
    ("terabytes of centroids", array_header("(500, 1000000000)"), "cannot be read as an array"),
    ("a negative number of centroids", array_header("(-5, 39)"), "cannot be read as an array|finite centroids"),
    ("a pipe", lambda folder: (without("kmeans.npy")(folder), os.mkfifo(folder / "kmeans.npy")), "kmeans"),
]
VOCODERS = [
    ("a hop of text", vocoder(hop="160"), "cannot be read as a vocoder"),
    ("an infinite hop", vocoder(hop=float("inf")), "cannot be read as a vocoder"),
    ("a billion units", vocoder(n_units=10**9), "cannot be read as a vocoder"),
    ("a negative width", vocoder(settings={"width": -3, "griffin_lim_iterations": 60}), "cannot be read as a vocoder"),
    ("settings of a list", vocoder(settings=[]), "cannot be read as a vocoder"),
    ("a vocoder of random bytes", content("vocoder.safetensors", b"\x00" * 99), "cannot be read as a vocoder"),
]
CHECKPOINTS = [
    ("commit.json is deep", content("commit.json", DEEP), "commit.json is cut off or garbage .*nested"),
    ("commit.json of texts", values("commit.json", step="three"), r"commit.json is cut off or garbage \(its step\)"),
    ("commit.json of another kind", values("commit.json", format=[2]), r"commit.json is cut off or garbage \(its format\)"),
    ("commit.json of negative sizes", values("commit.json", files={"state.json": [-1, "x"]}), "its list of files"),
    ("commit.json of other folders", values("commit.json", files={"../x": [1, "x"]}), "its list of files"),
    ("state.json is deep", committed("state.json", DEEP.encode()), "state.json.*nested"),
    ("state.json is a list", committed("state.json", b"[]"), "state.json is cut off or garbage"),
    ("a step of text", state(step="three"), r"state.json is garbage \(its step\)"),
    ("a schedule of a list", state(scheduler=[3]), r"state.json is garbage \(its scheduler\)"),
    ("no ingredients", state(ingredients=None), r"state.json is garbage \(its ingredients\)"),
    ("sums of text", state(meter={"sums": "x"}), r"state.json is garbage \(its meter\)"),
    ("another step", state(step=2), "state.json is of step 2"),
    ("shapes of text", header(lambda found: _entry(found, shape="x")), "header is broken"),
    ("a type nobody knows", header(lambda found: _entry(found, dtype="F3")), "header is broken"),
    ("parts beyond the tensor", header(lambda found: _entry(found, shape=[10**6, 10**6])), "header is broken"),
    ("no parts", header(lambda found: found.update(__metadata__={})), "header is broken"),
]
HUB = "is neither a folder nor in this machine's cache of hub models. Check the path; (a model on|from) the hub (it )?is hf:"

CASES = [
    *(Case(f"config: {name}", plan_of(config(**changes)), [says, "model_name_or_path|expert"]) for name, changes, says in CONFIGS),
    *(Case(f"code: {name}", plan_of(change), [CODE, says]) for name, change, says in SAYS_CODE),
    *(Case(f"folder: {name}", (plan_of if number < 23 else evaluate)(change), says) for number, (name, change, says) in enumerate(FILES)),
    *(
        Case(f"weights: {name}", evaluate(change), says, never=["weights_only"], may_change=["store", "store/*"])
        for name, change, says in WEIGHTS
    ),
    *(Case(f"units: {name}", assets(change, *(PLAN, TRANSCRIBE)[n % 2]), says) for n, (name, change, says) in enumerate(UNITS)),
    *(Case(f"centroids: {name}", assets(change, *TRANSCRIBE), says) for name, change, says in KMEANS),
    *(Case(f"vocoder: {name}", assets(change, *SYNTHESIZE), says) for name, change, says in VOCODERS),
    *(Case(f"checkpoint: {name}", stored(change), [says, "damaged"], may_change=["runs/store*"]) for name, change, says in CHECKPOINTS),
    # The audio range of config.json and the tokenizer's units, in every command.
    *(
        Case(f"audio range: {name}", make(change), r"audio tokens .* by its config.json, and by its tokenizer", may_change=may)
        for name, make, change, may in (
            ("train", plan_of, reserve_in_range, ()),
            ("train, of the original vocabulary", plan_of, config(first_audio_token=100002, last_audio_token=100503), ()),
            ("train, half of it", plan_of, config(last_audio_token=700), ()),
            ("train, all of the vocabulary", plan_of, config(first_audio_token=0), ()),
            ("evaluate", evaluate, reserve_in_range, ()),
            ("transcribe", transcribe, reserve_in_range, ()),
        )
    ),
    Case(
        "audio range: export", stored(config(first_audio_token=290), "export", "--checkpoint", "STEP", "--output", "x"), "audio tokens 290"
    ),
    Case("too few embeddings", plan_of(config(vocab_size=600)), "ids up to .* 600 embeddings"),
    # Names.
    Case("name: a missing folder", named("models/most"), ["model_name_or_path = 'models/most'", HUB]),
    Case("name: one word", named("most"), HUB),
    Case("name: a missing path", named("./most"), "model_name_or_path = './most': does not exist"),
    Case("name: of 5,000 letters", named("x" * 5000), HUB),
    Case("name: of the hub without a network", named("hf:owner/none", "init-model", "--from_deepseek", "NAME", "--output", "o"), "fetched"),
    Case("name: hf: of nothing", named("hf:", "init-model", "--from_deepseek", "NAME", "--output", "o"), "cannot be fetched"),
    Case("name: evaluate", named("models/most", "evaluate", "--model", "NAME", "--asr_dirs", "RECORDS", "--output", "e.json"), HUB),
    Case("name: from_deepseek", named("deepseek-ai/DeepSeek", "init-model", "--from_deepseek", "NAME", "--output", "o"), HUB),
    Case("name: a file", named("c.yaml"), "is a file, not a folder"),
    # Conversion.
    Case("from_deepseek: kernels of the hub", deepseek(config(attn_implementation="owner/repo")), CODE),
    Case("from_deepseek: no heads", deepseek(config(num_attention_heads=0)), "num_attention_heads"),
    Case("from_deepseek: generation of text", deepseek(values("generation_config.json", temperature="hot")), "generation_config"),
    Case("from_deepseek: units elsewhere", deepseek(tokenizer(_markers_first)), "audio tokens|one run of ids"),
    Case("from_deepseek: only pickled", deepseek(pickled), "is not read"),
    Case("from_deepseek: not a tokenizer", deepseek(content("tokenizer.json", "{}")), "no usable tokenizer"),
    # Encoders, recognisers and vocoders of the library.
    Case("encoder: no folder", encoder(lambda folder: shutil.rmtree(folder)), "features = 'e': " + HUB[:20]),
    Case("encoder: no config.json", encoder(without("config.json")), "holds no encoder"),
    Case("encoder: config.json is deep", encoder(content("config.json", DEEP)), "config.json that cannot be read"),
    Case("encoder: kernels of the hub", encoder(config(attn_implementation="owner/repo")), CODE),
    Case("encoder: a billion layers", encoder(config(num_hidden_layers=10**9)), "num_hidden_layers is 1000000000"),
    Case("encoder: sizes as text", encoder(config(hidden_size="16")), "features"),
    Case("encoder: weights of another model", encoder(lambda _: None), "missing weights"),
    Case("encoder: weights are cut off", encoder(content("model.safetensors", b"\x10")), "no weights that can be loaded"),
    Case("encoder: its own code", encoder(config(model_type="own", auto_map={"AutoConfig": "own.Own"})), "features", check=_is_untouched),
    Case("recogniser: no folder", recogniser(lambda folder: shutil.rmtree(folder)), "recogniser"),
    Case("recogniser: kernels of the hub", recogniser(config(attn_implementation="owner/repo")), CODE),
    Case("recogniser: only pickled", recogniser(pickled), "is not read"),
    Case("recogniser: of nothing", recogniser(content("config.json", "{}")), "is not a usable recogniser"),
    Case("recogniser: a tokenizer that is cut off", recogniser(content("tokenizer.json", "{")), "is not a usable recogniser"),
    Case("seamless: not one", seamless(config(model_type="bert")), "is a bert"),
    Case("seamless: sizes as text", seamless(config(vocoder_num_spkrs="two")), "cannot be opened"),
    Case("seamless: no tensors", seamless(lambda _: None), "does not hold the vocoder's tensors"),
    Case(
        "seamless: languages as a list", seamless(content("generation_config.json", '{"vocoder_lang_code_to_id": [1]}')), "table of numbers"
    ),
]
