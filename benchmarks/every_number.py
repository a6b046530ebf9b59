"""Tables of the README, docs/kernels.md and docs/numbers.md, read from the result files.

    python benchmarks/every_number.py          # checks that the pages say what the files say
    python benchmarks/every_number.py --write  # writes the tables anew

docs/numbers.md has a row for each file: its main number, the command that makes it, and commit,
date and processor as they stand in the file.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
HEADER = "| what | number | command | file | commit, version, date, processor |"
SAME = 0.05  # above this p-value TOFU's test sees no difference
PEERS = {  # in bench_loss.json
    "npo_fast": "**npo_fast**",
    "cce": "Cut Cross-Entropy",
    "torch-lce": "PyTorch `linear_cross_entropy`",
    "plain": "plain PyTorch",
    "trl": "TRL chunked log-probs",
    "liger": "Liger chunked log-probs",
}
SPEED_ROWS = (  # name, peer and loss in bench_loss.json, name in gpu.json
    ("**npo_fast**, NPO", ("npo_fast", "NPO"), "npo_fast NPO"),
    ("Cut Cross-Entropy, NPO", ("cce", "NPO"), "cce NPO"),
    ("PyTorch `linear_cross_entropy`, NLL", ("torch-lce", "NLL"), ""),
    ("plain PyTorch, NPO", ("plain", "NPO"), "plain NPO"),
    ("TRL chunked log-probs, NPO", ("trl", "NPO"), "trl NPO columns=32768"),
    ("Liger chunked log-probs, NPO", ("liger", "NPO"), ""),
    ("Liger fused linear cross-entropy, NLL", ("", ""), "liger NLL"),
)
ALL_FORMS = '--forms "NPO+RT, beta by holdout" SimNPO GA "beta 0.1"'


@dataclass(frozen=True)
class Number:
    """One result file, one headline number of it, and the command that makes it."""

    group: str
    what: str
    file: str
    command: str
    value: Callable[[Any], str]


def passes(form: str) -> Callable[[Any], str]:
    """On how many seeds a form ends above 0.05, and its median utility."""

    def value(result: Any) -> str:
        ends = [
            (seed["forms"][form]["path"][-1], seed["utility"])
            for seed in result["seeds"].values()
            if form in seed["forms"]
        ]
        passed = sum(end["forget_quality"] > SAME for end, _ in ends)
        kept = median(end["model_utility"] / before for end, before in ends)
        return f"passes on {passed} of {len(ends)}, utility {kept:.0%}"

    return value


def half(method: str) -> Callable[[Any], str]:
    """Forget quality by seed of a method on SmolLM2."""

    def value(result: Any) -> str:
        seeds = [seed for name, seed in result["seeds"].items() if name.isdigit()]
        found = [seed["models"][method]["forget quality"] for seed in seeds]
        return "forget quality " + ", ".join(f"{p:.2g}" for p in found)

    return value


def loss_over_gemms(result: Any) -> str:
    """NPO of ours and of the nearest peer over three bare products, random inputs."""
    rows = [row for row in result["results"][0]["rows"] if row["inputs"] == "random"]
    ours = next(row for row in rows if row["peer"] == "npo_fast")
    peers = [row for row in rows if row["peer"] != "npo_fast"]
    best = min(peers, key=lambda row: row["train_ratio"])
    return (
        f"NPO {ours['train_ratio']:.2f} times three products, {ours['train_peak_mib']:.0f} MiB; "
        f"next {best['peer']} {best['loss']} {best['train_ratio']:.2f}"
    )


def step_ratio(result: Any) -> str:
    over = {way: next(iter(ratio.values())) for way, ratio in result["time"]["over_ours"].items()}
    return f"padded {over['padded']:.1f}, framework's passes {over['framework']:.1f} times ours"


def planned(result: Any) -> str:
    ratios = [run["predicted_over_measured"] for run in result["runs"]]
    return f"{len(ratios)} runs, predicted / measured {min(ratios):.2f} to {max(ratios):.2f}"


def scaling(result: Any) -> str:
    ours = [p for p in result["points"] if p["peer"] == "npo_fast" and p["axis"] == "rows"]
    first, last = ours[0], ours[-1]
    peak_mib = max(point["train_peak_mib"] for point in ours)
    return (
        f"{first['rows']} to {last['rows']} rows: {first['train_ms'] / 1e3:.2f} to "
        f"{last['train_ms'] / 1e3:.1f} s, at most {peak_mib:.0f} MiB"
    )


def attention(result: Any) -> str:
    over = result["attention alone"]["over_within_64_equal"]
    return f"dense mask {over['dense mask']:.0f} times a pack of 64 sequences"


def bf16(result: Any) -> str:
    return f"{len(result['loss'])} shapes, bf16 products over fp32 ones"


def skipping(result: Any) -> str:
    states = result["states"]
    return f"{len(states)} states: {', '.join(states)}"


def on_the_card(result: Any) -> str:
    """NPO over three products at N=4096, D=4096, V=128256, as often as peers were timed beside."""
    jobs = result["parts"]["5"]["jobs"].values()
    ratios = [rows["npo_fast NPO"]["over_gemms"] for job in jobs for rows in job["tables"].values()]
    return f"NPO {min(ratios):.2f} to {max(ratios):.2f} times three products at 4096, 4096, 128256"


def families(result: Any) -> str:
    verdicts = [family["verdict"] for family in result["families"]]
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def synthetic(result: Any) -> str:
    claims = result["claims"]
    return f"{sum(claim['holds'] for claim in claims)} of {len(claims)} claims of the paper hold"


def chain(result: Any) -> str:
    after = result["summary (mean, standard deviation)"]["NPO+RT"]
    last = list(after)[-1]
    mean, deviation = after[last]["utility / original's"]
    return f"NPO+RT {last}: utility {mean:.0%} ± {deviation:.0%}"


def relearned(result: Any) -> str:
    after = {
        rho: attacks["relearn"]["forget_probability"] for rho, attacks in result["summary"].items()
    }
    return "P after relearning " + ", ".join(
        f"{after[rho]:.2f} (rho {rho})" for rho in ("0", "0.1", "0.3")
    )


def kept_shares(result: Any) -> str:
    kept = {name: form["kept"]["least"] for name, form in result["summary"].items()}
    least = {
        share: min(value for name, value in kept.items() if name.endswith(f"keep {share}"))
        for share in ("0.9", "0.95", "0.99")
    }
    return ", ".join(f"{share}: at least {value:.3f} kept" for share, value in least.items())


def without_retain_data(result: Any) -> str:
    shares = [
        seed["NPO+RT, auto"]["model_utility"] / seed["before"]["model_utility"]
        for seed in result["seeds"].values()
    ]
    return "utility " + ", ".join(f"{share:.0%}" for share in shares)


NUMBERS = (
    Number("Quality", "demo's world, ten seeds", "beta.json",
           f"beta.py --seeds 0 1 2 3 4 5 6 7 11 22 {ALL_FORMS}", passes("NPO+RT, beta by holdout")),
    Number("Quality", "twice the beta", "beta_twice.json",
           'beta.py --forms "NPO+RT, beta by holdout" twice --seeds 0 1 2 3 4 5 6 7 11 22 '
           "--result benchmarks/results/beta_twice.json", passes("NPO+RT, beta by holdout")),
    Number("Quality", "other sizes of that world", "beta_sizes.json",
           'beta.py --forms "NPO+RT, beta by holdout" SimNPO --authors 80 --seeds 31 36 37',
           passes("NPO+RT, beta by holdout")),
    Number("Quality", "SmolLM2, three of six authors, one seed", "beta_smollm2.json",
           f"beta.py --smollm2 --tofu locuslab/TOFU --seeds 3 {ALL_FORMS}",
           passes("NPO+RT, beta by holdout")),
    Number("Quality", "SmolLM2, three of six authors, `--beta auto`", "forget_half_beta.json",
           'forget_half.py --tofu locuslab/TOFU --seeds 3 4 5 --methods "NPO+RT beta auto" "NPO+RT"'
           " --result benchmarks/results/forget_half_beta.json", half("NPO+RT beta auto")),
    Number("Quality", "SmolLM2, eight of sixteen authors, eight methods, attacks",
           "forget_eight.json",
           "forget_half.py --tofu locuslab/TOFU --authors 8 --attack 4 --seeds 0 1 2",
           half("NPO+RT beta auto")),
    Number("Quality", "SmolLM2, three of six authors, eleven methods", "forget_half.json",
           "forget_half.py --tofu locuslab/TOFU --runs runs/half --seeds 0 1 2", half("NPO+RT")),
    Number("Quality", "SmolLM2, two of ten authors", "smollm2_tofu.json",
           "smollm2_tofu.py --tofu locuslab/TOFU --runs runs/smollm2",
           lambda r: f"forget quality {r['models']['npo']['forget quality']:.2g}"),
    Number("Quality", "ten requests in a row", "request_chain.json",
           "request_chain.py --seeds 0 1 2", chain),
    Number("Quality", "three requests in a row, SmolLM2", "request_chain_smollm2.json",
           "request_chain.py --smollm2 --tofu locuslab/TOFU --seeds 3 4 5 "
           "--methods NPO+RT SimNPO+RT RMU", chain),
    Number("Quality", "relearning and rounding", "robustness.json",
           "robustness.py --seeds 0 1 2 4 11", relearned),
    Number("Quality", "`--keep-utility`", "keep_utility.json", "keep_utility.py --seeds 4 11 22",
           kept_shares),
    Number("Quality", "`--retain auto`", "retain_auto.json", "retain_auto.py --seeds 0 1 2 --rmu",
           without_retain_data),
    Number("Quality", "MUSE's scalability and sustainability", "muse_folds.json",
           "muse.py --runs runs/muse", lambda r: f"{len(r['folds']['scal'])} sizes"),
    *(Number("Paper", f"what reviewers asked for, seed {seed}", f"reviewers/seed-{seed}.json",
             f"reviewers.py --seeds {seed} --results runs/reviewers",
             lambda r: f"{len(r['runs'])} runs") for seed in range(3)),
    Number("Paper", "synthetic experiment and theorem", "synthetic/result.json",
           "npo-fast synthetic", synthetic),
    Number("Paper", "its curves", "synthetic/curves.json", "npo-fast synthetic",
           lambda r: f"{len(r)} experiments"),
    Number("Loss", "N=2048, D=576, V=49152, fp32, CPU", "bench_loss.json",
           "npo-fast bench loss --rows 2048 --width 576 --vocabulary 49152 --sequences 32 "
           "--peers plain,torch-lce,cce,liger,trl", loss_over_gemms),
    Number("Loss", "N=512, D=2048, V=128256, fp32, CPU", "bench_loss_128k.json",
           "npo-fast bench loss --rows 512 --width 2048 --vocabulary 128256 --sequences 8 "
           "--inputs random --peers plain,torch-lce,cce", loss_over_gemms),
    Number("Loss", "N=1536, D=1024, V=65539, fp32, CPU", "bench_loss_65k.json",
           "npo-fast bench loss --rows 1536 --width 1024 --vocabulary 65539 --sequences 24 "
           "--inputs random --peers plain,torch-lce,cce", loss_over_gemms),
    Number("Loss", "growing rows and vocabularies, CPU", "bench_scaling.json",
           "npo-fast bench loss --scaling --rounds 2", scaling),
    Number("Loss", "bf16 weights, fp32 products, CPU", "bench_loss_bf16.json",
           "NPO_FAST_CPU_BF16=0 npo-fast bench loss --dtype bfloat16 --rows 512 --width 576 "
           "--vocabulary 49152 --sequences 8 --rounds 3 --peers plain,torch-lce", loss_over_gemms),
    Number("Loss", "bf16 products, CPU with AMX", "cpu_bf16.json",
           "cpu_bf16.py --threads 2 --output cpu_bf16.json", bf16),
    Number("Loss", "bf16 products, CPU without AMX", "cpu_bf16_without_amx.json",
           "NPO_FAST_CPU_BF16=1 python benchmarks/cpu_bf16.py --threads 2 --rounds 3", bf16),
    Number("Loss", "`skip_below` on a real forget set", "skip_below.json",
           "skip_below.py --original runs/original/model --unlearned runs/npo/model "
           "--data locuslab/TOFU --forget forget01 --rounds 3", skipping),
    Number("Loss", "everything on a GPU", "gpu/h200.json", "gpu.py --out DIR", on_the_card),
    Number("Loss", "kernels compiled for four GPU generations", "bench_kernels.json",
           "npo-fast bench kernels", lambda r: f"{len(r['kernels'])} variants, no spill"),
    Number("Training", "step of SmolLM2, 16 + 16 sequences", "step.json",
           "step.py --tofu locuslab/TOFU", step_ratio),
    Number("Training", "step of SmolLM2, 8 + 8 sequences", "step_8.json",
           "step.py --tofu locuslab/TOFU --sequences 8 --output benchmarks/results/step_8.json",
           step_ratio),
    Number("Training", "step of a random Llama of 46M, 8 + 8 sequences", "step_46m_8.json",
           "step.py --tofu locuslab/TOFU --small-llama --sequences 8 "
           "--output benchmarks/results/step_46m_8.json", step_ratio),
    Number("Training", "step of a random Llama of 46M, 16 + 16 sequences", "step_46m.json",
           "step.py --tofu locuslab/TOFU --small-llama --output benchmarks/results/step_46m.json",
           step_ratio),
    Number("Training", "attention on a pack", "attention.json", "attention.py", attention),
    Number("Training", "planned memory of 7B to 70B models", "plan.json", "plan.py",
           lambda r: f"{len(r['cases'])} cases"),
    Number("Training", "planned and measured memory, one process", "plan_truth.json",
           "plan_truth.py", planned),
    Number("Training", "planned and measured memory, two and four processes",
           "plan_truth_ranks.json", "plan_truth_ranks.py", planned),
    Number("Training", "bytes between GPUs", "scale.json", "scale.py",
           lambda r: f"{sum(r['checks'].values())} of {len(r['checks'])} checks hold"),
    Number("Models", "every causal LM of transformers", "families.json", "families.py", families),
)  # fmt: skip


def origins(result: Any) -> Iterator[dict[str, str]]:
    """Commit, date, version and processor, wherever a result file has them."""
    if isinstance(result, dict):
        if "commit" in result and "versions" in result:
            yield {
                "commit": str(result["commit"])[:7],
                "version": result["versions"].get("npo_fast", ""),
                "date": result.get("date", "")[:10],
                "processor": short_processor(result.get("processor", "")),
            }
        for value in result.values():
            yield from origins(value)
    elif isinstance(result, list):
        for value in result:
            yield from origins(value)


def short_processor(name: str) -> str:
    vectors = re.search(r"\((AVX\w+)\)", name)
    maker = next((maker for maker in ("AMD EPYC", "Intel Xeon") if maker.split()[0] in name), name)
    return f"{maker}, {vectors[1]}" if vectors else maker


def origin_of(result: Any) -> str:
    """All origins of a file, each value once."""
    found = list(origins(result))
    columns = (dict.fromkeys(o[key] for o in found if o[key]) for key in found[0]) if found else ()
    return "; ".join(", ".join(values) for values in columns if values)


def load(file: str) -> Any:
    return json.loads((RESULTS / file).read_text())


def numbers_table() -> str:
    lines = []
    for group in dict.fromkeys(number.group for number in NUMBERS):
        lines += [f"## {group}", "", HEADER, "|---|---|---|---|---|"]
        for number in NUMBERS:
            if number.group == group:
                result = load(number.file)
                python = number.command.split()[0].endswith(".py")
                command = f"python benchmarks/{number.command}" if python else number.command
                cells = (number.what, number.value(result), f"`{command}`", f"`{number.file}`",
                         origin_of(result))  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def quality_table() -> str:
    """The demo's world: how often each method passes the test, and what it keeps."""
    names = {
        "NPO+RT, beta by holdout": "**NPO+RT, `--beta auto`**",
        "SimNPO+RT": "SimNPO+RT",
        "NPO+RT, beta 0.1": "NPO+RT, the paper's beta 0.1",
        "GA+RT": "GA+RT (gradient ascent)",
    }
    lines = [
        "| method | passes the test | forget quality, median (range) | utility, median (range) |"
    ]
    lines.append("|---|---|---|---|")
    seeds = load("beta.json")["seeds"].values()
    for form, name in names.items():
        ends = [(seed["forms"][form]["path"][-1], seed["utility"]) for seed in seeds]
        quality = sorted(end["forget_quality"] for end, _ in ends)
        kept = sorted(end["model_utility"] / before for end, before in ends)
        passed = sum(p > SAME for p in quality)
        lines.append(
            f"| {name} | {passed} of {len(ends)} "
            f"| {median(quality):.2g} ({quality[0]:.1g} – {quality[-1]:.2g}) "
            f"| {median(kept):.0%} ({kept[0]:.0%} – {kept[-1]:.0%}) |"
        )
    return "\n".join(lines)


