"""Every causal language model of the installed transformers: does npo_fast train it exactly?

    python benchmarks/families.py                    all: docs/families.md and the result file
    python benchmarks/families.py llama gpt2         these alone, on the terminal

A tiny random model of each family is handed to ``CausalLM`` with its initial weights, in fp32 and
in bf16. What is decided there (packed, one by one, refused) is held against an independent truth:
log-probs and gradients of the model's own forward, a sequence at a time in fp64, with weights that
are several times larger than the initial ones.
"""

import argparse
import copy
import json
import re
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from npo_fast.bench.provenance import provenance
from npo_fast.data import TokenizedExample, pack
from npo_fast.errors import UserError, first_line
from npo_fast.kernels.transform import HeadTransform
from npo_fast.model.causal_lm import CausalLM

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "benchmarks/results/families.json", ROOT / "docs/families.md"
VOCABULARY, LENGTHS = 97, ((9, 3), (4, 1), (17, 5), (9, 8), (11, 1))  # tokens, of them the prompt
MAX_PARAMETERS, SECONDS = 20_000_000, 120
# Of the spread of the log-probs and of the largest norm of a gradient: families round parts to fp32
TOLERANCE = 1e-4
FACTORS = (4.0, 2.0, 1.0)  # on the initial weights, the first at which the model stays finite

# What configurations call their sizes and what they do to logits: each takes what it knows
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size": 32, "embedding_dim": 32,
    "word_embed_proj_dim": 32, "intermediate_size": 48, "d_ff": 48, "dff": 48, "d_inner": 48,
    "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "num_hidden_layers": 2,
    "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "rotary_dim": 4, "max_position_embeddings": 128, "n_positions": 128,
    "n_ctx": 128, "sliding_window": 6,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 16, "n_group": 1,
    "shared_expert_intermediate_size": 16, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_chunk_size": 8, "state_size": 8, "chunk_size": 8,
    "conv_kernel": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
    "logit_scale": 0.25, "logits_scaling": 3.0, "lm_head_multiplier": 0.3,
    "final_logit_softcapping": 3.0, "logits_soft_cap": 3.0, "output_logit_soft_cap": 3.0,
    "attn_logit_softcapping": 2.0, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8, "laurel_rank": 8, "is_decoder": True,
    "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16,
}  # fmt: skip
# What a family needs beside or instead; None leaves the default
OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {
        "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "zamba": {"layer_types": ["linear_attention", "hybrid"]},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "granitemoehybrid (attention alone)": {"layer_types": ["full_attention"] * 2},
}  # fmt: skip
FAMILIES = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "granitemoehybrid (attention alone)"]


@dataclass
class Verdict:
    """What became of a family; gaps are relative to spread or norm."""

    family: str
    model: str  # its class
    verdict: str = ""  # packed, one by one, refused, not built
    attention: str = ""
    scale: float = 1.0
    softcap: float | None = None
    log_prob_gap: float | None = None
    gradient_gap: float | None = None
    why: str = ""

    @property
    def wrong(self) -> bool:
        """Whether it was taken and gives other log-probs or gradients than the truth."""
        gaps = (self.log_prob_gap, self.gradient_gap)
        return any(gap is not None and not gap <= TOLERANCE for gap in gaps)


