"""The command line, the run folder and its records: what is refused, and what is written."""

import contextlib
import csv
import dataclasses
import errno
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common.run
import furl_sac_state
from common import checkpoint, cli, flags, logger, replay, run_folder, system, versions
from common.envs.registry import METAWORLD
from common.envs.workers import Step, WorkerError
from common.errors import ShortageError, UserError, first_line
from common.logger import Logger
from common.replay import Sizes
from common.run import Run, start_run
from common.run_folder import kept_policies
from furl_sac_state import Args

GOOD = Args(env_id="drawer-open-v3", num_envs=4, total_timesteps=400, log_every=100)


def checked(args: Args) -> Args:
    """What a script on Meta-World does first."""
    args = flags.check_args(args, METAWORLD)
    flags.check_replay(args, args.buffer_size, args.learning_starts)
    METAWORLD.check_camera(args.camera_id)
    return args


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The current folder is empty, so that no test looks at, or writes, the checkout's runs/."""
    monkeypatch.chdir(tmp_path)


def rows_of(run_dir: Path) -> list[list[str]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.reader(file))


# ------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(("change", "flag"), [
    ({"num_envs": 0}, "--num-envs"),
    ({"num_envs": -1}, "--num-envs"),
    ({"num_envs": 2**31}, "--num-envs"),
    ({"total_timesteps": 0}, "--total-timesteps"),
    ({"total_timesteps": 2**31}, "--total-timesteps"),
    ({"total_timesteps": 2**31 - 1}, "--total-timesteps"),  # whole iterations are one step more
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
    ({"utd": math.nan}, "--utd"),
    ({"utd": math.inf}, "--utd"),
    ({"buffer_size": 0}, "--buffer-size"),
    ({"buffer_size": 3}, "--buffer-size"),
    ({"batch_size": 0}, "--batch-size"),
    ({"batch_size": 2**31}, "--batch-size"),
    ({"learning_rate": 0.0}, "--learning-rate"),
    ({"learning_rate": math.nan}, "--learning-rate"),
    ({"learning_rate": math.inf}, "--learning-rate"),
    ({"gamma": 1.01}, "--gamma"),
    ({"gamma": -0.1}, "--gamma"),
    ({"tau": 0.0}, "--tau"),
    ({"tau": 1.5}, "--tau"),
    ({"init_temperature": 0.0}, "--init-temperature"),
    ({"init_q": math.nan}, "--init-q"),
    ({"init_q": -math.inf}, "--init-q"),
    ({"hidden_features": ()}, "--hidden-features"),
    ({"hidden_features": (256, 0)}, "--hidden-features"),
    ({"projection_features": (-64,)}, "--projection-features"),
    ({"rho": -0.1}, "--rho"),
    ({"rho": math.nan}, "--rho"),
    ({"lag": 0}, "--lag"),
    ({"reward_margin": -0.1}, "--reward-margin"),
    ({"l2_margin": -0.1}, "--l2-margin"),
    ({"embedding_buffer_size": 0}, "--embedding-buffer-size"),
    ({"relay_periods": ()}, "--relay-periods"),
    ({"relay_periods": (50, 0)}, "--relay-periods"),
    ({"relay_until": -1}, "--relay-until"),
    ({"relay_noise": -0.1}, "--relay-noise"),
])
def test_a_value_that_cannot_work_is_named(change, flag):
    with pytest.raises(UserError, match=rf"{flag}(\s|$)") as caught:
        checked(replace(GOOD, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    {}, {"rho": 0.0}, {"seed": 0}, {"checkpoint_every": 0}, {"eval_episodes": 0},
    {"learning_starts": 0}, {"relay_until": 0}, {"reward_margin": 0.0}, {"l2_margin": 0.0},
    {"gamma": 1.0}, {"tau": 1.0}, {"utd": 0.5}, {"utd": 0.25}, {"buffer_size": 4},
    {"relay_noise": 0.0}, {"init_q": -100.0}, {"lag": 1}, {"camera_id": 0}, {"camera_id": 6},
    {"total_timesteps": 2**31 - 4}, {"hidden_features": (1,)},
    {"num_envs": 10, "utd": 0.3},  # 3 updates, though not in binary
])
def test_values_at_their_limits_work(change):
    assert checked(replace(GOOD, **change)) == replace(GOOD, **change)


@dataclass(frozen=True)
class MyArgs(Args):
    """The flags of a user's own script: plain types may have any value, others have ranges."""

    count: int = 1
    weight: float = 1.0
    word: str = "x"
    on: bool = False
    numbers: tuple[int, ...] = (1,)
    reals: tuple[float, ...] = (1.0,)
    words: tuple[str, ...] = ("x",)
    share: flags.Share = 0.5
    widths: flags.PositiveInts = (1,)


@pytest.mark.parametrize(("name", "value"), [
    ("count", 0), ("count", -1), ("count", 2**40), ("weight", 0.0), ("weight", -1.0),
    ("weight", math.nan), ("weight", math.inf), ("word", ""), ("word", "a b"), ("on", True),
    ("numbers", ()), ("numbers", (0, -1)), ("reals", ()), ("reals", (math.nan, -1.0)),
    ("words", ()), ("words", ("",)),
])
def test_a_users_own_flag_of_a_plain_type_is_never_refused(name, value):
    assert getattr(checked(MyArgs(num_envs=4, **{name: value})), name) is value


@pytest.mark.parametrize(("name", "value"), [
    ("share", -0.1), ("share", 1.1), ("share", math.nan), ("widths", ()), ("widths", (1, 0)),
])
def test_a_users_own_flag_has_the_range_of_its_type(name, value):
    with pytest.raises(UserError, match=f"^--{name} must"):
        checked(MyArgs(num_envs=4, **{name: value}))


def test_a_users_own_flags_on_the_command_line():
    args = cli.parse_args(MyArgs, ["--count", "-3", "--weight", "nan", "--numbers", "0", "-1"])
    assert (args.count, args.numbers) == (-3, (0, -1)) and math.isnan(args.weight)


@pytest.mark.parametrize(("change", "flag"), [
    ({"buffer_size": 1999}, "--buffer-size"),  # four environments of 500 steps
    ({"embedding_buffer_size": 499}, "--embedding-buffer-size"),
])
def test_buffers_that_are_too_small_for_whole_episodes(change, flag):
    least = {"buffer_size": 2000, "embedding_buffer_size": 500}

    def check(args: Args) -> None:
        flags.check_replay(args, args.buffer_size, args.learning_starts, 500)
        furl_sac_state.check_flags(args, 500)

    check(replace(GOOD, **least))
    with pytest.raises(UserError, match=f"^{flag} must hold an episode"):
        check(replace(GOOD, **least | change))


