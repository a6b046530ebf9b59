"""``npo-fast doctor`` names what is missing or does not fit, and the command that helps."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro", reason="the command line")

from npo_fast.cli import doctor
from npo_fast.cli.requirements import needs
from npo_fast.kernels import cpu
from tests.helpers import project_table

DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts the metadata of a package in front of what is installed."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(name: str, version: str, *requirements: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")

    return put


def test_every_extra_of_the_project_is_explained() -> None:
    extras = project_table()["optional-dependencies"]
    assert set(doctor.EXTRAS | doctor.FOR_DEVELOPERS) == set(extras)
    assert set(doctor.examine()["extras"]) == set(extras)


def test_what_is_missing_names_its_extra_and_its_use(install: Callable[..., None]) -> None:
    install("npo-fast", "0.2.0", 'no-such-package>=1.0; extra == "lora"', "torch>=2.10")
    found = doctor.examine()
    cure = "pip install 'npo-fast[lora]'"
    assert found["missing"] == {"no-such-package": {"for": doctor.EXTRAS["lora"], "get": cure}}
    lora = found["extras"]["lora"]
    assert lora["packages"] == {"no-such-package": None}
    assert not lora["installed"]
    missing = doctor.report(found).partition("not installed: what each brings")[2].splitlines()
    assert [line.strip() for line in missing[1:3]] == [f"lora        {lora['for']}", cure]


def test_an_extra_needs_all_of_its_packages(install: Callable[..., None]) -> None:
    install("npo-fast", "0.2.0", 'torch; extra == "lora"', 'no-such-package; extra == "lora"',
            'torch; extra == "quant"')  # fmt: skip
    extras = doctor.examine()["extras"]
    assert not extras["lora"]["installed"]
    assert extras["quant"]["installed"]


def test_versions_out_of_range_are_problems_with_a_cure(install: Callable[..., None]) -> None:
    install("npo-fast", "0.2.0", "transformers<6,>=5.0", 'peft>=0.17; extra == "lora"')
    install("transformers", "4.57.1")
    install("peft", "0.16.0")
    found = doctor.examine()
    told = {problem["what"]: problem["cure"] for problem in found["problems"]}
    assert told["transformers 4.57.1: npo-fast needs >=5.0,<6"] == (
        "pip install 'transformers>=5.0,<6'"
    )
    assert told["peft 0.16.0: npo-fast[lora] needs >=0.17"] == "pip install 'npo-fast[lora]'"
    assert not found["extras"]["lora"]["installed"]
    assert doctor.report(found).startswith(f"npo-fast 0.2.0: {len(told)} problems\n\n! transf")


def test_a_build_of_a_version_is_in_the_range_of_the_version(
    install: Callable[..., None],
) -> None:
    install("some-package", "2.13.0+cpu")
    (need,) = needs(["some-package>=2.10,<2.14"])
    assert need.is_met
    install("next-package", "2.14.0")
    (need,) = needs(["next-package>=2.10,<2.14"])
    assert not need.is_met


def test_an_extra_of_extras_needs_what_they_need() -> None:
    lines = ['one>=1; extra == "a"', 'two>=2; extra == "b"', 'three; extra == "c"', "four",
             'npo-fast[a,b]; extra == "test"', 'one>=1.5; extra == "b"',
             'five; platform_system == "Nowhere" and extra == "a"']  # fmt: skip
    assert {need.package: need.versions for need in needs(lines, "test")} == {
        "one": ">=1.5,>=1",
        "two": ">=2",
    }
    assert [need.package for need in needs(lines)] == ["four"]


def test_without_kernels_the_obstacle_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library_path", lambda: None)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    found = doctor.examine()
    assert found["cpu_library"] is None
    (problem,) = [p for p in found["problems"] if "C++ kernels" in p["what"]]
    assert "'/nowhere/c++' is not found; install g++ or clang++" in problem["what"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_pytorch_cannot_use_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "version")
    assert not any("GPU" in problem["what"] for problem in doctor.examine()["problems"])
    (tmp_path / "version").write_text(DRIVER)
    found = doctor.examine()
    assert found["gpu"]["driver"] == "570.124.06"
    assert found["gpu"]["obstacle"]
    assert any("no GPU can be used" in problem["what"] for problem in found["problems"])


def test_the_report_fits_a_terminal(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("transformers", "4.57.1")
    monkeypatch.setattr(cpu, "library_path", lambda: None)
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text(DRIVER)
    found = doctor.examine()
    assert max(map(len, doctor.report(found).splitlines())) <= 80
    for extra in found["extras"].values():
        extra["installed"] = not extra["installed"]
    assert max(map(len, doctor.report(found).splitlines())) <= 80


def test_the_doctor_says_what_is_wrong_where_transformers_does_not_import(
    tmp_path: Path,
) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('too old for this')")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "npo_fast", "doctor", "--json"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["attention"]["cpu"] == "unknown: too old for this"


def test_the_json_has_its_fields() -> None:
    found = json.loads(json.dumps(doctor.examine()))
    assert set(found) == {
        "versions", "optional", "devices", "gpu", "cpu", "attention", "kernels", "compiler",
        "cpu_library", "extras", "missing", "problems",
    }  # fmt: skip
    assert found["versions"]["torch"] == torch.__version__
