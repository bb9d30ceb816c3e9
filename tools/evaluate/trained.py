"""Open a run folder and give what was learned: the policy, and the VLM reward where there is one.

`tools.evaluate` and `tools.reward_report` use it. It writes nothing into the folder and needs no
memory for the run's replay. It opens runs of any script that defines the names of `Script`.
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from common import checkpoint, policies
from common.cli import stored_args
from common.envs.registry import suite_for
from common.envs.rendering import Camera, Square
from common.errors import UserError
from common.evaluate import Evaluator
from common.replay import Sizes
from common.run_folder import checkpoints, kept_policies, read_config, steps_of
from common.vlms import VLM, View, check_same_vlm, load_vlm, view_for
from tools import ROOT

Reward = Callable[[np.ndarray], np.ndarray]  # image embeddings [n, D] -> r_VLM [n]


class Script(Protocol):
    """What the tools use of a script: these names at the top level of its file.

    `Args` needs the fields env_id, seed, and for Meta-World goal. Everything else that the tools
    must know is in config.json, where the script's `start_run` has put it.
    """

    Args: type

    def main(self, args: Any) -> dict[str, float]:
        """Train, and return the last evaluation."""

    def init_state(self, key: jax.Array, sizes: Sizes, args: Any) -> Any:
        """The pytree that `Run.save` is given; here only its structure and shapes are used."""

    def policy(self, state: Any, obs: jax.Array) -> jax.Array:
        """The evaluated agent's mean action [n, action_dim] for observations [n, obs_dim], or for
        pictures stacked along the channels, uint8 [n, size, size, 3 K], the newest last."""

    def load_reward(self, state: Any, vlm: VLM, args: Any) -> Callable[[jax.Array], jax.Array]:
        """Only of scripts with a VLM: the reward that was learned, embeddings [n, D] -> [n]."""


class PlayedAgain(NamedTuple):
    """T steps of E environments."""

    states: np.ndarray  # [T + 1, E, obs_dim] float32, the first before the first step
    frames: np.ndarray | None  # [T, E, size, size, 3] uint8
    success: np.ndarray  # [T, E] bool
    reward: np.ndarray  # [T, E] float32


@dataclass(frozen=True)
class Trained:
    """What a checkpoint, or a kept policy, holds for use.

    Attributes:
        folder, config: the run folder and its config.json.
        script, args: the module that trained it, and its arguments.
        env_steps: done when it was saved.
        state: the script's networks; of a kept policy only what it acts by, else NaN.
    """

    folder: Path
    config: dict[str, Any]
    script: ModuleType
    args: Any
    env_steps: int
    state: Any

    @property
    def has_vlm(self) -> bool:
        return self.config.get("vlm") is not None and hasattr(self.script, "load_reward")

    @property
    def evaluation(self) -> dict[str, Any]:
        """How the run's own evaluations were made: `Evaluator.settings`."""
        return self.config["evaluation"]

    def view_of(self, vlm: VLM) -> View:
        """What the run's VLM, which is `vlm`, was shown of the scene."""
        view = self.config.get("view") or {}
        if "square" not in view:  # as of older runs, whose VLM saw the same as one of today
            return view_for(vlm, suite_for(self.args.env_id))
        return View(view["size"], Square(*view["square"]))

    def policy(self, obs: np.ndarray) -> np.ndarray:
        """The evaluated agent's mean action; shapes as those of `Script.policy`.

        Raises:
            UserError: it is not finite, as where the script acts by more than was kept.
        """
        action = np.asarray(self.script.policy(self.state, obs))
        if not np.isfinite(action).all():
            raise UserError(f"{self.folder}: actions of the policy of step {self.env_steps} are "
                            "not finite: it is not whole, or the run had diverged")
        return action

    def evaluator(self, env_id: str, num_episodes: int, *, goal: str, seed: int) -> Evaluator:
        """Plays `policy` as the run's own evaluations do, on episodes drawn from `seed` alone."""
        return Evaluator(
            env_id, seed=seed, seed_offset=0, goal=goal, num_episodes=num_episodes,
            frame_stack=self.evaluation["frame_stack"], camera=self._camera(),
            action_repeat=self.evaluation["action_repeat"],
        )

    def play_again(
        self, actions: np.ndarray, size: int = 0, *, env_id: str, goal: str, seed: int
    ) -> PlayedAgain:
        """The first episodes of E environments again, by the actions [T, E, ...] of `evaluator`.

        What is drawn for an environment depends on the seed and its number alone, and physics is
        deterministic. An episode that ended sooner is followed by others.

        Args:
            size: of the pictures, pixels; 0: none are drawn.
        """
        with closing(suite_for(env_id).make_vec(
            env_id, actions.shape[1], seed=seed, goal=goal,
            camera=self._camera(size) if size else None,
            action_repeat=self.evaluation["action_repeat"],
        )) as envs:
            envs.set_state(envs.get_state())  # as the evaluator does: of some environments it draws
            first, _ = envs.reset()
            steps = [envs.step(action) for action in actions]
        return PlayedAgain(
            np.stack([first, *(step.final_obs for step in steps)]),
            np.stack([step.frames for step in steps]) if size else None,
            np.stack([step.success for step in steps]), np.stack([step.reward for step in steps]),
        )

    def _camera(self, size: int | None = None) -> Camera:
        """That of the run's evaluations, for pictures of `size`; default: those the policy sees."""
        settings = self.evaluation
        size = settings["frame_size"] if size is None else size
        return Camera(size, settings["camera_id"], settings["quality"])

    @cached_property
    def vlm(self) -> VLM:
        """The run's VLM, loaded when first asked for.

        Raises:
            UserError: it cannot be loaded here, or is not the one that the run was trained with.
        """
        vlm = load_vlm(**self.config["vlm"])
        self.check_vlm(vlm)
        return vlm

    def check_vlm(self, vlm: VLM) -> None:
        """Raises:
            UserError: `vlm` is not the run's own: its rewards would mean nothing.
        """
        check_same_vlm(self.folder, self.config, vlm)

    def vlm_reward(self, vlm: VLM) -> Reward:
        """The reward that the run learned from, before its weight rho.

        Args:
            vlm: the run's own, or one that `check_vlm` accepts.
        """
        reward = self.script.load_reward(self.state, vlm, self.args)
        return lambda embeddings: np.asarray(reward(jnp.asarray(embeddings, jnp.float32)))


