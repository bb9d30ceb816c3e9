"""Tables, curves and the page of `tools.results`."""

import base64
import csv
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from scipy.stats import bootstrap

from common.tasks import MT10
from tools.paper_numbers import ORDER, find_column
from tools.results_runs import Run
from tools.results_statistics import (
    NONE,
    RESAMPLES,
    Interval,
    interquartile_mean,
    interval_of_cell,
    interval_over_runs,
    is_held,
    mean_of_tasks,
    probability_of_improvement,
    std_of_seeds,
)

matplotlib.use("Agg")
# Okabe and Ito's, which the colour-blind can tell apart; the last method, which readers look for
# first, has the first. More methods have them with dashes.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c")
DASHES = ("-", "--", ":")
MEASURES = ("success_at_end", "held", "success_once")


@dataclass(frozen=True)
class Table:
    """Text for readers; the numbers are in table.csv."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {self.title}\n{self.note}\n\n{text}\n"


class Results:
    """Runs by method and task, and what is computed of them.

    Attributes:
        runs: ordered by seed.
        names: what readers see of each method, in the paper's order.
        columns: the paper's table and column for those methods that have one.
        tasks: all, MT10's first, in the paper's order.
        common: those that every method has; means are over them.
        scores: [runs] by (measure, method, task), of the last evaluation; held of the last quarter.
    """

    def __init__(self, runs: list[Run]):
        self.runs = sorted(runs, key=lambda run: run.seed)
        labels = {run.method: run.label for run in runs}
        twice = [label for label, count in Counter(labels.values()).items() if count > 1]
        ordered = sorted(labels, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m))
        self.names = {m: m if labels[m] in twice else labels[m] for m in ordered}
        self.columns = {run.method: found for run in runs
                        if (found := find_column(run.method, str(run.args.get("goal"))))}
        self.tasks = sorted({run.task for run in runs},
                            key=lambda t: (MT10.index(t) if t in MT10 else len(MT10), t))
        self.groups = defaultdict(list)
        for run in self.runs:
            self.groups[run.method, run.task].append(run)
        self.common = [t for t in self.tasks if all((m, t) in self.groups for m in self.names)]
        self.scores = {}
        for (method, task), group in self.groups.items():
            values = ([run.success_at_end[-1] for run in group],
                      [is_held(run.env_steps, run.success_at_end, run.budget) for run in group],
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
                        "low": low, "high": high, **self.paper(method, [task])}
            if self.common:
                samples, seeds = self.samples(method), self.complete_seeds(method)
                ends = [[run.success_at_end[-1] for run in runs] for runs in seeds.values()]
                low, high = interval_over_runs(samples, mean_of_tasks)
                iqm_low, iqm_high = interval_over_runs(samples, interquartile_mean)
                rows[method, "mean"] = {
                    "method": self.names[method], "task": "mean", "runs": sum(map(len, samples)),
                    **{m: mean_of_tasks(*self.samples(method, m)) for m in MEASURES},
                    "low": low, "high": high, **self.paper(method, self.common),
                    "std_of_seeds": std_of_seeds(np.array(ends)),
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


# ------------------------------------------------------------------------------- tables


def percent(value: float | None, interval: Interval = NONE, std: float | None = None) -> str:
    """A share as text: "60 (23 to 88) ± 49"."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{100 * value:.3g}"
    if not math.isnan(interval[0]):
        text += f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"
    return text if std is None or math.isnan(std) else f"{text} ± {100 * std:.3g}"


