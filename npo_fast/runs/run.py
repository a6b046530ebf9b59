"""A run, read from its folder."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from npo_fast.metrics.verdict import Verdict
from npo_fast.reports.runs import RunRecord, load_run
from npo_fast.runs import hub


class Run:
    """What a run was asked for, what it did, and the model that it made.

    ``Run(folder)`` loads it again at any time. A run on several processes gives every process the
    same object, once the first has written the folder.

    Args:
        folder: the output of ``unlearn`` or ``finetune``.

    Raises:
        UserError: the folder is not a run's, or a file in it is damaged.
    """

    def __init__(self, folder: str | Path, model: Any = None, tokenizer: Any = None) -> None:
        self.folder = Path(folder)
        self._record = load_run(self.folder, self.folder.name)
        if model is not None:
            self.model, self.tokenizer = model, tokenizer

    @classmethod
    def planned(cls, folder: Path, metadata: Mapping[str, Any]) -> "Run":
        """The result of a dry run: metadata, and no folder yet."""
        run = cls.__new__(cls)
        run.folder, run._record = folder, RunRecord(folder.name, folder, metadata, [], [], {})
        return run

    @property
    def metadata(self) -> Mapping[str, Any]:
        """``run.json``: status, versions, settings, data, the report before and after."""
        return self._record.metadata

    @property
    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """The settings by group: model, data, method, training, report, watch, run."""
        return self._record.settings

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """The record of every step: loss, terms, gradient norm, time."""
        return list(self._record.steps)

    @property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """The measures of every evaluation while training."""
        return list(self._record.evaluations)

    @property
    def scores(self) -> dict[str, Any]:
        """Measures of the final model: of ``eval/`` logs, the last evaluation, or the report."""
        if (self.folder / "run.json").is_file():  # it may have been evaluated meanwhile
            self._record = load_run(self.folder, self.folder.name)
        return self._record.measured({})[0]

    @property
    def verdict(self) -> Verdict | None:
        """What came out, with the numbers behind it; None of a run that forgets nothing."""
        found = self.metadata.get("verdict")
        return None if found is None else Verdict.of(found)

    @cached_property
    def model(self) -> Any:
        """The final model, a transformers one; a LoRA adapter is merged when it is loaded."""
        from npo_fast.model.attention import set_attention
        from npo_fast.model.load import load_model

        lm = load_model(str(self.folder))
        set_attention(lm.model, lm.native_attention)
        return lm.model

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the final model."""
        from npo_fast.model.load import load_tokenizer

        return load_tokenizer(str(self.folder))

    def push_to_hub(self, repo: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads the final model with its card to a repository of the hub; returns its address.

        Args:
            repo: such as "me/my-model"; made where it does not exist.
            token: of the hub; else the one that ``hf auth login`` keeps.
        """
        address = hub.create_repository(repo, private, token)
        hub.upload(self.folder / "model", repo, token)
        return address

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self._record.method}, {self.metadata.get('status')})"