def main() -> None:
    """Prints a line a family; writes page and result where no family was named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", help="model types; all where none is named")
    named = parser.parse_args().families
    results = []
    for family in named or FAMILIES:
        results.append(judge(family))
        print(line(results[-1]), flush=True)
    counts = Counter("WRONG" if result.wrong else result.verdict for result in results)
    print(dict(counts))
    if not named:  # the page is made of the file alone
        document = provenance() | {"families": [asdict(result) for result in results]}
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(results, document["versions"]), encoding="utf-8")
    raise SystemExit(1 if counts["WRONG"] else 0)


def line(result: Verdict) -> str:
    """One line for the terminal."""
    gaps = ""
    if result.log_prob_gap is not None:
        gaps = f"gaps {result.log_prob_gap:.1e} {result.gradient_gap:.1e}"
    wrong = "WRONG" if result.wrong else ""
    return " ".join(
        f"{result.family:24} {result.verdict:11} {result.attention:16} {gaps} {wrong} "
        f"{result.why[:160]}".split("\n")
    )


def judge(family: str) -> Verdict:
    """Builds, hands over and compares one family."""
    result = Verdict(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.partition(" ")[0]])
    try:
        with time_limit(SECONDS):
            model = build(family)
            parameters = sum(p.numel() for p in model.parameters())
            if parameters > MAX_PARAMETERS:
                raise ValueError(f"{parameters} parameters at the smallest sizes")
    except Exception as error:  # whatever a family's own code raises
        result.verdict, result.why = "not built", f"{type(error).__name__}: {first_line(error)}"
        return result
    try:
        plain_log_probs(copy.deepcopy(model), examples())
    except Exception as error:
        result.verdict = "not built"
        result.why = f"its forward does not run on text alone: {first_line(error)}"
        return result
    taken = []
    for dtype in (torch.float32, torch.bfloat16):
        typed = build(family, dtype)  # some keep parts of it in fp32
        typed.load_state_dict(model.state_dict())
        try:
            plain_log_probs(typed, examples()).sum().backward()
        except RuntimeError as error:
            result.why = f"its own {dtype} does not run: {first_line(error)}"
            continue
        typed.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                lm = CausalLM(typed)
            except UserError as error:
                result.verdict, result.why = "refused", first_line(error)
                return result
        taken.append((lm.packs, lm.attention, lm.transform))
        said = [str(w.message) for w in caught if lm.name in str(w.message)]
        result.why = result.why or "; ".join(said)
    packs = taken[0][0]
    result.verdict, result.attention = "packed" if packs else "one by one", taken[0][1]
    result.scale, result.softcap = taken[0][2].logit_scale, taken[0][2].softcap
    if len(set(taken)) > 1:
        result.why += f" fp32 and bf16 differ: {taken}"
    for packs, attention, transform in dict.fromkeys(taken):
        compare(result, model, packs, attention, transform)
    return result


def compare(
    result: Verdict, model: Any, packs: bool, attention: str, transform: HeadTransform
) -> None:
    """Puts the gaps between the truth and a ``CausalLM`` that was decided so into ``result``."""
    larger, items = enlarged(model), examples()
    truth, gradients = log_probs_and_gradients(larger, lambda: plain_log_probs(larger, items))
    lm = CausalLM(larger, attention, probe=False)
    lm.packs, lm.transform = packs, transform
    (batch,) = pack(items, max_tokens=1000)

    def ours() -> Tensor:
        rows = lm.log_probs(batch).split(batch.answer_cu_seqlens.diff().tolist())
        by_index = dict(zip(batch.indices, rows, strict=True))
        return torch.cat([by_index[item.index] for item in items])

    found, found_gradients = log_probs_and_gradients(larger, ours)
    gap = float((found - truth).abs().max() / truth.std())
    largest = max(float(g.norm()) for g in gradients.values())
    gradient_gap = max(
        float((found_gradients[name] - g).norm()) / largest for name, g in gradients.items()
    )
    result.log_prob_gap = max(gap, result.log_prob_gap or 0.0)
    result.gradient_gap = max(gradient_gap, result.gradient_gap or 0.0)


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of the family with its initial weights, the same at every call."""
    config_class = CONFIG_MAPPING[family.partition(" ")[0]]
    default, own = config_class(), OWN.get(family, {})
    settings = known(default)
    for name in getattr(config_class, "sub_configs", None) or {}:
        if hasattr(sub := getattr(default, name, None), "to_dict"):
            settings[name] = known(sub)
    settings = {k: v for k, v in {**settings, **own}.items() if v is not None}
    if "kv_lora_rank" in settings:  # latent attention has as many keys as queries
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    config = config_class(**settings)
    with torch.device("meta"):  # else sizes that nothing has set would fill the memory
        empty = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if sum(p.numel() for p in empty.parameters()) > MAX_PARAMETERS:
        return empty
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def known(config: Any) -> dict[str, Any]:
    """Those of ``SETTINGS`` that the configuration has."""

    def has(name: str) -> bool:
        try:
            return getattr(config, name, None) is not None or name in type(config).__annotations__
        except Exception:  # a setting that differs by layer says so
            return False

    computed = {n for n, v in vars(type(config)).items() if isinstance(v, property)}
    return {name: v for name, v in SETTINGS.items() if name not in computed and has(name)}


