"""Many runs as one command: a table of the paper, or any scripts on any tasks with several seeds.

    python -m tools.grid table1 --seeds 5
    python -m tools.grid table1 figure8 --preset laptop --methods furl sac --env-ids reach-v3
    python -m tools.grid --scripts furl_sac_state.py my_idea.py --seeds 3 -- --utd 0.5
    python -m tools.grid table2 --engine slurm --partition gpu --gpus-per-run 0.25 --time-limit 480

Flags after `--` go to every script. The same command again goes on where the grid was stopped:
finished runs are skipped, the others resume. docs/grid.md has the rest.
"""

import ast
import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

from common import flags
from common.cores import OVERRIDE
from common.envs.metaworld_tasks import ENV_IDS, MT10
from common.errors import UserError
from common.logger import format_duration, show
from common.run_folder import Progress, is_finished, is_in_use, read_progress, saved_steps
from tools import ROOT
from tools.grid.cells import Cell, Deaths, Outcome, planned_runs
from tools.grid.engines import RayEngine, SlurmEngine, share_of
from tools.grid.paper_tables import METHODS, PRESETS, TABLES, Method
from tools.shared.folders import writable_folder, written_whole
from tools.shared.names import LONGEST, distinct_name, folder_name

OURS = {"env_id", "seed", "run_dir", "resume"}  # flags that the grid gives


@dataclass(frozen=True)
class Args:
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # the paper's: table1, figure8 ...
    scripts: tuple[str, ...] = ()  # instead: scripts, or quoted "script --flag value" to compare
    # --- which runs
    env_ids: tuple[str, ...] = ()  # tasks, or mt10; default: the table's, or mt10
    methods: tuple[str, ...] = ()  # only these of the table, as its folders are called
    seeds: flags.PositiveInt = 5  # 0 to this number minus one
    preset: Literal["paper", "laptop", "plus", "none"] | None = None  # the table's, or none
    output: Path | None = None  # default: runs/grids/<names>
    dry_run: bool = False  # print the commands, start nothing
    # --- what a run gets
    cores_per_run: flags.PositiveInt | None = None  # default: 1; beside a GPU its share of them
    gpus_per_run: float | None = None  # a fraction shares a GPU; default: 0.25 where there is one
    memory_per_run: flags.PositiveFloat | None = None  # GiB; as many run as fit; default: preset's
    retries: flags.NotNegativeInt = 3  # of a run, worker or node that died, since its last progress
    # --- where
    engine: Literal["ray", "slurm"] = "ray"  # ray: this machine, or the cluster at --address
    address: str | None = None  # <host>:<port> of a running Ray cluster
    partition: str | None = None  # of SLURM
    runs_per_job: flags.PositiveInt | None = None  # SLURM; default: as many as share a GPU
    time_limit: int = 240  # SLURM, minutes; a job that meets it saves, is queued again and resumes
    signal_delay: int = 120  # SLURM, seconds before the time limit in which runs save
    sbatch: tuple[str, ...] = ()  # more for SLURM, such as account=me qos=low
    detach: bool = False  # SLURM: submit the jobs and end; the same command finds them again


# ----------------------------------------------------------------------------- the runs


def flag_groups(words: list[str]) -> dict[str, list[str]]:
    """`--rho 0.1 --no-align` as {field of Args: words}."""
    groups: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        if word.startswith("--"):
            current = groups[word[2:].split("=")[0].replace("-", "_")] = []
        elif not groups:
            raise UserError(f"{word!r} is no flag; the scripts' flags stand after --")
        current.append(word)
    return groups


def refuse_ours(groups: dict[str, list[str]]) -> None:
    """UserError if a flag that the grid gives itself is among the user's."""
    if taken := OURS & groups.keys():
        raise UserError(f"{flags.flag_of(min(taken))} is the grid's own: use --env-ids, --seeds "
                        "and --output")


