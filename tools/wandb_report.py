"""A Weights & Biases report that compares methods: curves with seeds grouped, the table, run sets.

    python -m tools.wandb_report --project furl --entity us           # from the project's own runs
    python -m tools.wandb_report --project furl --results results/laptop   # its table and methods
    python -m tools.wandb_report --project furl --results results/laptop --dry-run spec.json

Needs a login, except with --results and --dry-run together.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import run_script
from common.errors import UserError, first_line
from common.flags import PositiveInt, check_ranges
from tools.results.page import make_tables
from tools.results.runs import check_runs, find_runs, finished_runs, name_methods
from tools.results.summary import Results

CURVES_OF_RETURNS = ("eval/return", "charts/return")
CURVES = ("eval/success_at_end", "eval/success_once", "charts/success_once")


@dataclass(frozen=True)
class Args:
    project: str = "furl"  # the W&B project whose runs are shown, and that gets the report
    entity: str | None = None  # user or team it belongs to; default: your own
    results: Path | None = None  # a folder of tools.results; default: the finished runs in W&B
    budget: PositiveInt | None = None  # take each run as it was after so many environment steps
    title: str | None = None  # default: <project>: methods compared
    dry_run: Path | None = None  # write the report's specification to this file, send nothing


def make_report(args: Args, entity: str, results: Results) -> Any:
    """The report, not saved yet: a panel for each task and curve, a run set for each method."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    tables = make_tables(results, results.records(), results.improvements())
    blocks = [wr.TableOfContents(), *(wr.MarkdownBlock(text=t.markdown()) for t in tables)]
    for task in [*results.tasks, *results.return_tasks]:
        # A run set that names no project shows the runs of the report's own.
        run_sets = [wr.Runset(
            name=name, groupby=["config.exp_name"],
            filters=[expr.Metric("ID").isin(run_ids(results, method, task))],
        ) for method, name in results.names.items()]
        of_returns = task in results.return_tasks
        panels = [wr.LinePlot(
            title=key, x="env_steps", y=[key], groupby_aggfunc="mean", groupby_rangefunc="stderr",
            range_y=(None, None) if of_returns else (0, 1),
        ) for key in (CURVES_OF_RETURNS if of_returns else CURVES)]
        blocks += [wr.H2(text=task), wr.PanelGrid(runsets=run_sets, panels=panels)]
    return wr.Report(project=args.project, entity=entity, blocks=blocks, width="fluid",
                     title=args.title or f"{args.project}: methods compared")


def run_ids(results: Results, method: str, task: str) -> list[str]:
    """W&B's ids of the runs in a cell of the table."""
    ids = [run.about.get("run_id") for run in results.runs
           if run.method == method and run.task == task]
    return [run_id for run_id in ids if run_id]


def main(args: Args) -> None:
    check_ranges(args)
    source = args.results or "wandb:" + "/".join(filter(None, [args.entity, args.project]))
    runs, _ = find_runs(str(source), None)
    runs = finished_runs(name_methods(runs), args.budget)
    check_runs(runs)
    results = Results(runs)
    if args.dry_run:
        report = make_report(args, args.entity or "entity", results)
        spec = report._to_model().spec
        text = spec.model_dump_json(by_alias=True, exclude_none=True, indent=1)
        try:
            args.dry_run.write_text(text)
        except OSError as error:
            raise UserError(f"--dry-run {args.dry_run} cannot be written: {error}") from None
        print(f"written: {args.dry_run}; nothing was sent")
        return
    import wandb

    try:
        report = make_report(args, args.entity or wandb.Api().default_entity, results)
        report.save()
    except Exception as error:  # the network's, the login's and the server's have no common class
        raise UserError(f"W&B did not take the report ({first_line(error)}); log in with 'wandb "
                        "login', or see it with --dry-run") from None
    print(report.url)


if __name__ == "__main__":
    run_script(main, Args)
