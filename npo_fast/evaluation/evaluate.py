"""Loss of every answer, right, paraphrased or wrong, memorisation, ROUGE of greedy answers."""

import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch

from npo_fast.data import Record, Template, TokenizedExample, pack
from npo_fast.evaluation.reference import ReferenceStates
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import Suite
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
from npo_fast.ops import segment_sum

Progress = Callable[[str, int, int], None]  # what, done, total


def evaluate(
    lm: CausalLM,
    template: Template,
    suite: Suite,
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
    reference: ReferenceStates | None = None,
) -> dict[str, dict[str, list[Any]]]:
    """One log a data set, in TOFU's form (see ``npo_fast.metrics``).

    Losses are sums and means of the negative log-prob of answer tokens, the closing
    end-of-sequence token among them. Where a record has no paraphrase, its answer stands in, as in
    TOFU's real authors and world facts. ROUGE is the recall of the greedy answer
    (``rouge_scorer``).
    Beside TOFU's columns stand those of ``npo_fast.metrics.memorization``, and with ``reference``
    (taken of the same suite) ``kl_to_reference``, the mean KL(reference || model) over answer
    tokens.
    """
    settings = settings or EvaluationSettings()
    was_training = lm.model.training
    lm.model.eval()
    try:
        return {
            name: _evaluate_records(lm, template, records, settings, name, progress, reference)
            for name, records in suite.items()
        }
    finally:
        lm.model.train(was_training)


def _evaluate_records(
    lm: CausalLM,
    template: Template,
    records: list[Record],
    settings: EvaluationSettings,
    name: str,
    progress: Progress | None,
    reference: ReferenceStates | None,
) -> dict[str, list[Any]]:
    truths, cut = template.encode_all(records)
    if cut:
        warnings.warn(
            f"{name}: {cut} of {len(records)} answers are cut to max_length {template.max_length}, "
            "and measured as far as they go",
            stacklevel=4,
        )
    compares = all(record.perturbed_answers for record in records)
    others = _other_answers(template, records) if compares else []
    whole = len(truths) + len(others)
    scores = _token_scores(lm, truths, settings, lambda n: _tell(progress, name, n, whole))
    log = _losses_of(scores) | _memorization(records, scores)
    if compares:
        losses = _losses(
            lm, others, settings, lambda n: _tell(progress, name, len(truths) + n, whole)
        )
        log |= _comparison(records, log, others, losses)
    if reference is not None:
        log["kl_to_reference"] = reference.divergence(lm, truths, name, settings.micro_batch_tokens)
    if settings.generate and name != HOLDOUT:  # its losses are all that membership looks at
        log |= _generations(lm, template, records, settings, name, progress)
    return log


def _other_answers(template: Template, records: list[Record]) -> list[TokenizedExample]:
    """The paraphrase of a record, where it has one, and its wrong answers; then the next one's."""
    found: list[TokenizedExample] = []
    for record in records:
        paraphrase = record.paraphrased_answer
        for answer in ([] if paraphrase is None else [paraphrase]) + list(record.perturbed_answers):
            found.append(template.encode(record, len(found), answer))
    return found


def _losses_of(scores: list[TokenScores]) -> dict[str, list[Any]]:
    tokens = [len(one.log_probs) for one in scores]
    losses = [-float(one.log_probs.sum()) for one in scores]
    means = [loss / n for loss, n in zip(losses, tokens, strict=True)]
    return {"gt_loss": losses, "num_token_gt": tokens, "avg_gt_loss": means}


def _memorization(records: list[Record], scores: list[TokenScores]) -> dict[str, list[Any]]:
    """Columns of ``npo_fast.metrics.memorization``, from the tokens of the right answers."""
    return {
        "exact_memorization": [exact_memorization(one.greedy) for one in scores],
        "extraction_strength": [extraction_strength(one.greedy) for one in scores],
        "min_k": [min_k(one.log_probs) for one in scores],
        "min_k_plus_plus": [min_k_plus_plus(one.log_probs, one.mean, one.std) for one in scores],
        "zlib_bytes": [len(zlib.compress(record.answer.encode())) for record in records],
    }


def _comparison(
    records: list[Record],
    log: dict[str, list[Any]],
    others: list[TokenizedExample],
    losses: list[float],
) -> dict[str, list[Any]]:
    """Paraphrased and wrong answers, as TOFU logs them."""
    found: dict[str, list[Any]] = {
        "paraphrased_loss": [], "num_token_paraphrased": [], "avg_paraphrased_loss": [],
        "perturb_loss": [], "num_token_perturb": [], "average_perturb_loss": [],
    }  # fmt: skip
    at = 0
    for i, record in enumerate(records):
        loss, n = log["gt_loss"][i], log["num_token_gt"][i]
        if record.paraphrased_answer is not None:
            loss, n = losses[at], others[at].answer_length
            at += 1
        found["paraphrased_loss"].append(loss)
        found["num_token_paraphrased"].append(n)
        found["avg_paraphrased_loss"].append(loss / n)
        wrong = range(at, at := at + len(record.perturbed_answers))
        found["perturb_loss"].append([losses[j] for j in wrong])
        found["num_token_perturb"].append([others[j].answer_length for j in wrong])
        found["average_perturb_loss"].append([losses[j] / others[j].answer_length for j in wrong])
    return found


@torch.no_grad()
def _token_scores(
    lm: CausalLM,
    sequences: list[TokenizedExample],
    settings: EvaluationSettings,
    done: Callable[[int], None],
) -> list[TokenScores]:
    """Of every sequence's answer, in the order given."""
    scores: dict[int, TokenScores] = {}
    by_length = sorted(sequences, key=lambda s: len(s.input_ids))
    for batch in pack(by_length, settings.micro_batch_tokens):
        batch = batch.to(lm.device)
        found = token_scores(lm.linear_head, lm.hidden(batch), batch.labels)
        parts = found.split(batch.answer_cu_seqlens.diff().tolist())
        scores |= dict(zip(batch.indices, parts, strict=True))
        done(len(scores))
    return [scores[i] for i in range(len(sequences))]


@torch.no_grad()
def _losses(
    lm: CausalLM,
    sequences: list[TokenizedExample],
    settings: EvaluationSettings,
    done: Callable[[int], None],
) -> list[float]:
    """Negative log-prob of every sequence's answer, in the order given."""
    losses = [0.0] * len(sequences)
    by_length = sorted(sequences, key=lambda s: len(s.input_ids))
    finished = 0
    for batch in pack(by_length, settings.micro_batch_tokens):
        log_probs = lm.log_probs(batch.to(lm.device))
        sums = segment_sum(log_probs, batch.answer_cu_seqlens).tolist()
        for index, value in zip(batch.indices, sums, strict=True):
            losses[index] = -value
        finished += batch.sequences
        done(finished)
    return losses


def _generations(
    lm: CausalLM,
    template: Template,
    records: list[Record],
    settings: EvaluationSettings,
    name: str,
    progress: Progress | None,
) -> dict[str, list[Any]]:
    from npo_fast.evaluation.rouge import rouge_scorer  # losses need no rouge_score

    tokenizer = template.tokenizer
    prompts = [template.prompt_ids(record) for record in records]
    texts = [""] * len(records)
    order = sorted(range(len(records)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), settings.generation_batch):
        chunk = order[first : first + settings.generation_batch]
        continuations = generate(
            lm,
            [prompts[i] for i in chunk],
            settings.max_new_tokens,
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )
        for i, ids in zip(chunk, continuations, strict=True):
            texts[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        _tell(progress, f"{name} answers", first + len(chunk), len(records))
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


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
