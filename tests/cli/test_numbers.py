"""What the documentation says of its numbers stands in the result files."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def test_the_tables_of_the_pages_are_those_of_the_result_files():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/every_number.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_result_file_is_in_the_list():
    page = (ROOT / "docs/numbers.md").read_text(encoding="utf-8")
    files = [str(path.relative_to(RESULTS)) for path in RESULTS.rglob("*.json")]
    assert [file for file in files if f"`{file}`" not in page] == []
