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
    original = models["original"]["last"]["model_utility"]
    ga, npo = models["GA"]["last"], models["NPO+RT"]["peak"]
    wrong = []
    if models["original"]["last"]["forget_quality"] > 1e-6:
        wrong.append("the original model does not know what is to be forgotten")
    if ga["model_utility"] > COLLAPSED * original:
        wrong.append(f"GA keeps {ga['model_utility'] / original:.0%} of the utility")
    if npo["forget_quality"] <= FORGOTTEN:
        wrong.append(f"NPO+RT forgets only to p = {npo['forget_quality']:.3g}")
    if npo["model_utility"] < KEPT * original:
        wrong.append(f"NPO+RT keeps {npo['model_utility'] / original:.0%} of the utility")
    for name, expected in (("GA", "collapsed"), ("NPO+RT", "forgotten")):
        if (outcome := models[name]["verdict"]["outcome"]) != expected:
            wrong.append(f"the verdict on {name} is {outcome!r}, not {expected!r}")
    return wrong


if __name__ == "__main__":
    failed = False
    for name in sys.argv[1:]:
        wrong = check(json.loads(Path(name).read_text()))
        print(f"{name}: {'; '.join(wrong) or 'GA collapses, NPO+RT forgets and keeps'}")
        failed |= bool(wrong)
    sys.exit(failed)
