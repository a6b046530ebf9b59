"""MUSE's evaluation: a model and a data set of MUSE's layout in, logs out.

The layout is that of ``muse-bench/MUSE-News`` on the hub, configurations and their splits:
``verbmem/forget`` (prompt, gt), ``knowmem/forget_qa`` and ``retain_qa`` (question, answer) with
``…_icl`` (examples before each question), ``privleak/forget`` and ``holdout`` (text). What is done
with them follows github.com/swj0419/muse_bench, ``metrics``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from npo_fast.data import Template, TokenizedExample, check_readable, load_rows
from npo_fast.errors import NoSuchSplitError, UserError, named, short
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.metrics.logs import CONVENTIONS, TEXTS, VOCABULARY
from npo_fast.metrics.memorization import Conventions, min_k
from npo_fast.metrics.muse import (
    KNOWMEM_FORGET,
    KNOWMEM_RETAIN,
    MIN_K_SHARE,
    PRIVLEAK_FORGET,
    PRIVLEAK_HOLDOUT,
    ROUGE,
    VERBMEM,
)
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.generation import generate

LONGEST_ANSWER = 32  # new tokens of KnowMem; VerbMem's are --max-new-tokens, 128
STOPS = ("\n\n", "\nQuestion", "Question:")  # an answer of KnowMem ends before the first of them
Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class MuseSuite:
    """What MUSE measures on, by log."""

    prompts: dict[str, list[tuple[str, ...]]]
    """Prompts to continue, each with the text that should follow."""
    texts: dict[str, list[str]]
    """Texts whose likelihood is compared."""

    def sizes(self) -> dict[str, int]:
        """Examples by log."""
        return {name: len(rows) for name, rows in (self.prompts | self.texts).items()}


def muse_suite(data: str) -> MuseSuite:
    """Reads the splits of a hub data set, or of a folder with folders by configuration.

    Raises:
        UserError: a split is missing or its rows have other keys; the message names both.
    """
    prompts = {VERBMEM: _columns(data, VERBMEM, "prompt", "gt")}
    for name in (KNOWMEM_FORGET, KNOWMEM_RETAIN):
        shots = _columns(data, f"{name}_icl", "question", "answer")
        before = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots)
        questions = _columns(data, name, "question", "answer")
        prompts[name] = [(f"{before}Question: {q}\nAnswer: ", a) for q, a in questions]
    texts = {
        name: [text for (text,) in _columns(data, name, "text")]
        for name in (PRIVLEAK_FORGET, PRIVLEAK_HOLDOUT)
    }
    return MuseSuite(prompts, texts)


def _columns(data: str, split: str, *keys: str) -> list[tuple[str, ...]]:
    try:
        rows, where = load_rows(split, data)
    except NoSuchSplitError as error:
        raise UserError(
            f"--suite muse reads {split}, rows of {' and '.join(keys)}, and --data {data} has none "
            f"({error}). MUSE's layout has the folders verbmem, knowmem and privleak with a file a "
            "split; TOFU's measures are those of --suite tofu"
        ) from error
    found = []
    for number, row in rows:
        for key in keys:
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise UserError(
                    f"{where}, record {number}: --suite muse needs the text {key!r} in each row of "
                    f"{split}, found {short(row)}"
                )
        found.append(tuple(row[key] for key in keys))
    return found


@torch.no_grad()
def evaluate_muse(
    lm: CausalLM,
    template: Template,
    suite: MuseSuite,
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns MUSE's logs (see ``npo_fast.metrics.muse``).

    Prompts and texts are tokenised as they stand, without a chat template, and never cut; a text
    longer than the model's context is read in windows. Greedy continuations have 128 new tokens
    for VerbMem and 32 for KnowMem, at most ``settings.max_new_tokens``. ROUGE-L is F1 without
    stemming, against the first 128 tokens of VerbMem's ``gt``.

    Args:
        template: has the tokenizer, and the tokens that end a text.
    """
    evaluation = _Evaluation(
        lm, template, settings or EvaluationSettings(), progress or (lambda *_: None)
    )
    windows = {name: evaluation.windows(name, texts) for name, texts in suite.texts.items()}
    pairs = suite.prompts if evaluation.settings.generate else {}
    prompts = {name: evaluation.prompts(name, rows) for name, rows in pairs.items()}
    with lm.evaluating():
        logs = {name: evaluation.attacked(name, *each) for name, each in windows.items()}
        for name, rows in pairs.items():
            logs[name] = evaluation.continued(name, rows, prompts[name])
    return logs


