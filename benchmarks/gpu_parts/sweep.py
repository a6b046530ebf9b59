"""Part 4: configurations of the row kernels, each checked before its time; the linear operators.

Logits lie column after column, as the library keeps them. Speed counts each time that a kernel
reads or writes them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_parts.measure import Call, Prepared, free_memory, interleaved, summary
from gpu_parts.record import Record
from npo_fast.bench.timing import Times
from npo_fast.kernels.transform import HeadTransform
from npo_fast.kernels.triton import config as configs

# rows, vocabulary, elements from column to column
ROW_SIZES = (
    (4096, 128256, 4096), (3999, 128256, 4032), (3999, 128256, 4096), (4096, 32000, 4096),
    (2048, 151936, 2048), (2048, 50257, 2048),
)  # fmt: skip
TINY_ROW_SIZES = ((16, 96, 64), (15, 65, 64))
# rows, columns and warps of a tile, of 16 to 64 logits a thread; and programs a processor
ROW_TILES = (
    (64, 32, 4), (64, 64, 4), (128, 16, 4), (128, 32, 4), (128, 64, 4), (256, 16, 4), (256, 32, 4),
    (64, 64, 8), (128, 32, 8), (128, 64, 8), (256, 16, 8), (256, 32, 8), (256, 64, 8),
)  # fmt: skip
FEW_ROW_TILES = ((64, 32, 4), (128, 16, 4), (128, 64, 4), (128, 32, 8), (256, 32, 8))
TINY_ROW_TILES = ((16, 32, 4),)
PROGRAMS, TINY_PROGRAMS = (4, 8), ()
LINEAR_SIZE, TINY_LINEAR_SIZE = (4096, 4096, 128256), (16, 32, 48)  # rows, width, vocabulary
PLAIN = HeadTransform()
TOLERANCE = 2e-2
CHECKED_ROWS = 16
ROUNDS = 10
LEAST_S = 4.0  # with less time left nothing more is compiled


def run(record: Record, device: torch.device, tiny: bool, job: str) -> None:
    sizes = TINY_ROW_SIZES if tiny else ROW_SIZES
    for size in sizes[:1]:
        _rows(record, *size, device, tiny, thorough=True)
    record.attempt("linear operators", lambda: _linear(record, device, tiny))
    for size in sizes[1:]:
        _rows(record, *size, device, tiny, thorough=False)


def _rows(
    record: Record, rows: int, vocabulary: int, stride: int, device: torch.device, tiny: bool,
    thorough: bool,
) -> None:  # fmt: skip
    from npo_fast.kernels.triton.row_kl import row_kl
    from npo_fast.kernels.triton.row_log_probs import row_gradient, row_log_probs

    free_memory(device)
    fresh, logits, ref = (_by_column(rows, vocabulary, stride, device) for _ in range(3))
    labels = torch.randint(vocabulary, (rows,), device=device)
    target = fresh.gather(1, labels[:, None]).squeeze(1).float()
    log_p, ref_log_p = (x[:CHECKED_ROWS].float().log_softmax(-1) for x in (fresh, ref))
    log_probs = log_p.gather(1, labels[:CHECKED_ROWS, None]).squeeze(1)
    kl = (ref_log_p.exp() * (ref_log_p - log_p)).sum(-1)

    def launch_log_probs(config: Any) -> Tensor:
        return row_log_probs(logits, labels, target, PLAIN, config=config)[0]

    def launch_kl(config: Any) -> Tensor:
        return row_kl(logits, ref, PLAIN, PLAIN, config=config)

    of_rows = row_log_probs(fresh, labels, target, PLAIN)
    g = torch.rand_like(target)
    at_labels = -torch.expm1(log_probs) * g[:CHECKED_ROWS]

    def launch_gradient(config: Any) -> Tensor:
        row_gradient(logits, labels, of_rows[0], *of_rows[2:], g, PLAIN, config=config)
        return logits[:CHECKED_ROWS].gather(1, labels[:CHECKED_ROWS, None]).squeeze(1)

    # how often logits are read or written
    kernels = {
        "row_log_probs": (launch_log_probs, log_probs, 1),
        "row_gradient": (launch_gradient, at_labels, 2),
        "row_kl": (launch_kl, kl, 5),
    }
    for kernel, (launch, right, passes) in kernels.items():
        table = f"{kernel}, {rows} x {vocabulary}, columns of {stride}"
        all_tiles = thorough and kernel != "row_kl"
        for label, config in row_configs(kernel, tiny, all_tiles):
            if record.left_s < LEAST_S:
                return
            times = record.attempt(
                f"{table}: {label}",
                partial(_timed, lambda: logits.copy_(fresh), partial(launch, config), right, tiny),
            )
            if times is None:
                continue
            speed = 2e-6 * passes * rows * vocabulary / times.median_ms
            record.row(table, label, **summary(times), gb_per_s=speed)


def row_configs(kernel: str, tiny: bool, thorough: bool) -> Iterator[tuple[str, Any]]:
    """The default first, then others that differ from it."""
    default = configs.row_config()
    yield "default", default
    columns = "kl_block_columns" if kernel == "row_kl" else "block_columns"
    names = ("block_rows", columns, "num_warps")
    tiles = ROW_TILES if thorough else FEW_ROW_TILES
    if tiny:
        tiles = TINY_ROW_TILES if thorough else ()
    changes = [dict(zip(names, tile, strict=True)) for tile in tiles]
    changes += [{"programs": programs} for programs in (TINY_PROGRAMS if tiny else PROGRAMS)]
    for change in changes:
        config = replace(default, **change)
        if config != default:
            yield " ".join(f"{name}={value}" for name, value in change.items()), config


def _by_column(
    rows: int, vocabulary: int, stride: int, device: torch.device
) -> Tensor:  # (rows, vocabulary)
    memory = torch.randn(vocabulary, stride, device=device, dtype=torch.bfloat16)
    return memory[:, :rows].t()


def _linear(record: Record, device: torch.device, tiny: bool) -> None:
    """The operators that hold no more than a slice of logits."""
    from npo_fast.kernels.triton.linear import linear_backward, linear_forward

    rows, width, vocabulary = TINY_LINEAR_SIZE if tiny else LINEAR_SIZE
    hidden = torch.randn(rows, width, device=device).bfloat16()
    weight = torch.empty(vocabulary, width, device=device, dtype=torch.bfloat16)
    weight.normal_(std=width**-0.5)
    labels = torch.randint(vocabulary, (rows,), device=device)
    rest = (hidden, weight, labels, None)
    logits = hidden[:CHECKED_ROWS].float() @ weight.float().T
    log_probs = logits.log_softmax(-1).gather(1, labels[:CHECKED_ROWS, None]).squeeze(1)
    found = linear_forward(*rest, PLAIN)
    g = torch.full_like(found[0], 1 / rows)
    p = logits.softmax(-1)
    p[torch.arange(len(p), device=device), labels[: len(p)]] -= 1
    d_hidden = -(p @ weight.float()) / rows
    needs = [True, True, True]
    calls = {
        "forward": (lambda: linear_forward(*rest, PLAIN)[0], log_probs, 1),
        "backward": (lambda: linear_backward(g, *rest, *found, PLAIN, needs)[0], d_hidden, 3),
    }
    for name, (launch, right, products) in calls.items():
        attempt = partial(_timed, lambda: None, launch, right, tiny)
        times = record.attempt(f"linear {name}", attempt)
        if times is not None:
            rate = 2e-9 * products * rows * width * vocabulary / times.median_ms
            record.row("linear operators", name, **summary(times), tflop_per_s=rate)


def _timed(prepare: Call, call: Callable[[], Tensor], right: Tensor, tiny: bool) -> Times:
    """Times of a call whose first rows are right."""
    prepare()
    found = call()[: len(right)].float()
    error = float((found - right).norm() / right.norm())
    if not error <= TOLERANCE:
        raise AssertionError(f"wrong: relative error {error:.1e}")
    return interleaved({"": Prepared(prepare, call)}, right.device, tiny, 1.0, ROUNDS)[""]
