"""How well a model knows an answer by heart, and whether it shows that it was trained on it.

The first four take what the model says of the tokens of one answer (teacher forced): the log-prob
``l_t`` of each token, and whether it is the *greedy* one, the argmax of the distribution. The last
two compare whole sets of answers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

LOWEST_SHARE = 0.2  # the k of min-k %: the share of tokens that its paper settles on
SMALLEST_STD = 1e-3  # of a distribution that is all on one token; below it fp32 has only noise
ATTACKS = ("loss", "zlib", "min-k", "min-k++")


def exact_memorization(greedy: ArrayLike) -> float:
    """``mean_t [argmax p_t = y_t]``: the share of answer tokens that greedy decoding gets right.

    1 where it recites the answer. Source: arXiv 2205.10770, section 3.
    """
    return float(np.asarray(greedy, dtype=bool).mean())


def extraction_strength(greedy: ArrayLike) -> float:
    """``1 - k / T``, k the shortest prefix after which greedy decoding gives the whole rest.

    1 where the question alone brings out the answer, 0 where even its last token does not follow.
    Exact from teacher-forced tokens: decoding stays on the answer as long as each one is greedy.
    Source: arXiv 2012.07805 (how much context a string needs), as a share in arXiv 2406.09179.
    """
    greedy = np.asarray(greedy, dtype=bool)
    wrong = np.flatnonzero(~greedy)
    prefix = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - prefix / len(greedy)


def min_k(log_probs: ArrayLike, share: float = LOWEST_SHARE) -> float:
    """Mean log-prob of the ``share`` of tokens with the lowest. Source: arXiv 2310.16789, eq. 1."""
    return _mean_of_lowest(np.asarray(log_probs, dtype=np.float64), share)


def min_k_plus_plus(
    log_probs: ArrayLike,  # (T,)
    mean: ArrayLike,  # (T,) of log p(v) over the vocabulary, v ~ p
    std: ArrayLike,  # (T,)
    share: float = LOWEST_SHARE,
) -> float:
    """Min-k % of ``(l_t - mean_t) / std_t``, each token against what else could have stood there.

    Source: arXiv 2404.02936, eq. 3 and 4.
    """
    log_probs, mean, std = (np.asarray(x, dtype=np.float64) for x in (log_probs, mean, std))
    return _mean_of_lowest((log_probs - mean) / np.maximum(std, SMALLEST_STD), share)


def roc_auc(members: ArrayLike, others: ArrayLike) -> float:
    """``P(score of a member > score of another)``, ties counting half: the rank statistic.

    0.5 where the score cannot tell the two apart.
    """
    members, others = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    above = ranks.sum() - len(members) * (len(members) + 1) / 2
    return float(above / (len(members) * len(others)))


def membership_scores(
    losses: ArrayLike,  # (S,) mean negative log-prob a token
    zlib_bytes: ArrayLike,  # (S,) length of the compressed answer
    min_k: ArrayLike,  # (S,)
    min_k_plus_plus: ArrayLike,  # (S,)
) -> Mapping[str, NDArray[np.float64]]:
    """Higher: more like a text that was trained on.

    The negative loss (arXiv 1709.01604), the negative loss over the bytes that zlib needs
    (arXiv 2012.07805), min-k % and min-k++ %.
    """
    columns: list[Any] = [losses, zlib_bytes, min_k, min_k_plus_plus]
    loss, size, lowest, normalised = (np.asarray(x, dtype=np.float64) for x in columns)
    return dict(zip(ATTACKS, (-loss, -loss / size, lowest, normalised), strict=True))


def _mean_of_lowest(scores: NDArray[np.float64], share: float) -> float:
    count = max(1, int(share * len(scores)))
    return float(np.sort(scores)[:count].mean())
