"""Memorization of an answer, and membership inference: was a model trained on a text?

The formulas over one answer take teacher-forced tokens: the log-prob ``l_t`` of each token, and
whether it is *greedy*, the argmax of the model's distribution. The other formulas compare sets of
answers.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import mannwhitneyu

from npo_fast.metrics.logs import FORGET, HOLDOUT, Array, Result, column, log_of

LOWEST_SHARE = 0.2  # the k of min-k %: the share of tokens that its paper settles on
SMALLEST_STD = 1e-3  # lower bound; a smaller std, of a one-token distribution, is fp32 noise
ATTACKS = ("loss", "zlib", "min-k", "min-k++")
MEMBERSHIP = ("avg_gt_loss", "zlib_bytes", "min_k", "min_k_plus_plus")  # columns, one an attack


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


def min_k(log_probs: ArrayLike, share: float = LOWEST_SHARE) -> float:  # (T,)
    """Returns the mean of the lowest ``share`` of log-probs. Source: arXiv 2310.16789, eq. 1."""
    log_probs = np.asarray(log_probs, dtype=np.float64)
    count = max(1, int(share * len(log_probs)))
    return float(np.sort(log_probs)[:count].mean())


def min_k_plus_plus(
    log_probs: ArrayLike,  # (T,)
    mean: ArrayLike,  # (T,) of log p(v) over the vocabulary, v ~ p
    std: ArrayLike,  # (T,) of the same
    share: float = LOWEST_SHARE,
) -> float:
    """Returns the mean of the lowest ``share`` of ``(l_t - mean_t) / std_t``.

    Each token is measured against the other tokens that could have stood in its place.
    Source: arXiv 2404.02936, eq. 3 and 4.
    """
    log_probs, mean, std = (np.asarray(x, dtype=np.float64) for x in (log_probs, mean, std))
    return min_k((log_probs - mean) / np.maximum(std, SMALLEST_STD), share)


def roc_auc(members: ArrayLike, others: ArrayLike) -> float:  # (M,), (N,)
    """Returns ``P(score of a member > score of another)``; a tie counts half.

    0.5 where the score cannot tell the two sets apart.
    """
    members, others = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    above = mannwhitneyu(members, others, method="asymptotic").statistic  # pairs in order
    return float(above / (len(members) * len(others)))


def membership_scores(
    losses: ArrayLike,  # (S,) mean negative log-prob a token
    zlib_bytes: ArrayLike,  # (S,) length of the compressed answer
    min_k: ArrayLike,  # (S,)
    min_k_plus_plus: ArrayLike,  # (S,)
) -> dict[str, Array]:  # (S,) by attack
    """Returns the score of each attack, higher for a text that looks trained on.

    The negative loss (arXiv 1709.01604), the negative loss over the bytes that zlib needs
    (arXiv 2012.07805), min-k % and min-k++ %.
    """
    columns = (losses, zlib_bytes, min_k, min_k_plus_plus)
    loss, size, lowest, normalised = np.asarray(columns, dtype=np.float64)
    return dict(zip(ATTACKS, (-loss, -loss / size, lowest, normalised), strict=True))


def membership_auc(result: Result) -> dict[str, float]:
    """Returns the AUC of each attack that tells the forget set (members) from the holdout set.

    1 where the model gives away what it was trained on, 0.5 where it does not, and below 0.5 where
    it was unlearned past that: the forget set then stands out again.
    """
    members, others = (
        membership_scores(*(column(log_of(result, file), name) for name in MEMBERSHIP))
        for file in (FORGET, HOLDOUT)
    )
    return {attack: roc_auc(members[attack], others[attack]) for attack in ATTACKS}
