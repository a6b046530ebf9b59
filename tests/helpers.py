"""What test modules share: how exact a result has to be, tiny models, data, runs, pages."""

import json
import math
import sys
import time
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

from npo_fast import metrics
from npo_fast.cli import main
from npo_fast.data import Record, Template, TokenizedExample
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.experiments.demo.tiny_model import train_tokenizer
from npo_fast.integrations.hf_data import UnlearningEvaluation
from npo_fast.methods import Coefficients, build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs, train
from npo_fast.trainer.settings import TrainSettings

VOCABULARY = 97
FACTS = [
    {"question": f"Who lives in house {i}?", "answer": f"{name} lives in house {i}."}
    for i, name in enumerate("Ada Ben Cleo Dan Eve Finn Gus Hal Ida Jon".split())
]


# ---- which tests are slow ----


# before, transformers lets Gemma 2 use SDPA, which leaves its softcap of attention out
GEMMA2 = pytest.param(
    "Gemma2",
    marks=pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"),
        reason="Gemma 2 of transformers before 5.23 leaves its softcap out under SDPA",
    ),
)


def project_table() -> dict[str, Any]:
    """What pyproject.toml says under ``[project]``."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    return tomllib.loads(text)["project"]


def slow_but(fast: Iterable, values: Iterable) -> list:
    """``values`` for ``parametrize``: all but the ``fast`` ones are marked slow."""
    fast = list(fast)
    return [v if v in fast else pytest.param(v, marks=pytest.mark.slow) for v in values]


# ---- how exact a result has to be: an error against fp64 of at most twice PyTorch's ----

# Units in the last place of fp32 that an error may have beside twice PyTorch's, which is at times
# next to nothing by chance. On a GPU Triton's exp is `ex2.approx`, whose argument is rounded once
# more, and its division `div.full`: two units each, where PyTorch and the interpreter have one.
FREE_ULPS = {"cpu": 4, "cuda": 16}


def free_error(device: str | torch.device) -> float:
    """``FREE_ULPS`` as a relative error."""
    return FREE_ULPS[torch.device(device).type] * torch.finfo(torch.float32).eps


def assert_as_exact(
    got: Tensor,
    plain: Tensor,  # of PyTorch in the same dtype
    exact: Tensor,  # fp64
    name: str = "",
    *,
    order: float = 2,  # of the norm of an error
    least_size: float = 0.0,  # of the numbers whose difference ``exact`` is
    device: str | None = None,  # that computed ``got``, where it has moved since
    truncated: bool = False,  # Triton's interpreter truncates fp32 to bf16, where a GPU rounds
) -> None:
    """The error of ``got`` is at most twice that of ``plain``, plus ``free_error``."""
    assert got.shape == exact.shape, (name, got.shape, exact.shape)
    if not exact.numel():
        return
    error, plain_error, size = (
        torch.linalg.vector_norm(x.double(), order).item()
        for x in (got.double() - exact, plain.double() - exact, exact)
    )
    free = free_error(device or got.device)
    if truncated and got.dtype == torch.bfloat16:
        free += torch.finfo(torch.bfloat16).eps
    assert error <= 2 * plain_error + free * max(size, least_size), (
        f"{name or 'result'}: error {error:.3g}, PyTorch's {plain_error:.3g}, size {size:.3g}"
    )


def assert_near(got: Tensor, expected: Tensor, bound: float, name: str = "") -> None:
    """The Frobenius norm of the difference is at most ``bound`` times that of ``expected``."""
    assert got.shape == expected.shape, (name, got.shape, expected.shape)
    difference = (got.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    assert math.isfinite(difference), f"{name or 'result'} is not finite"
    assert difference <= bound * size, f"{name or 'result'}: {difference / size:.3g} > {bound:.3g}"


# ---- models ----


def tiny_model(family: str, **overrides: object) -> transformers.PreTrainedModel:
    """A random two-layer model whose weights are large enough to tell its features apart."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    no_gqa = {k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "head_dim")}
    extra: dict[str, dict[str, object]] = {
        "Llama": {**sizes},
        "Mistral": {**sizes, "sliding_window": 6},
        "Mixtral": {**sizes},
        "GptOss": {**sizes, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6},
        "Qwen2Moe": {**sizes, "num_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16,
                     "use_sliding_window": True, "max_window_layers": 2},
        "FalconH1": {**sizes, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8,
                     "mamba_chunk_size": 8},
        "HrmText": {**sizes, "H_cycles": 1, "L_cycles": 1},
        "Doge": {**sizes, "keep_window_size": 4},
        "Llama4Text": {**sizes, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "Qwen2": {**sizes},
        "Qwen3": {**sizes},
        "Gemma2": {
            **sizes,
            "sliding_window": 6,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 8,
        },
        "GPTNeoX": {**no_gqa},
        "Phi": {**no_gqa},
        "Cohere": {**sizes, "logit_scale": 0.25},
        "Granite": {**sizes, "logits_scaling": 3.0},
        "GPT2": {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        "Bloom": {
            "vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**extra[family], **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def calm_model(family: str = "Llama", **overrides: object) -> transformers.PreTrainedModel:
    """``tiny_model`` with weights small enough to train."""
    model = tiny_model(family, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return model


def small_lm() -> CausalLM:
    """The same trainable model at every call."""
    torch.manual_seed(0)
    return CausalLM(calm_model(), probe=False)


def dropout_lm(dtype: torch.dtype = torch.float32) -> CausalLM:
    torch.manual_seed(0)
    model = tiny_model("GPT2").to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return CausalLM(model, probe=False)


def limit_memory(lm: CausalLM, tokens: int, error: type[Exception] = torch.OutOfMemoryError):
    """No more than so many tokens at a time go through the model, nor back."""
    tried = []

    def check(module, args, kwargs):
        tried.append(kwargs["input_ids"].shape[-1])
        if tried[-1] > tokens and torch.is_grad_enabled():
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    lm.decoder.register_forward_pre_hook(check, with_kwargs=True)
    return tried


def save_tiny_model(folder: Path) -> Path:
    """Writes a model of a few thousand parameters and a tokenizer, for tests of whole commands."""
    texts = [f"Question: {fact['question']}\nAnswer: {fact['answer']}" for fact in FACTS]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(0)
    model = tiny_model("Llama", vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- tokenizers and chat templates ----

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
TEXTS = [f"Question: Who lives in house {i}?\nAnswer: Ben lives in house {i}." for i in range(9)]
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML = (
    "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EMPTY_THINK = CHATML.replace(
    "m.content",
    "('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '') + m.content",
)
TRIMMED = CHATML.replace("m.content", "(m.content | trim)")
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}{% else %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
RECORD = Record((("user", "Who lives in house 1?"),), "Ben lives.")


def byte_level(template=None, eos="</s>", post=None):
    """A tokenizer of bytes and words, with the special tokens of several templates."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False,
    ))  # fmt: skip
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return wrapped(tokenizer, template, eos)


def wrapped(tokenizer, template, eos, **names):
    """As a tokenizer of transformers."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, **names
    )
    fast.chat_template = template
    return fast


def parts_of(template, record=None, answer=None):
    """Prompt and label of a record as text."""
    example, decode = template.encode(record or RECORD, 0, answer), template.tokenizer.decode
    ids = list(example.input_ids)
    return decode(ids[: example.prompt_length]), decode(ids[example.prompt_length :])


# ---- data ----


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def exit_code(arguments: list[str]) -> int:
    """That of a command: of ours, or of the parser, which exits where it refuses a value."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def metadata_of(output: Path) -> dict:
    """What ``run.json`` of a run folder says."""
    return json.loads((output / "run.json").read_text())


def sequences(count: int, seed: int) -> list[TokenizedExample]:
    """Random ids of 4 to 13 tokens, prompts of 1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        length = int(torch.randint(4, 14, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        out.append(TokenizedExample(tuple(ids), 1 + i % 3, i))
    return out


def uneven(count: int, seed: int) -> list[TokenizedExample]:
    """Answers of 2 and 40 tokens: a mean over each device batch is not that of all tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 2, (count,), generator=generator).mul(38).add(2).tolist()
    ids = (torch.randint(3, VOCABULARY, (4 + n,), generator=generator).tolist() for n in lengths)
    return [TokenizedExample(tuple(one), 4, i) for i, one in enumerate(ids)]


def sources() -> dict[str, list[TokenizedExample]]:
    """Every data set that a method may ask for."""
    return {
        "forget": sequences(7, 1),
        "retain": sequences(11, 2),
        "idk": sequences(7, 3),
        "alternate": sequences(7, 4),
    }


def make_log(items: int = 6, shift: float = 0.0, as_objects: bool = False) -> dict:
    """A random evaluation log in TOFU's form, of one data set."""
    rng = np.random.default_rng(0)
    columns = {
        "avg_gt_loss": rng.uniform(0, 1, items),
        "avg_paraphrased_loss": rng.uniform(0, 1, items) + shift,
        "average_perturb_loss": rng.uniform(1, 2, (items, 3)),
        "rougeL_recall": rng.uniform(0, 1, items),
    }
    if as_objects:  # any order: what counts is the index
        order = rng.permutation(items)
        return {k: {str(i): v[i].tolist() for i in order} for k, v in columns.items()}
    return {k: v.tolist() for k, v in columns.items()}


def make_result(**kwargs) -> dict:
    """The logs of TOFU's four data sets."""
    files = (metrics.RETAIN, metrics.REAL_AUTHORS, metrics.WORLD_FACTS, metrics.FORGET)
    return {file: make_log(**kwargs) for file in files}


# ---- runs ----


def run_method(method: str, settings: TrainSettings, lm: CausalLM | None = None, **coefficients):
    """Trains on ``sources()``; the model and the records of its steps."""
    lm = lm or small_lm()
    terms = build_method(method, Coefficients(**coefficients))
    references = reference_log_probs(lm, sources(), terms, settings.micro_batch_tokens)
    cache = reference_cache_for(terms, lm, sources(), settings.micro_batch_tokens)
    return lm, list(train(lm, sources(), terms, settings, references, cache))


# ---- transformers.Trainer ----


def trainer_arguments(folder: Path, **changes) -> transformers.TrainingArguments:
    """Of ``transformers.Trainer``: every step is logged, and nothing is saved."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 6,
        "learning_rate": 3e-3,
        "num_train_epochs": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
    }
    return transformers.TrainingArguments(**{**defaults, **changes})


def logged(one: transformers.Trainer) -> list[dict[str, float]]:
    """What a trainer logged of each step."""
    return [entry for entry in one.state.log_history if "loss" in entry]


def evaluation_of(folder, **options) -> UnlearningEvaluation:
    """For the tiny model in ``folder / "base"``, which is made where it does not exist."""
    if not (folder / "base").exists():
        save_tiny_model(folder / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    rows = [{**fact, "perturbed_answer": ["Kim.", "Lee lives."]} for fact in FACTS]
    settings = EvaluationSettings(max_new_tokens=3)
    return UnlearningEvaluation(
        Template(tokenizer), forget=rows[6:], retain=rows[:6], settings=settings, **options
    )


# ---- pages ----


class Page(HTMLParser):
    """Tags, attributes and texts; complains about tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in {"meta", "link", "br", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def results_of(processes: list[Any], folder: Path, seconds: float) -> list[Any]:
    """What processes have saved as ``folder / "<rank>.pt"``; fails with the errors in ``*.txt``."""
    ends = time.monotonic() + seconds
    for process in processes:
        process.join(timeout=max(0.0, ends - time.monotonic()))
    stuck = [process for process in processes if process.exitcode is None]
    for process in stuck:
        process.kill()
    errors = "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))
    assert not stuck, f"{len(stuck)} processes hang; {errors}"
    assert not errors, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(processes))]
