"""``npo-fast synthetic``: the NPO paper's synthetic experiment and its theorem."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npo_fast import tables
from npo_fast.cli.console import Output
from npo_fast.errors import UserError
from npo_fast.validation import check_output

if TYPE_CHECKING:
    from npo_fast.experiments.synthetic.experiment import Experiment

RESULT, CURVES, CLAIMS = "result.json", "curves.json", "claims.md"
THEOREM_STEPS, QUICK_THEOREM_STEPS = 4000, 400
LARGEST_SEED = 2**63 - 1
_CURVE = ("steps", "mean", "std")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """Options of npo-fast synthetic."""

    output: Path = Path("npo-fast-synthetic")
    """Folder for the claims, figures, curves and the result."""
    overwrite: bool = False
    """Replace the experiment that is in the output folder."""
    seeds: str = "0,1,2,3,4"
    """Seeds, separated by commas. Figures show their mean and standard deviation."""
    quick: bool = False
    """Take a tenth of the steps, to see that it runs. The claims need not hold then."""


def run(command: Command) -> Output:
    """Runs the synthetic experiment; returns its claims."""
    seeds, folder = _seeds(command.seeds), command.output
    check_output(folder, CURVES, "an experiment", command.overwrite, alone=True)
    started = time.perf_counter()
    import torch

    from npo_fast.bench.provenance import provenance
    from npo_fast.experiments.synthetic import claims, experiment, figures, theory
    from npo_fast.runs.threads import fit_threads

    fit_threads(0, torch.device("cpu"))  # of linear models
    origin = provenance()

    steps = experiment.QUICK if command.quick else experiment.Steps()
    outcome = experiment.run(seeds, steps, logger.info)
    laws = theory.run(seeds, QUICK_THEOREM_STEPS if command.quick else THEOREM_STEPS, logger.info)
    checked = claims.check(outcome, laws)
    result = {
        "seeds": seeds,
        "quick": command.quick,
        "time_s": time.perf_counter() - started,
        "provenance": origin,
        "steps": asdict(steps),
        "claims": [asdict(claim) for claim in checked],
        "theorem": [{k: v for k, v in asdict(x).items() if k not in _CURVE} for x in laws.laws],
        "exponents": [asdict(law) for law in laws.exponents],
        "limit": [asdict(law) for law in laws.limits],
        "limit_order": laws.limit_order,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = claims.markdown(checked)
    (folder / CURVES).write_text(f"{json.dumps(_curves(outcome))}\n", encoding="utf-8")
    (folder / CLAIMS).write_text(text, encoding="utf-8")
    figures.draw(outcome, laws, folder)
    (folder / RESULT).write_text(f"{json.dumps(result, indent=1)}\n", encoding="utf-8")
    return Output(result, _text(result, text, folder))


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds takes integers separated by commas, got {text!r}") from None
    if any(not 0 <= seed <= LARGEST_SEED for seed in seeds):
        raise UserError(f"--seeds: a seed is from 0 to {LARGEST_SEED}, got {text!r}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: a seed counts once, got {text!r}")
    return seeds


def _curves(outcome: "Experiment") -> dict[str, Any]:
    """Distances as [method][distance][seed][step], to five digits."""
    content = {}
    for name, curves in vars(outcome).items():
        methods = {}
        for method in curves.methods:
            forget, retain = (_rounded(x.T.tolist()) for x in curves.of(method.name))
            methods[method.name] = {"lr": method.lr, "forget": forget, "retain": retain}
        content[name] = {"alpha": curves.alpha, "steps": curves.steps, "methods": methods}
    return content


def _rounded(rows: list[list[float]]) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in row] for row in rows]


def _text(result: Mapping[str, Any], claims: str, folder: Path) -> str:
    limit = tables.plain(
        ([f"{x['beta']:g}", f"{x['loss_difference']:.2e}", f"{x['gradient_difference']:.2e}"]
         for x in result["limit"]),
        ("beta", "NPO - GA, constants apart", "of the gradients, relative"),
    )  # fmt: skip
    laws = tables.plain(
        ([x["loss"], str(x["samples"]), f"{x['eta']:g}", f"{x['scale']:.4g}",
          "" if x["c"] is None else f"{x['c']:.3g}", f"{x['r2']:.5f}"] for x in result["theorem"]),
        ("loss", "n_f", "eta", "coefficient", "C", "R^2"),
    )  # fmt: skip
    holding = sum(claim["holds"] for claim in result["claims"])
    return "\n".join([
        claims, laws, "", limit, "",
        f"{holding} of {len(result['claims'])} claims hold; {result['time_s']:.0f} s; figures, "
        f"curves and claims are in {folder}",
    ])  # fmt: skip
