"""TOFU's measures, as formulas over logs. Source: arXiv 2401.06121, section 2.2."""

import math

import numpy as np
from scipy.stats import hmean, ks_2samp

from npo_fast.errors import UserError
from npo_fast.metrics.logs import FORGET, RETAIN, UTILITY_SETS, Array, Log, Result, column, log_of


def wrong_losses(log: Log) -> Array:  # (S, W)
    """Returns the mean loss a token of each wrong answer; one alone may be a number in the log.

    Raises:
        UserError: as ``column``.
    """
    losses = column(log, "average_perturb_loss")
    return losses.reshape(len(losses), -1)


def probability(log: Log, options: bool = False) -> Array:  # (S,)
    """Returns ``P(answer | question)^(1 / tokens)`` of each example.

    With ``options`` it is divided by its sum over the right and the wrong answers.
    """
    right = np.exp(-column(log, "avg_gt_loss"))
    if not options:
        return right
    wrong = np.exp(-wrong_losses(log))
    total = right + wrong.sum(axis=-1)
    return np.divide(right, total, out=np.zeros_like(right), where=total > 0)


def truth_ratio(log: Log, arithmetic: bool = False) -> Array:  # (S,)
    """Returns ``P(wrong) / P(paraphrased answer)`` of each example, each to the power 1 / tokens.

    Near 0 where the model knows the answer, around 1 where it cannot tell. The mean over wrong
    answers is the geometric one, exp of the mean loss, as in ``aggregate_eval_stat.py`` of
    locuslab/tofu, in the NPO paper's code and in open-unlearning.

    Args:
        arithmetic: take the mean of the probabilities, which is never smaller, as ``utils.py`` of
            locuslab/tofu does for model utility (its forget quality has geometric means too).
    """
    paraphrased = column(log, "avg_paraphrased_loss")
    wrong = wrong_losses(log)
    with np.errstate(over="ignore"):
        if arithmetic:
            return np.exp(paraphrased[:, np.newaxis] - wrong).mean(axis=-1)
        return np.exp(paraphrased - wrong.mean(axis=-1))


def right_share(log: Log) -> Array:  # (S,)
    """Returns ``P(paraphrased) / (P(paraphrased) + P(wrong))`` of each example: 1 is known.

    Equal to ``1 / (1 + truth_ratio)``, with the same geometric mean over wrong answers. 0.5 where
    the model cannot tell them apart. Source: the extent of knowledge of arXiv 2506.12618, the
    aggregator ``prob_mean`` of open-unlearning.
    """
    return 1 / (1 + truth_ratio(log))


def rouge_l_recall(log: Log) -> Array:  # (S,)
    """Returns the ROUGE-L recall of each greedy answer against the right one."""
    return column(log, "rougeL_recall")


def knowledge_ratio(log: Log, arithmetic: bool = False) -> float:
    """Returns the mean of ``max(0, 1 - truth ratio)``, as in model utility: 1 is full knowledge."""
    return float(np.maximum(0, 1 - truth_ratio(log, arithmetic)).mean())


def utility_terms(result: Result, arithmetic: bool = False) -> dict[str, float]:
    """Returns the nine means whose harmonic mean is the model utility, by "<set> <measure>"."""
    terms = {}
    for name, file in UTILITY_SETS.items():
        log = log_of(result, file)
        terms[f"{name} probability"] = probability(log, options=file != RETAIN).mean()
        terms[f"{name} ROUGE-L"] = rouge_l_recall(log).mean()
        terms[f"{name} truth ratio"] = knowledge_ratio(log, arithmetic)
    return {name: float(value) for name, value in terms.items()}


def model_utility(result: Result, arithmetic: bool = False) -> float:
    """Returns the harmonic mean of ``utility_terms``; 0 when any of the nine is 0.

    The nine are probability, ROUGE-L and ``max(0, 1 - truth ratio)`` on retain set, real authors
    and world facts. ``arithmetic`` is that of ``truth_ratio``, and published numbers have both: of
    the published logs of TOFU's llama2-7b, trained on all with weight decay 0.01, the utility is
    0.6227, or 0.5859 with arithmetic means. Compare only numbers of one kind.
    """
    terms = list(utility_terms(result, arithmetic).values())
    return float(hmean(terms)) if min(terms) > 0 else 0.0


def forget_quality(unlearned: Result, retrained: Result) -> float:
    """Returns the p-value of a two-sample Kolmogorov-Smirnov test between forget truth ratios.

    The ratios are those of the unlearned model and of one retrained without the forget set; above
    0.05 the two models cannot be told apart.

    Raises:
        UserError: the two logs have different numbers of examples.
    """
    ours, theirs = (truth_ratio(log_of(result, FORGET)) for result in (unlearned, retrained))
    if len(ours) != len(theirs):
        raise UserError(
            f"the unlearned log has {len(ours)} forget items and the retrained log {len(theirs)}: "
            "evaluate both on the same items, for example --forget 'forget10[:300]'"
        )
    return float(ks_2samp(ours, theirs).pvalue)


def smallest_forget_quality(records: int) -> float:
    """Returns the smallest ``forget_quality`` that as many records can have.

    Every ratio of one model is then above those of the other. ``2 / binomial(2 n, n)`` for n
    records: 3 cannot fall below 0.1, whatever the models do.
    """
    return float(min(1.0, 2 / math.comb(2 * records, records)))


def forget_truth_ratio(result: Result) -> float:
    """Returns the mean of ``min(ratio, 1 / ratio)`` on the forget set: 1 where nothing is known."""
    ratio = truth_ratio(log_of(result, FORGET))
    with np.errstate(divide="ignore"):
        return float(np.minimum(ratio, 1 / ratio).mean())
