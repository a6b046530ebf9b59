"""Every public function, class and method says in its docstring what it does or is."""

import ast
import importlib
import inspect
from functools import cache
from pathlib import Path

import npo_fast

ROOT = Path(npo_fast.__file__).parent
Definition = ast.FunctionDef | ast.ClassDef


def public(body: list[ast.stmt]) -> list[Definition]:
    definitions = [node for node in body if isinstance(node, Definition)]
    return [node for node in definitions if not node.name.startswith("_")]


@cache
def modules() -> list[tuple[str, ast.Module]]:
    files = [(file, file.relative_to(ROOT).with_suffix("").parts) for file in ROOT.rglob("*.py")]
    return [
        (".".join(p for p in ("npo_fast", *parts) if p != "__init__"), ast.parse(file.read_text()))
        for file, parts in sorted(files)
    ]


def inherits_docstring(module: str, name: str, method: str) -> bool:
    """Whether a base class documents the method."""
    return bool(inspect.getdoc(getattr(getattr(importlib.import_module(module), name), method)))


def test_every_public_function_and_class_has_a_docstring():
    missing = [
        f"{module}.{node.name}"
        for module, tree in modules()
        for node in public(tree.body)
        if not ast.get_docstring(node)
    ]
    assert not missing, "\n".join(missing)


def test_every_public_method_has_a_docstring_or_inherits_one():
    missing = [
        f"{module}.{owner.name}.{node.name}"
        for module, tree in modules()
        for owner in public(tree.body)
        for node in public(owner.body)
        if isinstance(owner, ast.ClassDef)
        if not ast.get_docstring(node) and not inherits_docstring(module, owner.name, node.name)
    ]
    assert not missing, "\n".join(missing)


def test_a_docstring_begins_with_what_the_thing_does():
    """Errors, arguments and results come after it."""
    headings = ("Raises:", "Args:", "Returns:", "Yields:")
    wrong = [
        f"{module}.{node.name}"
        for module, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, Definition)
        if (ast.get_docstring(node) or "").startswith(headings)
    ]
    assert not wrong, "\n".join(wrong)
