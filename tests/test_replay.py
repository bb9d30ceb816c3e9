"""Rings and trajectories: every field of every row encodes the number of the row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import replay
from common.errors import UserError
from common.replay import Frame, Transition


def transitions(ids) -> Transition:
    """Rows whose fields all encode the row's number, each in its own way."""
    ids = np.asarray(ids, np.float32)
    return Transition(
        obs=np.stack([ids, ids + 0.25], 1),
        action=-ids[:, None],
        next_obs=np.stack([ids + 1, ids + 1.25], 1),
        sparse_reward=ids * 2,
        terminated=ids * 3,
        embedding=np.stack([ids, -ids, ids / 2], 1).astype(np.float16),
    )


def empty_transitions(capacity: int) -> replay.Ring:
    return replay.init_ring(jax.tree.map(lambda x: x[0], transitions([0])), capacity)


def empty_frames(capacity: int, embed_dim: int = 2) -> replay.Ring:
    number = np.zeros((), np.int32)
    return replay.init_ring(Frame(np.zeros(embed_dim, np.float16), number, number), capacity)


def assert_rows(rows: Transition, ids) -> None:
    for actual, expected in zip(rows, transitions(ids), strict=True):
        np.testing.assert_array_equal(np.asarray(actual), expected)


# ------------------------------------------------------------------------------- ring


def test_an_empty_ring_has_no_rows():
    ring = empty_transitions(7)
    assert (ring.capacity, int(ring.size), int(ring.total)) == (7, 0, 0)
    assert ring.data.embedding.dtype == jnp.float16 and ring.data.obs.shape == (7, 2)
    np.testing.assert_array_equal(replay.sample_slots(ring, jax.random.key(0), 5), np.zeros(5))


def test_rows_wrap_around_a_capacity_that_their_number_does_not_divide():
    ring, capacity = empty_transitions(7), 7
    expected = np.full(capacity, -1)
    for start in range(1, 40, 3):  # three at a time
        ids = np.arange(start, start + 3)
        expected[(ids - 1) % capacity] = ids
        ring = replay.add_rows(ring, transitions(ids))
        written = np.flatnonzero(expected >= 0)
        assert int(ring.total) == start + 2
        assert int(ring.size) == len(written) == min(start + 2, capacity)
        assert_rows(replay.take(ring, written), expected[written])
    assert sorted(expected.tolist()) == list(range(33, 40)), "the newest seven"


def test_a_ring_takes_as_many_rows_as_it_can_hold():
    ring = replay.add_rows(empty_transitions(4), transitions([1]))
    ring = replay.add_rows(ring, transitions([2, 3, 4, 5]))
    assert_rows(replay.take(ring, np.arange(4)), [5, 2, 3, 4])


def test_padding_is_not_written():
    ring = replay.add_rows(empty_transitions(7), transitions(np.arange(1, 7)))
    ring = replay.add_rows(ring, transitions([7, 8, 9, 99, 98]), 3)
    assert (int(ring.total), int(ring.size)) == (9, 7)
    assert_rows(replay.take(ring, np.arange(7)), [8, 9, 3, 4, 5, 6, 7])
    ring = replay.add_rows(ring, transitions([97, 96]), 0)
    assert int(ring.total) == 9
    assert_rows(replay.take(ring, np.arange(7)), [8, 9, 3, 4, 5, 6, 7])


def test_padding_may_exceed_the_capacity():
    ring = replay.add_rows(empty_transitions(4), transitions([1, 2, 3]))
    ring = replay.add_rows(ring, transitions([4, 5, 91, 92, 93, 94, 95]), 2)
    assert_rows(replay.take(ring, np.arange(4)), [5, 2, 3, 4])


def test_samples_are_uniform_over_written_rows_only():
    ring = replay.add_rows(empty_transitions(50), transitions(np.arange(5)))
    slots = np.asarray(replay.sample_slots(ring, jax.random.key(1), 5000))
    counts = np.bincount(slots, minlength=50)
    assert counts[5:].sum() == 0
    assert np.abs(counts[:5] - 1000).max() < 150  # five standard deviations
    ring = replay.add_rows(empty_transitions(5), transitions(np.arange(3)))
    ring = replay.add_rows(ring, transitions(np.arange(3, 7)))
    slots = np.asarray(replay.sample_slots(ring, jax.random.key(2), 500))
    assert set(slots.tolist()) == {0, 1, 2, 3, 4}, "a full ring is sampled whole"


def test_read_rows_counts_from_the_first_row_ever_written():
    ring = empty_transitions(7)
    for start in range(0, 12, 3):
        ring = replay.add_rows(ring, transitions(np.arange(start, start + 3)))
    assert_rows(replay.read_rows(ring, 5, 12), np.arange(5, 12))
    assert_rows(replay.read_rows(ring, 9, 11), [9, 10])


def test_a_buffer_beyond_the_memory_is_a_user_error():
    with pytest.raises(UserError, match="--buffer-size"):
        empty_transitions(2**50)


# ------------------------------------------------------------------------ trajectories


