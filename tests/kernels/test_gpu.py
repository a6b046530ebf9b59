"""What only a GPU can show: the operators as they run there, against plain PyTorch in fp64.

``NPO_FAST_TEST_DEVICE=cpu`` holds the CPU to the same promises, where it can make them.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast import NLL, NPO, SimNPO, linear_kl, linear_log_probs, linear_sequence_loss
from npo_fast.data import TokenizedExample, pack
from npo_fast.kernels import layout, reference
from npo_fast.kernels.transform import HeadTransform
from npo_fast.methods import build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.ops.compiled import IN_GRAPH
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import VOCABULARY, assert_as_exact, assert_near, calm_model, free_error

DEVICE = os.environ.get("NPO_FAST_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda" and torch.cuda.is_available()
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not ON_GPU, reason="needs a CUDA GPU")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU: a CPU has nothing like it")

# D, an odd V, and N on either side of D: Triton compiles a kernel anew where 16 divides a size
WIDTH, VOCAB = (256, 5003) if ON_GPU else (48, 403)
MANY, FEW = (1500, 199) if ON_GPU else (150, 37)
CHUNKS = {"default": None, "no logits": 0, "chunks": 1024 if ON_GPU else 100}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSSES = {"NPO": (NPO(0.1), "mean"), "SimNPO": (SimNPO(2.5, 0.1), "mean"),
          "NLL": (NLL(), "token_mean")}  # fmt: skip
PLAIN = {"softcap": None, "logit_scale": 1.0}
CAPPED = {"softcap": 20.0, "logit_scale": 0.5}


def head_case(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, bias: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves hidden, weight (and bias), and labels of which the model is sure in every other row.

    Logits spread by about 2.
    """
    hidden = torch.randn(rows, width, device=DEVICE)
    weight = torch.randn(vocabulary, width, device=DEVICE) * 2 / width**0.5
    labels = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    mine = weight[labels[::2]]
    hidden[::2] += mine * (14 / mine.square().sum(1, keepdim=True))
    tensors = {"hidden": hidden, "weight": weight}
    if bias:
        tensors["bias"] = torch.randn(vocabulary, device=DEVICE)
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}, labels


def sequence_bounds(rows: int) -> Tensor:  # (S + 1,) on the CPU
    """Unequal sequences: one token, none, up to about 60, the last ones longer."""
    lengths, left = [1, 0], rows - 1
    while left:
        lengths.append(min(left, 5 + 11 * len(lengths) % 60))
        left -= lengths[-1]
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def plain_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    raw = F.linear(hidden, weight, bias)
    z = raw.to(torch.promote_types(raw.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z * logit_scale).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()
    }


