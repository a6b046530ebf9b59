"""Paths as files show them that go to others: below the working directory, or the name alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def below_here(name: str) -> str:
    """An absolute path as it is from the working directory, where it lies below; else as it is."""
    path = Path(name)
    if not path.is_absolute():
        return name
    for here in (Path.cwd(), Path.cwd().resolve()):
        if path.is_relative_to(here):
            return str(path.relative_to(here))
    return name


def shown(name: str) -> str:
    """A name without an absolute path: ``runs/npo`` below the working directory, else ``…/npo``."""
    relative = Path(below_here(name))
    return f"…/{relative.name}" if relative.is_absolute() else name and str(relative)


def places(value: Any) -> Iterator[str]:
    """The absolute paths among texts, in settings of any depth."""
    if isinstance(value, (str, Path)):
        if len(Path(value).parts) > 1 and Path(value).is_absolute():
            yield str(value)
    elif isinstance(value, (Mapping, list)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from places(each)
