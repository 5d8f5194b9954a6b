"""The harness of code in fresh processes."""

from __future__ import annotations

import signal

import pytest

from tests.support.fresh import FreshPython


def test_a_process_is_fresh_and_says_how_it_ended(fresh_python: FreshPython, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_LATER", "yes")
    code = "import os, sys; print(sys.argv[1:], os.environ['SET_LATER'], os.environ['MORE'], 'transformers' in sys.modules)"
    done = fresh_python.run(code, "a", "b", MORE="too")
    assert (done.returncode, done.stdout, done.stderr) == (0, "['a', 'b'] yes too False\n", "")
    assert fresh_python.run("import sys; sys.exit(3)").returncode == 3 and fresh_python.run("raise SystemExit").returncode == 0
    failed = fresh_python.run("import sys; sys.exit('a reason')")
    assert (failed.returncode, failed.stderr) == (1, "a reason\n")
    assert "ZeroDivisionError" in fresh_python.run("1 / 0").stderr


def test_what_hangs_is_ended(fresh_python: FreshPython) -> None:
    assert fresh_python.run("import signal; signal.pause()", deadline=1).returncode == -signal.SIGALRM
    assert fresh_python.run("print(1)").stdout == "1\n"
