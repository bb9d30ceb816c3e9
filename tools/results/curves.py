"""The figures of `tools.results`: success over environment steps and over wall-clock."""

import itertools
import math
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator
from scipy.stats import bootstrap

from tools.results.runs import Run
from tools.results.summary import Results
from tools.shared.plots import data_url, plt

# The palette of Okabe and Ito, which colour-blind readers can tell apart. The methods get its
# colours from the last one on, which is FuRL in the paper's order. A ninth method begins again with
# the first colour, its line dashed.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c")
DASHES = ("-", "--", ":")


def curve(
    runs: list[Run], by_time: bool, of_returns: bool = False
) -> tuple[np.ndarray, np.ndarray] | None:
    """(x [n], success at the last step, or the return if that counts, [runs, n]) on a common axis;
    None where time is not known.

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
        scores = run.returns if of_returns else run.success_at_end
        padded = np.concatenate([np.full(width - 1, scores[0]), scores])
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


def shown_name(label: str) -> str:
    """`label` as a legend shows it: one that begins with `_` is left out by matplotlib."""
    return f" {label}" if label.startswith("_") else label


def plot_curves(results: Results, by_time: bool):
    """A panel for each task and one for the mean, all methods; None where no time is known.

    A band is the 95 % interval of the mean over seeds, by a bootstrap.
    """
    panels = [*results.rows, *results.return_tasks]
    data = {}  # (panel, method) -> its curve
    for name, method in itertools.product(panels, results.names):
        found = mean_curve(results, method, by_time) if name == "mean" else curve(
            results.groups.get((method, name), []), by_time, name in results.return_tasks)
        if found is not None:
            data[name, method] = found
    if not data:
        return None
    longest = max(x[-1] for x, _ in data.values())
    unit, scale = (("hours", 3600) if longest > 7200 else ("minutes", 60)) if by_time else (
        ("million", 1e6) if longest >= 1e6 else ("thousand", 1e3))
    columns = min((4, 3), key=lambda n: -len(panels) % n)  # with the fewest gaps
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    with plt.rc_context({"svg.hashsalt": "furl", "svg.fonttype": "path", "font.size": 8}):
        figure, axes = plt.subplots(
            rows, columns, sharey=not results.return_tasks, squeeze=False, layout="constrained",
            figsize=(max(2.1 * columns, 4.6), 1.75 * rows + 0.75))
        lines = {}  # method -> its curve in a panel
        for axis, name in zip(axes.flat, panels, strict=False):
            for number, method in enumerate(reversed(results.names)):
                if (name, method) not in data:
                    continue
                x, values = data[name, method]
                scale_y = 1 if name in results.return_tasks else 100
                colour = COLOURS[number % len(COLOURS)]
                [lines[method]] = axis.plot(
                    x / scale, scale_y * values.mean(0), color=colour, lw=1.3,
                    label=shown_name(results.names[method]), zorder=3 - number / 100,
                    marker="o", ms=3, markevery=[len(x) - 1], clip_on=False,  # its end
                    ls=DASHES[number // len(COLOURS) % len(DASHES)])
                if len(values) > 1:
                    band = bootstrap((values,), np.mean, axis=0, n_resamples=1_000,
                                     method="percentile", rng=np.random.default_rng(0),
                                     batch=100).confidence_interval
                    axis.fill_between(x / scale, scale_y * band.low, scale_y * band.high,
                                      color=colour, alpha=0.13, lw=0)
            axis.set_title("mean of the tasks" if name == "mean" else name.removesuffix("-v3"),
                           fontsize=8, fontweight="bold" if name == "mean" else "normal")
            if name not in results.return_tasks:
                axis.set_ylim(-3, 103)
            axis.set_xlim(0, longest / scale)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.grid(color="#e6e6e6", lw=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes.flat[len(panels):]:
            axis.axis("off")
        figure.supxlabel(f"wall-clock ({unit})" if by_time else f"environment steps ({unit}s)",
                         fontsize=8)
        measures = ["success at the last step (%)"] * bool(results.tasks)
        figure.supylabel(" or ".join(measures + ["return"] * bool(results.return_tasks)),
                         fontsize=8)
        handles = [lines[method] for method in results.names if method in lines]
        for ncols in range(min(len(handles), 2 * columns, 5), 0, -1):  # as many as fit
            legend = figure.legend(handles=handles, loc="outside upper center", ncols=ncols,
                                   frameon=False, fontsize=8)
            if legend.get_window_extent().width <= figure.bbox.width or ncols == 1:
                break
            legend.remove()
        return figure


def save_figure(figure, path: Path) -> str:
    """Write `path`.png and .svg, the same bytes each time; returns the PNG as a data URL."""
    with plt.rc_context({"svg.hashsalt": "furl"}):
        figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    return data_url(path.with_suffix(".png").read_bytes())