def speed_table() -> str:
    """Time over three products and memory, by who and shape: CPUs, and the H200."""
    cpu = {}
    for file in LOSS_FILES:
        result = load(file)["results"][0]
        shape = result["shape"]
        name = f"CPU, fp32: {shape['rows']}, {shape['width']}, {shape['vocabulary']}"
        cpu[name] = {
            (row["peer"], row["loss"]): f"{row['train_ratio']:.2f}, {row['train_peak_mib']:.0f} MiB"
            for row in result["rows"]
            if row["inputs"] == "random"
        }
    jobs = load("gpu/h200.json")["parts"]["5"]["jobs"].values()
    timed = [item for job in jobs for rows in job["tables"].values() for item in rows.items()]
    lines = ["| | " + " | ".join([*cpu, "H200, bf16: 4096, 4096, 128256"]) + " |"]
    lines.append("|---" * (len(cpu) + 2) + "|")
    for name, on_cpu, on_gpu in SPEED_ROWS:
        cells = [cells.get(on_cpu, "") for cells in cpu.values()]
        found = [row for who, row in timed if on_gpu and who.startswith(on_gpu)]
        gpu = ""
        if found:
            ratio = median(row["over_gemms"] for row in found)
            gpu = f"{ratio:.2f}, {median(row['beyond_outputs_mib'] for row in found):.0f} MiB"
        lines.append("| " + " | ".join([name, *cells, gpu]) + " |")
    return "\n".join(lines)


