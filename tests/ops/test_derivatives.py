"""Second and forward-mode derivatives: right, or a UserError that names the function."""

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import npo_fast
from npo_fast import UserError
from npo_fast.kernels.layout import opmath_dtype
from npo_fast.losses import KL, Averaged
from npo_fast.ops.vocab_parallel import VocabularySlice, gather_rows, vocab_parallel_embedding
from tests.helpers import slow_but

ROWS, WIDTH, VOCABULARY = 6, 4, 9
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LABELS = torch.tensor([3, 0, 8, 8, 1, 5])
CU_SEQLENS = torch.tensor([0, 2, 6])
REF = torch.tensor([-4.0, -9.0])
REF_OF_TOKENS = torch.full((ROWS,), -2.0)

Leaves = tuple[Tensor, Tensor, Tensor]  # hidden, weight, bias


def leaves(dtype: torch.dtype = torch.float64) -> Leaves:
    shapes = (ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)
    return tuple(torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes)  # type: ignore


def loss(loss: object, reference: Tensor | None = REF, **options: object) -> Callable[..., Tensor]:
    return lambda h, w, b: npo_fast.linear_sequence_loss(
        h, w, LABELS, CU_SEQLENS, loss, ref_log_probs=reference, bias=b, **options
    )[0]


def log_probs(**options: object) -> Callable[..., Tensor]:
    return lambda h, w, b: npo_fast.linear_log_probs(h, w, LABELS, bias=b, **options)


def kl(**options: object) -> Callable[..., Tensor]:
    def call(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ref = [torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.dtype) for t in (h, w)]
        return npo_fast.linear_kl(h, w, *ref, bias=b, labels=LABELS, **options)

    return call


def module(loss: nn.Module, ref: bool = True) -> Callable[..., Tensor]:
    reference = {"ref_log_probs": REF} if ref else {}
    return lambda h, w, b: loss(w, h, LABELS, b, cu_seqlens=CU_SEQLENS, **reference)


def kl_module(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return npo_fast.FusedLinearKLLoss()(w, h, LABELS, b, 2 * h.detach(), w.detach())


def kl_loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    head, ref_head = {"weight": w, "bias": b}, {"ref_weight": w.detach()}
    return KL()(h, head, 2 * h.detach(), ref_head)


# what a user calls, from hidden states and a head: the function that errors name, and the call
ONCE: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "log_probs": ("linear_log_probs", log_probs()),
    "log_probs chunks": ("linear_log_probs", log_probs(chunk_rows=4)),
    "log_probs no logits": ("linear_log_probs", log_probs(chunk_rows=0)),
    "log_probs softcap": ("linear_log_probs", log_probs(softcap=2.0)),
    "sequence_log_probs": (
        "linear_log_probs",
        lambda h, w, b: npo_fast.sequence_log_probs(
            h, w, LABELS, bias=b, cu_seqlens=CU_SEQLENS, average_log_prob=True
        ),
    ),
    "npo_loss": (
        "linear_sequence_loss",
        lambda h, w, b: npo_fast.npo_loss(h, w, LABELS, CU_SEQLENS, REF, bias=b),
    ),
    **{f"loss {way}": ("linear_sequence_loss", loss(npo_fast.NPO(), reduction=way))
       for way in ("mean", "token_mean", "sum")},
    "loss none": ("linear_", loss(npo_fast.NPO(), reduction="none")),
    "loss chunks": ("linear_sequence_loss", loss(npo_fast.NPO(), chunk_rows=3)),
    "loss no logits": ("linear_sequence_loss", loss(npo_fast.NPO(), chunk_rows=0)),
    "loss skipping": ("linear_sequence_loss", loss(npo_fast.NPO(), skip_below=0.1)),
    **{type(x).__name__: ("linear_sequence_loss", loss(x))
       for x in (npo_fast.GA(), npo_fast.NLL(), npo_fast.SimNPO(), npo_fast.DPO(), npo_fast.KTO(),
                 npo_fast.WGA(), npo_fast.SatImp(), npo_fast.CEU(), Averaged(npo_fast.NPO()))},
    "TNPO": ("linear_sequence_loss", loss(npo_fast.TNPO(), REF_OF_TOKENS)),
    **{f"kl {way}": ("linear_kl", kl(reduction=way)) for way in ("mean", "sum", "none")},
    "kl demotion": ("linear_kl", kl(demotion=1.0, softcap=3.0)),
    "KL": ("linear_kl", kl_loss),
    "FusedLinearSequenceLoss": (
        "linear_", module(npo_fast.FusedLinearSequenceLoss(npo_fast.NPO(), reduction="none"))
    ),
    **{name: ("linear_sequence_loss", module(getattr(npo_fast, name)()))
       for name in ("FusedLinearNPOLoss", "FusedLinearDPOLoss", "FusedLinearKTOLoss",
                    "FusedLinearSimNPOLoss", "FusedLinearGALoss", "FusedLinearNLLLoss")},
    "FusedLinearKLLoss": ("linear_kl", kl_module),
}  # fmt: skip

