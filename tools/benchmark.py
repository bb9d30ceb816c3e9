"""Time whole runs of scripts in turns: steps a second and memory, in one table.

    python -m tools.benchmark --scripts furl_sac_state.py my_idea.py
    python -m tools.benchmark --scripts "my_idea.py" "my_idea.py --num-envs 16"

Each script runs `--rounds` times; the figure is the median. Runs take turns, so that a noisy
machine disturbs them alike. They use the scripts' defaults, but on drawer-close-v3, with 1,000
random steps, and without evaluations and checkpoints. Flags beside a script, in the same quotes,
come last and so replace any of these. `tools.dev.benchmark` measures the parts of scripts.
"""

import contextlib
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import psutil

from common.cores import num_cores
from common.envs.rendering import gl_info
from common.errors import UserError
from common.flags import parse
from common.run_folder import read_metrics
from common.system import cpu_description

Row = tuple[str, str, str]  # what, figure, share of the floor or remark


@dataclass(frozen=True)
class Args:
    scripts: tuple[str, ...]
    """scripts to run, in turns; in quotes also with flags"""
    rounds: int = 5
    """runs of each script, of which the median is taken"""
    steps: int = 6000
    """environment steps of each run"""
    output: Path | None = None
    """Markdown file to write the table to"""


def measure_scripts(commands: list[list[str]], steps: int, rounds: int) -> Iterator[Row]:
    """Whole runs of any scripts, in turns; each command is a script and its flags."""
    names = [shlex.join(command) for command in commands]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    for _ in range(rounds):
        for name, (script, *flags) in zip(names, commands, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                speed, peak = time_run(
                    script, ["--total-timesteps", str(steps), *flags], Path(folder) / "run",
                    warm_up=steps // 3,
                )
            speeds[name].append(speed)
            peaks[name] = max(peaks[name], peak)
    for name, values in speeds.items():
        yield (name, f"{np.median(values):,.3g} steps/s",
               f"{min(values):,.3g} to {max(values):,.3g} in {len(values)} runs, in turns; peak "
               f"memory {peaks[name] / 2**30:.1f} GiB with its workers")


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


def time_run(
    script: str | Path, flags: list[str], run_dir: Path, warm_up: int
) -> tuple[float, float]:
    """(median steps/s, peak bytes) of one run."""
    command = [
        sys.executable, str(script), "--env-id", "drawer-close-v3",
        "--learning-starts", "1000", "--eval-every", "1000000", "--checkpoint-every", "0",
        "--log-every", "500", *flags, "--run-dir", str(run_dir),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], memory_of_tree(process.pid))
            time.sleep(1.0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    watcher.join()
    if process.returncode:
        raise UserError(f"the run failed: {errors.decode()[-500:]}")
    speeds = [value for env_steps, key, value in read_metrics(run_dir).rows
              if key == "time/steps_per_second" and env_steps > warm_up]
    speeds = speeds[:-1]  # the last row's time holds an evaluation
    if not speeds:
        raise UserError("the run logged too few rows: more steps, or a smaller --log-every")
    return float(np.median(speeds)), peak[0]


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


def tabulate(rows: Iterable[Row], module: str, output: Path | None) -> list[Row]:
    """Print the rows as they come, as a Markdown table; write them, also as JSON, to `output`."""
    lines = [f"Machine: {machine()}.", "", "| what | figure | remark |", "| --- | --- | --- |"]
    print("\n".join(lines), flush=True)
    results: list[Row] = []
    for row in rows:
        results.append(row)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        print(lines[-1], flush=True)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        title = ["# Benchmark", "", f"`python -m {module} {shlex.join(sys.argv[1:])}`", ""]
        output.write_text("\n".join(title + lines) + "\n")
        output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def main(args: Args) -> None:
    commands = [split_command(script) for script in args.scripts]
    rows = measure_scripts(commands, args.steps, args.rounds)
    tabulate(rows, "tools.benchmark", args.output)


if __name__ == "__main__":
    try:
        main(parse(Args))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
