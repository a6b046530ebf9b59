"""Versions, commit and machine, to be stored with every result."""

import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import npo_fast
from npo_fast.versions import version_of, versions

PEERS = ("trl", "cut-cross-entropy", "liger-kernel")


def provenance() -> dict[str, Any]:
    """What could explain a difference between two results: versions, commit, machine."""
    peers = {name: number for name in PEERS if (number := version_of(name))}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions() | peers,
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
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{[*models, 'unknown'][0]} ({torch.backends.cpu.get_cpu_capability()})"
