"""Time whole runs of scripts in turns: steps a second and memory, as a Markdown table.

    python -m tools.benchmark --scripts furl_sac_state.py my_idea.py
    python -m tools.benchmark --scripts "my_idea.py" "my_idea.py --num-envs 16"

Each script runs `--rounds` times; the figure is the median. Runs take turns, so that a noisy
machine disturbs them alike. They use the scripts' defaults, but on drawer-close-v3, with 1,000
random steps, and without evaluations and checkpoints. Flags beside a script, in the same quotes,
come last and so replace any of these. `tools.trace` shows what an iteration spends its time on.
"""

import contextlib
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, TypeVar

import jax
import psutil
from annotated_types import MinLen

from common.cli import run_script
from common.cores import num_cores
from common.envs.rendering import gl_info
from common.errors import UserError
from common.flags import PositiveInt, check_ranges
from common.logger import show
from common.run_folder import read_metrics
from common.system import cpu_description, python_path
from tools import ROOT

Row = tuple[str, str, str]  # what, figure, remark
T = TypeVar("T")


@dataclass(frozen=True)
class Args:
    scripts: Annotated[tuple[str, ...], MinLen(1)]
    """scripts to run, in turns; in quotes also with flags"""
    rounds: PositiveInt = 5
    """runs of each script, of which the median is taken"""
    steps: PositiveInt = 6000
    """environment steps of each run"""


def in_turns(functions: dict[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each function returns in each round."""
    results: dict[str, list[T]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            results[name].append(function())
    return results


def measure_scripts(commands: list[list[str]], steps: int, rounds: int) -> Iterator[Row]:
    """Whole runs of any scripts, in turns; each command is a script and its flags."""
    runs = {shlex.join(command): partial(time_run, command, steps) for command in commands}
    for name, results in in_turns(runs, rounds).items():
        speeds, peaks = zip(*results, strict=True)
        yield (name, f"{median(speeds):,.1f} steps/s",
               f"{min(speeds):,.1f} to {max(speeds):,.1f} in {rounds} runs, in turns; peak "
               f"memory {max(peaks) / 2**30:.1f} GiB with its workers")


def split_command(script: str) -> list[str]:
    """A script and its flags as a shell splits them; a file's whole name needs no quotes in it."""
    if Path(script).is_file():
        return [script]
    try:
        words = shlex.split(script)
    except ValueError as error:
        raise UserError(f"--scripts {script!r}: {error}") from None
    if not words or not Path(words[0]).is_file():
        raise UserError(f"--scripts {script!r}: no such script")
    return words


def time_run(command: list[str], steps: int) -> tuple[float, int]:
    """(median steps/s after the first third, peak bytes) of one run of a script with flags."""
    script, *flags = command
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([
            sys.executable, script, "--env-id", "drawer-close-v3", "--learning-starts", "1000",
            "--eval-every", "1000000", "--checkpoint-every", "0", "--log-every", "500",
            "--total-timesteps", str(steps), *flags, "--run-dir", f"{folder}/run",
        ], stdout=subprocess.DEVNULL, stderr=errors,
            env=os.environ | {"PYTHONPATH": python_path(ROOT)})
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory_of_tree(process.pid))
            time.sleep(1.0)
        if process.returncode:
            errors.seek(0)
            raise UserError(f"the run failed: {errors.read().decode()[-500:]}")
        rows = [(env_steps, value) for env_steps, key, value in
                read_metrics(Path(folder) / "run").rows if key == "time/steps_per_second"]
    # The last row's time holds an evaluation.
    speeds = [value for env_steps, value in rows[:-1] if env_steps > rows[-1][0] // 3]
    if not speeds:
        raise UserError("the run logged too few rows: more steps, or a smaller --log-every")
    print(f"{shlex.join(command)}: {median(speeds):,.1f} steps/s", file=sys.stderr)
    return median(speeds), peak


def memory_of_tree(pid: int) -> int:
    """Bytes of memory of a process and all below it; shared pages are divided among those that
    share them (PSS), or not counted where the system does not tell that (macOS)."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has ended
                memory = each.memory_full_info()
                total += getattr(memory, "pss", memory.uss)
    return total


def machine() -> str:
    """Cores, processor and versions in one line."""
    # Linux on ARM has no such line.
    found = re.search(r"^(?:model name|machdep.cpu.brand_string)\s*: (.*)", cpu_description(), re.M)
    model = found[1] if found else platform.machine()
    devices = ", ".join(str(device) for device in jax.devices())
    return (f"{num_cores()} cores, {model}, {psutil.virtual_memory().total / 2**30:.0f} "
            f"GiB; drawing: {gl_info()['renderer']}; JAX {jax.__version__} on {devices}")


def print_table(rows: Iterable[Row]) -> None:
    """The rows as a Markdown table below a line about the machine."""
    show(f"Machine: {machine()}.\n\n| what | figure | remark |\n| --- | --- | --- |")
    for row in rows:
        show("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")


def main(args: Args) -> None:
    check_ranges(args)
    commands = [split_command(script) for script in args.scripts]
    print_table(measure_scripts(commands, args.steps, args.rounds))


if __name__ == "__main__":
    run_script(main, Args)
