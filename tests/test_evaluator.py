"""What an evaluation measures, in which episodes, and what the policy is shown."""

import contextlib

import numpy as np
import pytest

from common.envs.metaworld_suite import Experts, VecMetaWorld
from common.evaluate import Evaluator

NOTHING = np.zeros((2, 4), np.float32)


@pytest.fixture
def evaluator():
    with contextlib.ExitStack() as stack:
        yield lambda *args, **where: stack.enter_context(
            contextlib.closing(Evaluator(*args, **where)))


def test_success_once_and_at_the_end(evaluator, monkeypatch):
    """Three episodes, two at a time: a success that passes, one that comes last, and none."""
    successes = {(0, 0): (3, 4), (0, 1): (499,), (1, 1): range(500)}  # the last one does not count
    step_wait, steps = VecMetaWorld.step_wait, 0

    def prescribed(self):
        nonlocal steps
        step = step_wait(self)
        play, time = divmod(steps, 500)
        steps += 1
        success = np.array([time in successes.get((play, env), ()) for env in range(2)])
        return step._replace(success=success, reward=success.astype(np.float32))

    monkeypatch.setattr(VecMetaWorld, "step_wait", prescribed)
    evaluate = evaluator("drawer-close-v3", seed=0, goal="random", num_episodes=3, num_envs=2)
    means = evaluate(lambda obs: NOTHING)
    assert means == pytest.approx({
        "eval/success_once": 2 / 3, "eval/success_at_end": 1 / 3, "eval/return": 1.0})
    assert evaluate.episodes["success_once"].tolist() == [True, True, False]
    assert evaluate.episodes["success_at_end"].tolist() == [False, True, False]
    assert evaluate.episodes["return"].tolist() == [2, 1, 0]
    assert evaluate.episodes["length"].tolist() == [500] * 3


@pytest.mark.parametrize(("shown", "succeeds"), [(3, True), (4, False)])
def test_a_fixed_goal_is_the_runs_own(shown, succeeds, evaluator):
    """The expert, which is told the goal of a run's seed, reaches it in that run's evaluation."""
    expert, steps = Experts("reach-v3", 1, seed=shown, goal="fixed"), iter(range(500))
    evaluate = evaluator("reach-v3", seed=3, goal="fixed", num_episodes=0)
    assert evaluate(lambda obs: expert(obs, next(steps)))["eval/success_once"] == succeeds


@pytest.mark.parametrize(("env_id", "goal", "episodes"), [
    ("reach-v3", "fixed", 1), ("reach-v3", "random", 10), ("CartPole-v1", "fixed", 10),
])
def test_how_many_episodes_are_played(env_id, goal, episodes, evaluator):
    """One where all are the same, else ten (B.2 of the paper)."""
    evaluate = evaluator(env_id, seed=0, goal=goal, num_episodes=0)
    assert evaluate.envs.num_envs == episodes


def test_random_goals_are_not_those_of_training(evaluator):
    """And the same in each evaluation."""
    where = {"seed": 3, "goal": "random"}
    evaluate = evaluator("reach-v3", num_episodes=2, action_repeat=250, **where)
    seen = [], []
    for goals in seen:
        evaluate(lambda obs, goals=goals: goals.append(obs[:, 36:39]) or NOTHING)
    np.testing.assert_array_equal(*seen)
    with contextlib.closing(VecMetaWorld("reach-v3", 2, num_workers=1, **where)) as training:
        obs, _ = training.reset()
    goals = np.concatenate([seen[0][0], obs[:, 36:39]])
    assert len(np.unique(goals, axis=0)) == 4


def test_the_first_episode_is_drawn_for_a_video(evaluator):
    """Every second step of it; with repeated actions all. Nothing else is drawn."""
    for repeat, pictures in ((50, 1 + 10), (1, 251)):
        evaluate = evaluator("drawer-close-v3", seed=0, goal="random", num_episodes=2,
                             action_repeat=repeat, capture_video=True)
        evaluate(lambda obs: NOTHING)
        assert np.shape(evaluate.pictures) == (pictures, 256, 256, 3)
        assert all(picture.any() for picture in evaluate.pictures)
        assert len(evaluate.envs.reset()[1]) == 1


def test_a_stack_holds_the_last_frames_the_newest_last(evaluator):
    """It begins with the first one, repeated. Two actions of 250 steps are an episode."""
    evaluate = evaluator("drawer-close-v3", seed=0, goal="fixed", num_episodes=1, frame_stack=3,
                         action_repeat=250)
    stacks = []

    def policy(stack):
        stacks.append(stack)
        return np.full((1, 4), (-1.0) ** len(stacks), np.float32)

    evaluate(policy)
    first, second = (np.split(stack, 3, -1) for stack in stacks)
    for frame in (*first[1:], *second[:2]):
        np.testing.assert_array_equal(frame, first[0])
    assert (second[2] != first[0]).any()
