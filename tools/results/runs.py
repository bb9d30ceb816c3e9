"""Finished runs for `tools.results`: read from where they are, checked, written as CSV and JSON."""

import dataclasses
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.envs.metaworld_tasks import ENV_IDS
from common.errors import UserError, first_line
from common.flags import MAY_CHANGE, flag_of
from common.names import file_name, without_precision
from common.run_folder import CONFIG, METRICS, read_config, read_metrics
from tools.grid.cells import planned_runs
from tools.shared.names import folder_name

HEADER = "seed,env_steps,success_once,success_at_end"
EVALUATION = ("eval/success_once", "eval/success_at_end")
RETURN = "eval/return"
SPEED = "time/steps_per_second"
# Flags that do not make a method: which task, which seed, and how the run is kept and watched.
NO_METHOD = MAY_CHANGE | {"env_id", "seed", "run_dir", "eval_episodes", "vlm_weights"}
ABOUT = ("run_id", "command", "commit", "script_sha256", "versions", "engine", "vlm_id",
         "continued")
HARDWARE = ("cpu_count", "num_cores", "jax_devices", "gl")


@dataclass(frozen=True)
class Run:
    """The success of one run, [n] of its evaluations.

    Raises:
        ValueError: a success is no share from 0 to 1, or a return is not finite.
    """

    method: str  # its folder's name
    label: str  # what readers see of the method
    script: str  # what makes the method: this, and the flags without `NO_METHOD`
    args: dict[str, Any]
    task: str
    seed: int
    budget: int  # environment steps
    env_steps: np.ndarray
    success_once: np.ndarray
    success_at_end: np.ndarray
    seconds: np.ndarray  # wall-clock until each, whole ones; NaN if the speed was not logged
    about: dict[str, Any]  # command, commit, versions, hardware
    place: str  # where it was read, for messages
    returns: np.ndarray | None = None  # None if they were not logged
    published: bool = False  # read from a results folder: it was finished when that was written

    def __post_init__(self) -> None:
        for name in ("success_once", "success_at_end"):
            shares = getattr(self, name)
            wrong = ~((shares >= 0) & (shares <= 1))  # NaN is wrong too
            if wrong.any():
                raise ValueError(f"{name} is {shares[wrong][0]:g} at step "
                                 f"{self.env_steps[wrong][0]}, not 0 to 1")
        if self.returns is not None and not np.isfinite(self.returns).all():
            raise ValueError("a return is not finite")

    @property
    def done(self) -> int:
        return int(self.env_steps[-1]) if len(self.env_steps) else 0

    def until(self, budget: int) -> "Run":
        """The same run as it was after `budget` steps."""
        kept = self.env_steps <= budget
        cut = {name: values[kept] for name, values in vars(self).items()
               if isinstance(values, np.ndarray)}
        return dataclasses.replace(self, budget=budget, **cut)


# ------------------------------------------------------------------------------ reading


def find_runs(source: str, label: str | None) -> tuple[list[Run], dict[str, Any]]:
    """The runs in `source`: a run folder, a grid's, a folder of run folders, one that
    `tools.results` has written, or W&B's wandb:<entity>/<project>; and what its grid.json or
    results.json says.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    if source.startswith("wandb:"):
        return read_wandb(source.removeprefix("wandb:"), label), {}
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give run folders, a grid's or a results folder")
    if (folder / CONFIG).exists():
        return [read_run(folder, label)], {}
    for name, read in (("grid.json", read_grid), ("results.json", read_results)):
        if (folder / name).exists():
            try:
                about = json.loads((folder / name).read_text())
                return read(folder, about), about
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{folder}, the folder of a {name}, cannot be read: {error!r}"
                                ) from None
    folders = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not folders:
        raise UserError(f"{folder}: not a run folder (it has no config.json), and neither a grid's "
                        "nor a results folder")
    return read_runs(folders, label), {}


def make_run(config: dict[str, Any], rows: Iterable[tuple[int, str, float]], label: str | None,
             place: str, method: str | None = None) -> Run:
    """A run from its config.json and rows (env_steps, key, value)."""
    points = defaultdict(dict)  # key -> {env_steps: value}
    for step, key, value in rows:
        points[key][step] = value
    once, at_end, returns = (points[key] for key in (*EVALUATION, RETURN))
    env_steps = np.array(sorted(once.keys() & at_end.keys()), int)
    args = config["args"]
    about = {key: config[key] for key in ABOUT if key in config}
    # Two runs of one command may lie in different folders.
    about["command"] = without_place(str(about.get("command")))
    about["hardware"] = {key: config[key] for key in HARDWARE if key in config}
    return Run(
        method=method or folder_name(label or ""), label=label or "",
        script=str(config.get("script")),
        args={key: value for key, value in args.items() if key not in NO_METHOD},
        task=args["env_id"], seed=args["seed"],
        budget=max(args["total_timesteps"], *map(int, env_steps[-1:]), 1), env_steps=env_steps,
        success_once=np.array([once[step] for step in env_steps]),
        success_at_end=np.array([at_end[step] for step in env_steps]),
        seconds=wall_clock(list(points[SPEED].items()), env_steps), about=about, place=place,
        returns=np.array([returns[step] for step in env_steps])
        if all(step in returns for step in env_steps) else None,
    )


def without_place(command: str) -> str:
    """A command without where its run went; one that went on from a run says so."""
    command = re.sub(r" --run-dir[ =]('[^']*'|\S)+", "", command)
    return re.sub(r" --resume[ =]('[^']*'|\S)+", " --resume RUN_DIR", command)


def wall_clock(speeds: list[tuple[int, float]], env_steps: np.ndarray) -> np.ndarray:
    """Seconds until each of `env_steps`, from the rows of `time/steps_per_second`: each is the
    speed since the row before. NaN where a speed is missing or impossible."""
    steps, rates = np.array(sorted(speeds)).reshape(-1, 2).T
    if not len(steps) or not (np.isfinite(rates) & (rates > 0)).all():
        return np.full(len(env_steps), np.nan)
    steps = np.concatenate([[0], steps])
    seconds = np.concatenate([[0], np.cumsum(np.diff(steps) / rates)])
    return np.round(np.interp(env_steps, steps, seconds))


def read_run(folder: Path, label: str | None = None, method: str | None = None) -> Run:
    """A run folder."""
    config = read_config(folder, str(folder))
    try:
        rows, unreadable = read_metrics(folder)
        if unreadable:
            note(f"{folder}: {unreadable} lines of its metrics.csv cannot be read and are left out")
        return make_run(config, rows, label, str(folder), method)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: its metrics.csv cannot be read ({error!r})") from None


def read_runs(folders: list[Path], label: str | None, method: str | None = None) -> list[Run]:
    """Those run folders that can be read; a line names each of the others."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder, label, method))
        except UserError as error:  # such as one that was killed as it began
            note(f"left out: {error}")
    return runs


