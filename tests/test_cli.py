"""The command line, the run folder and its records: what is refused, and what is written."""

import csv
import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from common import checkpoint, cli, logger, replay
from common.errors import UserError
from common.logger import Logger
from common.run import Run, start_run
from furl_sac_state import Args

GOOD = Args(env_id="drawer-open-v3", num_envs=4, total_timesteps=400, log_every=100)


def rows_of(run_dir: Path) -> list[list[str]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.reader(file))


# ------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(("change", "flag"), [
    ({"num_envs": 0}, "--num-envs"),
    ({"num_envs": -1}, "--num-envs"),
    ({"total_timesteps": 0}, "--total-timesteps"),
    ({"total_timesteps": 402}, "--total-timesteps"),
    ({"seed": -1}, "--seed"),
    ({"eval_every": 0}, "--eval-every"),
    ({"eval_episodes": -1}, "--eval-episodes"),
    ({"checkpoint_every": -5}, "--checkpoint-every"),
    ({"log_every": 0}, "--log-every"),
    ({"camera_id": -1}, "--camera-id"),
    ({"learning_starts": -1}, "--learning-starts"),
    ({"utd": 0.0}, "--utd"),
    ({"utd": 0.3}, "--utd"),
    ({"utd": 0.1}, "--utd"),
    ({"buffer_size": 0}, "--buffer-size"),
    ({"buffer_size": 1999}, "--buffer-size"),
    ({"batch_size": 0}, "--batch-size"),
    ({"learning_rate": 0.0}, "--learning-rate"),
    ({"learning_rate": math.nan}, "--learning-rate"),
    ({"learning_rate": math.inf}, "--learning-rate"),
    ({"gamma": 1.01}, "--gamma"),
    ({"gamma": -0.1}, "--gamma"),
    ({"tau": 0.0}, "--tau"),
    ({"tau": 1.5}, "--tau"),
    ({"init_temperature": 0.0}, "--init-temperature"),
    ({"hidden_features": ()}, "--hidden-features"),
    ({"hidden_features": (256, 0)}, "--hidden-features"),
    ({"projection_features": (-64,)}, "--projection-features"),
    ({"rho": -0.1}, "--rho"),
    ({"rho": math.nan}, "--rho"),
    ({"lag": 0}, "--lag"),
    ({"reward_margin": -0.1}, "--reward-margin"),
    ({"l2_margin": -0.1}, "--l2-margin"),
    ({"embedding_buffer_size": 0}, "--embedding-buffer-size"),
    ({"embedding_buffer_size": 499}, "--embedding-buffer-size"),
    ({"relay_periods": ()}, "--relay-periods"),
    ({"relay_periods": (50, 0)}, "--relay-periods"),
    ({"relay_until": -1}, "--relay-until"),
])
def test_a_value_that_cannot_work_is_named(change, flag):
    with pytest.raises(UserError, match=rf"{flag}(\s|$)") as caught:
        cli.check_args(replace(GOOD, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    {}, {"rho": 0.0}, {"seed": 0}, {"checkpoint_every": 0}, {"eval_episodes": 0},
    {"learning_starts": 0}, {"relay_until": 0}, {"reward_margin": 0.0}, {"l2_margin": 0.0},
    {"gamma": 1.0}, {"tau": 1.0}, {"utd": 0.5}, {"utd": 0.25}, {"buffer_size": 2000},
    {"num_envs": 10, "utd": 0.3},  # 3 updates, though not in binary
])
def test_values_at_their_limits_work(change):
    assert cli.check_args(replace(GOOD, **change)) == replace(GOOD, **change)


def test_the_task_gets_its_full_name():
    for name in ("drawer-open", "drawer-open-v2", "drawer-open-v3"):
        assert cli.check_args(replace(GOOD, env_id=name)).env_id == "drawer-open-v3"
    with pytest.raises(UserError, match="drawer-open-v3"):
        cli.check_args(replace(GOOD, env_id="drawer-opne-v3"))


def test_flags_become_arguments():
    args = cli.parse_args(Args, [
        "--env-id", "reach-v3", "--seed", "3", "--hidden-features", "64", "32", "--no-align",
        "--rho", "0.1", "--goal", "random", "--capture-video",
    ])
    assert args == Args(env_id="reach-v3", seed=3, hidden_features=(64, 32), align=False, rho=0.1,
                        goal="random", capture_video=True)
    assert cli.parse_args(Args, []) == Args()


