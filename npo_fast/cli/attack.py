"""``npo-fast attack``: what comes back when an unlearned model is relearned or rounded."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npo_fast.attacks.options import AttackOptions
from npo_fast.cli.console import follow, number, progress, say, show, table
from npo_fast.cli.settings import Common
from npo_fast.cli.training import ModelOptions
from npo_fast.data import check_vocabulary
from npo_fast.errors import UserError
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import TokenizedSuite, check_forget_quality, tofu_suite
from npo_fast.metrics import FORGET, Result, retrained_log, save_result, summary
from npo_fast.trainer.settings import TrainSettings

if TYPE_CHECKING:
    from npo_fast.model.causal_lm import CausalLM

SUMMARY = "attack.json"


@dataclass(frozen=True)
class DataOptions:
    """What was forgotten, and what was kept."""

    forget: str = ""
    """A file, or a split of --data; <name>_perturbed is taken where it lies beside it."""
    retain: str | None = None
    """Measured too, where it is given."""
    data: str | None = None
    """Hub dataset (locuslab/TOFU) or folder."""
    retrained: Path | None = None
    """Log of the model trained without the forget set, on all its items: for forget quality."""
    output: Path = Path("runs/attack")
    """Folder for a folder of logs an attack, and attack.json."""
    overwrite: bool = False
    """Replace the attack that is in the output folder."""


@dataclass(frozen=True)
class Command:
    model: ModelOptions
    data: DataOptions = field(default_factory=DataOptions)
    attack: AttackOptions = field(default_factory=AttackOptions)
    training: TrainSettings = field(default_factory=lambda: TrainSettings(epochs=5, batch_size=8))
    common: Common = field(default_factory=Common)


def run(command: Command) -> None:
    data = command.data
    if not data.forget:
        raise UserError("say what was forgotten with --forget (a file, or a split of --data)")
    if (data.output / SUMMARY).exists() and not data.overwrite:
        raise UserError(f"{data.output} holds an attack; name another --output or add --overwrite")
    suite = tofu_suite(data.data, data.forget, data.retain, utility=False)
    from npo_fast.attacks.attack import Split, attack

    share = command.attack.relearn_share if "relearn" in command.attack.names else 0.0
    split = Split.of(len(suite[FORGET]), share, command.training.seed)
    retrained = None
    if data.retrained is not None:
        check_forget_quality(suite)
        retrained = retrained_log(data.retrained, len(suite[FORGET]), split.rest)
    template = command.model.load_template()
    lm = command.model.load_model()
    check_vocabulary({"forget": template.encode_all(suite[FORGET])[0]}, lm.vocabulary)
    say(f"{len(split.seen)} forget records to relearn from, {len(split.rest)} to measure")

    settings = EvaluationSettings(
        command.training.micro_batch_tokens, max_new_tokens=command.attack.max_new_tokens
    )

    def measure(model: "CausalLM", records: TokenizedSuite, name: str) -> Result:
        from npo_fast.evaluation.evaluate import evaluate

        with progress(name) as update:
            result = evaluate(model, template, records, settings, update)
        save_result(result, data.output / name)
        return result

    results = attack(
        lm, template, suite, split, command.attack, command.training, measure, follow, say
    )
    numbers = {name: summary(result, retrained) for name, result in results.items()}
    facts: dict[str, Any] = {
        "measures": numbers,
        "relearned_records": split.seen,
        "measured_records": split.rest,
        "settings": asdict(command),
    }
    (data.output / SUMMARY).write_text(json.dumps(facts, indent=1, default=str), encoding="utf-8")
    say(f"logs saved in {data.output}")
    rows = (
        [measure_, *(number(numbers[name][measure_]) for name in numbers)]
        for measure_ in numbers["before"]
    )
    show(facts, table(rows, ("measure", *numbers)), command.common.json)
