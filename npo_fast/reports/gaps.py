"""What a report lacks, and the commands that add it."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from npo_fast.metrics import FORGET, Result, has_truth_ratio, muse
from npo_fast.reports.measured import some_names
from npo_fast.reports.runs import RunRecord

ENDED_EARLY = ("running", "interrupted", "stopped", "moved")  # states without a final model
_WRONG_ANSWERS = "`paraphrased_answer` and `perturbed_answer`"


@dataclass(frozen=True)
class Gap:
    """One thing that a report lacks."""

    what: str
    how: str  # to add it; code between backticks
    commands: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([f"{self.what}: {self.how}", *(f"`{each}`" for each in self.commands)])


def find_gaps(runs: Sequence[RunRecord], original: Result, retrained: Result) -> Iterator[Gap]:
    """What would make the page say more, the simplest first; runs share an entry."""
    finished = [run for run in runs if run.metadata.get("status") not in ENDED_EARLY]
    if unmeasured := [run for run in finished if not run.result]:
        yield Gap(
            f"Measures on all records, of {_names(unmeasured)}",
            _each("evaluate", unmeasured),
            (unmeasured[0].evaluate_command(),),
        )
    logged = [run for run in runs if run.result]
    if unrecorded := [run for run in runs if not run.steps]:
        yield Gap(f"Training curves, of {_names(unrecorded)}", "no step was recorded")
    if not finished and not logged:
        return
    if not original and (logged or not any(run.metadata.get("before") for run in runs)):
        model = str(runs[0].setting("model", "model") or "ORIGINAL")
        name = "ORIGINAL" if model.endswith("(in memory)") else model
        yield Gap(
            "The model before unlearning, on all records",
            "evaluate it, and add `--original logs/original` to the report:",
            ((logged or runs)[0].evaluate_command(model=name, output="logs/original"),),
        )
    unlearned = [run for run in finished if run.metadata.get("command") == "unlearn"]
    if unwatched := [run for run in unlearned if not run.evaluations]:
        again = unwatched[0].command("--eval-every", "10")
        yield Gap(
            f"Measures during training, of {_names(unwatched)}",
            _each("train", unwatched, "again with evaluations")
            if again else "train again with `eval_every`",
            (again,) if again else (),
        )  # fmt: skip
    yield from _of_retrained(runs, logged, retrained)


def _of_retrained(
    runs: Sequence[RunRecord], logged: Sequence[RunRecord], retrained: Result
) -> Iterator[Gap]:
    tofu = [run for run in logged if not muse.is_muse(run.result)]
    if not retrained:
        adds = "PrivLeak" if logged and not tofu else "Forget quality"
        yield Gap(
            f"{adds}, a comparison with a model that never saw the forget set",
            "train one, evaluate it on the same records, and add `--retrained runs/retrained` to "
            "the report:",
            tuple(_retrain((logged or runs)[0])),
        )
    elif not muse.is_muse(retrained) and not has_truth_ratio(retrained.get(FORGET, {})):
        yield Gap(
            "Forget quality",
            "the retrained model's forget log has no truth ratios; evaluate it on forget records "
            f"with {_WRONG_ANSWERS}",
        )
    if plain := [run for run in tofu if not has_truth_ratio(run.result.get(FORGET, {}))]:
        yield Gap(
            f"Truth ratios and forget quality, of {_names(plain)}",
            f"the forget records have no wrong answers; give them {_WRONG_ANSWERS}, and "
            f"{_each('evaluate', plain, 'again')}",
            (plain[0].evaluate_command(overwrite=True),),
        )


def _retrain(run: RunRecord) -> Iterator[str]:
    """The commands that train a model on what is kept, and evaluate it."""
    if run.from_rows:
        yield "npo_fast.finetune(BASE, train=ROWS, output='runs/retrained')"
    else:
        retain, data = (run.setting("data", name) for name in ("retain", "data"))
        words = ["--train", "RETAIN" if retain in (None, "auto") else str(retain)]
        words += ["--data", str(data)] if data else []
        start = ["npo-fast", "finetune", "--model", "BASE"]
        yield shlex.join([*start, *words, "--output", "runs/retrained"])
    yield run.evaluate_command(model="runs/retrained")


def _each(verb: str, runs: Sequence[RunRecord], more: str = "") -> str:
    """What to do with a run, or with each of several."""
    which = "it" if len(runs) == 1 else "each of them"
    example = "" if len(runs) == 1 else ", such as the first one"
    return f"{' '.join(filter(None, (verb, which, more)))}{example}:"


def _names(runs: Iterable[RunRecord]) -> str:
    return some_names([run.name for run in runs])
