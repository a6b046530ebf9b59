"""The module twins give the operator's numbers for padded and flat batches with ignored labels."""

import pytest
import torch
import torch.nn.functional as F

from npo_fast import (
    GA,
    NLL,
    NPO,
    TNPO,
    FusedLinearDPOLoss,
    FusedLinearGALoss,
    FusedLinearNLLLoss,
    FusedLinearNPOLoss,
    FusedLinearSequenceLoss,
    FusedLinearSimNPOLoss,
    SimNPO,
)

B, T, D, V = 3, 7, 5, 11
REF = torch.tensor([-7.0, -4.0, -9.0])
TWINS = [
    (FusedLinearNPOLoss(0.3), NPO(0.3)),
    (FusedLinearSimNPOLoss(2.0, 0.1), SimNPO(2.0, 0.1)),
    (FusedLinearGALoss(), GA()),
    (FusedLinearNLLLoss(), NLL()),
]


def batch(ignore_index: int = -100) -> dict[str, torch.Tensor]:
    """Padding at the end, at the start and in the middle."""
    target = torch.randint(0, V, (B, T))
    target[0, 4:] = target[1, :5] = target[2, 3] = ignore_index
    return {
        "lin_weight": torch.randn(V, D, requires_grad=True),
        "hidden": torch.randn(B, T, D, requires_grad=True),
        "target": target,
        "bias": torch.randn(V, requires_grad=True),
    }


def plain(loss, lin_weight, hidden, target, bias, ref=REF) -> torch.Tensor:
    """From whole logits, a sequence at a time."""
    values = []
    for h, y, r in zip(hidden, target, ref, strict=True):
        keep = y != -100
        log_probs = -F.cross_entropy(h[keep] @ lin_weight.t() + bias, y[keep], reduction="none")
        values.append(loss(log_probs, torch.tensor([0, int(keep.sum())]), r[None]))
    return torch.cat(values).mean()


def gradients(value, tensors):
    wanted = [tensors[name] for name in ("hidden", "lin_weight", "bias")]
    return torch.autograd.grad(value, wanted)


@pytest.mark.parametrize(("module", "loss"), TWINS, ids=lambda x: repr(x)[:24])
def test_a_module_gives_its_loss_on_the_labelled_rows(module, loss):
    tensors = batch()
    found, expected = module(**tensors, ref_log_probs=REF), plain(loss, **tensors)
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_references_of_tokens_come_in_the_shape_of_the_target():
    tensors, loss, ref = batch(), TNPO(0.7), -3 * torch.rand(B, T)
    found = FusedLinearSequenceLoss(loss)(**tensors, ref_log_probs=ref)
    values = []
    for h, y, r in zip(tensors["hidden"], tensors["target"], ref, strict=True):
        keep = y != -100
        logits = h[keep] @ tensors["lin_weight"].t() + tensors["bias"]
        log_probs = -F.cross_entropy(logits, y[keep], reduction="none")
        values.append(loss(log_probs, torch.tensor([0, int(keep.sum())]), r[keep]))
    expected = torch.cat(values).mean()
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match=r"shape of target, \(3, 7\), got \(3,\)"):
        FusedLinearSequenceLoss(loss)(**tensors, ref_log_probs=REF)


def test_the_dpo_module_takes_preferred_and_forgotten_answers_in_turn():
    tensors = batch()
    pair = {**tensors, "hidden": tensors["hidden"][:2], "target": tensors["target"][:2]}
    found = FusedLinearDPOLoss(0.4)(**pair, ref_log_probs=REF[:2])
    preferred, forget = (
        plain(GA(), tensors["lin_weight"], h, y, tensors["bias"], r)
        for h, y, r in zip(
            pair["hidden"].split(1), pair["target"].split(1), REF[:2].split(1), strict=True
        )
    )
    margin = (preferred - REF[0]) - (forget - REF[1])
    torch.testing.assert_close(found, -2 / 0.4 * F.logsigmoid(0.4 * margin))


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_flat_input_is_the_padded_batch_end_to_end(chunk_rows):
    tensors, module = batch(), FusedLinearNPOLoss(chunk_rows=chunk_rows)
    padded = module(**tensors, ref_log_probs=REF)
    flat = {**tensors, "hidden": tensors["hidden"].flatten(0, 1)}
    flat["target"] = tensors["target"].flatten()
    cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    torch.testing.assert_close(module(**flat, ref_log_probs=REF, cu_seqlens=cu_seqlens), padded)