@pytest.mark.parametrize(("utd", "num_envs", "message"), [
    (0.3333333, 3, None), (2 / 3, 3, None), (1.0, 1, None),
    (0.333, 3, "gives 0.999 updates .* as with --utd 0.3333333333333333"),
    (0.1, 4, "gives 0.4 updates .* as with --utd 0.25"), (math.nan, 4, "as with --utd 0.25"),
])
def test_what_utd_would_work_is_said(utd, num_envs, message):
    args = replace(GOOD, utd=utd, num_envs=num_envs, total_timesteps=num_envs)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        assert flags.check_args(args, METAWORLD).updates_per_iteration == round(utd * num_envs)


@pytest.mark.parametrize(("stored", "flag"), [
    ({"seed": "0"}, "seed"), ({"env_id": 5}, "env_id"), ({"total_timesteps": None}, "total"),
    ({"num_envs": 1.5}, "--num-envs 1.5"), ({"relay": 1}, "--relay 1"), ({"tau": "x"}, "--tau"),
    ({"relay_periods": [50, "x"]}, "--relay-periods"), ({"goal": "any"}, "--goal 'any'"),
    ({"relay_periods": 50}, "--relay-periods 50"), ({"tau": True}, "--tau True"),
])
def test_a_wrongly_typed_config_is_one_line(stored, flag, tmp_path):
    config = {"script": "furl_sac_state", "args": dataclasses.asdict(GOOD)}
    for args in (config["args"], config["args"] | stored):
        (tmp_path / "config.json").write_text(json.dumps(config | {"args": args}))
        if args is config["args"]:
            assert cli.parse_args(Args, ["--resume", str(tmp_path)]).resume == str(tmp_path)
            continue
        with pytest.raises(UserError, match=f"its config.json .*{flag}"):
            cli.parse_args(Args, ["--resume", str(tmp_path)])


def test_help_in_a_narrow_terminal(monkeypatch, capsys):
    """Of five columns; tyro would lay out its table in no width at all."""
    monkeypatch.setenv("COLUMNS", "5")
    with pytest.raises(SystemExit) as stop:
        flags.parse(Args, ["--help"])
    assert stop.value.code == 0
    assert "--learning-starts" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "message"), [
    ({"lag": 500}, "--lag must be below the length of an episode, 500, not 500"),
    ({"embedding_buffer_size": 1000, "stage2_after": 981}, "--stage2-after must be at most 980"),
])
def test_an_alignment_that_could_not_begin(change, message, capsys):
    for good in ({"lag": 499}, {"embedding_buffer_size": 1000, "stage2_after": 980}):
        furl_sac_state.check_flags(replace(GOOD, **good), 500)
    with pytest.raises(UserError, match=message):
        furl_sac_state.check_flags(replace(GOOD, **change), 500)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("change", "note"), [
    ({"align": False, "lag": 500, "stage2_after": 9}, "beside --no-align: --stage2-after, --lag"),
    ({"relay": False, "relay_until": 5}, "beside --no-relay: --relay-until"),
    ({"goal_image": False, "l2_margin": 0.3}, "beside --no-goal-image: --l2-margin"),
    ({"stage2": False, "lag": 5}, "beside --no-stage2: --lag"),
    ({"stage2": False, "goal_image": False}, "leave nothing to align with"),
    ({"align": False, "relay": False}, ""),
    ({"align": False, "stage2": False, "lag": 5}, "beside --no-align: --lag"),
])
def test_flags_that_others_switch_off_are_named(change, note, capsys):
    furl_sac_state.check_flags(replace(GOOD, **change), 500)
    out = capsys.readouterr().out
    assert note in out and len(out.splitlines()) == bool(note)


@pytest.mark.parametrize(("total", "starts", "untrained"), [
    (400, 10_000, True), (400, 400, True), (404, 400, False), (4, 0, True), (8, 0, False),
])
def test_a_run_that_trains_nothing_says_so(total, starts, untrained, capsys):
    """With four environments: the first update comes after the first action beyond the start."""
    flags.check_replay(replace(GOOD, total_timesteps=total), GOOD.buffer_size, starts)
    assert ("nothing is trained: --total-timesteps" in capsys.readouterr().out) == untrained


@dataclass(frozen=True)
class RepeatingArgs(Args):
    action_repeat: int = 2

    @property
    def steps_per_iteration(self) -> int:
        return self.num_envs * self.action_repeat


@pytest.mark.parametrize(("args", "whole", "iteration"), [
    (Args(num_envs=12), 1_000_008, 12),
    (replace(GOOD, total_timesteps=1), 4, 4),
    (replace(GOOD, total_timesteps=402), 404, 4),
    (RepeatingArgs(num_envs=4, total_timesteps=404), 408, 8),
])
def test_steps_are_rounded_up_to_whole_iterations(args, whole, iteration, capsys):
    assert flags.check_args(args, METAWORLD) == replace(args, total_timesteps=whole)
    assert capsys.readouterr().out == (
        f"note: --total-timesteps {args.total_timesteps} becomes {whole}, whole iterations of "
        f"{iteration} steps\n"
    )
    args = replace(args, total_timesteps=whole)
    assert flags.check_args(args, METAWORLD).total_timesteps == whole
    assert capsys.readouterr().out == "", "nothing is rounded, so nothing is said"


