"""Model cards, and uploads to the Hugging Face hub."""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from npo_fast import tables
from npo_fast._version import __version__
from npo_fast.errors import UserError
from npo_fast.metrics.measures import RECORDED, score
from npo_fast.metrics.verdict import Verdict
from npo_fast.model.adapters import ADAPTER_CONFIG
from npo_fast.model.manifest import MANIFEST
from npo_fast.model.save import save_file
from npo_fast.paths import places, shown
from npo_fast.reports.runs import SAMPLE_HEADER, sample_rows

logger = logging.getLogger(__name__)

CARD = "README.md"


def write_card(folder: Path, metadata: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Writes the model card: what the model is, how it was made, and how to load it.

    It holds the number of records and their SHA-256, and none of their text.

    Args:
        folder: of the saved model.
        metadata: of the run, as in ``run.json``.
        scores: of the last evaluation, or the best; empty where there was none.
    """
    settings, name = metadata["settings"], metadata["settings"]["model"]["model"]
    on_hub = not Path(name).exists() and name.count("/") == 1
    base = name if on_hub else Path(name).name  # no path of this machine
    adapter = (folder / ADAPTER_CONFIG).is_file()
    method = settings.get("method", {}).get("method")  # None: it was fine-tuned
    data = [
        (source, each["records"], each["answer_tokens"], each["sha256"])
        for source, each in metadata["data"].items()
    ]
    options = {**settings.get("method", {}), **settings["training"]}
    if "beta" in metadata:
        options["beta"] = f"{options['beta']}: {metadata['beta']:.4g}"
    options |= {key: shown(place) for key, value in options.items() for place in places(value)}
    if "beta" in metadata:
        options["beta"] = f"auto: {tables.number(metadata['beta'])}"
    measures = [(measure.label, score(scores, key)) for key, measure in RECORDED.items()]
    card = ModelCard.from_template(
        ModelCardData(
            base_model=name if on_hub else None,
            library_name="peft" if adapter else "transformers",
            pipeline_tag="text-generation",
            tags=["npo_fast", "unlearning", method] if method else ["npo_fast"],
        ),
        template_path=str(Path(__file__).parent / "templates/model_card.md.j2"),
        title=tables.markdown_text(base),
        base=tables.code(base),
        method=method,
        records=metadata["data"]["forget" if method else "train"]["records"],
        version=__version__,
        data=_table(data, ("source", "records", "answer tokens", "SHA-256 of the tokens")),
        settings=_table(options.items(), ("setting", "value")),
        sample=_table(sample_rows(metadata), SAMPLE_HEADER),
        evaluation=_table(measures, ("measure", "value")),
        step=scores.get("step"),
        eval_records=settings.get("watch", {}).get("eval_records"),
        report_records=settings.get("report", {}).get("report_records"),
        adapter=adapter,
        verdict=tables.markdown_text(_verdict(metadata)),
        repository=settings["run"].get("push_to_hub") or "PATH_OR_REPOSITORY",
    )
    save_file(folder / CARD, card.save)


def _verdict(metadata: Mapping[str, Any]) -> str:
    """The outcome and its numbers, without advice; empty of a run that forgets nothing."""
    found = metadata.get("verdict")
    return "" if found is None else str(replace(Verdict.of(found), advice=""))


def _table(rows: Iterable[tuple[Any, ...]], header: Sequence[str]) -> str:
    """A Markdown table of the rows that have a value; empty where there are none."""
    rows = [row for row in rows if row[-1] is not None]
    return tables.markdown(rows, header) if rows else ""


def create_repository(repo: str, private: bool = False, token: str | None = None) -> str:
    """Makes the repository where there is none; returns its address.

    Raises:
        UserError: no such name, no network, or no permission.
    """
    try:
        return str(HfApi(token=token).create_repo(repo, private=private, exist_ok=True))
    except Exception as error:  # of the hub, or of its HTTP library, which has changed twice
        raise UserError(
            f"cannot push to {repo!r}: {error} Log in with `hf auth login`, and name a repository "
            "that you may write to, such as me/my-model"
        ) from error


def upload(folder: Path, repo: str, token: str | None = None) -> None:
    """Uploads a model folder to a repository that exists.

    It is uploaded as it is, but for an adapter's base model: of a folder on this machine the name
    alone.
    """
    message = "Upload from npo_fast"
    try:
        with TemporaryDirectory() as temporary:
            uploaded = _without_place(folder, Path(temporary))
            HfApi(token=token).upload_folder(
                repo_id=repo,
                folder_path=uploaded,
                commit_message=message,
                ignore_patterns=[MANIFEST],
            )
    except Exception as error:
        raise UserError(
            f"cannot upload to {repo!r}: {error} The model stays in {folder}; "
            f"npo_fast.Run({str(folder.parent)!r}).push_to_hub({repo!r}) tries again"
        ) from error


def _without_place(folder: Path, temporary: Path) -> Path:
    """The folder, or a copy in which an adapter names its base model without an absolute path."""
    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    base = Path(config.get("base_model_name_or_path") or "")
    if not base.is_absolute():
        return folder
    copy = temporary / folder.name
    shutil.copytree(folder, copy)
    config["base_model_name_or_path"] = base.name
    (copy / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    logger.warning(f"the adapter names its base model {base.name!r}: others need it from you")
    return copy
