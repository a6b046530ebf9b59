"""Unlearning under ``transformers.Trainer``: its optimisers, logging, checkpoints and hub upload.

    trainer = UnlearningTrainer(model, args, UnlearningDataset(forget, retain), method="NPO+RT")
    trainer.train()

Losses, methods and packing are those of ``npo_fast.trainer``; the loop is that of ``Trainer``.
Several processes (``torchrun``, ``accelerate launch``) train as with DDP: each has the whole model,
and the loss is that of all their batches together. Where the head's weight is sharded (FSDP,
DeepSpeed), and under ``DataParallel`` or ``torch_compile``, ``train`` refuses.
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from npo_fast.data import PackedBatch, TokenizedExample, pack
from npo_fast.errors import UserError
from npo_fast.methods import Coefficients, Positions, Term, build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs
from npo_fast.trainer.order import interleave, permutation, primary_sources
from npo_fast.trainer.step import References, count, micro_batch_loss, with_baselines

if find_spec("accelerate") is None:
    raise ImportError(
        "npo_fast.integrations.hf_trainer needs accelerate, as transformers.Trainer does: "
        "pip install 'npo-fast[hf-trainer]'"
    )

REFERENCE_TOKENS = 2048  # of a micro-batch of the reference pass


class UnlearningDataset(torch.utils.data.Dataset[dict[str, TokenizedExample]]):
    """Every forget sequence once an epoch, each with a retain sequence: ``{"forget", "retain"}``.

    The retain partners change from epoch to epoch (``Trainer`` calls ``set_epoch``); none is seen
    again before all were. The order is a function of the seed. ``index`` becomes a sequence's
    place in the lists given.

    Args:
        forget: what to forget, tokenised (``npo_fast.data.Template`` makes such sequences).
        retain: what to keep; empty for a method without a retain term.
        idk: the forget questions with refusals, in the same order, for IDK, DPO and KTO.
        alternate: the forget questions with alternate answers, in the same order, for AltPO.
    """

    def __init__(
        self,
        forget: Sequence[TokenizedExample],
        retain: Sequence[TokenizedExample] = (),
        seed: int = 0,
        *,
        idk: Sequence[TokenizedExample] = (),
        alternate: Sequence[TokenizedExample] = (),
    ):
        if not forget:
            raise UserError("UnlearningDataset: forget is empty; there is nothing to forget")
        given = {"forget": forget, "retain": retain, "idk": idk, "alternate": alternate}
        self.sources = {
            name: [replace(sequence, index=i) for i, sequence in enumerate(sequences)]
            for name, sequences in given.items()
        }
        self._primary = primary_sources({n: s for n, s in self.sources.items() if s})
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws the retain partners of this epoch."""
        size = len(self.sources["retain"])
        rounds, offset = divmod(epoch * len(self), size) if size else (0, 0)
        order: list[int] = []
        while size and len(order) < offset + len(self):
            order += permutation(size, f"{self.seed}/retain/{rounds}")
            rounds += 1
        self._partners = order[offset : offset + len(self)]

    def __len__(self) -> int:
        return len(self.sources["forget"])

    def __getitem__(self, i: int) -> dict[str, TokenizedExample]:
        item = {name: self.sources[name][i] for name in self._primary}
        if self._partners:
            item["retain"] = self.sources["retain"][self._partners[i]]
        return item


class UnlearningCollator:
    """One ``PackedBatch``, without padding, for each of the ``batch_keys``.

    A key is a source such as "forget", or several whose sequences alternate, such as "idk/forget"
    for pairs; by default each source of the dataset by itself. accelerate moves a batch with its
    ``to``, which leaves on the host what the host reads.
    """

    def __init__(self, batch_keys: Sequence[str] | None = None) -> None:
        self.batch_keys = batch_keys

    def __call__(self, items: list[dict[str, TokenizedExample]]) -> dict[str, PackedBatch]:
        batch = {name: [item[name] for item in items] for name in items[0]}
        packed = {}
        for key in self.batch_keys or batch:
            sources = key.split("/")
            (packed[key],) = pack(interleave(batch, sources), sys.maxsize, group=len(sources))
        return packed


