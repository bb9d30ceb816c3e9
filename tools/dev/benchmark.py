"""What docs/benchmark.md quotes beside whole runs: drawing, workers, other libraries; one table.

    python -m tools.dev.benchmark --only frames workers
    python -m tools.dev.benchmark --rounds 3 --only peers    # tools/dev/peer.py says what it needs

`tools.benchmark` times whole runs of any scripts, `tools.trace` the parts of an iteration. Figures
are medians of several rounds.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import chain
from statistics import median
from typing import Literal, get_args

import numpy as np

from common.cli import run_script
from common.cores import num_cores
from common.envs.metaworld_suite import ACTION_DIM, VecMetaWorld, make_env
from common.envs.rendering import Camera, Renderer
from common.errors import UserError
from common.flags import PositiveInt, check_ranges
from tools import ROOT
from tools.benchmark import Row, in_turns, print_table, time_run
from tools.dev.peer import PACKAGES
from tools.doctor import median_seconds

Part = Literal["frames", "workers", "peers"]
PARTS: tuple[Part, ...] = get_args(Part)
TASK = "drawer-open-v3"


@dataclass(frozen=True)
class Args:
    only: tuple[Part, ...] = PARTS
    """parts to measure"""
    rounds: PositiveInt = 5
    """rounds that the medians are taken over"""


def repeat(function: Callable[[], object], count: int) -> None:
    for _ in range(count):
        function()


def measure_frames(rounds: int) -> Iterator[Row]:
    """Milliseconds per frame on one core."""
    env = make_env(TASK, seed=0, index=0, goal="fixed", show_goal=False)
    for quality, count in (("fast", 20), ("paper", 3)):
        for size in (84, 112, 176, 224):
            renderer = Renderer(env.model, Camera(size, quality=quality))
            draw = partial(renderer.render, env.model, env.data)
            seconds = median_seconds(partial(repeat, draw, count), rounds) / count
            renderer.close()
            yield (f"frame, {quality}, {size} px", f"{seconds * 1e3:.1f} ms",
                   f"{1 / seconds:,.0f} a second and core")


def measure_workers(rounds: int) -> Iterator[Row]:
    """Environment steps per second by number of workers at once, each step drawn or none."""
    for num_workers in (n for n in (1, 2, 4, 8, 16, 32) if n <= num_cores()):
        for camera, steps in ((None, 200), (Camera(176), 100), (Camera(224), 100),
                              (Camera(224, quality="paper"), 4)):
            envs = VecMetaWorld(TASK, 2 * num_workers, seed=0, num_workers=num_workers,
                                camera=camera)
            envs.reset()
            step = partial(envs.step, np.zeros((envs.num_envs, ACTION_DIM), np.float32))
            seconds = median_seconds(partial(repeat, step, steps), rounds)
            envs.close()
            drawn = f"drawn, {camera.quality}, {camera.size} px" if camera else "not drawn"
            yield (f"steps/s, {drawn}, {num_workers} workers",
                   f"{envs.num_envs * steps / seconds:,.0f}", "two environments each")


PEERS = (  # script, its flags, the peers' algorithm, task, samples per update
    ("sac_baseline.py", "", "SAC", "drawer-close-v3", 256),
    ("sac_baseline.py", "", "SAC", "Pendulum-v1", 256),
    ("vlm_rm_dqn.py", "--no-vlm-reward", "DQN", "CartPole-v1", 32),
)


def own_speed(command: list[str]) -> float:
    """Steps a second of one run of a script."""
    return time_run(command, steps=5000)[0]


def peer_speed(package: str, flags: list[str]) -> float:
    """Steps a second of one run of another library's algorithm."""
    command = [sys.executable, "-m", "tools.dev.peer", "--package", package, *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{package} failed: {result.stderr[-500:]}")
    return float(result.stdout.splitlines()[-1])


def measure_peers(rounds: int) -> Iterator[Row]:
    """SAC and DQN in turns with those of the other libraries that are installed."""
    installed = [package for package in PACKAGES if importlib.util.find_spec(package)]
    for package in set(PACKAGES) - set(installed):
        yield package, "-", "not installed (see tools/dev/peer.py)"
    for script, flags, algorithm, task, batch_size in PEERS:
        same = ["--env-id", task, "--batch-size", str(batch_size)]
        contenders = {script: partial(own_speed, [str(ROOT / script), *flags.split(), *same])}
        for package in installed:
            name = {"sbx": "sbx-rl"}.get(package, package)
            contenders[f"{name} {metadata.version(name)}"] = partial(
                peer_speed, package, ["--algorithm", algorithm, *same]
            )
        for name, speeds in in_turns(contenders, rounds).items():
            yield (f"{algorithm} on {task}, batch {batch_size}: {name}",
                   f"{median(speeds):.0f} steps/s",
                   f"{min(speeds):.0f} to {max(speeds):.0f} in {rounds} runs, in turns")


def main(args: Args) -> None:
    check_ranges(args)
    measures = {"frames": measure_frames, "workers": measure_workers, "peers": measure_peers}
    print_table(chain.from_iterable(measures[part](args.rounds) for part in args.only))


if __name__ == "__main__":
    run_script(main, Args)
