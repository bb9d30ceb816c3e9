"""The script as its user runs it: what a run leaves, and what faults leave of it.

Runs are killed, stopped, damaged, starved of disk, lose a worker or diverge: nothing is lost, and
what is resumed equals a run to which none of it happened, to the last digit.
"""

import csv
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import HEED_SIGNALS

from common import policies
from common.cache import cache_dir
from common.run_folder import kept_policies

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "furl_sac_state.py"
# A checkpoint every ten iterations, so that a kill often meets one that is being written, and often
# comes between two frames that are drawn; the replay wraps, an episode ends, and both agents and
# the heads learn.
TINY = [
    "--env-id", "drawer-close-v3", "--num-envs", "4", "--total-timesteps", "2400",
    "--learning-starts", "80", "--batch-size", "8", "--utd", "0.25", "--hidden-features", "16",
    "16", "--projection-features", "16", "8", "--buffer-size", "2000",
    "--embedding-buffer-size", "500", "--eval-every", "1200", "--checkpoint-every", "40",
    "--log-every", "80", "--draw-every", "4",
]
NUM_KILLS = 12


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Compiled programs are kept as scripts do it, in a folder of these tests' own.

    So many starts need not compile as many times, and kills meet programs that are being written.
    Unlike in other tests they are optimized. One core each, hence one worker: it starts sooner.
    """
    caches = tmp_path_factory.mktemp("caches")
    for folder in cache_dir().glob("*"):
        if folder.name != "compiled":
            (caches / folder.name).symlink_to(folder.absolute())
    chosen_here = ("JAX_COMPILATION", "JAX_PERSISTENT", "JAX_DISABLE")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(chosen_here)}
    return inherited | {"FURL_CACHE_DIR": str(caches), "FURL_NUM_CORES": "1"}


class Script:
    """A script that runs; its output goes to files, so that a full pipe never stops it."""

    def __init__(self, environment: dict[str, str], log: Path, *flags: str):
        self.log = log
        with open(log.with_suffix(".out"), "w") as out, open(log.with_suffix(".err"), "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", HEED_SIGNALS, str(SCRIPT), *flags], stdout=out, stderr=err,
                env=environment, start_new_session=True,
            )

    def send(self, number: int) -> None:
        """To the whole group, as terminals and schedulers do; and twice, as some do."""
        for _ in range(2):
            os.killpg(self.process.pid, number)

    def end(self, timeout: float = 300) -> int:
        return self.process.wait(timeout)

    def wait_until(self, condition) -> bool:
        """False if the script has ended before the condition holds."""
        deadline = time.monotonic() + 300
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, "the script hangs"
            time.sleep(0.01)
        return True

    @property
    def out(self) -> str:
        return self.log.with_suffix(".out").read_text()

    @property
    def errors(self) -> str:
        return self.log.with_suffix(".err").read_text()


def newest(run_dir: Path) -> int:
    """Steps of the newest checkpoint; -1 without one."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=-1)


def metrics(run_dir: Path, until: int = 2400) -> dict[tuple[int, str], str]:
    """All rows up to a step but those of times; each (step, key) once."""
    with open(run_dir / "metrics.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["env_steps", "key", "value"]
    rows = [(int(step), key, value) for step, key, value in lines]
    assert len(rows) == len({row[:2] for row in rows}), "a row was written twice"
    return {row[:2]: row[2] for row in rows if row[0] <= until and not row[1].startswith("time/")}


def kept(run_dir: Path) -> dict[int, dict[str, list]]:
    """The policies of its evaluations."""
    return {step: {name: x.tolist() for name, x in policies.read(run_dir, step).items()}
            for step in kept_policies(run_dir)}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, environment) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    script = Script(environment, run_dir.with_name("whole"), *TINY, "--run-dir", str(run_dir),
                    "--capture-video")
    assert script.end() == 0, script.errors
    assert "final policy: success_once" in script.out
    assert "time/steps_per_second" in (run_dir / "metrics.csv").read_text()
    return run_dir


