"""Memorization of an answer, and membership inference: was a model trained on a text?

The formulas over one answer take teacher-forced tokens: the log-prob ``l_t`` of each token, and
whether it is *greedy*, the argmax of the model's distribution. The other formulas compare sets of
answers.

Two conventions are around (``Conventions``), and their numbers cannot be compared: logs say which
one they follow, and labels of measures say where it is not the usual one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import mannwhitneyu

from npo_fast.errors import UserError
from npo_fast.metrics.logs import CONVENTIONS, FORGET, HOLDOUT, Array, Log, Result, column, log_of
from npo_fast.validation import Bound, Checked

LOWEST_SHARE = {"papers": 0.2, "open-unlearning": 0.4}  # k of min-k %, where none is named
SMALLEST_STD = 1e-3  # lower bound; a smaller std, of a one-token distribution, is fp32 noise
Memorization = Literal["papers", "open-unlearning"]
Share = Annotated[float | None, Bound("above 0 and at most 1", lambda share: 0 < share <= 1)]
_Score = Callable[..., Array]


@dataclass(frozen=True, kw_only=True)
class Conventions(Checked):
    """How exact memorization, extraction strength, min-k and gradient norms are counted."""

    memorization: Memorization = "papers"
    """How memorization is counted. "open-unlearning" counts as that code does: without the closing
    end-of-sequence token, an extraction strength of at least 1 / tokens, a min-k share of 0.4, a
    gradient's norm as the mean of its tensors' norms."""
    min_k_share: Share = None
    """Share of an answer's tokens, the least likely ones, in min-k and min-k++. Without it: 0.2, as
    in the papers."""

    @property
    def share(self) -> float:
        """The share of min-k, whether it was named or not."""
        return self.min_k_share or LOWEST_SHARE[self.memorization]

    def counted(self, tokens: int, closed: bool) -> int:
        """How many of an answer's tokens count; ``closed``: the last one ends the answer."""
        return tokens - (self.memorization == "open-unlearning" and closed and tokens > 1)

    def gradient_norm(self, norms: ArrayLike) -> float:
        """The norm of a gradient from the norms of its tensors: ``sqrt(sum of squares)``.

        "open-unlearning" takes their mean. Source: GradNorm of arXiv 2402.17012, with p = 2.
        """
        norms = np.asarray(norms, dtype=np.float64)
        theirs = self.memorization == "open-unlearning"
        return float(norms.mean() if theirs else np.sqrt(np.square(norms).sum()))

    def columns(
        self,
        greedy: ArrayLike,  # (T,) bool
        log_probs: ArrayLike,  # (T,)
        mean: ArrayLike,  # (T,) of log p(v) over the vocabulary, v ~ p
        std: ArrayLike,  # (T,) of the same
        closed: bool,
    ) -> dict[str, float]:
        """Returns the values of one answer by column.

        Args:
            closed: whether the last token is the one that ends the answer.
        """
        arrays = [np.asarray(values) for values in (greedy, log_probs, mean, std)]
        counted = self.counted(len(arrays[0]), closed)
        greedy, log_probs, mean, std = (values[:counted] for values in arrays)
        strength = extraction_strength(greedy)
        if self.memorization == "open-unlearning":
            strength = max(strength, 1 / len(greedy))
        return {
            "exact_memorization": exact_memorization(greedy),
            "extraction_strength": strength,
            "min_k": min_k(log_probs, self.share),
            "min_k_plus_plus": min_k_plus_plus(log_probs, mean, std, self.share),
        }

    def entry(self) -> dict[str, Any]:
        """What a log says of its conventions, under the key ``CONVENTIONS``."""
        return {"memorization": self.memorization, "min_k_share": self.share}


def conventions_of(log: Log, min_k: bool) -> str:
    """Returns the conventions of a log in words, empty for the usual ones.

    A log without the entry ``CONVENTIONS`` follows the usual ones; a ``min_k_share`` of None is one
    that the log's source does not tell.

    Args:
        min_k: whether the share of min-k matters.
    """
    entry = log.get(CONVENTIONS, Conventions().entry())
    try:
        given = Conventions(**entry)
    except (TypeError, UserError) as error:
        raise UserError(f"the log's {CONVENTIONS!r} are damaged: {error}") from error
    name, share = given.memorization, given.min_k_share
    words: list[str] = [name] * (name != "papers")
    if min_k and share != LOWEST_SHARE.get(name):
        words.append("k not recorded" if share is None else f"k = {share:g}")
    return ", ".join(words)


def exact_memorization(greedy: ArrayLike) -> float:  # (T,) bool
    """Returns ``mean_t [argmax p_t = y_t]``, the share of tokens that greedy decoding gets right.

    1 where the model recites the answer. Source: arXiv 2205.10770, section 3.
    """
    return float(np.asarray(greedy, dtype=bool).mean())


def extraction_strength(greedy: ArrayLike) -> float:  # (T,) bool
    """Returns ``1 - k / T``, k the shortest prefix after which greedy decoding gives the rest.

    1 where the question alone brings out the answer, 0 where even the last token does not follow.
    Exact from teacher-forced tokens: decoding stays on the answer as long as each one is greedy.
    Source: arXiv 2012.07805 (how much context a string needs), as a share in arXiv 2406.09179.
    """
    greedy = np.asarray(greedy, dtype=bool)
    wrong = np.flatnonzero(~greedy)
    prefix = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - prefix / len(greedy)


