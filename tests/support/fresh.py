"""Python code in processes of its own that have neither most_ray, transformers, Ray nor pytest: what an import does there.

Each is forked from one that has loaded torch and other large libraries once: starting anew would take most of such a test's time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SERVER = """
import json, os, signal, sys, traceback
import torch, torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor, torch.optim
import scipy.optimize, scipy.stats, numpy, safetensors, tokenizers, yaml, regex
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.clear()
        os.environ.update(job["environment"])
        sys.argv[1:] = job["arguments"]
        signal.alarm(job["deadline"])
        code = 0
        try:
            exec(compile(job["code"], "<test>", "exec"), {"__name__": "__main__"})
        except SystemExit as error:
            code = error.code if isinstance(error.code, int | None) else 1
            if code and not isinstance(error.code, int):
                print(error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


class FreshPython:
    """`folder`: where what the processes say is kept; `directory`: where they run."""

    def __init__(self, folder: Path, directory: Path) -> None:
        self._folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # read as torch loads
        self._server: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=directory, env=environment
        )

    def run(self, code: str, *arguments: str, deadline: int = 120, **environment: str) -> Ended:
        """Run the code as a script's, with these arguments and, beside this process's, these environment variables; ended by SIGALRM
        after `deadline` seconds."""
        out, err = self._folder / "out", self._folder / "err"
        job: dict[str, Any] = {"code": code, "arguments": arguments, "out": str(out), "err": str(err), "deadline": deadline}
        job["environment"] = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        assert self._server.stdin and self._server.stdout and self._server.poll() is None, "the process that forks has ended"
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        code_of = self._server.stdout.readline()
        assert code_of, "the process that forks has ended"
        return Ended(int(code_of), out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))

    def close(self) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
