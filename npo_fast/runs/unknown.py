"""How likely the forget answers are to a model that never knew them: for ``--beta auto``.

The level is taken from the first of these that is given: a retrained model's log, held-out records
under the model as it is, the model before it was taught, a number.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npo_fast.data import Record, Records, TokenizedExample
from npo_fast.data.repeats import shared
from npo_fast.errors import UserError, named
from npo_fast.losses import NPO, suggest_beta
from npo_fast.methods import Term
from npo_fast.metrics import FORGET, Log, load_result
from npo_fast.metrics.evidence import Level
from npo_fast.metrics.logs import check_answers, column
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.reference_log_probs import reference_log_probs_of
from npo_fast.runs.models import Model
from npo_fast.runs.options import MethodOptions
from npo_fast.runs.preparing import PreparedRun
from npo_fast.runs.references import log_probs_under, other_model
from npo_fast.trainer.step import References

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnknownSources:
    """What may tell the level, as ``unlearn`` takes it."""

    retrained: Path | None = None
    holdout: Records | None = None
    base_model: Model | None = None
    unknown_log_prob: float | None = None

    @property
    def given(self) -> bool:
        """Whether any of them is there."""
        return any(value is not None for value in vars(self).values())

    def check(self, method: MethodOptions, terms: tuple[Term, ...]) -> None:
        """Raises ``UserError`` where --beta auto has no beta to set, or no level to set it from."""
        level = self.unknown_log_prob
        if level is not None and not -1e9 < level <= 0:
            raise UserError(f"--unknown-log-prob must be a log-prob, 0 or less, got {level}")
        if not method.auto_beta:
            return
        if not any(isinstance(term.loss, NPO) for term in terms):
            raise UserError(
                "--beta auto is for NPO, whose weight fades with the log-ratio of the forget "
                f"answer alone; {method.method} is not: give a number (docs/beta.md)"
            )
        if not self.given:
            raise UserError(
                "--beta auto needs to know how likely the forget answers are to a model that never "
                "knew them: add --retrained LOGS, --holdout RECORDS, --base-model MODEL, or "
                "--unknown-log-prob NATS"
            )

    def check_sources(self, prepared: PreparedRun, records: Sequence[Record]) -> None:
        """Raises ``UserError`` for a log or a base model that cannot tell the level."""
        if _recorded(prepared) is not None:
            return
        forget = prepared.sources["forget"]
        if self.retrained is not None:
            log = self._log()
            texts = any(record.is_text for record in records)  # a log has their windows
            answers = [None] * len(forget) if texts else [record.answer for record in records]
            check_answers(log, answers, f"--retrained {self.retrained}")
            self._of_log(log, _lengths(forget))
        elif self.base_model is not None and self.holdout is None:
            source, template = prepared.model, prepared.template
            other_model(self.base_model, source, template, {"forget": forget}, role="base-model")

    def under_base(self, prepared: PreparedRun) -> Tensor | None:
        """Log-probs of the forget answers under ``base_model``, where it decides; (S,).

        Called before the run's model is loaded.
        """
        earlier = self.retrained is not None or self.holdout is not None
        if self.base_model is None or earlier or _recorded(prepared) is not None:
            return None
        forget = {"forget": prepared.sources["forget"]}
        tokens = prepared.training.micro_batch_tokens
        return log_probs_under(
            self.base_model, prepared.model, prepared.template, forget, tokens, role="base-model"
        )["forget"].sequences

    def level(
        self,
        lm: CausalLM,
        prepared: PreparedRun,
        references: References,
        under_base: Tensor | None,
    ) -> Level:
        """The level under the model before its first step; a resumed run has it already."""
        if (recorded := _recorded(prepared)) is not None:
            return Level(**recorded)
        examples, tokens = prepared.sources["forget"], prepared.training.micro_batch_tokens
        reference = references.get("forget")
        if not isinstance(reference, Tensor):
            reference = reference_log_probs_of(lm, {"forget": examples}, tokens)["forget"].sequences
        lengths = _lengths(examples)
        if self.retrained is not None:
            unknown = self._of_log(self._log(), lengths)
            source = f"the retrained model's log {self.retrained.name}"
        elif self.holdout is not None:
            held_out = prepared.sources["holdout"]
            found = reference_log_probs_of(lm, {"holdout": held_out}, tokens)["holdout"]
            unknown = lengths * (found.sequences.cpu() / _lengths(held_out)).quantile(0.5)
            source = f"{len(held_out)} held-out answers"
        elif under_base is not None:
            unknown, source = under_base, "the base model"
        else:
            assert self.unknown_log_prob is not None
            unknown, source = torch.tensor([self.unknown_log_prob]), "--unknown-log-prob"
        level = Level(_median(reference), _median(unknown), source)
        if not (math.isfinite(level.reference) and math.isfinite(level.unknown)):
            raise UserError(
                f"a forget answer has the median log-prob {level.reference} before, and "
                f"{level.unknown} where it was never known ({source}): both must be finite"
            )
        return level

    def _log(self) -> Log:
        assert self.retrained is not None
        return load_result(self.retrained).get(FORGET, {})

    def _of_log(self, log: Log, lengths: Tensor) -> Tensor:
        """Of a log, the mean losses a token times the lengths of the answers."""
        with named(f"--retrained {self.retrained}"):
            return -torch.from_numpy(column(log, "avg_gt_loss")) * lengths


def check_holdout(records: Mapping[str, Sequence[Record]]) -> None:
    """Raises ``UserError`` where --holdout has what the model was taught, or another kind."""
    held_out, forget = records["holdout"], records["forget"]
    for name in ("forget", "retain"):
        if found := shared(held_out, records.get(name, ())):
            raise UserError(
                f"{len(found)} of {len(held_out)} --holdout records are --{name} records too, such "
                f"as record {found[0]}: take them out, a holdout is what the model never saw"
            )
    of_text, forgets_text = ({record.is_text for record in each} for each in (held_out, forget))
    if other := of_text - forgets_text:
        kind, forgets = ("texts", "questions") if True in other else ("questions", "texts")
        raise UserError(
            f"--holdout holds {kind} and --forget {forgets}: hold out records of the same kind"
        )


def with_level(prepared: PreparedRun, level: Level, auto: bool) -> PreparedRun:
    """The run with the level on record and, where ``auto``, with beta from it in its terms.

    Raises:
        UserError: the model does not know the forget answers better than the level.
    """
    metadata: dict[str, Any] = {**prepared.metadata, "level": asdict(level)}
    text = (
        f"a forget answer has the median log-prob {level.reference:.4g} before, and "
        f"{level.unknown:.4g} where it was never known ({level.source})"
    )
    if not auto:
        logger.info(text)
        return replace(prepared, metadata=metadata)
    beta = suggest_beta(torch.tensor([level.reference]), level.unknown)
    metadata["beta"] = beta
    logger.info(f"--beta auto: {beta:.3g}, for {text}")
    terms = tuple(
        replace(term, loss=NPO(beta)) if isinstance(term.loss, NPO) else term
        for term in prepared.terms
    )
    return replace(prepared, terms=terms, metadata=metadata)


def median_log_prob(lm: CausalLM, prepared: PreparedRun) -> float:
    """Median log-prob of a forget answer under the model as it is now."""
    forget, tokens = {"forget": prepared.sources["forget"]}, prepared.training.micro_batch_tokens
    found = reference_log_probs_of(lm, forget, tokens)["forget"]
    return _median(found.sequences)


def _lengths(examples: Sequence[TokenizedExample]) -> Tensor:
    return torch.tensor([float(example.answer_length) for example in examples])


def _median(log_probs: Tensor) -> float:
    return float(log_probs.double().quantile(0.5))


def _recorded(prepared: PreparedRun) -> Mapping[str, Any] | None:
    return None if prepared.resumable is None else prepared.resumable.metadata.get("level")
