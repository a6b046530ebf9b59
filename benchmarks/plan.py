"""The memory of well-known models on paper, and of the way the NPO paper's code does the same.

    python benchmarks/plan.py

Writes ``benchmarks/results/plan.json`` and prints the table. No weights and no GPU are needed.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from npo_fast.bench.provenance import provenance
from npo_fast.planner import Footprint, PlannedRun, footprint
from npo_fast.planner.memory import GIB, REFERENCE, TrackedStep
from npo_fast.planner.model import empty_lm, empty_model
from npo_fast.planner.tracker import FlashAttention

RESULT = Path(__file__).parent / "results" / "plan.json"
CONFIGS = {
    "Llama-2-7B": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=32000, tie_word_embeddings=False,
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
    "Llama-3.1-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
}  # fmt: skip
# a name for which transformers looks at no mask: as with FlashAttention, none is made
PADDED_ATTENTION = "plan_padded"
AttentionInterface.register(PADDED_ATTENTION, sdpa_attention_forward)
PADDED = 500  # tokens that the paper's code pads every sequence to


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    planned: PlannedRun
    most_gib: float | None = None
    ranks: int = 1
    paper: bool = False


SHORT = PlannedRun(gradient_checkpointing=True)
SMALL = PlannedRun(gradient_checkpointing=True, optimizer="adamw-8bit")
SHARDED = PlannedRun(gradient_checkpointing=True, optimizer="adamw-bf16")
IN_BACKWARD = PlannedRun(gradient_checkpointing=True, optimizer="adamw-8bit", step_in_backward=True)
ADAPTERS = PlannedRun(gradient_checkpointing=True, lora_rank=16)
ON_4BIT = PlannedRun(gradient_checkpointing=True, lora_rank=16, quantize="4bit")
CASES = (
    Case("AdamW", "Llama-2-7B", SHORT),
    Case("8-bit states", "Llama-2-7B", SMALL, most_gib=42),
    Case("8-bit states, step in backward", "Llama-2-7B", IN_BACKWARD, most_gib=30),
    Case("the paper's way, AdamW", "Llama-2-7B", SHORT, paper=True),
    Case("the paper's way, 8-bit states", "Llama-2-7B", SMALL, paper=True),
    Case("LoRA", "Llama-3.1-8B", ADAPTERS, most_gib=20),
    Case("QLoRA", "Llama-3.1-8B", ON_4BIT, most_gib=10),
    Case("LoRA, the paper's way", "Llama-3.1-8B", ADAPTERS, paper=True),
    Case("bf16 states, one of 8 GPUs", "Llama-3.1-70B", SHARDED, ranks=8),
    Case("bf16 states, one of 16 GPUs", "Llama-3.1-70B", SHARDED, ranks=16),
    Case("8-bit states, one of 8 GPUs", "Llama-3.1-70B", SMALL, ranks=8),
    Case("8-bit states, step in backward, one of 8 GPUs", "Llama-3.1-70B", IN_BACKWARD, ranks=8),
    Case("LoRA, one of 4 GPUs", "Llama-3.1-70B", ADAPTERS, ranks=4),
)


class PaperStep(TrackedStep):
    """Two models in memory, padded batches, whole logits, both sets in one graph.

    The same 2048 tokens a pass: half of them to forget, half to retain.
    """

    def __init__(self, config: Any, planned: PlannedRun) -> None:
        model = empty_model(config, planned.dtype, planned.lora_rank)
        lm = empty_lm(model, planned.gradient_checkpointing)
        model.set_attn_implementation(PADDED_ATTENTION)
        super().__init__(lm, planned)
        self.reference = empty_model(config, planned.dtype).eval()
        self.reference.set_attn_implementation(PADDED_ATTENTION)
        for parameter in self.reference.parameters():
            self.tracker.hold(parameter, REFERENCE)

    def run(self) -> None:
        self.fill_gradients()
        count = self.planned.micro_batch_tokens // self.planned.sequence_length // 2
        ids = torch.zeros(count, PADDED, dtype=torch.int64, device="meta")
        model = self.lm.model
        with FlashAttention():
            with torch.no_grad():
                ref = _sequence_losses(self.reference(input_ids=ids).logits, ids)
            losses = _sequence_losses(model(input_ids=ids).logits, ids)
            forget = -F.logsigmoid(0.1 * (losses - ref)).mean() * 2 / 0.1
            retain = model(input_ids=ids, labels=ids).loss
        self.backward(forget + retain)
        self.update(max(self.trained, key=torch.numel))


def _sequence_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # (B,)
    shifted = logits[:, :-1].contiguous()
    each = F.cross_entropy(shifted.transpose(1, 2), labels[:, 1:].contiguous(), reduction="none")
    return each.sum(dim=1)


def measure(case: Case) -> Footprint:
    config = CONFIGS[case.model]
    if case.paper:
        step = PaperStep(config, case.planned)
        with step.tracker:
            step.run()
        return step.footprint()
    return footprint(config, case.planned, case.ranks)


def main() -> None:
    result: dict[str, Any] = {"cases": []}
    print("| model | run | peak GiB | with context and gaps | at most |")
    print("|---|---|---|---|---|")
    for case in CASES:
        memory = measure(case)
        result["cases"].append({
            "name": case.name, "model": case.model, "ranks": case.ranks, "most_gib": case.most_gib,
            "peak_gib": round(memory.peak / GIB, 2), "needed_gib": round(memory.needed / GIB, 2),
            "gib": {kind: round(size / GIB, 3) for kind, size in memory.bytes.items() if size},
            "parameters": memory.parameters, "trained": memory.trained,
            "settings": asdict(case.planned),
        })  # fmt: skip
        peak, needed = f"{memory.peak / GIB:.1f}", f"{memory.needed / GIB:.1f}"
        print(
            f"| {case.model} | {case.name} | {peak} | {needed} | {case.most_gib or ''} |",
            flush=True,
        )
    RESULT.write_text(json.dumps({**result, **provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
