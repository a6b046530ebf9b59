"""The site builds without a warning, needs no other host, and its search finds what users ask."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from tests.docs.pages import ROOT

# words of a question, and the page that answers it
QUESTIONS = {
    "out of memory": "troubleshooting", "learning rate": "choosing", "resume": "runs",
    "beta auto": "beta", "gguf": "quickstart", "LoRA": "memory", "chat template": "data",
    "exit code": "troubleshooting", "bf16": "memory", "several gpus": "several_gpus",
    "membership inference": "evaluation", "retain auto": "retain_auto", "tofu": "evaluation",
    "muse": "muse", "trl": "integrations", "deepspeed": "integrations", "softcap": "own_loop",
    "windows max-length": "data", "verdict": "evaluation", "push-to-hub": "runs",
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'npo-fast[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Loaded(HTMLParser):
    """Addresses that a browser asks for by itself."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.addresses.append(named.get("src"))
        if tag == "link" and named.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(named.get("href"))


@pytest.mark.slow
def test_no_page_loads_anything_from_another_host(site):
    pages = [*site.rglob("*.html")]
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert not [a for a in loaded.addresses if a and re.match(r"(?:\w+:)?//", a)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", sheet.read_text()), sheet


@pytest.mark.slow
@pytest.mark.parametrize(("question", "page"), QUESTIONS.items())
def test_the_search_index_has_the_words_of_a_question_on_its_page(site, question, page):
    index = json.loads((site / "search/search_index.json").read_text())
    text = " ".join(
        f"{entry['title']} {entry['text']}".casefold()
        for entry in index["docs"]
        if entry["location"].partition("#")[0] == f"{page}.html"
    )
    assert all(word in text for word in question.casefold().split()), page
