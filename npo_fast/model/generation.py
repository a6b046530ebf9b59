"""Greedy answers of a model."""

from collections.abc import Iterable
from itertools import takewhile

import torch
from torch.nn.utils.rnn import pad_sequence

from npo_fast.distributed import gather_objects
from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM


@torch.no_grad()
def generate(
    lm: CausalLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    pad_id: int | None,
    stop_ids: int | Iterable[int],
) -> list[list[int]]:
    """Greedy continuations of several prompts at once, up to and without a token that stops.

    Several processes that share the model deal the prompts out, and all get all continuations.

    Args:
        pad_id: None, of a tokenizer without one, pads with a token that stops, under the mask.
        stop_ids: token ids; those of the model's generation config stop too.
    """
    check_length(lm, prompts, max_new_tokens)
    stops = {stop_ids} if isinstance(stop_ids, int) else {*stop_ids}
    pad_id = min(stops) if pad_id is None else pad_id
    own = prompts[lm.rank :: lm.world_size]
    rows = [torch.tensor(prompt) for prompt in own or prompts[:1]]  # one to keep step with others
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side="left")
    with lm.generating() as model:
        stops |= eos_ids(model.generation_config)
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
            eos_token_id=sorted(stops),
            synced_gpus=lm.world_size > 1,
        )
    continuations = out[: len(own), ids.shape[1] :].tolist()
    kept = [list(takewhile(lambda token: token not in stops, row)) for row in continuations]
    if lm.vocabulary_slice is None:
        return kept
    of_ranks = gather_objects(kept, lm.vocabulary_slice.group)
    return [of_ranks[i % lm.world_size][i // lm.world_size] for i in range(len(prompts))]


def check_length(lm: CausalLM, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises ``UserError`` where a prompt and its answer exceed the model's positions."""
    longest = max(map(len, prompts), default=0)
    if lm.positions is not None and longest + max_new_tokens > lm.positions:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"{lm.positions} positions: lower --max-new-tokens or --max-length"
        )


def eos_ids(config: object) -> set[int]:
    """The end-of-sequence tokens of a config of transformers: none, one or several."""
    ids = getattr(config, "eos_token_id", None)
    return set() if ids is None else {ids} if isinstance(ids, int) else {*ids}
