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
    float16: the VLM reward is recomputed at sampling time because the projection heads move.
    """

    obs: jax.Array  # [n, obs_dim] float32
    action: jax.Array  # [n, action_dim] float32
    next_obs: jax.Array  # [n, obs_dim] float32
    sparse_reward: jax.Array  # [n] float32, 1 on success, else 0
    terminated: jax.Array  # [n] float32; truncation does not cut the bootstrap
    embedding: jax.Array | None = None  # [n, embed_dim] float16; None where no VLM is used


class Frame(NamedTuple):
    """One frame of a finished trajectory in an embedding buffer; leaves have a leading axis [n]."""

    embedding: jax.Array  # [n, embed_dim] float16
    trajectory: jax.Array  # [n] int32, a number that no other trajectory of the ring has
    time: jax.Array  # [n] int32, steps since the trajectory's start; -1 after its first success


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
    exists = (frames.trajectory[earlier] == frames.trajectory[slots]) & (
        frames.time[earlier] == frames.time[slots] - lag
    )
    return earlier, exists & (slots < ring.size)


def read_rows(ring: Ring, start: int, stop: int) -> Rows:
    """Rows number `start` to `stop` (counted from the first ever written), as numpy arrays."""
    slots = np.arange(start, stop) % ring.capacity
    return jax.tree.map(lambda x: np.asarray(x[slots]), ring.data)


add_rows = jax.jit(add, donate_argnums=0)


def add_episodes(frames: Ring, steps: Ring, lengths: np.ndarray, episode_length: int) -> Ring:
    """Copy the first frames of finished episodes from the replay to an embedding buffer.

    Args:
        frames: of `Frame`s (donated).
        steps: rows with `embedding` and `sparse_reward`, one for each environment and step; the
            newest are of the episodes' last step, and it must still hold their first.
        lengths: int [num_envs], frames to copy of each environment's episode; 0: none of it.
        episode_length: steps of all episodes.
    """
    for env in np.flatnonzero(lengths):
        frames = _add_episode(frames, steps, env, lengths[env], len(lengths), episode_length)
    return frames


@partial(jax.jit, static_argnums=(4, 5), donate_argnums=0)
def _add_episode(
    frames: Ring, steps: Ring, env: jax.Array, length: jax.Array, num_envs: int, episode_length: int
) -> Ring:
    time = jnp.arange(episode_length)
    first = steps.total - num_envs * episode_length + env  # number of the episode's first row
    rows = take(steps, (first + num_envs * time) % steps.capacity)
    successes_before = jnp.cumsum(rows.sparse_reward) - rows.sparse_reward
    time = jnp.where(successes_before == 0, time, -1)
    return add(frames, Frame(rows.embedding, jnp.full_like(time, first), time), length)
