"""What ``finetune`` and ``unlearn`` share: from options to a run folder with a trained model."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from npo_fast.cli.console import follow, say
from npo_fast.cli.prepare import Prepared, run_facts
from npo_fast.cli.settings import Common
from npo_fast.data import Template, check_vocabulary
from npo_fast.distributed import (
    all_reduce_max,
    init_process_group,
    is_main_process,
    local_device,
    rank,
    world_size,
)
from npo_fast.errors import (
    Interrupted,
    NonFiniteError,
    OutOfMemory,
    PartialUpdateError,
    PartialUpdateOutOfMemory,
    UserError,
)
from npo_fast.methods import Term
from npo_fast.trainer.settings import StepRecord, TrainSettings

if TYPE_CHECKING:  # transformers takes seconds to import, and --help needs none of it
    from npo_fast.evaluation.course import Course
    from npo_fast.model.causal_lm import CausalLM
    from npo_fast.trainer.reference_cache import ReferenceCache
    from npo_fast.trainer.resume import Unfinished
    from npo_fast.trainer.run import Run
    from npo_fast.trainer.step import References


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
    """A transformers attention implementation; "auto" is FlashAttention where it can run: a package
    of it, or npo_fast_varlen, PyTorch's own. Else npo_fast_packed, a sequence at a time."""
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
        if self.quantize == "4bit" and world_size() > 1:
            raise UserError(f"--quantize 4bit runs on one process, not on {world_size()}")
        if self.lora_alpha is not None and not self.lora_rank:
            raise UserError("--lora-alpha scales an adapter: add --lora-rank 16")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise UserError(f"lora_alpha must be at least 1, got {self.lora_alpha}: 0 trains none")

    def load_template(self) -> Template:
        from npo_fast.model.load import load_tokenizer

        return Template(load_tokenizer(self.model), self.template, self.max_length)

    def load_model(self, earlier: "Unfinished | None" = None) -> "CausalLM":
        """The model as it was; several processes divide it, with ``earlier``'s weights.

        Before a rank keeps its share it has the whole model: pages of the weight files, which the
        ranks of a machine share, where these have the run's dtype, else a converted copy.
        """
        from npo_fast.model.adapters import read_weights
        from npo_fast.model.load import default_dtype, load_model

        say(f"loading {self.model}")
        several, device, dtype = world_size() > 1, self.device, self.dtype
        if several:
            own, device = local_device(device), "cpu"
            dtype = default_dtype(own) if dtype == "auto" else dtype
        lm = load_model(
            self.model,
            dtype=dtype,
            device=device,
            attention="auto" if several else self.attention,
            quantize=self.quantize,
            lora_rank=self.lora_rank,
            lora_alpha=self.lora_alpha,
        )
        if several:
            from npo_fast.model.sharding import shard

            mesh, step = init_process_group(own), -1
            if earlier is not None and earlier.weights is not None:
                step = earlier.state.step
                read_weights(lm, earlier.weights)
            if all_reduce_max(step, own) != -all_reduce_max(-step, own):
                raise UserError(
                    f"process {rank()} would go on after step {step}, and others do not: --output "
                    "must be a folder that all of them share"
                )
            shard(lm, mesh, self.attention)
        parameters = lm.model.num_parameters()
        trained = ""
        if self.lora_rank:
            own = sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
            trained = f" ({own / 1e6:.2f}M of them to train)"
        kept = "4 bit" if lm.quantized else str(lm.dtype).removeprefix("torch.")
        say(
            f"{lm.name}, {parameters / 1e6:.1f}M parameters{trained}, {kept} on "
            f"{lm.device}{f' in {world_size()} processes' if several else ''}, "
            f"attention {lm.attention}"
        )
        return lm