@pytest.mark.parametrize("argv", [
    ["--no-such-flag"], ["--num-envs", "many"], ["--goal", "nowhere"], ["--seed", "1.5"],
    ["--seed"], ["--resume"],
])
def test_what_the_parser_refuses(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse_args(Args, argv)
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------ resume


@pytest.fixture
def stored(tmp_path) -> Path:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    logger.write_config(run_dir, replace(GOOD, hidden_features=(64, 32), prompt="Open it."))
    return run_dir


def test_a_resumed_run_has_the_stored_arguments(stored):
    expected = replace(GOOD, hidden_features=(64, 32), prompt="Open it.", resume=str(stored))
    assert cli.parse_args(Args, ["--resume", str(stored)]) == expected
    assert cli.parse_args(Args, [f"--resume={stored}"]) == expected
    # Saying again what is so already is no change.
    again = ["--seed", "0", "--hidden-features", "64", "32"]
    assert cli.parse_args(Args, ["--resume", str(stored), *again]) == expected


def test_what_a_resumed_run_may_change(stored):
    args = cli.parse_args(Args, [
        "--resume", str(stored), "--total-timesteps", "800", "--eval-every", "7", "--log-every",
        "8", "--checkpoint-every", "9", "--capture-video", "--track", "--wandb-project", "other",
    ])
    assert args == replace(
        GOOD, hidden_features=(64, 32), prompt="Open it.", resume=str(stored), total_timesteps=800,
        eval_every=7, log_every=8, checkpoint_every=9, capture_video=True, track=True,
        wandb_project="other",
    )


@pytest.mark.parametrize("change", [
    ["--seed", "1"], ["--env-id", "reach-v3"], ["--num-envs", "8"], ["--rho", "0.1"],
    ["--hidden-features", "64"], ["--no-relay"], ["--vlm", "liv"], ["--prompt", "Shut it."],
    ["--buffer-size", "10"], ["--run-dir", "elsewhere"], ["--quality", "paper"],
])
def test_what_a_resumed_run_may_not_change(stored, change):
    flag = change[0].replace("--no-", "--")
    with pytest.raises(UserError, match=f"^{flag} cannot change in a resumed run"):
        cli.parse_args(Args, ["--resume", str(stored), *change])


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        cli.parse_args(Args, ["--resume", str(tmp_path / "missing")])
    with pytest.raises(UserError, match="not a run folder"):
        cli.parse_args(Args, ["--resume", str(tmp_path)])
    for text in ("", "{", "[]", "3", '{"args": null}', '{"args": {}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json cannot be read"):
            cli.parse_args(Args, ["--resume", str(tmp_path)])


def test_another_scripts_run(stored):
    config = json.loads((stored / "config.json").read_text())
    config["args"]["frame_stack"] = 3
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"another script's or version's.*frame_stack"):
        cli.parse_args(Args, ["--resume", str(stored)])


# -------------------------------------------------------------------------- exit status


@pytest.mark.parametrize(("error", "message"), [
    (UserError("--rho must not be negative"), "error: --rho must not be negative\n"),
    (OSError(errno.ENOSPC, "No space left on device", "state.npz"),
     "error: No space left on device: state.npz; what was saved is safe\n"),
    (OSError(errno.EROFS, "Read-only file system"),
     "error: Read-only file system: the run folder; what was saved is safe\n"),
])
def test_what_the_user_can_mend_is_one_line_and_status_2(monkeypatch, capsys, error, message):
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["furl_sac_state.py"])
    with pytest.raises(SystemExit) as caught:
        cli.run_script(main, Args)
    assert caught.value.code == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "a bug")])
def test_other_errors_keep_their_traceback(monkeypatch, error):
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["furl_sac_state.py"])
    with pytest.raises(type(error)):
        cli.run_script(main, Args)


def test_run_script_passes_the_arguments_on(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["furl_sac_state.py", "--seed", "5"])
    cli.run_script(seen.append, Args)
    assert seen == [Args(seed=5)]


# -------------------------------------------------------------------------- run folder


def test_the_default_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = logger.create_run_dir(None, "drawer-open-v3", "furl_sac_state", 7)
    assert path.parent == Path("runs") and path.is_dir()
    assert path.name.startswith("drawer-open-v3__furl_sac_state__7__")


@pytest.mark.parametrize("trace", ["checkpoints/step_0000000000/manifest.json", "metrics.csv"])
def test_a_folder_holds_one_run(tmp_path, trace):
    path = logger.create_run_dir(str(tmp_path / "a/b"), "reach-v3", "s", 0)
    for _ in range(2):  # while it runs, and after
        with pytest.raises(UserError, match=r"already holds a run.*--resume.*--run-dir"):
            logger.create_run_dir(str(path), "reach-v3", "s", 0)
        (path / trace).parent.mkdir(parents=True, exist_ok=True)
        (path / trace).write_text("env_steps,key,value\n0,eval/return,1\n")
        logger.unlock_run_dir(path)


