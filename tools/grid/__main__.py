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
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

from common.cores import OVERRIDE
from common.envs.metaworld_tasks import ENV_IDS, MT10, resolve_env_id
from common.errors import UserError
from common.flags import RunArgs, parse
from common.logger import format_duration
from common.names import LONGEST, distinct_name, marked
from common.run_folder import Progress, is_finished, is_in_use, read_progress
from tools import ROOT
from tools.grid.cells import Cell, Outcome
from tools.grid.engines import RayEngine, SlurmEngine, share_of
from tools.grid.paper_tables import METHODS, PRESETS, TABLES, Method

MOST_SEEDS = 100_000  # --seeds says how many there are, and is no seed itself
OURS = {"env_id", "seed", "run_dir", "resume"}  # flags that the grid gives


@dataclass(frozen=True)
class Args:
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # the paper's: table1, figure8 ...
    scripts: tuple[str, ...] = ()  # instead: scripts, or quoted "script --flag value" to compare
    # --- which runs
    env_ids: tuple[str, ...] = ()  # tasks, or mt10; default: the table's, or mt10
    methods: tuple[str, ...] = ()  # only these of the table, as its folders are called
    seeds: int = 5  # 0 to this number minus one
    preset: Literal["paper", "laptop", "plus", "none"] | None = None  # the table's, or none
    output: Path | None = None  # default: runs/grids/<names>
    dry_run: bool = False  # print the commands, start nothing
    # --- what a run gets
    cores_per_run: int | None = None  # default: 1; beside a GPU its share of the cores
    gpus_per_run: float | None = None  # a fraction shares a GPU; default: 0.25 where there is one
    memory_per_run: float | None = None  # GiB; as many run at once as fit; default: the preset's
    retries: int = 3  # of a run, worker or node that died, since its last progress
    # --- where
    engine: Literal["ray", "slurm"] = "ray"  # ray: this machine, or the cluster at --address
    address: str | None = None  # <host>:<port> of a running Ray cluster
    partition: str | None = None  # of SLURM
    runs_per_job: int | None = None  # SLURM; default: as many as share a GPU
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


def fields_of(script: Path) -> set[str]:
    """The names of a script's flags, read without running it.

    Raises:
        UserError: there is no such script, or it has no Args.
    """
    try:
        body = ast.parse(script.read_text()).body
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{script} cannot be read: {error}") from None
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            shared = {field.name for field in dataclasses.fields(RunArgs)} if node.bases else set()
            return shared | {item.target.id for item in node.body if isinstance(
                item, ast.AnnAssign) and isinstance(item.target, ast.Name)}
    raise UserError(f"{script} has no class Args: it is not a script like furl_sac_state.py")


