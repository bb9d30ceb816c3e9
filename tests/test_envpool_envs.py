"""The native engine against the official one: layout, physics, experts, episodes."""

import numpy as np
import pytest

from common.envs.metaworld_envpool import EnvPoolMetaWorld, envpool_id
from common.envs.metaworld_suite import VecMetaWorld, make_env
from common.envs.metaworld_tasks import ENV_IDS, MT10, expert_action, expert_policy
from common.errors import UserError

pytest.importorskip("envpool")


def test_every_task_has_its_native_twin():
    import envpool

    assert {envpool_id(env_id) for env_id in ENV_IDS} <= set(envpool.list_all_envs())


def test_a_fixed_goal_is_refused():
    with pytest.raises(UserError, match="cannot have --goal fixed: use --goal random"):
        EnvPoolMetaWorld("drawer-close-v3", 2, seed=0, goal="fixed")


def test_the_interface_is_that_of_the_official_environments():
    native = EnvPoolMetaWorld("drawer-close-v3", 3, seed=0, goal="random")
    official = VecMetaWorld("drawer-close-v3", 3, seed=0, goal="random", num_workers=1)
    action = np.zeros((3, 4), np.float32)
    for envs in (native, official):
        assert envs.reset()[0].dtype == np.float32
    for ours, theirs in zip(native.step(action), official.step(action), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    for name in ("obs_dim", "action_dim", "episode_length"):
        assert getattr(native, name) == getattr(official, name)
    assert (native.obs_dim, native.action_dim, native.episode_length) == (39, 4, 500)
    assert official.resumes_episodes and not native.resumes_episodes
    assert official.engine.startswith("metaworld 3.1.1, mujoco 3.3.0")
    assert native.engine.startswith("envpool 1.2.0, mujoco 3.6.0")
    native.close()
    official.close()


@pytest.mark.parametrize("env_id", MT10)
def test_observations_mean_the_same(env_id):
    """Hand, gripper, object, previous frame and goal stand where the official engine has them.

    One step after the reset: window-close's official first observation shows the handle before it
    is moved.
    """
    official = make_env(env_id, seed=0, index=0, goal="random", show_goal=True)
    still = np.zeros(4, np.float32)
    samples = []
    for _ in range(20):
        official.reset()
        samples.append(official.step(still)[0])
    samples = np.stack(samples)
    native = EnvPoolMetaWorld(env_id, 20, seed=0)
    native.reset()
    obs = native.step(np.stack([still] * 20)).obs
    np.testing.assert_allclose(obs[:, :4], samples[:, :4], atol=2e-3)  # hand, gripper: no chance
    # What is drawn at random lies in the same box: objects, goals.
    low, high = samples.min(0) - 0.1, samples.max(0) + 0.1
    low[18:36], high[18:36] = -np.inf, np.inf  # the frame before, of the reset
    assert (obs >= low).all() and (obs <= high).all()
    assert (np.ptp(obs, 0) > 1e-3).any()
    following = native.step(np.stack([still] * 20)).obs
    np.testing.assert_allclose(following[:, 18:36], obs[:, :18], atol=1e-6)
    np.testing.assert_allclose(following[:, 36:], obs[:, 36:], atol=1e-6)
    native.close()


def test_a_hidden_goal_is_zeros():
    native = EnvPoolMetaWorld("reach-v3", 4, seed=0, goal="random-hidden")
    assert not native.reset()[0][:, 36:].any()
    native.close()


def test_actions_move_the_hand_alike():
    """The same 40 actions lead within 2 mm of the same place: other MuJoCo, same physics."""
    official = make_env("reach-v3", seed=0, index=0, goal="random", show_goal=True)
    official.reset()
    native = EnvPoolMetaWorld("reach-v3", 2, seed=0)
    native.reset()
    rng = np.random.default_rng(0)
    for action in np.repeat(rng.uniform(-1, 1, (10, 4)).astype(np.float32), 4, axis=0):
        expected = official.step(action)[0]
        obs = native.step(np.stack([action, action])).obs
    np.testing.assert_allclose(obs[:, :4], np.stack([expected[:4]] * 2), atol=2e-3)
    assert np.linalg.norm(expected[:3] - official.init_tcp) > 0.05  # it has moved
    native.close()


def play_expert(envs, env_id: str) -> np.ndarray:
    """The step of the first success in each of 5 environments, 499 without one."""
    experts = [expert_policy(env_id) for _ in range(5)]
    obs, _ = envs.reset()
    first = np.full(5, 499)
    for t in range(499):
        actions = [expert_action(e, o) for e, o in zip(experts, obs, strict=True)]
        step = envs.step(np.stack(actions))
        assert not step.terminated.any() and not step.truncated.any()  # success ends nothing
        obs, first = step.obs, np.where(step.success, np.minimum(first, t), first)
        if t > first.max() + 20:
            break
    envs.close()
    return first


@pytest.mark.parametrize("env_id", MT10)
def test_scripted_experts_succeed_alike(env_id):
    """On either engine, and after as many steps: success means the same."""
    native = play_expert(EnvPoolMetaWorld(env_id, 5, seed=1), env_id)
    official = play_expert(VecMetaWorld(env_id, 5, seed=1, goal="random"), env_id)
    assert (native < 499).mean() >= 0.8 and (official < 499).mean() >= 0.8
    assert native.min() > 5  # not at the start
    low, high = np.median(official) * 0.6, np.median(official) * 1.7
    assert low < np.median(native) < high, (native, official)


def test_episodes_restart_in_the_step_that_ends_them():
    native = EnvPoolMetaWorld("reach-v3", 3, seed=0, max_episode_steps=5)
    first, _ = native.reset()
    assert native.episode_length == 5
    np.testing.assert_array_equal(native.observations(), first)
    action = np.full((3, 4), 0.5, np.float32)
    for t in range(1, 16):
        step = native.step(action)
        observations = native.observations()
        np.testing.assert_array_equal(observations, step.obs)
        observations[:] = 77  # a copy: nobody else sees that
        assert not (native.observations() == 77).any() and not (step.obs == 77).any()
        assert (step.truncated == (t % 5 == 0)).all() and not step.terminated.any()
        if t % 5 == 0:
            np.testing.assert_allclose(step.obs[:, :3], first[:, :3], atol=1e-3)  # back home
            assert (np.abs(step.final_obs[:, :3] - first[:, :3]).max(1) > 5e-3).all()
            assert (step.obs[:, 36:] != step.final_obs[:, 36:]).any(1).all()  # a new goal
        else:
            np.testing.assert_array_equal(step.obs, step.final_obs)
    native.close()


def test_a_resumed_run_goes_on_with_the_next_goals():
    native = EnvPoolMetaWorld("reach-v3", 3, seed=0)
    goals = [native.reset()[0][:, 36:] for _ in range(4)]
    state = native.get_state()
    following = native.reset()[0][:, 36:]
    native.close()
    other = EnvPoolMetaWorld("reach-v3", 3, seed=0)
    np.testing.assert_array_equal(other.reset()[0][:, 36:], goals[0])
    obs = other.set_state(state)
    np.testing.assert_array_equal(obs[:, 36:], following)
    np.testing.assert_array_equal(other.observations(), obs)
    other.close()


def test_seeds_decide():
    def goals(seed):
        native = EnvPoolMetaWorld("reach-v3", 3, seed=seed)
        obs, _ = native.reset()
        native.close()
        return obs[:, 36:]

    np.testing.assert_array_equal(goals(4), goals(4))
    assert (goals(4) != goals(5)).any()
