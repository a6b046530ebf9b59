"""What reads something from outside: how its sound input is made, and how it is read."""

import bz2
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import datasets
import pandas
import pyarrow as pa
import torch
import yaml
from transformers import AutoTokenizer

import npo_fast
from npo_fast import metrics
from npo_fast.cli import unlearn
from npo_fast.cli.settings import parse
from npo_fast.data import Rendering, Template
from npo_fast.data.answers import alternated, load_refusals
from npo_fast.data.readers import load_records
from npo_fast.data.rendering import read_template
from npo_fast.data.template import text_fingerprint
from npo_fast.metrics import open_unlearning
from npo_fast.model.adapters import add_lora
from npo_fast.model.load import load_config, load_generation_config, load_model, load_tokenizer
from npo_fast.model.reference_log_probs import reference_log_probs_of
from npo_fast.model.reference_states import open_reference_states
from npo_fast.reports.page import Report
from npo_fast.reports.runs import load_runs
from npo_fast.runs import Callback
from npo_fast.runs.options import EvaluationOptions, ReportOptions, RunOptions
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import FACTS, exit_code, make_result, save_tiny_model, sequences, small_lm

RICH = [
    {**fact, "paraphrased_answer": "so " + fact["answer"], "perturbed_answer": ["no", "never"],
     "alternate": "who knows"}
    for fact in FACTS
]  # fmt: skip
CHAT = [
    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": fact["question"]},
                  {"role": "assistant", "content": fact["answer"]}]}
    for fact in FACTS
]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Target:
    """A reader: ``make`` fills an empty folder with sound input, ``use`` reads it."""

    make: Callable[[Path], object]
    use: Callable[[Path, Random], object]
    cases: int = 12  # of mutations in every run of the tests


@cache
def tokenizer(folder: Path) -> object:
    return AutoTokenizer.from_pretrained(save_tiny_model(folder))


def _lines(rows: list) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def _file(name: str, content: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content())


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pandas.DataFrame(RICH).to_parquet(buffer)
    return buffer.getvalue()


def _use_records(folder: Path, rng: Random) -> None:
    path = next(folder.iterdir(), folder / "x.jsonl")
    part = rng.choice(("", "", "[:]", "[1:]", "[-2:]", "[0:99999999999999999999]", "[-:]", "[٣:]"))
    role = rng.choice(("last", "all"))
    records = load_records(f"{path}{part}", loss_on=role)
    text_fingerprint(records)
    template = Template(_TOKENIZER(), "plain", 64)
    template.encode_all(records)


def _use_answers(folder: Path, rng: Random) -> None:
    load_refusals(folder / "refusals.txt")
    forget = load_records("forget", str(folder))
    alternated(forget, 0)
    alternated(forget, 0, "other", str(folder))


def _make_answers(folder: Path) -> None:
    (folder / "refusals.txt").write_text("I do not know.\nNo idea.\n")
    for name in ("forget", "other"):
        (folder / f"{name}.jsonl").write_text(_lines(RICH))


def _make_settings(folder: Path) -> None:
    settings = {
        "model": "me/model", "lr": 1e-5, "epochs": 3, "method": "NPO+RT", "beta": 0.1,
        "overwrite": True, "template_kwargs": {"date_string": "today", "thinking": False},
        "system_prompt": "Be brief.", "max-length": 128, "loss_on": "all", "save_every": 5,
    }  # fmt: skip
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))


def _use_settings(folder: Path, rng: Random) -> None:
    parse(unlearn.Command, ["--config", str(folder / "settings.yaml")], "unlearn")


ODD = (
    "inf", "-inf", "nan", "1e999", "-1", "0", "9" * 5000, "1" * 400, "", " ", "٣", "1_000", "0x10",
    "true", "None", "[]", "a\nb", "\x1b[31m", "\0", "\udcff", "x" * 70_000, "--", "-", "1e300", "=",
    "a=b", "a=[[[", "../..", "/", "/dev/null", "/dev/zero", "x.jsonl[:]", "[5:2]", "[1e3:]",
    "forget.jsonl", "1,2", "3.5", "1e-320", "9223372036854775807", "9223372036854775808",
)  # fmt: skip


