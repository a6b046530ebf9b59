"""``--retain auto``: where nobody has retain data, the model's own answers serve as it.

The model as it is answers neutral prompts of ours, greedily: what it says is what is to stay, and
the same model says it again. Where the forget records are raw texts, it continues neutral openings.
The answers are kept in the run folder, so that a run that goes on and a report have the same ones.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from npo_fast import data as data_package
from npo_fast.data import Record, Template, load_records
from npo_fast.distributed import is_main_process
from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.generation import generate
from npo_fast.model.save import save_file
from npo_fast.run_files import OWN_ANSWERS
from npo_fast.runs.callbacks import Callback, Training
from npo_fast.runs.models import ModelSource
from npo_fast.runs.options import RunOptions
from npo_fast.runs.output import UNFINISHED, read_metadata

AUTO = "auto"
MAX_TOKENS, BATCH, LEAST = 96, 16, 8
SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s)|[。！？]+[」』”’]*")
NO_END = re.compile(  # the number of a list's line, an abbreviation, an initial
    r"(?:^|\n)\s*\d+\.$|\b(?:[A-Za-z]|Dr|Mr|Mrs|Ms|Prof|St|No|vs|e\.g|i\.e)\.$"
)
logger = logging.getLogger(__name__)


def own_answers(
    source: ModelSource, forget: list[Record], options: RunOptions
) -> tuple[list[Record], "KeepAnswers"]:
    """The records to keep, and the callback that writes them into the run folder.

    A run that goes on reads its own; else the model is loaded, answers, and is dropped again.

    Raises:
        UserError: a model that hardly answers anything.
    """
    kept = options.output / OWN_ANSWERS
    unfinished = read_metadata(options.output).get("status") in UNFINISHED
    if kept.is_file() and unfinished and not options.overwrite:
        records = load_records(str(kept), None, "retain", "last")
        return records, KeepAnswers(records)
    texts = all(record.is_text for record in forget)
    prompts = _lines("neutral_openings.txt" if texts else "neutral_prompts.txt")
    template = source.template()
    asked = _asked(template, prompts, texts)
    if options.dry_run:  # no weights are loaded: stand-ins of a usual length
        told = f"{len(asked)} answers of the model, not made in a dry run"
        records = [_record(prompt, f"{prompt} {prompt}", texts) for prompt in asked]
    else:
        with source.loaded() as lm:
            logger.info(f"--retain {AUTO}: the model answers {len(asked)} neutral prompts")
            records = _answered(lm, template, asked, texts)
        kind = "continuations" if texts else "answers"
        told = f"{len(records)} of the model's own {kind} to {len(prompts)} neutral prompts"
    if len(records) < LEAST:
        raise UserError(
            f"--retain {AUTO}: the model has an answer to {len(records)} of {len(prompts)} neutral "
            f"prompts, as far as both fit into --max-length {template.max_length}; name records to "
            "keep with --retain, or a method without retain data"
        )
    logger.info(f"--retain {AUTO}: {told}")
    return records, KeepAnswers(records)


class KeepAnswers(Callback):
    """Writes the records into the run folder when training begins."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    def on_start(self, training: Training) -> None:
        if is_main_process():
            lines = "".join(json.dumps(_row(r), ensure_ascii=False) + "\n" for r in self.records)
            path = training.folder.folder / OWN_ANSWERS
            save_file(path, lambda partial: partial.write_text(lines, encoding="utf-8"))


def _asked(template: Template, prompts: list[str], texts: bool) -> dict[str, list[int]]:
    """The tokens of each prompt that leaves room for its answer."""
    tokenizer = template.tokenizer
    if texts:
        ids = [_open(tokenizer(prompt)["input_ids"], template) for prompt in prompts]
    else:
        rendered = (template.tokenize(_record(prompt, "-", False)) for prompt in prompts)
        ids = [tokens[:length] for tokens, length in rendered]
    longest = template.max_length - _limit(template)
    return {p: each for p, each in zip(prompts, ids, strict=True) if len(each) <= longest}


def _limit(template: Template) -> int:
    return min(MAX_TOKENS, template.max_length // 2)


def _answered(
    lm: CausalLM, template: Template, asked: dict[str, list[int]], texts: bool
) -> list[Record]:
    """One record a prompt with an answer, in the order of the prompts."""
    tokenizer, records, limit = template.tokenizer, [], _limit(template)
    prompts, ids = [*asked], [*asked.values()]
    size = BATCH * lm.world_size
    for first in range(0, len(prompts), size):
        batch = slice(first, first + size)
        answers = generate(lm, ids[batch], limit, tokenizer.pad_token_id, template.stop_ids)
        for prompt, answer in zip(prompts[batch], answers, strict=True):
            if texts:
                text, ending = tokenizer.decode(answer, skip_special_tokens=True), "stop"
            else:
                text, ending = template.answer_text(answer, limit)
            if ending == "limit":  # its end is not the model's: back to that of a sentence
                text = _whole_sentences(text)
            if text.strip():
                records.append(_record(prompt, text, texts))
    return records


def _whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; empty where it has none."""
    ends = (match.end() for match in SENTENCE_END.finditer(text))
    return text[: max((end for end in ends if not NO_END.search(text[:end])), default=0)]


def _open(ids: list[int], template: Template) -> list[int]:
    """The tokens without the end that some tokenizers write."""
    return ids[:-1] if ids[-1] in template.stop_ids else ids


def _record(prompt: str, answer: str, text: bool) -> Record:
    return Record((), prompt + answer) if text else Record((("user", prompt),), answer)


def _row(record: Record) -> dict[str, Any]:
    if record.is_text:
        return {"text": record.answer}
    return {"question": record.question, "answer": record.answer}


def _lines(name: str) -> list[str]:
    file = Path(data_package.__file__).with_name(name)
    return file.read_text(encoding="utf-8").splitlines()
