"""Log-probs of whole sequences from a batch as Hugging Face has it: labels that are not shifted."""

import pytest
import torch
import torch.nn.functional as F

from npo_fast import NPO, linear_log_probs, linear_sequence_loss, npo_loss, sequence_log_probs

B, T, D, V = 4, 7, 5, 11


def batch(dtype=torch.float64) -> dict[str, torch.Tensor]:
    """A prompt, padding at the end and at the start, a hole, and a row without any label."""
    labels = torch.randint(0, V, (B, T))
    labels[0, :3] = labels[1, 5:] = labels[2, :2] = labels[2, 4] = labels[3] = -100
    return {
        "hidden": torch.randn(B, T, D, dtype=dtype, requires_grad=True),
        "weight": torch.randn(V, D, dtype=dtype, requires_grad=True),
        "labels": labels,
        "bias": torch.randn(V, dtype=dtype, requires_grad=True),
    }


def plain(hidden, weight, labels, bias, average=False, softcap=None, scale=1.0):
    """From whole logits, as everyone writes it."""
    logits = hidden[:, :-1] @ weight.t() + bias
    logits = scale * (logits if softcap is None else softcap * torch.tanh(logits / softcap))
    labels = labels[:, 1:]
    mask = labels != -100
    log_probs = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    sums = (log_probs * mask).sum(1)
    return sums / mask.sum(1).clamp(min=1) if average else sums


def assert_same(found, expected, tensors, **tolerance):
    """Values, and gradients for an upstream gradient that differs from sequence to sequence."""
    torch.testing.assert_close(found, expected, **tolerance)
    wanted = [tensors[name] for name in ("hidden", "weight", "bias")]
    upstream = torch.linspace(-1, 2, len(found), dtype=found.dtype)
    for one, other in zip(
        torch.autograd.grad(found, wanted, upstream, retain_graph=True),
        torch.autograd.grad(expected, wanted, upstream.to(expected.dtype)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 3, 0])
def test_it_is_shift_mask_gather_and_sum_of_whole_logits(average, chunk_rows):
    tensors = batch()
    found = sequence_log_probs(
        **tensors, average_log_prob=average, chunk_rows=chunk_rows, softcap=2.0, logit_scale=0.5
    )
    assert found.dtype == torch.float64
    assert found[3] == 0
    assert_same(found, plain(**tensors, average=average, softcap=2.0, scale=0.5), tensors)


def test_half_precision_gives_fp32_log_probs():
    tensors = {k: v if k == "labels" else v.bfloat16() for k, v in batch().items()}
    exact = {k: v if k == "labels" else v.double() for k, v in tensors.items()}
    found = sequence_log_probs(**tensors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain(**exact), rtol=1e-2, atol=1e-2)


