"""The verbs of ``npo-fast``: what each is for, and the options that one needs first."""

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

from npo_fast.cli.fields import Option, options_of


@dataclass(frozen=True)
class Subcommand:
    """A module of ``npo_fast.cli`` with a dataclass ``Command`` and ``run(command) -> Output``."""

    group: str
    help: str
    example: str
    first: tuple[str, ...] = ()
    """Names of the options that ``--help`` shows; ``--help-all`` shows the others too."""
    on_ranks: bool = False
    """Whether several processes can share the work (``torchrun``)."""
    runs_model: bool = False
    """Whether it runs a model, and measures no time: it gets threads that fit the model."""


START, TRAIN, MEASURE, PAPER = "Start here", "Train", "Measure", "Check the claims"
SUBCOMMANDS = {
    "demo": Subcommand(
        START,
        "Watch a small model forget what it was taught (3 minutes, offline)",
        "npo-fast demo",
        first=("output", "overwrite", "seed"),
        runs_model=True,
    ),
    "doctor": Subcommand(
        START,
        "Show versions, devices, kernels, and what is not installed",
        "npo-fast doctor",
        first=("json",),
    ),
    "plan": Subcommand(
        START,
        "Predict how much memory a run needs, and which GPU it fits",
        "npo-fast plan --model meta-llama/Llama-2-7b-chat-hf --card 24",
        first=("model", "card", "method", "optimizer", "lora_rank"),
    ),
    "unlearn": Subcommand(
        TRAIN,
        "Make a model forget one data set and keep another",
        "npo-fast unlearn --model my-model --forget forget.jsonl --retain retain.jsonl "
        "--output runs/npo",
        first=("model", "forget", "retain", "method", "output"),
        on_ranks=True,
        runs_model=True,
    ),
    "finetune": Subcommand(
        TRAIN,
        "Teach a model a data set, to unlearn from or to compare with",
        "npo-fast finetune --model my-model --train facts.jsonl --output runs/taught",
        first=("model", "train", "epochs", "lr", "output"),
        on_ranks=True,
        runs_model=True,
    ),
    "evaluate": Subcommand(
        MEASURE,
        "Measure what a model still knows: TOFU, MUSE, lm-eval",
        "npo-fast evaluate --model runs/npo --data locuslab/TOFU --forget forget10 "
        "--retain retain90 --output runs/npo-eval",
        first=("model", "forget", "retain", "data", "retrained", "output"),
        on_ranks=True,
        runs_model=True,
    ),
    "attack": Subcommand(
        MEASURE,
        "Is it really gone? Relearn some, round the weights, measure again",
        "npo-fast attack --model runs/npo --data locuslab/TOFU --forget forget10 "
        "--output runs/npo-attack",
        first=("model", "forget", "retain", "data", "attacks", "output"),
        on_ranks=True,
        runs_model=True,
    ),
    "report": Subcommand(
        MEASURE,
        "Write one HTML page about runs: measures, curves, answers",
        "npo-fast report runs/npo runs/ga --retrained runs/retrained",
        first=("runs", "original", "retrained", "output"),
    ),
    "synthetic": Subcommand(
        PAPER,
        "Repeat the NPO paper's synthetic experiment, and check its claims",
        "npo-fast synthetic",
        first=("output", "overwrite", "quick"),
        runs_model=True,
    ),
    "reproduce": Subcommand(
        PAPER,
        "Measure published numbers again, and compare",
        "npo-fast reproduce --list",
        first=("names", "list", "data", "model", "output"),
        runs_model=True,
    ),
    "bench": Subcommand(
        PAPER,
        "Time the losses beside those of others, or the GPU kernels",
        "npo-fast bench loss",
        first=("what", "rows", "vocabulary", "dtype", "output"),
    ),
    "completion": Subcommand(
        "Set up",
        "Print a script that completes npo-fast's options in your shell",
        "npo-fast completion bash > ~/.local/share/bash-completion/completions/npo-fast",
        first=("shell",),
    ),
}


def module_of(verb: str) -> Any:
    """The module of a subcommand."""
    return importlib.import_module(f"npo_fast.cli.{verb}")


@cache
def options_of_verb(verb: str) -> tuple[Option, ...]:
    """The options that the verb has of its own."""
    return tuple(options_of(module_of(verb).Command))