def fields_of(script: Path) -> set[str]:
    """The names of a script's flags, and those of their negations, read without running it.

    Raises:
        UserError: there is no such script, or it has no Args.
    """
    try:
        body = ast.parse(script.read_text()).body
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{script} cannot be read: {error}") from None
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            names = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
            if node.bases and ast.unparse(node.bases[0]).split(".")[-1] != "RunArgs":
                raise UserError(f"{script}: its Args must be a subclass of flags.RunArgs itself, "
                                "so that all its flags are found")
            if node.bases:
                names += [field.name for field in dataclasses.fields(flags.RunArgs)]
            return {*names, *(f"no_{name}" for name in names)}
    raise UserError(f"{script} has no class Args: it is not a script like furl_sac_state.py")


def chosen_methods(args: Args) -> dict[str, tuple[Method, tuple[str, ...]]]:
    """Folder name -> (method, its tasks)."""
    found: dict[str, tuple[Method, tuple[str, ...]]] = {}
    owners: dict[str, str] = {}  # of folders' names, by --scripts
    for name in args.names:
        if name not in TABLES:
            raise UserError(f"unknown table {name!r}; there are {', '.join(TABLES)}")
        for method in TABLES[name].methods:
            before = found[method][1] if method in found else ()
            tasks = tuple(dict.fromkeys((*before, *TABLES[name].tasks)))
            found[method] = METHODS[method], tasks
    for words in args.scripts:
        try:
            script, *own = shlex.split(words)
        except ValueError:  # empty, or a quotation that is not closed
            raise UserError(f"--scripts {words!r} is no script with flags") from None
        name = "_".join([Path(script).stem, *(word.strip("-") for word in own)])
        name = distinct_name(folder_name(name.replace("/", "-")), words, owners)
        if name in found:
            raise UserError(f"two of --scripts are the same: {words}")
        found[name] = Method(name, script, shlex.join(own)), MT10
    if unknown := set(args.methods) - set(found):
        raise UserError(f"unknown method {min(unknown)!r}; there are {', '.join(found)}")
    if args.env_ids:
        from common.envs.registry import suite_for  # late: it takes seconds

        tasks = [id for name in args.env_ids for id in (MT10 if name == "mt10" else (name,))]
        tasks = tuple(dict.fromkeys(suite_for(id).resolve_env_id(id) for id in tasks))
        found = {name: (method, tasks) for name, (method, _) in found.items()}
    return {name: both for name, both in found.items() if not args.methods or name in args.methods}


def plan(args: Args, extra: list[str]) -> tuple[Path, dict[str, Any], list[Cell]]:
    """What is to be run; nothing is written.

    Args:
        extra: flags for every script.

    Returns:
        (the grid's folder, the content of its grid.json, its cells in the order to start them:
        all methods with the first seed, then the next).
    """
    flags.check_ranges(args)
    if bool(args.names) == bool(args.scripts):
        raise UserError(f"name a table or figure ({', '.join(TABLES)}), or give --scripts")
    chosen = chosen_methods(args)
    presets = {args.preset} if args.preset else {TABLES[name].preset for name in args.names}
    if len(presets) > 1:
        raise UserError(f"these tables have the presets {' and '.join(sorted(presets))}: choose "
                        "one by --preset, or name them one after another")
    preset_name = presets.pop() if presets else "none"
    preset, users = PRESETS[preset_name], flag_groups(extra)
    refuse_ours(users)
    methods, commands, unknown = {}, {}, set(users)
    for name, (method, _) in chosen.items():
        script = Path(method.script)
        if args.names or not script.exists():
            script = ROOT / script
        fields = fields_of(script)
        vlm = preset.vlms.get(method.vlm or "", "") if "vlm" in fields else ""
        of_all = [flag_groups(shlex.split(preset.flags)), users]
        before, after = ({k: v for k, v in groups.items() if k in fields} for groups in of_all)
        own = flag_groups(shlex.split(method.flags))
        refuse_ours(own)
        of_vlm = flag_groups(shlex.split(vlm))
        groups = before | own | {k: v for k, v in of_vlm.items() if k not in own} | after
        unknown -= fields
        words = [word for group in groups.values() for word in group]
        script = script.resolve()
        commands[name] = script, words
        place = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
        methods[name] = {"script": str(place), "flags": shlex.join(words), "label": method.label}
    if unknown:
        raise UserError(f"no script of this grid has the flag {flags.flag_of(min(unknown))}")
    budgets = {re.search(r"--total[-_]timesteps[ =]([\d_]+)|$", method["flags"])[1]
               for method in methods.values()}
    budget = budgets.pop() if len(budgets) == 1 else None
    grid_name = "+".join(args.names or chosen)
    grid = {
        "name": grid_name if len(grid_name) <= LONGEST else folder_name(grid_name),
        "preset": preset_name,
        "methods": methods,
        "total_timesteps": int(budget) if budget else None,
    }
    output = args.output or Path("runs/grids") / grid["name"]
    cells = [
        Cell(f"{name}/{task}/{seed}", str(script),
             ("--env-id", task, "--seed", str(seed), *words),
             output.resolve() / name / task / str(seed))
        for seed in range(args.seeds)
        for task in dict.fromkeys(task for _, tasks in chosen.values() for task in tasks)
        for name, (script, words) in commands.items() if task in chosen[name][1]
    ]
    return output, grid | {"runs": [cell.name for cell in cells]}, cells