def enlarged(model: Any) -> Any:
    """A copy in fp64 with larger weights, none of them 0."""
    items = examples()
    for factor in FACTORS:
        larger = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in larger.parameters():
                p.mul_(factor).add_(torch.randn(p.shape, generator=generator) * 0.05)
        for dtype in (torch.float64, torch.float32):  # some families' code is fp32 in places
            try:
                log_probs = plain_log_probs(larger.to(dtype), items)
            except RuntimeError:
                continue
            if log_probs.isfinite().all():
                return larger
    raise RuntimeError("its log-probs are not finite")


def examples() -> list[TokenizedExample]:
    """The same random sequences at every call."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n, _ in LENGTHS]
    return [TokenizedExample(tuple(x), LENGTHS[i][1], i) for i, x in enumerate(ids)]


def plain_log_probs(model: Any, items: list[TokenizedExample]) -> Tensor:
    """Of the answers, by the model's own forward, one sequence after another."""
    found = []
    for item in items:
        ids = torch.tensor([item.input_ids])
        log_probs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        first = item.prompt_length
        found.append(log_probs[first - 1 : -1].gather(1, ids[0, first:, None]).squeeze(1))
    return torch.cat(found)


def log_probs_and_gradients(model: Any, log_probs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and gradients of a sum of them with different coefficients."""
    model.zero_grad()
    values = log_probs()
    coefficients = torch.linspace(0.5, 1.5, len(values), dtype=values.dtype)
    (values * coefficients).sum().backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return values.detach(), gradients


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises ``TimeoutError`` inside when the time is over."""

    def over(*_: Any) -> None:
        raise TimeoutError(f"not built within {seconds} s")

    previous = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def page(results: list[Verdict], ran_with: dict[str, str]) -> str:
    """The table as Markdown."""
    counts = Counter(result.verdict for result in results)
    built = len(results) - counts["not built"]
    ran = ", ".join(f"{name} {ran_with[name]}" for name in ("transformers", "torch"))
    lines = [
        "# Model families", "",
        "`npo-fast` takes causal language models of transformers, whatever their family. This page "
        "says for each family how it trains, and that its log-probs and gradients are those of the "
        "model's own forward.", "",
        f"Of {built} families that a tiny configuration can build:", "",
        f"- **packed**: {counts['packed']} train on batches of whole sequences, end to end, "
        "without padding: the fast way.",
        f"- **one by one**: {counts['one by one']} train one sequence at a time, since their "
        "attention or their layers cannot keep sequences apart. The results are as exact.",
        f"- **refused**: {counts['refused']} end with a line that says why, before anything is "
        "trained.", "",
        "A model is judged in the same way when it is loaded, and a slower way is told in a "
        "warning. The attention that is used is described in "
        "[Kernels](kernels.md#packed-not-padded).", "",
        "## How it was tested", "",
        "```bash", "python benchmarks/families.py", "python benchmarks/families.py llama gpt2",
        "```", "",
        "The first command tests every family and writes this page and "
        f"`benchmarks/results/{RESULT.name}`; the second tests the named ones. Tested with {ran}.",
        "",
        "- A tiny random model of each family is loaded as any other, in fp32 and in bf16.",
        "- Log-probs and gradients are then compared with those of the model's own forward, a "
        "sequence at a time, in fp64 and at larger weights. The columns *log-probs* and "
        "*gradients* have the largest differences, relative to the spread of the log-probs and to "
        "the largest gradient. Parts that a family computes in fp32 differ by 1e-6.",
        "- *scale* and *softcap* are what the model does to its logits, as measured when it is "
        "loaded.", "",
        "## The families", "",
        "| family | verdict | attention | scale | softcap | log-probs | gradients | why |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in sorted(results, key=lambda r: (r.verdict == "not built", r.family)):
        gaps = ["", ""] if r.log_prob_gap is None else [
            f"{gap:.0e}" for gap in (r.log_prob_gap, r.gradient_gap)]  # fmt: skip
        scale, cap = ("" if r.scale == 1 else f"{r.scale:.3g}"), r.softcap or ""
        # the verdict has said the rest
        reasons = re.findall(
            r"(?:one at a time|a pack|hidden states|it keeps \w+) \((.*?)\)[;:]", r.why + ";"
        )
        why = "; ".join(reasons) or r.why.replace(f"{r.model} ", "")
        why = why.replace("|", "/").replace("\n", " ")
        cells = (r.family, r.verdict, r.attention, scale, cap, *gaps, why)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