def frames_of(number: int, length: int) -> np.ndarray:
    """Embeddings [length, 2] that encode (trajectory, time)."""
    return np.stack([np.full(length, number), np.arange(length)], 1).astype(np.float16)


def add_frames(ring: replay.Ring, number: int, length: int) -> replay.Ring:
    time = np.arange(length, dtype=np.int32)
    return replay.add_rows(ring, Frame(frames_of(number, length), np.full_like(time, number), time))


class Step(NamedTuple):
    embedding: np.ndarray
    sparse_reward: np.ndarray


def steps_of(step: int, success: tuple[bool, ...]) -> Step:
    """Rows of all environments' step; embeddings encode (environment, step)."""
    embedding = np.array([[env, step] for env in range(len(success))], np.float16)
    return Step(embedding, np.array(success, np.float32))


@pytest.mark.parametrize("lengths", [(0, 4, 0), (1, 0, 3), (4, 4, 4), (0, 0, 0)])
@pytest.mark.parametrize("capacity", [12, 13, 21])  # of the replay, which holds an episode of 4
def test_add_episodes_copies_how_they_began(lengths, capacity):
    steps = replay.init_ring(Step(np.zeros(2, np.float16), np.zeros((), np.float32)), capacity)
    ring, added = add_frames(empty_frames(60), 77, 6), []
    for step in range(12):  # three episodes; each environment succeeds from another time on
        time = step % 4
        steps = replay.add_rows(steps, steps_of(step, (time >= 1, time >= 2, time in (0, 3))))
        if time == 3:
            ring = replay.add_episodes(ring, steps, np.array(lengths), 4)
            added += [(env, step - 3 + t, t if t <= (1, 2, 0)[env] else -1)
                      for env in range(3) for t in range(lengths[env])]
    rows: Frame = replay.read_rows(ring, 6, int(ring.total))
    actual = np.concatenate([rows.embedding, rows.time[:, None]], 1).astype(int)
    assert [tuple(row) for row in actual.tolist()] == added
    starts = rows.trajectory[rows.time == 0]
    assert len(set(starts.tolist())) == len(starts), "two trajectories have one number"
    np.testing.assert_array_equal(
        rows.trajectory, np.repeat(starts, [n for n in lengths if n] * 3))


def test_lag_pairs_end_with_the_first_success():
    steps = replay.init_ring(Step(np.zeros(2, np.float16), np.zeros((), np.float32)), 10)
    for step in range(10):
        steps = replay.add_rows(steps, steps_of(step, (step in (6, 7, 9),)))
    ring = replay.add_episodes(empty_frames(20), steps, np.array([10]), 10)
    earlier, exists = replay.lagged_slots(ring, np.arange(10), 2)
    np.testing.assert_array_equal(np.flatnonzero(exists), [2, 3, 4, 5, 6])
    np.testing.assert_array_equal(np.asarray(earlier)[2:7], [0, 1, 2, 3, 4])


def check_lagged(ring: replay.Ring, lag: int) -> np.ndarray:
    """Compare with a search through the whole ring; returns where a pair exists."""
    slots = np.arange(ring.capacity)
    earlier, exists = (np.asarray(x) for x in replay.lagged_slots(ring, slots, lag))
    number, time = np.asarray(ring.data.trajectory), np.asarray(ring.data.time)
    for slot in slots:
        found = [
            i for i in slots[: int(ring.size)]
            if slot < int(ring.size) and number[i] == number[slot] and time[i] == time[slot] - lag
        ]
        assert exists[slot] == bool(found), slot
        if found:
            assert [earlier[slot]] == found
    return exists


def test_lagged_slots_stay_in_their_trajectory():
    ring = add_frames(empty_frames(20), 0, 6)
    ring = add_frames(ring, 1, 3)
    ring = add_frames(ring, 2, 5)
    exists = check_lagged(ring, lag=3)
    # trajectory 0: times 3, 4, 5; trajectory 1 is too short; trajectory 2: times 3, 4.
    np.testing.assert_array_equal(np.flatnonzero(exists), [3, 4, 5, 12, 13])
    earlier, _ = replay.lagged_slots(ring, np.array([5, 13]), 3)
    np.testing.assert_array_equal(earlier, [2, 10])


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_lagged_slots_after_overwriting(lag):
    ring = empty_frames(11)
    for number, length in enumerate([6, 4, 7, 3, 11, 2, 8]):
        ring = add_frames(ring, number, length)
        check_lagged(ring, lag)


def test_lagged_slots_of_an_overwritten_start():
    ring = add_frames(empty_frames(8), 0, 8)
    ring = add_frames(ring, 1, 3)  # over times 0, 1, 2 of trajectory 0
    exists = check_lagged(ring, lag=2)
    np.testing.assert_array_equal(np.flatnonzero(exists), [2, 5, 6, 7])


def test_an_empty_ring_has_no_pairs():
    _, exists = replay.lagged_slots(empty_frames(6), np.arange(6), 1)
    assert not exists.any()
    # Not even with a lag of the whole ring, where unwritten slots would be their own partners.
    assert not replay.lagged_slots(empty_frames(6), np.arange(6), 6)[1].any()
