"""What ``finetune`` and ``unlearn`` share: from options to a run folder with a trained model."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from npo_fast.cli.console import follow, say
from npo_fast.cli.settings import Common, Toggle
from npo_fast.data import Record, Sequence, Template
from npo_fast.errors import NonFiniteError, TornStepError, UserError
from npo_fast.methods import Term, turns
from npo_fast.trainer.optimizers import check_optimizer
from npo_fast.trainer.order import check_step_in_backward, driving_sources, steps_per_epoch
from npo_fast.trainer.settings import TrainSettings

if TYPE_CHECKING:  # transformers takes seconds to import, and --help needs none of it
    from npo_fast.evaluation.course import Course
    from npo_fast.model.causal_lm import CausalLM
    from npo_fast.trainer.loop import References
    from npo_fast.trainer.reference_cache import ReferenceCache


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where, and how text becomes tokens."""

    model: str
    """Hub name, folder (of a LoRA adapter too), run folder of npo-fast, or .gguf file."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """"plain" is Question: …/Answer: …; "auto" the chat template where there is one."""
    max_length: int = 512
    """Tokens of prompt and answer; longer answers are cut, counted and reported."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the weights; "auto" is bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    attention: str = "auto"
    """A transformers attention implementation; "auto" is FlashAttention where it can run."""
    quantize: Literal["none", "4bit"] = "none"
    """"4bit" loads the weights as NF4 (bitsandbytes), to train with --lora-rank: QLoRA."""
    lora_rank: int = 0
    """Train an adapter of this rank on every linear layer but the LM head; 0 trains all weights."""
    lora_alpha: int | None = None
    """The adapter's scale times its rank; else twice the rank."""

    def check_training(self) -> None:
        from npo_fast.model.adapters import check_libraries

        check_libraries(self.quantize, self.lora_rank)
        if self.quantize == "4bit" and not self.lora_rank:
            raise UserError("4-bit weights stay as they are: train beside them with --lora-rank 16")
        if self.lora_alpha is not None and not self.lora_rank:
            raise UserError("--lora-alpha scales an adapter: add --lora-rank 16")

    def load_template(self) -> Template:
        from npo_fast.model.load import load_tokenizer

        return Template(load_tokenizer(self.model), self.template, self.max_length)

    def load_model(self) -> "CausalLM":
        from npo_fast.model.load import load_model

        say(f"loading {self.model}")
        lm = load_model(
            self.model,
            dtype=self.dtype,
            device=self.device,
            attention=self.attention,
            quantize=self.quantize,
            lora_rank=self.lora_rank,
            lora_alpha=self.lora_alpha,
        )
        parameters = lm.model.num_parameters()
        trained = ""
        if self.lora_rank:
            own = sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
            trained = f" ({own / 1e6:.2f}M of them to train)"
        dtype = "4 bit" if lm.quantized else str(lm.dtype).removeprefix("torch.")
        say(
            f"{lm.name}, {parameters / 1e6:.1f}M parameters{trained}, {dtype} on "
            f"{lm.device}, attention {lm.attention}"
        )
        return lm


@dataclass(frozen=True)
class RunOptions(Common):
    """Where the run goes."""

    output: Path = Path("runs/latest")
    """Folder for the model, the step records and run.json."""
    overwrite: Annotated[bool, Toggle] = False
    """Replace the run that is in the output folder."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves the final model alone."""
    merge: bool = False
    """With --lora-rank: save the final model with whole weights, not as an adapter."""
    dry_run: Annotated[bool, Toggle] = False
    """Check everything that can be checked without loading the model, and say what would run."""

    def check(self, model: ModelOptions) -> None:
        from npo_fast.trainer.run import check_output

        if self.merge and (not model.lora_rank or model.quantize != "none"):
            raise UserError(
                "--merge puts a LoRA adapter into whole weights: it takes --lora-rank, and no "
                "--quantize"
            )
        check_output(self.output, self.overwrite)


@dataclass(frozen=True)
class Prepared:
    """Tokenised data and the steps it makes, before any weight is loaded."""

    template: Template
    sources: dict[str, list[Sequence]]
    truncated: dict[str, int]
    steps: int

    def facts(self) -> dict[str, Any]:
        from npo_fast.trainer.run import data_fingerprint

        data = {
            name: {
                "examples": len(sequences),
                "tokens": sum(len(s.input_ids) for s in sequences),
                "answer_tokens": sum(s.answer_length for s in sequences),
                "truncated": self.truncated[name],
                "sha256": data_fingerprint(sequences),
            }
            for name, sequences in self.sources.items()
        }
        return {"template": self.template.name, "data": data, "steps": self.steps}