def write_grid(output: Path, grid: dict[str, Any]) -> None:
    """Write grid.json, joined with what an earlier command began there.

    Raises:
        UserError: the folder has other runs under the same names, or cannot be written.
    """
    writable_folder(output)
    path = output / "grid.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
            before["runs"] = planned_runs(output, before)
            before = {key: before[key] for key in grid}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error!r}): choose another --output"
                            ) from None
        for key in ("preset", "total_timesteps"):
            if before[key] != grid[key]:
                raise UserError(f"{output} holds a grid whose {key} is {before[key]}, not "
                                f"{grid[key]}: choose another --output")
        for name in before["methods"].keys() & grid["methods"].keys():
            if before["methods"][name] != grid["methods"][name]:
                script, flags = (before["methods"][name][key] for key in ("script", "flags"))
                raise UserError(f"{output} holds other runs of {name} ({script} {flags}): choose "
                                "another --output")
        grid = grid | {"name": before["name"], "methods": before["methods"] | grid["methods"],
                       "runs": list(dict.fromkeys([*before["runs"], *grid["runs"]]))}
    with written_whole(output, keep=True) as new:
        (new / "grid.json").write_text(json.dumps(grid, indent=1) + "\n")


# ---------------------------------------------------------------------------- progress


def last_evaluation(task: str, run: Progress) -> str:
    """A run's success, or its return where the environment may know no success."""
    if run.success or (task in ENV_IDS and run.success is not None):
        return f"success {run.success:.0%}"
    return "-" if run.mean_return is None else f"return {run.mean_return:.4g}"


class Screen:
    """What is running: lines that are refreshed in place on a terminal, else printed each minute.
    """

    def __init__(self, cells: list[Cell], out: TextIO):
        from rich.console import Console  # rich is there where Ray is
        from rich.live import Live

        self.cells, self.outcomes = cells, {}
        # On a terminal rich breaks long lines itself, to know how many it refreshes.
        self.console = Console(file=out, markup=False, highlight=False,
                               soft_wrap=not out.isatty())
        self.live = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, redirect_stdout=False,
                             redirect_stderr=False)
            self.live.start()
        self.next = 0.0

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        self.outcomes[cell.name] = outcome
        text = f": {outcome.text}" if outcome.text else ""
        self.console.print(f"{outcome.state:9} {cell.name}{text}")

    def update(self) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + (2 if self.live else 60)
        running = [cell for cell in self.cells
                   if cell.name not in self.outcomes and is_in_use(cell.folder)]
        waiting = len(self.cells) - len(self.outcomes) - len(running)
        lines = [", ".join(filter(None, [counted(self.outcomes), f"{len(running)} running",
                                         f"{waiting} waiting or starting"]))]
        for cell in running:
            run = read_progress(cell.folder)
            speed = "" if run.speed is None else f", {run.speed:.0f} steps/s"
            left = "" if run.seconds_left is None else f", {format_duration(run.seconds_left)} left"
            lines.append(f"running   {cell.name}: {run.steps:,}/{run.total or 0:,} steps{speed}, "
                         f"last evaluation: {last_evaluation(cell.task, run)}{left}")
        text = "\n".join(lines)
        if self.live:
            self.live.update(text, refresh=True)
        else:
            self.console.print(text)

    def close(self) -> None:
        if self.live:
            self.live.stop()


