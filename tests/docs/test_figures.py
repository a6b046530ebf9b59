"""Every figure in the tables of the evidence pages is the one in its result file, as rounded."""

import json
import re
from collections.abc import Iterable
from decimal import Decimal
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"(?<![\w+-])-?(?:\d+\.?\d*|\.\d+)(?:e-\d+)?")
Cells = dict[str, Iterable[float]]  # column -> values, in the order of the cell


@cache
def result(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def table(page: str, header: str) -> dict[str, dict[str, str]]:
    """The cells of a table by the first cell of the row and the header."""
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    _, found, rest = text.partition(f"\n{header}")
    assert found, f"{page}.md has no table that begins with {header!r}"
    lines = (header + rest.partition("\n\n")[0]).split("\n")
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: dict(zip(split[0], cells, strict=True)) for cells in split[2:]}


def check(page: str, header: str, expected: dict[str, Cells]) -> None:
    shown = table(page, header)
    for row, cells in expected.items():
        for column, values in cells.items():
            names = [name for name in shown[row] if name.startswith(column)]
            text = re.sub(r"\(.*?\)|[*%,|:]|±|<", " ", shown[row][names[0]])
            numbers = NUMBER.findall(text)
            values = list(values)
            assert len(numbers) == len(values), f"{page}.md, {row}, {column}: {text}, {values}"
            for number, value in zip(numbers, values, strict=True):
                unit = Decimal(number).as_tuple().exponent
                assert abs(float(number) - value) <= 0.51 * 10.0**unit, (
                    f"{page}.md, {row}, {column}: {number} stands for {value:.4g}"
                )


def last(form: dict[str, Any]) -> dict[str, float]:
    return form["path"][-1]


def test_beta_in_the_small_model():
    seeds = result("beta")["seeds"]
    rows = {
        "NPO+RT, rule by held-out authors (beta 0.41 – 0.53)": "NPO+RT, beta by holdout",
        "NPO+RT, the paper's 0.1": "NPO+RT, beta 0.1",
        "SimNPO+RT": "SimNPO+RT",
        "GA+RT": "GA+RT",
    }
    expected: dict[str, Cells] = {}
    for row, form in rows.items():
        forms = {seed: last(record["forms"][form]) for seed, record in seeds.items()}
        kept = [100 * forms[s]["model_utility"] / seeds[s]["utility"] for s in seeds]
        expected[row] = {s: [each["forget_quality"]] for s, each in forms.items()}
        expected[row]["utility"] = [fmean(kept)]
    check("beta", "| form | 0 | 1", expected)


SMOLLM2 = {  # of eight authors
    "before unlearning": "original",
    "retrained": "retrained",
    "GA+RT": "GA+RT",
    "NPO+RT": "NPO+RT",
    "NPO+RT, the paper's 0.1": "NPO+RT",
    "NPO+RT, `--sharpness-rho 0.1`": "NPO+RT sharp 0.1",
    "NPO+RT, `--beta auto`": "NPO+RT beta auto",
    "NPO+KL": "NPO+KL",
    "NPO+KL, the paper's 0.1": "NPO+KL",
    "NPO+KL, `--beta auto`": "NPO+KL beta auto",
    "SimNPO+RT": "SimNPO+RT",
    "RMU, rate 6e-5": "RMU",
}


def test_smollm2_with_eight_authors():
    seeds = [result("forget_eight")["seeds"][s] for s in "012"]

    def values(method: str, label: str) -> list[float]:
        return [seed["models"][method][label] for seed in seeds]

    def attacked(method: str, attack: str) -> list[float]:
        rates = [seed["learning_rate"][method] for seed in seeds]
        return [
            seed["attacks"][method][rate][attack]["forget probability"]
            for seed, rate in zip(seeds, rates, strict=True)
        ]

    in_beta = "| | forget quality | P(forget) | utility | P(retain) | real authors answered |"
    in_steps = "| | P(forgotten answer) | after relearning | after int4 | forget quality of all"
    expected = {
        row: {
            "forget quality": values(method, "forget quality"),
            "P(forget)": values(method, "forget probability"),
            "utility": values(method, "model utility"),
            "P(retain)": values(method, "retain probability"),
            "real authors": values(method, "real authors ROUGE-L"),
        }
        for row, method in SMOLLM2.items()
        if row in table("beta", in_beta)
    }
    check("beta", in_beta, expected)
    assert len(expected) == len(table("beta", in_beta)) == 6
    expected = {}
    for row, method in SMOLLM2.items():
        if row not in table("steps", in_steps):
            continue
        expected[row] = {
            "forget quality": values(method, "forget quality"),
            "utility": values(method, "model utility"),
        }
        if method in seeds[0]["attacks"]:
            expected[row] |= {
                "P(forgotten": attacked(method, "before"),
                "after relearning": attacked(method, "relearn"),
                "after int4": attacked(method, "int4"),
            }
    check("steps", in_steps, expected)
    assert len(expected) == len(table("steps", in_steps)) - 1 == 10  # RMU at another rate