def packed(tensors) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Sequences of unequal length end to end, one of them empty."""
    lengths = [4, 7, 0, 2]
    rows = [(i, t) for i, length in enumerate(lengths) for t in range(length)]
    index = tuple(torch.tensor(column) for column in zip(*rows, strict=True))
    flat = {**tensors, "hidden": tensors["hidden"][index], "labels": tensors["labels"][index]}
    return flat, torch.tensor([0, 4, 11, 11, 13], dtype=torch.int32)


@pytest.mark.parametrize("leading_one", [False, True])
def test_a_pack_does_not_let_a_sequence_predict_the_next_one(leading_one):
    tensors = batch()
    tensors["labels"] = tensors["labels"].masked_fill(tensors["labels"] == -100, 3)
    flat, cu_seqlens = packed(tensors)
    if leading_one:
        flat = {**flat, "hidden": flat["hidden"][None], "labels": flat["labels"][None]}
    found = sequence_log_probs(**flat, cu_seqlens=cu_seqlens)
    cut = tensors["labels"].clone()
    for i, length in enumerate(cu_seqlens.diff().tolist()):
        cut[i, length:] = -100
    assert_same(found, plain(**{**tensors, "labels": cut}), tensors)


def test_labels_that_are_shifted_already_say_so():
    tensors = batch()
    shifted = {**tensors, "hidden": tensors["hidden"][:, :-1], "labels": tensors["labels"][:, 1:]}
    found = sequence_log_probs(**shifted, shifted=True)
    assert_same(found, plain(**tensors), tensors)
    flat, cu_seqlens = packed(tensors)
    torch.testing.assert_close(
        sequence_log_probs(**flat, cu_seqlens=cu_seqlens, shifted=True).sum(),
        linear_log_probs(
            flat["hidden"][flat["labels"] != -100], flat["weight"],
            flat["labels"][flat["labels"] != -100], bias=flat["bias"],
        ).sum(),
    )  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
def test_an_attention_mask_stands_in_for_ignored_padding(side, kind):
    tensors = batch()
    tensors["labels"] = torch.randint(0, V, (B, T))
    mask = torch.ones(B, T, dtype=kind)
    part = slice(0, 3) if side == "left" else slice(4, None)
    mask[1, part] = 0
    expected = tensors["labels"].clone()
    expected[1, part] = -100
    if side == "left":
        expected[1, 3] = -100  # the first real token is predicted by padding
    found = sequence_log_probs(**tensors, attention_mask=mask)
    assert_same(found, plain(**{**tensors, "labels": expected}), tensors)


def test_another_ignore_index_and_int32_labels_are_honoured():
    tensors = batch()
    kept = tensors["labels"].masked_fill(tensors["labels"] == 0, 1)
    other = kept.masked_fill(kept == -100, 0).int()
    found = sequence_log_probs(**{**tensors, "labels": other}, ignore_index=0)
    torch.testing.assert_close(found, plain(**{**tensors, "labels": kept}))


def test_the_head_may_be_frozen_and_the_hidden_states_constant():
    tensors = batch()
    for name in ("hidden", "weight"):
        frozen = {**tensors, name: tensors[name].detach(), "bias": tensors["bias"].detach()}
        found = sequence_log_probs(**frozen)
        other = "weight" if name == "hidden" else "hidden"
        (one,) = torch.autograd.grad(found.sum(), tensors[other])
        (expected,) = torch.autograd.grad(plain(**frozen).sum(), tensors[other])
        torch.testing.assert_close(one, expected)
    with torch.no_grad():
        assert not sequence_log_probs(**tensors).requires_grad


def test_npo_of_these_log_probs_is_the_fused_npo():
    tensors, ref = batch(), torch.tensor([-7.0, -4.0, -9.0, 0.0], dtype=torch.float64)
    x = 0.3 * (sequence_log_probs(**tensors) - ref)
    kept = [row[row != -100] for row in tensors["labels"][:, 1:]]
    hidden = tensors["hidden"][:, :-1][tensors["labels"][:, 1:] != -100]
    cu_seqlens = torch.tensor([0, *(len(row) for row in kept)]).cumsum(0)
    arguments = (hidden, tensors["weight"], torch.cat(kept), cu_seqlens)
    fused = npo_loss(*arguments, ref, 0.3, bias=tensors["bias"])
    unreduced, _ = linear_sequence_loss(
        *arguments, NPO(0.3), ref_log_probs=ref, bias=tensors["bias"], reduction="none"
    )
    assert_same(unreduced, -2 / 0.3 * F.logsigmoid(-x), tensors)
    x = 0.3 * (sequence_log_probs(**tensors) - ref)
    assert_same((-2 / 0.3 * F.logsigmoid(-x))[None].mean(1), fused[None], tensors)


MISTAKES = {
    "swapped": (lambda t: {"hidden": t["weight"], "weight": t["hidden"]}, "look swapped"),
    "logits": (
        lambda t: {"hidden": torch.randn(B, T, V, dtype=torch.float64)},
        "look like logits: pass the last hidden states",
    ),
    "a module": (
        lambda t: {"weight": torch.nn.Linear(D, V)},
        r"weight must be a tensor, got Linear; pass its .weight \(and its .bias as bias\)",
    ),
    "a transposed weight": (
        lambda t: {"weight": torch.randn(D, V + D, dtype=torch.float64)},
        "weight looks transposed",
    ),
    "labels as a list": (
        lambda t: {"labels": t["labels"].tolist()},
        "labels must be a tensor, got list; torch.as_tensor makes one",
    ),
    "float labels": (
        lambda t: {"labels": t["labels"].float()},
        r"labels must be int64 or int32, got torch.float32; labels.long\(\)",
    ),
    "hidden shifted alone": (
        lambda t: {"hidden": t["hidden"][:, :-1]},
        r"\(4, 6, 5\) and \(4, 7\); the shift is done here: pass the hidden states of every token",
    ),
    "labels shifted alone": (
        lambda t: {"labels": t["labels"][:, 1:]},
        "the shift is done here: pass labels that are not shifted",
    ),
    "a pack without offsets": (
        lambda t: {"hidden": t["hidden"][0], "labels": t["labels"][0]},
        "cu_seqlens belongs to flat",
    ),
    "offsets of a padded batch": (
        lambda t: {"cu_seqlens": torch.tensor([0, B * T])},
        "cu_seqlens belongs to flat",
    ),
    "lengths as offsets": (
        lambda t: {
            "hidden": t["hidden"].flatten(0, 1),
            "labels": t["labels"].flatten(),
            "cu_seqlens": torch.full((B,), T),
        },
        r"must rise from 0 to the 28 rows.*of lengths make F.pad\(lengths.cumsum\(0\), \(1, 0\)\)",
    ),
    "another mark of no label": (
        lambda t: {"labels": t["labels"].masked_fill(t["labels"] == -100, -1)},
        "labels hold -1, which is outside the vocabulary .* not ignore_index, -100",
    ),
    "a token that the head has not": (
        lambda t: {"labels": torch.full((B, T), V)},
        r"labels hold 11, which is outside the vocabulary \[0, 11\)",
    ),
    "a mask of another shape": (
        lambda t: {"attention_mask": torch.ones(B, T - 1)},
        r"attention_mask must have the shape of labels, \(4, 7\), got \(4, 6\)",
    ),
    "a mask of shifted labels": (
        lambda t: {"attention_mask": torch.ones(B, T), "shifted": True},
        "attention_mask goes with labels that are not shifted",
    ),
    "another dtype": (
        lambda t: {"weight": t["weight"].float()},
        r"got torch.float64 and torch.float32; autocast casts both.*hidden.to\(weight.dtype\)",
    ),
    "another device": (
        lambda t: {"weight": t["weight"].to("meta")},
        "hidden is on cpu but weight on meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_first_mistake_gets_a_line_that_helps(mistake):
    change, message = MISTAKES[mistake]
    tensors = batch()
    with pytest.raises(ValueError, match="^sequence_log_probs|^linear_log_probs") as caught:
        sequence_log_probs(**{**tensors, **change(tensors)})
    caught.match(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, y: (w, h, y), "labels must be .* hidden and weight look swapped"),
        (lambda h, w, y: (h[:-1], w, y), r"a row predicts the next token: pass labels\[1:\]"),
        (lambda h, w, y: (h @ w.t(), w, y), "look like logits"),
        (lambda h, w, y: (h[None], w, y[None]), "for a padded batch there are sequence_log_probs"),
    ],
    ids=["swapped", "not shifted", "logits", "padded"],
)
def test_the_flat_operators_have_such_lines_too(change, message):
    hidden, weight, labels = torch.randn(6, D), torch.randn(V, D), torch.randint(0, V, (6,))
    with pytest.raises(ValueError, match=message):
        linear_log_probs(*change(hidden, weight, labels))
    with pytest.raises(ValueError, match=message):
        linear_sequence_loss(
            *change(hidden, weight, labels), torch.tensor([0, 2, 6]), NPO(),
            ref_log_probs=torch.zeros(2),
        )  # fmt: skip


def test_what_a_model_returns_is_not_taken_for_hidden_states():
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

    tensors = batch()
    states = BaseModelOutputWithPast(last_hidden_state=tensors["hidden"])
    with pytest.raises(ValueError, match="BaseModelOutputWithPast; pass its .last_hidden_state"):
        sequence_log_probs(**{**tensors, "hidden": states})
    logits = CausalLMOutputWithPast(logits=tensors["hidden"])
    with pytest.raises(ValueError, match=r"pass hidden states, model.get_decoder\(\)"):
        sequence_log_probs(**{**tensors, "hidden": logits})
