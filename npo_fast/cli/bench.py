"""``npo-fast bench``: what the losses and the kernels cost here, beside what else there is."""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from npo_fast import tables
from npo_fast.bench import scaling
from npo_fast.bench.candidates import find_candidates
from npo_fast.bench.inputs import KINDS, SHAPES, Dtype, Shape
from npo_fast.bench.loss import Result, bench
from npo_fast.bench.provenance import provenance
from npo_fast.cli.console import Output
from npo_fast.distributed import local_device
from npo_fast.errors import UserError
from npo_fast.validation import Checked, PositiveInt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command(Checked):
    """Options of npo-fast bench."""

    what: tyro.conf.Positional[Literal["loss", "kernels"]]
    """loss: time and memory of the losses beside others'. kernels: time of the Triton kernels on a
    GPU; without one, what they compile to."""
    rows: int | None = None
    """Tokens that carry a loss (N). Any size that you give replaces the two default shapes."""
    width: int | None = None
    """Width of the hidden states (D)."""
    vocabulary: int | None = None
    """Size of the vocabulary (V)."""
    sequences: int | None = None
    """Number of sequences that the rows make up."""
    dtype: Dtype = "float32"
    """Number format of hidden states and weights."""
    inputs: str = "random,memorised,forgotten"
    """What the model knows of the labels: one or more of these, separated by commas."""
    rounds: PositiveInt = 5
    """How often each candidate is timed, in turn. Medians are reported."""
    peers: str = "all"
    """Implementations to compare with: all, none, or some of plain,torch-lce,trl,cce,liger."""
    scaling: bool = False
    """Time ours and plain PyTorch over growing rows and vocabularies, up to --rows and
    --vocabulary."""
    output: Path | None = None
    """JSON file for the result. With --scaling a plot goes beside it."""


def run(command: Command) -> Output:
    """Measures what the command names; returns a table."""
    what = "scaling" if command.what == "loss" and command.scaling else command.what
    origin = provenance()  # now: a commit made meanwhile is not what runs
    measured, text = {"loss": _loss, "scaling": _scaling, "kernels": _kernels}[what](command)
    result = {"what": what, "provenance": origin, **measured}
    if command.output is not None:
        command.output.parent.mkdir(parents=True, exist_ok=True)
        command.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return Output(result, text, exit_code=int(result.get("ours_refused", False)))


def _loss(command: Command) -> tuple[dict[str, Any], str]:
    logger.info("loading the peers")
    device = local_device("auto")
    kinds, shapes = _kinds(command.inputs), _shapes(command)
    peers = {"all": None, "none": []}.get(command.peers, _names(command.peers))
    candidates, missing = find_candidates(device, peers)
    for name, why in missing.items():
        logger.info(f"{name} is left out: {why}")
    results = [
        bench(shape, candidates, kinds, command.rounds, device, logger.info) for shape in shapes
    ]
    record = {
        "rounds": command.rounds,
        "missing_peers": missing,
        "ours_refused": any(result.ours_refused for result in results),
        "results": [asdict(result) for result in results],
    }
    return record, "\n\n".join(_loss_text(result) for result in results)


def _loss_text(result: Result) -> str:
    shape = result.shape
    lines = [
        f"{shape.name}: N={shape.rows} D={shape.width} V={shape.vocabulary}, {shape.sequences} "
        f"sequences, {shape.dtype}; three bare GEMMs: "
        + ", ".join(f"{ms:.4g} ms ({kind})" for kind, ms in result.gemms_ms.items())
    ]
    cells = [
        [
            row.inputs, row.peer, row.loss, row.option, _number(row.train_ms),
            _number(row.train_ratio, "x"), _number(row.train_peak_mib), _number(row.forward_ms),
            _number(row.forward_ratio, "x"), _number(row.forward_peak_mib),
            f"{max(asdict(row.errors).values()):.0e}",
        ]
        for row in result.rows
    ]  # fmt: skip
    header = ("inputs", "who", "loss", "option", "train ms", "of 3 GEMMs", "peak MiB",
              "forward ms", "of 1 GEMM", "peak MiB", "error")  # fmt: skip
    lines.append(tables.plain(cells, header))
    lines += [f"not timed: {name}: {why}" for name, why in result.refused.items()]
    lines.append("peak: beyond inputs and gradients; error: the largest relative one against fp64")
    return "\n".join(lines)


def _scaling(command: Command) -> tuple[dict[str, Any], str]:
    points = scaling.scaling(
        command.width or 576,
        command.rows or scaling.MOST_ROWS,
        command.vocabulary or scaling.MOST_VOCABULARY,
        command.rounds,
        local_device("auto"),
        logger.info,
    )
    file = (command.output or Path("bench_scaling.json")).with_suffix(".png")
    file.parent.mkdir(parents=True, exist_ok=True)
    scaling.plot(points, file)
    logger.info(f"plot: {file}")
    cells = (
        [point.axis, str(point.rows), str(point.vocabulary), point.peer, _number(point.train_ms),
         _number(point.train_peak_mib)]
        for point in points
    )  # fmt: skip
    text = tables.plain(cells, ("growing", "N", "V", "who", "train ms", "peak MiB"))
    return {"rounds": command.rounds, "points": [asdict(point) for point in points]}, text


def _kernels(command: Command) -> tuple[dict[str, Any], str]:
    try:
        import triton
    except ImportError as error:
        raise UserError("bench kernels needs Triton (pip install triton; Linux)") from error
    from npo_fast.bench import kernels
    from npo_fast.kernels.triton import offline

    device = local_device("auto")
    if device.type == "cuda":
        logger.info("timing the kernels")
        measured = kernels.measure(device)
        return {"measured": measured}, tables.plain(*tables.from_records(measured))
    if triton.knobs.runtime.interpret:
        raise UserError("bench kernels compiles kernels: unset TRITON_INTERPRET")
    logger.info("no GPU: compiling every kernel for every target, about a minute")
    records = list(offline.inspect())
    predicted = kernels.predict(records)
    lines = [
        tables.plain(*tables.from_records(offline.table(records))),
        f"\nH100 floors at N={kernels.N} D={kernels.D} V={kernels.V} bf16:",
    ]
    for name, ms in predicted.items():
        lines.append(f"  {name.removesuffix('_ms').replace('_', ' '):<40}{ms:.2f} ms")
    result = {"kernels": [asdict(record) for record in records], "h100_floors": predicted}
    return result, "\n".join(lines)


def _shapes(command: Command) -> list[Shape]:
    names = ("rows", "width", "vocabulary", "sequences")
    sizes = {name: size for name in names if (size := getattr(command, name)) is not None}
    if not sizes:
        return [replace(shape, dtype=command.dtype) for shape in SHAPES]
    if "rows" in sizes:
        sizes.setdefault("sequences", max(1, sizes["rows"] // 64))
    return [replace(SHAPES[0], name="custom", dtype=command.dtype, **sizes)]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _kinds(text: str) -> list[Any]:
    kinds = _names(text)
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--inputs: unknown {kind!r}; known: {', '.join(KINDS)}")
    return kinds


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.3g}{unit}" if value < 100 else f"{value:.0f}{unit}"
