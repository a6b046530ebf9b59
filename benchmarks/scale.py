"""What the links between GPUs carry in a training step, and when that decides its time, on paper.

    python benchmarks/scale.py                           # counts; writes results/scale.json
    python benchmarks/scale.py --page docs/scale.md      # writes the page's tables from that file

``traffic.py`` counts. Times follow from assumed rates. No weights, no GPU, no network.
"""

import argparse
import json
import math
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from traffic import (
    METHOD,
    PASSES,
    PROMPT,
    SEQUENCE,
    Setup,
    StepCount,
    count_by_depth,
    count_step,
    of_depth,
)
from transformers import LlamaConfig

from npo_fast.bench.provenance import provenance
from npo_fast.ops.cost import FLOPS_PER_S
from npo_fast.planner import PlannedRun, footprint
from npo_fast.planner.memory import GIB

RESULT = Path(__file__).parent / "results" / "scale.json"
CONFIGS = {
    "Llama-2-7B": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=32000, tie_word_embeddings=False,
    ),
    "Llama-3.1-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
    "Llama-3.1-405B": LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
}  # fmt: skip
LORA_RANK = 16
# bytes a second that a GPU can send, one way, an H100: NVLink 4 within a node of 8; between nodes a
# network card of 400 Gb/s a GPU, taken by one ring after all GPUs, or by eight rings side by side
NVLINK, ONE_CARD, EIGHT_CARDS = 450e9, 50e9, 400e9
LINKS = {8: (NVLINK,), 16: (ONE_CARD, EIGHT_CARDS), 64: (ONE_CARD, EIGHT_CARDS)}
GPU_FLOPS_PER_S = FLOPS_PER_S[2]
SHOWN_MODEL, SHOWN_TOKENS = "Llama-3.1-70B", (2048, 16384)  # in the table of seconds
CARD_GIB = 79.6  # of an H100 with 80 GB


