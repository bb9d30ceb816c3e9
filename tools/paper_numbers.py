"""The success rates that the paper reports, to stand beside ours.

Source: Fu et al., "FuRL: Visual-Language Models as Fuzzy Rewards for Reinforcement Learning", ICML
2024, arXiv 2406.00645, Tables 1 to 3: percent of evaluation episodes with success at the last
step, mean (standard deviation) over five seeds, after 1,000,000 steps; v2 tasks, LIV or CLIP.
"""

from dataclasses import dataclass

from common.tasks import MT10  # the rows, in the order of Table 1


@dataclass(frozen=True)
class Column:
    """One method of a table: means and standard deviations by row, None where none are given."""

    means: tuple[float, ...]
    average: float
    stds: tuple[float, ...] | None = None
    average_std: float | None = None


@dataclass(frozen=True)
class PaperTable:
    name: str
    goal: str  # the scripts' --goal
    columns: dict[str, Column]


TABLES = (
    PaperTable("Table 1", "fixed", {
        "SAC": Column((0, 50, 100, 20, 0, 0, 0, 60, 60, 80), 37.0),
        "VLM-RMs": Column((0,) * 10, 0.0),
        "VLM-RMs-GB": Column((0,) * 10, 0.0),
        "LIV": Column((0, 0, 100, 0, 0, 0, 0, 80, 60, 40), 28.0),
        "LIV-Proj": Column((0, 0, 100, 0, 0, 0, 0, 80, 40, 20), 24.0),
        "Relay": Column((60, 80, 100, 40, 0, 0, 0, 100, 80, 80), 54.0),
        "FuRL w/o goal-image": Column((80, 100, 100, 80, 0, 0, 40, 100, 100, 100), 70.0),
        "FuRL": Column((100, 100, 100, 80, 0, 0, 80, 100, 100, 100), 76.0),
    }),
    PaperTable("Table 2", "random", {
        "SAC": Column((16, 78, 100, 40, 0, 0, 0, 100, 86, 78), 49.8,
                      (32.0, 39.2, 0, 49.0, 0, 0, 0, 0, 28.0, 39.2), 7.9),
        "Relay": Column((56, 80, 100, 50, 0, 0, 0, 100, 96, 92), 57.4,
                        (38.3, 30.3, 0, 42.0, 0, 0, 0, 0, 4.9, 7.5), 7.0),
        "FuRL": Column((64, 96, 100, 84, 0, 0, 6, 100, 100, 96), 64.6,
                       (32.6, 8.0, 0, 27.3, 0, 0, 8.0, 0, 0, 4.9), 5.0),
    }),
    PaperTable("Table 3", "fixed", {
        "CLIP": Column((0, 60, 100, 0, 0, 0, 0, 80, 60, 80), 38.0,
                       (0, 49, 0, 0, 0, 0, 0, 40, 49, 40), 9.8),
        "CLIP-FuRL": Column((80, 100, 100, 80, 0, 0, 60, 100, 100, 80), 70.0,
                            (40, 0, 0, 40, 0, 0, 49, 0, 0, 40), 6.3),
    }),
)
ORDER = ("SAC", "VLM-RMs", "VLM-RMs-GB", "LIV", "LIV-Proj", "CLIP", "Relay", "FuRL w/o goal-image",
         "CLIP-FuRL", "FuRL")  # in which methods are shown


def find_column(label: str, goal: str) -> tuple[str, Column] | None:
    """The table's name and the column of the method `label` with that `--goal`, if the paper has
    it."""
    for table in TABLES:
        if table.goal == goal and label in table.columns:
            return table.name, table.columns[label]
    return None


def paper_success(label: str, goal: str, task: str) -> float | None:
    """The paper's success rate there, 0 to 1."""
    found = find_column(label, goal)
    return found[1].means[MT10.index(task)] / 100 if found and task in MT10 else None