@pytest.mark.parametrize(("flags", "message"), [
    (["--run-dir", "checkpointed"], "checkpointed already holds a run"),
    (["--run-dir", "measured"], "measured already holds a run"),
    (["--run-dir", "file"], "file is not a free folder"),
    (["--run-dir", "file/below"], "file/below"),
    (["--run-dir", "new/\0"], "null"),
    (["--run-dir", "/proc/run"], "cannot write the run folder /proc/run"),
    (["--camera-id", "7"], "unknown camera 7; this task has 0 (topview)"),
    (["--camera-id", "-1"], "--camera-id must be 0 or more"),
    (["--buffer-size", "3999"], "--buffer-size must hold an episode of each of 8"),
    (["--embedding-buffer-size", "499"], "--embedding-buffer-size must hold an episode"),
    (["--env-id", "drawer-opn-v3"], "did you mean drawer-open-v3"),
    (["--num-envs", "-8"], "--num-envs"),
    (["--utd", "0.3"], "--utd 0.3 x --num-envs 8"),
    (["--resume", "/nowhere"], "no such folder"),
])
def test_what_cannot_work_is_refused_before_anything_is_built(
    flags, message, tmp_path, monkeypatch, refused
):
    for trace in ("checkpointed/checkpoints/step_0000000000/x", "checkpointed/config.json",
                  "measured/config.json", "measured/metrics.csv", "file"):
        (tmp_path / trace).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / trace).write_text("env_steps,key,value\n0,eval/return,1\n")
    content = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def build(*args, **kwargs):
        raise AssertionError("something is built")

    for name in ("load_vlm", "load_inputs", "Evaluator", "start_run"):
        monkeypatch.setattr(furl_sac_state, name, build)
    monkeypatch.setattr(furl_sac_state, "METAWORLD", replace(METAWORLD, make_vec=build))
    refused(furl_sac_state, flags, message)
    assert content == {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(AssertionError, match="something is built"):  # what would be next
        furl_sac_state.main(GOOD)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_default_run_folder_that_cannot_be_written(tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"folder runs: {os.strerror(code)}.*--run-dir"):
        flags.check_args(GOOD, METAWORLD)
    flags.check_args(replace(GOOD, resume="its own folder"), METAWORLD)


def test_the_task_gets_its_full_name():
    for name in ("drawer-open", "drawer-open-v2", "drawer-open-v3"):
        assert flags.check_args(replace(GOOD, env_id=name), METAWORLD).env_id == "drawer-open-v3"
    with pytest.raises(UserError, match="drawer-open-v3"):
        flags.check_args(replace(GOOD, env_id="drawer-opne-v3"), METAWORLD)


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
    args = replace(GOOD, hidden_features=(64, 32), prompt="Open it.")
    run_folder.write_config(run_dir, args, script="furl_sac_state")
    return run_dir


def change_config(run_dir: Path, change) -> None:
    """Let `change` modify the stored configuration."""
    config = json.loads((run_dir / "config.json").read_text())
    change(config)
    (run_dir / "config.json").write_text(json.dumps(config))


def test_a_resumed_run_has_the_stored_arguments(stored):
    expected = replace(GOOD, hidden_features=(64, 32), prompt="Open it.", resume=str(stored))
    assert cli.parse_args(Args, ["--resume", str(stored)]) == expected
    assert cli.parse_args(Args, [f"--resume={stored}"]) == expected
    # Saying again what is so already is no change.
    again = ["--seed", "0", "--hidden-features", "64", "32", "--env-id",
             GOOD.env_id.replace("-v3", "-v2")]
    assert cli.parse_args(Args, ["--resume", str(stored), *again]) == expected


def test_what_a_resumed_run_may_change(stored):
    args = cli.parse_args(Args, [
        "--resume", str(stored), "--total-timesteps", "800", "--eval-every", "7", "--log-every",
        "8", "--checkpoint-every", "9", "--capture-video", "--track", "--wandb-project", "other",
        "--wandb-entity", "us", "--drop-replay",
    ])
    assert args == replace(
        GOOD, hidden_features=(64, 32), prompt="Open it.", resume=str(stored), total_timesteps=800,
        eval_every=7, log_every=8, checkpoint_every=9, capture_video=True, track=True,
        wandb_project="other", wandb_entity="us", drop_replay=True,
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
    for script in ("sac_baseline", "my_idea", None):
        change_config(stored, lambda config, script=script: config.update(script=script))
        with pytest.raises(UserError, match=rf"is {script}\.py's, this is furl_sac_state\.py$"):
            cli.parse_args(Args, ["--resume", str(stored)])


def test_flags_that_are_newer_than_the_run_or_gone(stored, capsys):
    unchanged = cli.parse_args(Args, ["--resume", str(stored)])
    assert capsys.readouterr().out == ""

    def change(config):
        del config["args"]["relay_noise"], config["args"]["drop_replay"]
        config["args"] |= {"frame_stack": 3, "old_one": [1, 2]}

    change_config(stored, change)
    assert cli.parse_args(Args, ["--resume", str(stored)]) == unchanged
    name = f"--resume {stored}"
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f"note: {name} has flags that are gone and ignored: --frame-stack 3, --old-one [1, 2]",
        f"note: {name} was made before these flags, which take their defaults: --drop-replay, "
        "--relay-noise",
    ]
    with pytest.raises(UserError, match=r"^--relay-noise cannot change .*: it is 0\.2, not 0\.5"):
        cli.parse_args(Args, ["--resume", str(stored), "--relay-noise", "0.5"])
    assert cli.parse_args(Args, ["--resume", str(stored), "--drop-replay"]).drop_replay


# -------------------------------------------------------------------------- exit status


FULL = "error: out of memory: choose smaller batches, buffers or networks\n"


@pytest.mark.parametrize(("error", "message", "status"), [
    (UserError("--rho must not be negative"), "error: --rho must not be negative\n", 2),
    (OSError(errno.ENOSPC, "No space left on device", "state.npz"),
     "error: No space left on device: state.npz; what was saved is safe\n", 1),
    (ShortageError("no memory now"), "error: no memory now\n", 1),
    (OSError(errno.EROFS, "Read-only file system"),
     "error: Read-only file system: the run folder; what was saved is safe\n", 2),
    (OSError(errno.ENAMETOOLONG, "File name too long", "aa"),
     "error: File name too long: aa; what was saved is safe\n", 2),
    (MemoryError(), FULL, 1),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), FULL, 1),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), FULL, 1),
    (WorkerError("a worker has died"), "error: a worker has died; what was saved is safe\n", 1),
    (KeyboardInterrupt(), "error: interrupted\n", 130),
])
def test_what_is_no_bug_is_one_line_and_a_status(monkeypatch, capsys, error, message, status):
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["furl_sac_state.py"])
    with pytest.raises(SystemExit) as caught:
        cli.run_script(main, Args)
    assert caught.value.code == status
    assert capsys.readouterr().err == message


