"""Ring buffers that live on the device: the replay of transitions and the embedding buffers.

A ring is a pytree of arrays with a counter. `add` is meant to be jitted with the ring donated, so
that a row is written in place whatever the capacity; rows are read inside the jitted update.
"""

from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from common.memory import check_memory
from common.vlms import VLM

Rows = Any  # a pytree whose leaves share their leading axis
BuffersT = TypeVar("BuffersT", bound=NamedTuple)


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
    reward: jax.Array  # [n] float32, the task's; Meta-World's is 1 on success, else 0
    terminated: jax.Array  # [n] float32; truncation does not cut the bootstrap
    embedding: jax.Array | None = None  # [n, embed_dim]; None where no VLM is used


class EmbeddedFrame(NamedTuple):
    """A frame of a finished trajectory, as its embedding; leaves have a leading axis [n]."""

    embedding: jax.Array  # [n, embed_dim], as in the replay
    time: jax.Array  # [n] int32, steps since the trajectory's start
    before_success: jax.Array  # [n] bool, the trajectory has had no success before this frame
    row: jax.Array  # [n] int32, number of its row in the replay, counted from the run's first


class Sizes(NamedTuple):
    """How many numbers there are in what is stored; from the environments and the VLM."""

    obs: int
    action: int
    embedding: int = 0  # 0: there is no VLM


def example_transition(sizes: Sizes, exact: bool = False) -> Transition:
    """A row of a replay; its embedding, if there is a VLM, in float16, or `exact` in float32."""
    obs, action, number = (np.zeros(n, np.float32) for n in (sizes.obs, sizes.action, ()))
    embedding = np.zeros(sizes.embedding, np.float32 if exact else np.float16)
    return Transition(obs, action, obs, number, number, embedding if sizes.embedding else None)


def example_frame(sizes: Sizes, exact: bool = False) -> EmbeddedFrame:
    """A row of an embedding buffer; `exact` as for `example_transition`."""
    embedding = np.zeros(sizes.embedding, np.float32 if exact else np.float16)
    return EmbeddedFrame(embedding, np.int32(0), np.bool_(False), np.int32(0))


def init_ring(example_row: Rows, capacity: int, flag: str = "--buffer-size") -> Ring:
    """An empty ring for rows like `example_row` (leaves without the leading axis).

    Args:
        flag: what a user has set `capacity` with.

    Raises:
        UserError: the buffer does not fit into memory; a ShortageError if it does not for now.
    """
    need = capacity * sum(np.asarray(x).nbytes for x in jax.tree.leaves(example_row))
    check_memory(need, f"a buffer of {capacity:,} rows", f"choose a smaller {flag}")
    return empty_ring(example_row, capacity)


def empty_ring(example_row: Rows, capacity: int) -> Ring:
    """`init_ring` without its checks."""
    data = jax.tree.map(lambda x: jnp.zeros((capacity, *np.shape(x)), x.dtype), example_row)
    return Ring(data, jnp.zeros((), jnp.int32))


