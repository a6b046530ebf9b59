"""What a run is told, in frozen dataclasses: keywords of the front door, and the command line."""

from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from npo_fast.data import LossOn, Rendering
from npo_fast.data.rendering import as_pairs, parse_template_kwargs, read_template
from npo_fast.distributed import launch, restarts
from npo_fast.errors import UserError, reading
from npo_fast.methods import (
    COEFFICIENTS,
    METHODS,
    Coefficient,
    Coefficients,
    Preset,
    preset_help,
)
from npo_fast.metrics.measures import Condition, find_measure
from npo_fast.metrics.memorization import Memorization
from npo_fast.trainer.settings import TrainSettings
from npo_fast.validation import Checked, NonNegativeFloat, NonNegativeInt, PositiveInt

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
TemplateKwargs = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE ...",
        instance_from_str=parse_template_kwargs,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=as_pairs,
    ),
]
AUTO = "auto"  # of beta: from what there is to forget
FINETUNING = TrainSettings(epochs=5)
RELEARNING = TrainSettings(epochs=5, batch_size=8)
AnswersWithLoss = Annotated[
    LossOn,
    tyro.conf.arg(
        help="Of a conversation the last answer carries the loss; or all, a record each."
    ),
]


@dataclass(frozen=True)
class ModelOptions(Checked):
    """Which model, where, and how text becomes tokens."""

    model: str = ""
    """Hub name, folder (of a LoRA adapter too), run folder of npo-fast, or .gguf file."""
    template: str = "auto"
    """"chat", "plain" (Question: …/Answer: …), or a .jinja file in the place of the tokenizer's
    chat template; "auto" is as the run had it, else the chat template where there is one."""
    system_prompt: str | None = None
    """First message of every record without a system message; else that of the run."""
    template_kwargs: TemplateKwargs = field(default_factory=dict)
    """Variables of the chat template, such as date_string="10 Apr 2025" enable_thinking=false; else
    those of the run."""
    max_length: int = 512
    """Tokens of prompt and answer; longer answers are cut, counted and reported."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the weights; "auto" is bf16 on a GPU, fp32 on a CPU, and saves the dtype they came in."""
    device: str = "auto"
    attention: str = "auto"
    """A transformers attention implementation; "auto" is FlashAttention where it can run: a package
    of it, or npo_fast_varlen, PyTorch's own. Else npo_fast_packed, a sequence at a time."""
    quantize: Literal["none", "4bit"] = "none"
    """"4bit" loads the weights as NF4 (bitsandbytes), to train with --lora-rank: QLoRA."""
    lora_rank: int = 0
    """Train an adapter of this rank on every linear layer but the LM head; 0 trains all weights."""
    lora_alpha: int | None = None
    """The adapter's scale times its rank; else twice the rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rendering()

    def rendering(self) -> Rendering:
        """What the options say of how text is rendered."""
        name, source = read_template(self.template)
        return Rendering(name, source, self.system_prompt, self.template_kwargs)

    def check_training(self) -> None:
        """Raises ``UserError`` for settings that cannot train."""
        from npo_fast.model.adapters import check_libraries

        check_libraries(self.quantize, self.lora_rank)
        if self.quantize == "4bit" and not self.lora_rank:
            raise UserError("4-bit weights stay as they are: train beside them with --lora-rank 16")
        if self.lora_alpha is not None and not self.lora_rank:
            raise UserError("--lora-alpha scales an adapter: add --lora-rank 16")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise UserError(f"lora_alpha must be at least 1, got {self.lora_alpha}: 0 trains none")


@dataclass(frozen=True)
class _Method(Checked):
    method: str = "NPO+RT"
    preset: Preset | None = None
    kl_positions: Literal["answer", "all"] = "answer"
    """Tokens that the KL, or RMU's distance, is averaged over; "all" has the prompts too, as the
    papers' code; that also counts padding, which packs do not have."""
    reference_cache: Path | None = None
    """Folder that keeps what methods compare with from run to run: the reference's log-probs, and
    for KL, UNDIAL and RMU its hidden states."""
    reference: str | None = None
    """What methods compare with: "first" is the model before the first of several requests, else
    the name of a model; without it the --model as it is."""

    @classmethod
    def of(cls, method: str, coefficients: Coefficients) -> "MethodOptions":
        """A method with these coefficients."""
        given = {COEFFICIENTS[name].flag: value for name, value in coefficients.given().items()}
        return cls(method, **given)  # type: ignore[arg-type]

    @property
    def auto_beta(self) -> bool:
        """Whether beta is to be found from what there is to forget."""
        return getattr(self, "beta", None) == AUTO

    def coefficients(self) -> Coefficients:
        """Those that are set, as ``build_method`` takes them."""
        values = {name: getattr(self, c.flag) for name, c in COEFFICIENTS.items()}
        return Coefficients(**{name: None if v == AUTO else v for name, v in values.items()})