def python(code: str, **variables: str) -> str:
    """What `python -c code` prints with these variables set."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                            env=os.environ | variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.decode()


def test_drawing_variables_that_are_set_otherwise():
    code = "import common, mujoco, os; print(os.environ['MUJOCO_GL'])"
    assert python(code, MUJOCO_GL="osmesa", PYOPENGL_PLATFORM="osmesa") == f"{system.GL}\n"


def test_locales_and_encodings_that_are_not_utf8(tmp_path):
    """Files are UTF-8 all the same; what cannot be printed is a question mark."""
    code = (f"import common; from pathlib import Path; path = Path({str(tmp_path / 'file')!r});"
            "path.write_text('\\u2013'); print(path.read_text() + ' x')")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert python(code, PYTHONIOENCODING="ascii", **plain) == "? x\n"
    assert python(code, **plain) == "? x\n"
    assert (tmp_path / "file").read_bytes() == "\u2013".encode()


def test_closed_standard_streams(tmp_path):
    """What is opened next is not taken for them, nor in a process of its own."""
    code = ("import common, subprocess, sys; file = open('file', 'w'); print('lost');"
            "assert sys.stdin.read() == '' and not sys.stdout.isatty();"
            "subprocess.run(['sh', '-c', 'echo lost, too'], check=True); file.write('kept')")
    subprocess.run(["sh", "-c", '"$0" -c "$1" <&- >&-', sys.executable, code], cwd=tmp_path,
                   env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_device_that_is_not_there_names_the_variable(monkeypatch):
    def none():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", none)
    cli.check_device()
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=cuda: JAX finds no such device here"):
        cli.check_device()


def test_the_commit_is_this_repositorys(tmp_path, monkeypatch):
    expected = versions.git_commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert versions.git_commit() == expected


def test_a_commit_does_not_hold_code_that_is_new(tmp_path, monkeypatch):
    """A copy of a script that git does not track, unless it is not what runs."""
    (tmp_path / "common").mkdir()
    for file in ("common/versions.py", "copy.py", "other.py"):
        (tmp_path / file).write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "common"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "common/versions.py"))
    assert re.fullmatch("[0-9a-f]{40}", versions.git_commit())
    copy = types.ModuleType("copy_of_a_script")
    copy.__file__ = str(tmp_path / "copy.py")
    monkeypatch.setitem(sys.modules, "copy_of_a_script", copy)
    assert versions.git_commit().endswith("+dirty")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "second"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", versions.git_commit())


@pytest.mark.parametrize("error", [
    ValueError("a bug"), RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "a bug"),
])
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


def test_the_default_run_folder():
    path = run_folder.create_run_dir(None, "drawer-open-v3", "furl_sac_state", 7)
    assert path.parent == Path("runs") and path.is_dir()
    assert path.name.startswith("drawer-open-v3__furl_sac_state__7__")


@pytest.mark.parametrize("trace", ["checkpoints/step_0000000000/manifest.json", "metrics.csv"])
def test_a_folder_holds_one_run(tmp_path, trace):
    path = run_folder.create_run_dir(str(tmp_path / "a/b"), "reach-v3", "s", 0)
    for _ in range(2):  # while it runs, and after
        with pytest.raises(UserError, match=r"already holds a run.*--resume.*--run-dir"):
            run_folder.create_run_dir(str(path), "reach-v3", "s", 0)
        (path / trace).parent.mkdir(parents=True, exist_ok=True)
        (path / trace).write_text("env_steps,key,value\n0,eval/return,1\n")
        run_folder.unlock_run_dir(path)


def test_a_run_that_died_before_its_first_checkpoint_leaves_its_folder_free(tmp_path):
    path = run_folder.create_run_dir(str(tmp_path), "reach-v3", "s", 0)
    (path / "metrics.csv").write_text("env_steps,key,value\n")
    run_folder.unlock_run_dir(path)
    assert run_folder.create_run_dir(str(tmp_path), "reach-v3", "s", 0) == path


@pytest.mark.parametrize("left", [
    "checkpoints/step_0000000100/manifest.json", "policies/0000000100.npz", "metrics.csv"])
def test_what_another_run_left_is_not_taken_for_the_new_ones(left, tmp_path):
    """Also where its config.json is gone."""
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("env_steps,key,value\n100,eval/return,1\n")
    with pytest.raises(UserError, match="already holds a run"):
        run_folder.create_run_dir(str(tmp_path), "reach-v3", "s", 0)


def test_of_two_runs_started_at_once_one_gets_the_folder(tmp_path):
    run_folder.create_run_dir(str(tmp_path), "reach-v3", "s", 0)
    code = ("import sys; from common.run_folder import create_run_dir;"
            "create_run_dir(sys.argv[1], 'reach-v3', 's', 0)")
    root = Path(cli.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root,
                            capture_output=True, text=True, timeout=120)
    assert "is in use by another process" in result.stderr, result.stderr
    run_folder.unlock_run_dir(tmp_path)
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
        save(run, 100, {"actor": {"w": jnp.array([1.0, value])}}, Rings(small_ring()))
    assert not (run.dir / "checkpoints").exists()


def test_a_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in ("file", "file/below"):
        with pytest.raises(UserError, match="--run-dir"):
            run_folder.create_run_dir(str(tmp_path / path), "reach-v3", "s", 0)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_run_folder_that_cannot_be_written(tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(UserError, match=f"{os.strerror(code)}.*--run-dir"):
            run_folder.create_run_dir(str(tmp_path / "new"), "reach-v3", "s", 0)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "open", refuse, raising=False)
        with pytest.raises(UserError, match=f"{os.strerror(code)}.*--run-dir"):
            run_folder.create_run_dir(str(tmp_path), "reach-v3", "s", 0)


def test_config_says_what_a_reader_needs(tmp_path):
    run_folder.write_config(tmp_path, GOOD, script="furl_sac_state", vlm_id="mini-1")
    config = run_folder.read_config(tmp_path)
    as_json = json.loads(json.dumps(dataclasses.asdict(GOOD)))
    assert config["args"] == as_json
    assert (config["script"], config["vlm_id"]) == ("furl_sac_state", "mini-1")
    assert config["versions"]["numpy"] == np.__version__
    assert config["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert config["cpu_count"] == os.cpu_count() and config["commit"] and config["command"]
    assert len(bytes.fromhex(config["run_id"])) == 4
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"], "no temporary file stays"


# ------------------------------------------------------------------------------ metrics


def make_logger(run_dir: Path, total_timesteps: int = 1000, **kwargs) -> Logger:
    return Logger(run_dir, {}, Args(total_timesteps=total_timesteps), **kwargs)


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
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {key: [(x.step, x.value) for x in events.Scalars(key)]
               for key in events.Tags()["scalars"]}
    assert scalars["losses/q"] == [(100, 0.5), (200, pytest.approx(1 / 3))]
    assert scalars["charts/num_updates"] == [(200, 12_345_678)]


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
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("losses/q")
    assert [(event.step, round(event.value, 4)) for event in events] == [
        (100, 0.1), (200, 0.2), (300, 0.9)]


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
    size = os.terminal_size((40, 24))
    monkeypatch.setattr(logger.shutil, "get_terminal_size", lambda *_, **__: size)
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


def test_eighty_columns_show_the_time_left(tmp_path, monkeypatch, capsys):
    log = make_logger(tmp_path, total_timesteps=1_000_000)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    size = os.terminal_size((80, 24))
    monkeypatch.setattr(logger.shutil, "get_terminal_size", lambda *_, **__: size)
    log.speed(500)
    log.live(500, **{"steps/s": "110", "success: train": "12%", "eval": "100%",
                     "phase": "aligned"})
    log.close()
    assert " | ETA " in capsys.readouterr().out


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


class Rings(NamedTuple):
    replay: replay.Ring


class Envs:
    """What a Run needs of environments: their observations, and a state to save and go on from."""

    engine, draws = "an engine", False

    def __init__(self, resumes_episodes: bool = True):
        self.resumes_episodes = resumes_episodes
        self.time = np.arange(4.0)
        self.closed = False

    def observations(self) -> np.ndarray:
        return self.time

    def get_state(self) -> dict:
        return {"time": self.time}

    def set_state(self, state: dict) -> np.ndarray:
        self.time = state["time"]
        return self.time

    def close(self) -> None:
        self.closed = True


SETTINGS = {"camera_id": 2, "quality": "fast"}


def start_with(args: Args, envs: Envs | None = None) -> Run:
    evaluate = types.SimpleNamespace(settings=SETTINGS, close=lambda: None)
    return start_run(args, Rings(small_ring()), Sizes(39, 4, 8), envs or Envs(), evaluate,
                     prompt="Go.")


def start(tmp_path: Path, **changes) -> Run:
    return start_with(replace(GOOD, run_dir=str(tmp_path / "run"), **changes))


def resume(run_dir: Path, args_type: type = Args) -> Run:
    return start_with(cli.parse_args(args_type, ["--resume", str(run_dir)]))


def begin(run: Run, envs: Envs | None = None):
    """`run.begin` with small networks and rings."""
    return run.begin({"w": jnp.zeros(2)}, Rings(small_ring()), envs or Envs())


def at(run: Run, env_steps: int) -> Run:
    """The run at the end of the iteration that ends there."""
    run.env_steps = env_steps
    return run


def log_evaluation(run: Run, env_steps: int, evaluation: dict) -> None:
    """Evaluate the policy of `env_steps` with this outcome."""
    def play(policy):
        policy(0)
        yield
        return evaluation

    run._evaluator.play, run._evaluator.steps = play, 1
    at(run, env_steps).evaluate(lambda state, obs: state["w"], {"w": jnp.ones(2)})
    run._finish_evaluation()


def save(run: Run, env_steps: int, state, buffers, envs: Envs | None = None) -> None:
    at(run, env_steps).save(state, buffers, envs or Envs())


def test_start_run_writes_config_and_says_where(tmp_path, capsys):
    run = start(tmp_path)
    log_evaluation(run, 100, {"eval/success_once": 0.0, "eval/success_at_end": 0.0})
    run.close()
    out = capsys.readouterr().out
    assert out.startswith(f"run folder: {tmp_path / 'run'}") and "prompt: Go." in out
    config = run_folder.read_config(tmp_path / "run")
    assert config["script"] == "furl_sac_state" and config["jax_devices"]
    assert config["sizes"] == {"obs": 39, "action": 4, "embedding": 8}
    assert config["evaluation"] == SETTINGS
    assert config["prompt"] == "Go." and config["engine"] == "an engine"
    script = Path(furl_sac_state.__file__)
    assert (tmp_path / "run" / script.name).read_bytes() == script.read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        start(tmp_path)


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_closes_its_environments(finished, tmp_path):
    """Whichever way it ends."""
    envs = Envs()
    run = start_with(replace(GOOD, run_dir=str(tmp_path / "run")), envs)
    assert not envs.closed
    run.close(finished)
    assert envs.closed


def test_a_run_that_is_continued_further_says_so(tmp_path, monkeypatch):
    """In its config.json, by which grids and `tools.results` tell whether it has ended."""
    monkeypatch.setattr(sys, "argv", ["a/script.py", "--total-timesteps", "400"])
    run = start(tmp_path, total_timesteps=400)
    begin(run)
    run.close()
    stored = run_folder.read_config(run.dir)
    args = cli.parse_args(Args, ["--resume", str(run.dir), "--total-timesteps", "800"])
    monkeypatch.setattr(sys, "argv", ["a/script.py", "--resume", "r", "--total-timesteps", "800"])
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=None))
    with pytest.raises(UserError, match="W&B could not start"):
        begin(start_with(replace(args, track=True)))
    assert run_folder.read_config(run.dir) == stored, "a refused --resume changes nothing"
    run = start_with(args)
    begin(run)
    run.close()
    stored["args"]["total_timesteps"] = 800
    stored["command"] = ("script.py --total-timesteps 400 && "
                         "script.py --resume r --total-timesteps 800")
    assert run_folder.read_config(run.dir) == stored


def test_a_run_is_not_resumed_for_fewer_steps_than_it_has(tmp_path):
    run = start(tmp_path, total_timesteps=400)
    save(run, 200, {}, Rings(small_ring()))
    run.close()
    args = replace(GOOD, resume=str(run.dir), total_timesteps=200)
    assert flags.check_args(args, METAWORLD).total_timesteps == 200
    with pytest.raises(UserError, match="--total-timesteps 196 is less than the 200 steps that "):
        flags.check_args(replace(args, total_timesteps=196), METAWORLD)


def test_runs_that_start_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "20260101-000000")
    runs = [start_with(GOOD) for _ in range(3)]
    name = f"{GOOD.env_id}__furl_sac_state__0__20260101-000000"
    assert [run.dir.name for run in runs] == [name, name + "-2", name + "-3"]
    for run in runs:
        run.close()
    (tmp_path / "runs").rename(tmp_path / "old")
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="is not a free folder"):
        start_with(GOOD)


def test_a_run_goes_on_with_the_vlm_it_had(tmp_path):
    """Embeddings in its replay are that one's; the number format is the machine's choice."""
    def with_vlm(args: Args, vlm_id: str) -> Run:
        evaluate = types.SimpleNamespace(settings=SETTINGS, close=lambda: None)
        vlm = types.SimpleNamespace(id=vlm_id, settings={"name": "mini"})
        return start_run(args, Rings(small_ring()), Sizes(39, 4, 8), Envs(), evaluate, vlm=vlm)

    run = with_vlm(replace(GOOD, run_dir=str(tmp_path / "run")), "rn50-1a2b-fp32")
    run.close()
    args = cli.parse_args(Args, ["--resume", str(run.dir)])
    with pytest.raises(UserError, match="was trained with the VLM rn50-1a2b-fp32, this one"):
        with_vlm(args, "rn50-3c4d-fp32")
    with_vlm(args, "rn50-1a2b-bf16").close()


def test_the_script_is_the_file_that_defines_args(tmp_path, monkeypatch, capsys):
    """A user's copy gives its runs its own name, and a run says if it has changed since."""
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts/my_idea.py"
    script.write_text("from dataclasses import dataclass\n\nimport furl_sac_state\n\n\n"
                      "@dataclass(frozen=True)\nclass Args(furl_sac_state.Args):\n    x: int = 0\n")
    monkeypatch.syspath_prepend(script.parent)
    my_idea = importlib.import_module("my_idea")
    monkeypatch.delitem(sys.modules, "my_idea")  # afterwards
    monkeypatch.setitem(sys.modules, "my_idea", my_idea)

    run = start_with(my_idea.Args(run_dir=str(tmp_path / "run"), num_envs=4))
    begin(run)
    run.close()
    config = run_folder.read_config(run.dir)
    assert config["script"] == "my_idea"
    assert config["script_sha256"] == hashlib.sha256(script.read_bytes()).hexdigest()
    kept = run.dir / "my_idea.py"
    assert kept.read_bytes() == script.read_bytes()
    with pytest.raises(UserError, match=r"is my_idea\.py's, this is furl_sac_state\.py"):
        cli.parse_args(Args, ["--resume", str(run.dir)])

    def go_on() -> str:
        resumed = resume(run.dir, my_idea.Args)
        begin(resumed)
        resumed.close()
        return capsys.readouterr().out

    assert "has changed" not in go_on()
    assert run_folder.read_config(run.dir) == config
    before = kept.read_bytes()
    script.write_text(script.read_text() + "# new\n")
    [line] = [x for x in go_on().splitlines() if "has changed" in x]
    assert line == f"note: my_idea.py has changed since this run began; {kept} is what it was"
    assert kept.read_bytes() == before, "the run folder keeps what the run began with"
    go_on()  # as the last time, which is no other change
    changed = hashlib.sha256(script.read_bytes()).hexdigest()
    continued = {"continued": [{"env_steps": 0, "script_sha256": changed}]}
    assert run_folder.read_config(run.dir) == config | continued
    older = {key: value for key, value in config.items() if key != "script_sha256"}
    run_folder.store_config(run.dir, older)
    go_on()
    assert run_folder.read_config(run.dir) == config | continued, "it is the kept copy's"
    script.write_bytes(before)
    go_on()
    assert run_folder.read_config(run.dir) == config, "nothing was done in between"
    resumed = at(resume(run.dir, my_idea.Args), run.args.total_timesteps)
    script.write_text("# new\n" + script.read_text())
    resumed.save({"w": jnp.zeros(2)}, Rings(small_ring()), Envs())
    resumed.close()
    go_on()
    assert run_folder.read_config(run.dir) == config, "nor after the end"