def make_tables(results: Results, records: dict, improvements: dict) -> list[Table]:
    """What the page shows: by task, over all tasks, comparison, and how the runs were made."""
    names, head, rows, empty = results.names, ["task"], [], {"success_at_end": None}
    for method, name in names.items():
        head.append(name)
        if method in results.columns:
            head.append(f"{name}, paper")
    for task in [*results.tasks, *["mean"] * (len(results.common) > 1)]:
        rows.append([task])
        for method in names:
            row = records.get((method, task), empty)
            rows[-1].append(percent(row["success_at_end"], (row.get("low"), row["high"]) if
                                    "high" in row else NONE, row.get("std_of_seeds")))
            if method in results.columns:
                paper = row if row is not empty else results.paper(method, [task])
                rows[-1].append(percent(paper.get("paper"), std=paper.get("paper_std")))
    few = "" if len(results.common) == len(results.tasks) else (
        f" Means are over the {len(results.common)} tasks that every method has.")
    tables = " and ".join(sorted({table for table, _ in results.columns.values()}))
    paper = tables and (f" The paper's numbers are those of its {tables}: 1,000,000 steps, LIV or "
                        "CLIP as the VLM.")
    by_task = Table(
        "Success at the last step",
        f"Percent of the evaluation after {results.runs[0].budget:,} steps. In brackets the 95 % "
        "interval: of a cell Wilson's (of shares of episodes a bootstrap over seeds), of the mean "
        "a bootstrap stratified by task; ± is the standard deviation over seeds, of the mean that "
        f"of each seed's mean over the tasks.{few}{paper}", head, rows)
    overall = Table(
        "Over all tasks",
        "IQM: mean of the middle half of all runs, with its stratified bootstrap. Held: share of "
        "runs with success at the last step in at least 90 % of the evaluations of their last "
        "quarter. Once: success at any step of the episode.",
        ["method", "runs", "at the end", "IQM", "held", "once"],
        [[row["method"], str(row["runs"]), percent(row["success_at_end"]),
          percent(row["iqm"], (row["iqm_low"], row["iqm_high"])), percent(row["held"]),
          percent(row["success_once"])]
         for (_, task), row in records.items() if task == "mean"])
    comparison = Table(
        "Probability of improvement",
        "How often, in percent, a run of the row's method is better at its end than one of the "
        "column's on the same task; ties count half; mean over tasks, stratified bootstrap.",
        ["", *names.values()],
        [[name, *(percent(*improvements[a, b]) if a != b else "" for b in names)]
         for a, name in names.items() if improvements])
    made = []
    for method, name in names.items():
        runs = [run for run in results.runs if run.method == method]
        hours = np.mean([run.seconds[-1] for run in runs]) / 3600
        made.append([
            name, runs[0].about["command"],
            ", ".join(sorted({str(run.about.get("commit"))[:7] for run in runs})),
            str(runs[0].about.get("vlm_id") or "–"),
            "; ".join(sorted({describe_hardware(run.about["hardware"]) for run in runs})),
            "–" if math.isnan(hours) else f"{hours:.2g}"])
    how = Table(
        "How they were made",
        "The JSON files beside the CSVs have every run's command, and the versions of packages.",
        ["method", "command of one run", "commits", "VLM", "hardware", "hours a run"], made)
    return [table for table in (by_task, overall, comparison, how) if table.rows]


def describe_hardware(hardware: dict[str, Any]) -> str:
    devices = sorted({str(d).split(":")[0] for d in hardware.get("jax_devices") or ["?"]})
    return (f"{', '.join(devices)}; {hardware.get('num_cores', '?')} of "
            f"{hardware.get('cpu_count', '?')} cores")


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """A CSV with a column for each key; what is not known is left empty."""
    with open(path, "w", newline="") as file:
        fields = list(dict.fromkeys(key for row in records for key in row))
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for row in records:
            writer.writerow({key: "" if value is None or value != value else
                             f"{value:.6g}" if isinstance(value, float) else value
                             for key, value in row.items()})


# ------------------------------------------------------------------------------- curves


