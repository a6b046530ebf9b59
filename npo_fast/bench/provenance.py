"""Where a number comes from: versions, commit and machine, to stand beside every result."""

import os
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import npo_fast
from npo_fast.runs.folder import versions

PEERS = ("trl", "cut-cross-entropy", "liger-kernel")


def provenance() -> dict[str, Any]:
    """Everything that could explain why two runs differ."""
    found = versions()
    for package in PEERS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": found,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": _processor(),
    }


def git_commit() -> str | None:
    """The commit of the checkout that this package lies in, "+changes" if it was edited since."""
    root = Path(npo_fast.__file__).parents[1]
    if not (root / ".git").exists():
        return None  # installed
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "npo_fast", "csrc")
    return f"{commit}+changes" if commit and changes else commit


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    """The CPU's model and its vector instructions as PyTorch uses them."""
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"
