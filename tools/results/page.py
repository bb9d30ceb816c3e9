"""The tables and the page of `tools.results`."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.results.curves import plot_curves, save_figure
from tools.results.runs import Run
from tools.results.statistics import NONE, Interval
from tools.results.summary import Results
from tools.shared.names import markdown
from tools.shared.plots import fill


@dataclass(frozen=True)
class Table:
    """Text for readers; the numbers are in table.csv."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]
    words: bool = False  # sentences rather than numbers: the page breaks their lines

    def markdown(self) -> str:
        lines = [[markdown(cell) for cell in line] for line in (self.head, *self.rows)]
        lines.insert(1, ["---"] * len(self.head))
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {self.title}\n{self.note}\n\n{text}\n"


def shown(value: float | None, interval: Interval = NONE, std: float | None = None,
          share: bool = True) -> str:
    """A share in percent, "60 (23 to 88) ± 49", or a return, "-143 (-160 to -120) ± 20"."""
    if value is None or math.isnan(value):
        return "–"
    scale, form, form_of_ends = (100, ".3g", ".0f") if share else (1, ".4g", ".4g")
    text = f"{scale * value:{form}}"
    if not math.isnan(interval[0]):
        low, high = (f"{scale * end:{form_of_ends}}" for end in interval)
        text += f" ({low} to {high})"
    return text if std is None or math.isnan(std) else f"{text} ± {scale * std:.3g}"


def make_tables(results: Results, records: dict, improvements: dict) -> list[Table]:
    """What the page shows: by task, over all tasks, a comparison, and how the runs were made."""
    names, budget = results.names, results.runs[0].budget

    def last_step(method: str, task: str) -> str:
        row = records[method, task]
        # Where each run either fails or succeeds, Wilson's interval needs no deviation.
        binary = task != "mean" and set(results.scores[method, task]["success_at_end"]) <= {0, 1}
        return shown(row["success_at_end"], (row["low"], row["high"]),
                     None if binary else row["std"])

    def late(method: str, task: str) -> str:
        text = shown(records[method, task]["last_quarter"])
        if task == "mean":
            return text
        held = results.scores[method, task]["held"]
        return f"{text}; {held.sum():.0f} of {len(held)} held"

    def mean_return(method: str, task: str) -> str:
        row = records[method, task]
        text = shown(row["return"], (row["low"], row["high"]), row["std"], share=False)
        return f"{text}; last quarter {row['return_last_quarter']:.4g}"

    def by_method(tasks: list[str], cell: Callable[[str, str], str]) -> list[list[str]]:
        return [[task, *(cell(method, task) if (method, task) in records else "–"
                         for method in names)] for task in tasks]

    head, rows = ["task", *names.values()], by_method(results.rows, last_step)
    for method in reversed(names):  # the paper's column behind ours
        if method in results.columns:
            place = list(names).index(method) + 2
            head.insert(place, f"{names[method]}, paper")
            for row in rows:
                paper = results.paper(method, results.common if row[0] == "mean" else row[:1])
                row.insert(place, shown(paper.get("paper"), std=paper.get("paper_std")))
    few = "" if len(results.common) == len(results.tasks) else (
        " Means are over the tasks that every method has: "
        f"{', '.join(results.common) or 'there are none'}.")
    tables = " and ".join(sorted({table for table, _ in results.columns.values()}))
    paper = tables and (f" The paper's numbers are those of its {tables}: 1,000,000 steps, LIV or "
                        "CLIP as the VLM.")
    made = []
    for method, name in names.items():
        runs = [run for run in results.runs if run.method == method]
        hours = np.median([run.seconds[-1] for run in runs]) / 3600
        parts = [facts for run in runs for facts in parts_of(run)]
        scripts = {facts["script_sha256"] for facts in parts if "script_sha256" in facts}
        made.append([
            name, runs[0].about["command"],
            ", ".join(sorted({short_commit(facts) for facts in parts}))
            + f" ({len(scripts)} versions of {runs[0].script}.py)" * (len(scripts) > 1),
            ", ".join(sorted({str(facts.get("vlm_id") or "–") for facts in parts})),
            "; ".join(sorted({describe_hardware(facts) for facts in parts})),
            "–" if math.isnan(hours) else f"{hours:.2g}"])
    found = (
        Table("Success at the last step",
              f"Percent of the evaluation after {budget:,} steps. In brackets the 95 % interval: "
              "of a cell Wilson's (of shares of episodes a bootstrap over seeds), of the mean a "
              "bootstrap stratified by task. ± is the standard deviation over seeds, in the last "
              f"row of each seed's mean over the tasks.{few}{paper}", head, rows),
        Table("Success at the last step, in the last quarter",
              f"Percent, mean over the evaluations after {0.75 * budget:,.0f} steps and over "
              "seeds: one evaluation says little of a policy that changes. Held: seeds with at "
              f"least 90 % in them.{few}", ["task", *names.values()],
              by_method(results.rows, late)),
        Table("Over all tasks",
              "IQM: mean of the middle half of all runs, with its stratified bootstrap. Last "
              "quarter, held: as above. Once: success at any step of the episode.",
              ["method", "runs", "at the end", "IQM", "last quarter", "held", "once"],
              [[row["method"], str(row["runs"]), shown(row["success_at_end"]),
                shown(row["iqm"], (row["iqm_low"], row["iqm_high"])),
                shown(row["last_quarter"]), shown(row["held"]), shown(row["success_once"])]
               for (_, task), row in records.items() if task == "mean"]),
        Table("Probability of improvement",
              "How often, in percent, a run of the row's method is better at its end than one of "
              "the column's on the same task; ties count half; mean over tasks, stratified "
              "bootstrap.", ["", *names.values()],
              [[name, *(shown(*improvements[a, b]) if a != b else "" for b in names)]
               for a, name in names.items() if improvements]),
        Table("Return",
              f"Mean of the evaluation after {budget:,} steps over seeds, of environments without "
              "a success. In brackets the 95 % interval, a bootstrap over seeds; ± is the standard "
              "deviation over seeds. Behind it the mean over the evaluations of the last quarter.",
              ["task", *names.values()],
              by_method(results.return_tasks, mean_return)),
        Table("How they were made",
              "The JSON files beside the CSVs have every run's command, and the versions of "
              "packages.", ["method", "command of one run", "commits", "VLM", "hardware",
                            "hours a run (median)"], made, words=True),
    )
    return [table for table in found if table.rows]


