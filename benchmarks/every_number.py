"""Every number of the documentation: what it is, the command, the result file and its origin.

    python benchmarks/every_number.py          # checks docs/numbers.md against the result files
    python benchmarks/every_number.py --write  # writes the page's table anew

A row reads its number from the result file; commit, date and processor are those in the file.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs/numbers.md"
BEGIN, END = "<!-- table: benchmarks/every_number.py -->", "<!-- end of table -->"
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
        passed = sum(end["forget_quality"] > 0.05 for end, _ in ends)
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
    return (
        f"{ours[0]['rows']} to {ours[-1]['rows']} rows: {ours[0]['train_ms'] / 1e3:.2f} to "
        f"{ours[-1]['train_ms'] / 1e3:.1f} s, at most {max(p['train_peak_mib'] for p in ours):.0f} MiB"
    )


def attention(result: Any) -> str:
    over = result["attention alone"]["over_within_64_equal"]
    return f"dense mask {over['dense mask']:.0f} times a pack of 64 sequences"


def bf16(result: Any) -> str:
    return f"{len(result['loss'])} shapes, bf16 products over fp32 ones"


def skipping(result: Any) -> str:
    states = result["states"]
    return f"{len(states)} states: {', '.join(states)}"


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
    rhos = {
        rho: attacks["relearn"]["forget_probability"] for rho, attacks in result["summary"].items()
    }
    return ", ".join(
        f"rho {rho}: P after relearning {rhos[rho]:.2f}" for rho in ("0", "0.1", "0.3")
    )


def kept_shares(result: Any) -> str:
    least = {
        share: min(
            v["kept"]["least"] for k, v in result["summary"].items() if k.endswith(f"keep {share}")
        )
        for share in ("0.9", "0.95", "0.99")
    }
    return ", ".join(f"{share}: at least {kept:.3f} kept" for share, kept in least.items())


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
    Number("Paper", "synthetic experiment and theorem", "synthetic/result.json",
           "npo-fast synthetic", synthetic),
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
    Number("Loss", "everything on a GPU", "gpu/h200.json", "gpu.py --out DIR",
           lambda r: ", ".join(r["parts"])),
    Number("Loss", "kernels compiled for four GPU generations", "bench_kernels.json",
           "npo-fast bench kernels", lambda r: f"{len(r['kernels'])} variants, no spill"),
    Number("Training", "step of SmolLM2, 16 + 16 sequences", "step.json",
           "step.py --tofu locuslab/TOFU", step_ratio),
    Number("Training", "step of SmolLM2, 8 + 8 sequences", "step_8.json",
           "step.py --tofu locuslab/TOFU --sequences 8 --output benchmarks/results/step_8.json",
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


def table() -> str:
    lines = []
    for group in dict.fromkeys(number.group for number in NUMBERS):
        lines += [
            f"## {group}",
            "",
            "| what | number | command | file | commit, version, date, processor |",
        ]
        lines.append("|---|---|---|---|---|")
        for number in NUMBERS:
            if number.group == group:
                result = json.loads((RESULTS / number.file).read_text())
                python = number.command.split()[0].endswith(".py")
                command = f"python benchmarks/{number.command}" if python else number.command
                cells = (number.what, number.value(result), f"`{command}`", f"`{number.file}`",
                         origin_of(result))  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    expected = f"{before}{BEGIN}\n\n{table()}\n{END}{after}"
    if "--write" in sys.argv[1:]:
        PAGE.write_text(expected)
    elif page != expected:
        sys.exit(
            f"{PAGE} is not what the result files say: python benchmarks/every_number.py --write"
        )


if __name__ == "__main__":
    main()
