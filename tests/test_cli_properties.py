"""No combination of arguments ends in a traceback: it is accepted, or one flag is named.

What is accepted is looked at again: it must be possible. Values come from pools that hold the
usual, the extreme and the senseless; `test_end_to_end.py` looks at what only shows in a run.
"""

import contextlib
import dataclasses
import importlib
import io
import math
import typing

import jax
import pytest
from conftest import paper_scripts
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import cli
from common.envs.registry import suite_for
from common.errors import UserError
from common.flags import flag_of

WORDS = ["", "x", "-", "nan", "none", "None", "drawer-open-v2", "reach", "runs/\0", "a b", "ü", "1",
         "taken", "file", "file/below"]
WHOLE = ["0", "1", "2", "4", "8", "10", "12", "500", "1000", "4000", "1e6", "1_000", "7", "-1",
         "-8", "3000000000", "99999999999999999999"]
REAL = [*WHOLE, "0.5", "0.25", "0.125", "1.5", "1e-4", "1e30", "1e400", "inf", "-inf", "nan"]


def pool(kind: type) -> st.SearchStrategy[list[str]]:
    """Words that may follow a flag of this type."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return st.sampled_from([*typing.get_args(kind), *WORDS]).map(lambda w: [w])
    if origin is tuple:
        return st.lists(st.sampled_from(WHOLE), max_size=3)
    if kind is int:
        return st.sampled_from(WHOLE * 3 + WORDS).map(lambda w: [w])
    if kind is float:
        return st.sampled_from(REAL * 3 + WORDS).map(lambda w: [w])
    return st.sampled_from(WORDS).map(lambda w: [w])


def command_lines(args_type: type) -> st.SearchStrategy[list[str]]:
    """Up to five flags of a script with values, some missing or misspelt."""
    kinds = typing.get_type_hints(args_type)
    flags = []
    for field in dataclasses.fields(args_type):
        name, kind = field.name.replace("_", "-"), kinds[field.name]
        if kind is bool:
            flags.append(st.sampled_from([[f"--{name}"], [f"--no-{name}"], [f"--{name}", "x"]]))
        else:
            flags.append(pool(kind).map(lambda words, name=name: [f"--{name}", *words]))
    flags.append(st.sampled_from([["--envid", "reach-v3"], ["reach-v3"], ["--"], ["-h x"]]))
    return st.lists(st.one_of(flags), max_size=5).map(
        lambda parts: [word for part in parts for word in part]
    )


class Reached(Exception):
    """A script begins to build something."""


def reach(*args, **kwargs):
    raise Reached


def after_its_checks(script, argv: list[str]) -> tuple:
    """(arguments as they were given, as the script's own `main` has them after its checks)."""
    given_args = cli.parse_args(script.Args, argv)
    try:
        script.main(given_args)
    except Reached as stop:
        return given_args, stop.__traceback__.tb_next.tb_frame.f_locals["args"]
    raise AssertionError("main has built nothing")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder as the current one, but for a run and a file that must not be touched."""
    (tmp_path / "taken/checkpoints/step_0000000000").mkdir(parents=True)
    (tmp_path / "taken/config.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [*paper_scripts(), "vlm_rm_dqn"])
def test_arguments_are_possible_or_refused_by_name(name, folder, monkeypatch):
    """Whatever a script builds first is replaced, so that its `main` ends after its checks."""
    script = importlib.import_module(name)
    for suite in ("METAWORLD", "GYMNASIUM"):
        if hasattr(script, suite):
            monkeypatch.setattr(script, suite, dataclasses.replace(
                getattr(script, suite), make_vec=reach))
    if hasattr(script, "suite_for"):
        monkeypatch.setattr(script, "suite_for", lambda env_id: dataclasses.replace(
            suite_for(env_id), make_vec=reach))
    for builder in ("load_vlm", "Evaluator"):
        monkeypatch.setattr(script, builder, reach, raising=False)
    monkeypatch.setattr(script, "EnvPoolMetaWorld", reach, raising=False)
    content = sorted(folder.rglob("*"))
    outcomes = {"accepted": 0, "refused": 0, "rounded": 0}

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(command_lines(script.Args))
    @example(["--num-envs", "12"])
    def check(argv):
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
            try:
                asked, args = after_its_checks(script, argv)
            except UserError as error:  # run_script prints it and ends with status 2
                outcomes["refused"] += 1
                known = ("--", "unknown task", "unknown environment", "unknown camera",
                         "the run folder")
                assert any(word in str(error) for word in known), (argv, str(error))
                assert "\n" not in str(error)
                return
            except SystemExit as stop:  # the parser's
                outcomes["refused"] += 1
                assert stop.code == 2, argv
                text, flags = errors.getvalue(), [word for word in argv if word[2:]]
                assert "Unrecognized" in text or any(word in text for word in flags), argv
                assert "Traceback" not in errors.getvalue()
                return
            finally:
                assert sorted(folder.rglob("*")) == content, argv
        outcomes["accepted"] += 1
        must_be_possible(args)
        # A number of steps or pictures is rounded up to whole ones, and one line says so.
        rounded = [field for field in ("total_timesteps", "buffer_size")
                   if getattr(args, field) != getattr(asked, field)]
        outcomes["rounded"] += bool(rounded)
        for field in rounded:
            most = getattr(asked, field) + args.steps_per_iteration
            assert getattr(asked, field) < getattr(args, field) < most
        lines = [line for line in printed.getvalue().splitlines() if " becomes " in line]
        flags = [line.split()[1] for line in lines]
        assert flags == [flag_of(field) for field in rounded], printed.getvalue()

    check()
    assert outcomes["accepted"] > 20 and outcomes["refused"] > 20, outcomes
    assert outcomes["rounded"] > 0, outcomes


def must_be_possible(args) -> None:
    """What the scripts compute first from their arguments."""
    assert args.updates_per_iteration >= 1
    assert 1 <= args.total_timesteps < 2**31
    assert args.total_timesteps % args.steps_per_iteration == 0
    assert args.buffer_size >= args.num_envs >= 1
    if hasattr(args, "embedding_buffer_size"):  # whole episodes are copied from ring to ring
        first = hasattr(args, "frame_stack")  # the pictures that episodes begin with
        episode = 500 // getattr(args, "action_repeat", 1)
        assert args.buffer_size >= args.num_envs * (episode + first)
        assert args.embedding_buffer_size >= episode
    jax.random.key(args.seed)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, float):
            assert math.isfinite(value)
        if isinstance(value, int):
            assert 0 <= value < 2**31, field.name
        if isinstance(value, tuple):
            assert value and all(1 <= part < 2**31 for part in value)
