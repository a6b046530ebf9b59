"""setup.py falls back to a pure-Python package and says why."""

import importlib.util
import sys
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

    assert build.find_torch() == Path(torch.__file__).parent
    major, minor = torch.__version__.split(".")[:2]
    assert build.torch_version(build.find_torch()) == (int(major), int(minor))


def test_torch_is_found_from_an_isolated_build(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0+cpu'\n")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    assert build.find_torch() == tmp_path / "torch"
    assert build.torch_version(tmp_path / "torch") == (2, 11)


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
    monkeypatch.setattr(build, "find_torch", lambda: None if version is None else tmp_path)
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
    monkeypatch.setattr(build, "obstacle", lambda: None)
    assert run_main()["ext_modules"][0].optional
    assert not run_main("1")["ext_modules"][0].optional
    monkeypatch.setattr(build, "obstacle", lambda: "no compiler")
    with pytest.raises(SystemExit, match=r"NPO_FAST_BUILD=1, but .* no compiler"):
        run_main("1")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        run_main("yes")


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no kernels on this system")
def test_the_sources_that_it_names_exist(
    build: ModuleType, run_main: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "obstacle", lambda: None)
    (kernels,) = run_main()["ext_modules"]
    for name in (*kernels.sources, *kernels.depends):
        assert (ROOT / name).is_file()
