"""What a suite of environments is: the functions and facts by which all else knows it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.envs.rendering import Camera
from common.errors import UserError

Draw = Callable[..., np.ndarray]  # draw(env, first=False) -> uint8 [size, size, 3]


@dataclass(frozen=True)
class Suite:
    """A suite is a module of this folder that has one of these, named SUITE.

    Attributes:
        resolve_env_id: a name as users give it -> the environment's id. Raises UserError.
        prompt_for, baseline_prompt_for: (id, text or None for the task's own) -> the instruction,
            and what the scene is whatever the goal. Raise UserError.
        default_vlm: id -> the embedded VLM that knows its pictures.
        evaluated_on: id -> the environment that its policies are evaluated on.
        make_vec: (id, number of environments, *, seed, goal, camera, and options of `VecEnv`) ->
            environments in worker processes, a `VecEnv`.
        cameras, default_camera: names of what draws pictures, and the number of the usual one.
        crops_border: whether a VLM is shown the middle of a picture only, see `view_for`.
        sparse_reward: the reward is 1 on success and else 0, whatever `step` returns.
        reward_shift: what is added to a reward before it is learned from.
        starts_differ: episodes with a fixed goal begin in different states.
        lengths_differ: episodes end before their time is up.
        shows_returns: a run shows the returns of its episodes, as successes do not say it all.
        make_env: (id, *, seed, index, options) -> environment number `index`, whatever the worker
            that it is in. It has Gymnasium's `reset` and `step`. Where `step`'s info has neither
            `success` nor `is_success`, there is no success.
        make_draw: (environment, camera) -> what draws it; `first`: before an episode's steps.
        elapsed_steps: environment -> physics steps since the episode began.
        get_env_state: environment -> everything that its next steps depend on.
        set_env_state: (environment, state) -> None, or the first observation where a new episode
            had to begin.
    """

    resolve_env_id: Callable[[str], str]
    prompt_for: Callable[[str, str | None], str]
    baseline_prompt_for: Callable[[str, str | None], str]
    default_vlm: Callable[[str], str]
    evaluated_on: Callable[[str], str]
    make_vec: Callable[..., Any]
    cameras: tuple[str, ...]
    default_camera: int
    crops_border: bool
    sparse_reward: bool
    reward_shift: float
    starts_differ: bool
    lengths_differ: bool
    shows_returns: bool
    # What workers use.
    make_env: Callable[..., Any]
    make_draw: Callable[[Any, Camera], Draw]
    elapsed_steps: Callable[[Any], int]
    get_env_state: Callable[[Any], dict[str, Any]]
    set_env_state: Callable[[Any, dict[str, Any]], np.ndarray | None]

    def check_camera(self, camera_id: int) -> None:
        """Raises:
            UserError: the suite has no such camera.
        """
        if camera_id >= len(self.cameras):
            listed = ", ".join(f"{i} ({name})" for i, name in enumerate(self.cameras))
            raise UserError(f"unknown camera {camera_id}; this task has {listed}")
