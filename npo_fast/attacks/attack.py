"""Attacks on a copy of an unlearned model, measured where they had no help."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from npo_fast import metrics
from npo_fast.attacks.options import AttackOptions
from npo_fast.attacks.quantize import quantize_
from npo_fast.data import Template, TokenizedExample
from npo_fast.errors import UserError
from npo_fast.evaluation.suite import Suite
from npo_fast.methods import FINETUNE
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import train
from npo_fast.trainer.order import permutation
from npo_fast.trainer.settings import StepRecord, TrainSettings

Bar = Callable[[Iterator[StepRecord], str], Iterable[StepRecord]]  # shows the steps
Measure = Callable[[CausalLM, Suite, str], metrics.Result]  # model, records, name of the attack


@dataclass(frozen=True)
class Split:
    """Rows of the forget set: those that relearning sees, and those that every model answers.

    A ``share`` of 0, without relearning, leaves all to be answered.
    """

    seen: list[int]
    rest: list[int]

    @classmethod
    def of(cls, records: int, share: float, seed: int) -> "Split":
        if share > 0 and records < 2:
            raise UserError("relearning takes at least 2 forget records: a part, and a rest")
        seen = min(records - 1, max(1, round(share * records))) if share > 0 else 0
        order = permutation(records, f"{seed}/relearn")
        return cls(sorted(order[:seen]), sorted(order[seen:]))


def attack(
    lm: CausalLM,
    template: Template,
    suite: Suite,
    split: Split,
    options: AttackOptions,
    training: TrainSettings,
    measure: Measure,
    bar: Bar,
    tell: Callable[[str], None],
) -> dict[str, metrics.Result]:
    """The logs of the model itself ("before") and of each attack, all on the same records.

    Every attack starts from a fresh copy; ``lm`` stays as it is.
    """
    forget = suite[metrics.FORGET]
    measured = {**suite, metrics.FORGET: [forget[i] for i in split.rest]}
    found = {"before": measure(lm, measured, "before")}
    if "relearn" in options.names:
        part = template.encode_all(forget[i] for i in split.seen)[0]
        found["relearn"] = measure(relearned(lm, part, training, bar), measured, "relearn")
    if "quantize" in options.names:
        for bits in options.widths:
            copied = copy.deepcopy(lm)
            share = quantize_(copied, bits, options.group)
            tell(f"int{bits}: {share:.1%} of the weights without embedding and head are rounded")
            found[f"int{bits}"] = measure(copied, measured, f"int{bits}")
    return found


def relearned(
    lm: CausalLM, sequences: list[TokenizedExample], training: TrainSettings, bar: Bar
) -> CausalLM:
    """A copy, fine-tuned on a part of what was forgotten. Source: arXiv 2406.13356."""
    copied = copy.deepcopy(lm)
    for _ in bar(train(copied, {"train": sequences}, FINETUNE, training), "relearn"):
        pass
    return copied
