"""Imports point down: each package may use those below it and no other."""

import ast
import graphlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import npo_fast

ROOT = Path(npo_fast.__file__).parent
LAYERS = [  # from the top; packages of one row know nothing of each other
    {"__main__"},
    {"cli"},
    {"experiments"},
    {"bench", "integrations"},
    {"runs"},
    {"attacks", "planner", "reports"},
    {"trainer", "evaluation"},
    {"methods", "modules"},
    {"model"},
    {"losses", "metrics", "data"},
    {"ops"},
    {"kernels"},
    {"distributed"},
    {"watch"},
    {"run_files"},
    {"boundary"},
    {"versions", "tables", "paths", "validation", "locks", "offline"},
    {"errors", "_version", "tracing", "quiet", "suggestions"},
]


def layer_of(package: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if package in row)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(file: Path) -> set[str]:
    """Names of our packages that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(parsed(file)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "npo_fast":
                names = [f"npo_fast.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "npo_fast" and len(parts) > 1:
                found.add(parts[1])
    return found


def test_imports_point_down():
    wrong = []
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        own = parts[0]
        if own == "__init__":
            continue
        for other in imported(file) - {own}:
            known = any(other in row for row in LAYERS)
            if known and layer_of(other) <= layer_of(own):
                wrong.append(f"{file.relative_to(ROOT)} imports {other}")
    assert not wrong, wrong


def test_every_package_has_a_layer():
    packages = {p.relative_to(ROOT).with_suffix("").parts[0] for p in ROOT.rglob("*.py")}
    assert packages - {"__init__"} == set().union(*LAYERS)


def test_no_module_is_longer_than_400_lines():
    long = {f.name: n for f in ROOT.rglob("*.py") if (n := len(f.read_text().splitlines())) > 400}
    assert not long, long


def test_test_modules_share_code_through_the_helpers_alone():
    """A test module that imports from another one cannot be moved or read by itself.

    The fuzzer and the tests of the pages have helpers of their own beside them.
    """
    shared = ("from tests.helpers import", "from tests.fuzz", "from tests.docs")
    wrong = [
        f"{file.name}: {line}"
        for file in Path(__file__).parents[1].rglob("test_*.py")
        for line in re.findall(
            r"^ *(?:from|import) tests\b.*", file.read_text(), flags=re.MULTILINE
        )
        if not line.strip().startswith(shared)
    ]
    assert not wrong, wrong


def test_no_modules_import_each_other_in_a_circle():
    """Within functions and for type checkers neither; ``CycleError`` names the circle."""
    files = {
        ".".join(("npo_fast", *f.relative_to(ROOT).with_suffix("").parts)): f
        for f in ROOT.rglob("*.py")
    }
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    imports: dict[str, set[str]] = {}
    for name, file in files.items():
        nodes = [n for n in ast.walk(parsed(file)) if isinstance(n, ast.ImportFrom)]
        named = [(n.module, f"{n.module}.{a.name}") for n in nodes for a in n.names if n.module]
        found = {inner if inner in files else module for module, inner in named}
        imports[name] = (found & files.keys()) - {name, "npo_fast"}
    tuple(graphlib.TopologicalSorter(imports).static_order())


@pytest.mark.slow
def test_the_import_leaves_heavy_libraries_to_those_who_use_them():
    heavy = ["torch", "triton", "transformers", "datasets", "scipy", "matplotlib"]
    code = f"import sys, npo_fast.cli; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_there_when_it_is_asked_for():
    assert all(getattr(npo_fast, name) is not None for name in npo_fast.__all__)
    assert callable(npo_fast.ops.linear_kl)
    with pytest.raises(AttributeError, match="'npo_fast' has no attribute 'nothing'"):
        npo_fast.nothing  # noqa: B018
