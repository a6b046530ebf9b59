"""Versions, commit and machine, to be stored with every result."""

import os
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import npo_fast
from npo_fast.versions import versions

PEERS = ("trl", "cut-cross-entropy", "liger-kernel")


def provenance() -> dict[str, Any]:
    """What could explain a difference between two results: versions, commit, machine."""
    packages = versions()
    for package in PEERS:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": packages,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": _processor(),
    }


def git_commit() -> str | None:
    """The commit of this package's checkout, with "+changes" if edited; None if installed."""
    root = Path(npo_fast.__file__).parents[1]
    if not (root / ".git").exists():
        return None
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
