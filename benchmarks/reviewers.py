"""What reviewers of the NPO paper asked for, at a size that runs in minutes on a CPU.

    python benchmarks/reviewers.py --seeds 0 1 2

Error bars over seeds, a grid of beta, the step at which utility collapses, forgotten facts
entangled with kept ones, alternating steps. Writes a file a seed to
``benchmarks/results/reviewers`` after every run, and the page ``reviewers.html`` from all that is
there. A second call goes on where the first was stopped; calls for other seeds may run beside it.
"""

import argparse
import sys
from pathlib import Path

from npo_fast.bench.provenance import provenance
from npo_fast.experiments.ablations.page import AblationPage
from npo_fast.experiments.ablations.runner import run_seed
from npo_fast.experiments.ablations.trials import EXPERIMENTS, AblationSettings, load_seeds

RESULTS = Path(__file__).parent / "results" / "reviewers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=[*EXPERIMENTS])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    trials = [trial for name in options.experiments for trial in EXPERIMENTS[name]]
    for seed in options.seeds:
        file = options.results / f"seed-{seed}.json"
        run_seed(seed, trials, AblationSettings(), file, provenance(), _tell)
    page = options.results / "reviewers.html"
    page.write_text(AblationPage(load_seeds(options.results)).html(), encoding="utf-8")
    print(page)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
