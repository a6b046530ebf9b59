"""The paper's headline at full size on one GPU: SmolLM2-135M forgets half of TOFU, and a tenth.

    python benchmarks/gpu_tofu.py --budget-s 420 --out DIR --gguf PART [PART] --tofu FOLDER

A model is taught all 4000 questions of TOFU, others only what is to be kept (retrained), and each
method makes the taught one forget. All are measured on every record with wrong answers (400 to
forget, 400 to keep, real authors, world facts), and by ROUGE on 100 greedy answers of each.
``DIR/gpu_tofu.json`` and ``.md`` are rewritten after each model: the run may be cut off anywhere.

**Order of worth.** The taught model; for half of TOFU, then for a tenth, the retrained one, NPO+RT
and GA+RT: the paper's claim and what it is measured against. Then the other methods on half of it,
then on a tenth. A model that would take longer than what is left of the budget, by the speed of
those before it, is left out with its reason; a smaller one may still fit.

**Rates.** Teaching: the paper's 1e-5 for 7B is far too low for 135M. ``forget_half.py`` teaches at
1e-4, with eight looks at each question, in batches of 8. Batches of 32 halve what Adam lets one
question do in a step, and looks are five: about 5e-4. While the taught model gives the forget
answers a mean probability below ``--known``, it is taught anew at twice the rate, at most twice.
Unlearning: each method starts at the rate that ``forget_half.py`` found for it. Below a forget
quality of 0.05 it runs once more, at three times the rate where the forget answers are still
likelier than under the retrained model, else at a third: at once for NPO+RT and GA+RT, for others
at the end. Both attempts stand in the table.

**Precision.** fp32 weights and AdamW states, products in TF32. bf16 weights would lose steps of
this size, and autocast casts every weight in every pass, in a step of 2000 tokens that waits for
kernel launches anyway. For the same reason training takes the faster of two attentions, measured
first: one call a length, or one call with the mask of the whole pack.

Needs torch, transformers, gguf, scipy, and rouge-score for ROUGE and model utility, which are left
out without it. ``--tiny --device cpu``: all of it in seconds, with a random model and a toy world.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, not installed

from npo_fast import metrics
from npo_fast.bench.provenance import provenance
from npo_fast.data import (
    Record,
    Template,
    TokenizedExample,
    load_records,
    load_refusals,
    pack,
    refused,
)
from npo_fast.errors import NonFiniteError, UserError
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import tofu_suite
from npo_fast.experiments.demo.dataset import make_dataset
from npo_fast.experiments.demo.tiny_model import new_model, train_tokenizer, weights
from npo_fast.methods import FINETUNE, Coefficients, Term, build_method
from npo_fast.metrics.evidence import MEANINGFUL
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.load import load_model, load_tokenizer
from npo_fast.model.probe import run_probe
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.order import batch_keys, step_count
from npo_fast.trainer.settings import StepRecord, TrainSettings

ORIGINAL, RETRAINED = "original", "retrained"
RETAIN_OF = {"forget50": "retain50", "forget10": "retain90"}
RETAIN_COEFFICIENT = {"forget50": 5.0, "forget10": 1.0}  # the paper's
HEADLINE = ("NPO+RT", "GA+RT")
OTHERS = ("NPO", "SimNPO+RT", "DPO+RT", "IDK+RT", "GA")
RATES = {  # of benchmarks/results/forget_half.json
    "NPO+RT": 1.8e-4, "GA+RT": 6e-5, "NPO": 2e-5, "SimNPO+RT": 1.8e-4, "DPO+RT": 1.8e-4,
    "IDK+RT": 1.8e-4, "GA": 6e-5,
}  # fmt: skip
NOTCH = 3.0
TEACHINGS = 3  # at most
PATHS = ("out", "gguf", "tofu")  # options that say nothing elsewhere
ROUGE_COLUMNS = ("rouge1_recall", "rougeL_recall", "generated_text")
TINY = {
    "batch_size": 4, "teach_epochs": 2, "epochs": 2, "look_every": 1, "rouge_records": 2,
    "max_new_tokens": 4, "micro_batch_tokens": 2048, "teach_lr": 1e-3,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One model to make and measure."""

    method: str
    forget: str = ""  # the split; the taught model forgets none
    lr: float | None = None  # None: as the taught model was
    attempt: int = 1

    @property
    def taught_on(self) -> str | None:
        """The split that it is taught, where it is not to forget."""
        return {ORIGINAL: "full", RETRAINED: RETAIN_OF.get(self.forget)}.get(self.method)

    @property
    def terms(self) -> tuple[Term, ...]:
        if self.taught_on:
            return FINETUNE
        coefficients = Coefficients(retain=RETAIN_COEFFICIENT[self.forget])
        return build_method(self.method, coefficients.for_method(self.method))


