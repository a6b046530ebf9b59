"""The fused operators against plain PyTorch in fp64, on shapes that do not divide evenly."""

import itertools

import pytest
import torch
from torch import Tensor

import npo_fast
from npo_fast import GA, NLL, NPO, SimNPO, linear_log_probs, linear_sequence_loss, npo_loss
from npo_fast.kernels import reference
from tests.helpers import slow_but

LOSSES = [NPO(0.1), NPO(3.0), SimNPO(2.5, 0.1), GA(), NLL()]
BOUNDS = [0, 1, 1, 8, 9, 30, 37]  # a one-token, an empty and a long sequence
HEADS = [(None, 1.0, False), (30.0, 1.0, False), (None, 0.25, True), (3.0, 2.0, True)]


def inputs(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, bias: bool = False
) -> dict[str, Tensor]:
    tensors = {
        "hidden": torch.randn(rows, width, dtype=dtype),
        "weight": torch.randn(vocabulary, width, dtype=dtype),
    }
    if bias:
        tensors["bias"] = torch.randn(vocabulary, dtype=dtype)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def plain_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    z = hidden @ weight.t()
    z = z if bias is None else z + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = (z * logit_scale).to(torch.promote_types(z.dtype, torch.float32))
    return z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def plain_loss(tensors, labels, cu_seqlens, loss, ref, reduction, **head) -> Tensor:
    log_probs = plain_log_probs(labels=labels, **tensors, **head)
    values = loss(log_probs, cu_seqlens, None if ref is None else ref.to(log_probs.dtype))
    count = {"mean": len(values), "token_mean": len(log_probs), "sum": 1}[reduction]
    return values.sum() / count


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def gradients(value: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(tensors, torch.autograd.grad(value, list(tensors.values())), strict=True))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("chunk_rows", slow_but([0, 5], [None, 0, 1, 5, 8, 36]))
@pytest.mark.parametrize(("softcap", "logit_scale", "bias"), HEADS)
def test_loss_and_gradients_are_those_of_plain_pytorch(
    loss, chunk_rows, softcap, logit_scale, bias
):
    tensors = inputs(37, 13, 131, torch.float64, bias)
    labels = torch.randint(0, 131, (37,))
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    ref = 3 * torch.randn(6, dtype=torch.float64) - 20
    head = {"softcap": softcap, "logit_scale": logit_scale}
    for reduction in ("mean", "token_mean", "sum"):
        value, sequence_log_probs = linear_sequence_loss(
            labels=labels, cu_seqlens=cu_seqlens, loss=loss, ref_log_probs=ref,
            reduction=reduction, chunk_rows=chunk_rows, **tensors, **head,
        )  # fmt: skip
        expected = plain_loss(tensors, labels, cu_seqlens, loss, ref, reduction, **head)
        torch.testing.assert_close(value, expected)
        found, wanted = gradients(1.7 * value, tensors), gradients(1.7 * expected, tensors)
        for name in tensors:
            torch.testing.assert_close(found[name], wanted[name], msg=name)
        token = plain_log_probs(labels=labels, **tensors, **head)
        sums = [token[a:b].sum() for a, b in itertools.pairwise(BOUNDS)]
        torch.testing.assert_close(sequence_log_probs, torch.stack(sums).detach())
        assert not sequence_log_probs.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("softcap", "logit_scale", "bias"), HEADS)