def test_a_run_that_died_before_its_first_checkpoint_leaves_its_folder_free(tmp_path):
    path = logger.create_run_dir(str(tmp_path), "reach-v3", "s", 0)
    (path / "metrics.csv").write_text("env_steps,key,value\n")
    logger.unlock_run_dir(path)
    assert logger.create_run_dir(str(tmp_path), "reach-v3", "s", 0) == path


def test_of_two_runs_started_at_once_one_gets_the_folder(tmp_path):
    logger.create_run_dir(str(tmp_path), "reach-v3", "s", 0)
    code = ("import sys; from common.logger import create_run_dir;"
            "create_run_dir(sys.argv[1], 'reach-v3', 's', 0)")
    root = Path(cli.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root,
                            capture_output=True, text=True, timeout=120)
    assert "is in use by another process" in result.stderr, result.stderr
    logger.unlock_run_dir(tmp_path)
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root,
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_run_goes_on_when_nobody_reads_what_it_prints(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    logger.show("one")
    logger.show("two")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_networks_that_are_not_finite_are_not_saved(tmp_path, value):
    run = start(tmp_path)
    with pytest.raises(UserError, match=r"actor/w is not finite at step 100.*has diverged"):
        run.save(100, ({"actor": {"w": jnp.array([1.0, value])}},), {"replay": small_ring()}, {})
    assert not (run.dir / "checkpoints").exists()


def test_a_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in ("file", "file/below"):
        with pytest.raises(UserError, match="--run-dir"):
            logger.create_run_dir(str(tmp_path / path), "reach-v3", "s", 0)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_run_folder_that_cannot_be_written(tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(UserError, match=f"{os.strerror(code)}.*--run-dir"):
            logger.create_run_dir(str(tmp_path / "new"), "reach-v3", "s", 0)
    with monkeypatch.context() as patch:
        patch.setattr(logger, "open", refuse, raising=False)
        with pytest.raises(UserError, match=f"{os.strerror(code)}.*--run-dir"):
            logger.create_run_dir(str(tmp_path), "reach-v3", "s", 0)


def test_config_says_what_a_reader_needs(tmp_path):
    logger.write_config(tmp_path, GOOD, script="furl_sac_state", vlm_id="mini-1")
    config = logger.read_config(tmp_path)
    as_json = json.loads(json.dumps(dataclasses.asdict(GOOD)))
    assert config["args"] == as_json
    assert (config["script"], config["vlm_id"]) == ("furl_sac_state", "mini-1")
    assert config["versions"]["numpy"] == np.__version__
    assert config["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert config["cpu_count"] == os.cpu_count() and config["commit"] and config["command"]
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"], "no temporary file stays"


# ------------------------------------------------------------------------------ metrics


def make_logger(run_dir: Path, **kwargs) -> Logger:
    options = {"track": False, "project": "furl", "total_timesteps": 1000, **kwargs}
    return Logger(run_dir, {}, **options)


def test_metrics_are_in_long_form(tmp_path):
    log = make_logger(tmp_path)
    log.log(100, {"losses/q": 0.5, "charts/relaying": True})
    # Each row is there at once, not only when the run ends.
    assert (tmp_path / "metrics.csv").read_text() == (
        "env_steps,key,value\n100,losses/q,0.5\n100,charts/relaying,1\n"
    )
    log.log(200, {"losses/q": np.float32(1) / 3, "charts/num_updates": 12_345_678})
    log.close()
    assert rows_of(tmp_path)[3:] == [
        ["200", "losses/q", "0.33333334"], ["200", "charts/num_updates", "12345678"]
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path):
    log = make_logger(tmp_path)
    for env_steps in (100, 200, 300, 400):
        log.log(env_steps, {"losses/q": env_steps / 1000, "eval/return": 1.0})
    log.close()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("500,losses/q")  # the row that a kill cut off
    log = make_logger(tmp_path, resume_from=200)
    log.log(300, {"losses/q": 0.9})
    log.close()
    assert rows_of(tmp_path) == [
        ["env_steps", "key", "value"],
        ["100", "losses/q", "0.1"], ["100", "eval/return", "1"],
        ["200", "losses/q", "0.2"], ["200", "eval/return", "1"],
        ["300", "losses/q", "0.9"],
    ]


@pytest.mark.parametrize("left", [None, "", "env_st", "env_steps,key,value\n"])
def test_a_metrics_file_of_a_run_that_died_early(tmp_path, left):
    if left is not None:
        (tmp_path / "metrics.csv").write_text(left)
    log = make_logger(tmp_path, resume_from=0)
    log.log(4, {"a": 1.0})
    log.close()
    assert rows_of(tmp_path) == [["env_steps", "key", "value"], ["4", "a", "1"]]


@pytest.mark.parametrize(("seconds", "text"), [
    (-1, "0s"), (0, "0s"), (12.4, "12s"), (59.6, "1m00s"), (200, "3m20s"), (3599.7, "1h00m"),
    (3725, "1h02m"), (360_000, "100h00m"),
])
def test_durations(seconds, text):
    assert logger.format_duration(seconds) == text


def test_first_not_finite():
    assert logger.first_not_finite({"a": 1.0, "b": np.float32(2)}) is None
    assert logger.first_not_finite({"a": 1.0, "b": np.nan, "c": np.inf}) == "b"


class Clock:
    """time.monotonic, told what to say."""

    def __init__(self, monkeypatch):
        self.now = 50.0
        monkeypatch.setattr(logger.time, "monotonic", lambda: self.now)


def test_live_line_in_a_file(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    log = make_logger(tmp_path, total_timesteps=10_000)
    log.live(0)
    clock.now += 100
    assert log.speed(2500) == 25
    log.live(2500, **{"steps/s": "25", "phase": "relay"})
    log.live(5000)
    log.close()
    # 2,500 steps in 100 s: the other 7,500 take 300 s.
    assert capsys.readouterr().out == (
        "        0/10,000\n"
        "    2,500/10,000 | steps/s 25 | phase relay | ETA 5m00s\n"
        "    5,000/10,000 | ETA 3m20s\n"
    )


def test_eta_follows_the_speed_of_late(tmp_path, monkeypatch, capsys):
    """A fast phase of random actions does not promise that the rest is fast."""
    clock = Clock(monkeypatch)
    log = make_logger(tmp_path, total_timesteps=110_000)
    for row in range(1, 11):
        clock.now += 1 if row <= 5 else 10
        log.speed(1000 * row)
    log.live(10_000)
    log.close()
    minutes = int(capsys.readouterr().out.split("ETA ")[1].split("m")[0])
    assert 13 <= minutes <= 16  # at the last rows' 10 s each: 16m40s; by the mean of all rows: 9m


def test_live_line_on_a_terminal_overwrites_itself(tmp_path, monkeypatch, capsys):
    log = make_logger(tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(logger.shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))
    log.speed(500)
    log.live(500, phase="a phase with a rather long name")
    log.live(500)
    log.say("a line of its own")
    log.close()
    lines, rest = capsys.readouterr().out.split("\n", 1)
    first, second = lines.removeprefix("\r").split("\r")
    assert len(first) == 39, "cut to the terminal's width"
    assert len(second) == 39 and second.strip().startswith("500/1,000 | ETA"), "covers the first"
    assert rest == "a line of its own\n"


def test_eta_and_speed_of_a_resumed_run_count_from_the_checkpoint(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    log = make_logger(tmp_path, resume_from=600)
    clock.now += 10
    assert log.speed(700) == 10
    log.live(700)
    clock.now += 2
    assert log.speed(740) == 20
    log.close()
    assert capsys.readouterr().out.endswith("| ETA 30s\n")


# ---------------------------------------------------------------------------------- run


def small_ring() -> replay.Ring:
    return replay.init_ring({"id": np.zeros((), np.int32)}, 8)


def start(tmp_path: Path, **changes) -> Run:
    args = replace(GOOD, run_dir=str(tmp_path / "run"), **changes)
    return start_run(args, "furl_sac_state", {"replay": small_ring()}, vlm_id="mini-1")


def test_start_run_writes_config_and_says_where(tmp_path, capsys):
    run = start(tmp_path)
    run.log_evaluation(100, {"eval/success_once": 0.0, "eval/success_at_end": 0.0})
    run.close()
    out = capsys.readouterr().out
    assert f"run folder: {tmp_path / 'run'}" in out and "vlm_id: mini-1" in out
    config = logger.read_config(tmp_path / "run")
    assert config["script"] == "furl_sac_state" and config["jax_devices"]
    with pytest.raises(UserError, match="already holds a run"):
        start(tmp_path)


def test_a_run_refused_for_want_of_space_leaves_its_folder_free(tmp_path, monkeypatch):
    usage = logger.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(UserError, match="GiB are free"):
            start(tmp_path)
    start(tmp_path).close()


@pytest.mark.parametrize(("every", "due"), [
    (100, [100, 200, 300, 400]), (6, [8, 12, 20, 24]), (0, [400]), (1000, [400]),
])
def test_is_due_after_each_multiple_and_at_the_end(tmp_path, every, due):
    run = Run(GOOD, tmp_path, {})
    steps = range(4, 401, 4)
    assert [s for s in steps if run.is_due(every, s) and (every != 6 or s < 28)] == due


def test_training_rows_and_success_of_finished_episodes(tmp_path, capsys):
    run = start(tmp_path)
    yes, no = True, False
    run.count_episodes(np.array([yes, no, no, no]), np.array([no, no, no, no]))
    run.count_episodes(np.array([no, no, no, yes]), np.array([yes, yes, no, yes]))  # 2 of 3
    run.log_evaluation(100, {"eval/success_once": jnp.float32(1), "eval/success_at_end": 0.5})
    run.log_training(100, "relay", {"losses/q": jnp.array(0.25), "charts/relaying": True})
    run.log_training(200, "aligned", {"losses/q": jnp.array(0.5)})  # no episode has ended since
    run.close()
    rows = {(int(step), key): float(value) for step, key, value in rows_of(run.dir)[1:]}
    assert rows[100, "charts/success_once"] == pytest.approx(2 / 3)
    assert (200, "charts/success_once") not in rows
    assert rows[100, "losses/q"] == 0.25 and rows[200, "losses/q"] == 0.5
    assert rows[100, "charts/relaying"] == 1 and rows[100, "eval/success_once"] == 1
    assert rows[200, "time/steps_per_second"] > 0
    lines = capsys.readouterr().out.splitlines()
    [first] = [line for line in lines if "100/400" in line]
    assert "success: train 67% | eval 100% | phase relay" in first
    assert lines[-1] == (
        f"final policy: success_once 100%, success_at_end 50%; run folder: {run.dir}"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_run_ends_with_the_metrics_name(tmp_path, value):
    run = start(tmp_path)
    with pytest.raises(UserError, match=r"losses/q is (nan|inf) at step 100: the run has diverged"):
        run.log_training(100, "relay", {"losses/alpha": 1.0, "losses/q": value})
    run.close()
    assert len(rows_of(run.dir)) <= 1, "nothing of that row is written"


def test_a_run_is_resumed_with_its_counts(tmp_path, capsys):
    run = start(tmp_path)
    ring = replay.add_rows(small_ring(), {"id": np.arange(3, dtype=np.int32)})
    run.count_episodes(np.array([True, False, False, False]), np.zeros(4, bool))
    run.count_episodes(np.zeros(4, bool), np.array([False, True, False, False]))
    run.log_evaluation(100, {"eval/success_once": 1.0, "eval/success_at_end": 1.0})
    run.save(100, {"w": jnp.ones(2)}, {"replay": ring}, {"obs": np.arange(4.0)})
    run.log_evaluation(200, {"eval/success_once": 0.0, "eval/success_at_end": 0.0})
    run.close()

    args = cli.parse_args(Args, ["--resume", str(run.dir)])
    resumed = start_run(args, "furl_sac_state", {"replay": small_ring()})
    assert resumed.dir == run.dir
    tree, rings, host = resumed.load({"w": jnp.zeros(2)}, {"replay": small_ring()})
    np.testing.assert_array_equal(tree["w"], 1)
    np.testing.assert_array_equal(rings["replay"].data["id"], [0, 1, 2, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(host["obs"], np.arange(4.0))
    assert "resumed at 100 steps" in capsys.readouterr().out
    # The first environment has succeeded before the checkpoint and is cut off now: 1 of 2.
    resumed.count_episodes(np.zeros(4, bool), np.array([True, False, False, False]))
    resumed.log_training(200, "relay", {})
    resumed.close()
    rows = {(int(step), key): float(value) for step, key, value in rows_of(run.dir)[1:]}
    assert rows[200, "charts/success_once"] == 0.5
    assert (200, "eval/success_once") not in rows, "the killed run's row"
    assert rows[100, "eval/success_once"] == 1


def test_video_paths(tmp_path):
    assert Run(GOOD, tmp_path, {}).video_path(5000) is None
    run = Run(replace(GOOD, capture_video=True), tmp_path, {})
    assert run.video_path(5000) == tmp_path / "videos/00005000.mp4"
