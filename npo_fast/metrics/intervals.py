"""How far a measure would move with other records: bootstrap intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from npo_fast.metrics.logs import CONVENTIONS, ENTRIES, Result, column, examples_in, values_of
from npo_fast.metrics.measures import MEASURES, Measure

RESAMPLES = 1000
CONFIDENCE = 0.95


def intervals(
    result: Result,
    keys: tuple[str, ...] | None = None,
    registry: Mapping[str, Measure] = MEASURES,
) -> dict[str, tuple[float, float]]:
    """Returns the 95 % bootstrap interval of each measure that the logs allow, by key.

    Records of each log are drawn again with replacement, 1000 times with one seed, and the 2.5th
    and 97.5th percentiles taken (``scipy.stats.bootstrap``). It tells the chance of which records
    were asked, not that of another training run. A p-value has none, nor has a log of one record.

    Args:
        keys: of measures; else all of the registry.
    """
    chosen = registry if keys is None else {key: registry[key] for key in keys}
    return {
        key: _interval(measure, result)
        for key, measure in chosen.items()
        if not measure.needs_retrained
        and measure.available(result, None)
        and all(examples_in(result[file]) > 1 for file in measure.needs)
    }


def _interval(measure: Measure, result: Result) -> tuple[float, float]:
    logs = {file: _arrays(result[file], names) for file, names in measure.needs.items()}

    def statistic(*drawn: Any) -> float:
        sample = {
            file: {
                name: values if name in ENTRIES else values[indices]
                for name, values in columns.items()
            }
            for (file, columns), indices in zip(logs.items(), drawn, strict=True)
        }
        return measure.compute(sample, {})

    interval = bootstrap(
        [np.arange(examples_in(result[file])) for file in logs],
        statistic,
        vectorized=False,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _arrays(log: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The columns that a measure needs, to be indexed."""
    arrays = {name: log[name] for name in {*names, CONVENTIONS} & log.keys() & {*ENTRIES}}
    for name in names:
        if name not in ENTRIES:
            numeric = name != "ending"
            arrays[name] = column(log, name) if numeric else np.array(values_of(log, name), object)
    return arrays
