"""Open a run folder and give what was learned: the policy, and the VLM reward where there is one.

Shared by `tools.evaluate` and `tools.reward_report`. Nothing in the folder is changed, and no
replay is allocated.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import checkpoint
from common.cli import stored_args
from common.errors import UserError
from common.logger import read_config
from common.tasks import baseline_prompt_for, prompt_for
from common.vlm import VLM, load_vlm

SCRIPTS = ("furl_sac_state", "furl_drq_pixels", "sac_baseline", "relay_baseline", "vlm_rm_baseline")
Reward = Callable[[np.ndarray], np.ndarray]  # image embeddings [n, D] -> r_VLM [n]


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds for use.

    Attributes:
        folder, config: the run folder and its config.json.
        script, args: the module that trained it, and its arguments.
        env_steps: of the checkpoint.
        state: the script's networks: FuRLState, RelayState or AgentState.
    """

    folder: Path
    config: dict[str, Any]
    script: ModuleType
    args: Any
    env_steps: int
    state: Any

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def has_vlm(self) -> bool:
        return hasattr(self.args, "vlm") and not getattr(self.args, "no_vlm", False)

    @property
    def frame_stack(self) -> int:
        """0: the policy sees observations; K: the last K pictures."""
        return getattr(self.args, "frame_stack", 0)

    @property
    def action_repeat(self) -> int:
        return getattr(self.args, "action_repeat", 1)

    @property
    def prompt(self) -> str:
        return prompt_for(self.args.env_id, getattr(self.args, "prompt", None))

    def policy(self, obs: np.ndarray) -> np.ndarray:
        """The evaluated agent's mean action [n, 4] for observations [n, 39], or for pictures
        stacked along the channels, uint8 [n, size, size, 3 K], the newest last."""
        agent = getattr(self.state, "furl", self.state)
        params = agent.params if self.frame_stack else agent.params["actor"]
        return np.asarray(self.script.act_mean(params, obs, args=self.args))

    @cached_property
    def vlm(self) -> VLM:
        """The run's VLM, loaded when first asked for.

        Raises:
            UserError: it cannot be loaded here, or is not the one that the run was trained with.
        """
        args = self.args
        vlm = load_vlm(args.vlm, weights=args.vlm_weights, pretrained=args.pretrained,
                       seed=args.seed)
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
        """The reward that the run learned from, before its weight rho: Eq. 3 with the checkpoint's
        projection heads; Eq. 2 without alignment and for Relay; VLM-RM's own.

        Args:
            vlm: the run's own, or one that `check_vlm` accepts.
        """
        args, script = self.args, self.script
        text = jnp.asarray(vlm.embed_text([self.prompt])[0])
        if script.SCRIPT == "relay_baseline":
            reward = partial(script.cosine_similarity, text)
        elif script.SCRIPT == "vlm_rm_baseline":
            baseline_prompt = baseline_prompt_for(args.env_id, args.baseline_prompt)
            baseline = jnp.asarray(vlm.embed_text([baseline_prompt])[0])
            # The heads of LIV-Proj are never trained: they are drawn again, as in the script.
            key = jax.random.split(jax.random.PRNGKey(args.seed), 3)[2]
            heads = script.Projection(args.projection_features).init(key, text, text[None])
            inputs = script.VLMInputs(text, baseline, heads)
            reward = partial(script.vlm_reward, vlm=inputs, args=args)
        else:
            inputs = script.VLMInputs(text, jnp.zeros_like(text))  # the reward needs no goal image
            reward = partial(script.vlm_reward, self.state.projection, vlm=inputs, args=args)
        compiled = jax.jit(reward)
        return lambda embeddings: np.asarray(compiled(jnp.asarray(embeddings, jnp.float32)))


def open_run(folder: Path, env_steps: int | None = None) -> Trained:
    """Read a checkpoint of a run.

    Args:
        folder: the run folder.
        env_steps: which of the kept checkpoints; None: the newest.

    Raises:
        UserError: the folder is no run, has no usable checkpoint, or is another version's.
    """
    config = read_config(folder, str(folder))
    name = config.get("script")
    if name not in SCRIPTS:
        raise UserError(f"{folder}: unknown script {name!r}; known are {', '.join(SCRIPTS)}")
    script = importlib.import_module(name)
    args = stored_args(config["args"], script.Args, str(folder))
    warnings: list[str] = []
    try:
        env_steps, leaves, _ = checkpoint.read_newest(folder, env_steps, warnings.append)
    except UserError as error:
        raise UserError("; ".join([str(error), *warnings[:1]])) from None
    for warning in warnings:
        print(warning, file=sys.stderr)
    try:
        return Trained(folder, config, script, args, env_steps, networks(script, args, leaves))
    except checkpoint.CheckpointError as error:
        raise UserError(f"{folder} is another version's run: {error}") from None


def networks(script: ModuleType, args: Any, leaves: list[np.ndarray]) -> Any:
    """The script's state from a checkpoint's leaves, which are those of (state, key).

    Raises:
        CheckpointError: they do not fit.
    """
    key = jax.random.PRNGKey(0)
    if script.SCRIPT in ("sac_baseline", "vlm_rm_baseline"):
        init = partial(script.init_agent, args=args)
    elif script.SCRIPT == "relay_baseline":
        init = partial(script.init_state, args=args)
    else:  # the width of the heads' input is the VLM's, which need not be loaded for the policy
        init = partial(script.init_state, embed_dim=1, args=args)
        structure = jax.tree.structure((jax.eval_shape(init, key), key))
        if structure.num_leaves == len(leaves):
            heads = jax.tree.unflatten(structure, leaves)[0].projection["params"]
            embed_dim = heads["image"]["Dense_0"]["kernel"].shape[0]
            init = partial(script.init_state, embed_dim=embed_dim, args=args)
    return checkpoint.unflatten(leaves, (jax.eval_shape(init, key), key))[0]


def new_folder(path: Path) -> Path:
    """`path`, if a folder can be made there; it is not made yet.

    Raises:
        UserError: something is there already, or it cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists: choose another --output")
    parent = next(p for p in path.absolute().parents if p.exists())
    try:  # now, not after minutes of work
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another "
                        "--output") from None
    return path


def without_precision(vlm_id: str) -> str:
    """A VLM's id without the number format, which is the machine's choice."""
    return vlm_id.removesuffix("-bf16").removesuffix("-fp32")
