"""MUSE's measures of logs: verbatim and knowledge memorization, privacy leakage, and a verdict.

A MUSE result has the logs ``VERBMEM``, ``KNOWMEM_FORGET``, ``KNOWMEM_RETAIN``, ``PRIVLEAK_FORGET``
and ``PRIVLEAK_HOLDOUT``, named by the splits of the data set. ROUGE is 0 to 1, PrivLeak in percent.
Source: arXiv 2407.06460, section 3, and the code published with it where the two differ.
"""

from collections.abc import Mapping

import numpy as np

from npo_fast.errors import UserError
from npo_fast.metrics.logs import CONVENTIONS, Result, column, examples_in
from npo_fast.metrics.measures import Measure
from npo_fast.metrics.memorization import conventions_of, roc_auc
from npo_fast.metrics.verdict import ADVICE, KEPT, KNOWN, Outcome, Verdict
from npo_fast.tables import number

VERBMEM = "verbmem/forget"
KNOWMEM_FORGET, KNOWMEM_RETAIN = "knowmem/forget_qa", "knowmem/retain_qa"
PRIVLEAK_FORGET, PRIVLEAK_HOLDOUT = "privleak/forget", "privleak/holdout"
ROUGE = "rougeL_f1"
MIN_K_SHARE = 0.4
LEAK = 5.0  # percent: PrivLeak within plus and minus this much is none (table 3 of the paper)
FEW = 10  # texts of a set; the interval of an attack on fewer is chance
MISSING = "name the logs of a model retrained without the forget set (--retrained)"


def is_muse(result: Result) -> bool:
    """Whether these are logs of MUSE's evaluation."""
    return PRIVLEAK_FORGET in result


def privleak_auc(result: Result) -> float:
    """Returns ``P(a holdout text is likelier than a forget text)`` by min-k; a tie counts half.

    The holdout set is the positive class, as in MUSE's code: 0 where the model knows the forget
    texts by heart, near 0.5 where it never saw them, 1 where they stand out as unlikely.
    """
    holdout, forget = (
        column(result[name], "min_k") for name in (PRIVLEAK_HOLDOUT, PRIVLEAK_FORGET)
    )
    return roc_auc(holdout, forget)


def privleak(result: Result, retrained: Result) -> float:
    """Returns ``100 (AUC - AUC_retrained) / AUC_retrained``, with the AUC of ``privleak_auc``.

    -100 where nothing was forgotten, 0 as good as retrained, above 0 where forgetting went so far
    that it shows.
    """
    expected = privleak_auc(retrained)
    return 100 * (privleak_auc(result) - expected) / expected


class _OfLikelihoods(Measure):
    """A measure of both PrivLeak logs, whose usual k of min-k is MUSE's."""

    def label_of(self, result: Result) -> str:
        entry = result[PRIVLEAK_FORGET].get(CONVENTIONS, {})
        k = entry.get("min_k_share", "not recorded")
        return self.label if k == MIN_K_SHARE else f"{self.label} (k = {k})"


def _mean_rouge(key: str, label: str, file: str, direction: int) -> Measure:
    return Measure(
        key, label, lambda result, _: float(np.mean(column(result[file], ROUGE))),
        {file: (ROUGE,)}, direction=direction,
    )  # fmt: skip


_PRIVLEAK = dict.fromkeys((PRIVLEAK_FORGET, PRIVLEAK_HOLDOUT), ("min_k",))
MEASURES = {  # by key, in the order of ``summary``
    measure.key: measure
    for measure in (
        _mean_rouge("verbmem_forget", "VerbMem forget", VERBMEM, -1),
        _mean_rouge("knowmem_forget", "KnowMem forget", KNOWMEM_FORGET, -1),
        _mean_rouge("knowmem_retain", "KnowMem retain", KNOWMEM_RETAIN, 1),
        _OfLikelihoods("privleak_auc", "AUC, holdout above forget, min-k",
                       lambda result, _: privleak_auc(result), _PRIVLEAK),
        _OfLikelihoods("privleak", "PrivLeak, %", privleak, _PRIVLEAK, needs_retrained=True),
    )
}  # fmt: skip


def summary(result: Result, retrained: Result | None = None) -> dict[str, float]:
    """Returns every measure that the logs allow, by label; PrivLeak with ``retrained`` alone."""
    scores = measures(result, retrained)
    return {MEASURES[key].label_of(result): value for key, value in scores.items()}