def test_args_without_a_file(tmp_path):
    """As in a notebook: there is nothing to copy, and the run has a name all the same."""
    args_type = dataclasses.make_dataclass("Args", [], bases=(Args,), frozen=True)
    args_type.__module__ = "nowhere"
    assert cli.source_file(args_type) is None
    run = start_with(args_type(run_dir=str(tmp_path / "run"), num_envs=4))
    run.close()
    assert run_folder.read_config(run.dir)["script"] == "interactive"
    assert not list(run.dir.glob("*.py"))


def test_wandb_gets_an_id_that_is_the_runs_own(tmp_path, monkeypatch):
    """Folders of one name in two places are two runs; a resumed run goes on with its curve."""
    begun, ended = [], []

    def init(**kwargs):
        begun.append(kwargs)
        return types.SimpleNamespace(define_metric=lambda *a, **k: None,
                                     finish=lambda exit_code: ended.append(exit_code))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for parent in ("a", "b"):
        run = start(tmp_path / parent, track=True)
        begin(run)
        run.close()
    resumed = resume(run.dir)
    begin(resumed)
    resumed.close(finished=False)
    first, second, third = (kwargs["id"] for kwargs in begun)
    assert [kwargs["name"] for kwargs in begun] == ["run"] * 3
    assert ended == [0, 0, 1], "what has stopped is not to be taken for finished"
    assert first != second and second == third == run_folder.read_config(run.dir)["run_id"]
    assert all(kwargs["resume"] == "allow" and kwargs["save_code"] for kwargs in begun)
    begin(start_with(replace(GOOD, run_dir=str(tmp_path / "furl/reach-v3/0"), track=True)))
    assert begun[-1]["name"] == "furl/reach-v3/0", "in a grid, not 0"
    # Flat, as CleanRL's filters want it; the facts that have a flag's name do not hide the flag.
    config = dict(begun[0]["config"])
    assert config.pop("facts")["versions"] == versions.versions()
    assert config.pop("exp_name") == "furl_sac_state" and config["env_id"] == "drawer-open-v3"
    assert config.keys() == {field.name for field in dataclasses.fields(Args)}


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
    steps = [run.env_steps for _ in run.iterations() if run.is_due(every)]
    assert [s for s in steps if every != 6 or s < 28] == due


