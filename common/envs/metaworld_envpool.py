"""EnvPool's native Meta-World, with the methods of `VecMetaWorld`: states alone, random goals.

What differs from the official environments: the bundled MuJoCo is newer, a goal is drawn at every
reset and cannot be fixed, there are no pictures, and the state of an episode cannot be saved.
docs/sac_baseline.md has the list.
"""

from importlib import metadata

import numpy as np

from common.cores import num_cores
from common.envs.metaworld_suite import ACTION_DIM, MAX_EPISODE_STEPS, OBS_DIM
from common.envs.metaworld_tasks import resolve_env_id
from common.envs.workers import Step
from common.errors import UserError
from common.flags import Goal

BUNDLED_MUJOCO = {"1.2.0": "3.6.0"}  # by EnvPool's version, which does not tell


def envpool_id(env_id: str) -> str:
    """EnvPool's name of a task: `MetaWorld/DrawerOpen-v3` for `drawer-open-v3`."""
    words = env_id.removesuffix("-v3").split("-")
    return f"MetaWorld/{''.join(word.capitalize() for word in words)}-v3"


class EnvPoolMetaWorld:
    """N environments of one task in EnvPool's threads, with the methods of `VecMetaWorld`.

    Args:
        env_id, num_envs: as for `VecMetaWorld`.
        seed: decides the sequences of goals.
        goal: `random`: new in every episode and observed, or `random-hidden`.
        max_episode_steps: 1 to 500.

    Attributes:
        obs_dim, action_dim, episode_length, engine: as those of `VecMetaWorld`.

    Raises:
        UserError: a fixed goal is asked for, or EnvPool is missing.
    """

    obs_dim, action_dim = OBS_DIM, ACTION_DIM
    resumes_episodes = False
    draws = discrete = False

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        seed: int,
        goal: Goal = "random",
        max_episode_steps: int = MAX_EPISODE_STEPS,
    ):
        if goal not in ("random", "random-hidden"):
            raise UserError(f"--engine envpool draws a new goal in every episode and cannot have "
                            f"--goal {goal}: use --goal random, or --engine metaworld")
        try:
            import envpool
        except ImportError as error:
            raise UserError(f"--engine envpool needs EnvPool ({error}): pip install envpool, or "
                            "use --engine metaworld") from None
        self.env_id, self.num_envs = resolve_env_id(env_id), num_envs
        self._pool = envpool.make_gymnasium(
            envpool_id(self.env_id), num_envs=num_envs, seed=seed % 2**31,
            num_threads=num_cores(), max_episode_steps=max_episode_steps,
            partially_observable=goal == "random-hidden",
        )
        version = metadata.version("envpool")
        self.engine = f"envpool {version}, mujoco {BUNDLED_MUJOCO.get(version, 'unknown')}"
        self.episode_length = max_episode_steps
        self._obs = np.zeros((num_envs, OBS_DIM), np.float32)
        self._num_resets = 0

    def reset(self) -> tuple[np.ndarray, None]:
        """Start new episodes; (obs [N, 39] float32, None: there are no frames)."""
        obs, _ = self._pool.reset()
        self._num_resets += 1
        self._obs = obs.astype(np.float32)
        return self._obs.copy(), None

    def observations(self) -> np.ndarray:
        """The observations to act on, [N, 39] float32."""
        return self._obs.copy()

    def step_async(self, actions: np.ndarray) -> None:
        """Let the threads step; `actions` [N, 4]."""
        self._pool.send(np.clip(actions, -1, 1).astype(np.float32))

    def step_wait(self) -> Step:
        """The result of `step_async`; episodes start again at once, all in the same step."""
        obs, _, terminated, truncated, info = self._pool.recv()
        final_obs = obs.astype(np.float32)
        self._obs = final_obs
        if truncated.all():  # nothing else ends an episode, so all have the same length
            self.reset()
        success = info["success"] > 0
        return Step(self._obs.copy(), final_obs, None, None, success, success.astype(np.float32),
                    terminated, truncated)

    def step(self, actions: np.ndarray) -> Step:
        self.step_async(actions)
        return self.step_wait()

    def get_state(self) -> dict[str, int]:
        """How many goals each environment has had: EnvPool keeps all else to itself."""
        return {"num_resets": self._num_resets}

    def set_state(self, state: dict[str, int]) -> np.ndarray:
        """Begin the episodes after those of `get_state`; the observations to act on, [N, 39]."""
        while self._num_resets <= state["num_resets"]:
            self.reset()
        return self.observations()

    def close(self) -> None:
        self._pool.close()
