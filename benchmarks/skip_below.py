"""What ``skip_below`` saves and costs on a forget set that a real model knows by heart.

Rows are the answer tokens of the forget set, the loss is NPO against the model before unlearning.
States: that model ("memorised"), the mean of its weights and the unlearned ones ("halfway"), and
the unlearned model. Time is a ratio to three bare GEMMs of the same rows, in turns; the error is
that of the head's gradient, relative to the exact one, beside the bound that the call returns.

    python benchmarks/skip_below.py --original runs/original/model --unlearned runs/npo/model \
        --data locuslab/TOFU --forget forget01
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from npo_fast import NPO, linear_sequence_loss
from npo_fast.bench.provenance import provenance
from npo_fast.data import Template, load_records, pack
from npo_fast.model.load import load_model, load_tokenizer
from npo_fast.ops import Skipped, segment_sum

FRACTIONS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Settings:
    original: str
    """The model before unlearning."""
    unlearned: str
    forget: str
    data: str | None = None
    template: str = "plain"
    rounds: int = 5
    output: Path = Path("benchmarks/results/skip_below.json")


def main(settings: Settings) -> None:
    facts = {"provenance": provenance()}
    records = load_records(settings.forget, settings.data)
    tokenizer = load_tokenizer(settings.original)
    template = Template(tokenizer, settings.template)
    sequences = [template.encode(record, i) for i, record in enumerate(records)]
    (batch,) = pack(sequences, sum(len(s.input_ids) for s in sequences))
    lm, other = load_model(settings.original), load_model(settings.unlearned)
    with torch.no_grad():
        reference = segment_sum(lm.log_probs(batch), batch.answer_cu_seqlens)
        results = {"memorised": measure(lm, batch, reference, settings.rounds)}
        pairs = zip(lm.model.parameters(), other.model.parameters(), strict=True)
        for mine, theirs in pairs:
            mine.lerp_(theirs, 0.5)
        results["halfway"] = measure(lm, batch, reference, settings.rounds)
        results["unlearned"] = measure(other, batch, reference, settings.rounds)
    settings.output.write_text(json.dumps({**facts, "states": results}, indent=1) + "\n")


def measure(lm: Any, batch: Any, reference: Tensor, rounds: int) -> dict[str, Any]:
    hidden = lm.hidden(batch).detach().requires_grad_()
    weight = lm.head_arguments["weight"].detach().requires_grad_()
    arguments = {**lm.head_arguments, "weight": weight, "labels": batch.labels}

    def step(fraction: float, skipped: Skipped | None = None) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            loss, log_probs = linear_sequence_loss(
                hidden, cu_seqlens=batch.answer_cu_seqlens, loss=NPO(), ref_log_probs=reference,
                skip_below=fraction, skipped=skipped, **arguments,
            )  # fmt: skip
            return log_probs, torch.autograd.grad(loss, (hidden, weight))[1]

    rows, vocabulary = len(hidden), len(weight)
    logits = torch.empty(rows, vocabulary)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def gemms() -> None:
        torch.mm(hidden.detach(), weight.detach().t(), out=logits)
        torch.mm(logits, weight.detach(), out=d_hidden.detach())
        torch.mm(logits.t(), hidden.detach(), out=d_weight.detach())

    log_probs, exact = step(0.0)
    exact = exact.clone()
    results: list[dict[str, float]] = []
    for fraction in FRACTIONS:
        skipped = Skipped()
        _, gradient = step(fraction, skipped)
        results.append({
            "skip_below": fraction,
            "share": skipped.share,
            "relative_error": float((gradient - exact).norm() / exact.norm()),
            "relative_bound": skipped.weight_error / float(exact.norm()),
        })  # fmt: skip
    ratios: list[list[float]] = [[] for _ in FRACTIONS]
    for _ in range(rounds):
        floor = seconds(gemms)
        for times, fraction in zip(ratios, FRACTIONS, strict=True):
            times.append(seconds(lambda fraction=fraction: step(fraction)) / floor)
    for result, times in zip(results, ratios, strict=True):
        result["time_over_three_gemms"] = statistics.median(times)
    tokens = {"rows": rows}
    for result in results:
        print(tokens["rows"], {name: float(f"{value:.3g}") for name, value in result.items()})
    return {**tokens, "log_prob_a_token": float(log_probs.sum() / rows), "by_fraction": results}


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