def test_token_mean_is_the_cross_entropy_of_pytorch():
    tensors = batch()
    found = FusedLinearNLLLoss(reduction="token_mean", softcap=2.0, logit_scale=0.5)(**tensors)
    logits = tensors["hidden"] @ tensors["lin_weight"].t() + tensors["bias"]
    logits = 0.5 * 2.0 * torch.tanh(logits / 2.0)
    torch.testing.assert_close(
        found, F.cross_entropy(logits.flatten(0, 1), tensors["target"].flatten())
    )


def test_another_ignore_index_is_honoured():
    tensors = batch()
    other = {**tensors, "target": tensors["target"].masked_fill(tensors["target"] == -100, 0)}
    kept = {**tensors, "target": other["target"].masked_fill(other["target"] == 0, -100)}
    found = FusedLinearGALoss(ignore_index=0)(**other)
    torch.testing.assert_close(found, FusedLinearGALoss()(**kept))


def test_non_contiguous_input_gives_the_same_loss_and_gradients():
    tensors, module = batch(), FusedLinearNPOLoss()
    strided = {
        "lin_weight": tensors["lin_weight"].detach().t().contiguous().t().requires_grad_(),
        "hidden": tensors["hidden"].detach().transpose(0, 1).contiguous().transpose(0, 1),
        "target": tensors["target"].t().contiguous().t(),
        "bias": tensors["bias"],
    }
    strided["hidden"].requires_grad_()
    assert not strided["hidden"].is_contiguous()
    assert not strided["lin_weight"].is_contiguous()
    one, other = (module(**t, ref_log_probs=REF) for t in (tensors, strided))
    torch.testing.assert_close(one, other)
    for g, h in zip(gradients(one, tensors), gradients(other, strided), strict=True):
        torch.testing.assert_close(g, h)


def test_a_frozen_head_gets_no_gradient_and_changes_nothing_else():
    tensors, module = batch(), FusedLinearNPOLoss()
    frozen = {**tensors, "lin_weight": tensors["lin_weight"].detach()}
    frozen["bias"] = tensors["bias"].detach()
    module(**frozen, ref_log_probs=REF).backward()
    assert frozen["lin_weight"].grad is None
    (expected,) = torch.autograd.grad(module(**tensors, ref_log_probs=REF), tensors["hidden"])
    torch.testing.assert_close(tensors["hidden"].grad, expected)


@pytest.mark.parametrize(("module", "loss"), TWINS, ids=lambda x: repr(x)[:24])
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum"])
def test_a_batch_without_any_label_is_finite_and_has_no_gradient(module, loss, reduction):
    tensors = batch()
    tensors["target"] = torch.full_like(tensors["target"], -100)
    found = FusedLinearSequenceLoss(loss, reduction=reduction)(**tensors, ref_log_probs=REF)
    assert found.isfinite()
    for gradient in gradients(found, tensors):
        assert not gradient.any()


def test_an_unlabelled_sequence_keeps_its_neighbours_where_they_are():
    tensors = batch()
    tensors["target"][1] = -100
    found = FusedLinearNPOLoss(0.3)(**tensors, ref_log_probs=REF)
    torch.testing.assert_close(found, plain(NPO(0.3), **tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(B, T - 1, dtype=torch.long)}, r"\(3, 7, 5\) and \(3, 6\)"),
        ({"hidden": torch.zeros(D)}, r"hidden must be \(B, T, D\).*got \(5,\)"),
        ({"cu_seqlens": torch.tensor([0, B * T])}, r"cu_seqlens belongs to flat.*\(3, 7, 5\)"),
        (
            {"hidden": torch.zeros(4, D), "target": torch.zeros(4).long()},
            r"\(4, 5\) and cu_seqlens None",
        ),
        ({"lin_weight": torch.zeros(V, D + 1)}, r"\(11, 6\)"),
        ({"ref_log_probs": None}, "NPO compares with a reference: pass ref_log_probs"),
        ({"ref_log_probs": torch.zeros(B + 1)}, r"\(3,\).*got \(4,\)"),
        ({"bias": torch.zeros(V + 1)}, r"bias must be \(11,\), got \(12,\)"),
        (
            {
                "hidden": torch.zeros(4, D),
                "target": torch.zeros(4).long(),
                "cu_seqlens": torch.tensor([0, 5]),
            },
            r"FusedLinearNPOLoss: cu_seqlens must rise from 0 to the 4 rows",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(change, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearNPOLoss()(**{**batch(), "ref_log_probs": REF, **change})


def test_a_module_shows_its_loss():
    assert "NPO(beta=0.2), reduction='mean'" in repr(FusedLinearNPOLoss(0.2))