# what has derivatives of every order: of log-probs
ALWAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "segment_sum": lambda x: npo_fast.segment_sum(x, CU_SEQLENS).square(),
    **{type(one).__name__: lambda x, one=one: one(x, CU_SEQLENS, REF.to(x))
       for one in (npo_fast.NPO(), npo_fast.SimNPO(), npo_fast.DPO(), npo_fast.KTO(),
                   npo_fast.CEU(), Averaged(npo_fast.NPO()))},
}  # fmt: skip
CONSTANT_SLOPE = {"GA", "NLL", "TNPO", "WGA", "SatImp"}  # a number, or weights without gradient


def test_every_public_function_of_tensors_is_in_the_tables() -> None:
    covered = {*ONCE, *ALWAYS, *CONSTANT_SLOPE, "linear_log_probs", "linear_sequence_loss"}
    covered |= {"linear_kl", "sequence_log_probs"}
    covered |= {"suggest_beta"}  # a number
    for name in npo_fast.__all__:
        value = getattr(npo_fast, name)
        home = getattr(value, "__module__", "") if inspect.isroutine(value) else ""
        is_module = inspect.isclass(value) and issubclass(value, nn.Module)
        is_loss = inspect.isclass(value) and value.__module__.startswith("npo_fast.losses")
        if is_module or is_loss or home.startswith(("npo_fast.ops", "npo_fast.losses")):
            assert name in covered, f"{name} is new: add it to ONCE or ALWAYS"


@pytest.mark.parametrize("case", ONCE)
def test_a_derivative_of_a_gradient_is_an_error_that_names_the_function(case: str) -> None:
    name, call = ONCE[case]
    tensors = leaves()
    bases = [t.detach().clone().requires_grad_() for t in tensors]
    through = [torch.tanh(base) for base in bases]
    gradients = torch.autograd.grad(call(*through).sum(), bases, create_graph=True)
    plain = torch.autograd.grad(call(*through).sum(), bases)
    for got, want in zip(gradients, plain, strict=True):
        torch.testing.assert_close(got, want)  # the first derivative is right all the same
    penalty = sum(g.square().sum() for g in gradients)
    for inputs in (bases[:1], bases[1:2], bases[2:]):
        with pytest.raises(UserError, match=rf"^{name}.* once, not twice: .*log_softmax"):
            torch.autograd.grad(penalty, inputs, retain_graph=True)
    with pytest.raises(UserError, match=name):
        penalty.backward()


@pytest.mark.parametrize("case", ONCE)
def test_a_hessian_is_an_error_that_names_the_function(case: str) -> None:
    name, call = ONCE[case]
    hidden, weight, bias = (t.detach() for t in leaves())
    of_hidden = lambda h: call(h, weight, bias).sum()  # noqa: E731
    tools: dict[str, Callable[[], object]] = {
        "hessian": lambda: torch.autograd.functional.hessian(of_hidden, hidden),
        "hvp": lambda: torch.autograd.functional.hvp(of_hidden, hidden, torch.ones_like(hidden)),
        "func.grad": lambda: torch.func.grad(of_hidden)(hidden),
        "func.hessian": lambda: torch.func.hessian(of_hidden)(hidden),
        "func.jacrev": lambda: torch.func.jacrev(of_hidden)(hidden),
        "func.jacfwd": lambda: torch.func.jacfwd(of_hidden)(hidden),
        "func.jvp": lambda: torch.func.jvp(of_hidden, (hidden,), (torch.ones_like(hidden),)),
        "func.vjp": lambda: torch.func.vjp(of_hidden, hidden),
        "func.vmap": lambda: torch.func.vmap(of_hidden)(torch.stack([hidden, hidden])),
    }
    for use in tools.values():
        with pytest.raises(UserError, match=name):
            use()


@pytest.mark.parametrize("case", ONCE)
@pytest.mark.parametrize("place", range(3), ids=("hidden", "weight", "bias"))
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_a_dual_number_is_an_error_that_names_the_function(
    case: str, place: int, needs_grad: bool, grad_mode: Callable[[], object]
) -> None:
    name, call = ONCE[case]
    tensors = [t.detach().requires_grad_(needs_grad) for t in leaves()]
    with grad_mode(), forward_ad.dual_level():  # type: ignore[attr-defined]
        tensors[place] = forward_ad.make_dual(tensors[place], torch.ones_like(tensors[place]))
        with pytest.raises(UserError, match=rf"^{name}.* has no forward-mode derivative: "):
            call(*tensors)