def test_iterations_are_those_that_are_left(tmp_path):
    run = Run(GOOD, tmp_path, {})
    assert [(before, run.env_steps) for before in run.iterations()][:2] == [(0, 4), (4, 8)]
    assert run.env_steps == 400 and not list(run.iterations())
    at(run, 392)
    assert list(run.iterations()) == [392, 396]


def a_step(success: np.ndarray, truncated: np.ndarray) -> Step:
    no = np.zeros(len(success), bool)
    return Step(None, None, None, None, success, success.astype(np.float32), no, truncated)


def test_returns_are_sums_until_an_episode_ends(tmp_path):
    """However it ends: terminated or by its time."""
    run, none, yes = start(tmp_path), np.zeros(4, bool), np.ones(4, bool)
    run.count_episodes(a_step(np.array([1, 0, 0, 0], bool), none))
    run.count_episodes(a_step(np.array([1, 1, 0, 0], bool), none)._replace(terminated=yes))
    run.count_episodes(a_step(np.array([0, 0, 0, 1], bool), yes))
    assert run._finished_returns == [2, 1, 0, 0, 0, 0, 0, 1]
    assert run._finished == [True, True, False, False, False, False, False, True]


def test_training_rows_and_success_of_finished_episodes(tmp_path, capsys):
    run = start(tmp_path)
    yes, no = True, False
    run.count_episodes(a_step(np.array([yes, no, no, no]), np.array([no, no, no, no])))
    run.count_episodes(a_step(np.array([no, no, no, yes]), np.array([yes, yes, no, yes])))  # 2 of 3
    log_evaluation(run, 100, {"eval/success_once": jnp.float32(1), "eval/success_at_end": 0.5})
    at(run, 100).log_training("relay", {"losses/q": jnp.array(0.25), "charts/relaying": True})
    at(run, 200).log_training("aligned", {"losses/q": jnp.array(0.5)})  # no episode has ended since
    run.close()
    rows = {(int(step), key): float(value) for step, key, value in rows_of(run.dir)[1:]}
    assert rows[100, "charts/success_once"] == pytest.approx(2 / 3)
    assert (200, "charts/success_once") not in rows
    assert rows[100, "losses/q"] == 0.25 and rows[200, "losses/q"] == 0.5
    assert rows[100, "charts/relaying"] == 1 and rows[100, "eval/success_once"] == 1
    assert rows[200, "time/steps_per_second"] > 0
    lines = capsys.readouterr().out.splitlines()
    [first] = [line for line in lines if "100/400" in line]
    assert "success: train 67% | eval 50% | phase relay" in first
    assert lines[-1] == (
        f"final policy: success_once 100%, success_at_end 50%; run folder: {run.dir}"
    )


