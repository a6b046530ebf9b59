"""A test of a loaded model on a handful of tokens: whether this package can train it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from npo_fast.data import PackedBatch, TokenizedExample, pack
from npo_fast.data.packing import one_by_one
from npo_fast.errors import UserError, first_line
from npo_fast.model.attention import NAME as PACKED
from npo_fast.model.head_transform import check_all_logits
from npo_fast.model.layers import mixing_layers
from npo_fast.model.varlen import DTYPES as HALF

# A difference counts where it is so many times the rounding error of a log-prob and the model's
# answer to embeddings that are off by one, and not below a share of the spread of its log-probs
ROUNDINGS = 32.0
LEAST_SHARE = {torch.float32: 1e-4, torch.float64: 1e-5}
LEAST_HALF_SHARE, MOST_HALF_NATS = 2**-6, 2.0  # of a deep random model in bf16: 1.4 nats
GRADIENT_TOLERANCE = 1e-2  # of the largest gradient; half precision tells only whether one is made
FREE_SHARE = 0.5  # of the free memory, for a copy of the weights in fp32
SMALL = 1 << 20  # numbers of a parameter whose gradient is compared: all but matrices


class Measured(NamedTuple):
    """Of sequences: log-probs of the answers, and the gradients of their sum."""

    log_probs: Tensor  # (N,)
    gradients: tuple[Tensor | None, ...]  # None where a parameter takes no part


def run_probe(lm: Any, any_attention: bool) -> None:
    """Compares log-probs and gradients of the model's own forward with ours, alone and in packs.

    With ``any_attention`` an attention that gives others is exchanged for the next, in the end for
    the model's own. Where a pack is not its sequences alone, ``packs`` of the ``CausalLM`` becomes
    false. Both come with a warning.

    Raises:
        UserError: the model does not run, or its head or attention is not understood.
    """
    with runs(lm), lm.evaluating():
        with lm.generating():
            check_all_logits(lm)
        with _in_fp32(lm):
            _probe(lm, any_attention)


@contextmanager
def runs(lm: Any) -> Iterator[None]:
    """Raises ``UserError`` where the model does not run inside; nothing is compiled with hooks."""
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, (UserError, torch.OutOfMemoryError)):
            raise
        raise UserError(f"{lm.name} does not run here: {first_line(error)}") from error


@contextmanager
def _in_fp32(lm: Any) -> Iterator[None]:
    """Inside, half-precision weights are fp32 where memory and attention permit.

    Rounding hides what is small at initial weights, such as positions that are not told apart.
    """
    tensors = [t for t in (*lm.model.parameters(), *lm.model.buffers()) if t.dtype in HALF]
    needed = sum(t.numel() for t in tensors) * 4
    is_half_only = lm.attention not in (PACKED, "sdpa", "eager")
    is_fixed = is_half_only or lm.quantized or lm.vocabulary_slice is not None
    if is_fixed or needed > free_memory(lm.device) * FREE_SHARE:
        yield
        return
    kept = [t.data for t in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data


def free_memory(device: torch.device) -> int:
    """Free bytes of a device; 0 where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = Path("/proc/meminfo")
    lines = memory.read_text().splitlines() if memory.exists() else []
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable")), 0)


def _probe(lm: Any, any_attention: bool) -> None:
    tokens = [int(token) for token in torch.linspace(1, lm.vocabulary - 1, 19)]
    batch = _pack_of_two(lm, tokens[:7], tokens[7:])
    singles = list(one_by_one(batch))
    with lm.generating() as model:
        own = _measure(lm, lambda: [_own_log_probs(model, single) for single in singles])
        with torch.no_grad(), _rounded_embeddings(lm):
            rounded = torch.cat([_own_log_probs(model, single) for single in singles])
    tolerance = _tolerance(lm.dtype, own.log_probs, rounded)
    alone = _measure_alone(lm, singles, own, tolerance, any_attention)
    if lm.packs and (why := mixing_layers(lm.model, lm.decoder) or _difference_of_packs(
        lm, batch, _pack_of_two(lm, tokens[-7:], tokens[7:]), alone, tolerance
    )):  # fmt: skip
        lm.packs = False
        warnings.warn(
            f"{lm.name} mixes the sequences of a pack ({why}): sequences run one at a time",
            stacklevel=4,
        )


