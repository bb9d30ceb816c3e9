"""Tables, curves and the page of `tools.results`."""

import base64
import csv
import io
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from scipy.stats import bootstrap

from common.tasks import MT10
from tools.paper_numbers import ORDER, find_column, paper_success
from tools.results_runs import Run
from tools.results_statistics import (
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
# Okabe and Ito's, which the colour-blind can tell apart; then the same with dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c")
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
        methods: names and labels, in the paper's order.
        tasks: all, MT10's first, in the paper's order.
        common: those that every method has, over which means are taken.
        scores: success at the last step, held success and success at any step of each run's last
            evaluation, [runs] by (measure, method, task).
    """

    def __init__(self, runs: list[Run]):
        self.runs = sorted(runs, key=lambda run: run.seed)
        labels = {run.method: run.label for run in runs}
        rank = {label: i for i, label in enumerate(ORDER)}
        self.methods = dict(sorted(labels.items(),
                                   key=lambda item: (rank.get(item[1], len(rank)), item[1])))
        rank = {task: i for i, task in enumerate(MT10)}
        self.tasks = sorted({run.task for run in runs}, key=lambda t: (rank.get(t, len(rank)), t))
        self.common = [task for task in self.tasks
                       if all(self.of(method, task) for method in self.methods)]
        self.scores = {}
        for method in self.methods:
            for task in self.tasks:
                group = self.of(method, task)
                values = ([run.success_at_end[-1] for run in group],
                          [is_held(run.env_steps, run.success_at_end, run.budget) for run in group],
                          [run.success_once[-1] for run in group])
                for measure, value in zip(MEASURES, values, strict=True):
                    self.scores[measure, method, task] = np.array(value, float)

    def of(self, method: str, task: str) -> list[Run]:
        return [run for run in self.runs if (run.method, run.task) == (method, task)]

    def goal(self, method: str) -> str:
        return next(str(run.args.get("goal")) for run in self.runs if run.method == method)

    def samples(self, method: str, measure: str = MEASURES[0]) -> list[np.ndarray]:
        """Scores [runs] of each common task."""
        return [self.scores[measure, method, task] for task in self.common]

    def by_seed(self, method: str) -> np.ndarray:
        """Success at the last step of the seeds that have all common tasks, [seeds, tasks]."""
        found = defaultdict(dict)
        for run in self.runs:
            if run.method == method and run.task in self.common:
                found[run.seed][run.task] = run.success_at_end[-1]
        complete = [[one[task] for task in self.common] for one in found.values()
                    if len(one) == len(self.common)]
        return np.array(complete).reshape(-1, len(self.common))

    def records(self) -> list[dict[str, Any]]:
        """table.csv: a row for each cell, and one for each method's mean over the common tasks."""
        rows = []
        for method, label in self.methods.items():
            goal = self.goal(method)
            for task in self.tasks:
                values = [self.scores[measure, method, task] for measure in MEASURES]
                if not len(values[0]):
                    continue
                low, high = interval_of_cell(values[0])
                row = {"method": label, "task": task, "runs": len(values[0]),
                       **{m: v.mean() for m, v in zip(MEASURES, values, strict=True)},
                       "low": low, "high": high, "paper": paper_success(label, goal, task)}
                rows.append(row)
            if not self.common:
                continue
            samples, by_seed = self.samples(method), self.by_seed(method)
            low, high = interval_over_runs(samples, mean_of_tasks)
            iqm_low, iqm_high = interval_over_runs(samples, interquartile_mean)
            papers = [paper_success(label, goal, task) for task in self.common]
            rows.append({
                "method": label, "task": "mean", "runs": sum(map(len, samples)),
                **{m: mean_of_tasks(*self.samples(method, m)) for m in MEASURES},
                "low": low, "high": high, "std_of_seeds": std_of_seeds(by_seed),
                "iqm": interquartile_mean(*samples), "iqm_low": iqm_low, "iqm_high": iqm_high,
                "paper": None if None in papers else np.mean(papers)})
        return rows

    def improvements(self) -> dict[tuple[str, str], tuple[float, Interval]]:
        """Probability of improvement of each method over each other."""
        found = {}
        names = list(self.methods) if self.common else []
        for i, ours in enumerate(names):
            for theirs in names[:i]:
                share, (low, high) = probability_of_improvement(
                    self.samples(ours), self.samples(theirs))
                found[ours, theirs] = share, (low, high)
                found[theirs, ours] = 1 - share, (1 - high, 1 - low)
        return found


# ------------------------------------------------------------------------------- tables


def percent(value: float | None, interval: Interval | None = None) -> str:
    if value is None or math.isnan(value):
        return "–"
    if interval is None or math.isnan(interval[0]):
        return f"{100 * value:.3g}"
    return f"{100 * value:.3g} ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


def make_tables(results: Results, records: list[dict[str, Any]]) -> list[Table]:
    """The tables of the page: by task, over all tasks, comparison, and how the runs were made."""
    cells = {(row["method"], row["task"]): row for row in records}
    labels = list(results.methods.values())
    columns = {label: find_column(label, results.goal(m)) for m, label in results.methods.items()}
    rows = []
    for task in [*results.tasks, "mean"]:
        line = [task]
        for label in labels:
            row = cells.get((label, task))
            ours = percent(row["success_at_end"], (row["low"], row["high"])) if row else "–"
            if row and task == "mean" and not math.isnan(row["std_of_seeds"]):
                ours += f" ± {100 * row['std_of_seeds']:.3g}"
            line.append(ours)
            if columns[label]:
                method = next(m for m, name in results.methods.items() if name == label)
                line.append(percent(row["paper"] if row else paper_success(
                    label, results.goal(method), task)))
        rows.append(line)
    head = ["task"]
    for label in labels:
        head += [f"{label} (ours)", f"{label} (paper, {columns[label][0]})"] if columns[
            label] else [label]
    budget = results.runs[0].budget
    mean_note = ""
    if len(results.common) < len(results.tasks):
        mean_note = f" Means are over the {len(results.common)} tasks that every method has."
    by_task = Table(
        "Success at the last step, by task",
        f"Percent of the evaluation after {budget:,} steps. In brackets the 95 % interval: of a "
        "cell Wilson's (of shares of episodes a bootstrap over seeds), of the mean a bootstrap "
        "stratified by task; ± is the standard deviation over seeds of the mean over tasks."
        f"{mean_note} The paper's runs have 1,000,000 steps, and other VLMs than `mini`.",
        head, rows)
    rows = []
    for label in labels:
        row = cells.get((label, "mean"))
        if row:
            rows.append([label, str(row["runs"]), percent(row["success_at_end"]),
                         percent(row["iqm"], (row["iqm_low"], row["iqm_high"])),
                         percent(row["held"]), percent(row["success_once"])])
    overall = Table(
        "Over all tasks",
        "IQM: mean of the middle half of all runs, with its stratified bootstrap. Held: success at "
        "the last step in at least 90 % of the evaluations of the last quarter of the run. Once: "
        "success at any step of the episode.",
        ["method", "runs", "at the end", "IQM", "held", "once"], rows)
    found = results.improvements()
    rows = [[mine, *(percent(*found[a, b]) if a != b else "" for b in results.methods)]
            for a, mine in results.methods.items()] if found else []
    comparison = Table(
        "Probability of improvement",
        "How often, in percent, a run of the row's method is better at its end than one of the "
        "column's on the same task; ties count half; mean over tasks, stratified bootstrap.",
        ["", *labels], rows)
    return [table for table in (by_task, overall, comparison, made_table(results)) if table.rows]


def made_table(results: Results) -> Table:
    rows = []
    for method, label in results.methods.items():
        runs = [run for run in results.runs if run.method == method]
        hardware = sorted({describe_hardware(run.about.get("hardware", {})) for run in runs})
        commits = sorted({str(run.about.get("commit"))[:7] for run in runs})
        seconds = [run.seconds[-1] for run in runs]
        hours = f"{np.mean(seconds) / 3600:.2g}" if not np.isnan(seconds).any() else "–"
        rows.append([label, f"`{runs[0].about['command']}`", ", ".join(commits),
                     str(runs[0].about.get("vlm_id") or "–"), "; ".join(hardware), hours])
    return Table(
        "How they were made",
        "The command of one run of each method; the JSON files beside the CSVs have all of them, "
        "with the versions of the packages.",
        ["method", "command of one run", "commits", "VLM", "hardware", "hours a run"], rows)


def describe_hardware(hardware: dict[str, Any]) -> str:
    devices = sorted({str(d).split(":")[0] for d in hardware.get("jax_devices") or ["?"]})
    return (f"{', '.join(devices)}; {hardware.get('num_cores', '?')} of "
            f"{hardware.get('cpu_count', '?')} cores")


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    fields = list(dict.fromkeys(key for row in records for key in row))
    with open(path, "w", newline="") as file:
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
    runs = [run for run in results.runs if run.method == method and run.task in results.common]
    seeds = [seed for seed in sorted({run.seed for run in runs})
             if sum(run.seed == seed for run in runs) == len(results.common)]
    runs = [run for run in runs if run.seed in seeds]
    found = curve(runs, by_time)
    if found is None:
        return None
    x, values = found
    return x, np.array([values[[run.seed == seed for run in runs]].mean(0) for seed in seeds])


def plot_curves(results: Results, by_time: bool):
    """A panel for each task and one for the mean, all methods; None where no time is known.

    A band is the 95 % interval of the mean over seeds, by a bootstrap.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = {task: lambda m, task=task: curve(results.of(m, task), by_time)
              for task in results.tasks}
    if len(results.common) > 1:
        panels["mean"] = lambda m: mean_curve(results, m, by_time)
    data = {(name, method): found for name, make in panels.items()
            for method in results.methods if (found := make(method)) is not None}
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
            for number, (method, label) in enumerate(results.methods.items()):
                if (name, method) not in data:
                    continue
                x, values = data[name, method]
                colour = COLOURS[number % len(COLOURS)]
                axis.plot(x / scale, 100 * values.mean(0), color=colour, lw=1.3, label=label,
                          ls=DASHES[number // len(COLOURS) % len(DASHES)])
                if len(values) > 1:
                    band = bootstrap((values,), np.mean, axis=0, n_resamples=RESAMPLES // 2,
                                     method="percentile", rng=np.random.default_rng(0),
                                     batch=100).confidence_interval
                    axis.fill_between(x / scale, 100 * band.low, 100 * band.high, color=colour,
                                      alpha=0.15, lw=0)
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
        labels = [label for label in results.methods.values() if label in handles]
        figure.legend([handles[label] for label in labels], labels, frameon=False, fontsize=8,
                      loc="outside upper center", ncols=min(len(labels), 2 * columns, 5))
        return figure


def save_figure(figure, path: Path) -> str:
    """Write `path`.png and .svg, the same bytes each time; returns the SVG as a data URL."""
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "furl"}):
        figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    path.with_suffix(".svg").write_bytes(buffer.getvalue())
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


# --------------------------------------------------------------------------------- page


def write_page(output: Path, title: str, runs: list[Run]) -> str:
    """Write tables, curves and the page into `output`; returns the tables as Markdown."""
    results = Results(runs)
    records = results.records()
    tables = make_tables(results, records)
    write_records(output / "table.csv", records)
    write_records(output / "improvement.csv", [
        {"method": results.methods[a], "over": results.methods[b], "probability": share,
         "low": low, "high": high} for (a, b), (share, (low, high)) in
        sorted(results.improvements().items())])
    pictures = {}
    for name, caption, by_time in (("curves", "Success over environment steps", False),
                                   ("wall_clock", "Success over wall-clock", True)):
        figure = plot_curves(results, by_time)
        if figure is not None:
            pictures[name] = caption, save_figure(figure, output / name)
    about = (f"{len(runs)} runs of {runs[0].budget:,} environment steps: "
             f"{len(results.methods)} methods, {len(results.tasks)} tasks.")
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
