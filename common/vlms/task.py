"""What FuRL compares a picture with: the embeddings of a task's instruction and goal picture."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.envs.metaworld_suite import goal_image
from common.envs.registry import METAWORLD
from common.vlms.interface import VLM, view_for


class VLMInputs(NamedTuple):
    text: jax.Array  # Phi_L(l) [embed_dim]
    goal: jax.Array  # Phi_I(o_g) [embed_dim]; zeros without a goal image


def load_inputs(vlm: VLM, args: Any) -> VLMInputs:
    """Those of a run on Meta-World.

    Args:
        args: a script's, with FuRL's flags: `env_id`, `seed`, `goal`, `prompt`, `camera_id`,
            `quality`, `align` and `goal_image`.
    """
    text = vlm.embed_text([METAWORLD.prompt_for(args.env_id, args.prompt)])[0]
    goal = np.zeros_like(text)
    if args.align and args.goal_image:
        camera = view_for(vlm, METAWORLD).camera(args.camera_id, args.quality)
        picture = goal_image(args.env_id, seed=args.seed, goal=args.goal, camera=camera)
        goal = vlm.embed_images(picture[None])[0]
    return VLMInputs(jnp.asarray(text), jnp.asarray(goal))