def test_a_run_leaves_everything_that_its_reader_needs(whole_run):
    config = json.loads((whole_run / "config.json").read_text())
    assert config["args"]["env_id"] == "drawer-close-v3" and config["script"] == "furl_sac_state"
    assert config["sizes"]["obs"] == 39 and config["sizes"]["action"] == 4
    assert config["evaluation"]["camera_id"] == 2 and config["run_id"]
    assert (whole_run / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()
    assert config["prompt"] == "Push and close a drawer."
    assert config["vlm_id"].startswith("mini-")
    assert config["versions"]["mujoco"] == "3.3.0"
    assert "renderer" in config["gl"]
    rows = metrics(whole_run)
    keys = {key for _, key in rows}
    assert {"eval/success_once", "eval/success_at_end", "losses/q", "losses/relay_q",
            "losses/relay_critic_loss", "reward/vlm_mean"} <= keys
    assert {"losses/neg_neg_loss", "losses/pos_neg_loss"} & keys
    assert {step for step, key in rows if key == "eval/success_once"} == {1200, 2400}
    # 4 environments x 0.25 updates: one an iteration, from the first step after 80 on.
    assert float(rows[2400, "charts/num_updates"]) == (2400 - 80) / 4
    assert all(np.isfinite(float(value)) for value in rows.values())
    assert len(list((whole_run / "videos").glob("*.mp4"))) == 2
    assert list((whole_run / "tensorboard").glob("events.*"))


def test_killed_again_and_again(whole_run, tmp_path, environment):
    """The first kill comes when the run folder appears: there is no checkpoint, and the same
    command begins anew. The second comes with the first checkpoint; after that every third comes
    at any moment of a start, the others soon after a checkpoint.

    None later than two or three checkpoints on, so that a fast machine has steps left for all.
    """
    rng = random.Random(0)
    run_dir, steps_at_kill = tmp_path / "run", []
    flags = [*TINY, "--run-dir", str(run_dir), "--capture-video"]
    while True:
        before = newest(run_dir)
        number = len(steps_at_kill)
        script = Script(environment, tmp_path / f"{number}", *flags)
        if number >= NUM_KILLS:
            assert script.end() == 0, script.errors
            break
        if number == 0:
            script.wait_until(run_dir.exists)
        elif number == 1:
            script.wait_until(lambda: newest(run_dir) >= 0)
        elif number % 3 == 2:
            at = time.monotonic() + rng.uniform(0, 8)
            script.wait_until(
                lambda at=at, before=before: time.monotonic() > at or newest(run_dir) > before + 40
            )
        else:
            enough = before + rng.choice((0, 40))
            script.wait_until(lambda enough=enough: newest(run_dir) > enough)
            time.sleep(rng.uniform(0, 0.03))
        assert script.process.poll() is None, f"ended after {number} kills: {script.errors}"
        os.kill(script.process.pid, signal.SIGKILL)
        script.end()
        assert "Traceback" not in script.errors
        steps_at_kill.append(newest(run_dir))
        if steps_at_kill[-1] >= 0:
            flags = ["--resume", str(run_dir)]
    assert steps_at_kill[0] == -1 < steps_at_kill[1]
    assert metrics(run_dir) == metrics(whole_run)
    assert kept(run_dir) == kept(whole_run) and list(kept(run_dir)) == [1200, 2400]


def test_stopped_damaged_and_resumed(whole_run, tmp_path, environment):
    run_dir = tmp_path / "run"
    script = Script(environment, tmp_path / "first", *TINY, "--run-dir", str(run_dir),
                    "--checkpoint-every", "0")
    assert script.wait_until(lambda: "phase relay" in script.out)

    # While it runs, nobody else may go on with it. (It waits, so that it is not done before.)
    script.process.send_signal(signal.SIGSTOP)
    second = Script(environment, tmp_path / "second", "--resume", str(run_dir))
    assert second.end() == 2
    assert second.errors.startswith(f"error: {run_dir} is in use by another process")
    assert len(second.errors.splitlines()) == 1, second.errors

    script.process.send_signal(signal.SIGCONT)

    # Ctrl-C: saved where it was, although no checkpoint was due; 130 as shells have it.
    script.send(signal.SIGINT)
    assert script.end() == 130, script.errors
    stopped_at = newest(run_dir)
    assert stopped_at > 0 and f"saved at {stopped_at:,} steps" in script.out
    assert "Traceback" not in script.errors

    # What a cluster's schedulers send does the same; test_cli.py has all of their signals.
    script = Script(environment, tmp_path / "third", "--resume", str(run_dir),
                    "--checkpoint-every", "0")
    assert script.wait_until(lambda: "phase relay" in script.out), script.errors
    script.send(signal.SIGUSR1)
    assert script.end() == 138, script.errors
    assert newest(run_dir) > stopped_at

    # A flipped bit in the newest checkpoint: recognised, and the one before it is used.
    path = run_dir / "checkpoints" / f"step_{newest(run_dir):010d}" / "state.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    script = Script(environment, tmp_path / "fourth", "--resume", str(run_dir))
    assert script.end() == 0, script.errors
    assert "does not match its checksum" in script.out
    assert f"resumed at {stopped_at:,} steps" in script.out
    assert metrics(run_dir) == metrics(whole_run)
    assert kept(run_dir) == kept(whole_run)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="macOS cannot limit another process")
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(whole_run, tmp_path, environment):
    """From the first checkpoint on the kernel refuses larger files, and all later ones are larger.

    A full disk and a full file end in the same place, with other error numbers.
    """
    run_dir = tmp_path / "run"
    script = Script(environment, tmp_path / "log", *TINY, "--run-dir", str(run_dir),
                    "--checkpoint-every", "800")
    assert script.wait_until(lambda: newest(run_dir) == 0)
    size = (run_dir / "checkpoints/step_0000000000/state.npz").stat().st_size
    resource.prlimit(script.process.pid, resource.RLIMIT_FSIZE, (size + 2000, size + 2000))
    assert script.end() == 2
    assert "error: File too large" in script.errors and "what was saved is safe" in script.errors
    assert newest(run_dir) == 0
    assert not list((run_dir / "checkpoints").rglob("*.tmp")), "it still takes space"
    script = Script(environment, tmp_path / "again", "--resume", str(run_dir),
                    "--total-timesteps", "1200")
    assert script.end() == 0, script.errors
    assert metrics(run_dir) == metrics(whole_run, until=1200)


