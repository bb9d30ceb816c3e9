"""Success rates over seeds and tasks: intervals and comparisons.

Scores are success rates from 0 to 1. Scores of a method on several tasks are `samples`: one array
[runs] for each task, whose lengths may differ.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import bootstrap, trim_mean

from tools.shared.measures import wilson_interval

RESAMPLES = 50_000  # means of zeros and ones take few values: fewer resamples might pick the next
MOST_VALUES = 20_000  # if a mean can take no more values, its distribution is computed exactly
Interval = tuple[float, float]  # 95 %; NaN where there is none
NONE = (math.nan, math.nan)


def interval_of_cell(scores: np.ndarray) -> Interval:
    """Of the mean of one task's scores [runs].

    Wilson's where each run succeeds or fails, as with a fixed goal: of five failures a bootstrap
    would make [0, 0]. Of shares of episodes, as with random goals, a bootstrap over the runs: the
    episodes of one run are no independent draws.
    """
    if not len(scores):
        return NONE
    if np.isin(scores, (0, 1)).all():
        return wilson_interval(int(scores.sum()), len(scores))
    return interval_over_runs([scores], mean_of_tasks)


def interval_over_runs(samples: list[np.ndarray], statistic: Callable) -> Interval:
    """Stratified bootstrap: the runs of each task are drawn anew, the tasks are kept.

    NaN where a task has a single run.
    """
    if not samples or any(len(scores) < 2 for scores in samples):
        return NONE
    if statistic is mean_of_tasks and (exact := interval_of_mean(samples)):
        return exact
    found = bootstrap(tuple(samples), statistic, n_resamples=RESAMPLES, batch=RESAMPLES // 10,
                      method="percentile", vectorized=True, axis=-1, rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def interval_of_mean(samples: list[np.ndarray]) -> Interval | None:
    """What `interval_over_runs` of `mean_of_tasks` tends to with ever more resamples: the ends are
    where the distribution function of a resample's mean reaches 2.5 and 97.5 %.

    None where the mean has more than `MOST_VALUES` values.
    """
    sums, shares = np.zeros(1), np.ones(1)  # of the tasks so far, and how often there is each
    for scores in samples:
        for _ in scores:  # each run is drawn anew
            added = np.add.outer(sums, scores / len(scores)).ravel().round(9)
            sums, which = np.unique(added, return_inverse=True)
            shares = np.bincount(which, np.repeat(shares / len(scores), len(scores)))
            if len(sums) > MOST_VALUES:
                return None
    ends = sums[np.searchsorted(np.cumsum(shares), np.array([0.025, 0.975]) - 1e-9)]
    return float(ends[0]) / len(samples), float(ends[1]) / len(samples)


def mean_of_tasks(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean([scores.mean(axis) for scores in samples], axis=0)


def interquartile_mean(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of all runs (Agarwal et al., 2021)."""
    return trim_mean(np.concatenate(samples, axis), 0.25, axis=axis)


def std_of_seeds(by_seed: np.ndarray) -> float:
    """Standard deviation over seeds of the mean over tasks, `by_seed` [seeds, tasks] (B.2).

    With the number of seeds as its divisor, as in the paper: three successes of five are 60 (49).
    """
    return float(by_seed.mean(1).std()) if len(by_seed) > 1 else math.nan


def probability_of_improvement(
    ours: list[np.ndarray], theirs: list[np.ndarray]
) -> tuple[float, Interval]:
    """How often a run of `ours` is better than one of `theirs` on the same task, ties half; the
    mean over tasks (Agarwal et al., 2021) and its stratified interval."""

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        a, b = samples[: len(ours)], samples[len(ours) :]
        shares = []
        for x, y in zip(a, b, strict=True):
            x, y = np.moveaxis(x, axis, -1)[..., :, None], np.moveaxis(y, axis, -1)[..., None, :]
            shares.append(((x > y) + 0.5 * (x == y)).mean((-2, -1)))
        return np.mean(shares, axis=0)

    return float(statistic(*ours, *theirs)), interval_over_runs([*ours, *theirs], statistic)


def last_quarter(env_steps: np.ndarray, at_end: np.ndarray, budget: int) -> float:
    """A run's mean success at the end, or return, over the evaluations in the last quarter of its
    `budget` of steps, or that of the last evaluation where it has none there."""
    late = at_end[env_steps > 0.75 * budget]
    return float(late.mean() if len(late) else at_end[-1])


def is_held(share: float) -> bool:
    """Whether a run holds what it has found: a `last_quarter` of at least 90 %."""
    return share >= 0.9 - 1e-9