class SlowEvaluator:
    """Evaluations of 20 steps; the policy's answers are noted."""

    settings, steps = SETTINGS, 20
    pictures = [np.zeros((16, 16, 3), np.uint8)] * 8

    def __init__(self):
        self.seen = []

    def play(self, policy):
        for _ in range(20):
            self.seen.append(float(policy(0.5)))
            yield
        return {"eval/success_once": self.seen[-1], "eval/success_at_end": self.seen[-1]}

    def close(self) -> None:
        pass


def evaluating(tmp_path: Path, **changes) -> tuple[Run, SlowEvaluator]:
    evaluator = SlowEvaluator()
    args = replace(GOOD, run_dir=str(tmp_path / "run"), **changes)
    run = start_run(args, Rings(small_ring()), Sizes(39, 4, 8), Envs(), evaluator, prompt="Go.")
    return run, evaluator


def test_training_goes_on_beside_an_evaluation(tmp_path):
    """An iteration has 4 steps, an evaluation comes every 40: three steps of it in each iteration.
    The policy is that of the step at which it was asked for."""
    run, evaluator = evaluating(tmp_path, eval_every=40)
    state = {"w": jnp.ones(3), "optimizer": jnp.ones(3)}
    add = jax.jit(partial(jax.tree.map, lambda x: x + 1), donate_argnums=0)
    for _ in run.iterations():
        state = add(state)  # takes the state's memory, as an update does
        if run.is_due(40):
            run.evaluate(lambda state, x: state["w"][0] + x, state)
        if run.is_due(16):
            run.log_training("relay", {"losses/q": 0.0})
        if run.env_steps == 60:
            assert len(evaluator.seen) == 15, "3 in each of 5 iterations: 21 have to fit into 10"
        if run.env_steps == 80:
            break
    run.save(state, Rings(small_ring()), Envs())  # the evaluation at 80 ends before
    run.close()
    assert evaluator.seen == [11.5] * 20 + [21.5] * 20
    rows = [(int(row[0]), row[1]) for row in rows_of(run.dir)[1:]]
    # Those of training at once, those of an evaluation when it has ended, here in 7 iterations.
    assert [row for row in rows if row[1] in ("losses/q", "eval/success_once")] == [
        (16, "losses/q"), (32, "losses/q"), (48, "losses/q"), (64, "losses/q"),
        (40, "eval/success_once"), (80, "losses/q"), (80, "eval/success_once")]
    assert run.evaluation == {"eval/success_once": 21.5, "eval/success_at_end": 21.5}
    # The policies are kept, as they were then, without what they do not act by.
    for env_steps, weight in ((40, 11), (80, 21)):
        with np.load(run.dir / f"policies/00000000{env_steps}.npz") as kept:
            assert kept.files == ["w"]
            np.testing.assert_array_equal(kept["w"], [weight] * 3)


def test_a_run_that_fails_keeps_its_rows_but_for_an_evaluation_that_has_not_ended(tmp_path):
    run, _ = evaluating(tmp_path)
    at(run, 100).evaluate(lambda state, x: state + x, jnp.ones(()))
    at(run, 200).log_training("relay", {"losses/q": 0.25})
    assert "200,losses/q,0.25" in (run.dir / "metrics.csv").read_text(), "at once"
    assert run_folder.read_progress(run.dir).steps == 200
    run.close(finished=False)
    assert "eval/" not in (run.dir / "metrics.csv").read_text()


def test_a_video_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    run, _ = evaluating(tmp_path, capture_video=True)
    for env_steps in (100, 200):
        at(run, env_steps).evaluate(lambda state, x: state["w"] + x, {"w": jnp.ones(())})
        run._finish_evaluation()
        shutil.rmtree(run.dir / "videos", ignore_errors=True)
        (run.dir / "videos").write_text("no folder")
        (said,) = [line for line in capsys.readouterr().out.splitlines() if "video" in line] or [""]
        assert said.startswith("warning: cannot write the video") == (env_steps == 200), said
    run.close()
    assert [row[0] for row in rows_of(run.dir) if row[1] == "eval/success_once"] == ["100", "200"]
    assert list(kept_policies(run.dir)) == [100, 200]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_run_ends_with_the_metrics_name(tmp_path, value):
    run = start(tmp_path)
    with pytest.raises(UserError, match=r"losses/q is (nan|inf) at step 100: the run has diverged"):
        at(run, 100).log_training("relay", {"losses/alpha": 1.0, "losses/q": value})
    run.close()
    assert len(rows_of(run.dir)) <= 1, "nothing of that row is written"


def test_what_users_put_beside_checkpoints_and_policies_is_left_alone(tmp_path):
    run = start(tmp_path)
    begin(run)
    kept = run.dir / "checkpoints/step_0000000000_good", run.dir / "policies/best.npz"
    shutil.copytree(run.dir / "checkpoints/step_0000000000", kept[0])
    log_evaluation(run, 100, {"eval/success_once": 0.0, "eval/success_at_end": 0.0})
    shutil.copy(run.dir / "policies/0000000100.npz", kept[1])
    for env_steps in (100, 200, 300):
        save(run, env_steps, {"w": jnp.ones(2)}, Rings(small_ring()))
    run.close()
    assert run_folder.saved_steps(run.dir) == 300 and list(kept_policies(run.dir)) == [100]
    resumed = resume(run.dir)
    begin(resumed)
    resumed.close()
    assert all(path.exists() for path in kept)
    assert list(map(run_folder.steps_of, run_folder.checkpoints(run.dir))) == [300, 200]


def test_a_script_in_its_own_run_folder(tmp_path, monkeypatch):
    script = tmp_path / "my_idea.py"
    shutil.copy(furl_sac_state.__file__, script)
    monkeypatch.setattr(common.run, "source_file", lambda args_type: script)
    start_with(replace(GOOD, run_dir=str(tmp_path))).close()
    assert script.read_bytes() == Path(furl_sac_state.__file__).read_bytes()


def test_a_run_begins_with_a_checkpoint(tmp_path):
    """One that dies before the next can be resumed; its arrays are committed to the device."""
    run = start(tmp_path)
    state, buffers, obs = begin(run)
    run.close()
    assert run.env_steps == 0
    np.testing.assert_array_equal(obs, np.arange(4.0))
    assert state["w"].committed and buffers.replay.data["id"].committed
    assert [x.name for x in (run.dir / "checkpoints").glob("step_*")] == ["step_0000000000"]


