"""Numbers and their nouns agree wherever text is shown: one function counts, and no text of the product writes `{number} files` itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from most_ray.errors import count_of
from tests.conftest import ROOT

NOUNS = (
    "actors|bytes|centroids|channels|checkpoints|columns|conversions|cores|CPUs|digits|directories|embeddings|entries|evaluations|experts|"
    "features|files|folders|frames|GPUs|jobs|keys|lines|nodes|parameters|positions|processes|ranks|recordings|records|rows|runs|sources|"
    "speakers|steps|tasks|tensors|threads|tokens|transcriptions|trials|units|utterances|values|voices|weights|words|workers"
)
# A number and a noun of several, with at most one word between them.
COUNTED = re.compile(rf" (?:[\w-]+ )?(?:{NOUNS})\b")
# What is no number, or is never 1: names, constants of the program, means and measures, and numbers that are several where they are shown.
NO_COUNT = re.compile(
    r"_?[A-Z][A-Z_0-9]*$|(what|which|name|task|modality|kind|options\.scheduler|recipe\.task|store\.task|unit|suffix)$|.*_(task|per_second)"
    r"|.*(tokens_per_second|mean_tokens|'tokens')"
)
SEVERAL = {  # (file, expression) -> why it is more than 1, or no count
    ("cli/from_audio.py", "held"): "recordings of several speakers",
    ("console/run_screens.py", "tokens / max(1, job.total_steps)"): "a mean",
    ("console/run_screens.py", "most.world_size"): "the end of a range",
    ("data/mixture.py", "len(lengths)"): "of one, one weight would not be wrong",
    ("io/storage.py", "most"): "a limit",
    ("io/storage.py", "size"): "what has come of a large file",
    ("report/run_tables.py", "run.totals.tokens"): "all that were trained on",
    ("report/sweep_tables.py", "of"): "a text",
    ("service/preflight/checks.py", "most"): "those kept and the one being written",
    ("data/ingest.py", "len(item.input_ids)"): "a record that is too long; the reason is stored",
    ("evaluation/hypotheses.py", "section['rejected']"): "stored",
    ("io/json_stream.py", "source.offset - begin"): "stored",
    ("metrics/schema.py", "records"): "a name",
    ("metrics/notes.py", "figures.get('records', 0)"): "all records of a set",
    ("planner/screen.py", "run.tokens"): "a mean",
    ("planner/screen.py", "run.packs"): "a mean",
    ("report/cards.py", "size"): "a vocabulary's",
    ("service/cluster/jobs.py", "len(under_way)"): "shown where it is above 1",
}


def texts() -> Iterator[tuple[str, int, str, str]]:
    """Every value in a text that a noun of several follows: file, line, expression, and what follows."""
    for path in sorted((ROOT / "most_ray").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for value, after in zip(node.values, node.values[1:], strict=False) if isinstance(node, ast.JoinedStr) else ():
                if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant) and COUNTED.match(str(after.value)):
                    where = path.relative_to(ROOT / "most_ray").as_posix()
                    yield where, node.lineno, ast.unparse(value.value), str(after.value)[:30]


def test_no_text_counts_by_itself() -> None:
    wrong = [
        f"{file}:{line}: {{{value}}}{after}"
        for file, line, value, after in texts()
        if not NO_COUNT.match(value) and (file, value) not in SEVERAL and "count_of" not in value
    ]
    assert not wrong, "use errors.count_of:\n" + "\n".join(wrong)


def test_every_exception_is_still_there() -> None:
    assert {(file, value) for file, _, value, _ in texts()} >= SEVERAL.keys() - {("cli/from_audio.py", "held")}


@pytest.mark.parametrize(
    ("number", "what", "shown"),
    [
        (1, "file", "1 file"),
        (2, "file", "2 files"),
        (0, "entry", "0 entries"),
        (1, "entry", "1 entry"),
        (2, "key", "2 keys"),
        (2, "forward pass", "2 forward passes"),
        (12345, "TTS record", "12,345 TTS records"),
        (1.0, "GPU", "1 GPU"),
        (0.5, "GPU", "0.5 GPUs"),
    ],
)
def test_a_number_and_its_noun_agree(number: float, what: str, shown: str) -> None:
    assert count_of(number, what) == shown


def test_the_scan_finds_what_it_is_for(tmp_path: Path) -> None:
    for text, found in (("{n} files", True), ("{n} bad records", True), ("{n} of 5 records", False), ("{n} filed", False)):
        node = ast.parse(f'f"{text}"', mode="eval").body
        assert isinstance(node, ast.JoinedStr)
        assert bool(COUNTED.match(str(getattr(node.values[1], "value", "")))) == found, text
