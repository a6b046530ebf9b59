"""Unlearning under ``transformers.Trainer``: its optimisers, logging, checkpoints and hub upload.

    trainer = UnlearningTrainer(model, args, UnlearningDataset(forget, retain), method="NPO+RT")
    trainer.train()

Losses, methods and packing are those of ``npo_fast.trainer``; the loop is that of ``Trainer``.
Several processes (``torchrun``, ``accelerate launch``) each take their own batches, and the loss is
that of all of them together. With DDP each process has the whole model. FSDP2 and DeepSpeed (ZeRO-1
to 3) divide it, and gather the head's weight where the loss reads it
(``npo_fast.integrations.hf_sharded``). FSDP1 and ``DataParallel`` are refused. ``torch_compile``
compiles the decoder layers.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from npo_fast.data import PackedBatch, TokenizedExample, concatenate
from npo_fast.errors import UserError
from npo_fast.integrations.hf_data import (
    UnlearningCollator,
    UnlearningDataset,
    UnlearningEvaluation,
)
from npo_fast.integrations.hf_sharded import (
    GatheredCausalLM,
    check_wrapper,
    dtype_of_deepspeed,
    gathered,
    is_divided,
)
from npo_fast.losses import LayerLoss
from npo_fast.methods import COEFFICIENTS, Coefficients, Positions, Preset, Term, build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.sharding import repeated_layers
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs
from npo_fast.trainer.step import References, count, micro_batch_loss, with_baselines

if find_spec("accelerate") is None:
    raise ImportError(
        "npo_fast.integrations.hf_trainer needs accelerate, as transformers.Trainer does: "
        "pip install 'npo-fast[hf-trainer]'"
    )

from accelerate.utils import DynamoBackend

REFERENCE_TOKENS = 2048  # of a micro-batch of the reference pass
SEQUENCES = "sequences"  # of each source in a step


class UnlearningTrainer(Trainer):
    """``transformers.Trainer`` that minimises ``sum(coefficient * term)`` of an unlearning method.

    The reference is the model as it is handed over: one log-prob a sequence is computed here, kept
    as ``references``, and no second model stays in memory. To resume, hand over the same starting
    model (or the ``references`` of the first run) and call ``train(resume_from_checkpoint=…)``.

    A device batch has ``per_device_train_batch_size`` forget sequences and as many to retain. The
    loss of a step is that of all its device batches together, over gradient accumulation and over
    processes: sums are divided by the step's number of sequences or tokens, and KTO's baseline is
    the step's. Four batches of one sequence are one batch of four.

    Logs carry each term's value and the mean log-prob of a sequence in the latest step. With an
    ``UnlearningEvaluation`` as ``eval_dataset``, ``evaluate()`` returns and logs its measures, as
    "eval_forget.probability", "eval_model_utility" and so on; ``metric_for_best_model`` takes them
    too. Each process measures by itself.

    With ``fsdp=True`` or ``deepspeed=…`` in ``args``, processes share the model once ``train`` has
    begun. Until then each has all of it on its device, which computes the reference. A KL keeps the
    reference's head on each device. Under DeepSpeed, the model takes the dtype that trains.
    Checkpoints and ``save_model`` are those of ``Trainer``: with FSDP's "SHARDED_STATE_DICT" the
    weights lie in checkpoints alone, for ``accelerate merge-weights``.

    Args:
        method, coefficients, kl_positions, preset: as in ``npo_fast.methods.build_method``.
        references: ``references`` of an earlier run on this dataset.
        reference_cache: folder that keeps what the method compares with from run to run, and to
            resume: log-probs, and the hidden states of a KL; None keeps those among the temporary
            files.
        attention: as in ``CausalLM``; outside ``train`` the model has its own.
        options: of ``transformers.Trainer``, such as ``callbacks`` and ``processing_class``.

    Raises:
        UserError: an unknown method, no retain data for a method that needs it, an evaluation set
            of another kind, a model whose head is not understood, or one that FSDP1 or
            ``DataParallel`` would wrap.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: UnlearningDataset,
        *,
        method: str = "NPO+RT",
        coefficients: Coefficients | None = None,
        kl_positions: Positions = "answer",
        preset: Preset | None = None,
        references: References | None = None,
        reference_cache: Path | None = None,
        attention: str = "auto",
        **options: Any,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise UserError(f"UnlearningTrainer takes a loaded model, got {model!r:.80}")
        if not isinstance(train_dataset, UnlearningDataset):
            raise UserError(
                "UnlearningTrainer takes an UnlearningDataset of encoded examples "
                f"(Template.encode_all), got {type(train_dataset).__name__}"
            )
        if given := [name for name in COEFFICIENTS if name in options]:
            raise UserError(
                f"UnlearningTrainer has no {given[0]}: write "
                f"coefficients=Coefficients({given[0]}=...)"
            )
        terms = build_method(method, coefficients, kl_positions, preset)
        self.terms = tuple(term.seeded(args.seed) for term in terms)
        for source in {source for term in self.terms for source in term.reads}:
            if not train_dataset.sources[source]:
                raise UserError(f"method {method} needs {source} data; the dataset has none")
        _check_evaluation(options.get("eval_dataset"))
        if args.fsdp and args.parallel_mode is not ParallelMode.DISTRIBUTED:
            raise UserError("FSDP divides a model among processes: start several (`torchrun`)")
        args = copy.copy(args)
        args.remove_unused_columns = False  # the model's forward knows neither forget nor retain
        batch_keys = ["/".join(term.batch_key) for term in self.terms]
        batch_keys += [term.baseline for term in self.terms if term.baseline]
        collator = UnlearningCollator(list(dict.fromkeys(batch_keys)))
        super().__init__(model, args, collator, train_dataset=train_dataset, **options)
        check_wrapper(self)
        self._divides = self.is_fsdp_enabled or self.is_deepspeed_enabled
        several = self._divides or self.args.world_size > 1
        if several and any(isinstance(term.loss, LayerLoss) for term in self.terms):
            raise UserError(
                f"{method} stops at a decoder layer, which wrappers of several processes do not: "
                "use one process"
            )
        self.add_callback(_RetainPartners(train_dataset))
        self.model_accepts_loss_kwargs = True  # the loss is that of the step: Trainer adds it up
        self.sources = train_dataset.sources
        self._packing = False
        with self._undivided():
            self.lm = (GatheredCausalLM if self._divides else CausalLM)(self.model, attention)
            with self._packed(), self.accelerator.autocast():
                self.references = references or reference_log_probs(
                    self.lm, self.sources, self.terms, REFERENCE_TOKENS, reference_cache
                )
                self.reference_cache = reference_cache_for(
                    self.terms, self.lm, self.sources, REFERENCE_TOKENS, reference_cache
                )
        if self.args.torch_compile:
            self._compile_layers()
        self._window: _Window | None = None  # the step that is under way
        self._latest: dict[str, Tensor] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``, with the attention for packs."""
        with self._packed():
            return super().train(*args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,  # UnlearningEvaluation
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The measures of ``eval_dataset``, by name with the prefix; they are logged too."""
        evaluation: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        _check_evaluation(evaluation)
        if evaluation is None:
            raise UserError("evaluate needs an UnlearningEvaluation: name it as eval_dataset")
        if self._divides and evaluation.settings.gradient_norms:
            raise UserError(
                "gradient norms of single answers need a model that is not divided among "
                "processes: leave gradient_norms out, or measure a saved model with "
                "`npo-fast evaluate`"
            )
        with self._packed(), self.accelerator.autocast(), self._undivided():
            found = evaluation.measure(self.lm)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The device batches of a step, and how many sequences to forget all processes have."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        self._window = self._open_window(batches)
        return batches, self._window.counts[SEQUENCES]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],  # batch key -> PackedBatch
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """What a device batch adds to the loss of its step; by itself, it is a step of its own."""
        wrapper = getattr(model, "_orig_mod", model)  # of torch.compile
        has_module = isinstance(wrapper, DistributedDataParallel) or self.is_deepspeed_enabled
        if (wrapper.module if has_module else wrapper) is not self.lm.model:
            raise UserError(
                f"UnlearningTrainer cannot train a model wrapped as {type(model).__name__}"
            )
        if num_items_in_batch is None or self._window is None:
            self._window = self._open_window([inputs])
        window = self._window
        # Trainer's own autocast is around model.forward alone
        with self.lm.within(wrapper), self.accelerator.autocast():
            if window.terms is None:
                window.terms = self._terms_with_baselines(window.batches)
                self._latest = {}
            packs = [  # but for those of a baseline alone
                (batch.to(self._device), terms_of_key)
                for key, batch in inputs.items()
                if (terms_of_key := [t for t in window.terms if "/".join(t.batch_key) == key])
            ]
            if isinstance(self.lm, GatheredCausalLM):  # one pass: gradients are gathered once
                whole = concatenate([batch for batch, _ in packs])
                total = self.lm.inside_head(whole, lambda states: self._loss(window, packs, states))
            else:
                total = self._loss(window, packs, None)
        return (total, {}) if return_outputs else total

    def _loss(
        self,
        window: "_Window",
        packs: list[tuple[PackedBatch, list[Term]]],
        states: Tensor | None,  # (T, D) of all packs, where the decoder has run already
    ) -> Tensor:
        """What the packs of a device batch add to the loss of the step, and to ``_latest``."""
        total = torch.zeros((), device=self._device)
        offset = 0
        for batch, terms in packs:
            end = offset + len(batch.input_ids)
            loss, values, log_probs = micro_batch_loss(
                self.lm, batch, terms, window.counts, self.references, self.reference_cache,
                None if states is None else states[offset:end],
            )  # fmt: skip
            offset = end
            total = total + loss
            if log_probs is not None:
                sources = terms[0].batch_key
                sums = log_probs.view(-1, len(sources)).sum(dim=0) / window.counts[SEQUENCES]
                values |= {f"{n} log-prob": x for n, x in zip(sources, sums, strict=True)}
            for name, value in values.items():
                self._latest[name] = self._latest.get(name, 0.0) + value
        return total

    def _open_window(self, batches: list[dict[str, PackedBatch]]) -> "_Window":
        """What sums are divided by: the mean of the processes' counts, as DDP takes means too."""
        examples: dict[str, list[TokenizedExample]] = {}
        for batch in batches:
            for key, packed in batch.items():
                sources = key.split("/")
                for n, source in enumerate(sources):
                    indices = packed.indices[n :: len(sources)]
                    examples.setdefault(source, []).extend(self.sources[source][i] for i in indices)
        here = {term.name: count(term, examples) for term in self.terms}
        here[SEQUENCES] = len(examples[self.terms[0].source])
        counts = torch.tensor(list(here.values()), dtype=torch.float32).to(self._device)
        means = self.accelerator.reduce(counts, "mean").unbind()
        return _Window(batches, dict(zip(here, means, strict=True)))

    def _terms_with_baselines(self, batches: list[dict[str, PackedBatch]]) -> tuple[Term, ...]:
        sources = {term.baseline for term in self.terms if term.baseline is not None}
        of_baselines = {
            str(source): [batch[source].to(self._device) for batch in batches] for source in sources
        }
        return with_baselines(
            self.lm, self.terms, of_baselines, self.references,
            lambda sums: self.accelerator.reduce(sums.to(self._device), "sum"),
        )  # fmt: skip

    @property
    def _device(self) -> torch.device:
        """Where batches go; with ``cpu_offload``, weights lie elsewhere."""
        return self.args.device if self._divides else self.lm.device

    @contextmanager
    def _undivided(self) -> Iterator[None]:
        """Inside, ``lm`` reads whole weights: of the model, or once it is wrapped of its head."""
        wrapper = getattr(self.model_wrapped, "_orig_mod", self.model_wrapped)
        if not self._divides:
            yield
        elif isinstance(wrapper, FSDPModule) or wrapper is not self.model:
            assert isinstance(self.lm, GatheredCausalLM)
            with self.lm.within(wrapper), self.lm.with_whole_head():
                yield
        else:
            parameters = list(self.model.parameters())
            if not any(map(is_divided, parameters)):
                # as it will train: the reference is the model of the first step
                self.model.to(device=self.args.device, dtype=dtype_of_deepspeed(self))
            with gathered(parameters):
                yield

    def _compile_layers(self) -> None:
        """Compiles layer by layer: hooks on the decoder stay outside."""
        for layer in repeated_layers(self.lm.decoder):
            layer.compile(backend=self.args.torch_compile_backend or "inductor",
                          mode=self.args.torch_compile_mode)  # fmt: skip
        if self._divides:  # accelerate's own compilation is of the whole model
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO

    @contextmanager
    def _packed(self) -> Iterator[None]:
        """Inside, and in ``train``, the model has the attention for packs."""
        if self._packing:
            yield
            return
        self._packing = True
        try:
            with self.lm.packing():
                yield
        finally:
            self._packing = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer.log``, with terms and log-probs beside a loss."""
        if "loss" in logs:
            values = self.accelerator.reduce(dict(self._latest), "mean")
            logs = {**logs, **{name: float(value) for name, value in values.items()}}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self.lm.generating():  # its own attention, not ours, goes into config.json
            super()._save(output_dir, state_dict)


@dataclass
class _Window:
    """The device batches of one step in this process."""

    batches: list[dict[str, PackedBatch]]
    counts: dict[str, Tensor]  # what the sum of each term is divided by, and ``SEQUENCES``
    terms: tuple[Term, ...] | None = None  # with their baselines, once the step has begun


class _RetainPartners(TrainerCallback):
    """Draws new retain partners every epoch; of several processes, accelerate tells no dataset."""

    def __init__(self, dataset: UnlearningDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))


def _check_evaluation(dataset: Any) -> None:
    if dataset is not None and not isinstance(dataset, UnlearningEvaluation):
        raise UserError(
            f"eval_dataset must be an UnlearningEvaluation, which holds records to measure, got "
            f"{type(dataset).__name__}"
        )