@cache
def _flags(verb: str) -> list[str]:
    out = io.StringIO()
    with redirect_stdout(out):
        exit_code([verb, "--help-all"])
    words = out.getvalue().replace(",", " ").replace("│", " ").split()
    return sorted({w for w in words if w.startswith("--") and w[2:3].isalpha()} - {"--help-all"})


def _use_arguments(folder: Path, rng: Random) -> None:
    """A whole command, where it needs no model: with one it ends at the dry run."""
    verb = rng.choice(("unlearn", "unlearn", "finetune", "evaluate", "attack", "report", "plan"))
    data = str(folder / "forget.jsonl")
    missing = str(folder / "nothing")
    given = {
        "unlearn": ["--model", missing, "--forget", data, "--retain", data, "--dry-run"],
        "finetune": ["--model", missing, "--train", data, "--dry-run"],
        "evaluate": ["--log", str(folder / "logs")],
        "attack": ["--model", missing, "--forget", data],
        "report": [missing],
        "plan": ["--model", missing],
    }[verb]
    if "--output" in _flags(verb):
        given += ["--output", str(folder / "out.html" if verb == "report" else folder / "out")]
    for _ in range(rng.choice((1, 1, 2))):
        flag, value = rng.choice(_flags(verb)), rng.choice(ODD)
        given += rng.choice(([flag, value], [flag], [f"{flag}={value}"], [value]))
    here = os.getcwd()
    os.chdir(folder)  # a relative output is one of the case
    try:
        run_command([verb, *given])
    finally:
        os.chdir(here)


