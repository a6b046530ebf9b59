"""The module twins give the operator's numbers for padded and flat batches with ignored labels."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from npo_fast import (
    CEU,
    GA,
    KTO,
    NLL,
    NPO,
    TNPO,
    FusedLinearDPOLoss,
    FusedLinearGALoss,
    FusedLinearKLLoss,
    FusedLinearKTOLoss,
    FusedLinearNLLLoss,
    FusedLinearNPOLoss,
    FusedLinearSequenceLoss,
    FusedLinearSimNPOLoss,
    SimNPO,
    linear_sequence_loss,
    losses,
    sequence_log_probs,
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


# ---- unreduced, averaged, in pairs, with log-probs: against whole logits in fp64 ----


def exact_batch(rows: int = B) -> dict[str, torch.Tensor]:
    """A batch in fp64 of 2 to 6 labels a row, for any number of rows."""
    target = torch.randint(0, V, (rows, T))
    for i in range(rows):
        target[i, 2 + i % 5 :] = -100
    return {
        "lin_weight": torch.randn(V, D, dtype=torch.float64, requires_grad=True),
        "hidden": torch.randn(rows, T, D, dtype=torch.float64, requires_grad=True),
        "target": target,
        "bias": torch.randn(V, dtype=torch.float64, requires_grad=True),
    }


def plain_log_probs(lin_weight, hidden, target, bias, average=False) -> torch.Tensor:
    log_probs = (hidden @ lin_weight.t() + bias).log_softmax(-1)
    keep = target != -100
    log_probs = log_probs.gather(2, target.clamp(min=0)[..., None]).squeeze(2) * keep
    return log_probs.sum(1) / (keep.sum(1) if average else 1)


def assert_same(found, expected, tensors):
    torch.testing.assert_close(found, expected)
    upstream = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).reshape(found.shape)
    wanted = [tensors[name] for name in ("hidden", "lin_weight", "bias")]
    one, other = (
        torch.autograd.grad(value, wanted, upstream, retain_graph=True)
        for value in (found, expected)
    )
    torch.testing.assert_close(one, other)


def formula(loss, r, lengths):
    """Each loss from log-ratios, as its paper has it."""
    if isinstance(loss, NPO):
        return -2 / loss.beta * F.logsigmoid(-loss.beta * r)
    if isinstance(loss, SimNPO):
        return -2 / loss.beta * F.logsigmoid(loss.beta * (-r / lengths - loss.delta))
    return {GA: r, NLL: -r}[type(loss)]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "token_mean"])
@pytest.mark.parametrize("loss", [NPO(0.3), SimNPO(2.0, 0.1), GA(), NLL()], ids=repr)
def test_every_reduction_and_average_is_that_of_whole_logits(loss, reduction, average):
    tensors = exact_batch()
    lengths = (tensors["target"] != -100).sum(1)
    l = plain_log_probs(**tensors, average=average)  # noqa: E741
    values = formula(loss, l - REF if loss.reference else l, 1 if average else lengths)
    expected = {
        "none": values,
        "mean": values.mean(),
        "sum": values.sum(),
        "token_mean": values.sum() / lengths.sum(),
    }[reduction]
    module = FusedLinearSequenceLoss(
        loss, reduction=reduction, average_log_prob=average, return_log_probs=True
    )
    found, log_probs = module(**tensors, ref_log_probs=REF.double())
    assert_same(found, expected, tensors)
    torch.testing.assert_close(log_probs, l)
    assert not log_probs.requires_grad
    for chunk_rows in (0, 3):
        module.chunk_rows = chunk_rows
        torch.testing.assert_close(module(**tensors, ref_log_probs=REF.double())[0], expected)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_pairs_may_come_all_chosen_first(reduction, average, flat):
    tensors, ref = exact_batch(6), -torch.rand(6, dtype=torch.float64)
    l = plain_log_probs(**tensors, average=average)  # noqa: E741
    r = l - ref
    values = -2 / 0.4 * F.logsigmoid(0.4 * (r[:3] - r[3:]))
    options = {"reduction": reduction, "average_log_prob": average, "return_log_probs": True}
    given, more = tensors, {}
    if flat:
        given = {k: v.flatten(0, 1) if k in ("hidden", "target") else v for k, v in given.items()}
        more = {"cu_seqlens": torch.arange(7) * T}
    module = FusedLinearDPOLoss(0.4, pairs="concatenated", **options)
    found, log_probs = module(**given, ref_log_probs=ref, **more)
    assert_same(found, values if reduction == "none" else values.mean(), tensors)
    torch.testing.assert_close(log_probs, l)  # in the order of the batch
    order = [0, 3, 1, 4, 2, 5]
    turns = {k: v[order] if k in ("hidden", "target") else v for k, v in tensors.items()}
    in_turn, log_probs = FusedLinearDPOLoss(0.4, **options)(**turns, ref_log_probs=ref[order])
    torch.testing.assert_close(in_turn, found)
    torch.testing.assert_close(log_probs, l[order])


def test_pairs_of_tokens_keep_their_references():
    class Margin:
        """A loss of pairs that compares tokens, which this package has none of."""

        reference, group = "token", 2

        def __call__(self, log_probs, cu_seqlens, ref_log_probs):
            r = log_probs - ref_log_probs
            sums = torch.stack([part.sum() for part in r.split(cu_seqlens.diff().tolist())])
            return sums[1::2] - sums[::2]

    tensors, ref = exact_batch(4), -torch.rand(4, T, dtype=torch.float64)
    module = FusedLinearSequenceLoss(Margin(), pairs="concatenated", reduction="none")
    keep = tensors["target"] != -100
    r = plain_log_probs(**tensors) - (ref * keep).sum(1)
    assert_same(module(**tensors, ref_log_probs=ref), r[2:] - r[:2], tensors)


def test_kto_takes_its_baseline_with_the_batch():
    tensors, ref = exact_batch(), REF.double()
    r = plain_log_probs(**tensors) - ref
    for z in (0.7, torch.tensor(0.7), torch.tensor([0.7], dtype=torch.float64)):
        found = FusedLinearKTOLoss(0.3, reduction="none")(**tensors, ref_log_probs=ref, z=z)
        assert_same(found, 1 - 2 / 0.3 * F.logsigmoid(0.7 - 0.3 * r), tensors)
    own, _ = linear_sequence_loss(
        tensors["hidden"][tensors["target"] != -100], tensors["lin_weight"],
        tensors["target"][tensors["target"] != -100],
        F.pad((tensors["target"] != -100).sum(1).cumsum(0), (1, 0)),
        KTO(0.3, 0.7), ref_log_probs=ref, bias=tensors["bias"],
    )  # fmt: skip
    module = FusedLinearKTOLoss(0.3)
    torch.testing.assert_close(module(**tensors, ref_log_probs=ref, z=0.7), own)
    with pytest.raises(ValueError, match="KTO compares with a reference"):
        module(**tensors)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("demotion", [0.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_kl_module_is_the_kl_of_whole_logits_on_the_labelled_rows(reduction, demotion, flat):
    tensors = exact_batch()
    ref = {
        "ref_hidden": torch.randn(B, T, D + 2, dtype=torch.float64),
        "ref_weight": torch.randn(V, D + 2, dtype=torch.float64),
        "ref_bias": torch.randn(V, dtype=torch.float64),
    }
    keep = tensors["target"] != -100
    z = 2 * torch.tanh((tensors["hidden"] @ tensors["lin_weight"].t() + tensors["bias"]) / 2)
    z_ref = 0.5 * (ref["ref_hidden"] @ ref["ref_weight"].t() + ref["ref_bias"])
    z_ref = z_ref - demotion * F.one_hot(tensors["target"].clamp(min=0), V)
    log_p, log_ref = z.log_softmax(-1)[keep], z_ref.log_softmax(-1)[keep]
    kl = (log_ref.exp() * (log_ref - log_p)).sum(-1)
    by_sequence = torch.stack([part.sum() for part in kl.split(keep.sum(1).tolist())])
    expected = {"mean": kl.mean(), "sum": kl.sum(), "none": by_sequence}[reduction]
    module = FusedLinearKLLoss(demotion, reduction=reduction, softcap=2.0, ref_logit_scale=0.5)
    given = {**tensors, **ref}
    if flat:
        positions = ("hidden", "target", "ref_hidden")
        given = {k: v.flatten(0, 1) if k in positions else v for k, v in given.items()}
        given["cu_seqlens"] = torch.arange(0, B * T + 1, T)
    for chunk_rows in (None, 2):
        module.chunk_rows = chunk_rows
        assert_same(module(**given), expected, tensors)
    if flat and reduction != "none":
        torch.testing.assert_close(module(**{**given, "cu_seqlens": None}), expected)
    assert f"demotion={demotion}, reduction={reduction!r}" in repr(module)


def test_sequence_log_probs_are_the_references_that_a_module_takes():
    tensors = exact_batch()
    labels = F.pad(tensors["target"], (1, 0), value=-100)
    hidden = F.pad(tensors["hidden"], (0, 0, 0, 1))
    ref = sequence_log_probs(hidden, tensors["lin_weight"], labels, bias=tensors["bias"]).detach()
    found = FusedLinearNPOLoss(0.1, reduction="none")(**tensors, ref_log_probs=ref)
    torch.testing.assert_close(found, torch.full_like(found, 2 / 0.1 * math.log(2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedLinearNPOLoss(torch.tensor(0.1)), "NPO: beta must be a number.*its .item()"),
        (lambda: FusedLinearNPOLoss("0.1"), "NPO: beta must be a number, got '0.1'"),
        (lambda: FusedLinearNPOLoss(-1), "NPO: beta must be positive and finite, got -1"),
        (lambda: FusedLinearSequenceLoss(NPO), r"loss is the class NPO; make one, NPO\(\)"),
        (lambda: FusedLinearSequenceLoss("NPO"), "loss must be NPO.beta., .* got 'NPO'"),
        (lambda: FusedLinearSequenceLoss(losses.KL()), "KL compares whole distributions"),
        (lambda: FusedLinearNPOLoss(reduction="avg"), "reduction must be 'mean', .* got 'avg'"),
        (lambda: FusedLinearKLLoss(reduction="avg"), "reduction must be 'mean', 'sum' or 'none'"),
        (lambda: FusedLinearDPOLoss(pairs="trl"), "pairs must be 'interleaved' or 'concatenated'"),
        (lambda: FusedLinearNPOLoss(pairs="concatenated"), "is for losses of pairs, not for NPO"),
        (
            lambda: FusedLinearSequenceLoss(CEU(), average_log_prob=True),
            r"average_log_prob is for losses of sequence log-probs.*CEU\(.*\) is not",
        ),
    ],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused_when_the_module_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {"lin_weight": torch.nn.Linear(D, V, bias=False)},
            "FusedLinearNPOLoss: lin_weight must be a tensor, got Linear; pass its .weight$",
        ),
        (
            lambda t: {"hidden": t["lin_weight"], "lin_weight": t["hidden"]},
            "hidden and weight look swapped",
        ),
        (lambda t: {"hidden": torch.randn(B, T, V)}, "look like logits"),
        (lambda t: {"target": None}, "target must be a tensor, got NoneType"),
        (
            lambda t: {"target": torch.randint(0, V, (B, T + 1))},
            r"a position predicts the next token: pass target\[..., 1:\]",
        ),
        (
            lambda t: {"target": t["target"][:, 1:]},
            r"the last position predicts nothing: pass hidden\[..., :-1, :\]",
        ),
        (lambda t: {"bias": REF, "ref_log_probs": None}, "pass ref_log_probs by its name"),
        (lambda t: {"ref_log_probs": [-7.0, -4.0, -9.0]}, "ref_log_probs must be a tensor, got li"),
        (lambda t: {"hidden": (t["hidden"], t["hidden"])}, r"the last of them, such as hidden_s"),
        (lambda t: {"hidden": t["target"]}, "hidden are whole numbers: pass hidden states"),
        (lambda t: {"ref_log_probs": REF.to("meta")}, "ref_log_probs on meta; move ref_log_probs"),
        (lambda t: {"target": t["target"].masked_fill(t["target"] < 0, -1)}, "target hold -1"),
        (lambda t: {"target": t["target"].float()}, "target must be int64 or int32, got torch.fl"),
        (lambda t: {"lin_weight": t["lin_weight"].half()}, "autocast casts both, outside of it"),
    ],
)  # fmt: skip
def test_a_first_mistake_gets_a_line_that_helps(change, message):
    tensors = {**batch(), "ref_log_probs": REF}
    with pytest.raises(ValueError, match=message) as caught:
        FusedLinearNPOLoss()(**{**tensors, **change(tensors)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"logit_scale": None}, "logit_scale must be a number, got None"),
        ({"softcap": "30"}, "softcap must be a number, got '30'"),
        ({"softcap": torch.tensor(30.0)}, "softcap must be a number, .*; take its .item"),
    ],
)
def test_a_setting_of_the_head_that_is_no_number_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearNPOLoss(**option)(**batch(), ref_log_probs=REF)


def test_an_unknown_option_is_refused_when_the_module_is_made():
    with pytest.raises(TypeError, match="FusedLinearNPOLoss has no option 'soft_cap'; .* softcap,"):
        FusedLinearNPOLoss(soft_cap=30.0)
    with pytest.raises(TypeError, match="FusedLinearKLLoss has no option .*, ref_softcap,"):
        FusedLinearKLLoss(refsoftcap=30.0)


def test_int32_labels_are_labels():
    tensors = batch()
    found = FusedLinearNPOLoss()(
        **{**tensors, "target": tensors["target"].int()}, ref_log_probs=REF
    )
    torch.testing.assert_close(found, FusedLinearNPOLoss()(**tensors, ref_log_probs=REF))


def test_an_odd_number_of_answers_makes_no_pairs():
    for pairs in ("interleaved", "concatenated"):
        with pytest.raises(ValueError, match="DPO takes sequences in groups of 2, got 3"):
            FusedLinearDPOLoss(pairs=pairs)(**batch(), ref_log_probs=REF)


def test_a_loss_that_can_have_no_gradient_says_so_in_training():
    tensors = {name: value.detach() for name, value in batch().items()}
    module = FusedLinearNPOLoss()
    with pytest.warns(UserWarning, match="FusedLinearNPOLoss: neither hidden nor the head"):
        module(**tensors, ref_log_probs=REF)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            module(**tensors, ref_log_probs=REF)
        module.eval()(**tensors, ref_log_probs=REF)
        module.train()(**batch(), ref_log_probs=REF)


@pytest.mark.parametrize("kind", ["NPO", "none", "KL", "sequence_log_probs"])
def test_fp16_under_a_loss_scale_errs_no_more_than_plain_pytorch(kind):
    """Labels are known by heart, so that most gradients are small: what GradScaler is for."""
    scale, target, ref = 2.0**12, torch.randint(0, V, (8, 32)), torch.full((8,), -2.0)
    weight = F.normalize(torch.randn(V, 16), dim=1).half()
    hidden = (0.3 * torch.randn(8, 32, 16) + 7 * weight[target]).half()
    ref_hidden = (hidden + 0.1 * torch.randn_like(hidden)).half()

    def gradient(dtype, ours):
        h, w = (tensor.detach().to(dtype, copy=True) for tensor in (hidden, weight))
        h.requires_grad_(), w.requires_grad_()
        if ours:
            if kind == "sequence_log_probs":
                loss = -sequence_log_probs(h, w, target, shifted=True).mean()
            elif kind == "KL":
                module = FusedLinearKLLoss()
                loss = module(w, h, target, ref_hidden=ref_hidden, ref_weight=weight)
            else:
                module = FusedLinearNPOLoss(reduction="none" if kind == "none" else "mean")
                loss = module(w, h, target, ref_log_probs=ref).mean()
        else:
            wide = torch.promote_types(dtype, torch.float32)
            log_p = (h @ w.t()).to(wide).log_softmax(-1)
            l = log_p.gather(2, target[..., None]).sum((1, 2))  # noqa: E741
            if kind == "KL":
                log_ref = (ref_hidden.to(dtype) @ weight.to(dtype).t()).to(wide).log_softmax(-1)
                loss = (log_ref.exp() * (log_ref - log_p)).sum(-1).mean()
            elif kind == "sequence_log_probs":
                loss = -l.mean()
            else:
                loss = -20 * F.logsigmoid(-0.1 * (l - ref)).mean()
        (scale * loss).backward()
        return h.grad.double() / scale, w.grad.double() / scale

    exact, plain = gradient(torch.float64, False), gradient(torch.float16, False)
    for found, expected, other in zip(gradient(torch.float16, True), exact, plain, strict=True):
        assert (found - expected).norm() <= 1.1 * (other - expected).norm() + 1e-3 * expected.norm()