@dataclass(frozen=True)
class RunOptions(Common):
    """Where the run goes."""

    output: Path = Path("runs/latest")
    """Folder for the model, the step records and run.json."""
    overwrite: bool = False
    """Replace the run that is in the output folder."""
    save_every: int = 0
    """Steps between checkpoints, from which the same command goes on after a crash; 0 makes one
    only when Ctrl-C or SIGTERM interrupts the run."""
    merge: bool = False
    """With --lora-rank: save the final model with whole weights, not as an adapter."""
    dry_run: bool = False
    """Check everything that can be checked without loading the model, and say what would run."""

    def check(self, model: ModelOptions) -> None:
        from npo_fast.trainer.run import check_output

        if self.save_every < 0:
            raise UserError(f"save_every must be 0 (off) or more, got {self.save_every}")
        if self.merge and (not model.lora_rank or model.quantize != "none"):
            raise UserError(
                "--merge puts a LoRA adapter into whole weights: it takes --lora-rank, and no "
                "--quantize"
            )
        if self.merge and world_size() > 1:
            raise UserError("--merge runs on one process: leave it out, the adapter loads anywhere")
        own, other = self.output.resolve(), Path(model.model)
        if other.exists() and own in (other.resolve(), *other.resolve().parents):
            raise UserError(f"--output {self.output} holds the --model itself: name another folder")
        check_output(self.output, self.overwrite)

    def unfinished(self, facts: Mapping[str, Any]) -> "Unfinished | None":
        """The run in the folder to go on with, if there is one.

        Raises:
            UserError: it is not the run that these facts describe.
        """
        from npo_fast.trainer.resume import unfinished_run
        from npo_fast.trainer.run import versions

        found = None if self.overwrite else unfinished_run(self.output)
        if found is None:
            return None
        found.check(facts)
        for damage in found.damaged:
            say(f"ignored, for it is damaged: {damage}")
        if found.weights is None:
            say(f"the run in {self.output} ended without a checkpoint: it starts again at step 0")
            return None
        if found.trained:
            say(f"the run in {self.output} was trained already: going on after the last step")
        else:
            say(f"going on with the run in {self.output} after step {found.state.step}")
        then, now = found.facts.get("versions", {}), versions()
        if changed := [name for name in now if then.get(name) != now[name]]:
            say(f"not the same as when it began, so digits may differ: {', '.join(changed)}")
        return found


def check_fit(
    lm: "CausalLM", prepared: Prepared, terms: tuple[Term, ...], training: TrainSettings
) -> None:
    """What only the loaded model can tell, before hours are spent."""
    from npo_fast.trainer.loop import check_settings

    check_vocabulary(prepared.sources, lm.vocabulary)
    check_settings(lm, prepared.sources, terms, training)


@dataclass(frozen=True)
class Origin:
    """What only the model as it was can tell."""

    before: Mapping[str, Any] = field(default_factory=dict)  # of the report
    references: "References | None" = None
    reference_cache: "ReferenceCache | None" = None


