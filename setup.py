"""The C++ kernels of csrc, built where PyTorch's headers and a C++ compiler are at hand.

Everything else is in pyproject.toml. Without the kernels the package is pure Python and computes
the same, slower. NPO_FAST_BUILD=0 leaves them out, NPO_FAST_BUILD=1 makes their absence an error.
"""

import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def load_toolchain() -> ModuleType:
    """The module by its path: importing the package needs PyTorch, which isolated builds lack."""
    path = Path(__file__).parent / "npo_fast" / "kernels" / "toolchain.py"
    spec = importlib.util.spec_from_file_location("toolchain", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = load_toolchain()
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"]
# rows.cpp once an instruction set: lane bytes and flags; register.cpp picks at run time
PLAIN = {"plain": (16, [])}
X86 = {
    "avx2": (32, ["-mavx2", "-mfma"]),
    "avx512": (64, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]),
}


def say(reason: str) -> None:
    print(f"npo-fast: building without the C++ CPU kernels: {reason}", file=sys.stderr)


class BuildKernels(build_ext):
    """One shared library of the same sources compiled for several instruction sets."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception:
            if ext.optional:  # setuptools goes on without it
                say("the compiler's message is above; cure it, then install npo-fast again")
            raise

    def _build(self, ext: Extension) -> None:
        torch = toolchain.find_torch()
        assert torch is not None
        target = "0x{:02x}{:02x}000000000000".format(*toolchain.TORCH_MINIMUM)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        rows, register = ext.sources
        objects = self.compiler.compile(
            [register],
            output_dir=self.build_temp,
            macros=[("TORCH_TARGET_VERSION", target), *([("NPO_X86", "1")] if x86 else [])],
            extra_postargs=[*FLAGS, "-isystem", str(torch / "include")],
            depends=ext.depends,
        )
        for isa, (lane_bytes, flags) in (PLAIN | X86 if x86 else PLAIN).items():
            objects += self.compiler.compile(
                [rows],
                output_dir=str(Path(self.build_temp) / isa),
                macros=[("NPO_ISA", isa), ("NPO_LANE_BYTES", str(lane_bytes))],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu"],  # already loaded by `import torch`: no path is recorded
            library_dirs=[str(torch / "lib")],
            # a PyTorch that lacks a symbol is then an error at load time, not in mid-run
            extra_postargs=["-Wl,-z,now"] if sys.platform == "linux" else [],
            target_lang="c++",
        )


def main() -> None:
    wish = os.environ.get("NPO_FAST_BUILD", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"npo-fast: NPO_FAST_BUILD must be 0, 1 or unset, got {wish!r}")
    reason = "NPO_FAST_BUILD=0" if wish == "0" else toolchain.obstacle()
    if reason is not None and wish == "1":
        sys.exit(f"npo-fast: NPO_FAST_BUILD=1, but the C++ CPU kernels cannot be built: {reason}")
    if reason is not None:
        say(reason)
        setup()
        return
    kernels = Extension(
        "npo_fast.kernels._cpu",
        sources=["csrc/rows.cpp", "csrc/register.cpp"],
        depends=["csrc/rows.h", "csrc/lanes.h", "csrc/transform.h"],
        language="c++",
        py_limited_api=True,  # no Python in it at all: torch.ops.load_library loads it
        optional=wish != "1",
    )
    setup(
        ext_modules=[kernels],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
