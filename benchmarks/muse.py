"""MUSE's scalability and sustainability: a method on growing forget sets, and one after the other.

    python benchmarks/muse.py --make news --runs runs/muse
    python benchmarks/muse.py --data news --model runs/muse/target --runs runs/muse \
        --retrained runs/muse/retrained/eval

``--make`` writes a made-up newspaper in MUSE's layout (``npo_fast.experiments.muse``), teaches a
small model all of it (``target``), another one the retain sets alone (``retrained``), and measures
both. Any other model and data set of the layout serve as well (``--data muse-bench/MUSE-News``).

Scalability unlearns ``scal/forget_1`` to ``forget_4``, each from ``--model``. Sustainability
unlearns ``sust/forget_1`` to ``forget_4``, each from the run before. Both keep ``--retain``.
After each the whole suite is measured: ``scal_sust.json`` and a figure of its curves, in
``--runs``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import npo_fast
from npo_fast import (
    MethodOptions,
    ModelOptions,
    ReportOptions,
    RunOptions,
    Scores,
    TrainSettings,
    tables,
)
from npo_fast.bench.provenance import provenance
from npo_fast.data import load_records
from npo_fast.experiments.muse import FOLDS, make_corpus, new_student
from npo_fast.metrics import load_result, muse

OVERWRITE = RunOptions(overwrite=True)
TEACHING = TrainSettings(epochs=20, lr=3e-3, batch_size=4, warmup_steps=20)


def make(data: Path, runs: Path, seed: int) -> None:
    """The corpus, and the models with and without its forget sets."""
    make_corpus(data, seed)
    kept = [
        record
        for name in ("retain1", "retain2")
        for record in load_records(f"train/{name}", str(data))
    ]
    known = {"retrained": kept, "target": kept + load_records("train/forget", str(data))}
    for name, records in known.items():
        lm, tokenizer = new_student(data, seed)
        npo_fast.finetune(
            lm, train=records, output=runs / name, tokenizer=tokenizer, run=OVERWRITE,
            loading=ModelOptions(template="plain"), training=TEACHING,
        )  # fmt: skip
        measured(runs / name, str(data), None)


def measured(run: Path, data: str, retrained: Path | None) -> dict[str, float]:
    """Measures by key; the logs go into the run's ``eval``."""
    scores = npo_fast.evaluate(
        run, suite="muse", data=data, retrained=retrained, output=run / "eval", overwrite=True
    )
    return by_key(scores, retrained)


def by_key(scores: Scores, retrained: Path | None) -> dict[str, float]:
    """The measures by key."""
    return muse.measures(scores.logs, None if retrained is None else load_result(retrained))


def folds(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measures after each fold, by criterion; fold 0 is the model itself."""
    training = TrainSettings(epochs=options.epochs, lr=options.lr, batch_size=options.batch_size)
    start = npo_fast.evaluate(
        options.model, suite="muse", data=options.data, retrained=options.retrained
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    for criterion in ("scal", "sust"):
        rows[criterion] = [{"fold": 0} | by_key(start, options.retrained)]
        model = options.model
        for fold in range(1, FOLDS + 1):
            output = options.runs / criterion / options.method / str(fold)
            npo_fast.unlearn(
                model, data=options.data, forget=f"{criterion}/forget_{fold}",
                retain=options.retain, output=output,
                method=MethodOptions(
                    options.method, beta=options.beta, retain_coefficient=options.retain_coefficient
                ),
                training=training, report=ReportOptions(no_report=True), run=OVERWRITE,
            )  # fmt: skip
            rows[criterion].append(
                {"fold": fold} | measured(output, options.data, options.retrained)
            )
            if criterion == "sust":
                model = output
    return rows


def plot(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A curve a measure, over the folds."""
    from matplotlib.figure import Figure

    keys = [key for key in muse.MEASURES if key in rows["scal"][0] and key != "privleak_auc"]
    figure = Figure((3 * len(keys), 3), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys)), keys, strict=True):
        for criterion, each in rows.items():
            axes.plot(
                [row["fold"] for row in each], [row[key] for row in each], "o-", label=criterion
            )
        axes.set(title=muse.MEASURES[key].label, xlabel="fold", xticks=range(FOLDS + 1))
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", type=Path, help="folder for a new corpus")
    parser.add_argument("--data", default="muse-bench/MUSE-News")
    parser.add_argument("--model", default="muse-bench/MUSE-News_target")
    parser.add_argument("--retrained", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/muse"))
    parser.add_argument("--method", default="NPO+RT")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--beta", type=float, help="of NPO; else its default")
    parser.add_argument("--retain-coefficient", type=float, help="of the method; else its default")
    parser.add_argument("--retain", default="raw/retain1", help="what each run keeps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.make is not None:
        make(options.make, options.runs, options.seed)
        return
    rows = folds(options)
    for criterion, each in rows.items():
        print(f"\n{criterion}\n{tables.plain((row.values() for row in each), each[0])}")
    settings = {name: str(value) for name, value in vars(options).items()}
    result = {"settings": settings, "provenance": provenance(), "folds": rows}
    (options.runs / "scal_sust.json").write_text(json.dumps(result, indent=1))
    plot(rows, options.runs / "scal_sust.svg")


if __name__ == "__main__":
    main()
