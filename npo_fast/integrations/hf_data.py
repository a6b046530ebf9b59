"""Data of ``UnlearningTrainer``: what it trains on, device batches, and what it measures."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from npo_fast.data import PackedBatch, Records, Template, TokenizedExample, as_rows, pack
from npo_fast.errors import UserError
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import check_forget_quality, tofu_suite, tokenize_suite
from npo_fast.metrics import FORGET, retrained_log
from npo_fast.metrics.measures import RECORDED, measures, score
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.order import interleave, permutation, primary_sources


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


class UnlearningEvaluation(torch.utils.data.Dataset[Any]):
    """``eval_dataset`` of ``UnlearningTrainer``: what to measure, as ``npo-fast evaluate`` does.

    Args:
        template: how records become tokens; a tokenizer stands for ``Template(tokenizer)``.
        forget, retain, data: as in ``npo_fast.unlearn``; of ``data``, what has wrong answers.
        retrained: log of a model trained without the forget set, for forget quality.
        settings: length of answers, and whether there are any.
    """

    def __init__(
        self,
        template: Any,
        *,
        forget: Records | None = None,
        retain: Records | None = None,
        data: str | None = None,
        retrained: str | Path | None = None,
        settings: EvaluationSettings = EvaluationSettings(),
    ) -> None:
        rows = (as_rows(forget, "forget"), as_rows(retain, "retain"))
        suite = tofu_suite(data, *rows)
        if not suite:
            raise UserError("UnlearningEvaluation: name forget or retain; there is nothing to ask")
        template = template if isinstance(template, Template) else Template(template)
        self.template, self.settings = template, settings
        self.retrained = None
        if retrained is not None:
            check_forget_quality(suite)
            answers = [record.answer for record in suite[FORGET]]
            self.retrained = retrained_log(Path(retrained), answers, range(len(answers)))
        self.suite = tokenize_suite(template, suite)

    def __len__(self) -> int:
        return sum(len(records.answers) for records in self.suite.values())

    def measure(self, lm: CausalLM) -> dict[str, float]:
        """The measures of ``evaluations.jsonl`` by key, such as "forget.probability"."""
        logs = evaluate(lm, self.template, self.suite, self.settings)
        scores = measures(logs, self.retrained)
        return {key: value for key in RECORDED if (value := score(scores, key)) is not None}
