"""The success rates that the paper reports, to stand beside ours.

Source: Fu et al., "FuRL: Visual-Language Models as Fuzzy Rewards for Reinforcement Learning", ICML
2024, arXiv 2406.00645, Tables 1 to 3: percent of evaluation episodes with success (in the authors'
code at the last step), mean (standard deviation) over five seeds, after 1,000,000 steps; v2 tasks,
LIV or CLIP. The rows are `common.envs.metaworld_tasks.MT10`.
"""

from dataclasses import dataclass

from common.flags import Goal
from tools.shared.names import folder_name


@dataclass(frozen=True)
class Column:
    """One method of a table: means and standard deviations by row, and of the ten together."""

    label: str
    means: tuple[float, ...]
    average: float
    stds: tuple[float | None, ...] = (None,) * 10  # Table 1 gives none
    average_std: float | None = None


@dataclass(frozen=True)
class PaperTable:
    name: str
    goal: Goal  # the scripts' --goal
    columns: dict[str, Column]  # by the method's name in grids


TABLES = (
    PaperTable("Table 1", "fixed", {
        "sac": Column("SAC", (0, 50, 100, 20, 0, 0, 0, 60, 60, 80), 37.0),
        "vlm-rm": Column("VLM-RMs", (0,) * 10, 0.0),
        "vlm-rm-gb": Column("VLM-RMs-GB", (0,) * 10, 0.0),
        "liv": Column("LIV", (0, 0, 100, 0, 0, 0, 0, 80, 60, 40), 28.0),
        "liv-proj": Column("LIV-Proj", (0, 0, 100, 0, 0, 0, 0, 80, 40, 20), 24.0),
        "relay": Column("Relay", (60, 80, 100, 40, 0, 0, 0, 100, 80, 80), 54.0),
        "furl-no-goal-image": Column(
            "FuRL w/o goal-image", (80, 100, 100, 80, 0, 0, 40, 100, 100, 100), 70.0),
        "furl": Column("FuRL", (100, 100, 100, 80, 0, 0, 80, 100, 100, 100), 76.0),
    }),
    PaperTable("Table 2", "random", {
        "sac-random": Column("SAC", (16, 78, 100, 40, 0, 0, 0, 100, 86, 78), 49.8,
                             (32.0, 39.2, 0, 49.0, 0, 0, 0, 0, 28.0, 39.2), 7.9),
        "relay-random": Column("Relay", (56, 80, 100, 50, 0, 0, 0, 100, 96, 92), 57.4,
                               (38.3, 30.3, 0, 42.0, 0, 0, 0, 0, 4.9, 7.5), 7.0),
        "furl-random": Column("FuRL", (64, 96, 100, 84, 0, 0, 6, 100, 100, 96), 64.6,
                              (32.6, 8.0, 0, 27.3, 0, 0, 8.0, 0, 0, 4.9), 5.0),
    }),
    PaperTable("Table 3", "fixed", {
        "clip": Column("CLIP", (0, 60, 100, 0, 0, 0, 0, 80, 60, 80), 38.0,
                       (0, 49, 0, 0, 0, 0, 0, 40, 49, 40), 9.8),
        "clip-furl": Column("CLIP-FuRL", (80, 100, 100, 80, 0, 0, 60, 100, 100, 80), 70.0,
                            (40, 0, 0, 40, 0, 0, 49, 0, 0, 40), 6.3),
    }),
)
ORDER = [method for table in TABLES for method in table.columns]  # in which methods are shown


def find_column(method: str, goal: str) -> tuple[str, Column] | None:
    """The table's name and the paper's column for a method with that `--goal`, if there is one.

    `method`: its name in a grid, or its label as the name of a folder.
    """
    for table in TABLES:
        for name, column in table.columns.items():
            if table.goal == goal and method in (name, folder_name(column.label)):
                return table.name, column
    return None
