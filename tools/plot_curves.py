"""Keep the success curves of runs with what a reader needs to repeat them, and plot all of them.

    python -m tools.plot_curves runs/a runs/b --output docs/curves

Writes, per run, <name of its folder>.csv (evaluations, training success, speed) and .json (command,
commit, versions, wall-clock), and curves.png over all that are in the output folder.
"""

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

from common.errors import UserError

matplotlib.use("Agg")
KEPT = ("eval/success_once", "eval/success_at_end", "eval/return", "charts/success_once",
        "charts/relaying", "charts/num_positives", "time/steps_per_second")
FACTS = ("script", "command", "commit", "versions", "cpu_count", "engine", "vlm_id", "prompt")
STYLES = {"charts/success_once": "C7-", "eval/success_once": "C0o-", "eval/success_at_end": "C1x--"}
COLUMNS = 4

Rows = list[tuple[int, str, float]]  # env_steps, key, value


@dataclass(frozen=True)
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # run folders; none: plot again
    output: Path = Path("docs/curves")  # folder to write to


def read_rows(path: Path) -> Rows:
    """The rows of a metrics.csv that are kept."""
    with open(path, newline="") as file:
        return [(int(row["env_steps"]), row["key"], float(row["value"]))
                for row in csv.DictReader(file) if row["key"] in KEPT]


def wall_clock(rows: Rows) -> float:
    """Seconds of training, from the speeds between rows."""
    seconds, last = 0.0, 0
    for env_steps, key, value in rows:
        if key == "time/steps_per_second":
            seconds += (env_steps - last) / value
            last = env_steps
    return seconds


def keep_run(run_dir: Path, output: Path) -> None:
    """Write a run's CSV and its facts."""
    try:
        config = json.loads((run_dir / "config.json").read_text())
        rows = read_rows(run_dir / "metrics.csv")
        facts = {key: config["args"][key] for key in ("env_id", "seed")} | {
            key: config[key] for key in FACTS if key in config
        }
        # Where a run went is no part of what it was.
        facts["command"] = re.sub(r" --run-dir[ =]\S+", "", facts["command"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run_dir} is not a run folder: {error}") from None
    name = run_dir.resolve().name
    with open(output / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("env_steps", "key", "value"))
        writer.writerows((step, key, f"{value:.6g}") for step, key, value in rows)
    facts["wall_clock_seconds"] = round(wall_clock(rows))
    (output / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


def main(args: Args) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    args.output.mkdir(parents=True, exist_ok=True)
    for run_dir in args.runs:
        keep_run(run_dir, args.output)
    files = [f for f in sorted(args.output.glob("*.csv")) if f.with_suffix(".json").exists()]
    if not files:
        raise UserError(f"{args.output} holds no curves: give run folders")
    columns = min(COLUMNS, len(files))
    shape = math.ceil(len(files) / columns), columns
    figure, axes = plt.subplots(*shape, figsize=(3.2 * columns, 2.6 * shape[0]), squeeze=False)
    for axis in axes.flat[len(files):]:
        axis.axis("off")
    for axis, file in zip(axes.flat, files, strict=False):
        rows = read_rows(file)
        for key, style in STYLES.items():
            points = [(step, value) for step, k, value in rows if k == key]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=key, markersize=4)
        axis.set_title(file.stem, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        axis.set_ylim(-0.05, 1.05)
    axes[0][0].legend(fontsize=6)
    figure.supxlabel("environment steps", fontsize=9)
    figure.tight_layout()
    figure.savefig(args.output / "curves.png", dpi=110)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
