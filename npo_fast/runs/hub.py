"""Model cards, and uploads to the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from npo_fast._version import __version__
from npo_fast.errors import UserError
from npo_fast.model.adapters import ADAPTER_CONFIG

CARD = "README.md"


def write_card(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes the model card: what the model is, how it was made, and how to load it.

    It holds the number of records and their SHA-256, and none of their text.

    Args:
        folder: of the saved model.
        metadata: of the run, as in ``run.json``.
    """
    settings, base = metadata["settings"], metadata["settings"]["model"]["model"]
    on_hub = not Path(base).exists() and base.count("/") == 1
    adapter = (folder / ADAPTER_CONFIG).is_file()
    unlearned = metadata["command"] == "unlearn"
    method = settings.get("method", {}).get("method", "fine-tuning")
    header = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["npo_fast", *(["unlearning", method] if unlearned else [])],
    )
    title = f"{Path(base).name or 'A model'}, {'unlearned' if unlearned else 'fine-tuned'}"
    if unlearned:
        count = metadata["data"]["forget"]["examples"]
        what = f"It was made to forget {count} records with {method}"
    else:
        what = f"It was fine-tuned on {metadata['data']['train']['examples']} records"
    sections = [
        f"---\n{header.to_yaml()}\n---\n\n# {title}",
        f"{what}, starting from `{base}`, by npo_fast {__version__}.",
        "## Data\n\n" + _table(
            ("source", "records", "answer tokens", "SHA-256 of the tokens"),
            [(name, each["examples"], each["answer_tokens"], f"`{each['sha256']}`")
             for name, each in metadata["data"].items()],
        ),
        "## Settings\n\n" + _table(
            ("setting", "value"),
            [(name, f"`{value}`") for group in ("method", "training")
             for name, value in settings.get(group, {}).items() if value is not None],
        ),
    ]  # fmt: skip
    if measures := _measures(metadata):
        sections.append("## Measures\n\n" + measures)
    load = (
        "from peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("THIS_REPOSITORY")'
        if adapter
        else "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_REPOSITORY")'
    )
    sections.append(f"## Loading\n\n```python\n{load}\n```")
    ModelCard("\n\n".join(sections) + "\n").save(folder / CARD)


def create_repository(repo: str, private: bool = False, token: str | None = None) -> str:
    """Makes the repository where there is none; returns its address.

    Raises:
        UserError: no such name, no network, or no permission.
    """
    try:
        return str(HfApi(token=token).create_repo(repo, private=private, exist_ok=True))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(
            f"cannot push to {repo!r}: {error}. Log in with `hf auth login`, and name a repository "
            "that you may write to, such as me/my-model"
        ) from error


def upload(folder: Path, repo: str, private: bool = False, token: str | None = None) -> str:
    """Uploads a model folder as it is; returns the address of the repository."""
    address = create_repository(repo, private, token)
    api = HfApi(token=token)
    try:
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload from npo_fast")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"cannot upload {folder} to {repo!r}: {error}. The model stays in {folder}: "
            f"npo_fast.Run({str(folder.parent)!r}).push_to_hub({repo!r}) tries again"
        ) from error
    return address


def _measures(metadata: Mapping[str, Any]) -> str:
    """The short report before and after, and the best evaluation, as a table."""
    before, after = metadata.get("before", {}), metadata.get("after", {})
    keys = {"probability": "probability", "rouge_l_recall": "ROUGE-L"}
    rows = [
        (name, label, f"{before[name][key]:.4g}", f"{after[name][key]:.4g}")
        for name in after
        if name in before
        for key, label in keys.items()
    ]
    return _table(("set", "measure", "before", "after"), rows) if rows else ""


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