def counted(outcomes: dict[str, Outcome]) -> str:
    """How many cells ended how: "1 failed, 3 finished"."""
    counts = Counter(outcome.state for outcome in outcomes.values())
    return ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))


# -------------------------------------------------------------------------------- main


@contextlib.contextmanager
def notes_to(path: Path) -> Iterator[None]:
    """Keep the engine's own notes, of a worker that died for example, out of the table: what is
    printed, and what its libraries write to file descriptor 2, goes to `path`."""
    stderr = os.dup(2)
    try:
        with open(path, "a") as log, contextlib.redirect_stdout(log):
            os.dup2(log.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def run_grid(
    engine: RayEngine | SlurmEngine, cells: list[Cell], retries: int, out: TextIO
) -> dict[str, Outcome]:
    """Run the cells until each has ended; the first Ctrl-C lets them save, the second ends.

    A cell whose worker, machine or job died is submitted again, up to `retries` times without any
    progress.
    """
    stops: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        stops.append(number)
        if len(stops) > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt

    for number in engine.stopped_by:  # after the engine's start: Ray sets its own
        signal.signal(number, stop)
    screen, told, deaths = Screen(cells, out), False, defaultdict(Deaths)
    try:
        while len(screen.outcomes) < len(cells):
            if stops and not told:
                told = True
                screen.console.print("stopping: running cells are saved first")
                engine.stop()
            again = []
            for cell, outcome in engine.poll():
                if is_finished(cell.folder):  # maybe before the others of its job
                    outcome = Outcome("finished")
                died = outcome.state == "died" and not told
                if died and deaths[cell.name].add(saved_steps(cell.folder)) <= retries:
                    again.append(cell)
                else:
                    screen.ended(cell, outcome)
            if again:
                engine.submit(again)
            screen.update()
            time.sleep(0.5)
    finally:
        screen.close()
    return screen.outcomes


def main(args: Args, extra: list[str]) -> int:
    """Run the grid; the exit status: 0 all finished, 1 some failed, 2 some were refused, 130."""
    if args.detach and args.engine != "slurm":
        raise UserError("--detach is for --engine slurm: Ray's runs end with this command")
    output, grid, cells = plan(args, extra)
    if args.memory_per_run is None:
        args = dataclasses.replace(args, memory_per_run=PRESETS[grid["preset"]].memory)
    if args.dry_run:
        cores = share_of(args).cores
        for cell in cells:
            words = [os.path.relpath(word) if os.path.isabs(word) else word
                     for word in cell.command()]
            done = "# finished: " if is_finished(cell.folder) else ""
            show(f"{done}{OVERRIDE}={cores} python {shlex.join(words)}")
        return 0
    todo = [cell for cell in cells if not is_finished(cell.folder)]
    write_grid(output, grid)
    print(f"{output}: {len(cells)} runs, {len(cells) - len(todo)} finished before")
    if not todo:
        return 0
    out = sys.stdout
    with notes_to(output / "engine.log"):
        try:
            engine = RayEngine(args) if args.engine == "ray" else SlurmEngine(args, output)
        except ImportError as error:
            raise UserError(f"--engine {args.engine} needs {error.name}: pip install -r "
                            "requirements-grid.txt (or: make grid)") from None
        print(f"{engine.where}; a run gets {engine.share.cores} cores, {engine.share.gpus:g} GPUs, "
              f"{args.memory_per_run:g} GiB", file=out, flush=True)
        engine.submit(todo)
        if args.detach:
            print("submitted; the same command without --detach shows how far they are", file=out)
            return 0
        outcomes = run_grid(engine, todo, args.retries, out)
    print(counted(outcomes))
    states = {outcome.state for outcome in outcomes.values()}
    statuses = {"stopped": 130, "refused": 2, "failed": 1, "died": 1}
    return next((status for state, status in statuses.items() if state in states), 0)


if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    try:
        status = main(flags.parse(Args, words[:cut]), words[cut + 1 :])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
