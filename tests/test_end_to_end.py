"""The script as its user runs it: train, die, resume, and be told what is wrong."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import furl_sac_state
from common.cli import run_script

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "furl_sac_state.py"
TINY = [
    "--env-id", "drawer-close-v3", "--num-envs", "4", "--total-timesteps", "2400",
    "--learning-starts", "400", "--batch-size", "32", "--eval-every", "2400",
    "--checkpoint-every", "800", "--log-every", "400", "--buffer-size", "2000", "--utd", "0.5",
    "--hidden-features", "32", "32",
]


def run(*flags: str, timeout: float = 240, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True,
                          timeout=timeout, **kwargs)


def metrics(run_dir: Path) -> dict[tuple[int, str], str]:
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["env_steps", "key", "value"]
    keys = [(int(step), key) for step, key, _ in rows[1:]]
    assert len(keys) == len(set(keys)), "a row was written twice"
    return {(int(step), key): value for step, key, value in rows[1:]}


def without_times(rows: dict[tuple[int, str], str]) -> dict[tuple[int, str], str]:
    return {k: v for k, v in rows.items() if not k[1].startswith("time/")}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    result = run(*TINY, "--run-dir", str(run_dir), "--capture-video")
    assert result.returncode == 0, result.stderr
    assert "final policy: success_once" in result.stdout
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
    assert {"eval/success_once", "eval/success_at_end", "time/steps_per_second",
            "losses/critic_loss", "losses/relay_critic_loss", "reward/vlm_mean"} <= keys
    assert {step for step, key in rows if key == "eval/success_once"} == {2400}
    # 4 environments x 0.5 updates: two an iteration, from the first step after 400 on.
    assert float(rows[2400, "charts/num_updates"]) == (2400 - 400) / 4 * 2
    assert all(np.isfinite(float(value)) for value in rows.values())
    assert len(list((whole_run / "videos").glob("*.mp4"))) == 1
    assert list((whole_run / "tensorboard").glob("events.*"))


def test_a_killed_and_resumed_run_equals_one_that_was_not(whole_run, tmp_path):
    """Killed with SIGKILL after its second checkpoint; the replay wraps in what follows."""
    run_dir = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *TINY, "--run-dir", str(run_dir), "--capture-video"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 200
    while not (run_dir / "checkpoints" / "step_0000001600").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    result = run("--resume", str(run_dir))
    assert result.returncode == 0, result.stderr
    assert "resumed at 1,600 steps" in result.stdout
    assert without_times(metrics(run_dir)) == without_times(metrics(whole_run))


def test_a_worker_that_dies_ends_the_run_which_can_be_resumed(tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *TINY, "--run-dir", str(run_dir)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    deadline = time.monotonic() + 200
    while not (run_dir / "checkpoints" / "step_0000000800").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children
               if b"common.envs" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("error: an environment worker has died (by signal 9)"), errors
    assert len(errors.splitlines()) == 1
    result = run("--resume", str(run_dir), "--total-timesteps", "1200", "--drop-replay")
    assert result.returncode == 0, result.stderr
    [left] = (run_dir / "checkpoints").iterdir()
    assert left.name == "step_0000001200"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "drawer-opn-v3"], "did you mean drawer-open-v3"),
        (["--camera-id", "99"], "unknown camera 99"),
        (["--vlm", "RN51/openai"], "unknown VLM 'RN51/openai'"),
        (["--num-envs", "-8"], "--num-envs"),
        (["--buffer-size", "3999"], "--buffer-size must hold an episode of each of 8"),
        (["--utd", "0.3"], "--utd 0.3 x --num-envs 8"),
        (["--vlm-weights", "/nowhere/model.pt"], "no such file"),
        (["--resume", "/nowhere"], "no such folder"),
        (["--run-dir", "/proc/run"], "/proc/run"),
    ],
)
def test_bad_input_ends_in_one_clear_line(flags, message, tmp_path, monkeypatch, refused):
    """In this process, which saves the imports; the next test looks at a real one."""
    monkeypatch.chdir(tmp_path)
    refused(furl_sac_state, flags, message)
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line_and_status_2_on_the_command_line(tmp_path):
    result = run("--camera-id", "99", cwd=tmp_path, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown camera 99; this task has 0 (topview)")
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_an_unknown_goal_mode_names_the_allowed_ones(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["furl_sac_state.py", "--goal", "moving"])
    with pytest.raises(SystemExit) as stop:
        run_script(furl_sac_state.main, furl_sac_state.Args)
    assert stop.value.code == 2
    assert "random-hidden" in capfd.readouterr().err