def test_smollm2_with_three_authors():
    seeds = result("forget_half_beta")["seeds"]
    header = "| | forget quality | P(forget) (retrained"
    rows = {
        "NPO+RT, `--beta auto` (0.027)": "NPO+RT beta auto",
        "NPO+RT, `--beta auto`, 10 epochs": "NPO+RT beta auto epochs 10",
        "NPO+KL, `--beta auto`": "NPO+KL beta auto",
        "NPO+RT, `--beta auto --keep-utility 0.95`": "NPO+RT beta auto keep 0.95",
        "NPO+RT, twice that beta (0.054)": "NPO+RT beta 0.054",
        "NPO+RT, the paper's 0.1": "NPO+RT",
    }
    assert [*table("beta", header)] == [*rows]
    expected: dict[str, Cells] = {}
    for row, method in rows.items():
        models = [s["models"] for s in seeds.values() if method in s["models"]]
        expected[row] = {
            "forget quality": [m[method]["forget quality"] for m in models],
            "P(forget)": [m[method]["forget probability"] for m in models],
            "utility": [
                100 * m[method]["model utility"] / m["original"]["model utility"] for m in models
            ],
            "P(retain)": [m[method]["retain probability"] for m in models],
            "real authors": [m[method]["real authors ROUGE-L"] for m in models],
        }
    check("beta", header, expected)


def test_sharp_steps_in_the_small_model():
    found = result("robustness")
    expected: dict[str, Cells] = {}
    for rho in ("0", "0.01", "0.03", "0.1", "0.3"):
        rows = sorted((r for r in found["rows"] if r["rho"] == float(rho)), key=lambda r: r["seed"])
        attacks = found["summary"][rho]
        expected["0 (ordinary steps)" if rho == "0" else rho] = {
            "P(forgotten": [attacks["before"]["forget_probability"]],
            "after relearning": [attacks["relearn"]["forget_probability"]],
            "after int4": [attacks["int4"]["forget_probability"]],
            "forget quality": [row["forget_quality"] for row in rows],
            "retain probability": [100 * fmean(row["kept"] for row in rows)],
        }
    check("steps", "| rho | P(forgotten", expected)


def test_kept_utility():
    ways = {
        "coefficient {:g}": "fixed",
        "`--keep-utility {:g}`": "keep",
        "PDU's dual step, {:g}": "dual",
    }
    expected: dict[str, dict[str, list[float]]] = {}
    for text, way in ways.items():
        for row in result("keep_utility")["rows"]:
            if row["way"] == way:
                cells = expected.setdefault(text.format(row["value"]), {})
                cells.setdefault(row["method"], []).append(100 * row["kept"])
    check("steps", "| | GA+RT | NPO+RT | SimNPO+RT |", expected)
    assert len(expected) == 7


def test_own_answers_as_retain_data():
    rows = {
        "real records (NPO+RT)": "NPO+RT, retain",
        "`--retain auto` (NPO+RT)": "NPO+RT, auto",
        "none (NPO)": "NPO, none",
        "real records, RMU": "RMU, retain",
    }
    seeds = result("retain_auto")["seeds"].values()
    before = [s["before"]["model_utility"] / 100 for s in seeds]
    expected: dict[str, Cells] = {}
    for row, arm in rows.items():
        utilities = [s[arm]["model_utility"] for s in seeds]
        expected[row] = {
            "forget quality": [s[arm]["forget_quality"] for s in seeds],
            "utility": [u / b for u, b in zip(utilities, before, strict=True)],
        }
    check("retain_auto", "| retain data | forget quality", expected)


@pytest.mark.parametrize(
    ("name", "last_request", "header", "methods"),
    [
        ("request_chain", 10, "| after request | | NPO+RT | NPO+RT, `--reference first`",
         {"NPO+RT": "NPO+RT", "NPO+RT, `--reference first`": "NPO+RT@first",
          "SimNPO+RT": "SimNPO+RT", "RMU": "RMU"}),
        ("request_chain_smollm2", 3, "| after request | | NPO+RT | SimNPO+RT",
         {"NPO+RT": "NPO+RT", "SimNPO+RT": "SimNPO+RT", "RMU": "RMU"}),
    ],
)  # fmt: skip
def test_several_requests(name, last_request, header, methods):
    text = (ROOT / "docs/requests.md").read_text(encoding="utf-8")
    lines = (header + text.partition(f"\n{header}")[2].partition("\n\n")[0]).split("\n")
    columns, _, *body = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    summary = result(name)["summary (mean, standard deviation)"]
    after, checked = "", 0
    for number, label, *cells in body:
        after = number or after
        key = {"kept": "P(kept)", "utility": "utility / original's"}.get(label.split(" ")[0], label)
        for column, cell in zip(columns[2:], cells, strict=True):
            values = summary[methods[column]][f"after {after}"]
            if key not in values:
                continue
            scale = 100 if "%" in cell else 1
            for shown, value in zip(
                NUMBER.findall(cell.replace("%", "")), values[key], strict=False
            ):
                unit = Decimal(shown).as_tuple().exponent
                assert abs(float(shown) - scale * value) <= 0.51 * 10.0**unit, (
                    number,
                    label,
                    column,
                )
                checked += 1
    assert after == str(last_request)
    assert checked >= 30