def read_grid(folder: Path, grid: dict[str, Any]) -> list[Run]:
    """The runs of a grid that have begun; their names are those of their folders."""
    names = planned_runs(folder, grid)
    begun = [name for name in names if (folder / name / METRICS).exists()]
    if len(begun) < len(names):
        note(f"{folder}: {len(names) - len(begun)} of {len(names)} runs have not begun")
    runs = []
    for name in begun:
        method = name.split("/")[0]
        runs += read_runs([folder / name], grid["methods"][method]["label"], method)
    return runs


def read_results(folder: Path, _about: dict[str, Any]) -> list[Run]:
    """What `write_runs` has written."""
    runs = []
    for path in sorted(folder.glob("*/*.json")):
        data = json.loads(path.read_text())
        rows = np.loadtxt(path.with_suffix(".csv"), delimiter=",", skiprows=1, ndmin=2)
        shared = {key: data[key] for key in ("label", "script", "args", "task", "budget")}
        for about in data["runs"]:
            seed = about.pop("seed")
            _, steps, once, at_end, *returns = rows[rows[:, 0] == seed].T
            seconds = np.array(about.pop("seconds") or np.full(len(steps), np.nan), float)
            if not len(steps) == len(seconds):
                raise ValueError(f"{path.name} and its CSV differ for seed {seed}")
            runs.append(Run(method=path.parent.name, seed=seed, env_steps=steps.astype(int),
                            success_once=once, success_at_end=at_end, seconds=seconds, about=about,
                            place=f"{path} (seed {seed})", published=True,
                            returns=returns[0] if returns else None, **shared))
    return runs


def read_wandb(path: str, label: str | None) -> list[Run]:
    """The runs of a W&B project, `<entity>/<project>`, that these scripts have logged."""
    try:
        import wandb

        runs = []
        for run in wandb.Api().runs(path):
            args = {k: v for k, v in run.config.items() if k not in ("exp_name", "facts", "_wandb")}
            if "exp_name" not in run.config or "env_id" not in args:
                note(f"{run.name}: not one of these scripts' runs, left out")
                continue
            logged = [(row, key) for keys in (EVALUATION, (RETURN,), (SPEED,))
                      for row in run.scan_history(keys=["env_steps", *keys])
                      for key in keys if key in row]
            config = {**run.config.get("facts", {}), "run_id": run.id,
                      "script": run.config["exp_name"], "args": args}
            try:
                rows = [(int(row["env_steps"]), key, float(row[key])) for row, key in logged]
                runs.append(make_run(config, rows, label, f"wandb:{path}/{run.id}"))
            except (ValueError, KeyError, TypeError) as error:
                note(f"left out: {run.name} cannot be read ({error!r})")
        return runs
    except Exception as error:  # the network's, the login's and the server's have no common class
        raise UserError(f"wandb:{path}: W&B's runs cannot be read ({first_line(error)}); log in "
                        "with 'wandb login'") from None


# ----------------------------------------------------------------------------- checking


def name_methods(runs: list[Run]) -> list[Run]:
    """Runs without a label get their script's name and the flags in which its runs differ."""
    values = defaultdict(set)
    for run in runs:
        for key, value in run.args.items():
            values[run.script, key].add(repr(value))

    def named(run: Run) -> Run:
        label = " ".join([run.script, *(flag_text(key, value) for key, value in run.args.items()
                                        if len(values[run.script, key]) > 1)])
        return dataclasses.replace(run, label=label, method=folder_name(label))

    return [run if run.label else named(run) for run in runs]


