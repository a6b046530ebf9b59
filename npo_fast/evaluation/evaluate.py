"""Loss of every answer, right, paraphrased or wrong, and ROUGE of greedy generations."""

from collections.abc import Callable
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer

from npo_fast.data import Record, Sequence, Template, pack
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import Suite
from npo_fast.model.causal_lm import CausalLM
from npo_fast.ops import segment_sum

Progress = Callable[[str, int, int], None]  # what, done, total


def evaluate(
    lm: CausalLM,
    template: Template,
    suite: Suite,
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, list[Any]]]:
    """One log a data set, in TOFU's form (see ``npo_fast.metrics``).

    Losses are sums and means of the negative log-prob of answer tokens, the closing
    end-of-sequence token among them. Where a record has no paraphrase, its answer stands in, as in
    TOFU's real authors and world facts. ROUGE is the recall of the greedy answer, stemmed.
    """
    settings = settings or EvaluationSettings()
    was_training = lm.model.training
    lm.model.eval()
    try:
        return {
            name: _evaluate_records(lm, template, records, settings, name, progress)
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
) -> dict[str, list[Any]]:
    answers: list[str] = []
    owners: list[int] = []
    for i, record in enumerate(records):
        own = [record.answer, *record.perturbed_answers]
        if record.paraphrased_answer is not None:
            own.insert(1, record.paraphrased_answer)
        answers += own
        owners += [i] * len(own)
    sequences = [
        template.encode(records[owner], index, answer)
        for index, (owner, answer) in enumerate(zip(owners, answers, strict=True))
    ]
    losses = _losses(lm, sequences, settings, lambda n: _tell(progress, name, n, len(sequences)))
    tokens = [s.answer_length for s in sequences]

    log: dict[str, list[Any]] = {"gt_loss": [], "num_token_gt": [], "avg_gt_loss": []}
    if all(record.perturbed_answers for record in records):
        names = ("paraphrased_loss", "num_token_paraphrased", "avg_paraphrased_loss")
        log |= {key: [] for key in names}
        log |= {key: [] for key in ("perturb_loss", "num_token_perturb", "average_perturb_loss")}
    at = 0
    for record in records:
        paraphrase = at + (record.paraphrased_answer is not None)
        stop = paraphrase + 1 + len(record.perturbed_answers)
        _append(log, "gt_loss", "num_token_gt", "avg_gt_loss", losses[at], tokens[at])
        if "perturb_loss" in log:
            _append(log, *names, losses[paraphrase], tokens[paraphrase])
            wrong, lengths = losses[paraphrase + 1 : stop], tokens[paraphrase + 1 : stop]
            log["perturb_loss"].append(wrong)
            log["num_token_perturb"].append(lengths)
            means = [loss / n for loss, n in zip(wrong, lengths, strict=True)]
            log["average_perturb_loss"].append(means)
        at = stop
    if settings.generate:
        log |= _generations(lm, template, records, settings, name, progress)
    return log


def _append(
    log: dict[str, list[Any]], loss_key: str, count_key: str, mean_key: str, loss: float, n: int
) -> None:
    log[loss_key].append(loss)
    log[count_key].append(n)
    log[mean_key].append(loss / n)


@torch.no_grad()
def _losses(
    lm: CausalLM,
    sequences: list[Sequence],
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
    tokenizer = template.tokenizer
    prompts = [template.prompt_ids(record) for record in records]
    texts = [""] * len(records)
    order = sorted(range(len(records)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), settings.generation_batch):
        chunk = order[first : first + settings.generation_batch]
        continuations = lm.generate(
            [prompts[i] for i in chunk],
            settings.max_new_tokens,
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )
        for i, ids in zip(chunk, continuations, strict=True):
            texts[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        _tell(progress, f"{name} answers", first + len(chunk), len(records))
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    pairs = zip(records, texts, strict=True)
    scores = [scorer.score(record.answer, text) for record, text in pairs]
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
