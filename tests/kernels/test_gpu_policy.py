"""What a GPU is given, computed on a CPU: rows padded to whole GEMM tiles, logits in the weight's
dtype and in the memory of its gradient. Loss and gradients are those of fp64.

New tensors start as NaN: padding that nobody writes shows.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast import NPO, SimNPO, Skipped, linear_kl, linear_log_probs, linear_sequence_loss
from npo_fast.kernels import layout, products
from npo_fast.ops import cost
from npo_fast.ops.cost import Problem
from npo_fast.ops.gradients import HeadGradients
from npo_fast.ops.head import Head
from npo_fast.ops.linear_log_probs import resolve_chunk_rows
from tests.helpers import assert_as_exact, assert_near, slow_but

WIDTH, VOCABULARY, DRAWS = 128, 401, 3
WHOLE = (1, 37, 93, 128)  # N <= D
WIDER = (129, 200, 255)  # D < N <= 2D
SEVERAL = (263, 400)  # N > 2D
PLAIN = {"softcap": None, "logit_scale": 1.0, "bias": False}
BIAS = {**PLAIN, "bias": True}
CAPPED = {"softcap": 5.0, "logit_scale": 0.7, "bias": True}
SOME = [(93, None), (200, None), (263, None), (93, 10), (263, 100), (93, 0)]
HEADS = {"plain": PLAIN, "bias": BIAS, "capped": CAPPED}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch, poison_new_tensors):
    """Everything small, so that many strips and several chunks come of it."""
    monkeypatch.setattr(layout, "runs_on_cpu", lambda tensor: False)
    monkeypatch.setattr(cost, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cost, "STRIP_BYTES", 2 * WIDTH * 60)
    monkeypatch.setattr(products, "STRIP_BYTES", 4 * WIDTH * 150)


class Case:
    """Inputs in ``dtype``; ``exact()`` and ``plain()`` are what PyTorch makes of them."""

    def __init__(self, rows: int, dtype: torch.dtype, head: dict, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.head = {name: head[name] for name in ("softcap", "logit_scale")}
        self.tensors = {
            "hidden": normal(rows, WIDTH).to(dtype),
            "weight": (0.25 * normal(VOCABULARY, WIDTH)).to(dtype),
        }
        self.labels = torch.randint(VOCABULARY, (rows,), generator=generator)
        if head["bias"]:
            bias = normal(VOCABULARY).to(dtype)
            bias[0] = -torch.inf  # of the token that padding has for its label
            bias[200] = -torch.inf
            self.tensors["bias"] = bias
            self.labels = torch.where((self.labels == 0) | (self.labels == 200), 5, self.labels)
        self.upstream = normal(rows)
        third = rows // 3
        self.cu_seqlens = torch.tensor([0, third, third, rows - third // 2, rows])
        self.ref = torch.tensor([-9.0, 0.0, -400.0, -100.0])

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return {k: t.to(dtype or t.dtype).clone().requires_grad_() for k, t in self.tensors.items()}

    def log_probs(self, leaves: dict[str, Tensor]) -> Tensor:
        raw = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
        z = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.head["softcap"] is not None:
            z = self.head["softcap"] * torch.tanh(z / self.head["softcap"])
        z = (z * self.head["logit_scale"]).log_softmax(-1)
        return z.gather(1, self.labels[:, None]).squeeze(1)

    def loss(self, leaves: dict[str, Tensor], loss) -> Tensor:
        log_probs = self.log_probs(leaves)
        return loss(log_probs, self.cu_seqlens, self.ref.to(log_probs)).mean()

    def ours(self, leaves: dict[str, Tensor], loss, **options) -> Tensor:
        value, _ = linear_sequence_loss(
            labels=self.labels, cu_seqlens=self.cu_seqlens, loss=loss, ref_log_probs=self.ref,
            **leaves, **self.head, **options,
        )  # fmt: skip
        return value


def with_gradients(value: Tensor, leaves: dict[str, Tensor]) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]


def assert_equals_fp64(found: list[Tensor], exact: list[Tensor]) -> None:
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


class Errors:
    """Results of several draws: one draw of a rounding error says little."""

    def __init__(self) -> None:
        self.of: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, names, found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
        for name, *three in zip(names, found, plain, exact, strict=True):
            assert three[0].dtype == three[1].dtype, name
            self.of.setdefault(name, []).append(tuple(one.detach().flatten() for one in three))

    def assert_as_exact(self) -> None:
        for name, draws in self.of.items():
            assert_as_exact(*(torch.cat(one) for one in zip(*draws, strict=True)), name)


@pytest.mark.parametrize(
    ("all_rows", "dtype", "way"),
    [
        (WHOLE, torch.bfloat16, "whole"),
        (WHOLE, torch.float32, "whole"),
        (WIDER, torch.bfloat16, "whole"),
        (SEVERAL, torch.bfloat16, "chunks"),
    ],
)
def test_the_sizes_below_take_every_way(all_rows, dtype, way):
    for rows in all_rows:
        head = Head(torch.empty(VOCABULARY, WIDTH, dtype=dtype))
        assert head.problem(rows, True).choose().name == way
        hidden, needs = torch.empty(rows, WIDTH, dtype=dtype), (True, True, False)
        step = resolve_chunk_rows("op", Head(head.weight.requires_grad_()), rows, None)
        gradients = HeadGradients(head, hidden, needs, step)
        assert len(gradients.logits) % 16 == 0
        assert gradients.logits.stride(1) % 64 == 0
        assert gradients.logits.dtype == dtype
        assert (len(gradients.strips) > 1) == (all_rows is WHOLE)
        assert (gradients.finished is not None) == (way == "chunks")


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk_rows", [None, 10, 16, 0])
@pytest.mark.parametrize("rows", slow_but([93, 263], [*WHOLE, *WIDER, *SEVERAL]))
def test_loss_and_gradients_are_those_of_fp64(rows, chunk_rows, head):
    case, loss = Case(rows, torch.float64, head), NPO(0.1)
    leaves = case.leaves()
    found = with_gradients(case.ours(leaves, loss, chunk_rows=chunk_rows), leaves)
    assert_equals_fp64(found, with_gradients(case.loss(leaves, loss), leaves))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "chunk_rows"), SOME)
def test_errors_are_at_most_twice_those_of_plain_pytorch(rows, chunk_rows, dtype):
    for head in HEADS.values():
        errors, loss = Errors(), SimNPO(2.5, 0.1)
        for seed in range(DRAWS):
            case = Case(rows, dtype, head, seed)
            leaves, wide = case.leaves(), case.leaves(torch.float64)
            found = with_gradients(case.ours(leaves, loss, chunk_rows=chunk_rows), leaves)
            plain = with_gradients(case.loss(leaves, loss), leaves)
            exact = with_gradients(case.loss(wide, loss), wide)
            errors.add(["value", *leaves], found, plain, exact)
        errors.assert_as_exact()


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "chunk_rows"), SOME)
def test_log_probs_take_any_upstream_gradient(rows, chunk_rows):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for head in HEADS.values():
            errors = Errors()
            for seed in range(1 if dtype == torch.float64 else DRAWS):
                case = Case(rows, dtype, head, seed)
                leaves, wide = case.leaves(), case.leaves(torch.float64)
                log_probs = linear_log_probs(
                    labels=case.labels, chunk_rows=chunk_rows, **leaves, **case.head
                )
                three = [
                    [one, *with_gradients(one @ case.upstream.to(one), of)[1:]]
                    for one, of in (
                        (log_probs, leaves), (case.log_probs(leaves), leaves),
                        (case.log_probs(wide), wide),
                    )
                ]  # fmt: skip
                errors.add(["log_probs", *leaves], *three)
            errors.assert_as_exact()


def plain_kl(case: Case, leaves, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    raw = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    ref = F.linear(ref_hidden.to(raw), ref_weight.to(raw))
    ref, z = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (ref, raw))
    if case.head["softcap"] is not None:
        z = case.head["softcap"] * torch.tanh(z / case.head["softcap"])
    z = (z * case.head["logit_scale"]).log_softmax(-1)
    ref = ref.log_softmax(-1)
    return (ref.exp() * (ref - z)).sum() / len(raw)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "chunk_rows"), [(93, None), (201, None), (263, 200), (37, 10)])
def test_kl_and_gradients_are_those_of_fp64(rows, chunk_rows, monkeypatch):
    """The reference, with tiles of 64 rows of its own, goes more than once through a chunk."""
    monkeypatch.setattr(Problem, "rows_of_bytes", lambda self, chunk_bytes: 64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for head in HEADS.values():
            errors = Errors()
            for seed in range(1 if dtype == torch.float64 else DRAWS):
                case = Case(rows, dtype, head, seed)
                if "bias" in case.tensors:  # a token that the model alone excludes is too far
                    case.tensors["bias"][[0, 200]] = -5.0
                ref = torch.randn(rows, 40).to(dtype), (torch.randn(VOCABULARY, 40) / 4).to(dtype)
                leaves, wide = case.leaves(), case.leaves(torch.float64)
                value = linear_kl(
                    ref_hidden=ref[0], ref_weight=ref[1], chunk_rows=chunk_rows,
                    **leaves, **case.head,
                )  # fmt: skip
                plain, exact = plain_kl(case, leaves, *ref), plain_kl(case, wide, *ref)
                three = [
                    with_gradients(one, of)
                    for one, of in ((value, leaves), (plain, leaves), (exact, wide))
                ]
                errors.add(["value", *leaves], *three)
            errors.assert_as_exact()


def forgotten(rows: int, dtype: torch.dtype, head: dict) -> Case:
    """Every third token sure, and a sequence far below its reference."""
    case = Case(rows, dtype, head)
    sure = case.tensors["weight"][case.labels[::3]]
    case.tensors["hidden"][::3] += 9 * sure
    case.ref = torch.tensor([-9.0, 0.0, 4000.0, -100.0])
    return case


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("rows", slow_but([37, 263], [37, 93, 200, 263]))
@pytest.mark.parametrize("chunk_rows", [None, 40])
def test_skipped_rows_leave_nothing_behind_in_the_padding(rows, chunk_rows, head):
    """What is compacted leaves stale logits where rows are padded."""
    softcap = None if head["softcap"] is None else 200.0  # high enough to be sure
    case, loss = forgotten(rows, torch.float64, {**head, "softcap": softcap}), NPO(0.1)
    leaves = case.leaves()
    skipped = Skipped()
    found = with_gradients(
        case.ours(leaves, loss, chunk_rows=chunk_rows, skip_below=1e-6, skipped=skipped), leaves
    )
    assert 0.2 < skipped.share < 1
    exact = with_gradients(case.loss(leaves, loss), leaves)
    for got, want in zip(found, exact, strict=True):
        assert float((got - want).norm()) <= 1e-5 * float(want.norm())


@pytest.mark.parametrize("rows", [93, 200, 263])
@pytest.mark.parametrize("chunk_rows", [None, 40])
def test_a_frozen_part_changes_nothing_for_the_others(rows, chunk_rows):
    case, loss = Case(rows, torch.bfloat16, CAPPED), NPO(0.1)
    leaves = case.leaves()
    _, *all_three = with_gradients(case.ours(leaves, loss, chunk_rows=chunk_rows), leaves)
    for at, name in enumerate(leaves):
        alone = {k: t.detach().requires_grad_(k == name) for k, t in leaves.items()}
        value = case.ours(alone, loss, chunk_rows=chunk_rows)
        (found,) = torch.autograd.grad(value, alone[name])
        assert_near(found, all_three[at], 0.01, name)


def test_no_rows_give_zero_gradients():
    case = Case(0, torch.bfloat16, BIAS)
    leaves = case.leaves()
    for chunk_rows in (None, 10, 0):
        case.cu_seqlens, case.ref = torch.tensor([0]), torch.empty(0)
        value = case.ours(leaves, NPO(0.1), chunk_rows=chunk_rows)
        for one in with_gradients(value, leaves):
            assert not one.any()
