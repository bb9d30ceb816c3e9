"""The plots and the page of `tools.reward_report`."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from tools.reward_report.episodes import EXPERT, KINDS, Data
from tools.shared.plots import data_url, fill, plt

COLOURS = ("#1565c0", "#ef6c00", "#8a94a0")  # of KINDS

# ------------------------------------------------------------------------------- plots


def clean(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.title.set_fontsize(9)


def panels(count: int, width: float = 4.0, height: float = 3.0):
    """A figure with `count` panels, three in a row at most: (figure, axes)."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows),
                                squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def shortened(name: str, length: int = 44) -> str:
    """The beginning and the end: prompts often differ in their last words alone."""
    end = length // 3
    return name if len(name) <= length else f"{name[: length - end - 1]}…{name[-end:]}"


def plot_curves(rewards: dict[str, np.ndarray], data: Data, every: int):
    """Mean and standard deviation over the goals (Figure 17), per reward (Figure 11)."""
    figure, axes = panels(len(rewards))
    steps = every * np.arange(data.success.shape[-1])
    reached = data.first_success[:, EXPERT]
    for axis, (name, reward) in zip(axes, rewards.items(), strict=True):
        for kind, colour in enumerate(COLOURS):
            mean, std = reward[:, kind].mean(0), reward[:, kind].std(0)
            axis.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.18, lw=0,
                              zorder=1 - 0.1 * kind)  # the expert in front
            axis.plot(steps, mean, color=colour, lw=1.8, label=KINDS[kind], zorder=2 - 0.1 * kind)
        if (reached > 0).any():
            median = float(np.median(reached[reached > 0]))
            axis.axvline(median, color="#2e7d32", ls="--", lw=1, label="expert succeeds (median)")
        axis.set_title(shortened(name))
        axis.set_xlabel("step", fontsize=8)
        clean(axis)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center",
                  ncols=4, frameon=False)
    return figure


def plot_frames(rewards: dict[str, np.ndarray], data: Data, every: int):
    """One goal: the first reward along each of the three episodes, its frames beneath (Figures 1
    and 16)."""
    first = data.first_success[0, EXPERT]
    num_steps = every * (data.success.shape[-1] - 1)
    last = min(num_steps, round(1.3 * first / every) * every if first > 0 else num_steps)
    shown = np.linspace(0, last // every, 7).round().astype(int)
    figure = plt.figure(figsize=(10.5, 7.4), layout="constrained")
    grid = figure.add_gridspec(4, 7, height_ratios=(1.5, 1, 1, 1))
    axis = figure.add_subplot(grid[0, :])
    name, reward = next(iter(rewards.items()))
    for kind, colour in enumerate(COLOURS):
        curve = reward[0, kind, : shown[-1] + 1]
        axis.plot(every * np.arange(len(curve)), curve, color=colour, lw=1.8, label=KINDS[kind])
        axis.plot(every * shown, curve[shown], "o", color=colour, ms=4)
    if first > 0:
        axis.axvline(first, color="#2e7d32", ls="--", lw=1, label="expert succeeds")
    axis.set_title(f"{shortened(name, 80)}, one goal")
    axis.set_xlabel("step (dots: the pictures below)", fontsize=8)
    axis.legend(fontsize=8, frameon=False, ncols=4)
    clean(axis)
    for kind, colour in enumerate(COLOURS):
        for column, index in enumerate(shown):
            picture = figure.add_subplot(grid[1 + kind, column])
            picture.imshow(data.frames[kind, index])
            picture.set_xticks([])
            picture.set_yticks([])
            picture.spines[:].set_color("#2e7d32" if data.success[0, kind, index] else "#d5dae0")
            picture.spines[:].set_linewidth(2.5)
            if kind == 0:
                picture.set_title(f"step {every * index}", fontsize=8)
            if column == 0:
                picture.set_ylabel(KINDS[kind], fontsize=9, color=colour)
    return figure


def plot_histograms(rewards: dict[str, np.ndarray], data: Data):
    """Rewards of goal states against other states; dashed: the means (Figure 7)."""
    figure, axes = panels(len(rewards))
    for axis, (name, reward) in zip(axes, rewards.items(), strict=True):
        bins = np.linspace(reward.min(), reward.max(), 41)
        for mask, colour, label in ((~data.success, "#8a94a0", "other states"),
                                    (data.success, "#2e7d32", "goal states")):
            if mask.any():
                axis.hist(reward[mask], bins, density=True, color=colour, alpha=0.55, label=label)
                axis.axvline(reward[mask].mean(), color=colour, ls="--", lw=1.5)
        axis.set_title(shortened(name))
        axis.set_xlabel("reward", fontsize=8)
        axis.set_yticks([])
        clean(axis)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def plot_epic(alphas: np.ndarray, curves: dict[str, list[float]]):
    """EPIC distance by the strength of goal-baseline regularisation (Figure 4a)."""
    figure, (axis,) = panels(1, 6.0, 3.2)
    for name, curve in curves.items():
        axis.plot(alphas, curve, "o-", ms=4, label=shortened(name, 60))
    axis.axhline(math.sqrt(0.5), color="#8a94a0", ls="--", lw=1, label="uncorrelated (0.71)")
    axis.set_xlabel("alpha", fontsize=8)
    axis.set_ylabel("EPIC distance (lower is better)", fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    clean(axis)
    return figure


def plot_paths(ways: dict[str, dict[str, list[np.ndarray]]]):
    """End-effector paths from above, in metres (Figure 2)."""
    figure, axes = panels(len(ways), 4.2, 3.8)
    for axis, (name, kinds) in zip(axes, ways.items(), strict=True):
        for kind, colour in (("expert", "#8a94a0"), ("policy", "#1565c0")):
            for i, way in enumerate(kinds[kind]):
                axis.plot(way[:, 0], way[:, 1], color=colour, lw=1.6, alpha=0.85,
                          label=None if i else kind)
                axis.plot(*way[-1, :2], "X", color=colour, ms=8, mec="white",
                          label=None if i or kind == "expert" else "end")
        start = kinds["policy"][0][0]
        axis.plot(*start[:2], "o", color="#1f2933", ms=6, label="start")
        axis.set_title(shortened(name))
        axis.set_xlabel("x (m)", fontsize=8)
        axis.set_ylabel("y (m)", fontsize=8)
        axis.set_aspect("equal", adjustable="datalim")
        axis.legend(fontsize=8, frameon=False)
        clean(axis)
    return figure


# -------------------------------------------------------------------------------- page

COLUMNS = ("Spearman with progress", "AUC success", "AUC, sub-optimal", "fooled", "EPIC")


def cell(value: float, style: str = ".2f") -> str:
    return "–" if math.isnan(value) else format(value, style)


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """The table of the page and of the terminal, without its head."""
    rows = []
    for name, f in results["rewards"].items():
        low, high = f["auc_95"]
        interval = "" if math.isnan(low) else f" ({low:.2f} to {high:.2f})"
        error = "" if math.isnan(f["spearman_standard_error"]) else (
            f" ± {f['spearman_standard_error']:.2f}")
        rows.append([name, cell(f["spearman"]) + error, cell(f["auc"]) + interval,
                     cell(f["auc_suboptimal"]), cell(f["fooled"], ".0%"), cell(f["epic"])])
    return rows


def page(results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """One HTML page with everything in it: page.html, filled in.

    Args:
        results: what the report's JSON holds.
        pictures: PNG files by the names that the template has captions for.
    """
    return fill(Path(__file__).with_suffix(".html"), results=results, head=["reward", *COLUMNS],
                rows=table_rows(results),
                pictures={name: data_url(png) for name, png in pictures.items()})
