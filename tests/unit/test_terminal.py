"""What reaches a screen: no markup of data, no escapes, no credentials; and streams that are closed, full, or of another encoding."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.progress import TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from most_ray.cli import main
from most_ray.console.library_log import LibraryLog
from most_ray.console.terminal import LogFormatter, Terminal, print_line, progress_bar, say, table_lines, write_log
from tests.conftest import ROOT
from tests.support.terminals import TerminalCommand

HOSTILE = "[/b]\x1b]52;c;cm0=\x07\x9b31m\u202e s3://user:sekret@bucket/x :smile: \udcff"
WORDS = Path(sys.executable).with_name("most-ray")


def check(text: str) -> None:
    assert "[/b]" in text and ":smile:" in text and r"\x1b]52" in text and "sekret" not in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\udc80-\udcff]", text)


def test_a_terminal_shows_data_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    sink = io.StringIO()
    console = Terminal(file=sink, width=300)
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    for what in (table, HOSTILE):
        console.print(what)
    print_line(console, HOSTILE)
    text = sink.getvalue()
    check(text)
    assert text.count("[/b]") == 6
    say(HOSTILE)
    say(HOSTILE, sys.stderr)
    for stream in capsys.readouterr():
        check(stream)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def sample_table() -> Table:
    table = Table("set", "", Column("WER", justify="right"), title="Word error rate")
    table.add_row("asr/takes", Text("ok", "green"), "2.50%")
    table.add_section()
    table.add_row("asr/a set of a long name", "", "-")
    return table


def test_tables_in_a_log_name_what_each_figure_is() -> None:
    """Ray's log viewer makes one blank of several, at the beginning of a line none, and does not break lines."""
    sink = io.StringIO()
    console = Terminal(40, file=sink)
    console.print(sample_table())
    console.print("one", "line")
    assert sink.getvalue().splitlines() == [
        "Word error rate",
        "- set: asr/takes | ok | WER: 2.50%",
        "- set: asr/a set of a long name | WER: -",
        "one line",
    ]


def test_a_row_that_is_wider_than_a_log_goes_on_in_the_next_line() -> None:
    table = Table("check", "finding", "where")
    table.add_row("room", "needs 4 CPU, the cluster has 2, and " + "x" * 50, "\u6570" * 20)
    assert table_lines(table, 40) == [
        "- check: room",
        "  | finding: needs 4 CPU, the cluster",
        "    has 2, and",
        "    " + "x" * 50,  # a path or URI is not cut
        "  | where: " + "\u6570" * 20,
    ]


@pytest.mark.parametrize(
    "options", [{"file": Screen()}, {"file": io.StringIO(), "width": 60}, {"file": io.StringIO(), "force_terminal": True}]
)
def test_tables_on_a_screen_have_frames(options: dict[str, Any]) -> None:
    Terminal(40, **options).print(sample_table())
    assert "\u2502" in options["file"].getvalue()


def test_a_table_in_a_log_shows_data_as_it_is() -> None:
    sink = io.StringIO()
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    Terminal(300, file=sink).print(table, HOSTILE)
    check(sink.getvalue())
    assert sink.getvalue().count("[/b]") == 5


def test_a_progress_bar_shows_data_as_it_is() -> None:
    sink = io.StringIO()
    with progress_bar(Terminal(file=sink, width=300, force_terminal=True), HOSTILE, "{task.fields[x]}", TimeElapsedColumn()) as progress:
        progress.add_task("", x=f"x {HOSTILE}")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sink.getvalue())
    assert "x [/b]" in lines and "\x1b]52" not in lines and "sekret" not in lines


def test_another_processs_log(capsys: pytest.CaptureFixture[str]) -> None:
    write_log("\x1b[36m(worker)\x1b[0m step 1\r\nstep\t2\rstep 3\n")
    assert capsys.readouterr().out == "(worker) step 1\nstep    2\nstep 3\n"
    write_log(HOSTILE)
    check(capsys.readouterr().out)


def test_a_log_line_is_one_line() -> None:
    record = logging.LogRecord("most_ray.x", logging.WARNING, "", 0, "of %s\nmost-ray: done", (HOSTILE,), None)
    text = LogFormatter().format(record)
    check(text)
    assert text.startswith("WARNING most_ray.x: of [/b]") and "\n" not in text


