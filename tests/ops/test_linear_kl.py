"""KL to a reference: the row kernels and ``linear_kl`` against plain PyTorch in fp64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast import linear_kl
from npo_fast.kernels import OPERATORS
from npo_fast.kernels.transform import HeadTransform
from tests.helpers import assert_as_exact, free_error, slow_but

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton runs
OP = torch.ops.npo_fast.row_kl_
HALF = (torch.bfloat16, torch.float16)
SETTINGS = [
    (None, 1.0, None, 1.0),
    (5.0, 1.0, 5.0, 1.0),
    (None, 0.25, 30.0, -1.5),
    (3.0, 2.0, None, 1.0),
]


def triton_op(logits, ref_logits, *setting):
    """On the GPU where there is one, else in the interpreter; the logits come back where they were.

    Several slices of the vocabulary, and several blocks of rows.
    """
    pytest.importorskip("triton")
    from npo_fast.kernels.triton.config import ROW
    from npo_fast.kernels.triton.row_kl import row_kl

    config = replace(ROW["sm_80"], block_rows=4, block_columns=256, programs=4)
    there, ref_there = logits.to(DEVICE), ref_logits.to(DEVICE)
    kl = row_kl(
        there, ref_there, HeadTransform(*setting[:2]), HeadTransform(*setting[2:]), config=config
    )
    logits.copy_(there)
    ref_logits.copy_(ref_there)
    return kl.to(logits.device)


KERNELS = {"torch": OPERATORS["row_kl_"][0], "operator": OP, "triton": triton_op}


def activate(raw: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = raw.to(torch.promote_types(raw.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z * logit_scale


def plain_row_kl(raw: Tensor, ref: Tensor, setting) -> tuple[Tensor, Tensor]:
    leaf = raw.detach().clone().requires_grad_()
    log_p = activate(leaf, *setting[:2]).log_softmax(-1)
    log_p_ref = activate(ref, *setting[2:]).log_softmax(-1)
    kl = F.kl_div(log_p, log_p_ref, reduction="none", log_target=True).sum(-1)
    return kl.detach(), torch.autograd.grad(kl.sum(), leaf)[0]


def rows(shape, dtype, distance, spread=4.0):
    raw = torch.randn(shape) * spread
    return (raw + distance * torch.randn(shape)).to(dtype), raw.to(dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "shape", slow_but([(1, 1), (3, 7)], [(1, 1), (3, 7), (4, 1000), (2, 2051)]), ids=str
)
def test_the_row_kernel_is_as_exact_as_pytorch(kernel, setting, shape, poison_new_tensors):
    # on a GPU each dtype is several compilations
    half = () if kernel == "triton" and shape != (4, 1000) else HALF
    for dtype in (torch.float32, *half):
        raw, ref = rows(shape, dtype, 1.0)
        exact = plain_row_kl(raw.double(), ref.double(), setting)
        plain = plain_row_kl(raw, ref, setting)
        gradient, before = raw.clone(), ref.clone()
        found = KERNELS[kernel](gradient, ref, *setting), gradient
        assert torch.equal(ref, before), "the reference's logits are left alone"
        for got, other, truth in zip(found, plain, exact, strict=True):
            assert got.dtype == other.dtype
            assert_as_exact(
                got, other, truth,
                least_size=1.0,  # a gradient is the difference of two distributions
                device=DEVICE if kernel == "triton" else "cpu",
                truncated=kernel == "triton" and DEVICE == "cpu",
            )  # fmt: skip


@pytest.mark.parametrize("kernel", ["torch", "operator"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_fp64_rows_stay_fp64(kernel, setting):
    raw, ref = rows((3, 131), torch.float64, 1.0)
    exact = plain_row_kl(raw, ref, setting)
    kl = KERNELS[kernel](raw, ref, *setting)
    torch.testing.assert_close((kl, raw), exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kernel", slow_but(["torch", "operator"], KERNELS))
@pytest.mark.parametrize("distance", slow_but([1e-3], [1e-1, 1e-2, 1e-3, 1e-4]))
def test_a_small_divergence_keeps_its_digits(kernel, distance):
    """Plain PyTorch in fp32 finds anything from -1e-7 to 1e-7 where the truth is 1e-9."""
    raw, ref = rows((8, 3000), torch.float32, distance)
    exact, exact_gradient = plain_row_kl(raw.double(), ref.double(), SETTINGS[0])
    kl = KERNELS[kernel](raw, ref, *SETTINGS[0])
    # a logit of 10 has a rounding error of 5e-7
    bound = 1e-4 + 2 * free_error(DEVICE if kernel == "triton" else "cpu") / distance
    torch.testing.assert_close(kl.double(), exact, rtol=bound, atol=0)
    error = (raw.double() - exact_gradient).norm() / exact_gradient.norm()
    assert error <= bound


@pytest.mark.parametrize("kernel", slow_but(["torch", "operator"], KERNELS))
def test_equal_logits_diverge_by_exactly_nothing(kernel):
    for dtype in (torch.float32, *HALF):
        raw, ref = rows((4, 1003), dtype, 0.0)
        assert torch.equal(KERNELS[kernel](raw, ref, *SETTINGS[0]), torch.zeros(4))
        assert not raw.any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_masked_tokens_add_nothing_and_far_logits_do_not_overflow(kernel):
    raw, ref = rows((4, 600), torch.float32, 1.0)
    raw[0, 5:90] = ref[0, 5:90] = -torch.inf  # both exclude a token: it adds nothing
    ref[1, 7] = -torch.inf  # the reference alone
    raw[2, 7] = -torch.inf  # the model alone: infinitely far
    raw[3], ref[3] = 0.0, 0.0
    raw[3, 0], ref[3, 1] = 200.0, 200.0  # exp(x) overflows
    p_ref = ref.double().softmax(-1)
    log_ratio = ref.double().log_softmax(-1) - raw.double().log_softmax(-1)
    exact = torch.where(p_ref == 0, 0.0, p_ref * log_ratio).sum(-1)
    kl = KERNELS[kernel](raw, ref, *SETTINGS[0])
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)
    assert kl[2] == torch.inf
    assert raw.isfinite().all()


@pytest.mark.parametrize("kernel", slow_but(set(KERNELS) - {"triton"}, KERNELS))
@pytest.mark.parametrize("which", ["model", "reference"])
def test_a_nan_shows_in_its_row_alone(kernel, which):
    raw, ref = rows((3, 700), torch.float32, 1.0)
    (raw if which == "model" else ref)[1, 650] = torch.nan
    kl = KERNELS[kernel](raw, ref, *SETTINGS[0])
    assert kl.isnan().tolist() == [False, True, False]
    assert raw.isnan().any(1).tolist() == [False, True, False]


def test_rows_may_be_strided():
    wide, wide_ref = rows((4, 300), torch.float32, 1.0)
    canvas = wide.clone()
    dense = wide[:, 50:150].clone()
    kl = OP(dense, wide_ref[:, :100].clone(), *SETTINGS[0])
    transposed = wide[:, 50:150].t().contiguous().t()
    for strided in (canvas[:, 50:150], transposed):
        # equal but for rounding: PyTorch's own sums run in the order of memory
        torch.testing.assert_close(OP(strided, wide_ref[:, :100], *SETTINGS[0]), kl)
        torch.testing.assert_close(strided, dense)
    assert torch.equal(canvas[:, :50], wide[:, :50])
    assert torch.equal(canvas[:, 150:], wide[:, 150:])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_the_operator_keeps_the_rules_of_torch_library(dtype):
    raw, ref = rows((3, 17), dtype, 1.0)
    for setting in SETTINGS:
        torch.library.opcheck(OP.default, (raw.clone(), ref, *setting))


def test_the_operator_has_a_kernel_for_every_device():
    for key in ("CUDA", "CompositeExplicitAutograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("npo_fast::row_kl_", key)


# ---- linear_kl ----


def case(n=37, d=13, ref_d=9, v=131, dtype=torch.float64, bias=True) -> dict[str, Tensor]:
    tensors = {
        "hidden": torch.randn(n, d, dtype=dtype).requires_grad_(),
        "weight": torch.randn(v, d, dtype=dtype).requires_grad_(),
        "ref_hidden": torch.randn(n, ref_d, dtype=dtype),
        "ref_weight": torch.randn(v, ref_d, dtype=dtype),
    }
    if bias:
        tensors["bias"] = torch.randn(v, dtype=dtype).requires_grad_()
        tensors["ref_bias"] = torch.randn(v, dtype=dtype)
    return tensors


def plain_kl(
    hidden, weight, ref_hidden, ref_weight, *, bias=None, ref_bias=None, setting=SETTINGS[0],
    labels=None, demotion=0.0, reduction="mean",
):  # fmt: skip
    logits = F.linear(hidden, weight, bias)
    z = activate(logits, *setting[:2])
    ref_z = activate(F.linear(ref_hidden, ref_weight, ref_bias), *setting[2:])
    if labels is not None:
        ref_z = ref_z - demotion * F.one_hot(labels, z.shape[-1])
    kl = (ref_z.softmax(-1) * (ref_z.log_softmax(-1) - z.log_softmax(-1))).sum(-1)
    return kl.mean() if reduction == "mean" else kl.sum()


def named(setting):
    return dict(
        zip(("softcap", "logit_scale", "ref_softcap", "ref_logit_scale"), setting, strict=True)
    )


def learned(tensors):
    return {name: t for name, t in tensors.items() if t.requires_grad}


def gradients(value, tensors, scale=1.0):
    return torch.autograd.grad(scale * value, list(learned(tensors).values()))


@pytest.mark.parametrize("chunk_rows", slow_but([10], [None, 1, 10]))
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("demotion", [0.0, 3.0])
def test_value_and_gradients_are_those_of_plain_pytorch(chunk_rows, setting, demotion):
    for bias in (True, False):
        tensors = case(bias=bias)
        options = {"labels": torch.randint(0, 131, (37,)), "demotion": demotion}
        for reduction in ("mean", "sum"):
            found = linear_kl(
                **tensors, **options, **named(setting), reduction=reduction, chunk_rows=chunk_rows
            )
            wanted = plain_kl(**tensors, **options, setting=setting, reduction=reduction)
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(
                gradients(found, tensors, -1.7), gradients(wanted, tensors, -1.7)
            )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype):
    errors: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(4):
        tensors = case(64, 48, 48, 1023, dtype)
        with torch.no_grad():
            for name in ("weight", "ref_weight"):
                tensors[name].mul_(0.3)
        wide = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in tensors.items()}
        exact = gradients(plain_kl(**wide), wide)
        for who, value in (("ours", linear_kl(**tensors)), ("plain", plain_kl(**tensors))):
            errors[who] += [
                float((g.double() - e).norm() / e.norm())
                for g, e in zip(gradients(value, tensors), exact, strict=True)
            ]
    ours, plain = (torch.tensor(errors[who]).reshape(4, 3).square().mean(0) for who in errors)
    assert (ours.sqrt() <= 2 * plain.sqrt()).all()


def test_gradients_agree_with_finite_differences():
    tensors = case(7, 4, 3, 9)
    fixed = {"ref_hidden": tensors["ref_hidden"], "ref_weight": tensors["ref_weight"]}

    def kl(hidden, weight, bias):
        return linear_kl(hidden, weight, bias=bias, softcap=4.0, chunk_rows=3, **fixed)

    assert torch.autograd.gradcheck(kl, tuple(learned(tensors).values()))


def test_a_model_that_is_its_reference_has_neither_loss_nor_gradient():
    tensors = case(dtype=torch.float32)
    tensors |= {f"ref_{k}": tensors[k].detach().clone() for k in ("hidden", "weight", "bias")}
    value = linear_kl(**tensors)
    assert value == 0
    assert not any(g.any() for g in gradients(value, tensors))


def test_demotion_lowers_the_label_and_keeps_the_odds_of_the_others():
    """The minimum over logits is the reference with its label's logit lowered."""
    ref = torch.randn(5, 8, dtype=torch.float64)
    labels, eye = torch.randint(0, 8, (5,)), torch.eye(8, dtype=torch.float64)
    target = ref - 2.5 * F.one_hot(labels, 8)
    options = {"labels": labels, "demotion": 2.5}
    at_target = linear_kl(target.requires_grad_(), eye, ref, eye, **options)
    assert float(at_target.detach().abs()) < 1e-15
    assert float(linear_kl(ref, eye, ref, eye, **options)) > 1e-2


