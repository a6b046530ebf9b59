"""Weights of a model folder, file or hub repository: all of them, or an error that names them.

transformers draws what it does not find at random, and leaves out what it has no place for.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from npo_fast.distributed import local_of
from npo_fast.errors import UserError

# parts of a checkpoint that no language model runs: towers of other senses, heads for several
# tokens at a time, value heads of reinforcement learning. A family's own are declared by its class.
OTHER_PARTS = re.compile(r"(^|\.)(mtp|nextn|visual|vision|image|audio|video|v_head)(_\w+)?\.")
NAMED = 3  # tensors that a message names
logger = logging.getLogger(__name__)


def load_complete(model_class: Any, name: str, **arguments: Any) -> Any:
    """``model_class.from_pretrained``, which has to find every tensor.

    Tied weights, and what the class declares to be optional, may be absent. Tensors in the files
    that have no place in the model are refused too, as they show a configuration of another model:
    all but those that the class declares, and ``OTHER_PARTS``, which the log tells.

    Args:
        name: of the model in messages.

    Raises:
        UserError: tensors are missing, of another shape, or without a place.
    """
    with _quiet_report():
        model, info = model_class.from_pretrained(
            **arguments, output_loading_info=True, ignore_mismatched_sizes=True
        )
    left_out = sorted(key for key in info["unexpected_keys"] if OTHER_PARTS.search(key))
    network, unexpected = type(model).__name__, {*info["unexpected_keys"]} - {*left_out}
    check_tensors(name, network, info["missing_keys"], unexpected, info["mismatched_keys"])
    if left_out:
        logger.info(f"{network} leaves out {_some(left_out)} of {name}")
    return model


def check_tensors(
    name: str,
    network: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Any, Any]] = (),
) -> None:
    """Raises ``UserError`` that names the tensors, if there are any.

    Args:
        network: what the tensors are for, such as the class of the model.
        mismatched: name, shape in the files, shape in the model.
    """
    shapes = [f"{key}: {tuple(here)}, not {tuple(wanted)}" for key, here, wanted in mismatched]
    reasons = [
        f"{phrase} ({_some(sorted(keys))})"
        for phrase, keys in (
            (f"its files lack tensors of {network}", list(missing)),
            (f"{network} has no place for tensors of its files", list(unexpected)),
            ("its files hold tensors of another shape than its configuration says", shapes),
        )
        if keys
    ]
    if reasons:
        raise UserError(
            f"the weights of {name} do not fit: {'; '.join(reasons)}. Download or save it again, "
            "or mend its configuration"
        )


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, tensors may change; afterwards they have their values again, from CPU memory."""
    kept = [local_of(tensor).detach().to("cpu", copy=True) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, kept, strict=True):
                local_of(tensor).copy_(values)


def _some(names: list[str]) -> str:
    """How many there are, and the first of them."""
    count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
    return f"{count}: {', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''}"


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Inside, transformers prints no table of tensors; ``check_tensors`` says it in one line."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    theirs = logging.getLogger("transformers.modeling_utils")
    theirs.addFilter(keep)
    try:
        yield
    finally:
        theirs.removeFilter(keep)
