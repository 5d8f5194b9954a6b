"""Corpora as utterances. A folder is audio beside transcripts.tsv; published layouts join it here."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from most_ray.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class Utterance:
    """One recording with its text. `columns` holds every column of the transcript's row but path and text."""

    id: str
    path: Path
    text: str
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Condition:
    """`column=value` or `column!=value`; several values, joined by commas, are alternatives."""

    column: str
    values: tuple[str, ...]
    negated: bool

    def holds(self, utterance: Utterance) -> bool:
        return (utterance.columns.get(self.column) in self.values) != self.negated


def parse_condition(text: str) -> Condition:
    """A Condition from the command line.

    Raises:
        ConfigError: it has no `=`.
    """
    name, sign, values = text.partition("=")
    if not sign or not name.rstrip("!"):
        raise ConfigError("where", text, "is not of the form column=value or column!=value.")
    return Condition(name.removesuffix("!"), tuple(values.split(",")), name.endswith("!"))


def read_folder(directory: Path, prefix: str) -> list[Utterance]:
    """Utterances of a folder's transcripts.tsv (header with path and text, any further columns), ids `prefix_stem`.

    Raises:
        DataError: the folder or the table is missing, a column or a cell is missing, or two recordings would get one id.
    """
    table = directory / "transcripts.tsv"
    if not directory.is_dir():
        raise DataError("input", str(directory), "does not exist.", "Check the path.")
    if not table.is_file():
        raise DataError("input", str(directory), "holds no transcripts.tsv.", "Write one with the columns path and text, tab-separated.")
    try:
        table.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError("transcripts.tsv", str(table), f"is not UTF-8 at byte {error.start}.") from error
    utterances: dict[str, Utterance] = {}
    with table.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        for column in ("path", "text"):
            if column not in (reader.fieldnames or ()):
                raise DataError("transcripts.tsv", str(table), f"has no column {column!r}.", nearest(column, reader.fieldnames or ()))
        for line, row in enumerate(reader, start=2):
            if not (row["path"] or "").strip() or not (row["text"] or "").strip():
                raise DataError("transcripts.tsv", f"{table}:{line}", "has no path or no text.")
            columns = {key: value for key, value in row.items() if key not in ("path", "text", None) and value is not None}
            name = "_".join((prefix, *Path(row["path"]).with_suffix("").parts[-1:]))
            if name in utterances:
                raise DataError("transcripts.tsv", f"{table}:{line}", f"gives the id {name!r} a second time.", "File names must differ.")
            utterances[name] = Utterance(name, directory / row["path"], row["text"].strip(), columns)
    if not utterances:
        raise DataError("transcripts.tsv", str(table), "has no rows.")
    return list(utterances.values())


def select(utterances: Sequence[Utterance], conditions: Sequence[Condition]) -> list[Utterance]:
    """Those for which every condition holds.

    Raises:
        ConfigError: a condition names an unknown column, or nothing is left.
    """
    columns = set(utterances[0].columns) if utterances else set()
    for condition in conditions:
        if condition.column not in columns:
            raise ConfigError("where", condition.column, "is no column of the transcripts.", nearest(condition.column, columns))
    chosen = [utterance for utterance in utterances if all(condition.holds(utterance) for condition in conditions)]
    if not chosen:
        raise ConfigError("where", [f"{c.column}{'!' * c.negated}={','.join(c.values)}" for c in conditions], "leaves no recording.")
    return chosen
