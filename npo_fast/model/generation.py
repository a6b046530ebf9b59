"""Greedy answers of a model."""

import torch
from torch.nn.utils.rnn import pad_sequence

from npo_fast.model.causal_lm import CausalLM


@torch.no_grad()
def generate(
    lm: CausalLM, prompts: list[list[int]], max_new_tokens: int, pad_id: int | None, eos_id: int
) -> list[list[int]]:
    """Greedy continuations of several prompts at once, up to and without ``eos_id``.

    A tokenizer without a ``pad_id`` is padded with ``eos_id``, under a mask.
    """
    pad_id = eos_id if pad_id is None else pad_id
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side="left")
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
    continuations = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in continuations]
