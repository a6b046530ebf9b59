"""Evaluates a model on a suite of records: losses, memorization, ROUGE of greedy answers."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from npo_fast.data import (
    PackedBatch,
    Record,
    Template,
    TokenizedExample,
    check_readable,
)
from npo_fast.errors import named
from npo_fast.evaluation.gradients import gradient_norms
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import TokenizedSet, tokenize_set
from npo_fast.evaluation.tokens import TokenScores, token_scores
from npo_fast.metrics.logs import CONVENTIONS, FORGET, HOLDOUT, REPHRASED, VOCABULARY
from npo_fast.metrics.memorization import repetition
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.generation import check_length, generate
from npo_fast.model.reference_states import ReferenceStates
from npo_fast.ops import segment_sum
from npo_fast.ops.linear_kl import divergences

Progress = Callable[[str, int, int], None]  # what, done, total
Columns = dict[str, Any]  # lists, and the conventions that they follow


@torch.no_grad()
def evaluate(
    lm: CausalLM,
    template: Template,
    suite: Mapping[str, list[Record] | TokenizedSet],
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
    reference: ReferenceStates | None = None,
    generated: dict[str, list[TokenizedExample]] | None = None,
) -> dict[str, Columns]:
    """Returns one log a data set, in TOFU's form (see ``npo_fast.metrics.logs``).

    Losses are sums and means of the negative log-prob of answer tokens, the closing
    end-of-sequence token among them. Where a record has no paraphrase, its answer takes the place,
    as in TOFU's real authors and world facts. ROUGE is the recall of the greedy answer
    (``rouge_scorer``). Logs also have the columns of ``npo_fast.metrics.memorization``, and the
    conventions of ``settings`` that these follow.

    Args:
        suite: records by log name, plain or from ``tokenize_suite``, which tokenises them once for
            several evaluations.
        progress: is called with what is measured, how many answers are done, and of how many.
        reference: states of the reference on the right answers of the same suite, by log name, at
            the positions "answer". Adds ``kl_to_reference``, the mean KL(reference || model) over
            answer tokens, and ``avg_reference_loss``, the mean loss a token under the reference.
        generated: takes the generated answers as tokens, by log name, those that are not empty.
    """
    settings = settings or EvaluationSettings()
    progress = progress or (lambda what, done, total: None)
    logs = {}
    evaluations = []
    for name, records in suite.items():
        if not isinstance(records, TokenizedSet):
            records = tokenize_set(template, name, records)
        evaluations.append(_Evaluation(lm, template, settings, progress, reference, name, records))
    for evaluation in evaluations:  # before any is measured
        evaluation.check()
    with lm.evaluating():
        for evaluation in evaluations:
            logs[evaluation.name] = evaluation.log()
            if generated is not None:
                generated[evaluation.name] = evaluation.generated
    return logs


@dataclass
class _Evaluation:
    """The evaluation of one data set, and how many of its answers are measured."""

    lm: CausalLM
    template: Template
    settings: EvaluationSettings
    progress: Progress
    reference: ReferenceStates | None
    name: str
    tokens: TokenizedSet
    done: int = 0
    generated: list[TokenizedExample] = field(default_factory=list)
    rephrased: list[TokenizedExample] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Tokenises the questions in other words, where every record has one."""
        records = [record.rephrased for record in self.tokens.records]
        if self.settings.paraphrased_questions and None not in records:
            with named(f"{self.name}, paraphrased question"):
                self.rephrased = self.template.encode_all(filter(None, records))[0]

    @property
    def answers_questions(self) -> bool:
        """Whether the model answers by itself; membership takes its losses alone."""
        return self.settings.generate and self.name != HOLDOUT

    def check(self) -> None:
        """Raises ``UserError`` for what the model cannot read, or has no room to answer."""
        read = {
            self.name: self.tokens.answers,
            f"{self.name}, paraphrased and wrong answers:": self.tokens.other_answers,
            f"{self.name}, paraphrased questions:": self.rephrased,
        }
        check_readable(read, self.lm.vocabulary, self.lm.positions)
        if self.answers_questions:
            prompts = [*self.tokens.prompts, *map(_prompt, self.rephrased)]
            check_length(self.lm, prompts, self.settings.max_new_tokens)

    def log(self) -> Columns:
        """Every column."""
        log = self.answer_columns()
        if self.tokens.other_answers:
            log |= self.comparison_columns(log)
        if self.reference is not None:
            log |= self.reference_columns(self.reference)
        if self.settings.gradient_norms and self.name in (FORGET, HOLDOUT):
            log["gradient_norm"] = self.gradient_norms()
        if self.answers_questions:
            log |= self.generation_columns(self.tokens.prompts, keep=True)
        if self.rephrased:
            log |= self.rephrased_columns()
        return log

    def batches(self, answers: list[TokenizedExample]) -> Iterator[PackedBatch]:
        """Packs of answers of similar length, on the model's device."""
        total = len(self.tokens.answers) + len(self.tokens.other_answers)
        by_length = sorted(answers, key=lambda answer: len(answer.input_ids))
        self.progress(self.name, self.done, total)
        for batch in self.lm.micro_batches(by_length, self.settings.micro_batch_tokens):
            yield batch
            self.done += batch.sequences
            self.progress(self.name, self.done, total)

    def answer_columns(self) -> Columns:
        """Losses and memorization of the right answers."""
        by_index: dict[int, TokenScores] = {}
        for batch in self.batches(self.tokens.answers):
            scores = token_scores(self.lm.linear_head, self.lm.hidden(batch), batch.labels)
            lengths = batch.answer_cu_seqlens.diff().tolist()
            by_index |= zip(batch.indices, scores.split(lengths), strict=True)
        answers = [by_index[i] for i in range(len(by_index))]
        tokens = [len(answer.log_probs) for answer in answers]
        losses = [-float(answer.log_probs.sum()) for answer in answers]
        memorization = [
            self.settings.columns(
                answer.greedy, answer.log_probs, answer.mean, answer.std, self.is_closed(example)
            )
            for answer, example in zip(answers, self.tokens.answers, strict=True)
        ]
        return {
            "gt_loss": losses,
            "num_token_gt": tokens,
            "avg_gt_loss": [loss / n for loss, n in zip(losses, tokens, strict=True)],
            **{name: [values[name] for values in memorization] for name in memorization[0]},
            "zlib_bytes": [len(zlib.compress(r.answer.encode())) for r in self.tokens.records],
            CONVENTIONS: self.settings.entry(),
            VOCABULARY: self.lm.vocabulary,
        }

    def is_closed(self, example: TokenizedExample) -> bool:
        """Whether the answer ends in the token that ends a turn: it was not cut before."""
        return example.input_ids[-1] in self.template.stop_ids

    def comparison_columns(self, log: Columns) -> Columns:
        """Losses of paraphrased and wrong answers, beside those of right answers in ``log``."""
        answers = self.tokens.other_answers
        losses = self.losses(answers)
        others = ((losses[i], answer.answer_length) for i, answer in enumerate(answers))
        rows = []
        for i, record in enumerate(self.tokens.records):
            loss, n = log["gt_loss"][i], log["num_token_gt"][i]
            if record.paraphrased_answer is not None:
                loss, n = next(others)
            wrong = list(islice(others, len(record.perturbed_answers)))
            rows.append({
                "paraphrased_loss": loss,
                "num_token_paraphrased": n,
                "avg_paraphrased_loss": loss / n,
                "perturb_loss": [loss for loss, _ in wrong],
                "num_token_perturb": [n for _, n in wrong],
                "average_perturb_loss": [loss / n for loss, n in wrong],
            })  # fmt: skip
        return {name: [row[name] for row in rows] for name in rows[0]}

    def losses(self, answers: list[TokenizedExample]) -> dict[int, float]:
        """The loss of each answer, summed over its tokens, by its index."""
        losses: dict[int, float] = {}
        for batch in self.batches(answers):
            log_probs = segment_sum(self.lm.log_probs(batch), batch.answer_cu_seqlens)
            losses |= zip(batch.indices, (-log_probs).tolist(), strict=True)
        return losses

    def rephrased_columns(self) -> Columns:
        """Loss and ROUGE of the right answers to the questions in other words."""
        answers = self.rephrased
        losses = self.losses(answers)
        columns = {"avg_gt_loss": [losses[i] / a.answer_length for i, a in enumerate(answers)]}
        if self.settings.generate:
            columns |= self.generation_columns([*map(_prompt, answers)])
        kept = ("avg_gt_loss", "rougeL_recall", "rougeL_f1", "generated_text")
        return {f"{name}{REPHRASED}": columns[name] for name in kept if name in columns}

    def gradient_norms(self) -> list[float]:
        """Norm of the gradient of each right answer's mean loss, one answer at a time."""
        norms: list[float] = []
        self.progress(f"{self.name} gradients", 0, len(self.tokens.answers))
        for example in self.tokens.answers:
            counted = self.settings.counted(example.answer_length, self.is_closed(example))
            norms.append(self.settings.gradient_norm(gradient_norms(self.lm, example, counted)))
            self.progress(f"{self.name} gradients", len(norms), len(self.tokens.answers))
        return norms

    def reference_columns(self, reference: ReferenceStates) -> Columns:
        """Mean ``KL(reference || model)`` and the reference's loss over each answer's tokens."""
        means: dict[int, tuple[float, float]] = {}
        for batch in self.lm.micro_batches(self.tokens.answers, self.settings.micro_batch_tokens):
            hidden, ref_hidden = self.lm.hidden(batch), reference.hidden(self.name, batch.indices)
            head, ref_head = self.lm.linear_head, reference.head
            chunks = divergences(head, hidden, ref_head, ref_hidden.to(hidden))
            kl = torch.cat([kl for _, kl, _ in chunks]).cpu()
            log_probs = ref_head.log_probs(ref_hidden, batch.labels).cpu()
            lengths = batch.answer_cu_seqlens.diff().tolist()
            parts = zip(kl.split(lengths), log_probs.split(lengths), strict=True)
            pairs = ((float(a.mean()), -float(b.mean())) for a, b in parts)
            means |= zip(batch.indices, pairs, strict=True)
        in_order = [means[i] for i in range(len(means))]
        return {
            "kl_to_reference": [kl for kl, _ in in_order],
            "avg_reference_loss": [loss for _, loss in in_order],
        }

    def generation_columns(self, prompts: list[list[int]], keep: bool = False) -> Columns:
        """Greedy answers to the prompts, one a record, and their ROUGE.

        Args:
            keep: whether they become ``generated``.
        """
        from npo_fast.evaluation.rouge import rouge_scorer  # losses need no rouge_score

        template, size = self.template, self.settings.generation_batch * self.lm.world_size
        truths = [*self.tokens.truths]
        texts, endings = [""] * len(truths), [""] * len(truths)
        repeated = [0.0] * len(truths)
        order = sorted(range(len(truths)), key=lambda i: len(prompts[i]))
        self.progress(f"{self.name} answers", 0, len(truths))
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            continuations = generate(
                self.lm, [prompts[i] for i in batch], self.settings.max_new_tokens,
                template.tokenizer.pad_token_id, template.stop_ids,
            )  # fmt: skip
            for i, ids in zip(batch, continuations, strict=True):
                repeated[i] = repetition(ids)
                if keep and ids:
                    whole = (*prompts[i], *ids)
                    self.generated.append(TokenizedExample(whole, len(prompts[i]), i))
                following = self.tokens.following.get(i, [])[: self.settings.max_new_tokens]
                if following:  # a text ends nowhere: as many tokens are compared as are known
                    texts[i], truths[i] = (
                        template.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                        for tokens in (ids[: len(following)], following)
                    )
                else:
                    texts[i], endings[i] = template.answer_text(ids, self.settings.max_new_tokens)
            self.progress(f"{self.name} answers", first + len(batch), len(truths))
        pairs = zip(truths, texts, strict=True)
        scores = [rouge_scorer(truth).score(truth, text) for truth, text in pairs]
        questions = [template.tokenizer.decode(prompt) for prompt in prompts]
        return {
            "rouge1_recall": [score["rouge1"].recall for score in scores],
            "rougeL_recall": [score["rougeL"].recall for score in scores],
            "rougeL_f1": [score["rougeL"].fmeasure for score in scores],
            "repetition": repeated,
            "generated_text": [list(row) for row in zip(questions, texts, truths, strict=True)],
            **({"ending": endings} if any(endings) else {}),
        }


def _prompt(example: TokenizedExample) -> list[int]:
    return list(example.input_ids[: example.prompt_length])