def gradients(value: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    learned = {name: t for name, t in tensors.items() if t.requires_grad}
    found = torch.autograd.grad(value, list(learned.values()), retain_graph=True)
    return {f"d_{name}": g for name, g in zip(learned, found, strict=True)}


def assert_scalar_as_exact(got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """One number's rounding error says little: an ulp of the operands' dtype is free."""
    error, of_plain = (abs(float(x.detach().double() - exact.detach())) for x in (got, plain))
    free = max(torch.finfo(dtype).eps, free_error(got.device))
    assert error <= max(2 * of_plain, free * abs(float(exact))), (error, of_plain, float(exact))


def assert_all_as_exact(
    got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], of: str = ""
) -> None:
    assert got.keys() == plain.keys() == exact.keys()
    for name, one in got.items():
        assert one.dtype == plain[name].dtype, (name, one.dtype)
        assert_as_exact(one, plain[name], exact[name], f"{name} {of}".strip())


def check_sequence_loss(
    tensors: dict[str, Tensor],
    labels: Tensor,
    head: dict[str, float | None],
    chunk_rows: int | None,
    names: tuple[str, ...] = tuple(LOSSES),
) -> None:
    """Loss, sequence log-probs and all gradients, beside plain PyTorch's in the same dtype."""
    dtype, cu_seqlens = tensors["hidden"].dtype, sequence_bounds(len(labels))
    exact_tensors = wide(tensors)
    exact_tokens = plain_log_probs(labels=labels, **exact_tensors, **head)
    plain_tokens = plain_log_probs(labels=labels, **tensors, **head)
    sums = reference.segment_sum(exact_tokens.detach(), cu_seqlens)
    ref = (0.9 * sums).float()
    for name in names:
        loss, reduction = LOSSES[name]
        value, log_probs = linear_sequence_loss(
            **tensors, **head, labels=labels, cu_seqlens=cu_seqlens, loss=loss,
            ref_log_probs=ref, reduction=reduction, chunk_rows=chunk_rows,
        )  # fmt: skip
        count = len(labels) if reduction == "token_mean" else len(cu_seqlens) - 1
        exact, plain = (
            loss(tokens, cu_seqlens, ref.to(tokens.dtype)).sum() / count
            for tokens in (exact_tokens, plain_tokens)
        )
        assert not log_probs.requires_grad
        plain_sums = reference.segment_sum(plain_tokens.detach(), cu_seqlens)
        assert_as_exact(log_probs, plain_sums, sums, f"sequence log-probs of {name}")
        assert_scalar_as_exact(value, plain, exact, dtype)
        assert_all_as_exact(
            gradients(value, tensors),
            gradients(plain, tensors),
            gradients(exact, exact_tensors),
            f"of {name}",
        )


@pytest.mark.parametrize("chunk_rows", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [MANY, FEW], ids=["more rows than width", "fewer"])
def test_sequence_loss_is_as_exact_as_pytorch(rows, dtype, chunk_rows):
    tensors, labels = head_case(rows, WIDTH, VOCAB, dtype)
    check_sequence_loss(tensors, labels, PLAIN, chunk_rows)


@pytest.mark.parametrize("chunk_rows", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_capped_scaled_and_biased_head_is_as_exact_as_pytorch(dtype, chunk_rows):
    tensors, labels = head_case(MANY, WIDTH, VOCAB, dtype, bias=True)
    check_sequence_loss(tensors, labels, CAPPED, chunk_rows, ("NPO",))


@pytest.mark.parametrize("chunk_rows", [None, 0, 64])
@pytest.mark.parametrize("vocabulary", [50257, 32001])
def test_an_odd_vocabulary_is_as_exact_as_pytorch(vocabulary, chunk_rows):
    tensors, labels = head_case(95, 64, vocabulary, torch.bfloat16)
    check_sequence_loss(tensors, labels, PLAIN, chunk_rows, ("NPO",))


@pytest.mark.parametrize("chunk_rows", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen, chunk_rows):
    tensors, labels = head_case(MANY, WIDTH, VOCAB, torch.bfloat16)
    tensors[frozen].requires_grad_(False)
    check_sequence_loss(tensors, labels, PLAIN, chunk_rows, ("NPO",))


@pytest.mark.parametrize("chunk_rows", [None, 0])
def test_a_tied_weight_collects_both_gradients(chunk_rows):
    tensors, labels = head_case(FEW, WIDTH, VOCAB, torch.bfloat16)
    ids, cu_seqlens = torch.randint(0, VOCAB, (FEW,), device=DEVICE), sequence_bounds(FEW)

    def tied(weight):
        return {"hidden": F.embedding(ids, weight), "weight": weight}

    weight = {"weight": tensors["weight"]}
    value, _ = linear_sequence_loss(
        **tied(**weight), labels=labels, cu_seqlens=cu_seqlens, loss=NLL(),
        reduction="token_mean", chunk_rows=chunk_rows,
    )  # fmt: skip
    exact_weight = wide(weight)
    plain = -plain_log_probs(labels=labels, **tied(**weight)).mean()
    exact = -plain_log_probs(labels=labels, **tied(**exact_weight)).mean()
    assert_all_as_exact(
        gradients(value, weight), gradients(plain, weight), gradients(exact, exact_weight)
    )


@pytest.mark.parametrize("chunk_rows", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_log_probs_are_as_exact_as_pytorch_for_any_upstream_gradient(dtype, chunk_rows):
    tensors, labels = head_case(MANY, WIDTH, VOCAB, dtype)
    upstream, exact_tensors = torch.randn(MANY, device=DEVICE), wide(tensors)
    found = linear_log_probs(**tensors, labels=labels, chunk_rows=chunk_rows)
    plain = plain_log_probs(**tensors, labels=labels)
    exact = plain_log_probs(**exact_tensors, labels=labels)
    assert found.dtype == torch.float32
    assert_as_exact(found.detach(), plain.detach(), exact.detach(), "log-probs")
    assert_all_as_exact(
        gradients(found @ upstream, tensors),
        gradients(plain @ upstream, tensors),
        gradients(exact @ upstream.double(), exact_tensors),
    )


@pytest.mark.parametrize("chunk_rows", [None, 64])
@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped and demoted"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_kl_is_as_exact_as_pytorch(dtype, capped, chunk_rows):
    tensors, labels = head_case(FEW, WIDTH, VOCAB, dtype)
    near = {name: t.detach() + 0.2 * torch.randn_like(t) for name, t in tensors.items()}
    tensors |= {f"ref_{name}": t.to(dtype) for name, t in near.items()}
    softcap, demotion = (20.0, 3.0) if capped else (None, 0.0)

    def plain_kl(hidden, weight, ref_hidden, ref_weight):
        log_p, log_p_ref = (
            capped_logits(hidden, weight).log_softmax(-1),
            (
                capped_logits(ref_hidden, ref_weight) - demotion * F.one_hot(labels, VOCAB)
            ).log_softmax(-1),
        )
        return (log_p_ref.exp() * (log_p_ref - log_p)).sum(-1).mean()

    def capped_logits(hidden, weight):
        raw = hidden @ weight.t()
        z = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    found = linear_kl(
        **tensors, softcap=softcap, ref_softcap=softcap, chunk_rows=chunk_rows,
        labels=labels if capped else None, demotion=demotion,
    )  # fmt: skip
    exact_tensors = wide(tensors)
    plain, exact = plain_kl(**tensors), plain_kl(**exact_tensors)
    assert_scalar_as_exact(found, plain, exact, dtype)
    assert_all_as_exact(
        gradients(found, tensors), gradients(plain, tensors), gradients(exact, exact_tensors)
    )


@pytest.mark.parametrize("chunk_rows", [None, 0])
def test_autocast_takes_part_like_a_linear_layer(chunk_rows):
    tensors, labels = head_case(FEW, WIDTH, VOCAB, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        value, _ = linear_sequence_loss(
            **tensors, labels=labels, cu_seqlens=sequence_bounds(FEW), loss=NLL(),
            reduction="token_mean", chunk_rows=chunk_rows,
        )  # fmt: skip
        plain = -plain_log_probs(**tensors, labels=labels).mean()
    exact_tensors = wide(tensors)
    exact = -plain_log_probs(**exact_tensors, labels=labels).mean()
    assert value.dtype == torch.float32
    assert_scalar_as_exact(value, plain, exact, torch.bfloat16)
    assert_all_as_exact(
        gradients(value, tensors), gradients(plain, tensors), gradients(exact, exact_tensors)
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["fp16 weights", "autocast"])
@pytest.mark.parametrize("chunk_rows", [None, 0])
def test_scaled_fp16_gradients_are_as_exact_as_pytorch(chunk_rows, autocast):
    """A scaled loss lifts gradients out of the underflow of fp16, ours as PyTorch's.

    Tokens that are no label have the smallest ones, so that they are looked at alone too.
    """
    rows, scale, dtype = 1024, 65536.0, torch.float32 if autocast else torch.float16
    tensors, labels = head_case(rows, WIDTH, VOCAB, dtype)
    labels = labels % (VOCAB // 2)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
    with torch.autocast(DEVICE, torch.float16, enabled=autocast):
        value, _ = linear_sequence_loss(
            **tensors, labels=labels, cu_seqlens=sequence_bounds(rows), loss=NLL(),
            reduction="token_mean", chunk_rows=chunk_rows,
        )  # fmt: skip
        plain = -plain_log_probs(**tensors, labels=labels).mean()
    exact_tensors = wide(tensors)
    exact = gradients(-plain_log_probs(**exact_tensors, labels=labels).mean(), exact_tensors)
    found, other = (gradients(scaler.scale(loss), tensors) for loss in (value, plain))
    for gradient in (found, other):
        for name, one in gradient.items():
            gradient[name] = one.double() / scale
    for gradient in (found, other, exact):
        gradient["d_weight of no label"] = gradient["d_weight"][VOCAB // 2 :]
    for name, want in exact.items():
        assert_as_exact(found[name], other[name], want, name)


@pytest.mark.parametrize("chunk_rows", CHUNKS.values(), ids=CHUNKS)
def test_runs_are_bit_identical(chunk_rows):
    tensors, labels = head_case(MANY, WIDTH, VOCAB, torch.bfloat16, bias=True)
    runs = [step(tensors, labels, sequence_bounds(MANY), chunk_rows) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def step(
    tensors: dict[str, Tensor],
    labels: Tensor,
    cu_seqlens: Tensor,
    chunk_rows: int | None = None,
    loss: NPO | SimNPO = LOSSES["NPO"][0],
    ref_log_probs: Tensor | None = None,
) -> tuple[Tensor, ...]:  # loss, sequence log-probs, gradients
    if ref_log_probs is None:
        ref_log_probs = labels.new_zeros(len(cu_seqlens) - 1, dtype=torch.float32)
    value, log_probs = linear_sequence_loss(
        **tensors, labels=labels, cu_seqlens=cu_seqlens, loss=loss, ref_log_probs=ref_log_probs,
        chunk_rows=chunk_rows,
    )  # fmt: skip
    return value.detach(), log_probs, *torch.autograd.grad(value, list(tensors.values()))


@needs_gpu
@pytest.mark.parametrize("loss", [NPO(0.1), SimNPO(2.5, 0.1)], ids=repr)
@pytest.mark.parametrize(
    ("rows", "chunk_rows", "bounds_on"),
    [(MANY, 1024, "cpu"), (MANY, None, "cpu"), (MANY, 0, "cuda"), (FEW, None, "cuda")],
)
def test_a_step_never_waits_for_the_gpu(rows, chunk_rows, bounds_on, loss):
    tensors, labels = head_case(rows, WIDTH, VOCAB, torch.bfloat16)
    cu_seqlens = sequence_bounds(rows).to(bounds_on)
    step(tensors, labels, cu_seqlens, chunk_rows, loss)  # what is found out once is found out
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tensors, labels, cu_seqlens, chunk_rows, loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("chunk_rows", [None, 0, 100])
def test_a_cuda_graph_replays_loss_and_backward_on_new_data(chunk_rows):
    def fresh():
        tensors, labels = head_case(FEW, WIDTH, VOCAB, torch.bfloat16)
        cu_seqlens = sequence_bounds(FEW)
        # sequences that have a token give it to the one before, or not
        cu_seqlens[1:-1] += torch.randint(0, 2, (len(cu_seqlens) - 2,)) * (
            cu_seqlens[1:].diff() > 0
        )
        ref = -20 * torch.rand(len(cu_seqlens) - 1, device=DEVICE)
        return tensors, labels, cu_seqlens.to(DEVICE), ref

    def run(tensors, labels, cu_seqlens, ref):
        return step(tensors, labels, cu_seqlens, chunk_rows, ref_log_probs=ref)

    kept = fresh()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(*kept)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*kept)
    for _ in range(2):
        new = fresh()
        with torch.no_grad():
            for old, tensor in zip(
                (*kept[0].values(), *kept[1:]), (*new[0].values(), *new[1:]), strict=True
            ):
                old.copy_(tensor)
        graph.replay()
        names = "loss", "log-probs", "d_hidden", "d_weight"
        for one, eager, name in zip(captured, run(*new), names, strict=True):
            assert_near(one, eager, torch.finfo(torch.bfloat16).eps, name)


@needs_gpu
@pytest.mark.parametrize("chunk_rows", [None, 0])
def test_two_streams_at_once_give_what_they_give_one_after_the_other(chunk_rows):
    cases = [head_case(rows, WIDTH, VOCAB, torch.float32) for rows in (FEW, FEW + 64)]
    bounds = [sequence_bounds(len(labels)) for _, labels in cases]
    expected = [step(*case, cu, chunk_rows) for case, cu in zip(cases, bounds, strict=True)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    runs = []
    for _ in range(4):
        for case, cu, stream in zip(cases, bounds, streams, strict=True):
            with torch.cuda.stream(stream):
                runs.append(step(*case, cu, chunk_rows))
    torch.cuda.synchronize()
    for i, run in enumerate(runs):
        for one, alone in zip(run, expected[i % 2], strict=True):
            assert_near(one, alone, 1e-5)


@pytest.mark.parametrize("chunk_rows", [None, 0])
def test_a_compiled_function_with_the_loss_in_it_gives_the_numbers_of_eager(chunk_rows):
    torch.compiler.reset()
    tensors, labels = head_case(FEW, WIDTH, VOCAB, torch.float32)
    cu_seqlens, body = sequence_bounds(FEW), torch.nn.Linear(WIDTH, WIDTH, device=DEVICE)
    loss, ref = NPO(0.1), torch.zeros(len(cu_seqlens) - 1, device=DEVICE)

    def function(x, weight):
        value, log_probs = linear_sequence_loss(
            F.silu(body(x)), weight, labels, cu_seqlens, loss, ref_log_probs=ref,
            chunk_rows=chunk_rows,
        )  # fmt: skip
        return 3 * value, log_probs

    backend = "inductor" if ON_GPU else "aot_eager"
    compiled = torch.compile(function, backend=backend, fullgraph=IN_GRAPH)
    learned = [*tensors.values(), *body.parameters()]
    runs = []
    for one in (compiled, function):
        value, log_probs = one(tensors["hidden"], tensors["weight"])
        runs.append((value.detach(), log_probs, *torch.autograd.grad(value, learned)))
    for found, expected in zip(*runs, strict=True):
        assert_near(found, expected, 1e-5)


BAD_LABEL = """
import sys, torch
from npo_fast import GA, linear_sequence_loss
hidden, weight = torch.randn(8, 16, device=sys.argv[1]), torch.randn(33, 16, device=sys.argv[1])
labels = torch.tensor([0] * 7 + [33], device=sys.argv[1])
value, _ = linear_sequence_loss(hidden, weight, labels, torch.tensor([0, 8]), GA())
print("loss", float(value))
"""


def test_a_label_outside_the_vocabulary_stops_the_process_and_names_the_operator():
    """In a process of its own: no CUDA call works after an assertion on the device."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", BAD_LABEL, DEVICE], cwd=root, capture_output=True, text=True
    )
    assert done.returncode != 0, done.stdout
    assert "linear_sequence_loss" in done.stderr
    assert "is outside" in done.stderr


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_kernels_as_shipped_are_as_exact_as_pytorch(dtype, softcap):
    """On logits that lie column after column, and row after row."""
    pytest.importorskip("triton")
    from npo_fast.kernels.triton.row_kl import row_kl
    from npo_fast.kernels.triton.row_log_probs import row_gradient, row_log_probs

    rows, vocabulary = 19, 32001 if ON_GPU else 301
    logits = (4 * torch.randn(rows, vocabulary, device=DEVICE)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    target = logits.float().gather(1, labels[:, None]).squeeze(1) + 0.01
    ref_logits, g = logits.roll(1, 0), torch.randn(rows, device=DEVICE)

    def log_probs_and_gradient(kernel, gradient_kernel, logits, opmath=torch.float32):
        transform = HeadTransform(softcap, 0.5)
        log_probs, lse, *softmax = kernel(logits, labels, target.to(opmath), transform)
        gradient_kernel(logits, labels, log_probs, *softmax, g.to(opmath), transform)
        return log_probs, lse, logits

    def kl_and_gradient(kernel, logits):
        transforms = HeadTransform(softcap, 0.5), HeadTransform()
        kl = kernel(logits, ref_logits.to(logits.dtype), *transforms)
        return kl, logits

    plain_kernels = reference.row_log_probs, reference.row_gradient_
    plain = (
        *log_probs_and_gradient(*plain_kernels, logits.clone()),
        *kl_and_gradient(reference.row_kl_, logits.clone()),
    )
    exact = (
        *log_probs_and_gradient(*plain_kernels, logits.double(), torch.float64),
        *kl_and_gradient(reference.row_kl_, logits.double()),
    )
    sizes = {"log_probs": 0.0, "lse": 0.0, "d log_prob": 0.0, "kl": 1.0, "d kl": 1.0}
    for by_columns in (True, False):
        copies = [logits.clone(), logits.clone()]
        if by_columns:
            copies = [layout.empty_logits(*one.shape, one, dtype).copy_(one) for one in copies]
        found = (
            *log_probs_and_gradient(row_log_probs, row_gradient, copies[0]),
            *kl_and_gradient(row_kl, copies[1]),
        )
        for (name, size), got, one, want in zip(sizes.items(), found, plain, exact, strict=True):
            assert_as_exact(got, one, want, name, least_size=size, truncated=DEVICE == "cpu")


# ---- models ----


def random_sequences(count: int, lengths: range, vocabulary: int) -> list[TokenizedExample]:
    out = []
    for i in range(count):
        length = int(torch.randint(lengths.start, lengths.stop, ()))
        ids = torch.randint(3, vocabulary, (length,)).tolist()
        out.append(TokenizedExample(tuple(ids), 1 + i % 3, i))
    return out


@needs_gpu
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_varlen_attention_is_as_exact_as_packed_attention(family):
    """Grouped heads, unequal sequences and (Mistral) a window, beside packed attention in bf16."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, packed = "npo_fast_varlen", "npo_fast_packed"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        pytest.skip(f"{name} is not registered with transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    model = calm_model(family, **sizes).to(DEVICE, torch.bfloat16)
    sequences = random_sequences(12, range(2, 90), VOCABULARY)
    (batch,) = pack(sequences, max_tokens=sum(len(s.input_ids) for s in sequences))
    batch = batch.to(model.device)
    direction = torch.randn(len(batch.input_ids), sizes["hidden_size"], device=DEVICE)

    def states_and_gradient(attention: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        lm = CausalLM(copy.deepcopy(model).to(dtype), attention, probe=False)
        assert lm.attention == attention
        states = lm.states(batch)
        value = (states.to(direction.dtype) * direction).sum()
        found = torch.autograd.grad(value, list(lm.decoder.parameters()))
        return states.detach(), torch.cat([g.flatten() for g in found])

    exact = states_and_gradient(packed, torch.float64)
    plain = states_and_gradient(packed, torch.bfloat16)
    found = states_and_gradient(name, torch.bfloat16)
    for got, one, want, what in zip(found, plain, exact, ("states", "gradient"), strict=True):
        assert_as_exact(got, one, want, what)


def train_one_step(model: torch.nn.Module) -> tuple[float, float]:
    """Loss and gradient norm; the weights are updated."""
    torch.manual_seed(1)
    data = {name: random_sequences(7, range(4, 14), VOCABULARY) for name in ("forget", "retain")}
    terms, lm = build_method("NPO+RT"), CausalLM(model, probe=False)
    settings = TrainSettings(epochs=1, batch_size=7, lr=1e-3, warmup_steps=0, micro_batch_tokens=40)
    references = reference_log_probs(lm, data, terms, settings.micro_batch_tokens)
    (record,) = train(lm, data, terms, settings, references)
    return record.loss, record.grad_norm


def test_a_training_step_is_that_of_the_cpu():
    on_cpu = calm_model("Llama")
    before = copy.deepcopy(on_cpu)
    there = copy.deepcopy(on_cpu).to(DEVICE)
    expected = train_one_step(on_cpu)
    assert train_one_step(there) == pytest.approx(expected, rel=1e-4)
    named = zip(on_cpu.named_parameters(), there.parameters(), before.parameters(), strict=True)
    for (name, want), got, old in named:
        assert not torch.equal(want, old), f"{name} was not trained"
        assert_near(got.detach().cpu(), want.detach(), 1e-4, name)


@pytest.mark.filterwarnings("ignore:adamw rounds bf16 weights")
def test_a_training_step_in_bf16_differs_by_rounding_alone():
    half = calm_model("Llama").bfloat16()
    wide_model = copy.deepcopy(half).float()
    loss, grad_norm = train_one_step(half.to(DEVICE))
    expected_loss, expected_norm = train_one_step(wide_model)
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert grad_norm == pytest.approx(expected_norm, rel=5e-2)