def open_run(folder: Path, env_steps: int | None = None, run_code: bool = False) -> Trained:
    """Read a checkpoint or a kept policy of a run.

    Args:
        folder: the run folder.
        env_steps: which of them; None: the newest checkpoint, without any the newest policy.
        run_code: execute the copy of the script that the folder keeps, instead of this checkout's
            script of that name.

    Raises:
        UserError: the folder is no run, has nothing of that step that can be used, or the script
            does not fit it.
    """
    config = read_config(folder, str(folder))
    name = str(config.get("script"))
    if Path(f"{name}.py").name != f"{name}.py" or "sizes" not in config:
        raise UserError(f"{folder} is another version's run: it cannot be opened")
    env_steps, unflatten = read_networks(folder, env_steps)
    ours, kept = ROOT / f"{name}.py", folder / f"{name}.py"
    if run_code:
        print(f"note: running {kept}, the code that the folder brings along: do so only with "
              "folders that you trust")
    elif ours.exists() and kept.exists() and ours.read_bytes() != kept.read_bytes():
        print(f"note: {name}.py has changed since this run: it is evaluated by the present one")
    path = kept if run_code else ours
    remedy = ""
    if kept.exists() and not run_code:
        remedy = "; with --run-code the folder's own is executed"
    if not path.exists():
        place = "the folder" if run_code else "this checkout"
        raise UserError(f"{folder}: there is no {path.name} in {place}{remedy}")
    try:
        script = load_script(path)
        args = stored_args(config["args"], script.Args, str(folder))
        init = partial(script.init_state, sizes=Sizes(**config["sizes"]), args=args)
        state = unflatten(jax.eval_shape(init, jax.random.key(0)))
    except Exception as error:  # whatever an edited script may raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{folder}: {path.name} does not fit this run ({reason}){remedy}") from None
    return Trained(folder, config, script, args, env_steps, state)


def read_networks(folder: Path, env_steps: int | None) -> tuple[int, Callable[[Any], Any]]:
    """The environment steps that were asked for, or those of the newest checkpoint, else policy;
    and what makes the state of a template of it.

    Raises:
        UserError: nothing is there of that step, or it cannot be used; says what is there.
    """
    saved, kept = {*map(steps_of, checkpoints(folder))}, kept_policies(folder)
    if env_steps is None and not saved:  # deleted, to save space
        env_steps = max(kept, default=None)
    if env_steps is not None and env_steps not in saved:
        if env_steps in kept:
            return env_steps, partial(policies.unflatten, policies.read(folder, env_steps))
        steps = sorted(saved | kept.keys())
        near = sorted(sorted(steps, key=lambda x: abs(x - env_steps))[:6])
        what = "kept are" if len(steps) == len(near) else f"{len(steps)} are kept, the nearest are"
        raise UserError(f"{folder} has no policy of step {env_steps}; {what}: "
                        f"{', '.join(map(str, near)) or 'none'}")
    warnings: list[str] = []
    try:
        env_steps, leaves, _ = checkpoint.read_newest(folder, env_steps, warnings.append)
    except UserError as error:
        raise UserError("; ".join([str(error), *warnings[:1]])) from None
    for warning in warnings:
        print(warning, file=sys.stderr)
    return env_steps, partial(checkpoint.unflatten, leaves)


def load_script(path: Path) -> ModuleType:
    """The module in the file `path`, which need not be on Python's path."""
    path = path.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path) and module.__name__ != "__main__":
            return module
    name = path.stem if path.stem not in sys.modules else f"{path.stem} in {path.parent}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
