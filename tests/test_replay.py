"""Rings and trajectories: every field of every row encodes the number of the row."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import memory, replay
from common.errors import ShortageError, UserError
from common.replay import EmbeddedFrame, Transition, lagged_slots, sort_episodes
from relay_baseline import count_positives


def transitions(ids) -> Transition:
    """Rows whose fields all encode the row's number, each in its own way."""
    ids = np.asarray(ids, np.float32)
    return Transition(
        obs=np.stack([ids, ids + 0.25], 1),
        action=-ids[:, None],
        next_obs=np.stack([ids + 1, ids + 1.25], 1),
        reward=ids * 2,
        terminated=ids * 3,
        embedding=np.stack([ids, -ids, ids / 2], 1).astype(np.float16),
    )


def empty_transitions(capacity: int) -> replay.Ring:
    return replay.init_ring(jax.tree.map(lambda x: x[0], transitions([0])), capacity)


def empty_frames(capacity: int, embed_dim: int = 2) -> replay.Ring:
    number = np.zeros((), np.int32)
    frame = EmbeddedFrame(np.zeros(embed_dim, np.float16), number, np.zeros((), bool), number)
    return replay.init_ring(frame, capacity)


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


@pytest.mark.parametrize(("free", "total", "error"), [
    (300, 300, UserError), (300, 400, ShortageError), (356, 356, None)])
def test_a_buffer_beyond_what_is_free_is_refused_before_it_is_allocated(
        monkeypatch, free, total, error):
    """100 MiB of rows, beside what a run needs itself (256 MiB)."""
    found = memory.Memory(free * 2**20, total * 2**20)
    monkeypatch.setattr(memory, "host_memory", lambda: found)
    monkeypatch.setattr(replay, "empty_ring", lambda row, capacity: capacity)
    if error is None:
        assert replay.init_ring(np.zeros(25, np.float32), 2**20) == 2**20
        return
    with pytest.raises(UserError) as caught:
        replay.init_ring(np.zeros(25, np.float32), 2**20, "--embedding-buffer-size")
    assert type(caught.value) is error
    assert str(caught.value) == (
        "a buffer of 1,048,576 rows needs 0.1 GiB and a run 0.25 GiB beside it, but of "
        f"{total / 1024:.1f} GiB of memory 0.3 are free: choose a smaller --embedding-buffer-size")


def test_a_buffer_where_the_system_does_not_tell_its_memory(monkeypatch):
    def unknown():
        raise UserError("no /proc here")

    monkeypatch.setattr(memory, "host_memory", unknown)
    assert empty_transitions(4).capacity == 4


# ------------------------------------------------------------------------ trajectories


def frames_of(number: int, length: int) -> np.ndarray:
    """Embeddings [length, 2] that encode (trajectory, time)."""
    return np.stack([np.full(length, number), np.arange(length)], 1).astype(np.float16)


def add_frames(
    ring: replay.Ring, number: int, length: int, first_success: int | None = None
) -> replay.Ring:
    """Write a whole trajectory; `first_success` is a time, None if there is no success."""
    time = np.arange(length, dtype=np.int32)
    before_success = np.full(length, True) if first_success is None else time <= first_success
    frames = EmbeddedFrame(frames_of(number, length), time, before_success, time)
    return replay.add_rows(ring, frames)


class Step(NamedTuple):
    embedding: np.ndarray
    reward: np.ndarray


class Sorted(NamedTuple):
    positives: replay.Ring
    negatives: replay.Ring


EPISODE = 4  # steps
# The times with success, of each environment in each episode.
Successes = list[list[set[int]]]
BY_HAND: Successes = [
    [{1}, set(), {0, 2}],
    [set(), set(), set()],
    [{3}, {0}, {0, 1, 2, 3}],
    [{1, 3}, {2}, set()],
]


def play(successes: Successes, capacity: int):
    """Write the episodes step by step; yields the replay at each episode's end.

    The embeddings encode (environment, number of the step).
    """
    steps = replay.init_ring(Step(np.zeros(2, np.float16), np.zeros((), np.float32)), capacity)
    for episode, times in enumerate(successes):
        for time in range(EPISODE):
            embedding = np.array(
                [[env, episode * EPISODE + time] for env in range(len(times))], np.float16
            )
            reward = np.array([time in successful for successful in times], np.float32)
            steps = replay.add_rows(steps, Step(embedding, reward))
        yield steps