def measures(result: Result, retrained: Result | None = None) -> dict[str, float]:
    """Returns every measure that the logs allow, by key."""
    return {
        key: measure.compute(result, retrained or {})
        for key, measure in MEASURES.items()
        if measure.available(result, retrained)
    }


def check_retrained(retrained: Result, sizes: Mapping[str, int], share: float) -> None:
    """Checks that the logs of a retrained model are of the same texts, and have an AUC above 0.

    Args:
        sizes: examples of this evaluation, by log.
        share: its k of min-k.
    """
    for name in _PRIVLEAK:
        if name not in retrained:
            raise UserError(f"--retrained has no {name}: evaluate that model with --suite muse")
        if name not in sizes:
            raise UserError(f"the log has no {name}: evaluate the model with --suite muse again")
    for name in (*_PRIVLEAK, *retrained):
        theirs = examples_in(retrained[name])
        if theirs != sizes.get(name, theirs):
            raise UserError(
                f"--retrained has {theirs} texts of {name}, and this evaluation {sizes[name]}: "
                "evaluate both models on the same --data"
            )
    for name in _PRIVLEAK:
        entry = retrained[name].get(CONVENTIONS, {})
        conventions_of(retrained[name], min_k=True)  # a damaged entry
        if (k := entry.get("min_k_share")) != share:
            raise UserError(
                f"--retrained took min-k with k = {k}, and this evaluation {share:g}: evaluate "
                "both with the same --min-k-share"
            )
    if privleak_auc(retrained) == 0:
        raise UserError(
            "--retrained ranks every forget text above every holdout text (AUC 0), so it was "
            "trained on the forget set: PrivLeak compares with a model that was not"
        )


def verdict(
    result: Result,
    retrained: Result | None,
    before: Mapping[str, float],
    between: Mapping[str, tuple[float, float]],
) -> Verdict:
    """The four criteria of MUSE's table 3 as one word, against a retrained model.

    A difference counts where the 95 % interval of resampled records leaves it no doubt.

    Args:
        before: ``measures`` of the model before unlearning; {} where there is none.
        between: the intervals of ``result``, by key.
    """
    ours, theirs = measures(result, retrained), {} if retrained is None else measures(retrained)
    kept_by, other = ("before", before) if before else ("retrained", theirs)

    def words(key: str, name: str, compared: Mapping[str, float]) -> str:
        old = f" ({name} {number(compared[key])})" if key in compared else ""
        return f"{MEASURES[key].label} {number(ours[key])}{old}"

    def judged(outcome: Outcome, *reasons: str) -> Verdict:
        return Verdict(outcome, reasons, ADVICE.get(outcome, ""))

    key = "knowmem_retain"
    kept = words(key, kept_by, other) if key in ours else ""
    if kept and other.get(key, 0.0) >= KNOWN and ours[key] < KEPT * other[key]:
        return judged("collapsed", kept)
    forgotten = [k for k in ("verbmem_forget", "knowmem_forget") if k in ours]
    numbers = [words(k, "retrained", theirs) for k in forgotten]
    if retrained is None:
        auc = "" if numbers or kept else words("privleak_auc", "retrained", theirs)
        return Verdict("undecided", (", ".join([*filter(None, (*numbers, kept, auc))]),), MISSING)
    numbers.append(f"PrivLeak {number(ours['privleak'])} %")
    low, high = between.get("privleak_auc", (0.0, 1.0))
    if any(examples_in(result[name]) < FEW for name in _PRIVLEAK):
        low, high = 0.0, 1.0
    known = [text for k, text in zip(forgotten, numbers, strict=False)
             if k in theirs and between.get(k, (0.0, 1.0))[0] > theirs[k]]  # fmt: skip
    if high < (1 - LEAK / 100) * theirs["privleak_auc"]:
        known.append(numbers[-1])
    if known:
        return judged("not forgotten", *known)
    if missing := [MEASURES[k].label for k in forgotten if k not in theirs]:
        advice = f"the logs of --retrained have no {' and no '.join(missing)}: evaluate it again"
        return Verdict("undecided", (", ".join(numbers),), advice)
    if low > (1 + LEAK / 100) * theirs["privleak_auc"]:
        return judged("over-forgotten", numbers[-1])
    return judged("forgotten", ", ".join([*filter(None, (*numbers, kept))]))
