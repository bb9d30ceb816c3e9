"""Ring buffers that live on the device: the replay of transitions and the embedding buffers.

A ring is a pytree of arrays with a counter. `add` is meant to be jitted with the ring donated, so
that a row is written in place whatever the capacity; rows are read inside the jitted update.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError

Rows = Any  # a pytree whose leaves share their leading axis


class Ring(NamedTuple):
    """`data`: pytree of arrays [capacity, ...]; `total`: int32 [], rows ever written."""

    data: Rows
    total: jax.Array

    @property
    def capacity(self) -> int:
        return jax.tree.leaves(self.data)[0].shape[0]

    @property
    def size(self) -> jax.Array:
        """Number of rows that can be read, int32 []."""
        return jnp.minimum(self.total, self.capacity)


class Transition(NamedTuple):
    """One environment step; leaves carry a leading axis [n].

    `embedding` is the frozen VLM's Phi_I of the picture of the state reached, `next_obs`, in
    float16 (float32 if its weights are random): the VLM reward is recomputed at sampling time
    because the projection heads move.
    """

    obs: jax.Array  # [n, obs_dim] float32
    action: jax.Array  # [n, action_dim] float32
    next_obs: jax.Array  # [n, obs_dim] float32
    sparse_reward: jax.Array  # [n] float32, 1 on success, else 0
    terminated: jax.Array  # [n] float32; truncation does not cut the bootstrap
    embedding: jax.Array | None = None  # [n, embed_dim]; None where no VLM is used


class Frame(NamedTuple):
    """One frame of a finished trajectory in an embedding buffer; leaves have a leading axis [n]."""

    embedding: jax.Array  # [n, embed_dim], as in the replay
    trajectory: jax.Array  # [n] int32, a number that no other trajectory of the ring has
    time: jax.Array  # [n] int32, steps since the trajectory's start
    before_success: jax.Array  # [n] bool, the trajectory has had no success before this frame


class Sizes(NamedTuple):
    """How many numbers there are in what is stored; from the environments and the VLM."""

    obs: int
    action: int
    embedding: int = 0  # 0: there is no VLM


def init_ring(example_row: Rows, capacity: int) -> Ring:
    """An empty ring for rows like `example_row` (leaves without the leading axis).

    Raises:
        UserError: the buffer does not fit into memory.
    """
    try:
        data = jax.tree.map(lambda x: jnp.zeros((capacity, *np.shape(x)), x.dtype), example_row)
        return jax.block_until_ready(Ring(data, jnp.zeros((), jnp.int32)))
    except (MemoryError, RuntimeError) as error:  # XLA raises a RuntimeError when out of memory
        row_bytes = sum(np.asarray(x).nbytes for x in jax.tree.leaves(example_row))
        raise UserError(
            f"a buffer of {capacity:,} rows needs {capacity * row_bytes / 2**30:.1f} GiB, which "
            "this device does not have: choose a smaller --buffer-size"
        ) from error


def add(ring: Ring, rows: Rows, num_valid: jax.Array | int | None = None) -> Ring:
    """Write `rows` (leaves [n, ...], n <= capacity) behind the newest row, over the oldest ones.

    Only the first `num_valid` rows are written (default: all), so that trajectories of any length
    can be passed padded to one shape.
    """
    n = jax.tree.leaves(rows)[0].shape[0]
    num_valid = n if num_valid is None else num_valid
    slots = (ring.total + jnp.arange(n)) % ring.capacity
    slots = jnp.where(jnp.arange(n) < num_valid, slots, ring.capacity)  # out of range: dropped
    data = jax.tree.map(
        lambda store, x: store.at[slots].set(x.astype(store.dtype), mode="drop"), ring.data, rows
    )
    return Ring(data, ring.total + num_valid)


def take(ring: Ring, slots: jax.Array) -> Rows:
    """The rows at `slots` ([n] int), leaves [n, ...]."""
    return jax.tree.map(lambda x: x[slots], ring.data)


def sample_slots(ring: Ring, key: jax.Array, batch_size: int) -> jax.Array:
    """Uniform slots of written rows, int32 [batch_size]; slot 0 (zeros) while the ring is empty."""
    return jax.random.randint(key, (batch_size,), 0, jnp.maximum(ring.size, 1))


def lagged_slots(ring: Ring, slots: jax.Array, lag: int) -> tuple[jax.Array, jax.Array]:
    """The frames `lag` steps before those at `slots` in the same trajectory.

    Args:
        ring: a ring of `Frame`s, trajectories written one after another.
        slots: [n] int.
        lag: k of Eq. 4.

    Returns:
        (slots of the earlier frames [n], whether they exist [n] bool). A frame has none in the
        first `lag` steps of its trajectory, after its first success, nor when that part has been
        overwritten.
    """
    earlier = (slots - lag) % ring.capacity
    frames: Frame = ring.data
    exists = (
        (frames.trajectory[earlier] == frames.trajectory[slots])
        & (frames.time[earlier] == frames.time[slots] - lag)
        & frames.before_success[slots]
    )
    return earlier, exists & (slots < ring.size)


def read_rows(ring: Ring, start: int, stop: int) -> Rows:
    """Rows number `start` to `stop` (counted from the first ever written), as numpy arrays."""
    slots = np.arange(start, stop) % ring.capacity
    return jax.tree.map(lambda x: np.asarray(x[slots]), ring.data)


add_rows = jax.jit(add, donate_argnums=0)


@partial(jax.jit, static_argnums=(1, 2))
def count_positives(steps: Ring, num_envs: int, episode_length: int) -> jax.Array:
    """How many positives `sort_episodes` would find, int32 []; arguments as there."""
    if steps.capacity < num_envs * episode_length:
        raise ValueError(f"the ring must hold {num_envs * episode_length} steps")
    first = steps.total - num_envs * episode_length
    slots = (first + jnp.arange(num_envs * episode_length)) % steps.capacity
    success = steps.data.sparse_reward[slots].reshape(episode_length, num_envs) > 0
    time = jnp.arange(episode_length)[:, None]
    return jnp.where(success, time + 1, 0).max(0).sum()


@partial(jax.jit, static_argnums=(3, 4), donate_argnums=(0, 1))
def sort_episodes(
    positives: Ring, negatives: Ring, steps: Ring, num_envs: int, episode_length: int
) -> tuple[Ring, Ring]:
    """Copy the frames of the episodes that have just ended from the replay, as FuRL ranks them.

    An episode with a success gives its frames up to its last success as positives, one without
    gives all of its frames as negatives.

    Args:
        positives, negatives: rings of `Frame`s (donated).
        steps: rows with `embedding` and `sparse_reward`, one for each environment and step; the
            newest are of the episodes' last step.
        num_envs, episode_length: of the episodes, which have all ended in that step.

    Returns:
        (positives, negatives).

    Raises:
        ValueError: a ring is too small for whole episodes; `common.cli.check_episodes_fit` says so
            before a run begins.
    """
    least = num_envs * episode_length
    if steps.capacity < least or min(positives.capacity, negatives.capacity) < episode_length:
        raise ValueError(f"the rings must hold {least} steps and {episode_length} frames")
    time = jnp.arange(episode_length)

    def sort(rings: tuple[Ring, Ring], env: jax.Array) -> tuple[tuple[Ring, Ring], None]:
        first = steps.total - num_envs * episode_length + env  # number of the episode's first row
        rows = take(steps, (first + num_envs * time) % steps.capacity)
        success = rows.sparse_reward > 0
        frames = Frame(
            rows.embedding, trajectory=jnp.full_like(time, first), time=time,
            before_success=jnp.cumsum(success) - success == 0,
        )
        num_positives = jnp.max(jnp.where(success, time + 1, 0))
        num_negatives = jnp.where(num_positives == 0, episode_length, 0)
        return (add(rings[0], frames, num_positives), add(rings[1], frames, num_negatives)), None

    rings, _ = jax.lax.scan(sort, (positives, negatives), jnp.arange(num_envs))
    return rings
