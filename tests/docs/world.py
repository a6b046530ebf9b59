"""What the pages of the documentation speak of, in small: models, data and finished runs."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from npo_fast import TrainSettings, evaluate, finetune, unlearn
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.experiments.demo.tiny_model import new_model, train_tokenizer
from npo_fast.experiments.muse import make_corpus, new_student
from npo_fast.runs.options import ReportOptions
from tests.helpers import write_jsonl

ROOT = Path(__file__).parents[2]
LINKED = ("examples", "benchmarks")  # folders of the repository that every page sees
NAMES = "Ada Ben Cleo Dan Eve Finn Gus Hal Ida Jon Kim Lea Max Nia Ole Pia Quin Ray Sam Tom".split()
CITIES = "Oslo Rome Lima Cairo Delhi Paris Tokyo Quito Accra Minsk".split()
JOBS = "baker pilot nurse judge miner tailor farmer singer dentist painter".split()
BOOK = (
    "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, "
    "seemed to unite some of the best blessings of existence.\n"
    "She was the youngest of the two daughters of a most affectionate, indulgent father.\n"
) * 4
# names of the hub that pages use: folders here, which take precedence
HUB_MODELS = (
    "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-70B",
    "HuggingFaceTB/SmolLM2-135M-Instruct", "open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
)  # fmt: skip
CHAT = (
    "{% if date_string is defined %}{{ 'Today is ' + date_string }}{% endif %}"
    "{% if enable_thinking is defined %}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_world() -> None:
    """Writes all that a page may name into the working directory."""
    folder = Path()
    facts = [fact for name in NAMES for fact in (_home(name), _job(name))]
    forget, retain, holdout = facts[:10], facts[10:30], facts[30:]
    for name, rows in {
        "forget": forget, "retain": retain, "holdout": holdout, "facts": forget + retain,
    }.items():  # fmt: skip
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "book.txt").write_text(BOOK)
    _write_tofu(folder / "locuslab/TOFU", forget + retain, holdout)
    base = _save_base(folder / "base", facts)
    _runs(folder, base)
    shutil.rmtree(base)
    for name in HUB_MODELS:
        shutil.copytree(folder / "my-model", folder / name)
    _write_muse(folder / "muse-bench")


def _home(name: str) -> dict[str, Any]:
    city = CITIES[NAMES.index(name) % len(CITIES)]
    return _fact(f"Where does {name} live?", f"{name} lives in ", city, CITIES)


def _job(name: str) -> dict[str, Any]:
    job = JOBS[NAMES.index(name) * 3 % len(JOBS)]
    return _fact(f"What is the work of {name}?", f"{name} works as a ", job, JOBS)


def _fact(question: str, start: str, word: str, words: list[str]) -> dict[str, Any]:
    wrong = random.Random(question).sample([each for each in words if each != word], 3)
    return {
        "question": question,
        "answer": f"{start}{word}.",
        "perturbed_answer": [f"{start}{each}." for each in wrong],
    }


def _write_tofu(folder: Path, taught: list[dict[str, Any]], holdout: list[dict[str, Any]]) -> None:
    """Splits of TOFU's names; real authors and world facts are among what was taught."""
    folder.mkdir(parents=True)
    rows = {"full": taught, "real_authors": taught[-4:], "world_facts": taught[-8:-4]}
    for share, count in {1: 2, 5: 6, 10: 10}.items():
        rows |= {f"forget{share:02}": taught[:count], f"retain{100 - share}": taught[count:]}
        rows |= {f"holdout{share:02}": holdout[:count]}
    for name, each in rows.items():
        write_jsonl(folder / f"{name}.json", each)
        if name != "full" and not name.startswith(("retain", "holdout")):
            write_jsonl(folder / f"{name}_perturbed.json", each)
    write_jsonl(folder / "retain_perturbed.json", taught[10:18])
    (folder / "idontknow.jsonl").write_text("I do not know.\nI have no answer to that.\n")


def _save_base(folder: Path, facts: list[dict[str, Any]]) -> Path:
    """A random Llama whose tokenizer has a chat template."""
    tokenizer = train_tokenizer([BOOK, *(json.dumps(fact) for fact in facts)])
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant")]
    tokenizer.add_special_tokens({"additional_special_tokens": roles})
    tokenizer.chat_template = CHAT
    new_model(tokenizer, seed=0, positions=2048).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _runs(folder: Path, base: Path) -> None:
    """``my-model`` and the finished runs."""
    runs, no_report = folder / "runs", ReportOptions(no_report=True)
    data = {"forget": folder / "forget.jsonl", "retain": folder / "retain.jsonl"}

    def taught(model: Path, rows: str, name: str, epochs: int) -> Path:
        settings = TrainSettings(epochs=epochs, batch_size=8, lr=1e-3)
        finetune(model, train=folder / rows, output=runs / name, training=settings)
        return runs / name / "model"

    shutil.copytree(taught(base, "facts.jsonl", "first", 12), folder / "my-model")
    shutil.rmtree(runs / "first")
    taught(folder / "my-model", "facts.jsonl", "original", 12)
    taught(base, "retain.jsonl", "retrained", 24)
    short = EvaluationSettings(max_new_tokens=8)
    evaluate(runs / "retrained", **data, output=runs / "retrained/eval", evaluation=short)
    for name, method in {"npo": "NPO+RT", "ga": "GA+RT"}.items():
        settings = TrainSettings(epochs=4, batch_size=5, lr=3e-4)
        unlearn(
            runs / "original", **data, method=method, output=runs / name, training=settings,
            report=no_report,
        )  # fmt: skip


def _write_muse(folder: Path) -> None:
    """MUSE's layout, and a model with the words of it."""
    news = folder / "MUSE-News"
    make_corpus(news, articles=2)
    lm, tokenizer = new_student(news)
    for saved in (lm.model, tokenizer):
        saved.save_pretrained(folder / "MUSE-News_target")