def row_bytes(ring: Ring) -> int:
    """Bytes that one row takes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(ring.data)) // ring.capacity


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


def read_rows(ring: Ring, start: int, stop: int) -> Rows:
    """Rows number `start` to `stop` (counted from the first ever written), as numpy arrays."""
    slots = np.arange(start, stop) % ring.capacity
    return jax.tree.map(lambda x: np.asarray(x[slots]), ring.data)


add_rows = jax.jit(add, donate_argnums=0)


@partial(jax.jit, static_argnames="n")
def newest_rows(ring: Ring, n: int) -> Rows:
    """The `n` rows that were written last, the oldest of them first, leaves [n, ...]."""
    return take(ring, (ring.total - n + jnp.arange(n)) % ring.capacity)


def embed_drawn(vlm: VLM, frames: np.ndarray, drawn: np.ndarray, steps: Ring) -> jax.Array:
    """The embeddings of one step of all environments, [N, D].

    Args:
        vlm: what embeds frames.
        frames: uint8 [N, size, size, 3], what it sees.
        drawn: where this step has a new frame, bool [N]. Elsewhere the embedding of the step before
            is used again; it is read from the replay, so that a resumed run has it too.
        steps: the replay, whose newest rows are the step before.
    """
    if drawn.all():
        return vlm.embed_images(frames)
    held = newest_rows(Ring(steps.data.embedding, steps.total), len(drawn))
    if not drawn.any():
        return held
    new = vlm.embed_images(frames[drawn])
    return held.at[np.flatnonzero(drawn)].set(new.astype(held.dtype))


# ------------------------------------------------ episodes that begin and end together


def newest_episode(steps: Ring, env: jax.Array, num_envs: int, episode_length: int) -> Rows:
    """One environment's rows of the episode that has just ended, leaves [episode_length, ...].

    Args:
        steps: one row for each environment and step; the newest are of the episodes' last step. It
            holds whole episodes, as `flags.check_replay` makes sure before a run begins.
        env: number of the environment, int [].
        num_envs, episode_length: of the episodes, which have all ended in that step.
    """
    first = steps.total - num_envs * episode_length + env
    return take(steps, (first + num_envs * jnp.arange(episode_length)) % steps.capacity)


def sort_episodes(
    buffers: BuffersT, steps: Ring, num_envs: int, episode_length: int
) -> BuffersT:
    """Copy the frames of the episodes that have just ended to the positives or the negatives.

    An episode with a success gives its frames up to its last success as positives, one without
    gives all of its frames as negatives.

    Args:
        buffers: a NamedTuple with the rings `positives` and `negatives`, of `EmbeddedFrame`, which
            are donated.
        steps, num_envs, episode_length: as for `newest_episode`.
    """
    rings = buffers.positives, buffers.negatives
    positives, negatives = _sort_episodes(rings, steps, num_envs, episode_length)
    return buffers._replace(positives=positives, negatives=negatives)


@partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def _sort_episodes(
    rings: tuple[Ring, Ring], steps: Ring, num_envs: int, episode_length: int
) -> tuple[Ring, Ring]:
    time = jnp.arange(episode_length)

    def sort(rings: tuple[Ring, Ring], env: jax.Array) -> tuple[tuple[Ring, Ring], None]:
        rows = newest_episode(steps, env, num_envs, episode_length)
        success = rows.reward > 0
        before_success = jnp.cumsum(success) - success == 0
        row = steps.total - num_envs * (episode_length - time) + env
        frames = EmbeddedFrame(rows.embedding, time, before_success, row)
        num_positives = jnp.max(jnp.where(success, time + 1, 0))
        num_negatives = jnp.where(num_positives == 0, episode_length, 0)
        positives = add(rings[0], frames, num_positives)
        return (positives, add(rings[1], frames, num_negatives)), None

    return jax.lax.scan(sort, rings, jnp.arange(num_envs))[0]


def lagged_slots(ring: Ring, slots: jax.Array, lag: int) -> tuple[jax.Array, jax.Array]:
    """The frames `lag` steps before those at `slots` [n] (FuRL's Eq. 4), and whether they exist.

    A frame has none in the first `lag` steps of its trajectory, after its first success, nor when
    that part of the ring has been overwritten.
    """
    frames: EmbeddedFrame = ring.data
    age = (ring.total - 1 - slots) % ring.capacity  # number of frames added since
    exists = (frames.time[slots] >= lag) & (age + lag < ring.capacity)
    return (slots - lag) % ring.capacity, exists & frames.before_success[slots]


class LaggedFrames(NamedTuple):
    """Frames of successes [n], each with the one k steps before it (FuRL's Eq. 4)."""

    embedding: jax.Array  # [n, D]
    old_enough: jax.Array  # bool [n]: not of an episode's first k steps
    earlier: jax.Array  # embedding k steps before, [n, D]; any where there is none
    has_earlier: jax.Array  # bool [n], as `lagged_slots` says


def lagged_frames(ring: Ring, slots: jax.Array, lag: int) -> LaggedFrames:
    """The frames at `slots` [n], with those `lag` steps before them."""
    frames: EmbeddedFrame = ring.data
    earlier, has_earlier = lagged_slots(ring, slots, lag)
    return LaggedFrames(
        frames.embedding[slots], frames.time[slots] >= lag, frames.embedding[earlier], has_earlier
    )


def sample_with_successes(
    steps: Ring, positives: Ring, key: jax.Array, batch_size: int, share: float
) -> jax.Array:
    """Uniform slots of the replay `steps`, but for a share from successful episodes: [batch_size].

    The share is of the rows that `positives` (of `EmbeddedFrame`) names. Until there are any, or
    where such a row has been overwritten, it is uniform too.
    """
    uniform_key, positive_key = jax.random.split(key)
    uniform = sample_slots(steps, uniform_key, batch_size)
    row = positives.data.row[sample_slots(positives, positive_key, batch_size)]
    kept = (positives.size > 0) & (row >= steps.total - steps.size)
    chosen = jnp.arange(batch_size) < round(share * batch_size)
    return jnp.where(chosen & kept, row % steps.capacity, uniform)


class FollowingSteps(NamedTuple):
    """Sampled steps [batch], each with those that follow it [n, batch]."""

    slots: jax.Array  # [n, batch] int32, of the sampled step and its followers
    exists: jax.Array  # [n, batch] bool: of the same episode, and not behind the newest row
    last: jax.Array  # [batch] int32, slot of the last one that exists
    before: jax.Array  # [batch] int32, slot of the step before the sampled one
    first: jax.Array  # [batch] int32, slot of the first step of its episode
    time: jax.Array  # [batch] int32, of the sampled step in its episode
    episode: jax.Array  # [batch] int32, number of its episode, counted over all environments

    def discounted_sum(self, rewards: jax.Array, gamma: float) -> jax.Array:
        """sum_k gamma^k r_k over the steps that exist, rewards [n, batch] or [batch] -> [batch]."""
        return (gamma ** jnp.arange(len(self.exists))[:, None] * self.exists * rewards).sum(0)


def following_steps(
    steps: Ring, slots: jax.Array, n: int, num_envs: int, episode_length: int
) -> FollowingSteps:
    """The steps at `slots` [batch] and the n - 1 that follow each of them in its episode.

    Args:
        steps: as for `newest_episode`, of `Transition`. Nothing follows where it is terminated.
        n: number of steps, the sampled one included.
        num_envs, episode_length: of the episodes. Episode number e of environment i is number
            e num_envs + i.
    """
    age = (steps.total - 1 - slots) % steps.capacity  # number of rows added since
    iteration, env = jnp.divmod(steps.total - 1 - age, num_envs)
    episode, time = jnp.divmod(iteration, episode_length)
    ahead = jnp.arange(n)[:, None]
    following = (slots + ahead * num_envs) % steps.capacity
    exists = (ahead * num_envs <= age) & (time + ahead < episode_length)
    terminated = steps.data.terminated[following] * exists
    exists &= jnp.cumsum(terminated, 0) - terminated == 0
    last = jnp.take_along_axis(following, exists.sum(0)[None] - 1, 0)[0]

    def earlier(num_steps: jax.Array | int) -> jax.Array:
        """Where that has been overwritten, the sampled step stands for it itself."""
        back = num_envs * num_steps
        return jnp.where(age + back < steps.size, slots - back, slots) % steps.capacity

    number = episode * num_envs + env
    return FollowingSteps(following, exists, last, earlier(1), earlier(time), time, number)
