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
        help="Answers of a conversation that count: the last one, or all (a record each)."
    ),
]


@dataclass(frozen=True)
class ModelOptions(Checked):
    """The model, the device it runs on, and how text becomes tokens."""

    model: str = ""
    """Hub name, model folder (also a LoRA adapter's), run folder of npo-fast, or .gguf file."""
    template: str = "auto"
    """How a record becomes text: "chat" (the tokenizer's chat template), "plain" (Question: …
    Answer: …), or your own .jinja file. "auto" takes the template that the model was trained with
    by npo-fast, else the chat template if there is one, else plain."""
    system_prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """System message of every record that has none. Without it: that of the run which made the
    model."""
    template_kwargs: TemplateKwargs = field(default_factory=dict)
    """Variables of the chat template, such as date_string="10 Apr 2025" enable_thinking=false.
    Without it: those of the run which made the model."""
    max_length: int = 512
    """Longest prompt and answer together, in tokens. Longer answers are cut, and counted."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the weights. "auto" computes in bf16 on a GPU and fp32 on a CPU, and saves
    the format that the model came in."""
    device: str = "auto"
    """Where the model runs: cpu, cuda, or cuda:1. "auto" is the GPU if there is one."""
    attention: str = "auto"
    """Attention implementation of transformers. "auto" is FlashAttention where it can run (an
    installed package, or npo_fast_varlen, PyTorch's own), else npo_fast_packed, which takes one
    sequence at a time."""
    quantize: Literal["none", "4bit"] = "none"
    """"4bit" loads the weights as NF4 (bitsandbytes); train on top with --lora-rank (QLoRA)."""
    lora_rank: int = 0
    """Train a LoRA adapter of this rank on every linear layer but the LM head; 0 trains all
    weights."""
    lora_alpha: int | None = None
    """Scale of the adapter times its rank. Without it: twice the rank."""

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
    """Tokens that a KL, or RMU's distance, is averaged over: the answers, or all, prompts included,
    as in the papers' code (which also counts padding; here there is none)."""
    reference_cache: Path | None = None
    """Folder that keeps the reference model's outputs, so that the next run need not compute them:
    log-probs, and for KL, UNDIAL and RMU hidden states."""
    reference: str | None = None
    """Model that the method compares with: a name or folder, or "first" for the model before the
    first of several requests. Without it: --model before training."""

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
    "Defaults of another code base for coefficients that you do not give: "
    f"{preset_help('open-unlearning')} (TNPO's are those of its authors' code)."
)
if TYPE_CHECKING:
    MethodOptions = _Method
else:
    MethodOptions = make_dataclass(
        "MethodOptions",
        [
            (
                "method",
                Annotated[str, tyro.conf.arg(help=f"One of {', '.join(METHODS)}.")],
                "NPO+RT",
            ),
            ("preset", Annotated[Preset | None, tyro.conf.arg(help=_PRESET_HELP)], None),
        ]
        + [
            (each.flag, Annotated[_kinds_of(each), tyro.conf.arg(help=each.help)], None)
            for each in COEFFICIENTS.values()
        ],
        bases=(_Method,),
        frozen=True,
        namespace={"__doc__": "The method, and its coefficients."},
    )


@dataclass(frozen=True)
class ReportOptions(Checked):
    """A short comparison before and after; npo-fast evaluate measures in full."""

    no_report: bool = False
    """Skip the comparison: no answers, no measures before and after training."""
    report_records: NonNegativeInt = 20
    """Records of each set to compare."""
    max_new_tokens: PositiveInt = 64
    """Longest answer of the comparison, in tokens."""


