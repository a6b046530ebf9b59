"""The chain of a run: which requests its model has had, and what they forgot, without the text.

``run.json`` holds as ``chain`` all that later runs need, so that earlier folders may be moved or
deleted. A record is known by digests: scrypt of what it asks, with the salt of the chain. They
tell whether a record that someone has was forgotten; a guess costs about a millisecond.
"""

import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import scrypt
from pathlib import Path
from typing import Any

from npo_fast.data import Record, Template
from npo_fast.data.repeats import Key, keys_of, keys_to_find
from npo_fast.errors import UserError
from npo_fast.evaluation.suite import rows_of
from npo_fast.metrics import Log, probability
from npo_fast.model.model_files import files_fingerprint
from npo_fast.model.save import save_file
from npo_fast.paths import below_here
from npo_fast.run_files import LOGGED_RECORDS, forgotten_by, requests_of
from npo_fast.runs.models import ModelSource

DIGEST_BYTES, SALT_BYTES = 8, 16
COST = {"n": 256, "r": 8, "p": 1}  # of scrypt: 256 KiB a guess
MANY = 10_000  # keys that take a while
HARM = {  # what records do that were forgotten before, by their source
    "retain": "training on them would teach them again",
    "holdout": "a model that forgot them does not answer as one that never knew them",
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chain:
    """The requests that a model has had, oldest first."""

    requests: tuple[Mapping[str, Any], ...] = ()  # ``run_files.Request``
    first: Mapping[str, Any] | None = None  # the model before them, ``run_files.FirstModel``
    salt: str = field(default_factory=lambda: secrets.token_hex(SALT_BYTES))

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "Chain":
        """The chain up to the run with this ``run.json``, and with it."""
        link = metadata.get("chain")
        return cls(tuple(requests_of(metadata)), link["first"], link["salt"]) if link else cls()

    def describe(self) -> str:
        """The requests in words."""
        return "; ".join(self._name(number) for number in range(1, len(self.requests) + 1))

    def tell_repeats(self, forget: Sequence[Record]) -> None:
        """Warns of a forget set that repeats an earlier one."""
        for number, found in self._found(forget).items():
            logger.warning(
                f"warning: {len(found)} of {len(forget)} forget records were forgotten before, "
                f"by {self._name(number)}, such as record {found[0]}"
            )

    def refuse(self, source: str, records: Sequence[Record]) -> None:
        """Raises ``UserError`` where records of ``HARM``'s sources were forgotten before."""
        if not (requests := self._found(records)):
            return
        parts = [
            f"{len(found)} by {self._name(number)}, such as record {found[0]}"
            for number, found in requests.items()
        ]
        total = len({record for found in requests.values() for record in found})
        raise UserError(
            f"{total} of {len(records)} {source} records were forgotten before "
            f"({'; '.join(parts)}), and {HARM[source]}: take them out of --{source}"
        )

    def teach(self, records: Sequence[Record]) -> dict[str, Any]:
        """``chain`` of a run that teaches the records: they are no longer among the forgotten."""
        digests = self.digests_to_find(records if self.requests else ())
        taught = {digest for each in digests for digest in each}
        requests = []
        for number, request in enumerate(self.requests, 1):
            left = [[d for d in each if d not in taught] for each in request["forgotten"]]
            left = [each for each in left if each]
            if lost := len(request["forgotten"]) - len(left):
                logger.warning(
                    f"warning: {lost} of {len(request['forgotten'])} records that were forgotten "
                    f"by {self._name(number)} are taught again"
                )
            requests.append({**request, "forgotten": left})
        return {"salt": self.salt, "first": None, "earlier": requests}

    def forget(self, records: Sequence[Record], model: ModelSource) -> dict[str, Any]:
        """``chain`` of a run that forgets the records, with the model that it begins with."""
        first = self.first
        if first is None:
            in_memory = model.in_memory is not None
            sha256 = None if in_memory else files_fingerprint(model.name)
            name = below_here(model.options.model)
            if Path(name).exists() and not Path(name).is_absolute():
                name = os.path.join(".", name)  # or it could be a hub name
            first = {"model": name, "sha256": sha256}
        forgotten = self._digests([sorted(keys) for keys in keys_of(records, lines=True)])
        return {
            "salt": self.salt, "first": first, "earlier": [*self.requests], "forgotten": forgotten,
        }  # fmt: skip

    def digests_to_find(self, records: Sequence[Record]) -> list[list[str]]:
        """For each record the digests that tell it among the forgotten."""
        return self._digests([sorted(keys) for keys in keys_to_find(records, lines=True)])

    def _found(self, records: Sequence[Record]) -> dict[int, list[int]]:
        """By the number of each request the numbers of records that it forgot, from 1."""
        if not self.requests:
            return {}
        digests = self.digests_to_find(records)
        numbered = enumerate(self.requests, 1)
        found = {number: forgotten_by(request, digests) for number, request in numbered}
        return {number: [i + 1 for i in places] for number, places in found.items() if places}

    def _digests(self, keys: Sequence[Sequence[Key]]) -> list[list[str]]:
        """Of the keys of each record, in hexadecimal digits."""
        different = list(dict.fromkeys(key for each in keys for key in each))
        if len(different) > MANY:
            logger.info(f"comparing {len(different)} questions and lines with what was forgotten")
        with ThreadPoolExecutor(4) as pool:
            digests = dict(zip(different, pool.map(self._digest, different), strict=True))
        return [[digests[key] for key in each] for each in keys]

    def _digest(self, key: Key) -> str:
        # each part with its length, so that no two keys read the same
        text = "".join(f"{len(part)}:{part}" for part in key)
        content, salt = (each.encode("utf-8", "replace") for each in (text, self.salt))
        return scrypt(content, salt=salt, dklen=DIGEST_BYTES, **COST).hex()

    def _name(self, number: int) -> str:
        request = self.requests[number - 1]
        return f"request {number} ({request['method']}, {request['folder']})"


def log_records(
    chain: Chain, records: list[Record], template: Template, log: Log, folder: Path | None
) -> None:
    """Says how likely the answers of each request are by now, and keeps which record is which.

    Args:
        template: of the evaluation, whose windows of a text have a row of the log each.
        log: of these forget records.
        folder: of the logs; the records' digests go beside them, for ``npo-fast report``.
    """
    if folder is not None:
        (folder / LOGGED_RECORDS).unlink(missing_ok=True)  # of earlier logs
    if not (chain.requests and records):
        return
    digests, values = chain.digests_to_find(records), probability(log)
    counted = zip(digests, rows_of(template, records), strict=True)
    logged = [each for each, rows in counted for _ in range(rows)]
    for number, request in enumerate(chain.requests, 1):
        if found := forgotten_by(request, logged):
            logger.info(
                f"forgotten by {chain._name(number)}: probability {values[found].mean():.3g} of "
                f"{len(forgotten_by(request, digests))} records"
            )
    if folder is not None:
        content = json.dumps({"salt": chain.salt, "forget": logged})
        try:
            save_file(folder / LOGGED_RECORDS, lambda file: file.write_text(content))
        except OSError as error:
            logger.warning(f"warning: the report will lack the requests: {error}")


def chain_of(model: ModelSource) -> Chain:
    """The chain of the model that a run begins with; a model in memory has none."""
    chain = Chain.of(model.metadata)
    if chain.requests:
        logger.info(f"the model has forgotten before: {chain.describe()}")
    elif model.metadata.get("command") == "unlearn" and "chain" not in model.metadata:
        logger.warning(
            f"warning: the run that made {model.name} is of an earlier version and does not say "
            "what it forgot: its request is not in the chain"
        )
    return chain
