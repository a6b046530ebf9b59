"""setup.py falls back to a pure-Python package and says why."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("npo_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What setup() would be called with."""
    return {}


@pytest.fixture
def run_main(build: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: dict) -> object:
    def run(wish: str | None = None) -> dict[str, object]:
        monkeypatch.delenv("NPO_FAST_BUILD", raising=False)
        if wish is not None:
            monkeypatch.setenv("NPO_FAST_BUILD", wish)
        monkeypatch.setattr(build, "setup", lambda **given: arguments.update(given))
        build.main()
        return arguments

    return run


def test_the_torch_of_this_environment_is_found(build: ModuleType) -> None:
    import torch

    found = build.toolchain.find_torch()
    assert found == Path(torch.__file__).parent
    major, minor = torch.__version__.split(".")[:2]
    assert build.toolchain.torch_version(found) == (int(major), int(minor))


@pytest.fixture
def elsewhere(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], Path]:
    """Puts a torch package into an empty folder; this environment's own is out of sight."""
    monkeypatch.setattr(build.toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.toolchain.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    monkeypatch.setenv("PATH", "/usr/bin")

    def install(folder: str) -> Path:
        torch = tmp_path / folder / "torch"
        torch.mkdir(parents=True)
        (torch / "version.py").write_text("__version__ = '2.11.0+cpu'\n")
        return torch

    return install


def test_pip_isolates_a_build_and_torch_is_found(
    build: ModuleType, elsewhere: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = elsewhere("site-packages")
    assert build.toolchain.find_torch() is None
    monkeypatch.setattr(build.toolchain.sysconfig, "get_path", lambda name: str(torch.parent))
    assert build.toolchain.find_torch() == torch
    assert build.toolchain.torch_version(torch) == (2, 11)


def test_torch_of_an_activated_environment_is_found(
    build: ModuleType,
    elsewhere: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    torch = elsewhere("venv/lib/python3.12/site-packages")
    monkeypatch.setenv("PATH", f"/usr/bin:{tmp_path / 'venv' / 'bin'}")
    assert build.toolchain.find_torch() is None  # some folder, not an environment
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    assert build.toolchain.find_torch() == torch


@pytest.mark.parametrize(
    ("version", "words"), [(None, "PyTorch is not installed"), ("2.9.1", "older than PyTorch 2.10")]
)
def test_without_a_fitting_torch_the_package_is_pure_python(
    build: ModuleType,
    run_main: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    version: str | None,
    words: str,
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr(
        build.toolchain, "find_torch", lambda: None if version is None else tmp_path
    )
    assert "ext_modules" not in run_main()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert words in message
    assert "install npo-fast again" in message


def test_without_a_compiler_the_package_is_pure_python(
    run_main: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++ -pthread")
    assert "ext_modules" not in run_main()
    assert "'/nowhere/c++' is not found; install g++ or clang++" in capsys.readouterr().err


def test_a_wish_is_followed_or_an_error(
    build: ModuleType, run_main: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "ext_modules" not in run_main("0")
    monkeypatch.setattr(build.toolchain, "obstacle", lambda: None)
    assert run_main()["ext_modules"][0].optional
    assert not run_main("1")["ext_modules"][0].optional
    monkeypatch.setattr(build.toolchain, "obstacle", lambda: "no compiler")
    with pytest.raises(SystemExit, match=r"NPO_FAST_BUILD=1, but .* no compiler"):
        run_main("1")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        run_main("yes")


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no kernels on this system")
def test_the_sources_that_it_names_exist(
    build: ModuleType, run_main: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.toolchain, "obstacle", lambda: None)
    (kernels,) = run_main()["ext_modules"]
    for name in (*kernels.sources, *kernels.depends):
        assert (ROOT / name).is_file()
