"""Open a run folder and give what was learned: the policy, and the VLM reward where there is one.

`tools.evaluate` and `tools.reward_report` use it. It writes nothing into the folder and needs no
memory for the run's replay. It opens runs of any script that defines the names of `Script`.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from common import checkpoint
from common.cli import stored_args
from common.errors import UserError
from common.replay import Sizes
from common.run_folder import read_config
from common.vlms import VLM, View, load_vlm
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


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds for use.

    Attributes:
        folder, config: the run folder and its config.json.
        script, args: the module that trained it, and its arguments.
        env_steps: of the checkpoint.
        state: the script's networks.
        name: what a report calls the run: its folder's name, or more of the path.
    """

    folder: Path
    config: dict[str, Any]
    script: ModuleType
    args: Any
    env_steps: int
    state: Any
    name: str

    @property
    def has_vlm(self) -> bool:
        return self.config.get("vlm") is not None and hasattr(self.script, "load_reward")

    @property
    def evaluation(self) -> dict[str, Any]:
        """How the run's own evaluations were made: `Evaluator.settings`."""
        return self.config["evaluation"]

    @property
    def view(self) -> View:
        """What the run's VLM was shown of the scene."""
        return View(**self.config["view"])

    def policy(self, obs: np.ndarray) -> np.ndarray:
        """The evaluated agent's mean action; shapes as those of `Script.policy`."""
        return np.asarray(self.script.policy(self.state, obs))

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
        ours, theirs = vlm.id, str(self.config.get("vlm_id"))
        if without_precision(ours) != without_precision(theirs):
            raise UserError(f"{self.folder} was trained with the VLM {theirs}, this one is {ours}: "
                            "its reward would mean nothing")

    def vlm_reward(self, vlm: VLM) -> Reward:
        """The reward that the run learned from, before its weight rho.

        Args:
            vlm: the run's own, or one that `check_vlm` accepts.
        """
        reward = self.script.load_reward(self.state, vlm, self.args)
        return lambda embeddings: np.asarray(reward(jnp.asarray(embeddings, jnp.float32)))


def open_run(folder: Path, env_steps: int | None = None, run_code: bool = False) -> Trained:
    """Read a checkpoint of a run.

    Args:
        folder: the run folder.
        env_steps: which of the kept checkpoints; None: the newest.
        run_code: execute the copy of the script that the folder keeps, instead of this checkout's
            script of that name.

    Raises:
        UserError: the folder is no run, has no usable checkpoint, or the script does not fit it.
    """
    config = read_config(folder, str(folder))
    name = str(config.get("script"))
    if Path(f"{name}.py").name != f"{name}.py" or "sizes" not in config:
        raise UserError(f"{folder} is another version's run: it cannot be opened")
    warnings: list[str] = []
    try:
        env_steps, leaves, _ = checkpoint.read_newest(folder, env_steps, warnings.append)
    except UserError as error:
        raise UserError("; ".join([str(error), *warnings[:1]])) from None
    for warning in warnings:
        print(warning, file=sys.stderr)
    ours, kept = ROOT / f"{name}.py", folder / f"{name}.py"
    if run_code:
        print(f"note: running {kept}, the code that the folder brings along: do so only with "
              "folders that you trust")
    elif ours.exists() and kept.exists() and ours.read_bytes() != kept.read_bytes():
        print(f"note: {name}.py has changed since this run: it is evaluated by the present one")
    path = kept if run_code else ours
    if not path.exists():
        help_ = ""
        if kept.exists():
            help_ = "; with --run-code the folder's own is executed"
        place = "the folder" if run_code else "this checkout"
        raise UserError(f"{folder}: there is no {path.name} in {place}{help_}")
    try:
        script = load_script(path)
        args = stored_args(config["args"], script.Args, str(folder))
        init = partial(script.init_state, sizes=Sizes(**config["sizes"]), args=args)
        template = jax.eval_shape(init, jax.random.key(0))
        state = checkpoint.unflatten(leaves, template)
    except Exception as error:  # whatever an edited script may raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        help_ = ""
        if kept.exists() and not run_code:
            help_ = f"; with --run-code the folder's own {kept.name} is executed"
        raise UserError(f"{folder}: {path.name} does not fit this run ({reason}){help_}") from None
    return Trained(folder, config, script, args, env_steps, state, folder.resolve().name)


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


def without_precision(vlm_id: str) -> str:
    """A VLM's id without the number format, which is the machine's choice."""
    for precision in ("-fp16", "-bf16", "-fp32"):
        vlm_id = vlm_id.removesuffix(precision)
    return vlm_id