def full_env_id(name: str) -> str:
    """The id of an environment of any suite.

    Raises:
        UserError: no suite knows it.
    """
    with contextlib.suppress(UserError):
        return resolve_env_id(name)
    from common.envs.registry import suite_for  # late: it takes seconds, and Meta-World needs none

    return suite_for(name).resolve_env_id(name)


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
            script, *flags = shlex.split(words)
        except ValueError:  # empty, or a quotation that is not closed
            raise UserError(f"--scripts {words!r} is no script with flags") from None
        name = "_".join([Path(script).stem, *(word.strip("-") for word in flags)])
        name = name.replace("/", "-")
        if len(name.encode()) > LONGEST:  # a flag may hold a long prompt
            name = marked(name.encode()[: LONGEST // 2].decode(errors="ignore"), words)
        if owners.get(name) == words:
            raise UserError(f"two of --scripts are the same: {words}")
        name = distinct_name(name, words, owners)
        found[name] = Method(name, script, shlex.join(flags)), MT10
    if unknown := set(args.methods) - set(found):
        raise UserError(f"unknown method {min(unknown)!r}; there are {', '.join(found)}")
    if args.env_ids:
        tasks = [id for name in args.env_ids for id in (MT10 if name == "mt10" else (name,))]
        tasks = tuple(dict.fromkeys(map(full_env_id, tasks)))
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
    if bool(args.names) == bool(args.scripts):
        raise UserError(f"name a table or figure ({', '.join(TABLES)}), or give --scripts")
    if not 1 <= args.seeds <= MOST_SEEDS or args.retries < 0:
        raise UserError(f"--seeds must be 1 to {MOST_SEEDS}, and --retries not negative; they are "
                        f"{args.seeds} and {args.retries}")
    presets = {TABLES[name].preset for name in args.names if name in TABLES} or {"none"}
    if not args.preset and len(presets) > 1:
        raise UserError(f"these tables have the presets {' and '.join(sorted(presets))}: choose "
                        "one by --preset, or name them one after another")
    preset_name = args.preset or presets.pop()
    preset, users = PRESETS[preset_name], flag_groups(extra)
    if taken := OURS & set(users):
        raise UserError(f"--{min(taken).replace('_', '-')} is the grid's own: use --env-ids, "
                        "--seeds and --output")
    methods, merged, has, notes = {}, {}, set(), {}
    for name, (method, tasks) in chosen_methods(args).items():
        script = Path(method.script)
        if args.names or not script.exists():
            script = ROOT / script
        fields = fields_of(script)

        def known(flag: str, fields: set[str] = fields) -> bool:
            return flag in fields or flag.removeprefix("no_") in fields

        vlm = preset.vlms.get(method.vlm or "", "") if args.names else ""
        merged[name] = {
            **{k: v for k, v in flag_groups(shlex.split(preset.flags)).items() if known(k)},
            **flag_groups(shlex.split(method.flags)), **flag_groups(shlex.split(vlm)),
            **{k: v for k, v in users.items() if known(k)},
        }
        has |= {flag for flag in users if known(flag)}
        if lacks := [flag for flag in users if not known(flag)]:
            notes[script.name] = ", ".join(f"--{flag.replace('_', '-')}" for flag in lacks)
        flags = [word for group in merged[name].values() for word in group]
        methods[name] = script.resolve(), flags, method.label, tasks
    if missing := set(users) - has:
        raise UserError(f"no script of this grid has the flag --{min(missing).replace('_', '-')}")
    for script, lacks in notes.items():
        print(f"note: {script} runs without {lacks}, which it does not have", file=sys.stderr)
    budgets = {" ".join(flags.get("total_timesteps", ["--total-timesteps"])) for flags
               in merged.values()}
    budget = budgets.pop().replace("=", " ").removeprefix("--total-timesteps").strip()
    budget = budget.replace("_", "")
    grid_name = "+".join(args.names or methods)
    if len(grid_name.encode()) > LONGEST:
        grid_name = marked(grid_name.encode()[: LONGEST // 2].decode(errors="ignore"), grid_name)
    grid = {
        "name": grid_name, "preset": preset_name,
        "methods": {name: {"script": script.name, "flags": shlex.join(flags), "label": label}
                    for name, (script, flags, label, _) in methods.items()},
        "tasks": list(dict.fromkeys(task for *_, tasks in methods.values() for task in tasks)),
        "seeds": list(range(args.seeds)),
        "total_timesteps": int(budget) if budget.isdecimal() and not budgets else None,
    }
    output = args.output or Path("runs/grids") / grid["name"]
    cells = [
        Cell(f"{name}/{task}/{seed}", str(script),
             ("--env-id", task, "--seed", str(seed), *flags),
             output.resolve() / name / task / str(seed))
        for seed in range(args.seeds) for task in grid["tasks"]
        for name, (script, flags, _, tasks) in methods.items() if task in tasks
    ]
    return output, grid, cells


def write_grid(output: Path, grid: dict[str, Any]) -> None:
    """Write grid.json, joined with what an earlier command began there.

    Raises:
        UserError: the folder has other runs under the same names, or cannot be written.
    """
    path = output / "grid.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
            for key in ("name", "preset", "total_timesteps"):
                if before[key] != grid[key]:
                    raise UserError(f"{output} holds a grid whose {key} is {before[key]}, not "
                                    f"{grid[key]}: choose another --output")
            for name in before["methods"].keys() & grid["methods"].keys():
                if before["methods"][name] != grid["methods"][name]:
                    raise UserError(f"{output} holds runs of {name} with other flags "
                                    f"({before['methods'][name]['flags']}): choose another "
                                    "--output")
            joined = {key: [*before[key], *(x for x in grid[key] if x not in before[key])]
                      for key in ("tasks", "seeds")}
            grid = grid | joined | {"methods": before["methods"] | grid["methods"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be read ({error}): choose another --output") from None
    try:
        output.mkdir(parents=True, exist_ok=True)
        temporary = output / "grid.json.tmp"
        temporary.write_text(json.dumps(grid, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; choose another --output"
                        ) from None


# ---------------------------------------------------------------------------- progress


def last_evaluation(task: str, run: Progress) -> str:
    """A run's success, or its return where the environment may know no success."""
    if run.success or (task in ENV_IDS and run.success is not None):
        return f"success {run.success:.0%}"
    return "-" if run.mean_return is None else f"return {run.mean_return:.4g}"


class Screen:
    """A table that refreshes itself on a terminal, and lines where nobody watches."""

    ROWS, SECONDS, LINE_SECONDS = 30, 2.0, 60.0

    def __init__(self, cells: list[Cell], out: TextIO):
        self.cells, self.out, self.outcomes = cells, out, {}
        self.live, self.next = None, 0.0
        if out.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(file=out, markup=False, highlight=False),
                             auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self.live.start()

    def say(self, text: str) -> None:
        if self.live:
            self.live.console.print(text)
        else:
            print(text, file=self.out, flush=True)

    def ended(self, outcomes: dict[str, Outcome]) -> None:
        """Tell of these. A job from before may have cells that this grid does not have."""
        mine = {cell.name for cell in self.cells}
        outcomes = {name: outcome for name, outcome in outcomes.items() if name in mine}
        for name, outcome in outcomes.items():
            self.outcomes[name] = outcome
            self.say(f"{outcome.state:9} {name}" + (f": {outcome.text}" if outcome.text else ""))

    def update(self) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + (self.SECONDS if self.live else self.LINE_SECONDS)
        running = [cell for cell in self.cells
                   if cell.name not in self.outcomes and is_in_use(cell.folder)]
        rows = []
        for cell in running:
            run = read_progress(cell.folder)
            rows.append((
                cell.name, f"{run.steps:,}/{run.total or 0:,}",
                "-" if run.speed is None else f"{run.speed:.0f}",
                last_evaluation(cell.task, run),
                "-" if run.seconds_left is None else format_duration(run.seconds_left),
            ))
        counts = Counter(outcome.state for outcome in self.outcomes.values())
        waiting = len(self.cells) - len(self.outcomes) - len(running)
        summary = ", ".join([*(f"{n} {state}" for state, n in sorted(counts.items())),
                             f"{len(running)} running", f"{waiting} waiting or starting"])
        if not self.live:
            for name, steps, speed, evaluation, left in rows:
                self.say(f"running   {name}: {steps} steps, {speed} steps/s, last evaluation: "
                         f"{evaluation}, {left} left")
            self.say(summary)
            return
        from rich.table import Table

        table = Table("run", "steps", "steps/s", "last evaluation", "time left",
                      caption=summary)
        for row in rows[: self.ROWS]:
            table.add_row(*row)
        self.live.update(table, refresh=True)

    def close(self) -> None:
        if self.live:
            self.update()
            self.live.stop()


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
    engine: RayEngine | SlurmEngine, cells: list[Cell], out: TextIO
) -> dict[str, Outcome]:
    """Run the cells until each has ended; the first Ctrl-C lets them save, the second ends."""
    stops: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        stops.append(number)
        if len(stops) > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt

    for number in engine.stopped_by:  # after the engine's start: Ray sets its own
        signal.signal(number, stop)
    screen, told = Screen(cells, out), False
    try:
        while len(screen.outcomes) < len(cells):
            if stops and not told:
                told = True
                screen.say("stopping: running cells are saved first")
                engine.stop()
            screen.ended(engine.poll())
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
            print(f"{done}{OVERRIDE}={cores} python {shlex.join(words)}")
        return 0
    todo = [cell for cell in cells if not is_finished(cell.folder)]
    write_grid(output, grid)
    print(f"{output}: {len(cells)} runs, {len(cells) - len(todo)} finished before")
    if not todo:
        return 0
    out = sys.stdout
    with notes_to(output / "engine.log"):
        engine = RayEngine(args) if args.engine == "ray" else SlurmEngine(args, output)
        try:
            print(f"{engine.where}; a run gets {engine.share.cores} cores, "
                  f"{engine.share.gpus:g} GPUs, {args.memory_per_run:g} GiB", file=out, flush=True)
            engine.submit(todo)
            if args.detach:
                print("submitted; the same command without --detach shows how far they are",
                      file=out)
                return 0
            outcomes = run_grid(engine, todo, out)
        finally:
            engine.close()
    counts = Counter(outcome.state for outcome in outcomes.values())
    print(", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    statuses = {"stopped": 130, "refused": 2, "failed": 1}
    return next((status for state, status in statuses.items() if counts[state]), 0)


if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    try:
        status = main(parse(Args, words[:cut]), words[cut + 1 :])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