def prepare(
    options: ModelOptions,
    training: TrainSettings,
    records: Mapping[str, list[Record]],  # source -> its records
    named: Mapping[str, str],  # source -> what the user knows it as
    terms: tuple[Term, ...],
) -> Prepared:
    """Everything that can fail on the user's side, first."""
    options.check_training()
    check_optimizer(training.optimizer)
    each_batch = turns(terms, training.schedule)
    template = options.load_template()
    sources, truncated = {}, {}
    for source in records:
        name = named[source]
        try:
            sources[source], truncated[source] = template.encode_all(records[source])
        except UserError as error:
            raise UserError(f"{source} ({name}): {error}") from error
        cut = f", {truncated[source]} cut to {template.max_length}" if truncated[source] else ""
        tokens = sum(len(s.input_ids) for s in sources[source])
        say(f"{source}: {len(sources[source])} records, {tokens} tokens{cut} ({name})")
    if training.step_in_backward:
        check_step_in_backward(sources, terms, training)
    (driving, *_) = driving_sources({s: sources[s] for term in terms for s in term.reads})
    per_epoch = steps_per_epoch(len(sources[driving]), training.batch_size)
    steps = training.epochs * per_epoch * len(each_batch)
    say(f"{training.epochs} epochs of {training.batch_size} a step: {steps} steps")
    return Prepared(template, sources, truncated, steps)


def check_vocabulary(lm: "CausalLM", sources: Mapping[str, list[Sequence]]) -> None:
    """A tokenizer of another model makes token ids that this one has no row for."""
    rows = lm.vocabulary
    for source, sequences in sources.items():
        for sequence in sequences:
            if (largest := max(sequence.input_ids)) >= rows:
                raise UserError(
                    f"{source} record {sequence.index + 1} has the token id {largest}, outside the "
                    f"model's vocabulary of {rows}: model and tokenizer do not belong together"
                )


def check_fit(
    lm: "CausalLM", prepared: Prepared, terms: tuple[Term, ...], training: TrainSettings
) -> None:
    """What only the loaded model can tell, before hours are spent."""
    from npo_fast.trainer.loop import check_settings

    check_vocabulary(lm, prepared.sources)
    check_settings(lm, prepared.sources, terms, training)


def run_training(
    command: Any,
    verb: str,
    run_options: RunOptions,
    prepared: Prepared,
    lm: "CausalLM",
    terms: tuple[Term, ...],
    training: TrainSettings,
    references: "References | None" = None,
    report: Callable[[], Mapping[str, Any]] = dict,
    reference_cache: "ReferenceCache | None" = None,
    course: "Course | None" = None,
) -> dict[str, Any]:
    """Trains, saves and returns what ``run.json`` says in the end."""
    from npo_fast.model.adapters import merge_adapter
    from npo_fast.trainer.loop import train
    from npo_fast.trainer.run import Run

    check_fit(lm, prepared, terms, training)
    if course is not None:  # first: it may refuse, and the folder may hold an earlier run
        course.begin()
    facts = {"command": verb, "settings": dataclasses.asdict(command), **prepared.facts()}
    run = Run(run_options.output, run_options.overwrite, {**facts, "attention": lm.attention})
    tokenizer = prepared.template.tokenizer
    last = None
    steps = train(lm, prepared.sources, terms, training, references, reference_cache)
    if course is not None:
        run.log_evaluation(course.start)
    try:
        for record in follow(steps, verb):
            run.log(record)
            last = record
            every = run_options.save_every
            if every and record.step % every == 0 and record.step < record.steps:
                run.checkpoint(lm, tokenizer, record.step)
            if course is not None and course.due(record.step, record.steps):
                better = course.look(record.step, record.epoch)
                run.log_evaluation(course.last)
                if better:
                    run.keep_best(lm, tokenizer)
                if course.over():
                    say(f"{course.options.stop_when} at step {record.step}: stopped")
                    break
    except NonFiniteError as error:
        kept = "no step was taken, so there is nothing to keep"
        if isinstance(error, TornStepError):
            kept = "nothing was saved of them; earlier checkpoints stay where they are"
        elif last is not None:
            folder = run.checkpoint(lm, tokenizer, last.step, keep_older=True)
            kept = f"that model is in {folder}, earlier checkpoints beside it"
        run.finish("stopped", error=str(error))
        raise type(error)(f"{error}. {kept[0].upper()}{kept[1:]}") from error
    except BaseException as error:
        run.finish("stopped", error=f"{type(error).__name__}: {error}")
        raise
    chosen = {}
    if course is not None and course.best:
        chosen["best"] = {"measure": course.options.keep_best, **course.best}
        run.restore_best(lm)
    if run_options.merge:
        merge_adapter(lm)
    folder = run.save_model(lm, tokenizer)
    say(f"model saved in {folder}")
    run.finish("finished", final=dataclasses.asdict(last) if last else {}, **chosen, **report())
    return run.facts