def order_of_worth(teach_lr: float) -> list[Job]:
    jobs = [Job(ORIGINAL, lr=teach_lr)]
    for forget in RETAIN_OF:
        jobs += [Job(RETRAINED, forget), *(Job(m, forget, RATES[m]) for m in HEADLINE)]
    return jobs + [Job(m, forget, RATES[m]) for forget in RETAIN_OF for m in OTHERS]


class BudgetSpentError(Exception):
    """The time was over in the middle of a model."""


class CachedTemplate(Template):
    """Encodes a text once: the same questions are asked of every model."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, "plain")
        self._tokens: dict[tuple[Record, str | None], tuple[list[int], int]] = {}

    def tokenize(self, record: Record, answer: str | None = None) -> tuple[list[int], int]:
        key = (record, answer)
        if key not in self._tokens:
            self._tokens[key] = super().tokenize(record, answer)
        return self._tokens[key]


class Experiment:
    """The models in their order, each from weights kept in memory, and the record of them."""

    def __init__(
        self, options: argparse.Namespace, lm: CausalLM, tokenizer: Any, tofu: str, deadline: float
    ) -> None:
        self.options, self.lm, self.tofu, self.deadline = options, lm, tofu, deadline
        self.template = CachedTemplate(tokenizer)
        # TOFU's records with wrong answers are the same for all of its splits
        self.suite = tofu_suite(tofu, "forget10", "retain90")
        self.rouge = importlib.util.find_spec("rouge_score") is not None
        self.pretrained = weights(lm)
        self.taught: dict[str, torch.Tensor] = {}
        self.taught_at = options.teach_lr
        self.results: dict[str, metrics.Result] = {}  # of the taught and the retrained models
        self.pass_s = self.evaluate_s = self.look_s = 0.0  # of the last model
        self.content: dict[str, Any] = {
            "finished": False, "models": [], "left_out": [],
            "settings": {k: v for k, v in vars(options).items() if k not in PATHS},
            "precision": "fp32 weights, TF32 products",
            "rouge": "rouge_score" if self.rouge else "left out: rouge_score is not installed",
            "records": {name: len(records) for name, records in self.suite.items()},
            **provenance(),
        }  # fmt: skip
        self.split = functools.cache(self._split)

    def run(self) -> None:
        timed = self._attention_ms()
        self.training_attention = min(timed, key=timed.__getitem__)
        self.content["attention_ms"] = timed
        jobs = deque(order_of_worth(self.options.teach_lr))
        while jobs:
            job = jobs.popleft()
            if why := self._no_room(job):
                self._leave_out(job, why)
                continue
            try:
                record = self._model(job)
            except (BudgetSpentError, UserError) as error:
                self._leave_out(job, str(error))
                continue
            self.content["models"].append(record)
            self.save()
            print(_row(record), flush=True)
            retrained = self.results[job.forget]  # of the taught model: itself
            if again := once_more(job, record["numbers"], retrained, self.options.known):
                at_once = job.method in (ORIGINAL, *HEADLINE)
                (jobs.appendleft if at_once else jobs.append)(again)
        self.content["finished"] = True
        self.save()

    def save(self) -> None:
        spent_s = self.options.budget_s - (self.deadline - time.monotonic())
        content = {**self.content, "spent_s": spent_s}
        folder = self.options.out
        replace_text(folder / "gpu_tofu.json", json.dumps(content, indent=1, ensure_ascii=False))
        replace_text(folder / "gpu_tofu.md", table(content))

    def _leave_out(self, job: Job, reason: str) -> None:
        self.content["left_out"].append({**vars(job), "reason": reason})
        self.save()
        print(f"{job.method} {job.forget}: left out, {reason}", flush=True)

    def _no_room(self, job: Job) -> str | None:
        """Why this model cannot be made."""
        if job.method != ORIGINAL and not self.taught:
            return "there is no taught model"
        if not job.taught_on and job.forget not in self.results:
            return "there is no retrained model"
        steps, passes, looks = self._size(job)
        needed_s = steps * passes * self.pass_s + looks * self.look_s + self.evaluate_s
        left_s = self.deadline - time.monotonic()
        if needed_s > left_s:
            return f"it takes about {needed_s:.0f} s, and {max(0, left_s):.0f} s are left"
        return None

    def _size(self, job: Job) -> tuple[int, int, int]:
        """Steps, sources that a step passes through the model, and looks at the forget set."""
        options = self.options
        epochs = options.teach_epochs if job.taught_on else options.epochs
        settings = TrainSettings(epochs=epochs, batch_size=options.batch_size)
        steps = step_count(len(self.split(job.taught_on or job.forget)), settings)
        looks = (epochs - 1) // options.look_every if options.look_every and job.forget else 0
        return steps, sum(map(len, batch_keys(job.terms))), 0 if job.taught_on else looks

    def _split(self, name: str) -> list[TokenizedExample]:
        records = load_records(name.removesuffix(" refused"), self.tofu)
        if name.endswith(" refused"):
            records = refused(records, load_refusals(data=self.tofu), self.options.seed)
        return self.template.encode_all(records)[0]

    def _model(self, job: Job) -> dict[str, Any]:
        """Makes one model and measures it."""
        options, lm, terms = self.options, self.lm, job.terms
        steps, passes, _ = self._size(job)
        if job.taught_on:
            sources = {"train": self.split(job.taught_on)}
        else:
            names = {"forget": job.forget, "retain": RETAIN_OF[job.forget]}
            names["idk"] = f"{job.forget} refused"
            sources = {source: self.split(name) for source, name in names.items()}
        settings = TrainSettings(
            epochs=options.teach_epochs if job.taught_on else options.epochs,
            lr=job.lr or self.taught_at,
            batch_size=options.batch_size,
            micro_batch_tokens=options.micro_batch_tokens,
            seed=options.seed,
        )
        if lm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(lm.device)
        lm.model.load_state_dict(self.pretrained if job.taught_on else self.taught)

        started, looked_s = time.monotonic(), 0.0
        lm.choose_attention("auto")
        by_length = {k: sorted(v, key=lambda s: len(s.input_ids)) for k, v in sources.items()}
        references = reference_log_probs(lm, by_length, terms, options.micro_batch_tokens)
        lm.choose_attention(self.training_attention)
        course: list[dict[str, float | None]] = []
        last, tokens, stopped = None, 0, None
        try:
            for last in train(lm, sources, terms, settings, references):
                tokens += last.tokens
                if time.monotonic() + self.evaluate_s > self.deadline:
                    raise BudgetSpentError(f"the time was over at step {last.step} of {steps}")
                if not job.taught_on and self._look_due(last, settings.epochs):
                    looking = time.monotonic()
                    course.append(self._look(last, self.results[job.forget]))
                    self.look_s = time.monotonic() - looking
                    looked_s += self.look_s
        except NonFiniteError as error:  # the weights are those of the step before
            stopped = str(error)
        train_s = time.monotonic() - started - looked_s
        if stopped is None:
            self.pass_s = train_s / (steps * passes)

        started = time.monotonic()
        result = self._measure()
        self.evaluate_s = time.monotonic() - started
        if job.method == ORIGINAL:
            self.taught, self.taught_at = weights(lm), settings.lr
        if job.taught_on:
            self.results[job.forget] = result
        retrained = self.results[job.forget] if job.forget else None
        ratios = metrics.truth_ratio(result[metrics.FORGET])
        record = {
            **vars(job), "lr": settings.lr,
            "epochs": settings.epochs, "steps": last.step if last else 0, "stopped": stopped,
            "terms": {term.name: term.coefficient for term in terms},
            "final_terms": finite(last.terms if last else {}),
            "tokens": tokens, "tokens_per_s": tokens / train_s,
            "train_s": train_s, "looks_s": looked_s, "evaluate_s": self.evaluate_s,
            "peak_mib": peak_mib(lm.device),
            "course": course,
            "numbers": finite(metrics.summary(result, retrained)),
            "forget_truth_ratio": [float(f"{x:.4g}") for x in ratios if math.isfinite(x)],
            "answers": result[metrics.FORGET].get("generated_text", [])[:3],
        }  # fmt: skip
        if job.method == RETRAINED:  # 1 by definition; what the taught model has says more
            quality = metrics.forget_quality(self.results[""], result)
            record["forget_quality_of_original"] = quality
        return record

    def _look_due(self, record: StepRecord, epochs: int) -> bool:
        every = self.options.look_every
        done = round(record.epoch)
        return bool(every) and record.epoch == done < epochs and done % every == 0

    def _look(self, record: StepRecord, retrained: metrics.Result) -> dict[str, float | None]:
        """What is forgotten by now."""
        numbers = metrics.summary(self._losses([metrics.FORGET]), retrained)
        self.lm.choose_attention(self.training_attention)
        kept = ("forget quality", "forget probability")
        return finite({"epoch": record.epoch} | {name: numbers[name] for name in kept})

    def _losses(self, names: list[str]) -> dict[str, dict[str, list[Any]]]:
        """Sequences are sorted by length here: one call of attention a length is the best."""
        self.lm.choose_attention("auto")
        settings = EvaluationSettings(self.options.micro_batch_tokens, generate=False)
        return evaluate(self.lm, self.template, {n: self.suite[n] for n in names}, settings)

    def _measure(self) -> dict[str, dict[str, list[Any]]]:
        """Losses on all records, answers to some; one batch of all sets answers the fastest."""
        result = self._losses(list(self.suite))
        if not self.rouge:
            return result
        wanted = self.options.rouge_records
        asked = {
            name: [Record(r.messages, r.answer) for r in records[:: -(-len(records) // wanted)]]
            for name, records in self.suite.items()
        }
        together = [record for records in asked.values() for record in records]
        settings = EvaluationSettings(
            self.options.micro_batch_tokens, len(together), self.options.max_new_tokens
        )
        log = evaluate(self.lm, self.template, {metrics.FORGET: together}, settings)[metrics.FORGET]
        first = 0
        for name, records in asked.items():
            rows = slice(first, first := first + len(records))
            result[name] |= {column: log[column][rows] for column in ROUGE_COLUMNS}
        return result

    def _attention_ms(self) -> dict[str, float]:
        """Forward and backward of one batch by each attention that keeps its sequences apart."""
        lm, found = self.lm, {}
        sequences = self.split("forget10")[: self.options.batch_size]
        batch = next(pack(sequences, self.options.micro_batch_tokens)).to(lm.device)
        for name in dict.fromkeys((lm.attention, lm.native_attention)):
            lm.choose_attention(name)
            torch.set_float32_matmul_precision("highest")  # the probe compares to 2e-3 nats
            run_probe(lm, any_attention=False)
            torch.set_float32_matmul_precision("high")
            if not lm.packs:  # it would take sequences one at a time
                lm.packs = True
                continue
            for _ in range(4):  # the first ones warm up
                started = time.monotonic()
                lm.log_probs(batch).sum().backward()
                float(lm.head.weight.grad[0, 0])  # waits for the device
                found[name] = 1e3 * (time.monotonic() - started)
                lm.model.zero_grad(set_to_none=True)
        return found


def once_more(
    job: Job, numbers: dict[str, Any], retrained: metrics.Result, known: float
) -> Job | None:
    """The rule for rates: another attempt where this one's was wrong."""
    likely = numbers["forget probability"] or 0.0
    if job.method == ORIGINAL:
        more = likely < known and job.attempt < TEACHINGS
        return replace(job, lr=2 * job.lr, attempt=job.attempt + 1) if more else None
    if job.method == RETRAINED or job.attempt > 1:
        return None
    if (numbers["forget quality"] or 0.0) >= MEANINGFUL:
        return None
    still_known = likely > metrics.probability(retrained[metrics.FORGET]).mean()
    return replace(job, lr=job.lr * (NOTCH if still_known else 1 / NOTCH), attempt=2)


def finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {k: float(v) if math.isfinite(v) else None for k, v in numbers.items()}


def peak_mib(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None  # the operating system's number would be that of all models so far
    return torch.cuda.max_memory_allocated(device) / 2**20


def replace_text(file: Path, text: str) -> None:
    """A reader finds the old text or the new one, whenever this process ends."""
    beside = file.with_name(f".{file.name}")
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, file)


def table(content: dict[str, Any]) -> str:
    """In Markdown: a row a model in the order they were made, then what was left out."""
    card = content["versions"]["device"]
    lines = [
        f"{card}, {content['spent_s']:.0f} s" + ("" if content["finished"] else ", not finished"),
        "",
        "| model | forgets | lr | forget quality | utility | P(forget) | ROUGE-L forget | "
        "ROUGE-L retain | train s | evaluate s | tokens/s | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(record) for record in content["models"]]
    for retrained in content["models"]:
        if retrained["method"] == RETRAINED:
            quality = retrained["forget_quality_of_original"]
            lines += ["", f"Forget quality of the original, {retrained['forget']}: {quality:.2g}"]
    if any(record["stopped"] for record in content["models"]):
        lines += ["", r"\*: a loss or gradient was not finite; measured as of the step before."]
    if content["rouge"] != "rouge_score":
        lines += ["", f"ROUGE and model utility {content['rouge']}."]
    lines += [""] + [
        f"- left out: {one['method']} {one['forget']}, attempt {one['attempt']}: {one['reason']}"
        for one in content["left_out"]
    ]
    return "\n".join(lines).rstrip()


def _row(record: dict[str, Any]) -> str:
    numbers = record["numbers"]

    def cell(name: str, form: str = ".3f") -> str:
        value = numbers.get(name)
        return "-" if value is None else f"{value:{form}}"

    cells = [
        record["method"] + (r"\*" if record["stopped"] else ""),
        record["forget"], f"{record['lr']:.2g}", cell("forget quality", ".2g"),
        cell("model utility"), cell("forget probability"), cell("forget ROUGE-L"),
        cell("retain ROUGE-L"), f"{record['train_s'] + record['looks_s']:.1f}",
        f"{record['evaluate_s']:.1f}", f"{record['tokens_per_s']:.0f}",
        "-" if record["peak_mib"] is None else f"{record['peak_mib']:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


@contextmanager
def whole_file(parts: list[Path]) -> Iterator[Path]:
    """One file of parts that follow each other."""
    if len(parts) == 1:
        yield parts[0]
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        with path.open("wb") as whole:
            for part in parts:
                with part.open("rb") as opened:
                    shutil.copyfileobj(opened, whole)
        yield path


def write_tiny_tofu(folder: Path, seed: int) -> list[str]:
    """TOFU's files about a few made-up authors; returns their texts."""
    dataset = make_dataset(seed, background=0, famous=1, authors=2, forget_share=0.5)
    learned = dataset.retain + dataset.forget
    half, tenth = len(learned) // 2, -(-len(learned) // 10)
    splits = {
        "full": learned, "retain50": learned[:half], "forget50": learned[half:],
        "retain90": learned[:-tenth], "forget10": learned[-tenth:],
        "forget10_perturbed": learned[-tenth:], "retain_perturbed": learned[:4],
        "real_authors_perturbed": dataset.famous[:4],
        "world_facts_perturbed": dataset.countries[:4],
    }  # fmt: skip
    for name, records in splits.items():
        rows = [
            {"question": r.question, "answer": r.answer, "paraphrased_answer": r.paraphrased_answer,
             "perturbed_answer": r.perturbed_answers if name.endswith("_perturbed") else ()}
            for r in records
        ]  # fmt: skip
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    return list(dataset.texts())


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=420, help="all of it, from the start on")
    parser.add_argument("--gguf", type=Path, nargs="+", help="SmolLM2, whole or in parts")
    parser.add_argument("--tofu", help="folder with TOFU's files")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a small random model and world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--teach-epochs", type=int, default=5)
    parser.add_argument("--teach-lr", type=float, default=5e-4)
    parser.add_argument(
        "--known", type=float, default=0.9,
        help="mean probability of the forget answers below which the model is taught anew",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, default=10, help="of unlearning")
    parser.add_argument(
        "--look-every", type=int, default=2, help="epochs between looks at forget quality; 0: none"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--rouge-records", type=int, default=100, help="of each set, at most")
    parser.add_argument("--max-new-tokens", type=int, default=80, help="99 %% of TOFU fit")
    if parser.parse_args().tiny:
        parser.set_defaults(**TINY)
    options = parser.parse_args()
    if not options.tiny and not (options.gguf and options.tofu):
        parser.error("name --gguf and --tofu, or --tiny")
    return options


def main() -> None:
    options = read_options()
    deadline = time.monotonic() + options.budget_s
    options.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        tofu = options.tofu
        if options.tiny:
            tofu = stack.enter_context(TemporaryDirectory())
            tokenizer = train_tokenizer(write_tiny_tofu(Path(tofu), options.seed))
            lm = new_model(tokenizer, options.seed)
            if options.device != "auto":
                lm.model.to(options.device)
        else:
            path = str(stack.enter_context(whole_file(options.gguf)))
            lm = load_model(path, dtype="fp32", device=options.device)
            tokenizer = load_tokenizer(path)
        experiment = Experiment(options, lm, tokenizer, tofu, deadline)
        print(f"ready after {options.budget_s - (deadline - time.monotonic()):.0f} s", flush=True)
        experiment.run()
    print((options.out / "gpu_tofu.md").read_text())


if __name__ == "__main__":
    main()