class _Evaluation:
    def __init__(
        self, lm: CausalLM, template: Template, settings: EvaluationSettings, progress: Progress
    ) -> None:
        self.lm, self.settings, self.progress = lm, settings, progress
        config = lm.model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
        self.stop_ids = template.stop_ids
        self.template = Template(template.tokenizer, "plain", self.context)

    def windows(self, name: str, texts: list[str]) -> tuple[list[TokenizedExample], list[int]]:
        """The windows of texts, and which text each is of."""
        windows: list[TokenizedExample] = []
        text_of: list[int] = []
        for i, text in enumerate(texts):
            with named(f"{name}, record {i + 1}"):
                pieces = self.template.windows(text)
            for ids, start in pieces:
                windows.append(TokenizedExample(ids, start, len(windows)))
                text_of.append(i)
        check_readable({name: windows}, self.lm.vocabulary, self.lm.positions)
        return windows, text_of

    def attacked(
        self, name: str, windows: list[TokenizedExample], text_of: list[int]
    ) -> dict[str, Any]:
        """Min-k of each text: the mean of the least likely share of its tokens' log-probs."""
        share = self.settings.min_k_share or MIN_K_SHARE
        log_probs: dict[int, torch.Tensor] = {}
        by_length = sorted(windows, key=lambda window: len(window.input_ids))
        self.progress(name, 0, len(windows))
        for batch in self.lm.micro_batches(by_length, self.settings.micro_batch_tokens):
            values = self.lm.log_probs(batch).float().cpu()
            parts = values.split(batch.answer_cu_seqlens.diff().tolist())
            log_probs |= zip(batch.indices, parts, strict=True)
            self.progress(name, len(log_probs), len(windows))
        by_text: list[list[torch.Tensor]] = [[] for _ in range(text_of[-1] + 1)]
        for window, i in enumerate(text_of):
            by_text[i].append(log_probs[window])
        return {
            "min_k": [min_k(torch.cat(parts).numpy(), share) for parts in by_text],
            "num_token_gt": [sum(map(len, parts)) for parts in by_text],
            CONVENTIONS: Conventions(min_k_share=share).entry(),
            VOCABULARY: self.lm.vocabulary,
        }

    def new_tokens(self, name: str) -> int:
        """How many tokens a continuation has at most."""
        length = self.settings.max_new_tokens
        return length if name == VERBMEM else min(length, LONGEST_ANSWER)

    def prompts(self, name: str, pairs: list[tuple[str, ...]]) -> list[list[int]]:
        """The tokens of the prompts, each with room for its continuation."""
        length, prompts = self.new_tokens(name), []
        for number, (prompt, _) in enumerate(pairs, 1):
            with named(f"{name}, record {number}"):
                prompts.append(self.prompt(prompt, length))
        examples = [TokenizedExample(tuple(ids), 1, i) for i, ids in enumerate(prompts)]
        check_readable({name: examples}, self.lm.vocabulary, self.lm.positions)
        return prompts

    def continued(
        self, name: str, pairs: list[tuple[str, ...]], prompts: list[list[int]]
    ) -> dict[str, Any]:
        """ROUGE-L of greedy continuations."""
        from npo_fast.evaluation.rouge import rouge_scorer  # min-k needs no rouge_score

        verbatim, length = name == VERBMEM, self.new_tokens(name)
        tokenizer = self.template.tokenizer
        texts = [""] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]))
        size = self.settings.generation_batch * self.lm.world_size
        self.progress(f"{name} continuations", 0, len(order))
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            continuations = generate(
                self.lm, [prompts[i] for i in batch], length, tokenizer.pad_token_id, self.stop_ids
            )
            for i, ids in zip(batch, continuations, strict=True):
                texts[i] = tokenizer.decode(ids, skip_special_tokens=True)
            self.progress(f"{name} continuations", first + len(batch), len(order))
        truths = [truth for _, truth in pairs]
        if verbatim:
            truths = [self.beginning(truth, length) for truth in truths]
        else:
            texts = [_answer(text) for text in texts]
        scored = zip(truths, texts, strict=True)
        return {
            ROUGE: [rouge_scorer(a, stem=False).score(a, b)["rougeL"].fmeasure for a, b in scored],
            TEXTS: [[p, b, a] for (p, _), b, a in zip(pairs, texts, truths, strict=True)],
        }

    def prompt(self, text: str, new_tokens: int) -> list[int]:
        """The tokens of a prompt, which leaves room for the new ones."""
        windows = self.template.windows(text)
        ids = windows[0][0]
        if len(windows) > 1 or len(ids) + new_tokens > self.context:
            raise UserError(
                f"a prompt of {len(ids)} tokens or more and {new_tokens} new ones exceed the "
                f"{self.context} tokens of the model's context: take a model with a longer one, or "
                "leave out examples of the _icl split"
            )
        return list(ids)

    def beginning(self, text: str, tokens: int) -> str:
        """The first tokens of a text; what the tokenizer puts before it is among them."""
        ids = self.template.tokenizer(text).input_ids[:tokens]
        return str(self.template.tokenizer.decode(ids, skip_special_tokens=True))


def _answer(text: str) -> str:
    for stop in STOPS:
        text = text.partition(stop)[0]
    return text