def min_k(log_probs: ArrayLike, share: float = LOWEST_SHARE["papers"]) -> float:  # (T,)
    """Returns the mean of the lowest ``share`` of log-probs. Source: arXiv 2310.16789, eq. 1."""
    log_probs = np.asarray(log_probs, dtype=np.float64)
    count = max(1, int(share * len(log_probs)))
    return float(np.sort(log_probs)[:count].mean())


def min_k_plus_plus(
    log_probs: ArrayLike,  # (T,)
    mean: ArrayLike,  # (T,) of log p(v) over the vocabulary, v ~ p
    std: ArrayLike,  # (T,) of the same
    share: float = LOWEST_SHARE["papers"],
) -> float:
    """Returns the mean of the lowest ``share`` of ``(l_t - mean_t) / std_t``.

    Each token is measured against the other tokens that could have stood in its place.
    Source: arXiv 2404.02936, eq. 3 and 4.
    """
    log_probs, mean, std = (np.asarray(x, dtype=np.float64) for x in (log_probs, mean, std))
    return min_k((log_probs - mean) / np.maximum(std, SMALLEST_STD), share)


def repetition(tokens: Sequence[int], length: int = 4) -> float:
    """Returns ``1 - distinct / all`` of the runs of ``length`` tokens in a generated answer.

    0 where no run comes twice, near 1 where the model says the same again and again. Source:
    seq-rep-n of arXiv 1908.04319, section 4.
    """
    runs = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def roc_auc(members: ArrayLike, others: ArrayLike) -> float:  # (M,), (N,)
    """Returns ``P(score of a member > score of another)``; a tie counts half.

    0.5 where the score cannot tell the two sets apart.
    """
    members, others = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    above = mannwhitneyu(members, others, method="asymptotic").statistic  # pairs in order
    return float(above / (len(members) * len(others)))


ATTACKS: dict[str, tuple[tuple[str, ...], _Score]] = {  # columns, and the score from them
    "loss": (("avg_gt_loss",), np.negative),  # arXiv 1709.01604
    "zlib": (("avg_gt_loss", "zlib_bytes"), lambda loss, size: -loss / size),  # arXiv 2012.07805
    "min-k": (("min_k",), np.asarray),
    "min-k++": (("min_k_plus_plus",), np.asarray),
    "reference": (("avg_gt_loss", "avg_reference_loss"), lambda loss, known: known - loss),
    "gradnorm": (("gradient_norm",), np.negative),
}
_BY_CONVENTION = ("min-k", "min-k++", "gradnorm")


def membership_scores(log: Log, attack: str) -> Array:  # (S,)
    """Returns the score of each answer, higher for a text that looks trained on.

    "loss" is the negative mean loss a token, "zlib" that over the bytes that zlib needs for the
    answer, "min-k" and "min-k++" are those of ``min_k`` and ``min_k_plus_plus``. "reference" is how
    much smaller the mean loss is than that of the reference, "gradnorm" the negative norm of the
    mean loss's gradient in the weights.
    """
    columns, score = ATTACKS[attack]
    return score(*(column(log, name) for name in columns))


def attack_auc(result: Result, attack: str) -> float:
    """Returns the AUC of an attack that tells the forget set (members) from the holdout set.

    1 where the model gives away what it was trained on, 0.5 where it does not, and below 0.5 where
    it was unlearned past that: the forget set then stands out again.

    Raises:
        UserError: the logs lack what the attack needs, or follow different conventions.
    """
    logs = [log_of(result, file) for file in (FORGET, HOLDOUT)]
    min_k = attack.startswith("min-k")
    ours, others = (conventions_of(log, min_k) or "papers" for log in logs)
    if attack in _BY_CONVENTION and ours != others:
        raise UserError(
            f"{attack} of the forget log follows the conventions {ours!r}, that of the holdout "
            f"log {others!r}: evaluate both in one call"
        )
    members, strangers = (membership_scores(log, attack) for log in logs)
    return roc_auc(members, strangers)


def membership_auc(result: Result) -> dict[str, float]:
    """Returns ``attack_auc`` by attack, of the ``ATTACKS`` whose columns the logs have."""
    logs = [log_of(result, file) for file in (FORGET, HOLDOUT)]
    return {
        attack: attack_auc(result, attack)
        for attack, (columns, _) in ATTACKS.items()
        if all(name in log for name in columns for log in logs)
    }


def privleak(auc: float, retrained: float) -> float:
    """Returns ``100 (A - A_retrained) / A_retrained`` with ``A = 1 - AUC``, in %.

    0 where the model gives away as much as the retrained one, -100 where all of it, and above 0
    where it was unlearned too far. MUSE's AUC counts the holdout set as the members, hence
    ``1 - AUC``; 1e-10 in the denominator is open-unlearning's. Source: arXiv 2407.06460.
    """
    return rel_diff(1 - auc, 1 - retrained)


def rel_diff(value: float, retrained: float) -> float:
    """Returns ``100 (value - retrained) / retrained``, in %; 1e-10 is added to the denominator."""
    return 100 * (value - retrained) / (retrained + 1e-10)


def counted_alike(result: Result, retrained: Result) -> bool:
    """Whether min-k follows the same conventions in the forget and holdout logs of both models.

    A share that a log's source does not tell is taken to be the same.
    """
    logs = [logs[file] for logs in (result, retrained) for file in (FORGET, HOLDOUT)]
    words = {conventions_of(log, min_k=True) for log in logs}
    return len({each.replace(", k not recorded", "") for each in words}) == 1
