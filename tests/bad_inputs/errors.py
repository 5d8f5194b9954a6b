"""What stands in errors: one line, of bounded length, without control characters and credentials."""

from __future__ import annotations

from tests.bad_inputs.harness import Case
from tests.bad_inputs.inputs import plan, run_yaml

CASES = [
    Case("escape in a key", plan(lambda: run_yaml() + '"\\e]0;pwn\\a\\e[31mred": 2\n'), r"\\x1b\]0;pwn"),
    Case("lines in a key", plan(lambda: run_yaml() + '"a\\nmost-ray: all is well": 2\n'), r"is no known flag"),
    Case("credentials in an address", plan(lambda: run_yaml(), "--output_dir", "foo://user:sekret@x"), "output_dir|path", never=["sekret"]),
]
