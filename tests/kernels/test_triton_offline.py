"""What the Triton kernels compile to on every target, without a GPU.

The compiler runs in a process of its own: in this one Triton may be its interpreter.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow  # compiles every kernel for every target
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
KERNELS = {
    "slice_sums", "label", "gradient", "row_kl", "join", "label_logits", "scale", "npo_head",
}  # fmt: skip
# a few numbers a row, of rows that begin anywhere
NARROW = {"label", "join", "npo_head"}


@pytest.fixture(scope="module")
def records():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "npo_fast.kernels.triton.offline"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def failing(records, broken):
    return [(r["target"], r["kernel"], r["variant"], r["config"]) for r in records if broken(r)]


def test_every_kernel_compiles_for_every_target(records):
    assert {(r["kernel"], r["target"]) for r in records} == {
        (kernel, target) for kernel in KERNELS for target in TARGETS
    }
    of_both = {(r["kernel"], r["dtype"]) for r in records} - {(k, "bf16") for k in KERNELS}
    assert of_both == {(kernel, "fp32") for kernel in ("slice_sums", "gradient", "row_kl")}


def test_no_kernel_spills_a_register(records):
    assert not failing(records, lambda r: r["spill_bytes"])


def test_shared_memory_fits_the_target(records):
    assert not failing(records, lambda r: r["shared_bytes"] > r["shared_limit_bytes"])


def test_logits_and_operands_are_loaded_16_bytes_at_a_time(records):
    """Whatever the vocabulary and the number of rows: neither is taken for divisible."""
    assert not failing(records, lambda r: r["kernel"] not in NARROW and not r["wide_loads"])


def test_h100_floors_are_what_the_bytes_take(records):
    logits_ms = 1e3 * 2 * 4096 * 128256 / 3.35e12  # once through those of bf16
    passes = {"slice_sums": 1, "gradient": 2, "row_kl": 3, "scale": 2}  # D rows: as large
    for kernel, times in passes.items():
        floors = {r["h100_floor_ms"] for r in records if r["kernel"] == kernel} - {None}
        assert floors, kernel
        assert all(ms == pytest.approx(times * logits_ms) for ms in floors), kernel
    assert not failing(records, lambda r: r["kernel"] == "label" and r["h100_floor_ms"])


def test_the_module_refuses_to_compile_in_the_interpreter():
    command = [sys.executable, "-m", "npo_fast.kernels.triton.offline"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "without TRITON_INTERPRET" in done.stderr