def test_a_worker_that_dies_ends_the_run_which_can_be_resumed(whole_run, tmp_path, environment):
    run_dir = tmp_path / "run"
    script = Script(environment, tmp_path / "log", *TINY, "--run-dir", str(run_dir))
    assert script.wait_until(lambda: newest(run_dir) >= 400), script.errors
    workers = [child for child in psutil.Process(script.process.pid).children()
               if "common.envs.workers" in child.cmdline()]
    workers[0].kill()
    assert script.end() == 1
    assert script.errors.startswith("error: an environment worker has died (by signal 9)")
    assert len(script.errors.splitlines()) == 1, script.errors
    script = Script(environment, tmp_path / "again", "--resume", str(run_dir), "--drop-replay",
                    "--total-timesteps", "1200")
    assert script.end() == 0, script.errors
    [left] = (run_dir / "checkpoints").iterdir()
    assert left.name == "step_0000001200"
    assert metrics(run_dir) == metrics(whole_run, until=1200)


@pytest.mark.parametrize("learning_rate", ["1e3", "1e10"])
def test_a_run_that_diverges_stops_and_says_what_did(tmp_path, environment, learning_rate):
    """Such steps overflow float32 within a few updates, far from any row of metrics.

    The first shows as a checkpoint would be saved, the second as an action would be taken.
    """
    run_dir = tmp_path / "run"
    script = Script(environment, tmp_path / "log", *TINY, "--run-dir", str(run_dir),
                    "--learning-rate", learning_rate, "--log-every", "1200")
    assert script.end() == 2
    culprit = r"error: ((furl|relay)/\S+ is not finite|losses/\S+ is (nan|-?inf)) at step"
    assert re.match(culprit, script.errors), script.errors
    assert "the run has diverged; its last checkpoint before that is in" in script.errors
    assert len(script.errors.splitlines()) == 1
    step = newest(run_dir)
    assert 0 <= step < 1200
    with np.load(run_dir / "checkpoints" / f"step_{step:010d}" / "state.npz") as arrays:
        floats = [x for x in arrays.values() if np.issubdtype(x.dtype, np.floating)]
    assert floats and all(np.isfinite(x).all() for x in floats)