def _kinds_of(coefficient: Coefficient) -> Any:
    kind = coefficient.kind | None
    return kind | Literal[AUTO] if coefficient.name == "beta" else kind  # type: ignore[valid-type]


_PRESET_HELP = (
    "Defaults of another code base, for coefficients that are not given: "
    f"{preset_help('open-unlearning')} (TNPO's are those of its authors' code)."
)
if TYPE_CHECKING:
    MethodOptions = _Method
else:
    MethodOptions = make_dataclass(
        "MethodOptions",
        [
            ("method", Annotated[str, tyro.conf.arg(help=f"{', '.join(METHODS)}.")], "NPO+RT"),
            ("preset", Annotated[Preset | None, tyro.conf.arg(help=_PRESET_HELP)], None),
        ]
        + [
            (each.flag, Annotated[_kinds_of(each), tyro.conf.arg(help=each.help)], None)
            for each in COEFFICIENTS.values()
        ],
        bases=(_Method,),
        frozen=True,
        namespace={"__doc__": "How to forget: a method, and its coefficients by name."},
    )


@dataclass(frozen=True)
class ReportOptions(Checked):
    """A short look at the model before and after; ``npo-fast evaluate`` measures in full."""

    no_report: bool = False
    report_records: NonNegativeInt = 20
    """Records of each set to answer before and after."""
    max_new_tokens: PositiveInt = 64