def loss_table(file: str) -> str:
    """Everyone on random inputs of one shape, the fastest of a peer's options."""
    result = load(file)
    shape, gemms_ms = result["results"][0]["shape"], result["results"][0]["gemms_ms"]["random"]
    lines = [
        f"N={shape['rows']}, D={shape['width']}, V={shape['vocabulary']}, {shape['sequences']} "
        f"sequences; the three bare products take {gemms_ms:.0f} ms "
        f"({short_processor(result['provenance']['processor'])}, two cores).",
        "",
        "| who | loss and gradients | memory beyond the gradients | forward only, over one product "
        "| memory |",
        "|---|---|---|---|---|",
    ]
    for row in result["results"][0]["rows"]:
        if row["inputs"] == "random":
            lines.append(
                f"| {PEERS[row['peer']]}, {row['loss']} | {row['train_ratio']:.2f} "
                f"| {row['train_peak_mib']:.0f} MiB | {row['forward_ratio']:.2f} "
                f"| {row['forward_peak_mib']:.0f} MiB |"
            )
    return "\n".join(lines)


def step_table() -> str:
    """A training step by model and batch, beside the padded way and the framework's passes."""
    lines = [
        "| model | sequences a step | ours | padded way | its passes as open-unlearning makes them "
        "| our memory, of the padded way's |",
        "|---|---|---|---|---|---|",
    ]
    for file in ("step_8.json", "step.json", "step_46m_8.json", "step_46m.json"):
        result = load(file)
        model = "SmolLM2-135M" if "SmolLM2" in result["what"] else "random Llama, 46M"
        median_ms, over = result["time"]["median_ms"], result["time"]["over_ours"]
        (ours,) = over["padded"]
        side = result["sequences_a_step"]["forget"]
        lines.append(
            f"| {model} | {side} + {side} | {median_ms[ours] / 1e3:.2f} s "
            f"| {over['padded'][ours]:.2f} times | {over['framework'][ours]:.2f} times "
            f"| {result['peak']['ours_over']['padded'][ours]:.0%} |"
        )
    return "\n".join(lines)


LOSS_FILES = ("bench_loss.json", "bench_loss_128k.json", "bench_loss_65k.json")
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"quality": quality_table, "speed": speed_table},
    "docs/kernels.md": {
        **{file: partial(loss_table, file) for file in LOSS_FILES},
        "step": step_table,
    },
    "docs/numbers.md": {"numbers": numbers_table},
}


def main() -> None:
    for name, tables in TABLES.items():
        page = expected = (ROOT / name).read_text()
        for table, make in tables.items():
            begin, end = f"<!-- {table}: benchmarks/every_number.py -->", f"<!-- end of {table} -->"
            before, rest = expected.split(begin)
            expected = f"{before}{begin}\n\n{make()}\n\n{end}{rest.split(end)[1]}"
        if "--write" in sys.argv[1:]:
            (ROOT / name).write_text(expected)
        elif page != expected:
            sys.exit(f"{name} differs from the results: python benchmarks/every_number.py --write")


if __name__ == "__main__":
    main()
