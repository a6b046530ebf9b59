"""Greedy answers of a model."""

import torch
from torch.nn.utils.rnn import pad_sequence

from npo_fast.model.causal_lm import CausalLM


@torch.no_grad()
def generate(
    lm: CausalLM, prompts: list[list[int]], max_new_tokens: int, pad_id: int, eos_id: int
) -> list[list[int]]:
    """Greedy continuations of several prompts at once, up to and without ``eos_id``."""
    width = max(len(prompt) for prompt in prompts)
    flipped = [torch.tensor(prompt[::-1]) for prompt in prompts]
    ids = pad_sequence(flipped, batch_first=True, padding_value=pad_id).flip(1)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with lm.generating() as model:
        out = model.generate(
            input_ids=ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_id,
            eos_token_id=eos_id,
        )
    continuations = out[:, width:].tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in continuations]