@pytest.mark.parametrize(
    "shape", slow_but([(37, 32, 507)], [(37, 32, 507), (5, 13, 1), (64, 252, 1023)])
)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, softcap, logit_scale, bias, shape):
    """Root mean square over draws: one draw of a rounding error says little."""
    rows, width, vocabulary = shape
    head = {"softcap": softcap, "logit_scale": logit_scale}
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for _ in range(6):
        tensors = inputs(rows, width, vocabulary, dtype, bias)
        with torch.no_grad():
            tensors["weight"].mul_(0.3)
        labels = torch.randint(0, vocabulary, (rows,))
        cu_seqlens = torch.tensor([0, 1, rows // 2, rows], dtype=torch.int32)
        ref = torch.full((3,), -30.0)
        wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
        exact = plain_loss(wide, labels, cu_seqlens, NPO(0.1), ref, "mean", **head)
        plain = plain_loss(tensors, labels, cu_seqlens, NPO(0.1), ref, "mean", **head)
        value, _ = linear_sequence_loss(
            labels=labels, cu_seqlens=cu_seqlens, loss=NPO(0.1), ref_log_probs=ref,
            **tensors, **head,
        )  # fmt: skip
        exact_grads = gradients(exact, wide)
        for errors, of in ((ours, value), (theirs, plain)):
            for name, found in gradients(of, tensors).items():
                errors.setdefault(name, []).append(relative(found, exact_grads[name]))
    for name in ours:
        found, bound = (torch.tensor(e[name]).square().mean().sqrt() for e in (ours, theirs))
        assert found <= max(2 * bound, torch.finfo(dtype).eps), name


@pytest.mark.parametrize("chunk_rows", [None, 0, 1, 7])
def test_log_probs_take_any_upstream_gradient(chunk_rows):
    tensors = inputs(23, 11, 301, torch.float64, bias=True)
    labels, upstream = torch.randint(0, 301, (23,)), torch.randn(23, dtype=torch.float64)
    head = {"softcap": 5.0, "logit_scale": 0.5}
    found = linear_log_probs(labels=labels, chunk_rows=chunk_rows, **tensors, **head)
    expected = plain_log_probs(labels=labels, **tensors, **head)
    torch.testing.assert_close(found, expected)
    ours, theirs = gradients(found @ upstream, tensors), gradients(expected @ upstream, tensors)
    for name in tensors:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)


def test_gradients_agree_with_finite_differences():
    tensors = inputs(7, 4, 9, torch.float64, bias=True)
    labels, cu_seqlens = torch.randint(0, 9, (7,)), torch.tensor([0, 3, 7], dtype=torch.int32)
    ref = torch.tensor([-5.0, -9.0], dtype=torch.float64)

    def loss(hidden, weight, bias):
        return linear_sequence_loss(
            hidden, weight, labels, cu_seqlens, NPO(0.5), ref_log_probs=ref, bias=bias, chunk_rows=4
        )[0]

    def log_probs(hidden, weight, bias):
        return linear_log_probs(hidden, weight, labels, bias=bias, chunk_rows=3)

    assert torch.autograd.gradcheck(loss, tuple(tensors.values()))
    assert torch.autograd.gradcheck(log_probs, tuple(tensors.values()))


def test_a_frozen_weight_gets_no_gradient_and_no_gemm():
    tensors = inputs(9, 4, 20, torch.float32)
    labels, cu_seqlens = torch.randint(0, 20, (9,)), torch.tensor([0, 4, 9], dtype=torch.int32)
    frozen = tensors["weight"].detach()
    calls = []

    class CountMm(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
                calls.append(func)
            return func(*args, **(kwargs or {}))

    with CountMm():
        value, _ = linear_sequence_loss(tensors["hidden"], frozen, labels, cu_seqlens, GA())
    assert len(calls) == 2, "one GEMM for the logits and one for the gradient of hidden"
    full, _ = linear_sequence_loss(tensors["hidden"], tensors["weight"], labels, cu_seqlens, GA())
    (expected,) = torch.autograd.grad(full, tensors["hidden"])
    (found,) = torch.autograd.grad(value, tensors["hidden"])
    torch.testing.assert_close(found, expected)


def test_tied_weights_collect_both_gradients():
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    ids, labels = torch.randint(0, 50, (12,)), torch.randint(0, 50, (12,))
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    value, _ = linear_sequence_loss(weight[ids], weight, labels, cu_seqlens, NLL(), chunk_rows=5)
    (found,) = torch.autograd.grad(value, weight)
    log_probs = plain_log_probs(weight[ids], weight, labels)
    (expected,) = torch.autograd.grad(-log_probs.sum() / 2, weight)
    torch.testing.assert_close(found, expected)


def test_autocast_computes_in_half_precision_and_keeps_fp32_gradients():
    tensors = inputs(16, 8, 40, torch.float32)
    labels, cu_seqlens = torch.randint(0, 40, (16,)), torch.tensor([0, 16], dtype=torch.int32)
    half = {name: t.detach().bfloat16().requires_grad_() for name, t in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = linear_sequence_loss(labels=labels, cu_seqlens=cu_seqlens, loss=GA(), **tensors)
    expected, _ = linear_sequence_loss(labels=labels, cu_seqlens=cu_seqlens, loss=GA(), **half)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    found, wanted = gradients(value, tensors), gradients(expected, half)
    for name in tensors:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], wanted[name].float())


def test_a_poisoned_buffer_never_shows_through(monkeypatch):
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = empty(self, *args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    tensors = inputs(37, 13, 131, torch.float32, bias=True)
    labels = torch.randint(0, 131, (37,))
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    value, log_probs = linear_sequence_loss(
        labels=labels, cu_seqlens=cu_seqlens, loss=GA(), chunk_rows=9, **tensors
    )
    assert value.isfinite()
    assert log_probs.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(value, tensors).values())


def test_two_runs_are_bit_identical():
    tensors = inputs(200, 32, 1003, torch.float32)
    labels = torch.randint(0, 1003, (200,))
    cu_seqlens = torch.arange(0, 201, 10, dtype=torch.int32)
    runs = []
    for _ in range(2):
        value, _ = linear_sequence_loss(
            labels=labels, cu_seqlens=cu_seqlens, loss=NPO(), ref_log_probs=torch.zeros(20),
            chunk_rows=64, **tensors,
        )  # fmt: skip
        runs.append([value, *gradients(value, tensors).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_extreme_inputs_give_finite_gradients():
    """A memorised set (log-probs near 0) and a forgotten one (weights near 0)."""
    weight = torch.eye(16)[:, :8].clone().requires_grad_()
    labels = torch.arange(8)
    cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
    for scale, ref in ((200.0, -0.001), (-400.0, -0.1)):
        hidden = (scale * torch.eye(8)).requires_grad_()
        value, log_probs = linear_sequence_loss(
            hidden, weight, labels, cu_seqlens, NPO(), ref_log_probs=torch.full((2,), ref)
        )
        d_hidden, d_weight = torch.autograd.grad(value, (hidden, weight))
        assert value.isfinite()
        assert log_probs.isfinite().all()
        assert d_hidden.isfinite().all()
        assert d_weight.isfinite().all()


def test_a_nan_in_the_hidden_states_reaches_the_loss():
    tensors = inputs(8, 4, 11, torch.float32)
    hidden = tensors["hidden"].detach().clone()
    hidden[3, 2] = torch.nan
    value, _ = linear_sequence_loss(
        hidden, tensors["weight"], torch.zeros(8).long(), torch.tensor([0, 8]), GA()
    )
    assert value.isnan()


def test_an_empty_batch_costs_nothing():
    tensors = inputs(0, 4, 11, torch.float32)
    value, log_probs = linear_sequence_loss(
        labels=torch.zeros(0).long(), cu_seqlens=torch.tensor([0]), loss=GA(), **tensors
    )
    assert value == 0
    assert log_probs.shape == (0,)
    assert all((g == 0).all() for g in gradients(value, tensors).values())


def test_a_second_backward_through_a_retained_graph_gives_the_same_gradients():
    tensors = inputs(6, 4, 11, torch.float64)
    value, _ = linear_sequence_loss(
        labels=torch.zeros(6).long(), cu_seqlens=torch.tensor([0, 6]), loss=GA(), **tensors
    )
    first = torch.autograd.grad(2 * value, list(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(3 * value, list(tensors.values()))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(1.5 * one, other)


def test_npo_loss_is_the_mean_npo_loss():
    tensors = inputs(10, 4, 11, torch.float64)
    labels, cu_seqlens = torch.randint(0, 11, (10,)), torch.tensor([0, 3, 10], dtype=torch.int32)
    ref = torch.tensor([-8.0, -11.0], dtype=torch.float64)
    found = npo_loss(tensors["hidden"], tensors["weight"], labels, cu_seqlens, ref, beta=0.3)
    torch.testing.assert_close(
        found, plain_loss(tensors, labels, cu_seqlens, NPO(0.3), ref, "mean")
    )


def test_the_row_operators_keep_the_rules_of_torch_library():
    ops = torch.ops.npo_fast
    logits, labels = torch.randn(6, 17), torch.randint(0, 17, (6,))
    before = logits.clone()
    for target, *head in ((None, None, 1.0), (torch.randn(6), 3.0, 0.5)):
        torch.library.opcheck(ops.row_log_probs, (logits, labels, target, *head))
        log_probs, _, shift, share = ops.row_log_probs(logits, labels, target, *head)
        assert torch.equal(logits, before), "the log-probs are read off, and nothing is written"
        of_rows = labels, log_probs, shift, share, torch.randn(6)
        torch.library.opcheck(ops.row_gradient_, (logits, *of_rows, *head))


MISFITS = {
    "different width": ({"hidden": torch.randn(8, 5)}, r"same D, got \(8, 5\) and \(11, 4\)"),
    "different dtype": ({"hidden": torch.randn(8, 4).half()}, "one dtype"),
    "integer hidden": ({"hidden": torch.ones(8, 4).long()}, "one dtype"),
    "three dimensions": ({"hidden": torch.randn(2, 4, 4)}, r"\(2, 4, 4\)"),
    "missing labels": ({"labels": torch.zeros(7).long()}, r"labels must be \(8,\)"),
    "float labels": ({"labels": torch.zeros(8)}, "labels must be int64 or int32"),
    "label too large": ({"labels": torch.tensor([0] * 7 + [11])}, r"labels\[7\] = 11 is outside"),
    "ignored label": ({"labels": torch.tensor([-100] + [0] * 7)}, r"-100.*drop ignored"),
    "short offsets": ({"cu_seqlens": torch.tensor([0, 7])}, "the 8 rows of hidden"),
    "falling offsets": ({"cu_seqlens": torch.tensor([0, 5, 3, 8])}, r"\[0, 5, 3, 8\]"),
    "float offsets": ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "int32 or int64"),
    "no reference": ({"ref_log_probs": None}, "pass ref_log_probs"),
    "long reference": ({"ref_log_probs": torch.zeros(3)}, r"shape \(2,\)"),
    "unknown reduction": ({"reduction": "avg"}, "'avg'"),
    "no rows a chunk": ({"chunk_rows": -1}, "got -1"),
    "wrong bias": ({"bias": torch.zeros(4)}, r"bias must be \(11,\)"),
    "negative softcap": ({"softcap": -1.0}, "-1.0"),
    "other device": ({"labels": torch.zeros(8, device="meta").long()}, "labels on meta"),
    "offsets elsewhere": ({"cu_seqlens": torch.tensor([0, 3, 8], device="meta")}, "meta"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_by_name(case):
    changed, message = MISFITS[case]
    good = {
        "hidden": torch.randn(8, 4),
        "weight": torch.randn(11, 4),
        "labels": torch.zeros(8).long(),
        "cu_seqlens": torch.tensor([0, 3, 8]),
        "loss": NPO(),
        "ref_log_probs": torch.zeros(2),
    }
    linear_sequence_loss(**good)
    with pytest.raises(ValueError, match=message):
        linear_sequence_loss(**{**good, **changed})


def test_only_one_chunk_of_logits_is_alive(monkeypatch):
    """The promise of the package: no [tokens, vocabulary] buffer, whatever the loss."""
    largest = 0
    original = torch.Tensor.new_empty

    def watch(self, *args, **kwargs):
        nonlocal largest
        out = original(self, *args, **kwargs)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", watch)
    monkeypatch.setattr(reference, "TILE_BYTES", 4 * 30 * 500)
    monkeypatch.setattr(reference, "LEAST_COLUMNS", 8)
    tensors = inputs(300, 8, 500, torch.float32)
    npo_fast.linear_sequence_loss(
        labels=torch.zeros(300).long(), cu_seqlens=torch.tensor([0, 20, 300]), loss=GA(),
        chunk_rows=30, **tensors,
    )[0].backward()  # fmt: skip
    assert largest == 30 * 500


@pytest.mark.parametrize(("rows", "width"), [(37, 37), (37, 64), (128, 144)])
@pytest.mark.parametrize(("softcap", "logit_scale", "bias"), HEADS)
def test_rows_fewer_than_the_width_need_no_memory_for_logits(
    rows, width, softcap, logit_scale, bias, monkeypatch
):
    """They lie where the gradient of the weight is written last, a strip after another."""
    monkeypatch.setattr("npo_fast.ops.cost.STRIP_BYTES", 8 * width * 100)
    tensors = inputs(rows, width, 1031, torch.float64, bias)
    with torch.no_grad():
        tensors["weight"].mul_(0.2)
    labels = torch.randint(0, 1031, (rows,))
    call = {
        "labels": labels, "cu_seqlens": torch.tensor([0, 1, 1, 20, rows]), "loss": NPO(0.1),
        "ref_log_probs": torch.full((4,), -30.0, dtype=torch.float64),
        "softcap": softcap, "logit_scale": logit_scale, **tensors,
    }  # fmt: skip
    chunked = gradients(linear_sequence_loss(chunk_rows=20, **call)[0], tensors)
    largest = 0
    original = torch.Tensor.new_empty

    def watch(self, *args, **kwargs):
        nonlocal largest
        out = original(self, *args, **kwargs)
        if out.numel() != (1031 + 100) * width:  # the gradient itself, a strip longer
            largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", watch)
    value, _ = linear_sequence_loss(**call)
    assert largest <= max(rows * width, 1031)
    for name, found in gradients(value, tensors).items():
        torch.testing.assert_close(found, chunked[name], msg=name)


def half_forgotten(rows: int = 60, width: int = 16) -> dict[str, object]:
    """Sure tokens beside unsure ones, and every second sequence far below its reference."""
    tensors = inputs(rows, width, 90, torch.float64, bias=True)
    labels = torch.randint(0, 90, (rows,))
    with torch.no_grad():
        tensors["hidden"].mul_(4 / width**0.5)
        tensors["hidden"][::3] += 3 * tensors["weight"][labels[::3]]
    ref = torch.tensor([0.0, -2000.0] * 3, dtype=torch.float64)
    cu_seqlens = torch.arange(0, rows + 1, rows // 6, dtype=torch.int32)
    return {**tensors, "labels": labels, "cu_seqlens": cu_seqlens, "ref_log_probs": ref}


@pytest.mark.parametrize(("chunk_rows", "width"), [(None, 16), (None, 64), (25, 16), (7, 16)])
def test_skipping_is_exact_at_zero_and_bounded_above(chunk_rows, width):
    case = half_forgotten(width=width)
    tensors = {name: case[name] for name in ("hidden", "weight", "bias")}

    def run(**options):
        value, log_probs = linear_sequence_loss(
            loss=NPO(0.1), chunk_rows=chunk_rows, **case, **options
        )
        return value, log_probs, gradients(value, tensors)

    exact = run()
    same = run(skip_below=0.0)
    assert all(torch.equal(exact[2][name], same[2][name]) for name in tensors)

    skipped = npo_fast.Skipped()
    value, log_probs, found = run(skip_below=1e-3, skipped=skipped)
    assert torch.equal(value, exact[0])
    assert torch.equal(log_probs, exact[1])
    assert skipped.rows == 60
    assert 0.2 < skipped.share < 1
    error = float((found["weight"] - exact[2]["weight"]).norm())
    assert 0 < error <= skipped.weight_error * (1 + 1e-9)
    assert float((found["bias"] - exact[2]["bias"]).abs().sum()) <= skipped.logits_error * (
        1 + 1e-9
    )
    assert relative(found["hidden"], exact[2]["hidden"]) < 1e-2


def test_a_nan_row_is_never_skipped():
    case = half_forgotten()
    hidden = case["hidden"].detach().clone()
    hidden[0] = torch.nan
    case["hidden"] = hidden.requires_grad_()
    value, _ = linear_sequence_loss(loss=NPO(0.1), skip_below=0.5, **case)
    (found,) = torch.autograd.grad(value, case["weight"])
    assert found.isnan().any()


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan")])
def test_a_share_to_skip_that_makes_no_sense_is_refused(bad):
    case = half_forgotten()
    with pytest.raises(ValueError, match="skip_below must be in"):
        linear_sequence_loss(loss=NPO(0.1), skip_below=bad, **case)


def test_skipping_rows_needs_a_chunk_to_skip_them_in():
    with pytest.raises(ValueError, match="chunk_rows=0 makes none"):
        linear_sequence_loss(loss=NPO(0.1), skip_below=0.1, chunk_rows=0, **half_forgotten())