def expected_frames(successes: Successes) -> tuple[list, list]:
    """What is a positive and what a negative: (env, step, time, before success) of each frame."""
    positives, negatives = [], []
    for episode, times in enumerate(successes):
        for env, successful in enumerate(times):
            last, first = max(successful, default=EPISODE - 1), min(successful, default=EPISODE)
            ring = positives if successful else negatives
            ring += [(env, episode * EPISODE + t, t, t <= first) for t in range(last + 1)]
    return positives, negatives


def rows_of(ring: replay.Ring, num_rows: int) -> list[tuple]:
    """The newest rows as `expected_frames` gives them."""
    rows: EmbeddedFrame = replay.read_rows(ring, int(ring.total) - num_rows, int(ring.total))
    return [(int(e[0]), int(e[1]), int(t), bool(b))
            for e, t, b in zip(rows.embedding, rows.time, rows.before_success, strict=True)]


def random_successes(seed: int) -> Successes:
    rng = np.random.default_rng(seed)
    return [[set(np.flatnonzero(rng.random(EPISODE) < 0.3).tolist()) for _ in range(3)]
            for _ in range(6)]


@pytest.mark.parametrize("successes", [BY_HAND, random_successes(0), random_successes(1)],
                         ids=["by hand", "random", "random too"])
@pytest.mark.parametrize("capacity", [12, 13, 31])  # of the replay, which holds an episode of each
def test_episodes_are_sorted_by_their_last_success(successes, capacity):
    before = 6  # rows that the positives' ring has already
    frames = Sorted(add_frames(empty_frames(100), 777, before), empty_frames(100))
    for number, steps in enumerate(play(successes, capacity)):
        counted = count_positives(steps, 3, EPISODE)
        total = int(frames.positives.total)
        frames = sort_episodes(frames, steps, 3, EPISODE)
        positives, negatives = frames
        expected = expected_frames(successes[: number + 1])
        assert int(positives.total) - before == len(expected[0])
        assert int(negatives.total) == len(expected[1])
        assert int(counted) == int(positives.total) - total
    assert rows_of(positives, len(expected[0])) == expected[0]
    assert rows_of(negatives, len(expected[1])) == expected[1]
    assert expected[0] and expected[1]
    # Rows of before are untouched.
    np.testing.assert_array_equal(positives.data.embedding[:before], frames_of(777, before))


def test_what_the_first_episodes_by_hand_give():
    """The same, spelt out for BY_HAND's first episodes."""
    steps = next(play(BY_HAND, 12))
    frames = Sorted(empty_frames(20), empty_frames(20))
    positives, negatives = sort_episodes(frames, steps, 3, EPISODE)
    assert rows_of(positives, int(positives.total)) == [
        (0, 0, 0, True), (0, 1, 1, True),  # up to the only success, at time 1
        (2, 0, 0, True), (2, 1, 1, False), (2, 2, 2, False),  # successes at 0 and at 2
    ]
    assert rows_of(negatives, int(negatives.total)) == [(1, t, t, True) for t in range(4)]
    assert int(count_positives(steps, 3, EPISODE)) == 5


def test_sorted_episodes_wrap_around_small_rings():
    """Rings that just hold an episode keep the newest frames."""
    successes = random_successes(2)
    frames = Sorted(empty_frames(EPISODE), empty_frames(5))
    for steps in play(successes, 12):
        frames = sort_episodes(frames, steps, 3, EPISODE)
    expected = expected_frames(successes)
    assert min(map(len, expected)) > 5
    assert rows_of(frames.positives, EPISODE) == expected[0][-EPISODE:]
    assert rows_of(frames.negatives, 5) == expected[1][-5:]


# --------------------------------------------------------------------------- lag pairs


