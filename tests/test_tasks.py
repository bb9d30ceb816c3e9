"""The task table against Meta-World and the paper's Tables 4 and 6."""

import numpy as np
import pytest

from common.envs.metaworld_tasks import (
    ENV_IDS,
    INSTRUCTIONS,
    MT10,
    PROMPT_VARIANTS,
    expert_action,
    expert_policy,
    prompt_for,
    resolve_env_id,
)
from common.errors import UserError


def test_all_fifty_tasks_of_metaworld_have_an_instruction():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert set(ENV_IDS) == set(ALL_V3_ENVIRONMENTS) and len(ENV_IDS) == 50
    assert len(set(INSTRUCTIONS.values())) == 50
    assert all(text.endswith(".") and text[0].isupper() for text in INSTRUCTIONS.values())


def test_table_4_word_for_word():
    assert [INSTRUCTIONS[task] for task in MT10] == [
        "Press a button from the top.",
        "Open a door with a revolving joint.",
        "Push and close a drawer.",
        "Open a drawer.",
        "Insert a peg sideways.",
        "Pick and place a puck to a goal.",
        "Push the puck to a goal.",
        "Reach a goal position.",
        "Push and close a window.",
        "Push and open a window.",
    ]


def test_table_6_word_for_word():
    assert PROMPT_VARIANTS["button-press-topdown-v3"]["long"] == (
        "Move close to the orange box and press down the red button."
    )
    assert PROMPT_VARIANTS["drawer-open-v3"]["long"] == (
        "Grab the white handle and open the green drawer."
    )
    for task, variants in PROMPT_VARIANTS.items():
        assert prompt_for(task, "none") == "None"
        assert variants["short"] == INSTRUCTIONS[task]


@pytest.mark.parametrize("name", ["drawer-open-v3", "drawer-open-v2", "drawer-open"])
def test_aliases(name):
    assert resolve_env_id(name) == "drawer-open-v3"


@pytest.mark.parametrize(
    ("name", "close"),
    [("drawer-opn-v3", "drawer-open-v3"), ("buton-press", "button-press-v3"), ("", "v3"),
     ("windowclose-v2", "window-close-v3")],
)
def test_an_unknown_task_names_the_closest(name, close):
    with pytest.raises(UserError, match="did you mean") as error:
        resolve_env_id(name)
    assert close in str(error.value)


def test_prompts():
    assert prompt_for("reach-v3", None) == "Reach a goal position."
    assert prompt_for("drawer-open-v3", "long") == PROMPT_VARIANTS["drawer-open-v3"]["long"]
    assert prompt_for("reach-v3", " touch the ball ") == "touch the ball"
    with pytest.raises(UserError, match="Table 6's, which has it only for"):
        prompt_for("reach-v3", "long")
    with pytest.raises(UserError, match="must not be empty"):
        prompt_for("reach-v3", "  ")


@pytest.mark.parametrize("task", MT10)
def test_experts_stay_within_the_action_space(task):
    obs = np.random.default_rng(0).uniform(-1, 1, 39)
    action = expert_action(expert_policy(task), obs)
    assert action.shape == (4,) and action.dtype == np.float32
    assert np.abs(action).max() <= 1
