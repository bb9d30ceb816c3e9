"""From run folders to a table beside the paper's, curves, and CSVs that can be published.

    python -m tools.results runs/grids/table1                  # a grid's folder
    python -m tools.results runs/a runs/b --label FuRL --output results/mine
    python -m tools.results runs/c --label SAC --output results/mine          # added to those
    python -m tools.results wandb:entity/furl --output results/from-wandb
    python -m tools.results results/mine                       # again, from the CSVs alone
    python -m tools.results results/a results/b --budget 80000 --figure success.png

Writes <output>/<method>/<task>.csv (seed,env_steps,success_once,success_at_end) beside a JSON with
commands, commits, versions and hardware; README.md and table.csv; curves over steps and wall-clock
(PNG and SVG); index.html, which needs nothing else. docs/results.md explains each number.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.cli import run_script
from common.errors import UserError, first_line
from common.flags import PositiveInt, check_ranges
from common.logger import show
from tools.results.curves import plot_curves
from tools.results.page import write_page
from tools.results.runs import (
    Run,
    check_runs,
    find_runs,
    finished_runs,
    name_methods,
    write_runs,
)
from tools.results.summary import Results
from tools.shared.folders import writable_folder, written_whole
from tools.shared.names import distinct_name


@dataclass(frozen=True)
class Args:
    # run folders, a grid's, a folder of run folders, a results folder, or wandb:<entity>/<project>
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    # where to write, beside what is there; default: <grid>/results, or the results folder given
    output: Path | None = None
    label: str | None = None  # of the run folders given; default: script, and flags that differ
    budget: PositiveInt | None = None  # take each run as it was after so many environment steps
    figure: Path | None = None  # write only the curves over steps, to this .png, .svg or .pdf


def main(args: Args) -> list[Run]:
    """Write the results, and return the runs that are in them."""
    if not args.runs:
        raise UserError("give run folders, a grid's folder or a results folder")
    check_ranges(args)
    if any("\ud800" <= c <= "\udfff" for c in args.label or ""):  # bytes that are no text
        raise UserError(f"--label {args.label!r} cannot be written into a page")
    if args.figure is not None and (args.output or not args.figure.suffix):
        raise UserError(f"--figure {args.figure} is all that is written then, without --output, "
                        "and needs a suffix: .png, .svg or .pdf")
    runs, output, title = [], args.output, None
    for source in args.runs:
        found, about = find_runs(source, args.label)
        if about and args.output is None and args.figure is None:
            if output is not None:
                raise UserError(f"{source} would be written into {output}: say where to write "
                                "with --output")
            output = Path(source) / "results" if "preset" in about else Path(source)
        if about and title is None:
            title = about.get("title") or f"{about['name']}, preset {about['preset']}"
        runs += found
    if runs and args.label is not None and args.label not in {run.label for run in runs}:
        raise UserError(f"--label {args.label} is for run folders: the methods in "
                        f"{', '.join(args.runs)} have their names")
    runs = finished_runs(name_methods(runs), args.budget)
    if args.figure is not None:
        check_runs(runs)
        try:
            plot_curves(Results(runs), by_time=False).savefig(args.figure, dpi=200)
        # No such folder, a suffix that is no picture's, or one that needs LaTeX.
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--figure {args.figure} cannot be written: {first_line(error)}"
                            ) from None
        show(f"written: {args.figure}")
        return runs
    if output is None:
        raise UserError("say where to write: --output results/<name>")
    kept, about = kept_runs(output, args.budget)
    writable_folder(output)
    runs = merge(kept, runs)
    check_runs(runs)
    title = about.get("title") or title or output.name
    with written_whole(output, keep=True) as folder:
        (folder / "results.json").write_text(json.dumps({"title": title}) + "\n")
        write_runs(folder, runs)
        text = write_page(folder, title, runs)
    show(text)
    show(f"written: {output}/README.md, table.csv, curves.png, index.html and the rest")
    return runs


def kept_runs(output: Path, budget: int | None) -> tuple[list[Run], dict[str, str]]:
    """The runs that `output` holds already, and its results.json.

    Raises:
        UserError: it is no results folder, or `budget` would cut what it holds.
    """
    if not (output / "results.json").exists():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} exists and is no results folder: choose another --output")
        return [], {}
    kept, about = find_runs(str(output), None)
    longest = max((run.budget for run in kept), default=0)
    if budget and budget < longest:
        raise UserError(f"{output} holds runs of {longest:,} steps, which --budget {budget} would "
                        "cut: choose another --output")
    return kept, about


def identity(run: Run) -> tuple:
    """What stays as it is when a run is continued, which may add a command."""
    about = run.about
    return about.get("run_id"), about.get("commit"), str(about.get("command")).split(" && ")[0]


def merge(kept: list[Run], given: list[Run]) -> list[Run]:
    """`kept` and `given`, each method in a folder that no other label has; a run that is in both is
    taken as given.

    Raises:
        UserError: a cell that is kept would be replaced by another run, or a run would be there
            twice.
    """
    owners = {run.method: run.label for run in kept}
    runs = {(run.method, run.task, run.seed): run for run in kept}
    by_id = {(run.about["run_id"], run.task, run.seed): run for run in kept
             if run.about.get("run_id")}
    added = []
    for run in given:
        method = distinct_name(run.method, run.label, owners)
        run = dataclasses.replace(run, method=method)
        old = runs.pop((method, run.task, run.seed), None)
        if old and identity(old) != identity(run):
            raise UserError(f"{old.place} is another run of {run.label} than {run.place}: choose "
                            "another --output or --label")
        same = by_id.get((run.about.get("run_id"), run.task, run.seed))
        if same and same.method != method:
            raise UserError(f"{run.place} is there already, as {same.label}: give it that --label, "
                            "or choose another --output")
        added.append(run)
    return [*runs.values(), *added]


if __name__ == "__main__":
    run_script(main, Args)
