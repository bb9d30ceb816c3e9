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

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.cli import run_script
from common.errors import UserError
from common.flags import PositiveInt, check_range
from common.logger import show
from tools.results.curves import plot_curves
from tools.results.page import write_page
from tools.results.runs import (
    Run,
    check_runs,
    find_runs,
    name_methods,
    separate_methods,
    write_runs,
)
from tools.results.summary import Results
from tools.shared.folders import written_whole


@dataclass(frozen=True)
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders, a grid's, a folder of run folders, a results folder, or wandb:<entity>/<project>
    """
    output: Path | None = None
    """where to write; default: results/ in the grid's folder, or the results folder that is given;
    what it holds already is kept"""
    label: str | None = None
    """the method of the run folders that are given; default: the script, and the flags that differ
    """
    budget: int | None = None
    """take each run as it was after so many environment steps"""
    figure: Path | None = None
    """write only the curves over environment steps, to this .png, .svg or .pdf"""


def main(args: Args) -> list[Run]:
    """Write the results, and return the runs that are in them."""
    if not args.runs:
        raise UserError("give run folders, a grid's folder or a results folder")
    check_range(args.budget, PositiveInt | None, "--budget")
    if any("\ud800" <= c <= "\udfff" for c in args.label or ""):  # bytes that are no text
        raise UserError(f"--label {args.label!r} cannot be written into a page")
    runs, output, title = [], args.output, None
    for source in args.runs:
        found, about = find_runs(source, args.label)
        if "preset" in about and output is None:
            output = Path(source) / "results"
        if "title" in about and output is None:
            output = Path(source)
        if title is None and about:
            title = about.get("title") or f"{about['name']}, preset {about['preset']}"
        runs += found
    if args.figure is not None:
        runs = check_runs(name_methods(runs), args.budget)
        try:
            plot_curves(Results(runs), by_time=False).savefig(args.figure, dpi=200)
        except (OSError, ValueError) as error:  # no such folder, or a suffix that is no picture's
            raise UserError(f"--figure {args.figure} cannot be written: {error}") from None
        show(f"written: {args.figure}")
        return runs
    if output is None:
        raise UserError("say where to write: --output results/<name>")
    kept = kept_runs(output, args)
    runs = check_runs(merge(kept, separate_methods(kept, name_methods(runs))), args.budget)
    title = kept_title(output) or title or output.name
    with written_whole(output, keep=True) as folder:
        (folder / "results.json").write_text(json.dumps({"title": title}) + "\n")
        write_runs(folder, runs)
        text = write_page(folder, title, runs)
    show(text)
    show(f"written: {output}/README.md, table.csv, curves.png, index.html and the rest")
    return runs


def kept_title(output: Path) -> str | None:
    path = output / "results.json"
    return json.loads(path.read_text())["title"] if path.exists() else None


def kept_runs(output: Path, args: Args) -> list[Run]:
    """The runs that `output` holds already.

    Raises:
        UserError: it is no results folder, or --budget would cut what it holds.
    """
    if output.exists() and not (output / "results.json").exists():
        if not output.is_dir() or any(output.iterdir()):
            raise UserError(f"{output} exists and is no results folder: choose another --output")
    kept = find_runs(str(output), None)[0] if (output / "results.json").exists() else []
    longest = max((run.budget for run in kept), default=0)
    if args.budget and args.budget < longest:
        raise UserError(f"{output} holds runs of {longest:,} steps, which --budget {args.budget} "
                        "would cut: choose another --output")
    return kept


def merge(kept: list[Run], given: list[Run]) -> list[Run]:
    """`kept` and `given`; a run that is in both is taken as given.

    Raises:
        UserError: a cell that is kept would be replaced by another run.
    """
    runs = {(run.method, run.task, run.seed): run for run in kept}
    added = []
    for run in given:
        old = runs.pop((run.method, run.task, run.seed), None)
        if old is not None and identity(old) != identity(run):
            raise UserError(f"{old.place} is another run of {run.label} than {run.place}: choose "
                            "another --output or --label")
        added.append(run)
    return [*runs.values(), *added]


def identity(run: Run) -> tuple:
    return tuple(run.about.get(key) for key in ("run_id", "commit", "command"))


if __name__ == "__main__":
    run_script(main, Args)
