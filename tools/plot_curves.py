"""Plot the success curves of runs, and keep what a reader needs to repeat them.

    python -m tools.plot_curves runs/a runs/b --output docs/curves

Writes, per run, <env>-<seed>.csv (evaluations, training success, speed) and .json (command,
arguments that are not defaults, commit, versions, wall-clock), and curves.png over all of them.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

from common.errors import UserError

matplotlib.use("Agg")
KEPT = ("eval/success_once", "eval/success_at_end", "eval/return", "charts/success_once",
        "charts/relaying", "charts/num_positives", "time/steps_per_second")


@dataclass(frozen=True)
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders
    output: Path = Path("docs/curves")  # folder to write to


def read_run(run_dir: Path) -> tuple[dict, list[tuple[int, str, float]]]:
    """The run's config.json and the rows of its metrics.csv that are kept."""
    try:
        config = json.loads((run_dir / "config.json").read_text())
        with open(run_dir / "metrics.csv", newline="") as file:
            rows = [(int(row["env_steps"]), row["key"], float(row["value"]))
                    for row in csv.DictReader(file) if row["key"] in KEPT]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run_dir} is not a run folder: {error}") from None
    return config, rows


def wall_clock(rows: list[tuple[int, str, float]]) -> float:
    """Seconds of training, from the speeds between rows."""
    seconds, last = 0.0, 0
    for env_steps, key, value in rows:
        if key == "time/steps_per_second":
            seconds += (env_steps - last) / value
            last = env_steps
    return seconds


def main(args: Args) -> None:
    import matplotlib.pyplot as plt

    args.output.mkdir(parents=True, exist_ok=True)
    runs = [read_run(run_dir) for run_dir in args.runs]
    figure, axes = plt.subplots(1, len(runs), figsize=(3.4 * len(runs), 2.8), squeeze=False)
    for axis, (config, rows) in zip(axes[0], runs, strict=True):
        name = f"{config['args']['env_id'].removesuffix('-v3')}-{config['args']['seed']}"
        with open(args.output / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("env_steps", "key", "value"))
            writer.writerows((step, key, f"{value:.6g}") for step, key, value in rows)
        facts = {key: config[key] for key in
                 ("command", "commit", "versions", "cpu_count", "vlm_id", "prompt")}
        facts["wall_clock_seconds"] = round(wall_clock(rows))
        (args.output / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
        for key, style in (("charts/success_once", "C7-"), ("eval/success_once", "C0o-"),
                           ("eval/success_at_end", "C1x--")):
            points = [(step, value) for step, k, value in rows if k == key]
            axis.plot(*zip(*points, strict=True), style, label=key, markersize=4)
        axis.set_title(name)
        axis.set_xlabel("environment steps")
        axis.set_ylim(-0.05, 1.05)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.output / "curves.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
