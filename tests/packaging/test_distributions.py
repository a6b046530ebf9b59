"""The sdist has all that a build needs, and the wheel that comes of it all that a user needs."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from npo_fast._version import __version__
from npo_fast.kernels import toolchain
from tests.helpers import project_table

pytest.importorskip("setuptools", minversion="77.0")

ROOT = Path(__file__).parents[2]
KERNELS = "npo_fast/kernels/_cpu.abi3.so"
SOURCES = ("csrc", "npo_fast", "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in",
           "README.md", "pyproject.toml", "setup.py")  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a checkout"),
]


class Distributions(NamedTuple):
    sdist: Path
    wheel: Path


def build(kind: str, source: Path, **environment: str) -> Path:
    """Builds in a folder as a build frontend does, without installing anything."""
    done = subprocess.run(
        [sys.executable, "-c", f"import setuptools.build_meta as b; b.build_{kind}('out')"],
        cwd=source, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (source / "out").iterdir()
    return made


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """An sdist of this checkout, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, folder / "checkout" / name)
    sdist = build("sdist", folder / "checkout")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    unpacked = folder / f"npo_fast-{__version__}"
    wish = "1" if toolchain.obstacle() is None else "0"
    return Distributions(sdist, build("wheel", unpacked, NPO_FAST_BUILD=wish))


def package_files() -> set[str]:
    """What is under npo_fast in this checkout, but for what running it leaves there."""
    files = (path.relative_to(ROOT) for path in (ROOT / "npo_fast").rglob("*") if path.is_file())
    return {path.as_posix() for path in files if path.suffix not in (".pyc", ".so")}


def test_the_sdist_has_what_a_build_needs(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()}
    top = {name for name in SOURCES if (ROOT / name).is_file()}
    assert package_files() | sources | top <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)


def test_the_wheel_has_the_package_and_nothing_else(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    kernels = {KERNELS} if toolchain.obstacle() is None else set()
    assert names == package_files() | kernels
    assert "npo_fast/py.typed" in names


def test_the_wheel_serves_every_python(distributions: Distributions) -> None:
    python, abi, platform = distributions.wheel.stem.split("-")[2:]
    if toolchain.obstacle() is None:
        assert (python, abi) == ("cp310", "abi3")
    else:
        assert (python, abi, platform) == ("py3", "none", "any")


def test_the_metadata_names_every_extra(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if "Provides-Extra" in line}
    assert extras == set(project_table()["optional-dependencies"])
    assert f"Version: {__version__}" in lines


def test_the_wheel_runs_by_itself(distributions: Distributions, tmp_path: Path) -> None:
    with zipfile.ZipFile(distributions.wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-m", "npo_fast", "doctor", "--json"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["npo_fast"] == __version__
    if toolchain.obstacle() is None:
        assert found["cpu_library"] == str(tmp_path / "site" / KERNELS)
        assert found["kernels"]["row_log_probs"]["cpu"] == "C++"  # loaded, and registered