def _pack_of_two(lm: Any, first: list[int], second: list[int]) -> PackedBatch:
    sequences = [TokenizedExample(tuple(ids), 1, i) for i, ids in enumerate((first, second))]
    (batch,) = pack(sequences, max_tokens=len(first) + len(second))
    assert batch.indices == (0, 1)
    return batch.to(lm.device)


def _measure(lm: Any, log_probs: Callable[[], list[Tensor]]) -> Measured:
    """Gradients are of the small parameters that are trained; none where there is no backward."""
    with torch.enable_grad():
        try:
            values = torch.cat(log_probs())
        except NotImplementedError as error:
            if "backward" not in str(error):  # flex_attention on a CPU has a forward alone
                raise
            with torch.no_grad():
                values = torch.cat(log_probs())
        small = [p for p in lm.model.parameters() if p.requires_grad and p.numel() <= SMALL]
        gradients: tuple[Tensor | None, ...] = ()
        if small and values.requires_grad:
            gradients = torch.autograd.grad(values.sum(), small, allow_unused=True)
    return Measured(values.detach(), gradients)


def _measure_alone(
    lm: Any, singles: Sequence[PackedBatch], own: Measured, tolerance: float, any_attention: bool
) -> Measured:
    """Of single sequences, with an attention that makes them as the model's ``own`` forward."""
    while True:
        is_native = lm.attention == lm.native_attention
        try:
            alone = _measure(lm, lambda: [lm.log_probs(single) for single in singles])
            if not (why := _difference(alone, own, tolerance, lm.dtype)):
                return alone
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_native or not any_attention:
                raise
            why = first_line(error)
        if is_native:
            largest = max(float(p.detach().abs().max()) for p in lm.model.parameters())
            raise UserError(
                f"{lm.name}: its decoder, called by itself, does other than within its forward "
                f"({why}). Its largest weight is {largest:.3g}: where a run with too high a --lr "
                "left it so, it is of no use"
            )
        if not any_attention:
            raise UserError(
                f"{lm.name} with the attention {lm.attention} is not the same model ({why}): name "
                "another --attention"
            )
        refused = lm.attention
        lm.unfit.add(refused)
        lm.choose_attention("auto")
        does = "keeps" if lm.attention == lm.native_attention else "takes"
        warnings.warn(
            f"{lm.name} does not run with {refused}: it {does} {lm.attention} ({why})",
            stacklevel=5,
        )


def _difference_of_packs(
    lm: Any, batch: PackedBatch, other: PackedBatch, alone: Measured, tolerance: float
) -> str:
    """How a pack differs from its sequences ``alone``; empty where it does not.

    In ``other`` a sequence of the same length stands before the second sequence.
    """
    try:
        packed = _measure(lm, lambda: [lm.log_probs(batch)])
        if why := _difference(packed, alone, tolerance, lm.dtype):
            return why
        if _reaches_neighbour(lm, batch):
            return "a gradient reaches the neighbour"
        if _looks_up_other_rows(lm, batch):
            return "an embedding counts positions through the pack"
        beside_another = _measure(lm, lambda: [lm.log_probs(other)]).log_probs
    except TypeError:  # whatever the attention
        return "it takes no position_ids"
    second = slice(int(batch.answer_cu_seqlens[1]), None)
    gap = _gap(packed.log_probs[second], beside_another[second])
    if gap > tolerance:
        return f"another neighbour changes log-probs by {gap:.3g} nats"
    return ""


