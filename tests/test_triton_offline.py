"""What the Triton kernels compile to on every target, without a GPU.

The compiler runs in a process of its own: in this one Triton may be its interpreter.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
GEMMS = {"linear_forward", "logits_gradient", "hidden_gradient", "weight_gradient"}


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
    kernels = {*GEMMS, "row_log_probs", "row_kl", "npo_head"}
    assert {(r["kernel"], r["target"]) for r in records} == {
        (kernel, target) for kernel in kernels for target in TARGETS
    }


def test_no_kernel_spills_a_register(records):
    assert not failing(records, lambda r: r["spill_bytes"])


def test_shared_memory_fits_the_target(records):
    assert not failing(records, lambda r: r["shared_bytes"] > r["shared_limit_bytes"])


def test_gemm_kernels_use_tensor_cores(records):
    assert not failing(
        records,
        lambda r: r["is_gemm"] and r["dtype"] == "bf16" and not r["tensor_core_instructions"],
    )


def test_wide_operands_are_loaded_16_bytes_at_a_time(records):
    # npo_head reads sequences that start anywhere, a few bytes each
    assert not failing(records, lambda r: r["kernel"] != "npo_head" and not r["wide_loads"])


def test_no_h100_floor_is_below_what_the_flops_take(records):
    gemms = [r for r in records if r["is_gemm"] and r["dtype"] == "bf16"]
    assert min(r["h100_floor_ms"] for r in gemms) == pytest.approx(4.347, rel=1e-3)


def test_the_module_refuses_to_compile_in_the_interpreter():
    command = [sys.executable, "-m", "npo_fast.kernels.triton.offline"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "without TRITON_INTERPRET" in done.stderr
