"""Evaluation by the mean action, and the video of it."""

import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

from common.envs.registry import suite_for
from common.envs.rendering import Camera
from common.errors import UserError, first_line
from common.flags import Goal

# Evaluation goals of random-goal runs come from another seed than the goals of training.
EVAL_SEED_OFFSET = 1_000_003
VIDEO_CAMERA = Camera(size=256)
SIDE_BY_SIDE = 20  # most of Meta-World's environments in an evaluation: up to 35 MB each
VIDEO_FPS = 40  # half of Meta-World's 80 steps a second of simulated time: fast, yet readable


class Evaluator:
    """Plays a policy's evaluation episodes, the same ones each time.

    Episodes are those of the suite's `evaluated_on`, for most tasks the same task. A fixed goal is
    that of the run's seed; random goals, and what else differs between episodes, are drawn once,
    unseen in training.

    Args:
        env_id, seed, goal: as for training.
        num_episodes: 0: 1 where all are the same, as with Meta-World's fixed goals, else 10 (B.2).
        num_envs: environments side by side, which with the seed decide what is drawn for an
            episode; default: one for each episode, of Meta-World's `SIDE_BY_SIDE` at most.
        camera: what draws the frames; a video of a policy that sees states has its own size.
        capture_video: draw the first episode, for `write_video`.
        frame_stack: 0: the policy sees states; K: the last K frames, the newest last.
        action_repeat: physics steps per action.
        seed_offset: added to the seed where episodes are drawn, so that training has not seen them.

    Attributes:
        steps: actions in each environment in a whole evaluation, at most.
        settings: how pictures are drawn and stacked for the policy, in config.json so that
            tools.evaluate shows it the same.
        episodes: the measures of each episode of the last call, see `play`.
        actions: the policy's in the first episode of each environment in the last call, a list of
            [num_envs, action_dim], or of [num_envs]; `episodes["length"]` says how many count.
        pictures: of the first episode of the last call, uint8 [size, size, 3] at a video's pace;
            empty if nothing is drawn.
    """

    def __init__(
        self,
        env_id: str,
        *,
        seed: int,
        goal: Goal,
        num_episodes: int,
        num_envs: int | None = None,
        camera: Camera = VIDEO_CAMERA,
        capture_video: bool = False,
        frame_stack: int = 0,
        action_repeat: int = 1,
        seed_offset: int = EVAL_SEED_OFFSET,
    ):
        if not frame_stack:
            camera = Camera(VIDEO_CAMERA.size, camera.id, camera.quality)
        suite = suite_for(env_id)
        same = suite.all_same(goal)
        self._num_episodes = num_episodes or (1 if same else 10)
        if num_envs is None and not suite.starts_differ:
            num_envs = SIDE_BY_SIDE
        num_envs = min(num_envs or self._num_episodes, self._num_episodes)
        self.envs = suite.make_vec(
            suite.evaluated_on(env_id),
            num_envs,
            seed=seed if same else seed + seed_offset,
            goal=goal,
            camera=camera if capture_video or frame_stack else None,
            num_drawn=None if frame_stack else 1,
            action_repeat=action_repeat,
        )
        self._rounds = -(-self._num_episodes // num_envs)
        self.steps = self._rounds * self.envs.episode_length
        self._start = self.envs.get_state()
        self._lengths_differ = suite.lengths_differ
        self.settings = {
            "frame_stack": frame_stack, "frame_size": camera.size if frame_stack else 0,
            "camera_id": camera.id, "quality": camera.quality, "action_repeat": action_repeat,
        }
        self._frame_stack, self._action_repeat = frame_stack, action_repeat

    def __call__(self, policy: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        """Play all episodes at once; see `play`."""
        playing = self.play(policy)
        while True:
            try:
                next(playing)
            except StopIteration as end:
                return end.value

    def play(
        self, policy: Callable[[np.ndarray], np.ndarray]
    ) -> Generator[None, None, dict[str, float]]:
        """Play the episodes, step by step: while the environments take a step, the caller has its
        turn, and decides when they take the next one.

        Args:
            policy: mean action [n, action_dim], or best one [n], for observations [n, obs_dim],
                or with a frame stack for pictures uint8 [n, size, size, 3 K].

        Returns:
            the means over the episodes: `eval/success_once`: success at any step (Meta-World's own
            definition); `eval/success_at_end`: at the last step (that of FuRL's authors);
            `eval/return`: the sum of the task's reward, where that is sparse the number of steps in
            success (of the policy's, if actions repeat); `eval/length`: the number of steps, where
            a suite's episodes differ in that. `episodes` then has these of each episode,
            [num_episodes], without `eval/`.
        """
        self.envs.set_state(self._start)
        self.pictures, rounds = [], []  # those of the last call are freed first
        for _ in range(self._rounds):
            rounds.append((yield from self._play_round(policy)))
        measures, (self.actions, *_), (pictures, *_) = zip(*rounds, strict=True)
        self.pictures = pictures[:: 1 if self._action_repeat > 1 else 2]
        self.episodes = {
            name: np.concatenate([measured[name] for measured in measures])[: self._num_episodes]
            for name in measures[0]
        }
        means = {f"eval/{name}": values.mean() for name, values in self.episodes.items()}
        if not self._lengths_differ:
            del means["eval/length"]
        return means

    def _play_round(self, policy: Callable[[np.ndarray], np.ndarray]) -> Generator[None, None, Any]:
        """One episode in each environment: (its measures, each [num_envs]; the actions, see the
        class; the pictures of the first environment's episode, if frames are drawn)."""
        obs, frames = self.envs.reset()
        actions, pictures = [], [] if frames is None else [frames[0]]
        if self._frame_stack:  # an episode begins with its first frame, repeated
            obs = np.concatenate([frames] * self._frame_stack, -1)
        num_envs = self.envs.num_envs
        success_once, success_at_end = np.zeros((2, num_envs), bool)
        returns, lengths = np.zeros((2, num_envs))
        running = np.ones(num_envs, bool)  # in the first episode
        while running.any():
            actions.append(np.asarray(policy(obs)))
            self.envs.step_async(actions[-1])
            yield
            step = self.envs.step_wait()
            obs = np.concatenate([obs[..., 3:], step.frames], -1) if self._frame_stack else step.obs
            success_once |= step.success & running
            success_at_end[running] = step.success[running]
            returns += np.where(running, step.reward, 0)
            lengths += running
            if step.frames is not None and running[0]:
                pictures.append(step.frames[0])
            running &= ~step.ended
        measures = {"success_once": success_once, "success_at_end": success_at_end,
                    "return": returns, "length": lengths}
        return measures, actions, pictures

    def close(self) -> None:
        self.envs.close()


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """Write RGB uint8 frames [H, W, 3] as H.264 at `VIDEO_FPS`.

    Raises:
        UserError: the encoder or the disk fails.
    """
    import imageio

    # JAX warns of every fork; the encoder's is followed by exec at once.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with imageio.get_writer(path, fps=VIDEO_FPS, macro_block_size=4) as writer:
            for frame in frames:
                writer.append_data(frame)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write the video {path}: {first_line(error)}") from error
