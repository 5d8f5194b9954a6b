"""Ingest: records a second on one core, from JSON on disk to a token store on disk, against how the original MoST makes tokens.

The original (`json.load` of a list, then the Hugging Face tokenizer on each record's text with its units spelled out) does it in every
run and writes nothing; ours reads, checks, tokenises, checksums and writes.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import pstats
import re
import statistics
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.data.ingest import Part, Recipe, build_part
from most_ray.records.batch_tokenizer import _word_cache
from most_ray.records.record import ASR_INSTRUCTION, Record, units_to_text
from most_ray.records.template import template_texts
from most_ray.records.tokenizer import train_tokenizer, vocabulary_of
from tests.benchmarks import common

TOKENS = 820  # of a record: 14 seconds at 50 units a second, and its words
VOCABULARY = 4000
RARE, POOL = 0.2, 100_000  # share of the words that come from a long tail: 150,000 words of English hold some 13,000 distinct ones


def real_speech() -> tuple[np.ndarray, list[list[str]]]:
    """Units of speech in one run, and transcripts as words: real ones where they are there."""
    path = common.SHARED / "data" / "librispeech_units" / "train_instructions.json"
    if path.exists():
        records = json.loads(path.read_text(encoding="utf-8"))
        units = [int(unit) for record in records for unit in re.findall(r"\d+", record["input"])]
        return np.array(units), [record["output"].split() for record in records]
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("ETAOINSHRDLU"), rng.integers(1, 10))) for _ in range(1800)]
    common_first = 1 / np.arange(1, len(words) + 1)
    transcripts = [list(rng.choice(words, 48, p=common_first / common_first.sum())) for _ in range(100)]
    return np.repeat(rng.integers(0, 500, 43_000), rng.geometric(0.61, 43_000)), transcripts


@cache
def _halves(number: int, n: int) -> tuple[int, int]:
    one, other = np.random.default_rng(number).integers(n, size=2)
    return int(one), int(other)


def tail_word(number: int, words: list[str]) -> str:
    """A word that the 100 transcripts do not hold: halves of two of theirs."""
    one, other = (words[index] for index in _halves(number, len(words)))
    return one[: 1 + len(one) // 2] + other[len(other) // 2 :] + "SDEY"[number % 4]


def make_records(n: int, seed: int, tokens_of: Callable[[str], int]) -> list[dict[str, Any]]:
    """Distinct ASR records of about `TOKENS` tokens: a stretch of the units, and a transcript in another order with some new words."""
    units, transcripts = real_speech()
    endless = np.concatenate([units, units[:TOKENS]])
    pool = sorted({word for words in transcripts for word in words})
    rng = np.random.default_rng(seed)
    records = []
    for index in range(n):
        words = [str(word) for word in rng.permutation(transcripts[index % len(transcripts)])]
        for uri in np.flatnonzero(rng.random(len(words)) < RARE):
            words[uri] = tail_word(int(POOL ** rng.random()), pool)  # G. Zipf's law: the k-th word comes 1/k as often as the first
        output = " ".join(words)
        n_units = TOKENS - 22 - tokens_of(output)
        start = int(rng.integers(len(units)))
        records.append(
            {
                "id": f"librispeech_{index:06d}",
                "instruction": ASR_INSTRUCTION,
                "input": units_to_text(endless[start : start + n_units].tolist()),
                "output": output,
                "metadata": {"speaker_id": index % 251, "split": "train-clean-100", "unit_rate_hz": 50, "deduplicated": False},
            }
        )
    return records


class Bench:
    """The same records as two files, and the ways to make tokens of them."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.n = folder, n
        texts = (" ".join(words) for words in real_speech()[1])
        spelled = (template_texts(Record("", ASR_INSTRUCTION, np.zeros(1, np.int32), text)) for text in texts)
        self.tokenizer = train_tokenizer(itertools.chain.from_iterable(spelled), VOCABULARY)
        earlier, records = (make_records(n, seed, lambda text: len(self.tokenizer(text)["input_ids"])) for seed in (1, 2))
        self.earlier, self.lines, self.list = (folder / name for name in ("earlier.jsonl", "records.jsonl", "records.json"))
        self.earlier.write_text("".join(json.dumps(record) + "\n" for record in earlier), encoding="utf-8")
        self.lines.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        self.list.write_text(json.dumps(records, indent=2), encoding="utf-8")
        self.megabytes = self.lines.stat().st_size / 1e6
        self.words = len({word for record in records for word in record["output"].split()})
        self._number = 0

    def ours(self, file: Path) -> Callable[[], None]:
        """Ours, in a process that knows no word yet."""
        _word_cache.cache_clear()
        return self._part(file, Recipe("asr", vocabulary_of(self.tokenizer), 2048, "reject"))

    def later(self) -> Callable[[], None]:
        """The lines as the part behind another one that the same process has made: their common words are known."""
        _word_cache.cache_clear()
        recipe = Recipe("asr", vocabulary_of(self.tokenizer), 2048, "reject")
        self._part(self.earlier, recipe)()
        return self._part(self.lines, recipe)

    def known(self) -> Callable[[], None]:
        """The lines once more in a process that has made them before: what a large directory comes close to in the end."""
        self.ours(self.lines)()
        return self._part(self.lines, Recipe("asr", vocabulary_of(self.tokenizer), 2048, "reject"))

    def _part(self, file: Path, recipe: Recipe) -> Callable[[], None]:
        self._number += 1
        uri = self.folder / "store" / "parts" / f"{self._number}"
        part = Part(str(file), 0, None, uri.name, str(uri), file.stat().st_size)
        return lambda: build_part(part, recipe)

    def tokens(self) -> float:
        """Tokens of a record, and a check that all of them have come through."""
        content = json.loads((self.folder / "store" / "parts" / f"{self._number}" / "part.json").read_bytes())
        assert content["n_records"] == self.n and content["n_rejected"] == 0, content
        return float(content["n_tokens"] / self.n)

    def original(self) -> list[np.ndarray]:
        with self.list.open(encoding="utf-8") as stream:
            records = json.load(stream)
        made = []
        for record in records:
            text = f"User: {record['instruction']}\n{record['input']}\n\nAssistant: {record['output']}"
            made.append(np.array(self.tokenizer(text)["input_ids"], np.int32))
        return made