@dataclass
class Case:
    """One model and setup: what a pass costs, as ``layers_bytes + tokens * token_bytes``."""

    model: str
    setup: Setup
    count: StepCount

    @property
    def layers_bytes(self) -> float:
        """Sent a pass, however many tokens it has."""
        return self.count.traffic.sent("layers") / PASSES

    def token_bytes(self, part: str) -> float:
        """Sent for each token of a pass."""
        return self.count.traffic.sent(part) / PASSES / self.setup.tokens

    @property
    def all_token_bytes(self) -> float:
        return self.token_bytes("embedding") + self.token_bytes("head")

    @property
    def token_flops(self) -> float:
        return self.count.flops / PASSES / self.setup.tokens

    def seconds(self, tokens: int, link: float) -> tuple[float, float]:
        """Of a pass: by links of so many bytes a second alone, by the flops alone."""
        sent = self.layers_bytes + tokens * self.all_token_bytes
        return sent / link, tokens * self.token_flops / GPU_FLOPS_PER_S

    def break_even_tokens(self, link: float) -> int | None:
        """Tokens of a pass from which the flops take longer; None where they never do."""
        a_token = self.token_flops / GPU_FLOPS_PER_S * link
        if a_token <= self.all_token_bytes:
            return None
        return math.ceil(self.layers_bytes / (a_token - self.all_token_bytes))

    def needed_gib(self, tokens: int) -> float:
        """What a GPU must have for passes of so many tokens, by ``npo_fast.planner``.

        From four and eight layers: fewer have no layer before and behind that is gathered too.
        """
        config = CONFIGS[self.model]
        four, eight = (self.planned_bytes(of_depth(config, layers), tokens) for layers in (4, 8))
        return (eight + (config.num_hidden_layers - 8) * (eight - four) / 4) / GIB

    def planned_bytes(self, config: LlamaConfig, tokens: int) -> int:
        """What a GPU must have for passes of so many tokens."""
        planned = PlannedRun(
            method=METHOD, optimizer="adamw" if self.setup.lora_rank else "adamw-bf16",
            micro_batch_tokens=tokens, sequence_length=SEQUENCE, lora_rank=self.setup.lora_rank,
            gradient_checkpointing=self.setup.gradient_checkpointing,
        )  # fmt: skip
        return footprint(config, planned, self.setup.ranks).needed

    def as_dict(self) -> dict[str, Any]:
        """What is counted, and what follows from it for bf16, whose rate is assumed."""
        half = self.setup.dtype == "bf16"
        return {
            "model": self.model, "parameters": self.count.parameters,
            **asdict(self.setup), "collectives_of_a_step": self.count.traffic.as_dict(),
            "flops_of_a_step": self.count.flops,
            "layers_bytes_of_a_pass": round(self.layers_bytes),
            "embedding_bytes_of_a_token": round(self.token_bytes("embedding")),
            "head_bytes_of_a_token": round(self.token_bytes("head")),
            "flops_of_a_token": round(self.token_flops),
            "links": [self._over(link) for link in LINKS[self.setup.ranks] if half],
        }  # fmt: skip

    def _over(self, link: float) -> dict[str, Any]:
        tokens = self.break_even_tokens(link)
        gib = None if tokens is None else self.needed_gib(-(-tokens // SEQUENCE) * SEQUENCE)
        times = {str(n): self.seconds(n, link) for n in SHOWN_TOKENS}
        return {
            "bytes_per_s": link, "break_even_tokens": tokens,
            "break_even_gib": None if gib is None else round(gib, 1),
            "links_s": {n: round(links, 4) for n, (links, _) in times.items()},
            "flops_s": {n: round(flops, 4) for n, (_, flops) in times.items()},
        }  # fmt: skip


def measure(processes: int) -> dict[str, Any]:
    """All cases, and checks of what they assume."""
    setups = [
        (name, Setup(ranks, lora_rank, recompute))
        for name in CONFIGS
        for ranks in LINKS
        for lora_rank in (0, LORA_RANK)
        for recompute in (False, True)
    ]
    whole = [(name, setup) for name, setup in setups if (name, setup.ranks) == ("Llama-2-7B", 8)]
    whole.append(("Llama-3.1-70B", Setup(16, gradient_checkpointing=True)))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        cases = [
            pool.submit(case_of, *setup)
            for setup in [*setups, ("Llama-2-7B", Setup(8, dtype="fp32"))]
        ]
        agrees = {
            f"{name}, {setup.ranks} GPUs, LoRA rank {setup.lora_rank}, gradient checkpointing "
            f"{setup.gradient_checkpointing}: all layers as from one and two":
                pool.submit(depth_is_linear, name, setup)
            for name, setup in whole
        }  # fmt: skip
        agrees["twice the tokens: bytes and flops as expected"] = pool.submit(tokens_are_linear)
        return {
            "assumed": {
                "flops_per_s": GPU_FLOPS_PER_S, "method": METHOD, "sequence_tokens": SEQUENCE,
                "prompt_tokens": PROMPT, "tokens_of_a_counted_pass": Setup(1).tokens,
            },
            "checks": {name: check.result() for name, check in agrees.items()},
            "cases": [case.result() for case in cases],
        }  # fmt: skip


def case_of(name: str, setup: Setup) -> dict[str, Any]:
    """One case of the result."""
    found = Case(name, setup, count_by_depth(CONFIGS[name], setup)).as_dict()
    print(json.dumps(found), flush=True)
    return found


def depth_is_linear(name: str, setup: Setup) -> bool:
    """Whether all layers cost what follows from a few: the same bytes sent and flops, and memory
    to a thousandth."""
    config = CONFIGS[name]
    case = Case(name, setup, count_step(config, setup))
    memory = case.planned_bytes(config, SHOWN_TOKENS[0]) / GIB
    return (
        case.count == count_by_depth(config, setup)
        and abs(case.needed_gib(SHOWN_TOKENS[0]) / memory - 1) < 1e-3
    )


def tokens_are_linear() -> bool:
    """Whether tokens change no bytes of layers, and all others in proportion."""
    once, twice = (
        Case("", setup, count_by_depth(CONFIGS["Llama-3.1-70B"], setup))
        for setup in (Setup(64), Setup(64, tokens=2 * Setup(64).tokens))
    )
    longest = 2 * 8 / once.setup.tokens  # an all-reduce of one number, the longest pack, each pass
    return (
        once.layers_bytes == twice.layers_bytes
        and once.token_flops == twice.token_flops
        and once.token_bytes("head") == twice.token_bytes("head")
        and abs(once.token_bytes("embedding") - twice.token_bytes("embedding")) < longest
    )


# ---- the page ------------------------------------------------------------------------------------

COLUMNS = {  # of tables: LoRA rank, gradient checkpointing
    "all weights": (0, False),
    "and checkpointing": (0, True),
    f"LoRA {LORA_RANK}": (LORA_RANK, False),
    "LoRA and checkpointing": (LORA_RANK, True),
}
LINK_NAMES = {NVLINK: "450 GB/s", ONE_CARD: "50 GB/s", EIGHT_CARDS: "400 GB/s"}
# (model, ranks) -> a setup of COLUMNS -> the case
Cases = dict[tuple[str, int], dict[tuple[int, bool], dict[str, Any]]]


def with_tables(page: str, result: dict[str, Any]) -> str:
    """The page with the result's tables below their marks, ``<!-- name -->``."""
    for name, table in tables(result).items():
        page, count = re.subn(rf"(<!-- {name} -->\n)(\|.*\n)*", rf"\g<1>{table}\n", page)
        assert count == 1, name
    return page


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Tables in Markdown by name."""
    cases: Cases = {}
    for case in result["cases"]:
        if case["dtype"] == "bf16":
            setups = cases.setdefault((case["model"], case["ranks"]), {})
            setups[case["lora_rank"], case["gradient_checkpointing"]] = case
    linked = [(m, ranks, link) for m in CONFIGS for ranks in LINKS for link in LINKS[ranks]]
    times = [
        f"{_spaced(n)} tokens: {w}" for n in SHOWN_TOKENS for w in ("links, flops", "max, sum")
    ]
    return {
        "bytes": _table(
            ["model", "GPUs", "layers a pass", f"with LoRA {LORA_RANK}", "embedding a token",
             "head a token", "flops a token", "with checkpointing", f"with LoRA {LORA_RANK}"],
            [_bytes_row(cases, model, ranks) for model in CONFIGS for ranks in LINKS],
        ),
        "break-even": _table(
            ["model", "GPUs", "link", *COLUMNS], [_even_row(cases, *row) for row in linked]
        ),
        "seconds": _table(
            ["model", "GPUs", "link", *times],
            [_time_row(cases, *row) for row in linked if row[0] == SHOWN_MODEL],
        ),
    }  # fmt: skip


def _bytes_row(cases: Cases, model: str, ranks: int) -> list[str]:
    full, again, lora = (
        cases[model, ranks][setup] for setup in ((0, False), (0, True), (LORA_RANK, False))
    )
    return [
        model, str(ranks), f"{full['layers_bytes_of_a_pass'] / 1e9:.0f} GB",
        f"{lora['layers_bytes_of_a_pass'] / 1e9:.0f} GB",
        f"{full['embedding_bytes_of_a_token'] / 1e3:.0f} KB",
        f"{full['head_bytes_of_a_token'] / 1e3:.0f} KB",
        *(f"{case['flops_of_a_token'] / 1e9:.0f} G" for case in (full, again, lora)),
    ]  # fmt: skip


def _even_row(cases: Cases, model: str, ranks: int, link: float) -> list[str]:
    row = [model, str(ranks), LINK_NAMES[link]]
    for setup in COLUMNS.values():
        found = _over(cases[model, ranks][setup], link)
        tokens, gib = found["break_even_tokens"], found["break_even_gib"]
        if tokens is None:
            row.append("never")
            continue
        bold = "**" if gib <= CARD_GIB else ""
        row.append(f"{bold}{_spaced(tokens)}{bold} ({gib:.0f} GiB)")
    return row


def _time_row(cases: Cases, model: str, ranks: int, link: float) -> list[str]:
    row = [model, str(ranks), LINK_NAMES[link]]
    found = _over(cases[model, ranks][0, True], link)
    for tokens in map(str, SHOWN_TOKENS):
        links, flops = found["links_s"][tokens], found["flops_s"][tokens]
        row += [
            f"{_short(links)}, {_short(flops)}",
            f"{_short(max(links, flops))}, {_short(links + flops)}",
        ]
    return row


def _over(case: dict[str, Any], link: float) -> dict[str, Any]:
    return next(found for found in case["links"] if found["bytes_per_s"] == link)


def _short(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="write this page's tables; count nothing")
    parser.add_argument("--processes", type=int, default=2, help="cases at a time")
    arguments = parser.parse_args()
    file = arguments.page
    if file is not None:
        file.write_text(with_tables(file.read_text(), json.loads(RESULT.read_text())))
        return
    RESULT.write_text(json.dumps({**measure(arguments.processes), **provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
