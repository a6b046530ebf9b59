"""The page of a study: every figure over seeds, each with a sentence made of its numbers."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from npo_fast._version import __version__
from npo_fast.experiments.ablations.claims import claims
from npo_fast.experiments.ablations.results import (
    KEPT,
    Look,
    Runs,
    Spread,
    best_quality,
    by_trial,
    collapse_step,
    utility_share,
)  # fmt: skip
from npo_fast.experiments.ablations.trials import (
    BETAS,
    EXPERIMENTS,
    GA_RT,
    LIMIT,
    NPO_RT,
    OVERLAPS,
    Trial,
)  # fmt: skip
from npo_fast.report.figures import MEANINGFUL
from npo_fast.report.markup import MARK, PAGE, card, html_table
from npo_fast.report.seed_plots import Band, Cross, bands, crosses
from npo_fast.report.svg import SMALLEST

TITLE = "Small-world study of unlearning"
UTILITY, QUALITY = "model utility, share of the start", "forget quality (KS p-value)"
NPO_BETA = 0.1  # the paper's
Measure = Callable[[list[Look]], float]
_FIRST = ("GA", "GA+RT", "GA+RT per sequence", "NPO", "NPO+RT")
_INDEX = {trial.name: i for i, trial in enumerate(EXPERIMENTS["methods"])}
_INTRO = (
    "A small model learns a made-up world of authors and unlearns half of those it was taught "
    "last. All methods have the same learning rate, passes over the forget data, batch size and "
    "retain coefficient, none tuned for any of them. Lines and points are means over seeds, bands "
    "and bars one standard deviation (p-values are averaged as logarithms). Utility is TOFU's "
    "model utility on the first records of each set to keep, as a share of what the model had "
    "before unlearning. Forget quality above the dashed line (0.05): the model cannot be told "
    "from one that never met the forgotten authors."
)
_COLLAPSE = (
    "Collapse: the first evaluation below half of the starting utility after which none is back at "
    "half. A cross on a line marks the median step of the seeds that collapse, where most do."
)


class AblationPage:
    """HTML from what ``load_seeds`` read."""

    def __init__(self, study: Sequence[Mapping[str, Any]]) -> None:
        self.study = study
        self.runs: Runs = by_trial(study)

    def html(self) -> str:
        sections = "\n".join(
            f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"
            for title, body in self._sections()
        )
        return PAGE.substitute(mark=MARK, title=TITLE, version=__version__, sections=sections)

    def _sections(self) -> Iterator[tuple[str, str]]:
        yield "What it is", f"<p>{escape(_INTRO)}</p>"
        cards = [
            card(claim.text, {"here": claim.seen, "holds": claim.holds})
            for claim in claims(self.runs)
        ]
        if cards:
            yield "What the paper says, and what came out", "\n".join(cards)
        for title, name, body in (
            ("When utility collapses", "methods", self._methods),
            ("Beta of NPO+RT", "beta", self._beta),
            ("Forgotten facts entangled with kept ones", "overlap", self._overlap),
            ("Steps in turns", "schedule", self._schedule),
        ):
            if sum(trial in self.runs for trial in EXPERIMENTS[name]) > 1:
                yield title, body()
        yield "Where the numbers come from", self._origin()

    def _methods(self) -> str:
        trials = [trial for trial in EXPERIMENTS["methods"] if trial in self.runs]
        early = {t.name: t for t in trials if t.name in _FIRST}
        late = {t.name: t for t in trials if t.name not in _FIRST or t == NPO_RT}
        figures = []
        for part, group in (("gradient ascent and NPO", early), ("NPO+RT and the others", late)):
            key = part.split()[0].lower()
            figures.append(
                _figure(
                    bands(f"utility-{key}", f"Utility: {part}", "step", UTILITY,
                          self._curves(group, share=True)),
                    _say_collapse(group, self.runs),
                )
            )  # fmt: skip
            figures.append(
                _figure(
                    bands(f"quality-{key}", f"Forget quality: {part}", "step", QUALITY,
                          self._curves(group, share=False), log="y", line=MEANINGFUL),
                    _say_quality(group, self.runs),
                )
            )  # fmt: skip
        ends = {
            t.name: Cross(_INDEX[t.name], self._triple(t, utility_share),
                          self._triple(t, _last_quality, log=True))
            for t in trials
        }  # fmt: skip
        figures.append(
            _figure(
                crosses("ends", "After the last step", UTILITY, QUALITY, ends, "y", MEANINGFUL),
                "Up and right is better: forgotten as if never taught, and the rest kept.",
            )
        )
        rows = [_row(trial, list(self.runs[trial].values())) for trial in trials]
        table = html_table(list(rows[0]), rows) if rows else ""
        return f"<p>{escape(_COLLAPSE)}</p>\n{_grid(figures)}\n{table}"

    def _beta(self) -> str:
        betas = [beta for beta in BETAS if Trial(beta=beta) in self.runs]
        lines = {"NPO+RT": (_INDEX["NPO+RT"], [(b, Trial(beta=b)) for b in betas])}
        if LIMIT in self.runs and betas:
            ends = (betas[0], betas[-1])
            lines[LIMIT.name] = (_INDEX[LIMIT.name], [(b, LIMIT) for b in ends])
        text = (
            "GA+RT per sequence is what NPO+RT becomes as beta goes to 0 (the mean over sequences, "
            "where the usual GA takes it over tokens); it has no beta and is drawn across."
        )
        return f"<p>{escape(text)}</p>\n" + self._pair("beta", "beta", lines, "x", _say_beta)

    def _overlap(self) -> str:
        lines = {}
        for trial in (GA_RT, LIMIT, NPO_RT):
            found = [(o, replace(trial, overlap=o)) for o in OVERLAPS]
            found = [(o, t) for o, t in found if t in self.runs]
            if found:
                lines[trial.name] = (_INDEX[trial.name], found)
        text = (
            "Overlap is the share of forgotten authors whose first and family names kept authors "
            "have too, and of forgotten facts that are worded like kept ones and whose value a "
            "kept author has too. At 0 they share no word of a name, no wording and no value."
        )
        return f"<p>{escape(text)}</p>\n" + self._pair(
            "overlap", "overlap", lines, "", _say_overlap
        )

    def _pair(
        self,
        key: str,
        x: str,
        lines: Mapping[str, tuple[int, list[tuple[float, Trial]]]],
        log: str,
        say: Callable[[Runs, bool], str],
    ) -> str:
        """Utility and forget quality after the last step, over a knob."""
        figures = []
        for title, unit, measure, is_p in (
            ("Utility after the last step", UTILITY, utility_share, False),
            ("Forget quality after the last step", QUALITY, _last_quality, True),
        ):
            series = {}
            for name, (i, points) in lines.items():
                spreads = [self._triple(trial, measure, log=is_p) for _, trial in points]
                middle, low, high = zip(*spreads, strict=True)
                series[name] = Band(i, [x for x, _ in points], middle, low, high)
            axes = log + ("y" if is_p else "")
            drawn = bands(f"{key}-{'quality' if is_p else 'utility'}", title, x, unit, series,
                          axes, MEANINGFUL if is_p else None)  # fmt: skip
            figures.append(_figure(drawn, say(self.runs, is_p)))
        return _grid(figures)

    def _schedule(self) -> str:
        group = {str(t.schedule): t for t in EXPERIMENTS["schedule"] if t in self.runs}
        text = (
            "One step on the summed loss of a batch, or a step on its forget half and then one on "
            "its retain half: twice the steps for the same passes over the data. Adam divides each "
            "step by its own size, so in turns the retain coefficient hardly counts."
        )
        figures = [
            _figure(
                bands("schedule-utility", "NPO+RT: utility", "epoch", UTILITY,
                      self._curves(group, True, "epoch", numbered=True)),
                _say_ends(group, self.runs, False),
            ),
            _figure(
                bands("schedule-quality", "NPO+RT: forget quality", "epoch", QUALITY,
                      self._curves(group, False, "epoch", numbered=True), "y", MEANINGFUL),
                _say_ends(group, self.runs, True),
            ),
        ]  # fmt: skip
        return f"<p>{escape(text)}</p>\n{_grid(figures)}"

    def _curves(
        self, group: Mapping[str, Trial], share: bool, x: str = "step", numbered: bool = False
    ) -> dict[str, Band]:
        found = {}
        for n, (name, trial) in enumerate(group.items()):
            seeds = list(self.runs[trial].values())
            looks = range(len(seeds[0]))
            spreads = [
                _triple([utility_share(s, at) for s in seeds]) if share
                else _triple([s[at]["forget_quality"] for s in seeds], log=True)
                for at in looks
            ]  # fmt: skip
            middle, low, high = zip(*spreads, strict=True)
            mark = _median_collapse(seeds, x) if share else None
            at = [look[x] for look in seeds[0]]
            found[name] = Band(n if numbered else _INDEX[name], at, middle, low, high, mark)
        return found

    def _triple(
        self, trial: Trial, measure: Measure, log: bool = False
    ) -> tuple[float, float, float]:
        return _triple([measure(looks) for looks in self.runs[trial].values()], log)

    def _origin(self) -> str:
        first = self.study[0]
        settings = first["settings"]
        unlearning = settings["unlearning"]
        commits = sorted({str(one["provenance"].get("commit"))[:12] for one in self.study})
        minutes = sum(one["time_s"] for one in self.study) / 60
        facts = {
            "seeds": ", ".join(str(one["seed"]) for one in self.study),
            "commit": ", ".join(commits),
            "time": f"{minutes:.0f} min in all, one thread of a shared machine",
            "learning rate, every method": f"{unlearning['lr']:g}",
            "passes over the forget data": unlearning["epochs"],
            "batch": unlearning["batch_size"],
            "retain coefficient, every +RT": f"{settings['retain']:g}",
            **first["provenance"]["versions"],
        }
        rows = [{"": name, "value": value} for name, value in facts.items()]
        return html_table(["", "value"], rows)


def _last_quality(looks: list[Look]) -> float:
    return looks[-1]["forget_quality"]


def _triple(values: Sequence[float], log: bool = False) -> tuple[float, float, float]:
    if not log:
        found = Spread.of(values)
        return found.mean, found.low, found.high
    found = Spread.of([math.log10(max(value, SMALLEST)) for value in values])
    return 10**found.mean, 10**found.low, min(10**found.high, 1.0)


def _median_collapse(seeds: Sequence[Sequence[Look]], x: str = "step") -> float | None:
    """Over the seeds that collapse, where those are more than half."""
    steps = [step for looks in seeds if (step := collapse_step(looks)) is not None]
    if 2 * len(steps) <= len(seeds):
        return None
    median = statistics.median_low(steps)
    return next(look[x] for look in seeds[0] if look["step"] == median)


def _row(trial: Trial, seeds: list[list[Look]]) -> dict[str, Any]:
    steps = sorted(step for looks in seeds if (step := collapse_step(looks)) is not None)
    spread = f" ({steps[0]:g} to {steps[-1]:g})" if steps and steps[0] != steps[-1] else ""
    return {
        "method": trial.name,
        "collapses": f"{len(steps)} of {len(seeds)} seeds",
        "at step, median (range)": f"{statistics.median_low(steps):g}{spread}" if steps else None,
        "utility at the end": plus_minus([utility_share(looks) for looks in seeds]),
        "forget quality at the end": powers([_last_quality(looks) for looks in seeds]),
        f"best where {KEPT:.0%} of utility is kept": powers([best_quality(s) for s in seeds]),
    }


def plus_minus(values: Sequence[float]) -> str:
    """Percentages."""
    found = Spread.of(values)
    return f"{found.mean:.0%} ± {found.mean - found.low:.0%}"


def powers(values: Sequence[float]) -> str:
    """The range of p-values."""
    low, high = _p(min(values)), _p(max(values))
    return low if low == high else f"{low} to {high}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"


def _figure(svg: str, sentence: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(sentence)}</figcaption></figure>"


def _grid(figures: Sequence[str]) -> str:
    return '<div class="grid">\n' + "\n".join(figures) + "\n</div>"


def _say_collapse(group: Mapping[str, Trial], runs: Runs) -> str:
    gone, stay = [], []
    for name, trial in group.items():
        steps = [s for looks in runs[trial].values() if (s := collapse_step(looks)) is not None]
        if steps:
            count = f"{len(steps)} of {len(runs[trial])} seeds"
            gone.append(f"{name} (step {statistics.median_low(steps):g}, {count})")
        else:
            stay.append(name)
    parts = [f"it collapses with {_and(gone)}"] if gone else []
    parts += [f"it does not with {_and(stay)}"] if stay else []
    return f"Utility: {'; '.join(parts)}."


def _say_quality(group: Mapping[str, Trial], runs: Runs) -> str:
    counts = [
        f"{name} {sum(best_quality(looks) > MEANINGFUL for looks in runs[trial].values())}"
        for name, trial in group.items()
    ]
    total = max(len(runs[trial]) for trial in group.values())
    return (
        f"Seeds of {total} in which some evaluation is above {MEANINGFUL} with {KEPT:.0%} of the "
        f"utility left: {', '.join(counts)}."
    )


def _say_beta(runs: Runs, quality: bool) -> str:
    betas = [beta for beta in BETAS if Trial(beta=beta) in runs]
    shown = [beta for beta in betas if beta in (betas[0], NPO_BETA, betas[-1])]
    trials = {f"beta {beta:g}": Trial(beta=beta) for beta in shown}
    return _say_ends(trials | {LIMIT.name: LIMIT}, runs, quality)


def _say_overlap(runs: Runs, quality: bool) -> str:
    trials = {
        f"{trial.name} at overlap {overlap:g}": replace(trial, overlap=overlap)
        for trial in (NPO_RT, GA_RT)
        for overlap in (OVERLAPS[0], OVERLAPS[-1])
    }
    return _say_ends(trials, runs, quality)


def _say_ends(trials: Mapping[str, Trial], runs: Runs, quality: bool) -> str:
    """What each of those that were run ends with."""
    found = {name: list(runs[trial].values()) for name, trial in trials.items() if trial in runs}
    if quality:
        parts = [f"{n} {powers([_last_quality(x) for x in s])}" for n, s in found.items()]
        return f"Forget quality at the end, range over seeds: {'; '.join(parts)}."
    parts = [f"{name} {plus_minus([utility_share(x) for x in s])}" for name, s in found.items()]
    return f"Utility at the end: {'; '.join(parts)}."


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
