"""Hooks of mkdocs: the name of a file above its block, and CHANGELOG.md as a page."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

# below the pages that explain, where both have a word
_LAST_IN_SEARCH = "---\nsearch:\n  boost: 0.1\n---\n\n"
# to a file of the repository that is no page
_OUTER_LINK = re.compile(r"\[([^\]]+)\]\((?!docs/|https?:|#)[^)]+\)")
# ```json facts.jsonl: a block that is a file, as tests/docs/pages.py reads it
_NAMED_FENCE = re.compile(r"^( *```\w+) (\S+)$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds the page changelog.md: links to docs/ are links beside it, other files are named."""
    changelog = Path(config.config_file_path).parent / "CHANGELOG.md"
    text = _OUTER_LINK.sub(r"\1", changelog.read_text(encoding="utf-8")).replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=_LAST_IN_SEARCH + text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Writes the name of a file as the title of its block."""
    return _NAMED_FENCE.sub(r'\1 title="\2"', markdown)