def run_command(arguments: list[str]) -> None:
    """Asserts that a command ends well, or in one line on standard error."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = exit_code(arguments)
    said = [line for line in err.getvalue().split("\n") if "npo-fast: error" in line]
    assert code in (0, 1, 2), (arguments, code, err.getvalue()[-3000:])
    assert "Traceback" not in err.getvalue(), (arguments, err.getvalue()[-3000:])
    assert len(said) == (code != 0), (arguments, code, err.getvalue()[-3000:])
    assert all(len(line) < 3000 for line in said), arguments


def _make_arguments(folder: Path) -> None:
    (folder / "forget.jsonl").write_text(_lines(RICH))
    metrics.save_result(make_result(), folder / "logs")


class _Kill(Callback):
    def on_step(self, record: object) -> None:
        if record.step == 3:
            raise KeyboardInterrupt


def _train(folder: Path, **more: object) -> npo_fast.Run:
    return npo_fast.unlearn(
        _MODEL(), forget=RICH[6:], retain=RICH[:6], output=folder,
        training=TrainSettings(epochs=3, lr=1e-3, batch_size=2),
        report=ReportOptions(report_records=2, max_new_tokens=4),
        evaluation=EvaluationOptions(eval_every=2, eval_records=2, keep_best="forget.probability"),
        **more,
    )  # fmt: skip


def _make_run(folder: Path) -> None:
    _train(folder / "run")
    for part in ("model", "checkpoints"):  # read by others
        for path in sorted((folder / "run" / part).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    metrics.save_result(make_result(), folder / "run" / "eval")
    metrics.save_result(make_result(shift=0.1), folder / "retrained", "open-unlearning")


def _use_run(folder: Path, rng: Random) -> None:
    (run,) = load_runs([folder / "run"])
    report = Report([run], {}, metrics.load_result(folder / "retrained"))
    report.markdown()
    if rng.random() < 0.25:  # it draws figures, for seconds
        report.html()
    npo_fast.Run(folder / "run").scores, run.command(), run.evaluate_command()


def _make_unfinished(folder: Path) -> None:
    with suppress(KeyboardInterrupt):
        _train(folder / "run", callbacks=[_Kill()], run=RunOptions(save_every=2))


def _use_unfinished(folder: Path, rng: Random) -> None:
    _train(folder / "run", run=RunOptions(save_every=2))


def _make_logs(folder: Path) -> None:
    metrics.save_result(make_result(), folder / "tofu")
    (folder / "tofu" / metrics.AGGREGATED).unlink()
    result = make_result(as_objects=True)
    (folder / "log.json").write_text(json.dumps(result[metrics.FORGET]))
    holdout = json.loads(Path(__file__).parents[1].joinpath(
        "evaluation/open_unlearning/TOFU_EVAL.json").read_text())  # fmt: skip
    (folder / "theirs").mkdir()
    (folder / "theirs" / open_unlearning.EVAL).write_text(json.dumps(holdout))


def _use_logs(folder: Path, rng: Random) -> None:
    ours, theirs = (metrics.load_result(folder / name) for name in ("tofu", "theirs"))
    other = metrics.load_result(folder / "log.json")
    for result in (ours, theirs, other):
        metrics.summary(result, result), metrics.summary(result)
        for form in ("tofu", "open-unlearning"):
            metrics.save_result(result, folder / "new", form, result)
    metrics.retrained_log(folder / "log.json", [None] * 6, range(3))


def _make_model(folder: Path) -> None:
    save_tiny_model(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _use_model(folder: Path, rng: Random) -> None:
    what = rng.choice(("all", "all", "config", "tokenizer"))
    if what != "tokenizer":
        load_config(str(folder))
    if what != "config":
        template = Template(load_tokenizer(str(folder)))
        template.encode_all(load_records([*RICH, *CHAT]))
        load_generation_config(str(folder))
    if what == "all":
        load_model(str(folder))


def _make_bin(folder: Path) -> None:
    from safetensors.torch import load_file

    save_tiny_model(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _make_shards(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(_MODEL()).save_pretrained(folder, max_shard_size="20KB")


def _make_adapter(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(_MODEL())
    add_lora(base, _MODEL(), 2).save_pretrained(folder)


def _load(folder: Path, rng: Random) -> None:
    load_model(str(folder))


@cache
def _lm() -> object:
    return small_lm()


def _use_cache(folder: Path, rng: Random) -> None:
    data = {"forget": sequences(5, 1)}
    reference_log_probs_of(_lm(), data, 64, folder)
    states = open_reference_states(_lm(), data, folder / "states", "answer", 64)
    states.hidden("forget", [0, 3])


def _use_template(folder: Path, rng: Random) -> None:
    name, source = read_template(str(folder / "chat.jinja"))
    template = Template(_TOKENIZER(), rendering=Rendering(name, source))
    template.encode_all(load_records([*CHAT, *RICH]))
    template.answer_text([3, 4, 5], 8), template.description()


HOME: list[Path] = []  # of the session: a model and a tokenizer


def _MODEL() -> str:  # noqa: N802
    return str(HOME[0])


def _TOKENIZER() -> object:  # noqa: N802
    return tokenizer(HOME[0])


_CSV = pandas.DataFrame(FACTS).to_csv(index=False)
_PACKED = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
    "zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}  # fmt: skip
TARGETS = {
    "records.jsonl": Target(
        _file("x.jsonl", lambda: _lines(RICH + CHAT).encode()), _use_records, 60
    ),
    "records.json": Target(_file("x.json", lambda: json.dumps(RICH).encode()), _use_records, 40),
    "records, no suffix": Target(_file("x", lambda: _lines(CHAT).encode()), _use_records),
    "records.csv": Target(_file("x.csv", lambda: _CSV.encode()), _use_records, 30),
    "records.txt": Target(_file("x.txt", lambda: b"Once upon a time\nthere was."), _use_records),
    "records.parquet": Target(_file("x.parquet", _parquet), _use_records, 40),
    **{
        f"records.{suffix}": Target(
            _file(f"x.jsonl.{suffix}", lambda pack=pack: pack(_lines(RICH).encode())), _use_records)
        for suffix, pack in _PACKED.items()
    },
    "records, saved": Target(
        lambda folder: datasets.Dataset.from_list(RICH).save_to_disk(folder / "x"), _use_records, 10
    ),
    "answers": Target(_make_answers, _use_answers, 20),
    "settings": Target(_make_settings, _use_settings, 60),
    "arguments": Target(_make_arguments, _use_arguments, 10),
    "run": Target(_make_run, _use_run, 8),
    "unfinished run": Target(_make_unfinished, _use_unfinished, 2),
    "logs": Target(_make_logs, _use_logs, 15),
    "model": Target(_make_model, _use_model, 8),
    "model.bin": Target(_make_bin, _load, 4),
    "shards": Target(_make_shards, _load, 3),
    "adapter": Target(_make_adapter, _load, 3),
    "cache": Target(lambda folder: _use_cache(folder, Random(0)), _use_cache, 20),
    "template": Target(_file("chat.jinja", TEMPLATE.encode), _use_template, 30),
}  # fmt: skip
