"""The records in a run folder as files: what they must hold before anything reads them."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from npo_fast.boundary import parse_json, read_bytes, read_json
from npo_fast.errors import named, reading
from npo_fast.validation import check_shape

RUN, STEPS, EVALUATIONS = "run.json", "steps.jsonl", "evaluations.jsonl"
OWN_ANSWERS = "retain-auto.jsonl"  # of the model, where --retain auto keeps them
SHORTAGE = "out-of-memory.json"  # of one of several processes: how many tokens may fit
LOGGED_RECORDS = "logged_records.json"  # beside evaluation logs
_Group = dict[str, Any]


class _Answer(TypedDict):
    question: str
    truth: str
    answer: str


class _Sample(TypedDict, total=False):  # the short report of one set
    answers: list[_Answer]
    probability: float | None
    rouge_l_recall: float | None
    without_end: float | None


class _RequiredRendering(TypedDict):
    template: str


class _Rendering(_RequiredRendering, total=False):
    chat_template: str | None
    system_prompt: str | None
    template_kwargs: dict[str, Any] | None
    now: str | None


class _Data(TypedDict, total=False):  # of one source
    sha256: str
    records_sha256: str


class _Step(TypedDict):
    step: int


class _Found(TypedDict, total=False):
    retain_coefficient: float  # with --keep-utility


class StepLine(_Step, _Found):
    """A line of ``steps.jsonl``: what is read of a ``StepRecord``."""

    terms: dict[str, float]
    log_probs: dict[str, float]
    grad_norm: float
    time_ms: float


class _OfSet(TypedDict, total=False):
    probability: float | None
    rouge_l_recall: float | None
    truth_ratio: float | None
    exact_memorization: float | None
    extraction_strength: float | None


class EvaluationLine(_Step, total=False):
    """A line of ``evaluations.jsonl``: ``metrics.measures``."""

    model_utility: float | None
    forget_quality: float | None
    forget: _OfSet
    retain: _OfSet


class _Level(TypedDict):  # ``metrics.verdict.Level``
    reference: float
    unknown: float
    source: str


class Request(TypedDict):
    """An earlier request of a chain, copied from the ``run.json`` of its run."""

    run: str  # id
    folder: str  # where the run was made
    method: str
    steps: int | None
    forgotten: list[list[str]]  # digests of each record, without its text


class LoggedRecords(TypedDict):
    """Which records evaluation logs are of, without their text."""

    salt: str  # of the chain
    forget: list[list[str]]  # digests of each record, in the order of the log


class FirstModel(TypedDict):
    """The model before the first request of a chain."""

    model: str
    sha256: str | None  # ``files_fingerprint``; None of a model in memory


class _RequiredChain(TypedDict):
    salt: str
    first: FirstModel | None  # None: the model of this run, which was taught
    earlier: list[Request]  # oldest first


class ChainRecord(_RequiredChain, total=False):
    """``chain`` in ``run.json``: what the model of a run was made to forget, and before that."""

    forgotten: list[list[str]]  # by this run


class RunMetadata(TypedDict, total=False):
    """``run.json``, as far as it is read again."""

    id: str
    status: str
    moved_to: str
    command: str
    settings: dict[str, _Group]
    versions: dict[str, Any]
    rendering: _Rendering
    chain: ChainRecord
    data: dict[str, _Data]
    before: dict[str, _Sample]
    after: dict[str, _Sample]
    best: EvaluationLine
    final: _Step
    resumed: list[dict[str, Any]]
    peak_mib: float | None
    micro_batch_tokens: int | None
    threads: int
    launch: str | None  # of torchrun
    level: _Level
    beta: float


def read_metadata(folder: Path, cure: str = "") -> dict[str, Any]:
    """``run.json``; ``UserError`` where it cannot be read, or holds something else."""
    file = folder / RUN
    metadata: dict[str, Any] = read_json(file, RunMetadata, cure)
    with reading(f"the date in {file}", cure):
        datetime.fromisoformat(metadata.get("rendering", {}).get("now") or "2000-01-01")
    return metadata


def requests_of(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The requests (``Request``) that the model of a run has had, its own last."""
    link = metadata.get("chain") or {}
    requests = list(link.get("earlier", ()))
    if "forgotten" in link:
        settings = metadata.get("settings", {})
        requests.append({
            "run": metadata.get("id", ""),
            "folder": str(settings.get("run", {}).get("output", "")),
            "method": str(settings.get("method", {}).get("method", "")),
            "steps": metadata.get("final", {}).get("step"),
            "forgotten": link["forgotten"],
        })  # fmt: skip
    return requests


def forgotten_by(request: Mapping[str, Any], digests: Sequence[Sequence[str]]) -> list[int]:
    """The places of the records with these digests that a request forgot."""
    forgotten = {digest for each in request["forgotten"] for digest in each}
    return [i for i, each in enumerate(digests) if not forgotten.isdisjoint(each)]


def read_lines(file: Path, shape: Any) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line of a ``.jsonl`` file and where it ends; none where there is no file.

    The last line may be incomplete, where the process that wrote it was killed.

    Raises:
        UserError: a line is damaged; the message names it.
    """
    end = 0
    content = read_bytes(file) if file.exists() else b""
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        end += len(line) + 1
        with named(f"{file}, line {number} is damaged"), reading("it"):
            value = parse_json(line.decode())
            check_shape(value, shape)
        yield value, end


def read_all(file: Path, shape: Any) -> list[dict[str, Any]]:
    """The whole lines of a ``.jsonl`` file, as ``read_lines``."""
    return [value for value, _ in read_lines(file, shape)]
