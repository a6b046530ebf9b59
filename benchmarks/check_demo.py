"""The paper's effect in results of ``npo-fast demo --json``: exits with 1 where it is absent.

python benchmarks/check_demo.py RESULT.json [RESULT.json ...]
"""

import json
import sys
from pathlib import Path

FORGOTTEN = 0.05  # forget quality above it: not told apart from the retrained model
KEPT = 0.85  # share of the original's utility (the paper: 0.55 of 0.62)
COLLAPSED = 0.2


def check(result: dict) -> list[str]:
    """What is missing from the effect."""
    models = result["models"]
    original = models["original"]["model_utility"]

    def share(name: str) -> float:
        return models[name]["model_utility"] / original

    def quality(name: str) -> list[float]:
        return [point["forget_quality"] for point in models[name]["path"]]

    wrong = []
    if quality("original")[-1] > 1e-6:
        wrong.append("the original model does not know what is to be forgotten")
    if share("GA") > COLLAPSED:
        wrong.append(f"GA keeps {share('GA'):.0%} of the utility")
    if quality("GA+RT")[-1] > FORGOTTEN and share("GA+RT") > KEPT:
        wrong.append(f"GA+RT stays: p = {quality('GA+RT')[-1]:.3g} at {share('GA+RT'):.0%}")
    if quality("NPO+RT")[-1] <= FORGOTTEN:
        wrong.append(f"NPO+RT ends at p = {quality('NPO+RT')[-1]:.3g}")
    if share("NPO+RT") < KEPT:
        wrong.append(f"NPO+RT keeps {share('NPO+RT'):.0%} of the utility")
    for name, expected in (("GA", "collapsed"), ("NPO+RT", "forgotten")):
        if (outcome := models[name]["verdict"]["outcome"]) != expected:
            wrong.append(f"the verdict on {name} is {outcome!r}, not {expected!r}")
    return wrong


if __name__ == "__main__":
    failed = False
    for name in sys.argv[1:]:
        wrong = check(json.loads(Path(name).read_text()))
        right = "NPO+RT forgets and stays, GA and GA+RT do not"
        print(f"{name}: {'; '.join(wrong) or right}")
        failed |= bool(wrong)
    sys.exit(failed)
