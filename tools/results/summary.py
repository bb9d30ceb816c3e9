"""Runs by method and task, and the numbers that `tools.results` shows of them."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from common.envs.metaworld_tasks import MT10
from tools.results import statistics
from tools.results.paper_numbers import ORDER, find_column
from tools.results.runs import Run, tasks_of_returns


def scores_of(run: Run, of_return: bool) -> dict[str, float]:
    """What counts of a run: its last evaluation, and those in the last quarter of its steps."""
    values = run.returns if of_return else run.success_at_end
    late = statistics.last_quarter(run.env_steps, values, run.budget)
    if of_return:
        return {"return": values[-1], "return_last_quarter": late}
    return {"success_at_end": values[-1], "last_quarter": late, "held": statistics.is_held(late),
            "success_once": run.success_once[-1]}


class Results:
    """Runs by method and task, and what is computed of them.

    Attributes:
        runs: ordered by seed.
        names: what readers see of each method, in the paper's order.
        columns: the paper's table and column for those methods that have one, and its tasks.
        tasks: those with a success, MT10's first, in the paper's order.
        return_tasks: those without, of which the return counts.
        common: those of `tasks` that every method has; means are over them.
        rows: `tasks`, and "mean" if several are common.
        groups: the runs by (method, task).
        scores: measure -> [runs] by (method, task), see `scores_of`.
    """

    def __init__(self, runs: list[Run]):
        self.runs = sorted(runs, key=lambda run: run.seed)
        labels = {run.method: run.label for run in runs}
        twice = [label for label, count in Counter(labels.values()).items() if count > 1]
        ordered = sorted(labels, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m))
        self.names = {m: m if labels[m] in twice else labels[m] for m in ordered}
        self.columns = {run.method: found for run in runs if run.task in MT10
                        if (found := find_column(run.method, str(run.args.get("goal"))))}
        self.return_tasks = sorted(tasks_of_returns(runs))
        self.tasks = sorted({run.task for run in runs} - set(self.return_tasks),
                            key=lambda t: (MT10.index(t) if t in MT10 else len(MT10), t))
        self.groups = defaultdict(list)
        for run in self.runs:
            self.groups[run.method, run.task].append(run)
        self.common = [t for t in self.tasks if all((m, t) in self.groups for m in self.names)]
        self.rows = [*self.tasks, *["mean"] * (len(self.common) > 1)]
        self.scores = {}
        for (method, task), group in self.groups.items():
            found = [scores_of(run, task in self.return_tasks) for run in group]
            self.scores[method, task] = {
                measure: np.array([scores[measure] for scores in found], float)
                for measure in found[0]}

    def samples(self, method: str, measure: str) -> list[np.ndarray]:
        """Scores [runs] of each common task."""
        return [self.scores[method, task][measure] for task in self.common]

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
            for task in [*self.tasks, *self.return_tasks]:
                if (method, task) not in self.groups:
                    continue
                scores = self.scores[method, task]
                ends = next(iter(scores.values()))
                low, high = statistics.interval_over_runs([ends], statistics.mean_of_tasks) if (
                    task in self.return_tasks) else statistics.interval_of_cell(ends)
                rows[method, task] = {
                    "method": self.names[method], "task": task, "runs": len(ends),
                    **{measure: values.mean() for measure, values in scores.items()},
                    "low": low, "high": high, "std": statistics.std_of_seeds(ends[:, None]),
                    **self.paper(method, [task])}
            if self.common:
                samples, seeds = self.samples(method, "success_at_end"), self.complete_seeds(method)
                ends = [[run.success_at_end[-1] for run in runs] for runs in seeds.values()]
                low, high = statistics.interval_over_runs(samples, statistics.mean_of_tasks)
                iqm = statistics.interquartile_mean
                iqm_low, iqm_high = statistics.interval_over_runs(samples, iqm)
                rows[method, "mean"] = {
                    "method": self.names[method], "task": "mean", "runs": sum(map(len, samples)),
                    **{measure: statistics.mean_of_tasks(*self.samples(method, measure))
                       for measure in self.scores[method, self.common[0]]},
                    "low": low, "high": high, "std": statistics.std_of_seeds(np.array(ends)),
                    **self.paper(method, self.common),
                    "iqm": iqm(*samples), "iqm_low": iqm_low, "iqm_high": iqm_high}
        return rows

    def improvements(self) -> dict[tuple[str, str], tuple[float, statistics.Interval]]:
        """Probability of improvement of each method over each other."""
        found = {}
        names = list(self.names) if self.common else []
        samples = {method: self.samples(method, "success_at_end") for method in names}
        for i, ours in enumerate(names):
            for theirs in names[:i]:
                share, (low, high) = statistics.probability_of_improvement(
                    samples[ours], samples[theirs])
                found[ours, theirs] = share, (low, high)
                found[theirs, ours] = 1 - share, (1 - high, 1 - low)
        return found
