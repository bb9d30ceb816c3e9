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
from hypothesis import given, settings
from hypothesis import strategies as st

from common import cli
from common.errors import UserError

SCRIPTS = ("furl_sac_state", "furl_drq_pixels", "sac_baseline", "relay_baseline",
           "vlm_rm_baseline")
WORDS = ["", "x", "-", "nan", "none", "None", "drawer-open-v2", "reach", "runs/\0", "a b", "ü", "1"]
WHOLE = ["0", "1", "2", "4", "8", "10", "500", "1000", "4000", "1e6", "1_000", "7", "-1", "-8",
         "3000000000", "99999999999999999999"]
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


def checked(script, argv: list[str]):
    """The arguments as main sees them after its checks."""
    args = cli.check_args(cli.parse_args(script.Args, argv))
    return script.check_pixel_args(args) if hasattr(script, "check_pixel_args") else args


@pytest.mark.parametrize("name", SCRIPTS)
def test_arguments_are_possible_or_refused_by_name(name):
    script = importlib.import_module(name)
    outcomes = {"accepted": 0, "refused": 0}

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(command_lines(script.Args))
    def check(argv):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            try:
                args = checked(script, argv)
            except UserError as error:  # run_script prints it and ends with status 2
                outcomes["refused"] += 1
                assert "--" in str(error) or "unknown task" in str(error), (argv, str(error))
                assert "\n" not in str(error)
                return
            except SystemExit as stop:  # the parser's
                outcomes["refused"] += 1
                assert stop.code == 2, argv
                text, flags = errors.getvalue(), [word for word in argv if word[2:]]
                assert "Unrecognized" in text or any(word in text for word in flags), argv
                assert "Traceback" not in errors.getvalue()
                return
        outcomes["accepted"] += 1
        must_be_possible(args)

    check()
    assert min(outcomes.values()) > 20, outcomes


def must_be_possible(args) -> None:
    """What the scripts compute first from their arguments."""
    assert args.updates_per_iteration >= 1
    assert args.total_timesteps % cli.steps_per_iteration(args) == 0
    episode = hasattr(args, "embedding_buffer_size")  # is copied from ring to ring at once
    per_env = 500 // getattr(args, "action_repeat", 1) if episode else 1
    assert args.buffer_size >= args.num_envs * per_env >= 1
    jax.random.PRNGKey(args.seed)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, float):
            assert math.isfinite(value)
        if isinstance(value, int):
            assert 0 <= value < 2**31, field.name
        if isinstance(value, tuple):
            assert value and all(1 <= part < 2**31 for part in value)
