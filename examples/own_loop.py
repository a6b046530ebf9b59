"""NPO+RT in a plain PyTorch loop: python examples/own_loop.py MODEL FORGET.jsonl RETAIN.jsonl

The log-probs of the reference are computed once, before training; no second model stays in memory.
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from npo_fast import FusedLinearNLLLoss, FusedLinearNPOLoss, head_of, sequence_log_probs
from npo_fast.data import PaddedCollator, Template, load_records


def states(model, batch):  # (B, T, D)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state


def unlearn(model, tokenizer, forget, retain, beta=0.1, epochs=5, lr=1e-5, batch_size=4):
    template = Template(tokenizer)
    collate = PaddedCollator(template, with_index=True)
    forget, retain = (template.encode_all(records)[0] for records in (forget, retain))

    head = head_of(model)
    weight = head.pop("weight")  # what is left is bias, softcap and scale
    npo, nll = FusedLinearNPOLoss(beta), FusedLinearNLLLoss(reduction="token_mean")
    reference = torch.empty(len(forget))
    model.eval()
    with torch.no_grad():
        for batch in DataLoader(forget, batch_size, collate_fn=collate):
            hidden = states(model, batch)
            reference[batch["index"]] = sequence_log_probs(hidden, weight, batch["labels"], **head)

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    losses = []
    for _ in range(epochs):
        sets = (DataLoader(rows, batch_size, True, collate_fn=collate) for rows in (forget, retain))
        for old, kept in zip(*sets, strict=False):
            hidden, target = states(model, old)[:, :-1], old["labels"][:, 1:]
            loss = npo(weight, hidden, target, ref_log_probs=reference[old["index"]], **head)
            hidden, target = states(model, kept)[:, :-1], kept["labels"][:, 1:]
            loss = loss + nll(weight, hidden, target, **head)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__.partition("\n")[0])
    model_name, *files = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    print(unlearn(model, tokenizer, *map(load_records, files)))
