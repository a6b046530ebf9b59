"""Scores of evaluation logs: python examples/score_logs.py LOGS RETRAINED [ORIGINAL]

Each is a file or folder of logs: TOFU's (eval_log_aggregated.json, or eval_log_forget.json and its
siblings) or open-unlearning's (TOFU_EVAL.json). LOGS are those of the unlearned model, RETRAINED of
one trained without the forget set, ORIGINAL of the model before unlearning. No model is loaded.
"""

import sys

import npo_fast
from npo_fast.metrics import (
    FORGET,
    forget_quality,
    load_result,
    model_utility,
    truth_ratio,
    utility_terms,
)


def main(logs, retrained, original=None):
    result, compared = load_result(logs), load_result(retrained)
    print(f"forget quality: {forget_quality(result, compared):.4g}")
    for name, logs_of in (("unlearned", result), ("retrained", compared)):
        ratios = truth_ratio(logs_of[FORGET])  # one a record; the test compares the two sets
        print(f"truth ratio, {name}: mean {ratios.mean():.4f} of {len(ratios)} records")
    print(f"model utility: {model_utility(result):.4f}, the harmonic mean of")
    for name, value in utility_terms(result).items():
        print(f"  {name}: {value:.4f}")

    # every measure that the logs allow, with intervals, and what came out in one line
    scores = npo_fast.evaluate(log=result, retrained=compared, original=original)
    for name, (low, high) in scores.intervals.items():
        print(f"{name}: {scores[name]:.4f} [{low:.4f}, {high:.4f}]")
    print(f"verdict: {scores.verdict}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__.partition("\n")[0])
    try:
        main(*sys.argv[1:])
    except npo_fast.UserError as error:  # its message names the file and the cure
        sys.exit(f"error: {error}")