def command(*words: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`most-ray` in a process of its own, by a shell that redirects its streams."""
    code = "import sys; from most_ray.cli import main; sys.exit(main(sys.argv[1:]))"
    script = f'exec "$0" -c "$1" "${{@:2}}" {redirect}'
    return subprocess.run(
        ["bash", "-c", script, sys.executable, code, *words],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("cause", [None, KeyboardInterrupt()])
def test_an_interrupt_that_an_import_has_turned_into_an_error(
    cause: BaseException | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> None:
        raise ImportError("initialization failed") from cause

    monkeypatch.setattr("most_ray.cli.build_parser", load)
    if cause is None:
        with pytest.raises(ImportError):
            main(["plan"])
    else:
        assert main(["plan"]) == 130 and capsys.readouterr().err.startswith("most-ray: interrupted")


def rescore_file(folder: Path, text: str) -> Path:
    about = '{"task": "asr", "records": 1, "rejected": 0, "rejected_file": "x"}'
    first = '{"kind": "settings", "format": 1, "settings": {"normaliser": "none"}, "routing": {"leaked": 0}, '
    first += f'"sets": {{"asr/{text}": {about}}}}}'
    row = f'{{"kind": "hypothesis", "set": "asr/{text}", "task": "asr", "row": 0, "id": "a", "loss": 1.0, "supervised_tokens": 1, '
    row += '"reference": "a", "hypothesis": "b", "ended": true, "looping": false, "foreign": 0}'
    (folder / "h.jsonl").write_text(f"{first}\n{row}\n", encoding="utf-8")
    return folder / "h.jsonl"


@pytest.mark.parametrize("redirect", ["", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full"])
def test_streams_that_are_closed(tmp_path: Path, redirect: str) -> None:
    """The work is done, and what is written does not get into files that are opened at the numbers of closed streams."""
    file, output = rescore_file(tmp_path, "set"), tmp_path / "e.json"
    found = command("evaluate", "--rescore", str(file), "--output", str(output), redirect=redirect)
    assert found.returncode == (2 if "full" in redirect else 0), found
    assert output.read_text().startswith("{") and output.read_text().endswith("}") and b"Traceback" not in found.stderr
    refused = command("evaluate", "--rescore", "nowhere", "--output", str(output), redirect=redirect)
    assert refused.returncode == 2 and b"Traceback" not in refused.stderr


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    code = "from most_ray.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    script = f"{sys.executable} -c '{code}' train --help | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", script], capture_output=True, timeout=60, check=False)
    assert found.stdout in (b"0\n", b"141\n") and found.stderr == b""
    code = (
        "import os, sys; from most_ray.console.streams import open_streams; from most_ray.console.terminal import Terminal;"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1); open_streams(); console = Terminal(80);"
        "[console.print('x' * 70000) for _ in range(3)]; sys.stderr.write('goes on\\n')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert found.returncode == 0 and found.stderr.decode().splitlines() == [
        "nothing more can be shown (Broken pipe); the work continues",
        "goes on",
    ]


@pytest.mark.parametrize(
    "environment", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_a_screen_of_another_encoding(tmp_path: Path, environment: dict[str, str]) -> None:
    file = rescore_file(tmp_path, "données — 日本")
    found = command("evaluate", "--rescore", str(file), "--output", str(tmp_path / "e.json"), **environment)
    assert (found.returncode, found.stderr) == (0, b"") and rb"\u65e5" in found.stdout
    refused = command("evaluate", "--rescore", "日本", "--output", str(tmp_path / "e.json"), **environment)
    assert refused.returncode == 2 and b"Traceback" not in refused.stderr and refused.stderr.count(b"\n") == 1


@pytest.mark.parametrize("module", ["wrapt", "yaml", "rich.console", "most_ray.cli.run_commands"])
def test_an_interrupt_while_the_command_is_loaded(module: str) -> None:
    """At the import of a module, as Ctrl-C in the first second."""
    code = (
        "import sys; sys.argv[0] = 'most-ray'\n"
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        os.kill(os.getpid(), signal.SIGINT) if name == {module!r} else None\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from most_ray.cli import main; sys.exit(main(['train', '--help']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert found.returncode == 128 + signal.SIGINT and found.stdout == b""
    assert found.stderr.decode().startswith("most-ray: interrupted") and found.stderr.count(b"\n") == 1


_SCREEN = """
from rich.table import Table
from most_ray.console.terminal import Terminal, progress_bar
console = Terminal(80)
table = Table("a", title="b")
table.add_row("c", style="red")
console.print(table)
console.print("d", style="bold red")
with progress_bar(console, "e") as bar:
    bar.add_task("e", total=2, completed=1)
"""


@pytest.mark.parametrize(
    ("environment", "terminal", "colours", "escapes"),
    [
        ({}, False, False, False),
        ({"TERM": "xterm-256color"}, True, True, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, True, False, True),
        ({"TERM": "dumb"}, True, False, False),
        ({"FORCE_COLOR": "1", "TERM": "xterm-256color"}, False, True, True),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    environment: dict[str, str], terminal: bool, colours: bool, escapes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        command = TerminalCommand([sys.executable, "-c", _SCREEN], tmp_path, {"PYTHONPATH": str(ROOT), **environment})
        assert command.end(60.0) == 0
        shown = command.shown.decode()
    else:
        words = [sys.executable, "-c", _SCREEN]
        shown = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "d" in shown
    assert bool(re.search(r"\x1b\[[0-9;]*(3[0-8]|9[0-7])[0-9;]*m", shown)) == colours
    assert ("\x1b[" in shown) == escapes


_NOISY = """
import logging, os, sys, warnings
from pathlib import Path
from most_ray.console.library_log import LIBRARIES, divert_native
from most_ray.console.terminal import log_to_stderr
log_to_stderr(logging.WARNING)
logging.getLogger("some.library").error("raw message %s", "x" * 900)
warnings.warn("something will change", FutureWarning)
logging.getLogger("most_ray.x").warning("ours")
if len(sys.argv) > 1:
    divert_native(Path(sys.argv[1]))
os.write(2, b"*** SIGTERM received at time=1 on cpu 0 ***\\n")
sys.stderr.write("the command's own\\n")
logging.getLogger("most_ray.x").warning("ours again")
print(LIBRARIES.close_file(keep=True))
"""


def test_what_libraries_say_goes_to_a_file(tmp_path: Path) -> None:
    log = tmp_path / "libraries.log"
    found = subprocess.run([sys.executable, "-c", _NOISY, str(log)], capture_output=True, text=True, timeout=60, check=True)
    assert found.stderr.splitlines() == ["WARNING most_ray.x: ours", "the command's own", "WARNING most_ray.x: ours again"]
    assert found.stdout.strip() == str(log)
    kept = log.read_text()
    assert all(part in kept for part in ("raw message xxx", "FutureWarning: something will change", "*** SIGTERM received"))


def test_what_libraries_say_is_shown_to_who_debugs(tmp_path: Path) -> None:
    words, log = [sys.executable, "-c", _NOISY], tmp_path / "libraries.log"
    environment = {**os.environ, "MOST_RAY_DEBUG": "1"}
    found = subprocess.run([*words, str(log)], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert all(part in found.stderr for part in ("raw message xxx", "FutureWarning", "*** SIGTERM", "ours again")) and not log.exists()


def test_without_a_run_it_is_kept_in_a_temporary_file(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", _NOISY], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "raw message" not in found.stderr and "raw message" in Path(found.stdout.strip()).read_text()


def test_a_file_in_which_nothing_was_said_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LibraryLog()
    log.write_to(tmp_path / "a.log")
    (tmp_path / "a.log").touch()
    assert log.close_file(keep=True) is None and not (tmp_path / "a.log").exists()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    log.temporary = True
    log.handle(logging.LogRecord("ray", logging.ERROR, "", 0, "lost", (), None))
    log.handle(logging.LogRecord("most_ray.x", logging.ERROR, "", 0, "ours", (), None))
    assert (tmp_path / "a.log").read_text().endswith(" ERROR ray: lost\n")
    assert log.close_file(keep=False) is None and not (tmp_path / "a.log").exists()