@dataclass(frozen=True)
class EvaluationOptions(Checked):
    """Evaluation while training, kept in evaluations.jsonl of the run folder."""

    eval_every: NonNegativeInt = 0
    """Evaluate every so many steps, and at step 0 and the last; 0 never evaluates."""
    eval_records: PositiveInt = 40
    """Records of each set to measure, the first ones. Few records make a weak test of forget
    quality."""
    retrained: Path | None = None
    """Evaluation log of a model trained without the forget set, on all its items: for forget
    quality, --beta auto and the verdict."""
    keep_best: Annotated[str | None, tyro.conf.arg(metavar="MEASURE")] = None
    """Make the evaluated step that is best by this measure the final model, not the last step."""
    min_utility: NonNegativeFloat = 0.0
    """With --keep-best: share of the first evaluation's model utility that a step must keep."""
    stop_when: Annotated[str | None, tyro.conf.arg(metavar="CONDITION")] = None
    """End the run at the first evaluation where this holds, such as 'forget_quality>0.05'."""
    memorization: Memorization = "papers"
    """How exact memorization and extraction strength are counted, as in npo-fast evaluate."""

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
    """Where the run is saved."""

    output: Path = Path("runs/latest")
    """Folder for the model, the step records and run.json."""
    overwrite: bool = False
    """Delete the run that is in the output folder, and start a new one."""
    fallback_output: Path | None = None
    """Folder that the run moves to when the output folder cannot be written any more (a full disk,
    a lost drive). Best on another disk."""
    save_wait: Annotated[NonNegativeFloat, tyro.conf.arg(metavar="MINUTES")] = 10.0
    """How long to wait for room when no folder can take the model. After that it goes to the
    system's temporary folder, and the run ends with an error that names it."""
    save_every: NonNegativeInt = 0
    """Save a checkpoint every so many steps. After a crash the same command goes on from the last
    one. 0 saves one only when Ctrl-C or SIGTERM interrupts the run."""
    merge: bool = False
    """With --lora-rank: save whole weights, not an adapter."""
    dry_run: bool = False
    """Check everything, train nothing: settings, all records, the device, disk space, the model's
    files. Loads no weights, and leaves no file."""
    track: Tracker | None = None
    """Also log every step and evaluation to this tracker (its library must be installed)."""
    push_to_hub: Annotated[str | None, tyro.conf.arg(metavar="REPOSITORY")] = None
    """Upload the final model and its card to this hub repository, such as me/my-model."""

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
    """What to forget: a file, a folder, or a split of --data. A slice such as [-40:] may follow."""
    retain: str | None = None
    """What to keep, named in the same way. Methods with +RT or +KL need it. "auto": the model's
    own answers to neutral prompts."""
    data: str | None = None
    """Hub dataset (locuslab/TOFU) or folder that --forget and --retain are splits of."""
    idk: Path | None = None
    """File with refusals, one a line, for IDK, DPO and KTO. Without it: idontknow.jsonl of --data,
    else built-in ones."""
    alternate: str | None = None
    """Other answers to the forget questions, for AltPO: a file or split. Without it: the field
    "alternate" of the forget records."""
    holdout: str | None = None
    """Records like --forget that the model never saw (a file or split). They show how likely
    unknown answers are, for --beta auto and the verdict."""
    base_model: str | None = None
    """The model before it was taught: for the same purpose, without --holdout."""
    unknown_log_prob: float | None = None
    """For the same purpose, without both: the median log-prob (nats) of a whole forget answer under
    a model that never knew it, such as -11.5."""
    loss_on: AnswersWithLoss = "last"


@dataclass(frozen=True)
class FinetuneData(Checked):
    """What to teach."""

    train: str = ""
    """What to teach: a file, a folder, or a split of --data. A slice such as [:160] may follow."""
    data: str | None = None
    """Hub dataset, folder, or file that --train is a split of."""
    loss_on: AnswersWithLoss = "last"


@dataclass(frozen=True)
class AttackData(Checked):
    """What was forgotten, and what was kept."""

    forget: str = ""
    """What was forgotten: a file, a folder, or a split of --data. If there is a <name>_perturbed
    beside it, its wrong answers are used too."""
    retain: str | None = None
    """What was kept: measured too."""
    data: str | None = None
    """Hub dataset (locuslab/TOFU) or folder that --forget and --retain are splits of."""
    loss_on: AnswersWithLoss = "last"
    retrained: Path | None = None
    """Evaluation log of a model trained without the forget set, on all its items: for forget
    quality."""
    output: Path = Path("runs/attack")
    """Folder for attack.json, and for the evaluation logs of each attack."""
    overwrite: bool = False
    """Replace the attack that is in the output folder."""