def profile(bench: Bench) -> None:
    bench.ours(bench.lines)()
    profiler = cProfile.Profile()
    profiler.runcall(bench.ours(bench.lines))
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def figures_of(bench: Bench, took: dict[str, list[common.Took]], tokens: float) -> dict[str, float]:
    rate = {name: bench.n / min(t.wall for t in all_) for name, all_ in took.items()}
    cpu = {name: statistics.median(t.cpu for t in all_) for name, all_ in took.items()}
    return {
        **{f"records_per_s_{name}": value for name, value in rate.items()},
        **{f"records_per_cpu_s_{name}": bench.n / value for name, value in cpu.items()},
        "mb_per_s_lines": bench.megabytes / bench.n * rate["lines"],
        "tokens_per_record": tokens,
        "ratio_original": rate["lines"] / rate["original"],
        "ratio_original_list": rate["list"] / rate["original"],
        "ratio_original_later": rate["later_lines"] / rate["original"],
        "ratio_original_known": rate["known_lines"] / rate["original"],
        "ratio_original_cpu": cpu["original"] / cpu["lines"],
        "ratio_original_list_cpu": cpu["original"] / cpu["list"],
        "records": bench.n,
        "distinct_words": bench.words,
        **{f"noise_{name}": common.spread([t.wall for t in all_]) for name, all_ in took.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="most_ray-bench-") as folder:
        bench = Bench(Path(folder), arguments.records)
        if arguments.profile:
            profile(bench)
            return
        ways = {
            "lines": lambda: bench.ours(bench.lines),
            "later_lines": bench.later,
            "known_lines": bench.known,
            "list": lambda: bench.ours(bench.list),
            "original": lambda: bench.original,
        }
        took = common.repeat(ways, arguments.rounds)
        figures = figures_of(bench, took, bench.tokens())
    rows = []
    for name in ways:
        rate, cpu = figures[f"records_per_s_{name}"], figures[f"records_per_cpu_s_{name}"]
        rows.append([name, rate, bench.megabytes / bench.n * rate, 1e6 / rate, cpu, figures[f"noise_{name}"]])
    common.show(
        f"Ingest on one core: {bench.n:,} records of {figures['tokens_per_record']:.0f} tokens",
        ["way", "records/s", "MB/s", "µs a record", "records / s of CPU (median)", "median over best - 1"],
        rows,
        [
            f"Ratio to the original: {figures['ratio_original']:.1f} (lines), {figures['ratio_original_later']:.1f} (later lines), "
            f"{figures['ratio_original_known']:.1f} (known lines), "
            f"{figures['ratio_original_list']:.1f} (list), best of {arguments.rounds}; in CPU time "
            f"{figures['ratio_original_cpu']:.1f} (lines), {figures['ratio_original_list_cpu']:.1f} (list). MB of the lines file.",
            f"Byte-level BPE of {VOCABULARY:,} trained on the transcripts, units added; {bench.words:,} distinct words, none known at "
            "the start. Later lines: behind a part of as many other records; known lines: behind one that holds all their words.",
        ],
    )
    common.write("ingest", figures)


if __name__ == "__main__":
    main()
