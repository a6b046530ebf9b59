"""Part 4: configurations of the row kernels and of the tile kernels, each checked before its time.

Row kernels: logits lie column after column, as the library keeps them. Speed is given for the bytes
of an ideal pass (logits read and their gradient written, once) and with the second read that a row
longer than the chip's memory needs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_parts.measure import Call, Prepared, free_memory, interleaved, summary
from gpu_parts.record import Record
from npo_fast.bench.timing import Times
from npo_fast.kernels.triton import config as configs

ROW_SIZES = ((4096, 128256), (4096, 32000), (2048, 151936), (2048, 50257))  # rows, vocabulary
TINY_ROW_SIZES = ((16, 96), (16, 65))
# rows, columns and warps of a tile, of 16 to 64 logits a thread; and programs a processor
ROW_TILES = (
    (64, 32, 4), (64, 64, 4), (128, 16, 4), (128, 32, 4), (128, 64, 4), (256, 16, 4), (256, 32, 4),
    (64, 64, 8), (128, 32, 8), (128, 64, 8), (256, 16, 8), (256, 32, 8), (256, 64, 8),
)  # fmt: skip
FEW_ROW_TILES = ((64, 32, 4), (128, 16, 4), (128, 64, 4), (128, 32, 8), (256, 32, 8))
TINY_ROW_TILES = ((16, 32, 4),)
PROGRAMS, TINY_PROGRAMS = (4, 16), ()
# fields of RowConfig that are a kernel's own, the first that is there
OWN_FIELDS = {
    "row_log_probs": (("block_columns",), ("num_warps",)),
    "row_kl": (("kl_block_columns", "block_columns"), ("kl_num_warps", "num_warps")),
}
TILE_SIZE, TINY_TILE_SIZE = (4096, 4096, 128256), (16, 32, 48)  # rows, width, vocabulary
TOLERANCE = 2e-2
CHECKED_ROWS = 16
ROUNDS = 10
LEAST_S = 4.0  # with less time left nothing more is compiled


def run(record: Record, device: torch.device, tiny: bool, job: str) -> None:
    sizes = TINY_ROW_SIZES if tiny else ROW_SIZES
    for rows, vocabulary in sizes[:1]:
        _rows(record, rows, vocabulary, device, tiny, thorough=True)
    record.attempt("tile kernels", lambda: _tiles(record, device, tiny))
    for rows, vocabulary in sizes[1:]:
        _rows(record, rows, vocabulary, device, tiny, thorough=False)


def _rows(
    record: Record, rows: int, vocabulary: int, device: torch.device, tiny: bool, thorough: bool
) -> None:
    from npo_fast.kernels.triton.row_kl import row_kl
    from npo_fast.kernels.triton.row_log_probs import row_log_probs

    free_memory(device)
    fresh, logits, ref = (_by_column(rows, vocabulary, device) for _ in range(3))
    labels = torch.randint(vocabulary, (rows,), device=device)
    target = fresh.gather(1, labels[:, None]).squeeze(1).float()
    log_p, ref_log_p = (x[:CHECKED_ROWS].float().log_softmax(-1) for x in (fresh, ref))
    log_probs = log_p.gather(1, labels[:CHECKED_ROWS, None]).squeeze(1)
    kl = (ref_log_p.exp() * (ref_log_p - log_p)).sum(-1)

    def launch_log_probs(config: Any) -> Tensor:
        return row_log_probs(logits, labels, target, None, 1.0, config=config)[0]

    def launch_kl(config: Any) -> Tensor:
        return row_kl(logits, ref, None, 1.0, None, 1.0, config=config)

    kernels = {"row_log_probs": (launch_log_probs, log_probs, 2), "row_kl": (launch_kl, kl, 3)}
    for kernel, (launch, right, passes) in kernels.items():
        table = f"{kernel}, {rows} x {vocabulary}"
        all_tiles = thorough and kernel == "row_log_probs"
        for label, config in row_configs(kernel, tiny, all_tiles):
            if record.left_s < LEAST_S:
                return
            times = record.attempt(
                f"{table}: {label}",
                partial(_timed, lambda: logits.copy_(fresh), partial(launch, config), right, tiny),
            )
            if times is None:
                continue
            speed = 2e-6 * rows * vocabulary / times.median_ms  # of one pass, in GB/s
            twice = 2 * passes - 1 if passes == 2 else 5  # the second read, of both for the KL
            record.row(
                table, label, **summary(times),
                gb_per_s_ideal=passes * speed, gb_per_s_with_second_read=twice * speed,
            )  # fmt: skip


def row_configs(kernel: str, tiny: bool, thorough: bool) -> Iterator[tuple[str, Any]]:
    """The default first, then others that differ from it."""
    default = configs.row_config()
    yield "default", default
    there = {field.name for field in fields(default)}
    own = [next(name for name in names if name in there) for names in OWN_FIELDS[kernel]]
    names = ("block_rows", *own)
    tiles = ROW_TILES if thorough else FEW_ROW_TILES
    if tiny:
        tiles = TINY_ROW_TILES if thorough else ()
    changes = [dict(zip(names, tile, strict=True)) for tile in tiles]
    changes += [{"programs": programs} for programs in (TINY_PROGRAMS if tiny else PROGRAMS)]
    for change in changes:
        config = replace(default, **change)
        if config != default:
            yield " ".join(f"{name}={value}" for name, value in change.items()), config


def _by_column(rows: int, vocabulary: int, device: torch.device) -> Tensor:  # (rows, vocabulary)
    stride = -(-rows // 64) * 64
    memory = torch.randn(vocabulary, stride, device=device, dtype=torch.bfloat16)
    return memory[:, :rows].t()


def _tiles(record: Record, device: torch.device, tiny: bool) -> None:
    """One kernel's configuration at a time, the others at their defaults."""
    from npo_fast.kernels.triton.linear_backward import linear_backward
    from npo_fast.kernels.triton.linear_forward import linear_forward
    from npo_fast.kernels.triton.linear_sliced import sliced_backward, sliced_forward

    rows, width, vocabulary = TINY_TILE_SIZE if tiny else TILE_SIZE
    hidden = torch.randn(rows, width, device=device).bfloat16()
    weight = torch.empty(vocabulary, width, device=device, dtype=torch.bfloat16)
    weight.normal_(std=width**-0.5)
    labels = torch.randint(vocabulary, (rows,), device=device)
    rest = (hidden, weight, labels, None)
    logits = hidden[:CHECKED_ROWS].float() @ weight.float().T
    log_probs = logits.log_softmax(-1).gather(1, labels[:CHECKED_ROWS, None]).squeeze(1)
    chosen = _tile_configs("linear_forward", tiny)[0]
    found = linear_forward(*rest, None, 1.0, config=chosen)
    g = torch.full_like(found[0], 1 / rows)
    p = logits.softmax(-1)
    p[torch.arange(len(p), device=device), labels[: len(p)]] -= 1
    d_hidden = -(p @ weight.float()) / rows
    backward_kernels = ("logits_gradient", "hidden_gradient", "weight_gradient")
    flops = 2.0 * rows * width * vocabulary

    def forward(config: Any) -> Tensor:
        return linear_forward(*rest, None, 1.0, config=config)[0]

    def backward(config: Any, kernel: str) -> Tensor:
        chosen = [_tile_configs(name, tiny)[0] for name in backward_kernels]
        chosen[backward_kernels.index(kernel)] = config
        return linear_backward(g, *rest, *found, None, 1.0, configs=tuple(chosen))[0]

    needs = [True, True, True]
    sliced = {
        "linear_forward": (lambda: sliced_forward(*rest, None, 1.0)[0], log_probs, 1),
        "linear_backward": (
            lambda: sliced_backward(g, *rest, *found, None, 1.0, needs)[0], d_hidden, 3
        ),
    }  # fmt: skip
    for table, (launch, right, products) in sliced.items():
        label = "vendor GEMMs, slice by slice"
        attempt = partial(_timed, lambda: None, launch, right, tiny)
        times = record.attempt(f"{table}: {label}", attempt)
        if times is not None:
            rate = products * flops / times.median_ms / 1e9
            record.row(f"{table}, tiles", label, **summary(times), tflop_per_s=rate)
    for kernel in ("linear_forward", *backward_kernels):
        for config in _tile_configs(kernel, tiny):
            if record.left_s < LEAST_S:
                return
            launch = partial(forward, config)
            right, products, table = log_probs, 1, "linear_forward"
            if kernel != "linear_forward":
                launch = partial(backward, config, kernel)
                right, products, table = d_hidden, 3, "linear_backward"
            label = f"{kernel} {config.block_m}x{config.block_n}x{config.block_k}"
            label += f" warps={config.num_warps} stages={config.num_stages}"
            times = record.attempt(
                f"{table}: {label}", partial(_timed, lambda: None, launch, right, tiny)
            )
            if times is not None:
                rate = products * flops / times.median_ms / 1e9
                record.row(f"{table}, tiles", label, **summary(times), tflop_per_s=rate)


def _tile_configs(kernel: str, tiny: bool) -> Sequence[Any]:
    if tiny:
        return (configs.TileConfig(16, 16, 16, num_warps=4, num_stages=2),)
    return configs.TILES[configs.current_target()][kernel]


def _timed(prepare: Call, call: Callable[[], Tensor], right: Tensor, tiny: bool) -> Times:
    """Times of a call whose first rows are right."""
    prepare()
    found = call()[: len(right)].float()
    error = float((found - right).norm() / right.norm())
    if not error <= TOLERANCE:
        raise AssertionError(f"wrong: relative error {error:.1e}")
    return interleaved({"": Prepared(prepare, call)}, right.device, tiny, 1.0, ROUNDS)[""]
