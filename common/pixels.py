"""The replay of policies that see pictures: each picture is stored once, and stacked when read.

All episodes begin and end together, so rows come in blocks of `num_envs`. An episode is
`episode_length + 1` blocks: its first pictures, to which no step led, then a block for each step.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common import replay
from common.envs.workers import Step
from common.errors import UserError
from common.replay import Ring, Sizes, Transition

PICTURE_SIZE = 84  # pixels, width and height of what the policy sees


class PixelStep(NamedTuple):
    """What is stored of a step: the picture reached, and what led there."""

    picture: jax.Array  # [n, 84, 84, 3] uint8
    action: jax.Array  # [n, action_dim] float32
    reward: jax.Array  # [n] float32
    terminated: jax.Array  # [n] float32
    embedding: jax.Array | None = None  # [n, embed_dim]; None where no VLM is used


class Layout(NamedTuple):
    """How the rows of a ring of PixelSteps belong together."""

    num_envs: int
    episode_length: int  # actions
    frame_stack: int  # pictures that the policy sees, the newest last


def example_step(sizes: Sizes, exact: bool = False) -> PixelStep:
    """A row of the ring; `exact`: embeddings in float32 instead of float16."""
    picture = np.zeros((PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    row = replay.example_transition(sizes, exact)
    return PixelStep(picture, row.action, row.reward, row.terminated, row.embedding)


@jax.jit
def scale_down(frames: jax.Array) -> jax.Array:
    """uint8 [n, height, width, channels] -> uint8 [n, 84, 84, channels], antialiased."""
    if frames.shape[1] == PICTURE_SIZE:
        return frames
    shape = (frames.shape[0], PICTURE_SIZE, PICTURE_SIZE, frames.shape[3])
    resized = jax.image.resize(frames.astype(jnp.float32), shape, "linear", antialias=True)
    return resized.round().clip(0, 255).astype(jnp.uint8)


def observe(
    obs: np.ndarray, step: Step, frame_stack: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What a policy that saw the stacks `obs` sees after a step.

    Returns:
        (stacks [num_envs, 84, 84, 3 frame_stack], the pictures reached [num_envs, 84, 84, 3], and
        at an episode's end the first pictures of the next, which `obs` then shows), all uint8.
    """
    picture, first = np.asarray(scale_down(step.frames)), None
    obs = np.concatenate([obs[..., 3:], picture], -1)
    if step.truncated.all():  # all episodes end together
        first = np.asarray(scale_down(step.reset_frames))
        obs = np.concatenate([first] * frame_stack, -1)
    return obs, picture, first


def add_first(ring: Ring, pictures: np.ndarray) -> Ring:
    """Write the block that begins an episode, pictures [num_envs, 84, 84, 3]."""
    nothing = jax.tree.map(lambda x: np.zeros((len(pictures), *x.shape[1:]), x.dtype), ring.data)
    return replay.add_rows(ring, nothing._replace(picture=pictures))


def add_step(ring: Ring, step: PixelStep, first: np.ndarray | None) -> Ring:
    """Write a step, and after an episode's last one the `first` pictures of the next episodes."""
    ring = replay.add_rows(ring, step)
    return ring if first is None else add_first(ring, first)


def without_first(ring: Ring, layout: Layout) -> Ring:
    """The ring as it was before `add_first`: its newest rows are the ended episodes' last steps."""
    return ring._replace(total=ring.total - layout.num_envs)


def stack(ring: Ring, block: jax.Array, env: jax.Array, layout: Layout) -> jax.Array:
    """The pictures up to row `block` [n] of environment `env` [n]: [n, 84, 84, 3 frame_stack].

    A stack never reaches beyond the first picture of its episode, which is repeated.
    """
    time = block % (layout.episode_length + 1)
    ages = jnp.minimum(jnp.arange(layout.frame_stack - 1, -1, -1), time[:, None])
    slots = ((block[:, None] - ages) * layout.num_envs + env[:, None]) % ring.capacity
    pictures = ring.data.picture[slots]  # [n, frame_stack, 84, 84, 3]
    return jnp.moveaxis(pictures, 1, -2).reshape(*pictures.shape[:1], *pictures.shape[2:4], -1)


@partial(jax.jit, static_argnames="layout")
def newest_stack(ring: Ring, layout: Layout) -> jax.Array:
    """What the policy sees now, in all environments: [num_envs, 84, 84, 3 frame_stack]."""
    newest = jnp.full(layout.num_envs, ring.total // layout.num_envs - 1)
    return stack(ring, newest, jnp.arange(layout.num_envs), layout)


def sample(
    ring: Ring, step_key: jax.Array, env_key: jax.Array, batch_size: int, layout: Layout
) -> Transition:
    """Uniform transitions; obs and next_obs are stacks, uint8 [batch, 84, 84, 3 frame_stack]."""
    length = layout.episode_length
    blocks = ring.total // layout.num_envs
    # The pictures before the oldest blocks have been overwritten.
    oldest = jnp.maximum(0, blocks - ring.capacity // layout.num_envs + layout.frame_stack)

    def steps_before(block: jax.Array) -> jax.Array:
        return block - -(-block // (length + 1))

    number = jax.random.randint(
        step_key, (batch_size,), steps_before(oldest), steps_before(blocks)
    )
    block = number + number // length + 1  # never an episode's first
    env = jax.random.randint(env_key, (batch_size,), 0, layout.num_envs)
    rows = replay.take(ring, (block * layout.num_envs + env) % ring.capacity)
    return Transition(  # XLA drops what is not used of the rows: their pictures
        obs=stack(ring, block - 1, env, layout),
        action=rows.action,
        next_obs=stack(ring, block, env, layout),
        reward=rows.reward,
        terminated=rows.terminated,
        embedding=rows.embedding,
    )


def actions_per_episode(max_episode_steps: int, action_repeat: int) -> int:
    """Actions in an episode of so many physics steps, each for `action_repeat` of them.

    Raises:
        UserError: the last action would be cut short.
    """
    if max_episode_steps % action_repeat:
        raise UserError(f"--action-repeat must divide {max_episode_steps}, the steps of an "
                        f"episode, not {action_repeat}")
    return max_episode_steps // action_repeat


def whole_blocks(buffer_size: int, layout: Layout) -> int:
    """`buffer_size` rounded up to whole steps of all environments, which is said.

    Raises:
        UserError: it cannot hold an episode with its first picture, or both stacks of a transition.
    """
    whole = -(-buffer_size // layout.num_envs) * layout.num_envs
    if whole != buffer_size:
        print(f"note: --buffer-size {buffer_size} becomes {whole}, whole steps of "
              f"{layout.num_envs} environments")
    least = layout.num_envs * (max(layout.episode_length, layout.frame_stack) + 2)
    if whole < least:
        raise UserError(f"--buffer-size must hold the pictures of an episode of each of "
                        f"{layout.num_envs} environments, {least} or more, not {whole}")
    return whole