def test_lag_pairs_end_with_the_first_success():
    ring = add_frames(empty_frames(20), 0, 10, first_success=6)
    exists = check_lagged(ring, lag=2)
    np.testing.assert_array_equal(np.flatnonzero(exists), [2, 3, 4, 5, 6])
    earlier, _ = lagged_slots(ring, np.arange(2, 7), 2)
    np.testing.assert_array_equal(earlier, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("lag", [1, 10, 499, 500])
@pytest.mark.parametrize("shift", [0, 123])
def test_no_false_pair_where_the_buffer_holds_exactly_one_episode(lag, shift):
    """The frame before a ring's first is its last, which may be of the same trajectory.

    Successes at 300 and at the end: all 500 frames are positives, and those after 300 are in no
    pair. `shift` frames of another trajectory move the episode's start within the ring.
    """
    ring = empty_frames(500)
    if shift:
        ring = add_frames(ring, 1, shift)
    ring = add_frames(ring, 2, 500, first_success=300)
    exists = check_lagged(ring, lag)
    times = np.asarray(ring.data.time)[exists]
    assert sorted(times.tolist()) == list(range(lag, 301))


def test_frames_come_with_those_before_them():
    ring = add_frames(empty_frames(20), 0, 6, first_success=4)
    frames = replay.lagged_frames(ring, np.arange(2, 6), 3)
    np.testing.assert_array_equal(frames.embedding[:, 1], [2, 3, 4, 5])
    np.testing.assert_array_equal(frames.old_enough, [False, True, True, True])
    np.testing.assert_array_equal(frames.has_earlier, [False, True, True, False])
    np.testing.assert_array_equal(frames.earlier[1:3, 1], [0, 1])


def test_sorted_episodes_give_no_false_pairs_in_a_buffer_of_one_episode():
    """The same, through `sort_episodes`."""
    steps = replay.init_ring(Step(np.zeros(2, np.float16), np.zeros((), np.float32)), 500)
    time = np.arange(500)
    reward = ((time == 300) | (time == 499)).astype(np.float32)
    steps = replay.add_rows(steps, Step(frames_of(0, 500), reward))
    ring, _ = sort_episodes(Sorted(empty_frames(500), empty_frames(500)), steps, 1, 500)
    np.testing.assert_array_equal(ring.data.time, time)
    exists = check_lagged(ring, 10)
    np.testing.assert_array_equal(np.flatnonzero(exists), np.arange(10, 301))


def check_lagged(ring: replay.Ring, lag: int) -> np.ndarray:
    """Compare with a search through the whole ring; returns where a pair exists."""
    slots = np.arange(ring.capacity)
    earlier, exists = (np.asarray(x) for x in lagged_slots(ring, slots, lag))
    number, time = np.asarray(ring.data.embedding)[:, 0], np.asarray(ring.data.time)
    before_success, written = np.asarray(ring.data.before_success), slots < int(ring.size)
    for slot in slots:
        found = np.flatnonzero(
            written & written[slot] & before_success[slot]
            & (number == number[slot]) & (time == time[slot] - lag)
        ).tolist()
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
    earlier, _ = lagged_slots(ring, np.array([5, 13]), 3)
    np.testing.assert_array_equal(earlier, [2, 10])


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_lagged_slots_after_overwriting(lag):
    ring = empty_frames(11)
    for number, length in enumerate([6, 4, 7, 3, 11, 2, 8]):
        ring = add_frames(ring, number, length, first_success=length - 2 if number % 2 else None)
        check_lagged(ring, lag)


def test_lagged_slots_of_an_overwritten_start():
    ring = add_frames(empty_frames(8), 0, 8)
    ring = add_frames(ring, 1, 3)  # over times 0, 1, 2 of trajectory 0
    exists = check_lagged(ring, lag=2)
    np.testing.assert_array_equal(np.flatnonzero(exists), [2, 5, 6, 7])


def test_an_empty_ring_has_no_pairs():
    _, exists = lagged_slots(empty_frames(6), np.arange(6), 1)
    assert not exists.any()
    # Not even with a lag of the whole ring, where unwritten slots would be their own partners.
    assert not lagged_slots(empty_frames(6), np.arange(6), 6)[1].any()


# ----------------------------------------------- steps that follow, and what stands for them


def lockstep(num_iterations: int, capacity: int) -> replay.Ring:
    """Rows of three environments whose episodes take 5 steps; obs say row, episode, env, time."""
    rows = transitions(np.arange(3))._replace(obs=np.zeros((3, 4), np.float32),
                                              terminated=np.zeros(3, np.float32))
    ring, envs = replay.init_ring(jax.tree.map(lambda x: x[0], rows), capacity), np.arange(3)
    for iteration in range(num_iterations):
        episode, time = divmod(iteration, 5)
        obs = [envs + 3 * iteration, envs + 3 * episode, envs, np.full(3, time)]
        ring = replay.add_rows(ring, rows._replace(obs=np.stack(obs, 1)))
    return ring


@pytest.mark.parametrize("num_iterations", [1, 4, 7, 9, 13, 20, 33])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_following_steps_are_of_the_same_episode(num_iterations, n):
    """Compared with a search through a ring of 25 rows, in which neither steps of all environments
    nor episodes come out even."""
    ring = lockstep(num_iterations, 25)
    row, episode, env, time = np.asarray(ring.data.obs)[:, :4].T
    size = int(ring.size)
    slots = np.arange(size)
    steps = replay.following_steps(ring, slots, n, 3, 5)
    for slot in slots:
        expected = []
        for k in range(n):
            found = [s for s in range(size) if episode[s] == episode[slot]
                     and env[s] == env[slot] and time[s] == time[slot] + k]
            if not found:
                break
            expected += found
        exists = np.asarray(steps.exists[:, slot])
        assert exists.sum() == len(expected) and exists[: len(expected)].all()
        np.testing.assert_array_equal(steps.slots[: len(expected), slot], expected)
        assert steps.last[slot] == expected[-1]
        assert steps.episode[slot] == episode[slot] and steps.time[slot] == time[slot]
        for back, found in ((1, steps.before[slot]), (time[slot], steps.first[slot])):
            if back <= time[slot]:  # what came before the oldest rows has been overwritten
                before = np.flatnonzero(row[:size] == row[slot] - 3 * back)
                assert found == (before[0] if len(before) else slot)


def test_nothing_follows_a_terminated_step():
    ring = lockstep(5, 25)
    terminated = np.zeros(25, np.float32)
    terminated[4] = 1  # environment 1, time 1
    ring = ring._replace(data=ring.data._replace(terminated=jnp.asarray(terminated)))
    steps = replay.following_steps(ring, np.array([1, 4, 0, 7]), 4, 3, 5)
    np.testing.assert_array_equal(steps.exists.sum(0), [2, 1, 4, 3])
    np.testing.assert_array_equal(steps.last, [4, 4, 9, 13])


def test_a_share_of_samples_is_from_successful_episodes():
    steps, key = lockstep(20, 25), jax.random.key(0)  # rows 35 to 59 are left
    positives = empty_frames(10)

    def rows_of(positives: replay.Ring, share: float) -> np.ndarray:
        slots = replay.sample_with_successes(steps, positives, key, 4000, share)
        return np.asarray(steps.data.obs)[slots, 0].astype(int)

    uniform = rows_of(positives, 0.25)  # there are no successes yet
    assert set(uniform) == set(range(35, 60))
    frames = EmbeddedFrame(np.zeros((3, 2)), np.arange(3), np.full(3, True), np.array([7, 40, 50]))
    positives = replay.add_rows(positives, frames)
    some = rows_of(positives, 0.25)
    assert (some[1000:] == uniform[1000:]).all(), "three quarters are uniform"
    counts = np.bincount(some[:1000], minlength=60)
    assert abs(counts[40] + counts[50] - 2 / 3 * 1000) < 60, "row 7 has left: uniform instead"
    assert counts[7] == 0
    np.testing.assert_array_equal(rows_of(positives, 0.0), uniform)


def test_sorted_episodes_name_their_rows():
    """Counted from the first row ever written, also when the replay has wrapped."""
    steps = replay.init_ring(Step(np.zeros(2, np.float16), np.zeros((), np.float32)), 13)
    frames = Sorted(empty_frames(40), empty_frames(40))
    for time in range(12):
        reward = np.array([time % 6 == 4, 0], np.float32)
        steps = replay.add_rows(steps, Step(frames_of(time, 2), reward))
        if time % 6 == 5:
            frames = sort_episodes(frames, steps, 2, 6)
    row = frames.positives.data.row[:10]
    np.testing.assert_array_equal(row, [0, 2, 4, 6, 8, 12, 14, 16, 18, 20])
    np.testing.assert_array_equal(frames.negatives.data.row[:12], np.arange(1, 24, 2))


def test_a_frame_stands_for_the_steps_until_the_next():
    embed_calls = []

    def embed_images(frames: np.ndarray) -> jax.Array:
        embed_calls.append(len(frames))
        return jnp.asarray(frames[:, 0, 0, :2], jnp.float32)

    vlm = SimpleNamespace(embed_images=embed_images)
    steps = replay.init_ring(Step(np.zeros(2, np.float16), np.zeros((), np.float32)), 7)
    stored = []
    for time, drawn in enumerate([(1, 1, 1), (0, 0, 0), (0, 1, 0), (1, 1, 1), (0, 0, 0)]):
        frames = np.full((3, 4, 4, 3), time, np.uint8) + 10 * np.arange(3)[:, None, None, None]
        embedding = replay.embed_drawn(vlm, frames, np.array(drawn, bool), steps)
        steps = replay.add_rows(steps, Step(embedding, np.zeros(3)))
        stored.append(np.asarray(embedding)[:, 0].tolist())
    assert stored == [[0, 10, 20], [0, 10, 20], [0, 12, 20], [3, 13, 23], [3, 13, 23]]
    assert embed_calls == [3, 1, 3], "only what was drawn is embedded"
