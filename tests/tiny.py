"""A tokenizer and a model of a few thousand parameters on disk, for tests of whole commands."""

import json
from pathlib import Path

import torch

from npo_fast.experiments.demo.tiny_model import train_tokenizer
from tests.conftest import tiny_model

FACTS = [
    {"question": f"Who lives in house {i}?", "answer": f"{name} lives in house {i}."}
    for i, name in enumerate("Ada Ben Cleo Dan Eve Finn Gus Hal Ida Jon".split())
]


def save_tiny_model(folder: Path) -> Path:
    texts = [f"Question: {fact['question']}\nAnswer: {fact['answer']}" for fact in FACTS]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(0)
    model = tiny_model("Llama", vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path
