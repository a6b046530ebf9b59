"""How far a model has moved from another: KL over the vocabulary, from cached hidden states."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npo_fast.data import PackedBatch, Template, TokenizedExample, pack
from npo_fast.evaluation.suite import Suite
from npo_fast.model.causal_lm import CausalLM
from npo_fast.ops.head import Head
from npo_fast.ops.linear_kl import divergences


@dataclass(frozen=True)
class ReferenceStates:
    """The hidden states of every right answer and a copy of the head: no second model stays."""

    head: Head
    hidden: dict[str, list[Tensor]]  # log name -> (T_i, D) of each record, on the CPU

    @classmethod
    @torch.no_grad()
    def of(
        cls, lm: CausalLM, template: Template, suite: Suite, micro_batch_tokens: int
    ) -> "ReferenceStates":
        was_training = lm.model.training
        lm.model.eval()
        states: dict[str, list[Tensor]] = {}
        for name, records in suite.items():
            sequences = [template.encode(record, i) for i, record in enumerate(records)]
            states[name] = [torch.empty(0)] * len(records)
            for batch in pack(sequences, micro_batch_tokens):
                own = lm.hidden(batch.to(lm.device)).cpu().split(_answer_lengths(batch))
                for index, hidden in zip(batch.indices, own, strict=True):
                    states[name][index] = hidden
        lm.model.train(was_training)
        head = lm.linear_head
        bias = None if head.bias is None else head.bias.detach().clone()
        return cls(replace(head, weight=head.weight.detach().clone(), bias=bias), states)

    @torch.no_grad()
    def divergence(
        self, lm: CausalLM, sequences: list[TokenizedExample], name: str, micro_batch_tokens: int
    ) -> list[float]:
        """Mean over its answer tokens of ``KL(reference || model)``, for each sequence."""
        found = [0.0] * len(sequences)
        for batch in pack(sequences, micro_batch_tokens):
            hidden = lm.hidden(batch.to(lm.device))
            reference = torch.cat([self.hidden[name][i] for i in batch.indices]).to(hidden)
            chunks = divergences(lm.linear_head, hidden, self.head, reference)
            parts = torch.cat([kl for _, kl, _ in chunks]).cpu().split(_answer_lengths(batch))
            for index, part in zip(batch.indices, parts, strict=True):
                found[index] = float(part.mean())
        return found


def _answer_lengths(batch: PackedBatch) -> list[int]:
    return batch.answer_cu_seqlens.diff().tolist()
