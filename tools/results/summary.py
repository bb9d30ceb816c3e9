"""Runs by method and task, and the numbers that `tools.results` shows of them."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from common.envs.metaworld_tasks import MT10
from tools.results.paper_numbers import ORDER, find_column
from tools.results.runs import Run, tasks_of_returns
from tools.results.statistics import (
    Interval,
    interquartile_mean,
    interval_of_cell,
    interval_over_runs,
    is_held,
    last_quarter,
    mean_of_tasks,
    probability_of_improvement,
    std_of_seeds,
)

MEASURES = ("success_at_end", "last_quarter", "held", "success_once")
RETURNS = ("return", "return_last_quarter")


class Results:
    """Runs by method and task, and what is computed of them.

    Attributes:
        runs: ordered by seed.
        names: what readers see of each method, in the paper's order.
        columns: the paper's table and column for those methods that have one.
        tasks: those with a success, MT10's first, in the paper's order.
        return_tasks: those without, of which the return counts.
        common: those of `tasks` that every method has; means are over them.
        scores: [runs] by (measure, method, task), of the last evaluation; `last_quarter` and `held`
            of those in the last quarter of the steps. Of `return_tasks` `return` and
            `return_last_quarter`.
    """

    def __init__(self, runs: list[Run]):
        self.runs = sorted(runs, key=lambda run: run.seed)
        labels = {run.method: run.label for run in runs}
        twice = [label for label, count in Counter(labels.values()).items() if count > 1]
        ordered = sorted(labels, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m))
        self.names = {m: m if labels[m] in twice else labels[m] for m in ordered}
        self.columns = {run.method: found for run in runs
                        if (found := find_column(run.method, str(run.args.get("goal"))))}
        self.return_tasks = sorted(tasks_of_returns(runs))
        self.tasks = sorted({run.task for run in runs} - set(self.return_tasks),
                            key=lambda t: (MT10.index(t) if t in MT10 else len(MT10), t))
        self.groups = defaultdict(list)
        for run in self.runs:
            self.groups[run.method, run.task].append(run)
        self.common = [t for t in self.tasks if all((m, t) in self.groups for m in self.names)]
        self.scores = {}
        for (method, task), group in self.groups.items():
            if task in self.return_tasks:
                values = ([run.returns[-1] for run in group],
                          [last_quarter(run.env_steps, run.returns, run.budget) for run in group])
                for measure, value in zip(RETURNS, values, strict=True):
                    self.scores[measure, method, task] = np.array(value, float)
                continue
            shares = [last_quarter(run.env_steps, run.success_at_end, run.budget) for run in group]
            values = ([run.success_at_end[-1] for run in group], shares,
                      [is_held(share) for share in shares],
                      [run.success_once[-1] for run in group])
            for measure, value in zip(MEASURES, values, strict=True):
                self.scores[measure, method, task] = np.array(value, float)

    def samples(self, method: str, measure: str = MEASURES[0]) -> list[np.ndarray]:
        """Scores [runs] of each common task."""
        return [self.scores[measure, method, task] for task in self.common]

    def complete_seeds(self, method: str) -> dict[int, list[Run]]:
        """The runs on the common tasks of the seeds that have them all."""
        seeds = defaultdict(list)
        for run in self.runs:
            if run.method == method and run.task in self.common:
                seeds[run.seed].append(run)
        return {seed: runs for seed, runs in seeds.items() if len(runs) == len(self.common)}

    def paper(self, method: str, tasks: list[str]) -> dict[str, float | None]:
        """The paper's mean over `tasks`, and its standard deviation where it gives one, 0 to 1."""
        if method not in self.columns or not set(tasks) <= set(MT10):
            return {}
        column = self.columns[method][1]
        rows = [MT10.index(task) for task in tasks]
        std = column.stds[rows[0]] if len(rows) == 1 else (
            column.average_std if len(rows) == len(MT10) else None)
        return {"paper": float(np.mean([column.means[row] for row in rows])) / 100,
                "paper_std": std if std is None else std / 100}

    def records(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The rows of table.csv: each cell, and each method's mean over the common tasks."""
        rows = {}
        for method in self.names:
            for task in self.tasks:
                if (method, task) in self.groups:
                    scores = [self.scores[measure, method, task] for measure in MEASURES]
                    low, high = interval_of_cell(scores[0])
                    rows[method, task] = {
                        "method": self.names[method], "task": task, "runs": len(scores[0]),
                        **{m: value.mean() for m, value in zip(MEASURES, scores, strict=True)},
                        "low": low, "high": high, "std": std_of_seeds(scores[0][:, None]),
                        **self.paper(method, [task])}
            for task in self.return_tasks:
                if (method, task) in self.groups:
                    scores = [self.scores[measure, method, task] for measure in RETURNS]
                    low, high = interval_over_runs(scores[:1], mean_of_tasks)
                    rows[method, task] = {
                        "method": self.names[method], "task": task, "runs": len(scores[0]),
                        **{m: value.mean() for m, value in zip(RETURNS, scores, strict=True)},
                        "low": low, "high": high, "std": std_of_seeds(scores[0][:, None])}
            if self.common:
                samples, seeds = self.samples(method), self.complete_seeds(method)
                ends = [[run.success_at_end[-1] for run in runs] for runs in seeds.values()]
                low, high = interval_over_runs(samples, mean_of_tasks)
                iqm_low, iqm_high = interval_over_runs(samples, interquartile_mean)
                rows[method, "mean"] = {
                    "method": self.names[method], "task": "mean", "runs": sum(map(len, samples)),
                    **{m: mean_of_tasks(*self.samples(method, m)) for m in MEASURES},
                    "low": low, "high": high, "std": std_of_seeds(np.array(ends)),
                    **self.paper(method, self.common),
                    "iqm": interquartile_mean(*samples), "iqm_low": iqm_low, "iqm_high": iqm_high}
        return rows

    def improvements(self) -> dict[tuple[str, str], tuple[float, Interval]]:
        """Probability of improvement of each method over each other."""
        found = {}
        names = list(self.names) if self.common else []
        for i, ours in enumerate(names):
            for theirs in names[:i]:
                share, (low, high) = probability_of_improvement(
                    self.samples(ours), self.samples(theirs))
                found[ours, theirs] = share, (low, high)
                found[theirs, ours] = 1 - share, (1 - high, 1 - low)
        return found
