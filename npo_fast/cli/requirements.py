"""What the metadata of npo-fast asks of other packages, held against what is installed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from npo_fast.versions import version_of

PROJECT = "npo-fast"


@dataclass(frozen=True)
class Need:
    """A package that npo-fast uses."""

    package: str
    versions: str  # a range such as ">=2.10,<2.14"; empty for any
    installed: str | None  # the version, or None

    @property
    def is_met(self) -> bool:
        """Whether the package is installed in a version of the range."""
        return self.installed is not None and self.fits

    @property
    def fits(self) -> bool:
        """Whether the installed version, where there is one, is in the range."""
        return self.installed is None or SpecifierSet(self.versions).contains(
            self.installed, prereleases=True
        )


def own_requirements() -> list[str] | None:
    """Returns the requirements in the metadata of npo-fast, or None where it is not installed."""
    try:
        return requires(PROJECT) or []
    except PackageNotFoundError:
        return None


def needs(requirements: Iterable[str], extra: str = "") -> list[Need]:
    """Returns what npo-fast needs on this machine, or one of its extras does."""
    ranges: dict[str, SpecifierSet] = {}
    for requirement in _of_extra([Requirement(line) for line in requirements], extra):
        name = requirement.name
        ranges[name] = ranges.get(name, SpecifierSet()) & requirement.specifier
    return [Need(name, _text(versions), version_of(name)) for name, versions in ranges.items()]


def _of_extra(requirements: list[Requirement], extra: str) -> Iterator[Requirement]:
    """The requirements of an extra; extras that it names are replaced by theirs."""
    for requirement in requirements:
        marker = requirement.marker
        for_extra = marker is not None and not marker.evaluate({"extra": ""})
        applies = marker is None or marker.evaluate({"extra": extra})
        if not applies or for_extra != bool(extra):
            continue
        if requirement.name == PROJECT:
            for other in sorted(requirement.extras):
                yield from _of_extra(requirements, other)
        else:
            yield requirement


def _text(versions: SpecifierSet) -> str:
    """A range with its lower bound first."""
    return ",".join(sorted(map(str, versions), reverse=True))
