"""Which names of torch, transformers and Ray the product leans on, and how they are to be called.

A release may reorder a function's parameters, or rename those of a method that a subclass overrides: nothing fails at import, and what
fails later says little. So the sources are read for what they subclass, decorate with and call with positional arguments, and the
signatures of these names are kept in library_signatures.json; a name may have several, of several releases.

    python -m tests.support.library_names     # add the installed releases' signatures, after having looked at each use of what has changed
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT = Path(__file__).with_name("library_signatures.json")
OWN = "most_ray"
LIBRARIES = ("torch", "transformers", "ray")
RENEW = "run python -m tests.support.library_names"
# Methods of objects that a library hands out, whose they are cannot be read from the sources; those with a common name by the object's.
METHODS = {
    "_allgather_base": ("torch.distributed.ProcessGroup",),
    "_reduce_scatter_base": ("torch.distributed.ProcessGroup",),
    "_split_tensor": ("torch.distributed.tensor.Shard",),
    "add_tokens": ("transformers.PreTrainedTokenizerFast",),
    "alltoall_base": ("torch.distributed.ProcessGroup",),
    "execute": ("ray.train.v2._internal.execution.worker_group.WorkerGroup",),
    "execute_single": ("ray.train.v2._internal.execution.worker_group.WorkerGroup",),
    "execute_single_async": ("ray.train.v2._internal.execution.worker_group.WorkerGroup",),
    "get_job_logs": ("ray.job_submission.JobSubmissionClient",),
    "get_submodule": ("torch.nn.Module",),
    "install_forward": ("transformers.distributed.expert_parallel.EpDispatchExpertsParallel",),
    "load_state_dict": ("torch.nn.Module",),
    "map_batches": ("ray.data.Dataset",),
    "register_forward_hook": ("torch.nn.Module",),
    "register_step_pre_hook": ("torch.optim.Optimizer",),
    "reorder_cache": ("transformers.DynamicCache",),
    "resize_token_embeddings": ("transformers.PreTrainedModel",),
    "save_pretrained": ("transformers.PreTrainedModel", "transformers.PreTrainedTokenizerFast"),
    "tail_job_logs": ("ray.job_submission.JobSubmissionClient",),
    "tokenizer.decode": ("transformers.PreTrainedTokenizerFast",),
}


def sources() -> list[Path]:
    return sorted([*(ROOT / "most_ray").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])


@dataclass
class _Class:
    """A class of the product: the dotted names of its bases, its methods and the line of each."""

    bases: list[str]
    methods: dict[str, int]
    place: str


class _Reader(ast.NodeVisitor):
    """What one file leans on: dotted names that are called, decorated with or handed on, and where; and its classes by dotted name."""

    def __init__(self, module: str, place: str) -> None:
        self.module, self.place = module, place
        self.aliases: dict[str, str] = {}
        self.called: dict[str, list[str]] = defaultdict(list)
        self.classes: dict[str, _Class] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for each in node.names:
            first = each.name.split(".")[0]
            if first in (*LIBRARIES, OWN):
                self.aliases[each.asname or first] = each.name if each.asname else first

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and node.module and node.module.split(".")[0] in (*LIBRARIES, OWN):
            for each in node.names:
                self.aliases[each.asname or each.name] = f"{node.module}.{each.name}"

    def visit_Assign(self, node: ast.Assign) -> None:
        """`Base = nn.Linear`."""
        name = self.dotted(node.value) if isinstance(node.value, ast.Name | ast.Attribute) else None
        if name and isinstance(node.targets[0], ast.Name):
            self.aliases.setdefault(node.targets[0].id, name)
        self.generic_visit(node)

    def dotted(self, node: ast.expr) -> str | None:
        """The dotted name that an expression is, as it is imported, or of a class of this file's."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        return ".".join([self.aliases.get(node.id, f"{self.module}.{node.id}"), *reversed(parts)])

    def uses(self, node: ast.expr, line: int) -> None:
        name = self.dotted(node)
        if name and name.split(".")[0] in LIBRARIES:
            self.called[name].append(f"{self.place}:{line}")

    def visit_Call(self, node: ast.Call) -> None:
        if node.args:
            self.uses(node.func, node.lineno)
            if isinstance(node.func, ast.Attribute):
                receiver = ast.unparse(node.func.value).split(".")[-1].lstrip("_")
                for owner in METHODS.get(node.func.attr, METHODS.get(f"{receiver}.{node.func.attr}", ())):
                    self.called[f"{owner}.{node.func.attr}"].append(f"{self.place}:{node.lineno}")
        for handed in (*node.args, *(keyword.value for keyword in node.keywords)):
            name = self.dotted(handed)  # a function that is handed on is called by somebody else
            if name and name.split(".")[0] in LIBRARIES and inspect.isroutine(_or_none(name)):
                self.uses(handed, node.lineno)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        for decorator in node.decorator_list:
            self.uses(decorator, decorator.lineno)
        self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - ast's name

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [self.dotted(base.value if isinstance(base, ast.Subscript) else base) for base in node.bases]
        functions = [statement for statement in node.body if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)]
        methods = {"__init__": node.lineno} | {function.name: function.lineno for function in functions}
        self.classes[f"{self.module}.{node.name}"] = _Class([base for base in bases if base], methods, self.place)
        self.visit_FunctionDef(node)