def flag_text(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag_of(key if value else f"no_{key}")
    return f"{flag_of(key)} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def tasks_of_returns(runs: Iterable[Run]) -> set[str]:
    """The tasks whose environments know no success, where the return counts: others than
    Meta-World's, on which no run ever had one."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.task].append(run)
    return {task for task, group in groups.items() if task not in ENV_IDS and all(
        run.returns is not None and not run.success_once.any() for run in group)}


def finished_runs(runs: list[Run], budget: int | None) -> list[Run]:
    """The finished ones, as they were after `budget` environment steps if that is given; each of
    the others is named in a line."""
    finished = []
    for run in runs:
        needed = min(budget or run.budget, run.budget)
        if run.done < needed and not run.published:
            note(f"{run.place} is unfinished and left out: evaluated at {run.done:,} of "
                 f"{needed:,} steps")
        elif budget and not run.env_steps[0] <= budget <= run.budget:
            note(f"{run.place} is left out: it was evaluated at {run.env_steps[0]:,} to "
                 f"{run.budget:,} steps, --budget is {budget:,}")
        else:
            finished.append(run.until(budget) if budget else run)
            if budget and finished[-1].done < budget:
                note(f"{run.place} is taken as it was after {finished[-1].done:,} steps, its last "
                     f"evaluation within --budget {budget}")
    return finished


def check_runs(runs: list[Run]) -> None:
    """That finished runs fit into one table.

    Args:
        runs: with labels.

    Raises:
        UserError: there are none, their budgets differ, two are the same cell, or a method has two
            sets of flags or two VLMs.
    """
    if not runs:
        raise UserError("no finished run among those given; --budget STEPS takes each as it was "
                        "after so many, if it was evaluated by then")
    example = {run.budget: run.place for run in runs}
    if len(example) > 1:
        listed = ", ".join(f"{steps:,} ({example[steps]})" for steps in sorted(example))
        raise UserError(f"runs of different budgets cannot be in one table: {listed} steps; give "
                        f"them apart, or cut all with --budget {min(example)}")
    cells: dict[tuple, Run] = {}
    methods: dict[str, dict[str, tuple[Any, str]]] = defaultdict(dict)  # what -> (value, place)
    for run in runs:
        other = cells.setdefault((run.method, run.task, run.seed), run)
        if other is not run:
            raise UserError(f"{other.place} and {run.place} are both {run.label} on {run.task} "
                            f"with seed {run.seed}: give one, or each its --label")
        # Environments of Gymnasium have VLMs of their own, so that is compared task by task.
        vlm = without_precision(str(run.about.get("vlm_id")))
        made_by = {"script": run.script, f"the VLM on {run.task}": vlm}
        for key, value in sorted((made_by | {flag_of(k): v for k, v in run.args.items()}).items()):
            before, place = methods[run.method].setdefault(key, (value, run.place))
            if value != before:
                raise UserError(f"runs of {run.label} differ in {key}: {before} ({place}), {value} "
                                f"({run.place}); give each its --label")
    for method, found in methods.items():
        mine = [run for run in runs if run.method == method]
        for run in mine:
            lacking = found.keys() - {flag_of(key) for key in run.args}
            if flags := [flag for flag in sorted(lacking) if flag.startswith("--")]:
                note(f"not all runs of {run.label} have the flag {flags[0]}: {run.place} is older")
                break


# ------------------------------------------------------------------------------ writing


def write_runs(output: Path, runs: list[Run]) -> None:
    """`<method>/<task>.csv`, columns `HEADER`, and `return` where that counts, beside a .json of
    how each run was made."""
    groups, of_returns = defaultdict(list), tasks_of_returns(runs)
    for run in sorted(runs, key=lambda run: run.seed):
        groups[run.method, run.task].append(run)
    for (method, task), group in groups.items():
        (output / method).mkdir(parents=True, exist_ok=True)
        name, counts = file_name(task), task in of_returns
        table = np.concatenate([np.column_stack([
            np.full(len(run.env_steps), run.seed), run.env_steps, run.success_once,
            run.success_at_end, *[run.returns] * counts]) for run in group])
        np.savetxt(output / method / f"{name}.csv", table, ["%d", "%d", *["%.8g"] * (2 + counts)],
                   ",", header=HEADER + ",return" * counts, comments="")
        first = group[0]
        made = [{"seed": run.seed, **run.about, "seconds": [] if np.isnan(run.seconds).any() else
                 [int(second) for second in run.seconds]} for run in group]
        data = {"label": first.label, "script": first.script, "task": task, "budget": first.budget,
                "args": {key: value for run in group for key, value in run.args.items()},
                "runs": made}
        text = json.dumps(data, indent=1)
        text = re.sub(r"\[[\d,\s]+\]", lambda found: " ".join(found[0].split()), text)
        (output / method / f"{name}.json").write_text(text + "\n")


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