@dataclass(frozen=True)
class EvaluationOptions(Checked):
    """Evaluation while training: ``evaluations.jsonl`` in the run folder."""

    eval_every: NonNegativeInt = 0
    """Steps between evaluations, step 0 and the last step among them; 0 makes none."""
    eval_records: PositiveInt = 40
    """First records of each set to measure; fewer make forget quality a weaker test."""
    retrained: Path | None = None
    """Log of a model trained without the forget set, on all its items: for forget quality."""
    keep_best: str | None = None
    """Measure by which the best evaluated step, not the last, becomes the final model."""
    min_utility: NonNegativeFloat = 0.0
    """Share of the start's model utility that a step must keep to be the best."""
    stop_when: str | None = None
    """Condition that ends the run at an evaluation, such as 'forget_quality>0.05'."""
    memorization: Memorization = "papers"
    """Conventions of exact memorization and extraction strength, as in npo-fast evaluate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_best is not None:
            find_measure(self.keep_best)
        if self.stop_when is not None:
            Condition.parse(self.stop_when)
        for name in ("keep_best", "stop_when", "min_utility", "memorization"):
            if getattr(self, name) != getattr(type(self), name) and not self.eval_every:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} looks at evaluations: add --eval-every STEPS")
        if self.min_utility and self.keep_best is None:
            raise UserError("--min-utility limits what --keep-best may keep: add --keep-best")


@dataclass(frozen=True)
class RunOptions(Checked):
    """Where the run goes, and who hears of it."""

    output: Path = Path("runs/latest")
    """Folder for the model, the step records and run.json."""
    overwrite: bool = False
    """Replace the run that is in the output folder."""
    fallback_output: Path | None = None
    """Where the run goes on when the output folder can no longer be written (a full disk, a drive
    that is gone); best on another disk."""
    save_wait: NonNegativeFloat = 10.0
    """Minutes to wait for room where neither takes the model; then the system's temporary folder
    does, and the run ends with an error that names it."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints, from which the same command goes on after a crash; 0 makes one
    only when Ctrl-C or SIGTERM interrupts the run."""
    merge: bool = False
    """With --lora-rank: save the final model with whole weights, not as an adapter."""
    dry_run: bool = False
    """Check settings, records (all are tokenised), the device, disk space, write access, and that
    all of the model but its weights can be saved; say what would run. It loads no weights, looks
    whether their files are whole, and leaves no file."""
    track: Tracker | None = None
    """Log every step and evaluation to this tracker too (its library must be installed)."""
    push_to_hub: str | None = None
    """Upload the final model with its card to this repository, such as me/my-model."""

    def after_restart(self) -> "RunOptions":
        """Without ``overwrite`` where ``torchrun`` restarts the run that is in the folder."""
        from npo_fast.runs.output import read_metadata

        if not (self.overwrite and restarts()):
            return self
        is_own = read_metadata(self.output).get("launch") == launch()
        return replace(self, overwrite=False) if is_own else self

    def check(self, model: ModelOptions, **reads: str | Path | None) -> None:
        """Raises ``UserError`` where the model cannot train, or not into the output folder.

        Args:
            reads: what else the run reads, by option.
        """
        from huggingface_hub.utils import validate_repo_id

        from npo_fast.runs.output import (
            check_path,
            check_run_folder,
            is_of_run,
            is_vacant,
            read_metadata,
        )
        from npo_fast.runs.preflight import check_spared, check_writable

        model.check_training()
        if self.merge and (not model.lora_rank or model.quantize != "none"):
            raise UserError(
                "--merge puts a LoRA adapter into whole weights: it takes --lora-rank, and no "
                "--quantize"
            )
        if self.push_to_hub is not None:
            with reading(f"--push-to-hub {self.push_to_hub!r}", "name it as me/my-model"):
                validate_repo_id(self.push_to_hub)
        check_path(self.output, "--output")
        check_path(Path(model.model), "--model")
        named = {name.replace("_", "-"): str(value or "") for name, value in reads.items()}
        check_spared(self.output, self.overwrite, {"model": model.model, **named})
        check_run_folder(self.output, self.overwrite)
        check_writable(self.output, "--output")
        if self.fallback_output is not None:
            check_path(self.fallback_output, "--fallback-output")
            check_writable(self.fallback_output, "--fallback-output")
            there, run = self.fallback_output, read_metadata(self.output).get("id")
            goes_on_there = there.resolve() == self.output.resolve() and run is not None
            if not (goes_on_there or is_vacant(there) or is_of_run(there, run)):
                raise UserError(
                    f"--fallback-output {self.fallback_output} is not empty; name a new folder (a "
                    "run that went on there goes on with that --output)"
                )


@dataclass(frozen=True)
class UnlearnData(Checked):
    """What to forget and what to keep."""

    forget: str = ""
    """A file or folder, or a split of --data; any may end in a slice such as [-40:]."""
    retain: str | None = None
    """The same for what to keep; methods with +RT need it. "auto": the model's own answers to
    neutral prompts, kept in the run folder."""
    data: str | None = None
    """Hub dataset (locuslab/TOFU) or folder that --forget and --retain are splits of."""
    idk: Path | None = None
    """Refusals, one a line, for IDK, DPO and KTO; else idontknow.jsonl of --data, or our own."""
    alternate: str | None = None
    """AltPO's answers: a file or split with the forget questions; else their "alternate" field."""
    holdout: str | None = None
    """For --beta auto and the verdict, where there is no --retrained log: records like --forget
    that the model never saw, a file or split. They tell how likely unknown answers are to it."""
    base_model: str | None = None
    """The same, where there is no --holdout: the model before it was taught."""
    unknown_log_prob: float | None = None
    """The same, where there is neither: the median log-prob in nats of a whole forget answer under
    a model that never knew it, such as -11.5."""
    loss_on: AnswersWithLoss = "last"


@dataclass(frozen=True)
class FinetuneData(Checked):
    """What to teach."""

    train: str = ""
    """A file or folder, or a split of --data; any may end in a slice such as [:160]."""
    data: str | None = None
    """Hub dataset, folder, or file that --train is a split of."""
    loss_on: AnswersWithLoss = "last"


@dataclass(frozen=True)
class AttackData(Checked):
    """What was forgotten, and what was kept."""

    forget: str = ""
    """A file, folder or split of --data; <name>_perturbed is taken where it lies beside it."""
    retain: str | None = None
    """Measured too, where it is given."""
    data: str | None = None
    """Hub dataset (locuslab/TOFU) or folder."""
    loss_on: AnswersWithLoss = "last"
    retrained: Path | None = None
    """Log of the model trained without the forget set, on all its items: for forget quality."""
    output: Path = Path("runs/attack")
    """Folder for a folder of logs an attack, and attack.json."""
    overwrite: bool = False
    """Replace the attack that is in the output folder."""
