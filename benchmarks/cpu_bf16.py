"""bf16 on a CPU that multiplies it fast (AMX): the loss, and a training step.

    python benchmarks/cpu_bf16.py --threads 2 --output benchmarks/results/cpu_bf16.json

Loss and gradients (NPO) beside the three bare bf16 GEMMs into existing memory, plain PyTorch in
bf16, ``torch.nn.functional.linear_cross_entropy`` where this PyTorch has it, and the same loss in
fp32; variants in turn, medians, and nothing that is wrong is timed. Then a step of NPO+RT of a
random Llama of SmolLM2-135M's shape in bf16 and in fp32. Needs torch, transformers and the C++
kernels; NPO_FAST_CPU_BF16=1 takes the path on any CPU, where it is slow.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch import Tensor

from npo_fast.bench.candidates import OURS, Candidate, find_candidates
from npo_fast.bench.fp64_oracle import TOLERANCE, Oracle
from npo_fast.bench.inputs import Inputs, Shape, make_inputs
from npo_fast.bench.memory import train as loss_and_gradients
from npo_fast.bench.provenance import provenance
from npo_fast.bench.timing import bare_gemms, interleaved
from npo_fast.data import TokenizedExample
from npo_fast.kernels import cpu
from npo_fast.kernels.layout import cpu_multiplies_bf16
from npo_fast.methods import build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.settings import TrainSettings

CPU = torch.device("cpu")
SIZES = ((512, 576, 49152), (1000, 576, 49152), (2048, 576, 49152), (512, 2048, 128256))
TINY_SIZES = ((48, 64, 512),)
SEQUENCES, MICRO_BATCH_TOKENS = 16, 2048


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_bf16.json"))
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed training steps of each dtype")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds")
    return parser.parse_args()


def loss_times(rows: int, width: int, vocabulary: int, rounds: int) -> dict[str, Any]:
    shape = Shape("", rows, width, vocabulary, max(1, rows // 64), "bfloat16")
    half = make_inputs(shape, "random", CPU)
    wide = widened(half)
    oracle = Oracle(half)
    ours, *_ = find_candidates(CPU, [])[0]
    others, missing = find_candidates(CPU, ["plain", "torch-lce"])
    calls: dict[str, Callable[[], object]] = {"three GEMMs": bare_gemms(half)[0]}
    errors = {}
    for candidate in [ours, *(c for c in others if c.peer != OURS)]:
        errors[candidate.key] = check(candidate, half, oracle)
        calls[candidate.key] = partial(loss_and_gradients, candidate, half)
    calls[f"{ours.key} fp32"] = partial(loss_and_gradients, ours, wide)
    for call in calls.values():
        call()
    times = interleaved(calls, rounds, CPU)
    floor = times["three GEMMs"]
    return {
        "missing": missing,
        "errors": errors,
        "median_ms": {name: measured.median_ms for name, measured in times.items()},
        "over_gemms": {name: measured.ratio_to(floor) for name, measured in times.items()},
    }


def widened(inputs: Inputs) -> Inputs:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().float().requires_grad_()

    return Inputs(**{**vars(inputs), "hidden": leaf(inputs.hidden), "weight": leaf(inputs.weight)})


def check(candidate: Candidate, inputs: Inputs, oracle: Oracle) -> dict[str, float]:
    errors = oracle.errors(candidate.loss, *loss_and_gradients(candidate, inputs))
    if not errors.acceptable("bfloat16"):
        most = TOLERANCE["bfloat16"]
        sys.exit(f"not timed: {candidate.key} is off by {errors}, more than {most}")
    return vars(errors)


def step_times(tiny: bool, steps: int) -> dict[str, Any]:
    config = transformers.LlamaConfig(
        vocab_size=512 if tiny else 49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=2 if tiny else 30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)

    def sequences() -> list[TokenizedExample]:
        lengths = [45 + (37 * i) % 40 for i in range(SEQUENCES * (steps + 1))]  # TOFU's, about
        ids = (torch.randint(config.vocab_size, (n,), generator=random) for n in lengths)
        return [TokenizedExample(tuple(x.tolist()), 20, i) for i, x in enumerate(ids)]

    sources = {"forget": sequences(), "retain": sequences()}
    running, results = {}, {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        torch.manual_seed(0)
        lm = CausalLM(transformers.AutoModelForCausalLM.from_config(config).to(dtype))
        terms = build_method("NPO+RT")
        settings = TrainSettings(
            epochs=1, batch_size=SEQUENCES, micro_batch_tokens=MICRO_BATCH_TOKENS, warmup_steps=0
        )
        references = reference_log_probs(lm, sources, terms, MICRO_BATCH_TOKENS)
        running[name] = train(lm, sources, terms, settings, references)
        results[name] = {"times_s": [], "losses": []}
    for step in range(steps + 1):  # the first warms up
        for name, steps in running.items():
            started = time.perf_counter()
            record = next(steps)
            if step:
                results[name]["times_s"].append(time.perf_counter() - started)
            results[name]["losses"].append(record.loss)
    for result in results.values():
        result["median_s"] = statistics.median(result["times_s"])
    pairs = zip(results["fp32"]["times_s"], results["bf16"]["times_s"], strict=True)
    return {**results, "fp32_over_bf16": statistics.median(a / b for a, b in pairs)}


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if cpu.library_path() is None:
        sys.exit("the C++ kernels are not built: python setup.py build_ext --inplace")
    result: dict[str, Any] = {
        "provenance": provenance(),
        "multiplies_bf16": cpu_multiplies_bf16(),
        "forced": os.environ.get("NPO_FAST_CPU_BF16"),
        "loss": {},
    }

    def save() -> None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")

    for size in TINY_SIZES if arguments.tiny else SIZES:
        name = "N={} D={} V={}".format(*size)
        result["loss"][name] = loss_times(*size, arguments.rounds)
        print(name, result["loss"][name], flush=True)
        save()
    result["step"] = step_times(arguments.tiny, arguments.steps)
    print(result["step"])
    save()


if __name__ == "__main__":
    main()
