"""Part 7: one NPO+RT training step of a random Llama of about 1B, and where its time goes.

Ours is the loop of ``npo-fast unlearn``: packed sequences, the reference as one cached float a
sequence, no whole logits. The padded way has the reference model resident and asks it at every
step, pads each side to its longest sequence and makes all logits. Both step in turn on the same
batches, with forward, backward, clipping and AdamW in the time.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gpu_parts.measure import free_memory, peak_mib, profile, synchronize
from gpu_parts.record import Record
from gpu_parts.tofu_lengths import LENGTHS
from npo_fast.bench.memory import MIB
from npo_fast.data import TokenizedExample
from npo_fast.methods import build_method
from npo_fast.model.attention import NAME as PACKED
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.optimizers import build_optimizer
from npo_fast.trainer.order import step_batches
from npo_fast.trainer.settings import TrainSettings

SIZES = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256,
}  # fmt: skip
TINY_SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 512,
}  # fmt: skip
BETA = 0.1
SEQUENCES, TINY_SEQUENCES = 32, 4  # of each side, a step
MICRO_BATCH_TOKENS, TINY_MICRO_BATCH_TOKENS = 4096, 256
WARM_UP, ROUNDS, TINY_ROUNDS = 1, 15, 2  # steps after the first two
PROFILED = 20  # kernels that are listed
TOLERANCE = 5e-2  # relative, of the loss: bf16
OURS, ONE_CALL_A_LENGTH, PADDED = "ours", f"ours with {PACKED}", "padded"

Sources = dict[str, list[TokenizedExample]]
# of each answer, (S,), and how many tokens they have
AnswerLogProbs = Callable[[PreTrainedModel, list[TokenizedExample]], tuple[Tensor, int]]


class Step(NamedTuple):
    loss: float
    grad_norm: float


def run(record: Record, device: torch.device, tiny: bool, job: str) -> None:
    rounds = TINY_ROUNDS if tiny else ROUNDS
    settings = TrainSettings(
        epochs=1,
        batch_size=TINY_SEQUENCES if tiny else SEQUENCES,
        micro_batch_tokens=TINY_MICRO_BATCH_TOKENS if tiny else MICRO_BATCH_TOKENS,
        warmup_steps=0,
    )
    sizes = TINY_SIZES if tiny else SIZES
    sources = make_sources(settings.batch_size * (2 + WARM_UP + rounds + 1), sizes["vocab_size"])
    ways = begin(record, make_model(sizes, device), sources, settings, device)
    free_memory(device)
    record.attempt("steps", lambda: time_steps(record, ways, rounds, device, sources, settings))
    if OURS in ways:
        step = partial(next, ways[OURS])
        record.attempt("profile", lambda: profile(record, "profile", step, device, PROFILED))


def begin(
    record: Record,
    model: LlamaForCausalLM,
    sources: Sources,
    settings: TrainSettings,
    device: torch.device,
) -> dict[str, Iterator[Step]]:
    """Every way after two steps: one that fills the optimizer, and one for its peak of memory."""
    parameters = sum(p.numel() for p in model.parameters())
    record.row("model", "random Llama", parameters_millions=parameters / 1e6)
    ways: dict[str, Iterator[Step]] = {}
    for way in (OURS, PADDED, ONE_CALL_A_LENGTH):
        before = allocated(device)
        steps = record.attempt(
            f"{way}: first step", partial(start, way, model, sources, settings, record)
        )
        if steps is None:
            continue
        record.row("step", way, resident_mib=(allocated(device) - before) / MIB)
        second = partial(peak_mib, partial(next, steps), device)
        peak = record.attempt(f"{way}: second step", second)
        if peak is None:
            continue
        if peak:
            record.row("step", way, step_peak_mib=peak["peak_mib"])
        ways[way] = steps
    return ways


def make_model(sizes: dict[str, int], device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=2048, tie_word_embeddings=True)
    with device:
        return LlamaForCausalLM(config).to(torch.bfloat16)


def make_sources(count: int, vocabulary: int) -> Sources:
    """Random tokens in questions and answers as long as TOFU's."""
    random = torch.Generator().manual_seed(0)
    sources: Sources = {}
    for source in ("forget", "retain"):
        sources[source] = []
        for index in range(count):
            prompt, answer = LENGTHS[index % len(LENGTHS)]
            ids = torch.randint(3, vocabulary, (prompt + answer,), generator=random)
            sources[source].append(TokenizedExample(tuple(ids.tolist()), prompt, index))
    return sources