@torch.enable_grad()
def _reaches_neighbour(lm: Any, batch: PackedBatch) -> bool:
    """Whether a sequence of the pack has a gradient in the other one's embeddings.

    Where nothing leaks it is exactly 0, in any dtype: attention weights across are exactly 0.
    """
    inputs: list[Tensor] = []

    def detach(_module: nn.Module, _inputs: Any, embeddings: Tensor) -> Tensor:
        inputs.append(embeddings.detach().requires_grad_())
        return inputs[-1].clone()  # some scale it in place

    embedding = lm.model.get_input_embeddings()
    with embedding.register_forward_hook(detach):
        try:
            states = lm.states(batch)
        except NotImplementedError as error:
            if "backward" not in str(error):
                raise
            return False  # as in ``_measure``: nothing trains here
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    start = batch.lengths[0]
    first, second = slice(0, start), slice(start, None)
    for own, others in ((first, second), (second, first)):
        total = (states[own] * weights[own]).sum()
        for gradient in torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True):
            if gradient is not None and bool((gradient.flatten(0, -2)[others] != 0).any()):
                return True
    return False


@torch.no_grad()
def _looks_up_other_rows(lm: Any, batch: PackedBatch) -> bool:
    """Whether an embedding, such as one of positions, gives a pack other rows than its sequences.

    A table's rows are the same bits wherever they are read.
    """
    tables = [m for m in lm.decoder.modules() if isinstance(m, nn.Embedding)]
    rows: dict[nn.Module, list[Tensor]] = {}

    def record(module: nn.Module, _inputs: Any, out: Tensor) -> None:
        rows.setdefault(module, []).append(out.reshape(-1, out.shape[-1]))

    def read(batches: Iterable[PackedBatch]) -> dict[nn.Module, Tensor]:
        rows.clear()
        for each in batches:
            lm.states(each)
        return {module: torch.cat(parts) for module, parts in rows.items()}

    with ExitStack() as hooks:
        for table in tables:
            hooks.enter_context(table.register_forward_hook(record))
        packed, alone = read([batch]), read(one_by_one(batch))
    return any(
        rows.shape == alone[table].shape and not torch.equal(rows, alone[table])
        for table, rows in packed.items()
    )


@contextmanager
def _rounded_embeddings(lm: Any) -> Iterator[None]:
    """Inside, embeddings are off by half a unit in the last place of their dtype."""

    def off(_module: nn.Module, _inputs: Any, embeddings: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, embeddings.shape, generator=generator).to(embeddings) * 2 - 1
        return embeddings * (1 + signs * torch.finfo(embeddings.dtype).eps)

    with lm.model.get_input_embeddings().register_forward_hook(off):
        yield


def _tolerance(dtype: torch.dtype, log_probs: Tensor, rounded: Tensor) -> float:
    """The difference in nats that rounding explains."""
    share = LEAST_SHARE.get(dtype, LEAST_HALF_SHARE)
    last_place = torch.finfo(log_probs.dtype).eps * float(log_probs.abs().max())
    explained = (ROUNDINGS * last_place, share * float(log_probs.std()))
    return min(max(ROUNDINGS * _gap(rounded, log_probs), *explained), MOST_HALF_NATS)


def _own_log_probs(model: Any, single: PackedBatch) -> Tensor:
    """Of the model's own logits."""
    logits = model(input_ids=single.input_ids[None], use_cache=False).logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = logits[single.rows].log_softmax(-1)
    return log_probs.gather(1, single.labels[:, None]).squeeze(1)


def _difference(found: Measured, expected: Measured, tolerance: float, dtype: torch.dtype) -> str:
    """What differs; empty where nothing does."""
    if not (gap := _gap(found.log_probs, expected.log_probs)) <= tolerance:
        return f"log-probs differ by {gap:.3g} nats"
    if not found.gradients:  # there is no backward
        return ""
    norms = [0.0 if g is None else float(g.norm()) for g in expected.gradients]
    bound = max(norms, default=0.0) * GRADIENT_TOLERANCE
    for norm, got, gradient in zip(norms, found.gradients, expected.gradients, strict=True):
        if gradient is None or norm == 0:
            continue
        if got is None:
            return "a parameter of its attention gets no gradient"
        if dtype.itemsize >= 4 and not float((got - gradient).norm()) <= bound:
            return "gradients differ"
    return ""


def _gap(log_probs: Tensor, expected: Tensor) -> float:
    """The largest difference in nats; infinite where one is NaN."""
    gap = float((log_probs - expected).abs().max())
    return float("inf") if gap != gap else gap
