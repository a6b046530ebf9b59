"""Evaluates a model on a suite of records: losses, memorization, ROUGE of greedy answers."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from npo_fast.data import Record, Template, TokenizedExample, pack
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import TokenizedSet, tokenize_set
from npo_fast.evaluation.tokens import TokenScores, token_scores
from npo_fast.metrics import HOLDOUT
from npo_fast.metrics.memorization import (
    exact_memorization,
    extraction_strength,
    min_k,
    min_k_plus_plus,
)
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.generation import generate
from npo_fast.model.reference_states import ReferenceStates
from npo_fast.ops import segment_sum
from npo_fast.ops.linear_kl import divergences

Progress = Callable[[str, int, int], None]  # what, done, total
Columns = dict[str, list[Any]]


def evaluate(
    lm: CausalLM,
    template: Template,
    suite: Mapping[str, list[Record] | TokenizedSet],
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
    reference: ReferenceStates | None = None,
) -> dict[str, Columns]:
    """Returns one log a data set, in TOFU's form (see ``npo_fast.metrics.logs``).

    Losses are sums and means of the negative log-prob of answer tokens, the closing
    end-of-sequence token among them. Where a record has no paraphrase, its answer takes the place,
    as in TOFU's real authors and world facts. ROUGE is the recall of the greedy answer
    (``rouge_scorer``). Logs also have the columns of ``npo_fast.metrics.memorization``.

    Args:
        suite: records by log name, plain or from ``tokenize_suite``, which tokenises them once for
            several evaluations.
        progress: is called with what is measured, how many answers are done, and of how many.
        reference: states of the reference on the right answers of the same suite, by log name, at
            the positions "answer". Adds ``kl_to_reference``, the mean KL(reference || model) over
            answer tokens.
    """
    settings = settings or EvaluationSettings()
    progress = progress or (lambda what, done, total: None)
    was_training = lm.model.training
    lm.model.eval()
    logs = {}
    try:
        for name, records in suite.items():
            if not isinstance(records, TokenizedSet):
                records = tokenize_set(template, name, records)
            logs[name] = _evaluate_set(
                lm, template.tokenizer, name, records, settings, progress, reference
            )
        return logs
    finally:
        lm.model.train(was_training)


def _evaluate_set(
    lm: CausalLM,
    tokenizer: Any,
    name: str,
    tokens: TokenizedSet,
    settings: EvaluationSettings,
    progress: Progress,
    reference: ReferenceStates | None,
) -> Columns:
    right, others = len(tokens.answers), len(tokens.other_answers)

    def report(done: int) -> None:
        progress(name, done, right + others)

    scores = _token_scores(lm, tokens.answers, settings.micro_batch_tokens, report)
    log = _loss_columns(scores) | _memorization_columns(tokens.records, scores)
    if others:
        losses = _losses(
            lm, tokens.other_answers, settings.micro_batch_tokens, lambda n: report(right + n)
        )
        log |= _comparison_columns(tokens, log, losses)
    if reference is not None:
        log["kl_to_reference"] = _kl_to_reference(
            lm, tokens.answers, reference, name, settings.micro_batch_tokens
        )
    if settings.generate and name != HOLDOUT:  # membership needs the losses of the holdout alone
        log |= _generation_columns(lm, tokenizer, name, tokens, settings, progress)
    return log


def _loss_columns(scores: list[TokenScores]) -> Columns:
    tokens = [len(answer.log_probs) for answer in scores]
    losses = [-float(answer.log_probs.sum()) for answer in scores]
    means = [loss / n for loss, n in zip(losses, tokens, strict=True)]
    return {"gt_loss": losses, "num_token_gt": tokens, "avg_gt_loss": means}


def _memorization_columns(records: list[Record], scores: list[TokenScores]) -> Columns:
    return {
        "exact_memorization": [exact_memorization(answer.greedy) for answer in scores],
        "extraction_strength": [extraction_strength(answer.greedy) for answer in scores],
        "min_k": [min_k(answer.log_probs) for answer in scores],
        "min_k_plus_plus": [
            min_k_plus_plus(answer.log_probs, answer.mean, answer.std) for answer in scores
        ],
        "zlib_bytes": [len(zlib.compress(record.answer.encode())) for record in records],
    }


def _comparison_columns(tokens: TokenizedSet, log: Columns, losses: list[float]) -> Columns:
    """Losses of paraphrased and wrong answers, from ``losses`` of all ``other_answers``."""
    columns: Columns = {
        "paraphrased_loss": [], "num_token_paraphrased": [], "avg_paraphrased_loss": [],
        "perturb_loss": [], "num_token_perturb": [], "average_perturb_loss": [],
    }  # fmt: skip
    lengths = [answer.answer_length for answer in tokens.other_answers]
    position = 0  # in other_answers
    for i, record in enumerate(tokens.records):
        loss, n = log["gt_loss"][i], log["num_token_gt"][i]
        if record.paraphrased_answer is not None:
            loss, n = losses[position], lengths[position]
            position += 1
        columns["paraphrased_loss"].append(loss)
        columns["num_token_paraphrased"].append(n)
        columns["avg_paraphrased_loss"].append(loss / n)
        wrong = range(position, position := position + len(record.perturbed_answers))
        columns["perturb_loss"].append([losses[j] for j in wrong])
        columns["num_token_perturb"].append([lengths[j] for j in wrong])
        columns["average_perturb_loss"].append([losses[j] / lengths[j] for j in wrong])
    return columns


@torch.no_grad()
def _token_scores(
    lm: CausalLM,
    answers: list[TokenizedExample],
    micro_batch_tokens: int,
    report: Callable[[int], None],
) -> list[TokenScores]:
    """Scores the tokens of every answer, in the order given."""
    scores: dict[int, TokenScores] = {}
    by_length = sorted(answers, key=lambda answer: len(answer.input_ids))
    for batch in pack(by_length, micro_batch_tokens):
        batch = batch.to(lm.device)
        batch_scores = token_scores(lm.linear_head, lm.hidden(batch), batch.labels)
        lengths = batch.answer_cu_seqlens.diff().tolist()
        scores |= dict(zip(batch.indices, batch_scores.split(lengths), strict=True))
        report(len(scores))
    return [scores[i] for i in range(len(answers))]


@torch.no_grad()
def _losses(
    lm: CausalLM,
    answers: list[TokenizedExample],
    micro_batch_tokens: int,
    report: Callable[[int], None],
) -> list[float]:
    """Negative log-prob of every answer, in the order given."""
    losses = [0.0] * len(answers)
    by_length = sorted(answers, key=lambda answer: len(answer.input_ids))
    done = 0
    for batch in pack(by_length, micro_batch_tokens):
        log_probs = lm.log_probs(batch.to(lm.device))
        sums = segment_sum(log_probs, batch.answer_cu_seqlens).tolist()
        for index, value in zip(batch.indices, sums, strict=True):
            losses[index] = -value
        done += batch.sequences
        report(done)
    return losses


@torch.no_grad()
def _kl_to_reference(
    lm: CausalLM,
    answers: list[TokenizedExample],
    reference: ReferenceStates,
    source: str,
    micro_batch_tokens: int,
) -> list[float]:
    """Mean ``KL(reference || model)`` over the tokens of every answer, in the order given."""
    means = [0.0] * len(answers)
    for batch in pack(answers, micro_batch_tokens):
        hidden = lm.hidden(batch.to(lm.device))
        ref_hidden = reference.hidden(source, batch.indices).to(hidden)
        chunks = divergences(lm.linear_head, hidden, reference.head, ref_hidden)
        kl = torch.cat([kl for _, kl, _ in chunks]).cpu()
        lengths = batch.answer_cu_seqlens.diff().tolist()
        for index, answer_kl in zip(batch.indices, kl.split(lengths), strict=True):
            means[index] = float(answer_kl.mean())
    return means


def _generation_columns(
    lm: CausalLM,
    tokenizer: Any,
    name: str,
    tokens: TokenizedSet,
    settings: EvaluationSettings,
    progress: Progress,
) -> Columns:
    """Greedy answers and their ROUGE."""
    from npo_fast.evaluation.rouge import rouge_scorer  # losses need no rouge_score

    records = tokens.records
    prompts = [list(answer.input_ids[: answer.prompt_length]) for answer in tokens.answers]
    texts = [""] * len(records)
    order = sorted(range(len(records)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), settings.generation_batch):
        batch = order[first : first + settings.generation_batch]
        continuations = generate(
            lm,
            [prompts[i] for i in batch],
            settings.max_new_tokens,
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )
        for i, ids in zip(batch, continuations, strict=True):
            texts[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        progress(f"{name} answers", first + len(batch), len(records))
    pairs = zip(records, texts, strict=True)
    scores = [rouge_scorer(record.answer).score(record.answer, text) for record, text in pairs]
    return {
        "rouge1_recall": [score["rouge1"].recall for score in scores],
        "rougeL_recall": [score["rougeL"].recall for score in scores],
        "generated_text": [
            [tokenizer.decode(prompt), text, record.answer]
            for prompt, text, record in zip(prompts, texts, records, strict=True)
        ],
    }