@pytest.mark.parametrize("dtype", slow_but([torch.float16], DTYPES), ids=str)
@pytest.mark.parametrize("case", [c for c in ONCE if c.startswith(("log_probs", "loss", "kl"))])
def test_the_errors_come_in_every_dtype(case: str, dtype: torch.dtype) -> None:
    name, call = ONCE[case]
    hidden, weight, bias = leaves(dtype)
    value = call(hidden * 1, weight, bias).sum()
    assert value.dtype == opmath_dtype(dtype)
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(UserError, match=name):
        torch.autograd.grad(gradient.sum(), hidden)


@pytest.mark.parametrize("case", ALWAYS)
def test_losses_of_log_probs_have_derivatives_of_every_order(case: str) -> None:
    call = ALWAYS[case]
    x = -torch.rand(ROWS, dtype=torch.float64) - 0.5
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(call, leaf, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaf)
    total = lambda x: call(x).sum()  # noqa: E731
    expected = torch.autograd.functional.hessian(total, x)
    torch.testing.assert_close(torch.func.hessian(total)(x), expected)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(total))(torch.stack([x, 2 * x]))[0],
        torch.autograd.functional.jacobian(total, x),
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["log_probs", "loss mean", "loss none", "kl mean", "kl none"])
def test_activation_checkpoints_go_on_working(case: str, reentrant: bool) -> None:
    call, tensors = ONCE[case][1], leaves()
    expected = torch.autograd.grad(call(*tensors).sum(), tensors)
    checkpoint(call, *tensors, use_reentrant=reentrant).sum().backward()
    for tensor, want in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.grad, want, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["log_probs", "log_probs no logits", "loss mean", "kl mean"])
def test_compiled_calls_give_first_derivatives_and_no_wrong_ones(case: str) -> None:
    name, call = ONCE[case]
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager")
    tensors = leaves()
    expected = torch.autograd.grad(call(*tensors).sum(), tensors)
    got = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    for one, want in zip(got, expected, strict=True):
        torch.testing.assert_close(one, want)

    def twice() -> None:
        (gradient,) = torch.autograd.grad(compiled(*tensors).sum(), tensors[:1], create_graph=True)
        torch.autograd.grad(gradient.sum(), tensors[0])

    with pytest.raises((UserError, RuntimeError), match="once, not twice|create_graph=False"):
        twice()
    detached = [t.detach() for t in tensors]
    with pytest.raises(UserError, match=name):
        torch.func.jvp(lambda h: compiled(h, *detached[1:]), (detached[0],), (detached[0],))


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD  # type: ignore[misc]
    finally:
        dist.destroy_process_group()


def test_a_sliced_vocabulary_raises_where_a_gradient_is_differentiated(
    group: dist.ProcessGroup,
) -> None:
    vocabulary = VocabularySlice(group, VOCABULARY)
    ids = torch.tensor([1, 2, 8])
    cases: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "linear_sequence_loss": loss(npo_fast.NPO(), vocabulary=vocabulary),
        "gather_rows": lambda h, w, b: gather_rows(h, [ROWS], group).square(),
        "vocab_parallel_embedding": lambda h, w, b: vocab_parallel_embedding(
            ids, w, vocabulary
        ).square(),
    }
    for name, call in cases.items():
        tensors = leaves()
        through = [torch.tanh(t) for t in tensors]
        gradients = torch.autograd.grad(
            call(*through).sum(), tensors, create_graph=True, allow_unused=True
        )
        penalty = sum(g.square().sum() for g in gradients if g is not None)
        with pytest.raises(UserError, match=rf"^{name}.* once, not twice"):
            torch.autograd.grad(penalty, tensors, allow_unused=True)
        plain = [t.detach() for t in tensors]
        with forward_ad.dual_level(), pytest.raises(UserError, match=name):
            call(*(forward_ad.make_dual(t, torch.ones_like(t)) for t in plain))


def test_weights_that_changed_since_the_forward_pass_are_no_error_without_create_graph() -> None:
    """An optimizer may step before another loss runs backward: nothing of the head is read."""
    hidden, weight, bias = leaves()
    value = loss(npo_fast.NPO())(hidden, weight, bias)
    expected = torch.autograd.grad(value, hidden)
    value = loss(npo_fast.NPO())(hidden, weight, bias)
    with torch.no_grad():
        weight.add_(1)
    torch.testing.assert_close(torch.autograd.grad(value, hidden), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_several_upstream_gradients_at_once_are_as_many_backward_passes(reduction):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (6, 20))
    labels, offsets = torch.arange(6), torch.tensor([0, 3, 6])

    def loss():
        return npo_fast.linear_sequence_loss(
            hidden, weight, labels, offsets, npo_fast.NPO(0.1), ref_log_probs=torch.zeros(2),
            reduction=reduction,
        )[0]  # fmt: skip

    upstream = torch.randn(3, *loss().shape, generator=generator)
    batched = torch.autograd.grad(loss(), (hidden, weight), upstream, is_grads_batched=True)
    for i, each in enumerate(upstream):
        single = torch.autograd.grad(loss(), (hidden, weight), each)
        for many, one in zip(batched, single, strict=True):
            torch.testing.assert_close(many[i], one)
