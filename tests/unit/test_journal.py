from __future__ import annotations

from pathlib import Path

from most_ray.train.journal import Journal, read_journal


def test_a_restart_leaves_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    journal = Journal(path, 0)
    for step in range(1, 8):
        journal.write({"step": step, "attempt": 1})
    journal.close()
    with path.open("ab") as stream:
        stream.write(b'{"step": 8, "att')  # the driver was killed here
    journal = Journal(path, 5)
    for step in range(6, 10):
        journal.write({"step": step, "attempt": 2})
    journal.close()
    assert [(line["step"], line["attempt"]) for line in read_journal(path)] == [
        *((s, 1) for s in range(1, 6)),
        *((s, 2) for s in range(6, 10)),
    ]


def test_lines_that_come_out_of_order_are_filtered(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "e.jsonl", 0, ordered=False)
    for step in (20, 10, 30):
        journal.write({"step": step})
    journal.close()
    Journal(tmp_path / "e.jsonl", 15, ordered=False).close()
    assert read_journal(tmp_path / "e.jsonl") == [{"step": 10}]


def test_a_torn_first_line_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert read_journal(path) == []
    path.write_bytes(b'{"step"')
    Journal(path, 3).close()
    assert path.read_bytes() == b""
