"""``npo-fast plan --ranks`` against the truth: peak memory of each of two and four CPU processes.

    pip install --no-deps peft torchao bitsandbytes
    python benchmarks/plan_truth_ranks.py

As ``plan_truth.py``, with a set of processes for each run: models with random weights, sharded as
the package does it, trained for two steps. Writes ``benchmarks/results/plan_truth_ranks.json``;
fails where prediction and truth are more than 10 % apart.

gloo's collectives on a CPU copy what they are given, NCCL's have buffers of a fixed size. The runs
therefore hand gloo 1 MiB at a time (``collectives_in_pieces``): what is left are the tensors that
FSDP2 and the package hold on a GPU too. torchao compiles its updates on a GPU and runs them
operator by operator on a CPU, with a dozen temporaries of a tensor: the peaks of its optimizers are
those outside of ``step``.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from plan_truth import MIB, TOLERANCE, status_bytes

RESULT = Path(__file__).parent / "results" / "plan_truth_ranks.json"
PIECE_BYTES = MIB
RANKS = (2, 4)
MODELS = {
    "Llama": {
        "vocab_size": 16384, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 5, "num_attention_heads": 12, "num_key_value_heads": 12,
        "tie_word_embeddings": False,
    },
    "Qwen2": {
        "vocab_size": 24575, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 5, "num_attention_heads": 12, "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "GPTNeoX": {
        "vocab_size": 16384, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 5, "num_attention_heads": 12,
    },
    "Gemma2": {  # tied; an embedding that scales its rows; capped logits
        "vocab_size": 24576, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 96,
    },
}  # fmt: skip
RUNS: list[dict[str, Any]] = [
    {"model": "Llama"},
    {"model": "Llama", "gradient_checkpointing": True},
    {"model": "Llama", "lora_rank": 16, "micro_batch_tokens": 512},
    {"model": "Llama", "optimizer": "adamw-8bit"},
    {"model": "Llama", "optimizer": "adamw-bf16", "dtype": "bf16"},
    {"model": "Llama", "step_in_backward": True},
    {"model": "Llama", "sharpness_rho": 0.01},
    {"model": "Llama", "method": "NPO+KL"},
    {"model": "Llama", "method": "UNDIAL"},
    {"model": "Llama", "method": "RMU"},
    {"model": "Qwen2"},
    {"model": "GPTNeoX"},
    {"model": "Gemma2"},
    {"model": "Llama", "quantize": "4bit", "lora_rank": 16, "dtype": "bf16"},
]


def collectives_in_pieces() -> None:
    """Makes gloo gather and sum so few bytes at a time that its copies do not matter."""
    import torch.distributed as dist

    gather, reduce = dist.all_gather_single, dist.reduce_scatter_single

    def gather_pieces(
        output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False
    ) -> None:
        flat, count = input_tensor.reshape(-1), dist.get_world_size(group)
        whole = output_tensor.view(count, -1)
        for piece in pieces(flat):
            part = flat[piece].clone()
            gathered = part.new_empty(count * len(part))
            gather(gathered, part, group=group)
            whole[:, piece] = gathered.view(count, -1)

    def reduce_pieces(
        output: Any, input: Any, op: Any = dist.ReduceOp.SUM, group: Any = None,
        async_op: bool = False,
    ) -> None:  # fmt: skip
        flat, count = output.view(-1), dist.get_world_size(group)
        parts = input.view(count, -1)
        for piece in pieces(flat):
            part = parts[:, piece].flatten()
            reduced = part.new_empty(len(part) // count)
            reduce(reduced, part, op=op, group=group)
            flat[piece] = reduced

    def pieces(flat: Any) -> list[slice]:
        step = PIECE_BYTES // flat.element_size()
        return [slice(first, first + step) for first in range(0, len(flat), step)]

    dist.all_gather_single, dist.reduce_scatter_single = gather_pieces, reduce_pieces


def planned_run(run: dict[str, Any]) -> Any:
    from npo_fast.planner import PlannedRun

    settings = {"dtype": "fp32", "micro_batch_tokens": 256, "sequence_length": 64, **run}
    if run.get("step_in_backward"):  # the tokens of a step, both sets
        settings["micro_batch_tokens"] *= 2
    return PlannedRun(**{name: value for name, value in settings.items() if name != "model"})


def train_two_steps(model: Any, planned: Any, ranks: int) -> None:
    from npo_fast.data import TokenizedExample
    from npo_fast.methods import build_method
    from npo_fast.model.causal_lm import CausalLM
    from npo_fast.trainer.loop import reference_cache_for, reference_log_probs, train
    from npo_fast.trainer.settings import TrainSettings

    length, tokens = planned.sequence_length, planned.micro_batch_tokens
    if planned.step_in_backward:
        tokens //= 2
    count = ranks * tokens // length
    ids = [tuple((7 * i + j) % 900 + 3 for j in range(length)) for i in range(count)]
    sources = {
        name: [TokenizedExample(row, length // 4, i) for i, row in enumerate(ids)]
        for name in ("forget", "retain")
    }
    lm, terms = CausalLM(model, probe=False), build_method(planned.method)
    references = reference_log_probs(lm, sources, terms, tokens)
    cache = reference_cache_for(terms, lm, sources, tokens)
    settings = TrainSettings(
        epochs=2, batch_size=count, micro_batch_tokens=planned.micro_batch_tokens, warmup_steps=0,
        optimizer=planned.optimizer, gradient_checkpointing=planned.gradient_checkpointing,
        step_in_backward=planned.step_in_backward, sharpness_rho=planned.sharpness_rho,
    )  # fmt: skip
    for record in train(lm, sources, terms, settings, references, cache):
        print(f"step {record.step}: {record.time_ms:.0f} ms", file=sys.stderr)


def sharded_model(config: Any, planned: Any, mesh: Any) -> Any:
    import torch
    import transformers

    from npo_fast import distributed
    from npo_fast.model.adapters import add_lora
    from npo_fast.model.load import DTYPES, load_model
    from npo_fast.model.sharding import shard

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[planned.dtype])
    if planned.quantize != "none":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)  # the first process does
            del model
            folder = distributed.broadcast_object(folder)
            settings = {name: getattr(planned, name) for name in ("dtype", "quantize", "lora_rank")}
            return load_model(folder, device="cpu", mesh=mesh, **settings).model
    if planned.lora_rank:
        model = add_lora(model, "random", planned.lora_rank, alpha=2 * planned.lora_rank)
    return shard(model, mesh)


def measure_rank(run: dict[str, Any], ranks: int, meeting: str) -> int:
    """Bytes that one process needs at most, beyond what it has without a model."""
    import torch
    import transformers
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    collectives_in_pieces()
    from npo_fast import distributed

    torch.set_num_threads(1)
    mesh = distributed.init_process_group(
        torch.device("cpu"), init_method=f"file://{meeting}", rank=distributed.rank(),
        world_size=ranks,
    )  # fmt: skip
    planned = planned_run(run)
    # libraries, threads, compiled code and the buffers of matrix products (which depend on the
    # width) are not the run's memory
    kind, sizes = getattr(transformers, f"{run['model']}Config"), MODELS[run["model"]]
    small = kind(**{**sizes, "num_hidden_layers": 1, "vocab_size": 1024})
    train_two_steps(sharded_model(small, planned, mesh), planned, ranks)
    gc.collect()
    before = status_bytes("VmRSS:")
    config = kind(**sizes)
    model = sharded_model(config, planned, mesh)
    gc.collect()
    peaks: list[int] = []
    if planned.optimizer != "adamw":
        register_optimizer_step_pre_hook(lambda *_: peaks.append(status_bytes("VmHWM:")))
        register_optimizer_step_post_hook(lambda *_: forget_peak())
    forget_peak()  # loading is not training
    train_two_steps(model, planned, ranks)
    measured = max(*peaks, status_bytes("VmHWM:"), 0) - before
    distributed.destroy_process_group()
    return measured


def forget_peak() -> None:
    """Makes the resident set of this moment its high-water mark."""
    Path("/proc/self/clear_refs").write_text("5")


def predict(run: dict[str, Any], ranks: int) -> Any:
    import transformers

    from npo_fast.planner import footprint

    config = getattr(transformers, f"{run['model']}Config")(**MODELS[run["model"]])
    return footprint(config, planned_run(run), ranks)


def measure(run: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Predicted and measured MiB of a run on so many processes."""
    # mapped one by one, what is freed goes back to the system and counts when it is used again
    common = {
        **os.environ, "WORLD_SIZE": str(ranks), "MALLOC_MMAP_THRESHOLD_": "16384",
        "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "16384", "MALLOC_TOP_PAD_": "0",
        "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1",
        "NPO_FAST_CPU_BF16": "1",  # as a GPU; without AMX our products would be in fp32
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        request = json.dumps([run, ranks, f"{folder}/meeting"])
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--one", request], text=True,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE, stderr=(Path(folder) / f"{rank}.txt").open("w"),
            )
            for rank in range(ranks)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            sys.exit("\n".join(file.read_text() for file in Path(folder).glob("*.txt")))
    of_ranks = [int(output.splitlines()[-1]) for output in outputs]
    predicted = predict(run, ranks)
    return {
        **run,
        "ranks": ranks,
        "predicted_mib": round(predicted.peak / MIB, 1),
        "measured_mib": round(max(of_ranks) / MIB, 1),
        "predicted_over_measured": round(predicted.peak / max(of_ranks), 4),
        "measured_mib_by_rank": [round(size / MIB, 1) for size in of_ranks],
        **{f"{kind}_mib": round(size / MIB, 1) for kind, size in predicted.bytes.items() if size},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument(
        "--only", type=int, nargs="+", help="numbers of runs, from 0; others stay in the result"
    )
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.one is not None:
        print(measure_rank(*options.one))
        return
    from npo_fast.bench.provenance import provenance

    made = provenance()
    runs: dict[tuple[int, int], dict[str, Any]] = {}
    if options.only is not None and options.result.exists():  # the others stay
        earlier = json.loads(options.result.read_text())["runs"]
        runs = {(run["ranks"], run["number"]): run for run in earlier}
    for ranks in options.ranks:
        for number in range(len(RUNS)) if options.only is None else options.only:
            found = {"number": number, **measure(RUNS[number], ranks), "commit": made["commit"]}
            print(json.dumps(found), flush=True)
            runs[ranks, number] = found
            ordered = [runs[key] for key in sorted(runs)]
            options.result.write_text(json.dumps({"runs": ordered, **made}, indent=1) + "\n")
    wrong = [r for r in runs.values() if abs(r["predicted_over_measured"] - 1) > TOLERANCE]
    if wrong:
        sys.exit(f"more than {TOLERANCE:.0%} apart: {wrong}")


if __name__ == "__main__":
    main()
