"""The task table: Meta-World's 50 tasks, their instructions and their scripted experts."""

import difflib
import warnings

import numpy as np

from common.errors import UserError

# Table 4 of the FuRL paper, word for word and in its order.
MT10_INSTRUCTIONS = {
    "button-press-topdown-v3": "Press a button from the top.",
    "door-open-v3": "Open a door with a revolving joint.",
    "drawer-close-v3": "Push and close a drawer.",
    "drawer-open-v3": "Open a drawer.",
    "peg-insert-side-v3": "Insert a peg sideways.",
    "pick-place-v3": "Pick and place a puck to a goal.",
    "push-v3": "Push the puck to a goal.",
    "reach-v3": "Reach a goal position.",
    "window-close-v3": "Push and close a window.",
    "window-open-v3": "Push and open a window.",
}
MT10 = tuple(MT10_INSTRUCTIONS)

INSTRUCTIONS = {
    **MT10_INSTRUCTIONS,
    "assembly-v3": "Pick up a nut and place it onto a peg.",
    "basketball-v3": "Dunk the basketball into the basket.",
    "bin-picking-v3": "Grasp the puck from one bin and place it into another bin.",
    "box-close-v3": "Grasp the cover and close the box with it.",
    "button-press-topdown-wall-v3": "Bypass a wall and press a button from above.",
    "button-press-v3": "Press a button.",
    "button-press-wall-v3": "Bypass a wall and press a button.",
    "coffee-button-v3": "Push the button on the coffee machine.",
    "coffee-pull-v3": "Pull a mug away from the coffee machine.",
    "coffee-push-v3": "Push a mug under the coffee machine.",
    "dial-turn-v3": "Rotate a dial by half a turn.",
    "disassemble-v3": "Pick a nut off the peg.",
    "door-close-v3": "Shut the swinging door.",
    "door-lock-v3": "Lock the door by rotating the lock clockwise.",
    "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise.",
    "faucet-close-v3": "Rotate the faucet handle clockwise.",
    "faucet-open-v3": "Rotate the faucet handle counter-clockwise.",
    "hammer-v3": "Hammer a screw into the wall.",
    "hand-insert-v3": "Insert the gripper into a hole.",
    "handle-press-side-v3": "Press a handle down sideways.",
    "handle-press-v3": "Press a handle down.",
    "handle-pull-side-v3": "Pull a handle up sideways.",
    "handle-pull-v3": "Pull a handle up.",
    "lever-pull-v3": "Pull a lever up by a quarter turn.",
    "peg-unplug-side-v3": "Unplug a peg from the side.",
    "pick-out-of-hole-v3": "Lift a puck out of a hole.",
    "pick-place-wall-v3": "Lift a puck over the wall and set it down behind it.",
    "plate-slide-back-side-v3": "Get a plate out of the cabinet sideways.",
    "plate-slide-back-v3": "Get a plate out of the cabinet.",
    "plate-slide-side-v3": "Slide a plate into the cabinet sideways.",
    "plate-slide-v3": "Slide a plate into the cabinet.",
    "push-back-v3": "Pull a block back towards the robot.",
    "push-wall-v3": "Move a block around the wall.",
    "reach-wall-v3": "Move the gripper past a wall to the target.",
    "shelf-place-v3": "Put a block onto a shelf.",
    "soccer-v3": "Kick a soccer ball into the net.",
    "stick-pull-v3": "Grasp a stick and pull a thermos with it.",
    "stick-push-v3": "Grasp a stick and push a thermos with it.",
    "sweep-into-v3": "Sweep a block into the hole.",
    "sweep-v3": "Sweep a block off the table.",
}
ENV_IDS = tuple(sorted(INSTRUCTIONS))

# Table 6 of the FuRL paper.
PROMPT_VARIANTS = {
    "button-press-topdown-v3": {
        "short": "Press a button from the top.",
        "long": "Move close to the orange box and press down the red button.",
    },
    "drawer-open-v3": {
        "short": "Open a drawer.",
        "long": "Grab the white handle and open the green drawer.",
    },
}

# Goal-baseline regularisation's b (Definition 1 of the VLM-RM paper): the scene, whatever the goal.
BASELINE_PROMPTS = {
    "button-press-topdown-v3": "A robot arm and a button.",
    "door-open-v3": "A robot arm and a door.",
    "drawer-close-v3": "A robot arm and a drawer.",
    "drawer-open-v3": "A robot arm and a drawer.",
    "peg-insert-side-v3": "A robot arm and a peg.",
    "pick-place-v3": "A robot arm and a puck.",
    "push-v3": "A robot arm and a puck.",
    "reach-v3": "A robot arm.",
    "window-close-v3": "A robot arm and a window.",
    "window-open-v3": "A robot arm and a window.",
}


def resolve_env_id(name: str) -> str:
    """The v3 id of a task given as `drawer-open-v3`, as its v2 alias, or without a version.

    Raises:
        UserError: no such task; names the closest ones.
    """
    env_id = name.removesuffix("-v2").removesuffix("-v3") + "-v3"
    if env_id in INSTRUCTIONS:
        return env_id
    closest = difflib.get_close_matches(env_id, ENV_IDS, n=3, cutoff=0.4) or MT10[:3]
    raise UserError(f"unknown task {name!r}; did you mean {', '.join(closest)}?")


def prompt_for(env_id: str, prompt: str | None) -> str:
    """The instruction of a run: the task's own (None), Table 6's `short` or `long`, the dummy text
    of Figure 15 (`none`), or any other.

    Raises:
        UserError: the prompt is empty, or the task has no such variant.
    """
    if prompt is None:
        return INSTRUCTIONS[env_id]
    if prompt == "none":  # the command line turns "None" into None
        return "None"
    if prompt in ("short", "long"):
        if env_id not in PROMPT_VARIANTS:
            raise UserError(f"--prompt {prompt} is Table 6's, which has it only for "
                            f"{' and '.join(PROMPT_VARIANTS)}; give the text itself")
        return PROMPT_VARIANTS[env_id][prompt]
    if not prompt.strip():
        raise UserError("--prompt must not be empty; leave it out for the task's own instruction")
    return prompt.strip()


def baseline_prompt_for(env_id: str, baseline_prompt: str | None) -> str:
    """The baseline description of a run: any text, or the task's own (None).

    Raises:
        UserError: it is empty.
    """
    if baseline_prompt is None:
        return BASELINE_PROMPTS.get(env_id, "A robot arm and a table.")
    if not baseline_prompt.strip():
        raise UserError("--baseline-prompt must not be empty; leave it out for the task's own")
    return baseline_prompt.strip()


def expert_policy(env_id: str):
    """Meta-World's scripted expert: `.get_action(obs)` maps [39] float64, with the goal visible,
    to an action [4] that the caller clips to [-1, 1]."""
    from metaworld.policies import ENV_POLICY_MAP

    # It says that actions will be clipped, which is known and meant.
    warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")
    return ENV_POLICY_MAP[env_id]()


def expert_action(policy, obs: np.ndarray) -> np.ndarray:
    """The expert's action within the action space, float32 [4]."""
    return np.clip(policy.get_action(obs.astype(np.float64)), -1, 1).astype(np.float32)