def leaned_on(files: Iterable[Path], kept: Container[str] = ()) -> dict[str, list[str]]:
    """Name as the library's documentation has it (module and name, or class and method) -> where it is used, as file:line. Methods of
    subclasses, and of theirs, that the installed base class has too, or that are in `kept`."""
    found: dict[str, list[str]] = defaultdict(list)
    classes: dict[str, _Class] = {}
    for path in files:
        relative = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        reader = _Reader(".".join(relative.with_suffix("").parts).removesuffix(".__init__"), relative.as_posix())
        # Names first: a function may be read before the import at the file's end, or inside another.
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                reader.visit(node)
        reader.visit(tree)
        classes |= reader.classes
        for name, places in reader.called.items():
            found[name] += places
    for each in classes.values():
        for base in _library_bases(each, classes):
            for method, line in each.methods.items():
                if f"{base}.{method}" in kept or method == "__init__" or _declared(base, method):
                    found[f"{base}.{method}"].append(f"{each.place}:{line}")
    return dict(found)


def _library_bases(each: _Class, classes: dict[str, _Class]) -> Iterator[str]:
    for base in each.bases:
        if base.split(".")[0] in LIBRARIES:
            yield base
        elif base in classes:
            yield from _library_bases(classes[base], classes)


def _or_none(name: str) -> Any:
    try:
        return resolve(name)
    except LookupError:
        return None


def _declared(base: str, method: str) -> bool:
    """Whether the class has it of its own or from a class of the libraries."""
    return any(method in vars(each) for each in getattr(_or_none(base), "__mro__", ()) if each.__module__.split(".")[0] in LIBRARIES)


def release_of(name: str) -> str:
    """The installed release of the library that a name is from, as `torch 2.13.0`."""
    library = name.split(".")[0]
    return f"{library} {version(library).partition('+')[0]}"


def resolve(name: str) -> Any:
    """The object that a dotted name is.

    Raises:
        LookupError: there is none.
    """
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[cut:]:
                found = getattr(found, part)
        except AttributeError:
            break
        return found
    raise LookupError(name)


def signature(name: str) -> str:
    """How a name is called: its parameters in order, `=` behind those with a default; of builtins, what their documentation begins with;
    where there is no such name, that this release has none."""
    try:
        found = resolve(name)
    except LookupError:
        return f"none in {release_of(name)}"
    # Builtins first by their documentation: which of them inspect knows, and by what names, differs from Python to Python.
    first = next((line.strip() for line in (found.__doc__ or "").splitlines() if line.strip()), "")
    told = re.sub(r"\s*->.*| at 0x[0-9a-f]+", "", first) if first.startswith(f"{name.split('.')[-1]}(") else None
    if told and inspect.isbuiltin(found):
        return told
    try:
        parameters = inspect.signature(found).parameters.values()
    except (ValueError, TypeError):
        return told or "builtin"
    return f"({', '.join(_parameters(parameters))})"


def _parameters(parameters: Iterable[inspect.Parameter]) -> Iterator[str]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    last = None
    for each in parameters:
        if last == inspect.Parameter.POSITIONAL_ONLY != each.kind:
            yield "/"
        if each.kind == inspect.Parameter.KEYWORD_ONLY and last not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY):
            yield "*"
        yield stars.get(each.kind, "") + each.name + ("=" if each.default is not inspect.Parameter.empty else "")
        last = each.kind


def changes(used: dict[str, list[str]], kept: dict[str, list[str]]) -> list[str]:
    """A sentence for each name that the installed releases have otherwise than any release so far, or not at all; or that is in one of the
    two lists alone."""
    sentences = []
    for name, places in sorted(used.items()):
        now, where = signature(name), f"{', '.join(places[:3])}{f' and {len(places) - 3} more' if len(places) > 3 else ''}"
        if name not in kept:
            sentences.append(f"{name} is used in {where} and is not in {KEPT.name}: {RENEW}.")
        elif now not in kept[name]:
            was = " or ".join(each for each in kept[name] if not each.startswith("none in "))
            has = "has no such name" if now.startswith("none in ") else f"takes {now}"
            sentences.append(f"{release_of(name)} {has}, where {name} took {was}: look at its use in {where}, then {RENEW}.")
    unused = sorted(set(kept) - set(used))
    return sentences + [f"{name} is in {KEPT.name} and is not used any more: {RENEW}." for name in unused]


def read_kept() -> dict[str, list[str]]:
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}


def main() -> None:
    kept = read_kept()
    used = leaned_on(sources(), kept)
    for line in changes(used, kept):
        print(line, file=sys.stderr)
    table = {name: sorted({*kept.get(name, []), signature(name)}) for name in sorted(used)}
    KEPT.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
