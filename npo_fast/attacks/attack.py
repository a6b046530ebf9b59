"""Runs attacks on copies of an unlearned model, and measures each on records it did not see."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from npo_fast import metrics
from npo_fast.attacks.options import AttackOptions
from npo_fast.attacks.quantize import quantize_
from npo_fast.data import Template, TokenizedExample
from npo_fast.errors import UserError
from npo_fast.evaluation.suite import Suite, TokenizedSuite, tokenize_suite
from npo_fast.methods import FINETUNE
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import train
from npo_fast.trainer.order import permutation
from npo_fast.trainer.settings import StepRecord, TrainSettings

# what wraps the steps of a training run, given a name, as tqdm does
Progress = Callable[[Iterator[StepRecord], str], Iterable[StepRecord]]
Evaluate = Callable[[CausalLM, TokenizedSuite, str], metrics.Result]  # model, suite, attack


@dataclass(frozen=True)
class Split:
    """Rows of the forget set: those that relearning trains on, and those that are measured."""

    seen: list[int]
    rest: list[int]

    @classmethod
    def of(cls, records: int, share: float, seed: int) -> "Split":
        """Draws ``share`` of the rows to be seen, at least one; a share of 0 leaves all to measure.

        Raises:
            UserError: there is a single record to split.
        """
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
    evaluate: Evaluate,
    progress: Progress,
    log: Callable[[str], None],
) -> dict[str, metrics.Result]:
    """Returns the logs of the model ("before") and of each attack, all on the same records.

    Every attack starts from a fresh copy; ``lm`` is not changed.
    """
    forget = suite[metrics.FORGET]
    rest = {**suite, metrics.FORGET: [forget[i] for i in split.rest]}
    measured = tokenize_suite(template, rest)
    results = {"before": evaluate(lm, measured, "before")}
    if "relearn" in options.names:
        seen, _ = template.encode_all(forget[i] for i in split.seen)
        attacked = relearn(lm, seen, training, progress)
        results["relearn"] = evaluate(attacked, measured, "relearn")
    if "quantize" in options.names:
        for bits in options.widths:
            copied = copy.deepcopy(lm)
            share = quantize_(copied, bits, options.group)
            log(f"int{bits}: {share:.1%} of the weights without embedding and head are rounded")
            results[f"int{bits}"] = evaluate(copied, measured, f"int{bits}")
    return results


def relearn(
    lm: CausalLM, examples: list[TokenizedExample], training: TrainSettings, progress: Progress
) -> CausalLM:
    """Returns a copy, fine-tuned on forget examples. Source: arXiv 2406.13356."""
    copied = copy.deepcopy(lm)
    for _ in progress(train(copied, {"train": examples}, FINETUNE, training), "relearn"):
        pass
    return copied