def curve(runs: list[Run], by_time: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """(x [n], success at the last step [runs, n]) on a common axis; None where time is not known.

    A point is the mean of a run's last evaluations, a twentieth of all. A run that has ended keeps
    its last value while the others go on.
    """
    axes = [run.seconds if by_time else run.env_steps for run in runs]
    if not runs or any(np.isnan(axis).any() for axis in axes):
        return None
    x = np.unique(np.concatenate(axes))
    x = x[x >= max(axis[0] for axis in axes)]
    if by_time:
        x = np.linspace(x[0], x[-1], 200)
    values = []
    for run, axis in zip(runs, axes, strict=True):
        width = max(1, round(len(axis) / 20))
        padded = np.concatenate([np.full(width - 1, run.success_at_end[0]), run.success_at_end])
        smooth = np.convolve(padded, np.full(width, 1 / width), "valid")
        values.append(np.interp(x, axis, smooth))
    return x, np.array(values)


def mean_curve(results: Results, method: str, by_time: bool):
    """The same of the mean over the common tasks, of the seeds that have them all."""
    seeds = results.complete_seeds(method)
    found = curve([run for runs in seeds.values() for run in runs], by_time)
    if found is None:
        return None
    x, values = found
    return x, values.reshape(len(seeds), len(results.common), -1).mean(1)


def plot_curves(results: Results, by_time: bool):
    """A panel for each task and one for the mean, all methods; None where no time is known.

    A band is the 95 % interval of the mean over seeds, by a bootstrap.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = {task: lambda m, task=task: curve(results.groups.get((m, task), []), by_time)
              for task in results.tasks}
    if len(results.common) > 1:
        panels["mean"] = lambda m: mean_curve(results, m, by_time)
    data = {(name, method): found for name, make in panels.items()
            for method in results.names if (found := make(method)) is not None}
    if not data:
        return None
    longest = max(x[-1] for x, _ in data.values())
    unit, scale = (("hours", 3600) if longest > 7200 else ("minutes", 60)) if by_time else (
        ("million", 1e6) if longest >= 1e6 else ("thousand", 1e3))
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    with plt.rc_context({"svg.hashsalt": "furl", "svg.fonttype": "path", "font.size": 8}):
        figure, axes = plt.subplots(rows, columns, sharey=True, squeeze=False, layout="constrained",
                                    figsize=(max(2.1 * columns, 4.6), 1.75 * rows + 0.75))
        for axis, name in zip(axes.flat, panels, strict=False):
            for number, method in enumerate(reversed(results.names)):
                if (name, method) not in data:
                    continue
                x, values = data[name, method]
                colour = COLOURS[number % len(COLOURS)]
                axis.plot(x / scale, 100 * values.mean(0), color=colour, lw=1.3,
                          label=results.names[method], zorder=3 - number / 100,
                          ls=DASHES[number // len(COLOURS) % len(DASHES)])
                if len(values) > 1:
                    band = bootstrap((values,), np.mean, axis=0, n_resamples=RESAMPLES // 2,
                                     method="percentile", rng=np.random.default_rng(0),
                                     batch=100).confidence_interval
                    axis.fill_between(x / scale, 100 * band.low, 100 * band.high, color=colour,
                                      alpha=0.13, lw=0)
            axis.set_title("mean of the tasks" if name == "mean" else name.removesuffix("-v3"),
                           fontsize=8, fontweight="bold" if name == "mean" else "normal")
            axis.set_ylim(-3, 103)
            axis.set_xlim(0, longest / scale)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.grid(color="#e6e6e6", lw=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes.flat[len(panels):]:
            axis.axis("off")
        figure.supxlabel(f"wall-clock ({unit})" if by_time else f"environment steps ({unit}s)",
                         fontsize=8)
        figure.supylabel("success at the last step (%)", fontsize=8)
        handles = {label: handle for axis in axes.flat for handle, label in
                   zip(*axis.get_legend_handles_labels(), strict=True)}
        labels = [label for label in results.names.values() if label in handles]
        figure.legend([handles[label] for label in labels], labels, frameon=False, fontsize=8,
                      loc="outside upper center", ncols=min(len(labels), 2 * columns, 5))
        return figure


def save_figure(figure, path: Path) -> str:
    """Write `path`.png and .svg, the same bytes each time; returns the PNG as a data URL."""
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "furl"}):
        figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    encoded = base64.b64encode(path.with_suffix(".png").read_bytes()).decode()
    return f"data:image/png;base64,{encoded}"


# --------------------------------------------------------------------------------- page


def write_page(output: Path, title: str, runs: list[Run]) -> str:
    """Write tables, curves and the page into `output`; returns the tables as Markdown."""
    results = Results(runs)
    records, improvements = results.records(), results.improvements()
    tables = make_tables(results, records, improvements)
    write_records(output / "table.csv", list(records.values()))
    write_records(output / "improvement.csv", [
        {"method": results.names[a], "over": results.names[b], "probability": share,
         "low": low, "high": high} for (a, b), (share, (low, high)) in improvements.items()])
    pictures = {}
    for name, caption, by_time in (("curves", "Success over environment steps", False),
                                   ("wall_clock", "Success over wall-clock", True)):
        figure = plot_curves(results, by_time)
        if figure is not None:
            pictures[name] = caption, save_figure(figure, output / name)
    about = (f"{len(runs)} runs of {runs[0].budget:,} environment steps: "
             f"{len(results.names)} methods, {len(results.tasks)} tasks.")
    band = ("Lines: mean over seeds, of each run the mean of its last evaluations (a twentieth of "
            "all); bands: 95 % interval of the mean over seeds, by a bootstrap.")
    text = "\n".join(table.markdown() for table in tables)
    images = "\n".join(f"## {caption}\n![{caption}]({name}.png)\n" for name, (caption, _)
                       in pictures.items())
    (output / "README.md").write_text(f"# {title}\n{about}\n\n{text}\n{images}\n{band}\n")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_suffix(".html").read_text())
    (output / "index.html").write_text(template.render(
        title=title, about=about, band=band, tables=tables, pictures=pictures.values()) + "\n")
    return text