def test_a_frozen_head_gets_no_gradient():
    tensors = case()
    full = gradients(linear_kl(**tensors), tensors)
    for name in ("weight", "bias"):
        tensors[name] = tensors[name].detach()
    (found,) = gradients(linear_kl(**tensors), tensors)
    torch.testing.assert_close(found, full[0])


def test_no_gradient_reaches_the_reference_and_none_is_made_without_grad():
    tensors = case()
    tensors["ref_weight"].requires_grad_()
    linear_kl(**tensors).backward()
    assert tensors["ref_weight"].grad is None
    with torch.no_grad():
        assert not linear_kl(**tensors).requires_grad


def test_a_tied_reference_head_is_a_constant():
    tensors = case(ref_d=13)
    detached = {**tensors, "ref_weight": tensors["weight"].detach()}
    tied = {**tensors, "ref_weight": tensors["weight"]}
    torch.testing.assert_close(
        gradients(linear_kl(**tied), tensors), gradients(plain_kl(**detached), tensors)
    )


def test_autocast_computes_in_half_precision_and_keeps_fp32_gradients():
    tensors = case(dtype=torch.float32)
    half = {k: t.detach().bfloat16().requires_grad_(t.requires_grad) for k, t in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        value = linear_kl(**tensors)
    expected = linear_kl(**half)
    assert torch.equal(value, expected)
    for found, wanted in zip(gradients(value, tensors), gradients(expected, half), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted.float())


def test_layout_of_the_inputs_does_not_matter():
    tensors = case()
    odd = {k: t.detach().t().contiguous().t() if t.dim() == 2 else t for k, t in tensors.items()}
    torch.testing.assert_close(linear_kl(**odd), linear_kl(**tensors))


def test_an_empty_batch_costs_nothing():
    tensors = case(n=0)
    value = linear_kl(**tensors)
    assert value == 0
    assert not any(g.any() for g in gradients(value, tensors))


def test_poisoned_buffers_never_show_and_two_runs_are_bit_identical(poison_new_tensors):
    tensors = case(200, 32, 16, 1003, torch.float32)
    runs = []
    for _ in range(2):
        value = linear_kl(**tensors, chunk_rows=64)
        runs.append([value, *gradients(value, tensors)])
    assert all(t.isfinite().all() for t in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_second_backward_through_a_retained_graph_gives_the_same_gradients():
    tensors = case()
    value = linear_kl(**tensors)
    first = torch.autograd.grad(2 * value, list(learned(tensors).values()), retain_graph=True)
    for one, other in zip(first, gradients(3 * value, tensors), strict=True):
        torch.testing.assert_close(1.5 * one, other)


def test_two_chunks_of_logits_are_alive_and_no_more(monkeypatch):
    sizes: list[int] = []
    original = Tensor.new_empty

    def watch(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(Tensor, "new_empty", watch)
    monkeypatch.setattr("npo_fast.ops.cost.CHUNK_BYTES", 20 * 500 * 4)
    linear_kl(**case(300, 8, 8, 500, torch.float32)).backward()
    assert max(sizes) == 20 * 500
    assert sizes.count(20 * 500) == 2


@pytest.mark.slow
def test_a_graph_of_torch_compile_breaks_around_it_and_agrees():
    tensors = case(dtype=torch.float32)
    compiled = torch.compile(lambda **t: 2 * linear_kl(**t), backend="eager")
    torch.testing.assert_close(compiled(**tensors), 2 * linear_kl(**tensors))


MISFITS = {
    "width": ({"ref_hidden": torch.randn(8, 5)}, r"ref_hidden must be .*same D, got \(8, 5\)"),
    "rows": ({"ref_hidden": torch.randn(7, 3)}, r"ref_hidden \(7, 3\) for hidden \(8, 4\)"),
    "vocabulary": ({"ref_weight": torch.randn(12, 3)}, r"ref_weight \(12, 3\) for weight"),
    "dtype": (
        {"ref_hidden": torch.randn(8, 3).half(), "ref_weight": torch.randn(11, 3).half()},
        "one dtype, got torch.float32 and torch.float16",
    ),
    "bias": ({"ref_bias": torch.zeros(4)}, r"ref_bias must be \(11,\)"),
    "softcap": ({"ref_softcap": -1.0}, "ref_softcap must be positive or None, got -1.0"),
    "device": ({"ref_weight": torch.randn(11, 3, device="meta")}, "ref_weight on meta"),
    "reduction": ({"reduction": "token_mean"}, "'token_mean'"),
    "chunk": ({"chunk_rows": 0}, "got 0"),
    "labels": ({"labels": torch.zeros(7).long()}, r"labels must be \(8,\)"),
    "label": ({"labels": torch.tensor([0] * 7 + [11])}, r"labels\[7\] = 11 is outside"),
    "no labels": ({"demotion": 1.0}, "comes with labels, got 1.0 without labels"),
    "demotion": ({"demotion": -1.0, "labels": torch.zeros(8).long()}, "got -1.0"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_by_name(name):
    changed, message = MISFITS[name]
    good = {
        "hidden": torch.randn(8, 4),
        "weight": torch.randn(11, 4),
        "ref_hidden": torch.randn(8, 3),
        "ref_weight": torch.randn(11, 3),
    }
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**good, **changed})
