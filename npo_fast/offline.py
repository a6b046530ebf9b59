"""The Hugging Face hub where it cannot be reached: its cache on this machine, at once.

Its libraries try again and again for about a minute, for each file. Here one quick request tells
whether there is a hub; where there is none, they are told so, and take what they have downloaded
earlier.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from npo_fast.errors import UserError

PROBE_S = 4.0  # for one request; a resolver without a network may take longer
TRUST_S = 60.0  # for so long the hub is taken to be still away

_seen: bool | None = None  # whether the hub was reached
_seen_at = 0.0


@contextmanager
def hub(what: str) -> Iterator[None]:
    """Inside, libraries that ask the hub take its cache where it cannot be reached.

    Args:
        what: is looked for, in words for the message.

    Raises:
        UserError: the hub cannot be reached, and the cache does not have it.
    """
    if is_reachable():
        yield
        return
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    refused = False

    def refuse(request: Any) -> NoReturn:
        nonlocal refused
        refused = True
        raise OfflineModeIsEnabled(f"cannot reach {request.url}")

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [refuse]}
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not refused:
            raise
        why, cure = f"cannot reach {constants.ENDPOINT}", "check the network"
        if constants.HF_HUB_OFFLINE:
            why, cure = "HF_HUB_OFFLINE is set", "unset it"
        raise UserError(
            f"{why}, and {what} is not in the hub's cache on this machine: {cure}, or name a local "
            "folder"
        ) from error
    finally:
        session.event_hooks = hooks


def is_reachable() -> bool:
    """Whether the hub answers; a failure is remembered for a minute, an answer for good."""
    global _seen, _seen_at
    if _seen is None or (not _seen and time.monotonic() - _seen_at > TRUST_S):
        _seen, _seen_at = _probe(), time.monotonic()
    return _seen


def _probe() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=PROBE_S))
        except Exception:  # of its HTTP library, which has changed twice
            return

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit
    thread.start()
    thread.join(PROBE_S)
    return bool(answers)