class UnlearningTrainer(Trainer):
    """``transformers.Trainer`` that minimises ``sum(coefficient * term)`` of an unlearning method.

    The reference is the model as it is handed over: one log-prob a sequence is computed here, kept
    as ``references``, and no second model stays in memory. To resume, hand over the same starting
    model (or the ``references`` of the first run) and call ``train(resume_from_checkpoint=…)``.

    A device batch has ``per_device_train_batch_size`` forget sequences and as many to retain. With
    gradient accumulation the losses of the device batches are averaged: exactly the loss of the
    whole batch for a mean over sequences (NPO, SimNPO, DPO) and batches of one size; a token mean
    (GA, the retain term) weights each device batch alike, whatever its number of tokens, and KTO's
    baseline is that of the device batch. Over several processes the sums are divided by the counts
    of all of them, so that batches of unequal size or length weigh as they would in one process.

    Logs carry each term's value and the mean log-prob of a sequence in the latest device batch.

    Args:
        method, coefficients, kl_positions: as in ``npo_fast.methods.build_method``.
        references: ``references`` of an earlier run on this dataset.
        reference_cache: folder that keeps what the method compares with from run to run, and to
            resume: log-probs, and the hidden states of a KL; None keeps those among the temporary
            files.
        attention: as in ``CausalLM``; outside ``train`` the model has its own.
        options: of ``transformers.Trainer``, such as ``callbacks`` and ``processing_class``.

    Raises:
        UserError: an unknown method, no retain data for a method that needs it, an evaluation set
            (``npo_fast.evaluation`` measures forgetting), a model whose head is not understood or,
            in ``train``, one that is wrapped otherwise than by DDP.
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
        references: References | None = None,
        reference_cache: Path | None = None,
        attention: str = "auto",
        **options: Any,
    ) -> None:
        self.terms = build_method(method, coefficients, kl_positions)
        for source in {source for term in self.terms for source in term.reads}:
            if not train_dataset.sources[source]:
                raise UserError(f"method {method} needs {source} data; the dataset has none")
        if options.get("eval_dataset") is not None:
            raise UserError("UnlearningTrainer takes no eval_dataset; see npo_fast.evaluation")
        args = copy.copy(args)
        args.remove_unused_columns = False  # the model's forward knows neither forget nor retain
        batch_keys = ["/".join(term.batch_key) for term in self.terms]
        batch_keys += [term.baseline for term in self.terms if term.baseline]
        collator = UnlearningCollator(list(dict.fromkeys(batch_keys)))
        super().__init__(model, args, collator, train_dataset=train_dataset, **options)
        self.model_accepts_loss_kwargs = False  # so Trainer divides by the accumulation steps
        self.sources = train_dataset.sources
        self.lm = CausalLM(self.model, attention)
        with self.lm.packing(), self.accelerator.autocast():
            self.references = references or reference_log_probs(
                self.lm, self.sources, self.terms, REFERENCE_TOKENS, reference_cache
            )
            self.reference_cache = reference_cache_for(
                self.terms, self.lm, self.sources, REFERENCE_TOKENS, reference_cache
            )
        self._latest: dict[str, Tensor] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``, with the attention for packs."""
        with self.lm.packing():
            return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],  # batch key -> PackedBatch
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a device batch, as ``Trainer`` calls for it."""
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        if inner is not self.lm.model:
            raise UserError(
                f"UnlearningTrainer needs the head's weight whole, and the model is wrapped as "
                f"{type(model).__name__}: start one process a GPU (torchrun, accelerate launch: "
                "DDP) without FSDP, DeepSpeed or torch_compile"
            )
        inputs = {key: batch.to(self.lm.device) for key, batch in inputs.items()}
        total = torch.zeros((), device=self.lm.device)
        # Trainer's own autocast is around model.forward alone
        with self.lm.within(model), self.accelerator.autocast():
            batches = {key: [batch] for key, batch in inputs.items()}
            terms = with_baselines(self.lm, self.terms, batches, self.references)
            counts = self._counts(terms, inputs)
            for key, batch in inputs.items():
                sources = key.split("/")
                terms_of_key = [term for term in terms if list(term.batch_key) == sources]
                if not terms_of_key:  # a baseline alone
                    continue
                loss, values, log_probs = micro_batch_loss(
                    self.lm, batch, terms_of_key, counts, self.references, self.reference_cache
                )
                total = total + loss
                means = log_probs.view(-1, len(sources)).mean(dim=0)
                self._latest |= values
                self._latest |= {f"{n} log-prob": m for n, m in zip(sources, means, strict=True)}
        return (total, {}) if return_outputs else total

    def _counts(
        self, terms: Sequence[Term], inputs: Mapping[str, PackedBatch]
    ) -> dict[str, Tensor]:
        """What a sum is divided by: the mean of the processes' counts, as DDP takes means too."""
        batch: dict[str, list[TokenizedExample]] = {}
        for key, packed in inputs.items():
            sources = key.split("/")
            for n, source in enumerate(sources):
                indices = packed.indices[n :: len(sources)]
                batch[source] = [self.sources[source][i] for i in indices]
        here = [float(count(term, batch)) for term in terms]
        counts = self.accelerator.reduce(torch.tensor(here).to(self.lm.device), "mean")
        return dict(zip((term.name for term in terms), counts.unbind(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer.log``, with terms and log-probs beside a loss."""
        if "loss" in logs:
            values = self.accelerator.reduce(dict(self._latest), "mean")
            logs = {**logs, **{name: float(value) for name, value in values.items()}}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self.lm.generating():  # its own attention, not ours, goes into config.json
            super()._save(output_dir, state_dict)
