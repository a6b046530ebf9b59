"""HTML pages from the Jinja templates beside this module: every text is escaped but ``Markup``."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from npo_fast import tables
from npo_fast._version import __version__

# a file with this comment may be replaced by a new report
MARK = "<!-- made by npo-fast report -->"


def _shown(value: Any) -> Any:
    """A text from data without control characters, which HTML cannot hold."""
    return tables.printable(value) if type(value) is str else value


_ENVIRONMENT = Environment(
    loader=PackageLoader("npo_fast.reports"),
    autoescape=True,
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals.update(mark=Markup(MARK), version=__version__)
_ENVIRONMENT.filters.update(cell=tables.text)


def render(template: str, **values: Any) -> str:
    """The page that ``templates/<template>.html.j2`` makes of ``values``."""
    return _ENVIRONMENT.get_template(f"{template}.html.j2").render(values)