def run_training(
    command: Any,
    verb: str,
    prepared: Prepared,
    lm: "CausalLM",
    terms: tuple[Term, ...],
    earlier: "Unfinished | None" = None,
    origin: Origin = Origin(),
    report: Callable[[], Mapping[str, Any]] = dict,
    course: "Course | None" = None,
) -> dict[str, Any]:
    """Trains, or goes on with what ``earlier`` began; returns what ``run.json`` says in the end."""
    from npo_fast.model.adapters import merge_adapter
    from npo_fast.trainer.interrupt import StopSignal
    from npo_fast.trainer.loop import train
    from npo_fast.trainer.run import wait_for_all
    from npo_fast.trainer.state import TrainState

    check_fit(lm, prepared, terms, command.training)
    state = TrainState() if earlier is None else earlier.state
    facts = run_facts(command, verb, prepared)
    run = _open_run(command.run, facts, lm, earlier, origin, course)
    tokenizer = prepared.template.tokenizer
    again = "the same command" + (" without --overwrite" if command.run.overwrite else "")
    last = None
    try:
        with StopSignal() as stop:
            steps: Iterable[StepRecord] = ()
            if "final" not in run.facts:
                steps = train(
                    lm, prepared.sources, terms, command.training, origin.references,
                    origin.reference_cache, state,
                )  # fmt: skip
            tokens = state.micro_batch_tokens or command.training.micro_batch_tokens
            every = command.run.save_every
            for record in follow(steps, verb):
                last = record
                run.log(record)
                if record.micro_batch_tokens < tokens:
                    tokens = record.micro_batch_tokens
                    say(f"out of memory at step {record.step}: {tokens} tokens at a time from here")
                    run.note(micro_batch_tokens=tokens)
                if course is not None and course.due(record.step, record.steps):
                    better = course.look(record.step, record.epoch)
                    run.log_evaluation(course.last)
                    if better:
                        run.keep_best(lm, tokenizer, course.last)
                    if course.over():
                        say(f"{course.options.stop_when} at step {record.step}: stopped")
                        break
                stopping = all_reduce_max(stop.number or 0, lm.device)
                due = stopping or (every and record.step % every == 0)
                if due and record.step < record.steps:
                    run.checkpoint(lm, tokenizer, record.step, state)
                    if stopping:
                        raise Interrupted(
                            f"interrupted after step {record.step} of {record.steps}; {again} "
                            "goes on from there",
                            stopping,
                        )
            if last is not None:
                chosen = {}
                if course is not None and course.best:
                    chosen["best"] = {"measure": course.options.keep_best, **course.best}
                    run.restore_best(lm)
                if command.run.merge:
                    merge_adapter(lm)
                say(f"model saved in {run.save_model(lm, tokenizer)}")
                run.note(final=dataclasses.asdict(last), **chosen)
            if stop.number:
                raise Interrupted(
                    f"interrupted after the last step; {again} makes the report", stop.number
                )
        results = report()
    except NonFiniteError as error:
        kept = "no step was taken, so there is nothing to keep"
        if isinstance(error, PartialUpdateError):
            kept = "nothing was saved of them; earlier checkpoints stay where they are"
        elif state.step:
            folder = run.checkpoint(lm, tokenizer, state.step)
            kept = f"that model is in {folder}, earlier checkpoints beside it"
        run.finish("stopped", error=str(error))
        wait_for_all(lm)
        raise type(error)(f"{error}. {kept[0].upper()}{kept[1:]}") from error
    except OutOfMemory as error:
        whole = not isinstance(error, PartialUpdateOutOfMemory)
        if state.step and whole and lm.world_size == 1:  # else the others are still in the step
            run.checkpoint(lm, tokenizer, state.step, state)
        run.finish("interrupted", error=str(error))
        raise OutOfMemory(f"{error}. Where there is more memory, {again} goes on") from error
    except Interrupted as error:
        run.finish("interrupted", error=f"{type(error).__name__}: {error}")
        wait_for_all(lm)
        raise
    except BaseException as error:
        run.finish("interrupted", error=f"{type(error).__name__}: {error}")
        raise
    run.finish("finished", **results)
    return run.facts


def _open_run(
    options: RunOptions,
    facts: Mapping[str, Any],
    lm: "CausalLM",
    earlier: "Unfinished | None",
    origin: Origin,
    course: "Course | None",
) -> "Run":
    """A new run folder, or that of ``earlier`` with its weights in ``lm``."""
    from npo_fast.model.adapters import merge_adapter, read_weights
    from npo_fast.trainer.run import Bystander, Run

    facts = {**facts, "attention": lm.attention}
    if not is_main_process():
        return Bystander(options.output, facts if earlier is None else earlier.facts)
    if origin.reference_cache is not None:
        facts["reference"] = origin.reference_cache.made_from
    if earlier is None:
        if course is not None:  # first: it may refuse, and the folder may hold an earlier run
            course.begin()
        before = {"before": origin.before} if origin.before else {}
        more = {**before, "processes": world_size()}
        run = Run.begin(options.output, options.overwrite, {**facts, **more}, origin.references)
        if course is not None:
            run.log_evaluation(course.start)
        return run
    earlier.check(facts)
    assert earlier.weights is not None
    if earlier.trained and options.merge:
        merge_adapter(lm)
    if world_size() == 1:  # else they are in: a model that is divided takes none
        read_weights(lm, earlier.weights)
    run = Run.resume(earlier.folder, earlier.facts, earlier.state.step)
    if course is not None:
        course.go_on(run.evaluations(), run.best())
    return run