def start(
    way: str, model: LlamaForCausalLM, sources: Sources, settings: TrainSettings, record: Record
) -> Iterator[Step]:
    """The steps of one way on a copy of the model, after the first of them."""
    own = copy.deepcopy(model)
    steps = padded(own, sources, settings)
    if way != PADDED:
        lm = CausalLM(own, "auto" if way == OURS else PACKED)
        record.row("step", way, attention=lm.attention)
        steps = ours(lm, sources, settings)
    next(steps)
    return steps


def ours(lm: CausalLM, sources: Sources, settings: TrainSettings) -> Iterator[Step]:
    terms = build_method("NPO+RT")
    references = reference_log_probs(lm, sources, terms, settings.micro_batch_tokens)
    for step in train(lm, sources, terms, settings, references):
        yield Step(step.loss, step.grad_norm)


def padded(
    model: PreTrainedModel,
    sources: Sources,
    settings: TrainSettings,
    log_probs: AnswerLogProbs | None = None,
) -> Iterator[Step]:
    log_probs = log_probs or plain_log_probs
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    for one in (model, reference):
        one.set_attn_implementation("sdpa")
    model.train()
    optimizer = build_optimizer(model, "adamw", settings.lr, settings.weight_decay)
    total = len(sources["forget"]) // settings.batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (total - done) / total)
    for batch in step_batches(sources, ("forget",), settings):
        forget, _ = log_probs(model, batch["forget"])
        with torch.no_grad():
            before, _ = log_probs(reference, batch["forget"])
        retain, tokens = log_probs(model, batch["retain"])
        npo = -(2 / BETA) * F.logsigmoid(-BETA * (forget - before)).mean()
        loss = npo - retain.sum() / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        step = Step(loss.item(), norm.item())
        del forget, before, retain, npo, loss
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step


def plain_log_probs(
    model: PreTrainedModel, sequences: list[TokenizedExample]
) -> tuple[Tensor, int]:
    """Log-probability of each answer, (S,), from whole logits of a padded batch; their tokens."""
    ids, mask, answers = (x.to(model.device) for x in padded_batch(sequences))
    out = model(input_ids=ids, attention_mask=mask, use_cache=False)
    log_probs = out.logits.float()[:, :-1].log_softmax(-1)
    log_probs = log_probs.gather(2, ids[:, 1:, None]).squeeze(2)
    return (log_probs * answers[:, 1:]).sum(1), sum(s.answer_length for s in sequences)


def padded_batch(sequences: list[TokenizedExample]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, 1 where there is a token, and 1 where it is one of an answer, (S, T) each."""
    ids = pad_sequence([torch.tensor(s.input_ids) for s in sequences], batch_first=True)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, s in enumerate(sequences):
        mask[row, : len(s.input_ids)] = 1
        answers[row, s.prompt_length : len(s.input_ids)] = 1
    return ids, mask, answers


def time_steps(
    record: Record,
    ways: dict[str, Iterator[Step]],
    rounds: int,
    device: torch.device,
    sources: Sources,
    settings: TrainSettings,
) -> None:
    """All ways step in turn; what they report must agree."""
    times_ms: dict[str, list[float]] = {way: [] for way in ways}
    worst = dict.fromkeys(ways, 0.0)
    for round_ in range(WARM_UP + rounds):
        found = {}
        for way, steps in ways.items():
            synchronize(device)
            started = time.perf_counter()
            found[way] = next(steps)
            synchronize(device)
            if round_ >= WARM_UP:
                times_ms[way].append(1e3 * (time.perf_counter() - started))
        right = found.get(PADDED) or next(iter(found.values()))
        for way, step in found.items():
            worst[way] = max(worst[way], abs(step.loss - right.loss) / abs(right.loss))
            if not worst[way] <= TOLERANCE:
                raise AssertionError(f"losses disagree: {found}")
        if record.left_s < 10 and round_ > WARM_UP:  # the profile comes after this
            break
    tokens = sum(len(s.input_ids) for own in sources.values() for s in own)
    tokens_a_step = tokens * settings.batch_size / len(sources["forget"])
    for way, own in times_ms.items():
        ms = statistics.median(own)
        values: dict[str, Any] = {
            "ms": ms, "min_ms": min(own), "rounds": len(own),
            "tokens_per_s": 1e3 * tokens_a_step / ms, "loss_difference": worst[way],
            "last_loss": found[way].loss, "last_grad_norm": found[way].grad_norm,
        }  # fmt: skip
        if OURS in times_ms:
            pairs = zip(own, times_ms[OURS], strict=True)
            values["over_ours"] = statistics.median(a / b for a, b in pairs)
        record.row("step", way, **values)


def allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    synchronize(device)
    return torch.cuda.memory_allocated()
