"""What a suite of environments is: the functions and facts by which all else knows it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.envs.rendering import Camera, check_camera

Draw = Callable[[Any], np.ndarray]  # env -> uint8 [size, size, 3] with the camera's `drawn_size`


@dataclass(frozen=True)
class Suite:
    """A module of this folder that is a suite has one of these, named SUITE. `env_id` is an id as
    `resolve_env_id` returns it; functions that raise raise UserError."""

    # For everyone.
    resolve_env_id: Callable[[str], str]  # a name as users give it -> env_id; may raise
    prompt_for: Callable[[str, str | None], str]  # env_id, text or None: the task's own; may raise
    baseline_prompt_for: Callable[[str, str | None], str]  # the same of what is always in the scene
    default_vlm: Callable[[str], str]  # env_id -> the embedded VLM that knows its pictures
    evaluated_on: Callable[[str], str]  # env_id -> the one that its policies are evaluated on
    make_vec: Callable[..., Any]  # env_id, num_envs, seed=, goal=, camera=, options -> VecEnv
    cameras: tuple[str, ...]  # names of what draws pictures
    default_camera: int  # its number
    crops_border: bool  # a VLM is shown only the middle of a picture, see `view_for`
    reward_shift: float  # added to a reward before it is learned from
    starts_differ: bool  # also with a fixed goal, episodes begin in different states
    lengths_differ: bool  # episodes may end before their time is up
    shows_returns: bool  # a run shows returns, because successes do not say it all
    # For workers. Where `step`'s info has neither `success` nor `is_success`, there is no success.
    sparse_reward: bool  # the reward is 1 on success and else 0, whatever `step` returns
    make_env: Callable[..., Any]  # env_id, seed=, index=, options -> the same in whatever worker
    make_draw: Callable[[Any, Camera], Draw]  # for all environments of this one's task
    elapsed_steps: Callable[[Any], int]  # physics steps since the episode began
    get_env_state: Callable[[Any], dict[str, Any]]  # everything that the next steps depend on
    # None, or a first observation, where the state of an episode is unknown and a new one begins.
    set_env_state: Callable[[Any, dict[str, Any]], np.ndarray | None]

    def all_same(self, goal: str) -> bool:
        """Whether all episodes of one policy's mean action are the same, so that one tells all."""
        return goal == "fixed" and not self.starts_differ

    def check_camera(self, camera_id: int) -> None:
        """Raises:
            UserError: the suite has no such camera.
        """
        check_camera(camera_id, self.cameras)