@pytest.mark.parametrize(("resumes_episodes", "success_once"), [(True, 0.5), (False, 0.0)])
def test_a_run_is_resumed_with_its_counts(tmp_path, capsys, resumes_episodes, success_once):
    run = start(tmp_path)
    ring = replay.add_rows(small_ring(), {"id": np.arange(3, dtype=np.int32)})
    run.count_episodes(a_step(np.array([True, False, False, False]), np.zeros(4, bool)))
    run.count_episodes(a_step(np.zeros(4, bool), np.array([False, True, False, False])))
    log_evaluation(run, 100, {"eval/success_once": 1.0, "eval/success_at_end": 1.0})
    envs = Envs()
    envs.time = np.arange(4.0) + 7
    save(run, 100, {"w": jnp.ones(2)}, Rings(ring), envs)
    log_evaluation(run, 200, {"eval/success_once": 0.0, "eval/success_at_end": 0.0})
    run.close()

    resumed = resume(run.dir)
    assert resumed.dir == run.dir
    state, buffers, obs = begin(resumed, Envs(resumes_episodes))
    assert resumed.env_steps == 100
    np.testing.assert_array_equal(state["w"], 1)
    np.testing.assert_array_equal(buffers.replay.data["id"], [0, 1, 2, 0, 0, 0, 0, 0])
    assert state["w"].committed and buffers.replay.data["id"].committed
    np.testing.assert_array_equal(obs, np.arange(4.0) + 7)
    said = capsys.readouterr().out
    assert "resumed at 100 steps" in said
    anew = "note: episodes begin anew: the state of drawer-open-v3 (an engine) cannot be saved"
    assert (anew in said) != resumes_episodes
    assert resumed.evaluation == {"eval/success_once": 1.0, "eval/success_at_end": 1.0}
    # The first environment has succeeded before the checkpoint and is cut off now: 1 of 2, unless
    # its episode could not go on.
    resumed.count_episodes(a_step(np.zeros(4, bool), np.array([True, False, False, False])))
    at(resumed, 200).log_training("relay", {})
    resumed.close()
    rows = {(int(step), key): float(value) for step, key, value in rows_of(run.dir)[1:]}
    assert rows[200, "charts/success_once"] == success_once
    assert (200, "eval/success_once") not in rows, "the killed run's row"
    assert rows[100, "eval/success_once"] == 1
    assert list(kept_policies(run.dir)) == [100], "the other will be made again"


@pytest.fixture
def harmless():
    """`harmless(number)`: a signal that nobody handles is noted instead of ending the tests."""
    before, noted = {}, []

    def install(number: int) -> list[int]:
        before[number] = signal.signal(number, lambda got, frame: noted.append(got))
        return noted

    yield install
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("name", "status"), [
    ("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138), ("SIGUSR2", 140),
])
def test_a_signal_lets_the_iteration_end_and_saves(tmp_path, harmless, capfd, name, status):
    number = getattr(signal, name)
    unhandled = harmless(number)
    run = start(tmp_path, checkpoint_every=0)
    state, buffers, _ = begin(run)
    assert not at(run, 4).must_save()
    os.kill(os.getpid(), number)
    assert at(run, 4).must_save() and not unhandled
    with pytest.raises(SystemExit) as stop:
        save(run, 4, state, buffers)
    assert stop.value.code == status
    out, errors = capfd.readouterr()
    assert f"saved at 4 steps; continue with --resume {run.dir}" in out
    assert errors == "\nstopping: this iteration is finished and saved first\n"
    assert (run.dir / "checkpoints/step_0000000004").exists()
    os.kill(os.getpid(), number)
    assert unhandled == [number], "the handler of before is back"
    resumed = resume(run.dir)
    begin(resumed)
    assert resumed.env_steps == 4
    resumed.close()


def test_a_signal_after_the_last_step_changes_nothing(tmp_path, harmless):
    harmless(signal.SIGUSR1)
    run = start(tmp_path)
    state, buffers, _ = begin(run)
    os.kill(os.getpid(), signal.SIGUSR1)
    save(run, GOOD.total_timesteps, state, buffers)
    run.close()


def test_a_signal_that_is_ignored_stays_so(tmp_path, harmless):
    """As nohup and shells have it for what they start in the background."""
    harmless(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = start(tmp_path)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    run.close()


def test_a_second_ctrl_c_ends_at_once(tmp_path, harmless, monkeypatch):
    """Not within a second of the first, which a process and its group may both get."""
    harmless(signal.SIGINT)
    run = start(tmp_path)
    times = iter((100.0, 100.5, 101.5))
    monkeypatch.setattr(common.run.time, "monotonic", lambda: next(times))
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    run.close()


def test_a_finished_run_may_drop_its_replay(tmp_path):
    run = start(tmp_path, drop_replay=True)
    state, _, _ = begin(run)
    ring = replay.add_rows(small_ring(), {"id": np.arange(3, dtype=np.int32)})
    save(run, 200, state, Rings(ring))
    run.close(finished=False)
    rings = run.dir / "checkpoints/rings"
    assert list(rings.glob("*.npz")), "it is needed until the run has finished"
    run = resume(run.dir)
    state, buffers, _ = begin(run)
    save(run, 400, {"w": jnp.ones(2)}, buffers)
    run.close()
    assert not rings.exists()
    assert [x.name for x in (run.dir / "checkpoints").iterdir()] == ["step_0000000400"]
    env_steps, leaves, _ = checkpoint.read_newest(run.dir)
    assert env_steps == 400
    np.testing.assert_array_equal(leaves[0], 1)
    run = resume(run.dir)
    with pytest.raises(UserError, match=r"cannot be continued.*--drop-replay"):
        begin(run)
    run.close(finished=False)


def test_video_paths(tmp_path):
    assert Run(GOOD, tmp_path, {}).video_path() is None
    run = Run(replace(GOOD, capture_video=True), tmp_path, {})
    assert at(run, 5000).video_path() == tmp_path / "videos/00005000.mp4"


def test_ranges_of_composed_types():
    """Options, aliases and tuples of ranges; what is no range refuses nothing."""
    alias = Annotated[str, "any note"]
    for value, kind in [
        (None, flags.PositiveInt | None), (3, flags.PositiveInt | None), ("x", alias), (-1, int),
        ((), tuple[int, ...]), ((), Annotated[tuple[str, ...], "any note"]), (math.nan, float),
        ((1, 2), tuple[flags.PositiveInt, ...]), (None, Annotated[int | None, "any note"]),
    ]:
        flags.check_range(value, kind, "--x")
    for value, kind in [
        (0, flags.PositiveInt | None), ((), flags.PositiveInts),
        ((1, 0), tuple[flags.PositiveInt, ...]), (math.nan, flags.Share),
        (2**31, flags.PositiveInt),
    ]:
        with pytest.raises(UserError, match=r"^--x must"):
            flags.check_range(value, kind, "--x")


@pytest.mark.parametrize(("message", "line"), [("", "TypeError"), ("\n a\nb", "a")])
def test_the_first_line_of_an_error(message, line):
    assert first_line(TypeError(message)) == line