def parts_of(run: Run) -> list[dict[str, Any]]:
    """The code and the machine of each part of a run: of the first, and of those by which it was
    continued with other code or elsewhere."""
    parts = [run.about | run.about["hardware"]]
    for change in run.about.get("continued", []):
        if change["env_steps"] < run.budget:  # `--budget` may end the run sooner
            parts.append(parts[-1] | change)
    return parts


def short_commit(facts: dict[str, Any]) -> str:
    commit, _, dirty = str(facts.get("commit")).partition("+")
    return commit[:7] + ("+" + dirty if dirty else "")


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


def write_page(output: Path, title: str, runs: list[Run]) -> str:
    """Write tables, curves and the page into `output`; returns the tables as Markdown."""
    results = Results(runs)
    records, improvements = results.records(), results.improvements()
    tables = make_tables(results, records, improvements)
    write_records(output / "table.csv", list(records.values()))
    write_records(output / "improvement.csv", [
        {"method": results.names[a], "over": results.names[b], "probability": share,
         "low": low, "high": high} for (a, b), (share, (low, high)) in improvements.items()])
    kinds = ["success"] * bool(results.tasks) + ["return"] * bool(results.return_tasks)
    measure, pictures = " and ".join(kinds).capitalize(), {}
    for name, by_time in (("curves", False), ("wall_clock", True)):
        if figure := plot_curves(results, by_time):
            caption = f"{measure} over {'wall-clock' if by_time else 'environment steps'}"
            pictures[name] = caption, save_figure(figure, output / name)
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    num_tasks = len(results.tasks) + len(results.return_tasks)
    about = (f"{len(runs)} run{'s' * (len(runs) != 1)} of {runs[0].budget:,} environment steps; "
             f"methods: {len(results.names)}, tasks: {num_tasks}, seeds: {seeds}.")
    band = ("Lines: mean over seeds, of each run the mean of its last evaluations (a twentieth of "
            "all); bands: 95 % interval of the mean over seeds, by a bootstrap.")
    text = "\n".join(table.markdown() for table in tables)
    images = "\n".join(f"## {caption}\n![{caption}]({name}.png)\n" for name, (caption, _)
                       in pictures.items())
    (output / "README.md").write_text(f"# {markdown(title)}\n{about}\n\n{text}\n{images}\n{band}\n")
    (output / "index.html").write_text(fill(
        Path(__file__).with_suffix(".html"), title=title, about=about, band=band, tables=tables,
        pictures=pictures.values()))
    return text
