"""The suite of Gymnasium, and VLM-RM's scripts on it."""

import contextlib
import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_scripts_agree import definitions

import sac_baseline as sac
import vlm_rm_baseline as vlm_rm
import vlm_rm_dqn as dqn
from common import checkpoint, flags, replay
from common.envs import gymnasium_suite as suite
from common.envs import vlm_rm_tasks
from common.envs.registry import GYMNASIUM, METAWORLD, suite_for
from common.envs.rendering import Camera
from common.envs.workers import Step
from common.errors import UserError
from common.evaluate import EVAL_SEED_OFFSET, Evaluator
from common.replay import Sizes, Transition
from common.run_folder import kept_policies
from tools import landscape
from tools.evaluate import __main__ as evaluate_tool
from tools.evaluate.trained import Trained

OWN = str(Path(__file__).parent)  # where `environments` is


@pytest.fixture
def own_environments(monkeypatch):
    """Importable here and in workers, as a user's module beside the script is."""
    monkeypatch.setenv("PYTHONPATH", OWN)
    monkeypatch.syspath_prepend(OWN)


@pytest.fixture
def close():
    """Closes what a test has opened."""
    opened = []
    yield lambda envs: opened.append(envs) or envs
    for envs in opened:
        envs.close()


def first_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


# ------------------------------------------------------------------------ environments


def test_which_suite_knows_an_id():
    for env_id in ("CartPole-v1", "CartPoleEndless-v1", "Humanoid-v5", "mine:Own-v0"):
        assert suite_for(env_id) is GYMNASIUM
    for env_id in ("drawer-open-v3", "drawer-open", "drawer-open-v2"):
        assert suite_for(env_id) is METAWORLD
    with pytest.raises(UserError, match="unknown task 'nonsense'"):
        suite_for("nonsense")


def test_steps_are_those_of_gymnasium_itself(close):
    """CartPole's episodes end one by one: states, rewards and ends against a loop by hand."""
    envs = close(suite.VecGymnasium("CartPole-v1", 2, seed=3, num_workers=1))
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 2, (80, 2))
    first, _ = envs.reset()
    steps = [envs.step(a) for a in actions]
    for i in range(2):
        env = gymnasium.make("CartPole-v1")
        env.reset(seed=first_seed(3, i))
        np.testing.assert_array_equal(first[i], env.reset()[0])
        for action, step in zip(actions[:, i], steps, strict=True):
            obs, reward, terminated, truncated, _ = env.step(action)
            np.testing.assert_array_equal(step.final_obs[i], obs)
            assert (step.reward[i], step.terminated[i], step.truncated[i]) == (
                reward, terminated, truncated)
            assert not step.success[i]
            np.testing.assert_array_equal(step.obs[i], env.reset()[0] if terminated else obs)
    ends = np.array([step.ended for step in steps])
    assert ends.any(0).all() and (ends[:, 0] != ends[:, 1]).any(), "they must end apart"


def test_continuous_actions_are_scaled(close):
    """Pendulum takes -2 to 2."""
    envs = close(suite.VecGymnasium("Pendulum-v1", 1, seed=0))
    envs.reset()
    step = envs.step(np.array([[0.5]]))
    env = gymnasium.make("Pendulum-v1")
    env.reset(seed=first_seed(0, 0))
    env.reset()
    obs, reward, *_ = env.step(np.array([1.0], np.float32))
    np.testing.assert_array_equal(step.obs[0], obs)
    assert step.reward[0] == np.float32(reward)


def test_a_users_own_environment(own_environments, close):
    """Its dictionary is flattened; it terminates, or its time is up; its frames are its own."""
    envs = close(suite.VecGymnasium("environments:Line-v0", 2, seed=0, camera=Camera(20, 0, "fast"),
                                    draw_resets=True, num_workers=1))
    assert (envs.obs_dim, envs.action_dim, envs.discrete, envs.episode_length) == (2, 2, True, 5)
    assert not envs.resumes_episodes, "nobody knows what its state is"
    envs.reset()
    steps = [envs.step(np.array([1, 0])) for _ in range(5)]
    positions = np.array([step.final_obs[:, 1] for step in steps])
    np.testing.assert_array_equal(positions, [[1, 0], [2, 0], [3, 0], [1, 0], [2, 0]])
    np.testing.assert_array_equal([s.terminated for s in steps], [[0, 0], [0, 0], [1, 0], [0, 0],
                                                                  [0, 0]])
    np.testing.assert_array_equal([s.truncated for s in steps], [[0, 0]] * 4 + [[0, 1]])
    assert [s.reward.tolist() for s in steps] == [[0, 0], [0, 0], [1, 0], [0, 0], [0, 0]]
    np.testing.assert_array_equal(steps[2].obs[:, 1], [0, 0])  # a new episode's
    shades = np.array([s.frames[:, 0, 0, 0] for s in steps])
    np.testing.assert_array_equal(shades, np.clip(positions, 0, 3) * 80)
    assert steps[2].frames.shape == (2, 20, 20, 3) and not steps[2].reset_frames[0].any()


def test_state_in_wrappers_is_not_known(own_environments, close):
    """Pendulum's own state is, but not the pictures of it that a wrapper keeps."""
    assert close(suite.VecGymnasium("Pendulum-v1", 1, seed=0)).resumes_episodes
    envs = close(suite.VecGymnasium("environments:StackedPendulum-v0", 1, seed=0))
    assert not envs.resumes_episodes and envs.obs_dim == 9
    envs.reset()
    for _ in range(3):
        last = envs.step(np.ones((1, 1))).obs
    begun = envs.set_state(envs.get_state())
    np.testing.assert_array_equal(begun[0, :3], begun[0, 6:])  # a first observation, repeated
    assert (begun != last).any()


@pytest.mark.parametrize("env_id", ["environments:OneSize-v0", "environments:FunctionLine-v0"])
def test_environments_that_are_valid_are_drawn(env_id, own_environments):
    """A class of MuJoCo's that takes no width, a function that needs what it is registered with."""
    env = suite.make_env(env_id, seed=0, index=0, frame_size=32)
    env.reset()
    picture = suite.make_draw(env, Camera(32, 0, "fast"))(env)
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    env.close()


@pytest.mark.parametrize(("env_id", "camera"), [
    ("CartPole-v1", None), ("MountainCarTextured-v0", 32), ("Reacher-v5", 32),
    ("HumanoidStandingUp-v0", 32),  # which is rewarded for some steps after it has landed
    ("Humanoid-v5", None),
])
def test_an_episode_goes_on_bit_by_bit(env_id, camera, close):
    """From a saved state, in other environments of another number of workers."""
    camera = camera and Camera(camera, 0, "fast")
    envs = close(suite.VecGymnasium(env_id, 2, seed=1, camera=camera, num_workers=2))
    rng = np.random.default_rng(0)
    actions = (rng.integers(0, 2, (30, 2)) if envs.discrete
               else rng.uniform(-1, 1, (30, 2, envs.action_dim)))
    envs.reset()
    if "StandingUp" in env_id:  # so that steps in the pose have been counted
        actions *= 0.1
        assert sum(envs.step(action).reward.max() for action in actions) > 0
    for action in actions[:7]:
        envs.step(action)
    saved = envs.get_state()
    others = close(suite.VecGymnasium(env_id, 2, seed=9, camera=camera, num_workers=1))
    np.testing.assert_array_equal(others.set_state(saved), envs.observations())
    for action in actions[7:]:
        for name, x, y in zip(Step._fields, envs.step(action), others.step(action), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize(("env_id", "options", "message"), [
    ("CartPole-v7", {}, "unknown environment 'CartPole-v7'; did you mean CartPole-v"),
    ("Pendulum-v2", {}, "unknown environment 'Pendulum-v2'"),
    ("nowhere:Own-v0", {}, "unknown environment 'nowhere:Own-v0'; No module named"),
    (".own:Own-v0", {}, "unknown environment '.own:Own-v0'; its module needs its full name"),
    ("CartPole-v1", {"goal": "random"}, "--goal random is for Meta-World's tasks"),
    ("environments:Blind-v0", {"camera": Camera(32, 0, "fast")}, "draws no frames"),
    ("environments:Unbounded-v0", {}, "have no bounds"),
    ("environments:Whole-v0", {}, r"are Box\(0, 10, \(2,\), int64\): only .* Box of floats"),
    ("environments:Point-v0", {}, "cannot be scaled to -1 to 1"),
    ("environments:FarApart-v0", {}, "cannot be scaled to -1 to 1"),
    ("environments:NoActions-v0", {}, "only Discrete and one-dimensional Box"),
    ("environments:NoSpace-v0", {}, "are None: only Discrete and one-dimensional Box"),
    ("environments:Graph-v0", {}, "cannot be flattened to a vector"),
    ("environments:Undrawable-v0", {"camera": Camera(32, 0, "fast")}, "cannot be made here: "),
])
def test_what_is_refused(env_id, options, message, own_environments):
    with pytest.raises(UserError, match=message):
        suite.VecGymnasium(env_id, 1, **{"seed": 0} | options)


DRAWN = {"camera": Camera(16, 0, "fast")}


@pytest.mark.parametrize(("name", "options", "message"), [
    ("OnlyObs", {}, r"reset returned array\(\[0., 0., 0.\]\), not \(observation, info\)"),
    ("PairOfNumbers", {}, "reset returned array"),
    ("TakesNoSeed", {}, "reset of TakesNoSeed takes no seed"),
    ("FourParts", {}, r"step returned \(array.*, False, {}\), not \(observation, rew"),
    ("NoInfo", {}, "step gave None as info, not a dictionary"),
    ("Scalar", {}, r"reset gave the observation 0.5, which is not of Box\(-inf, inf, \(3,\), flo"),
    ("Short", {}, r"the observation array\(\[0.\]\), which is not of Box"),
    ("Ragged", {}, r"the observation \[\[1\], \[2, 3\]\], which is not of Box"),
    ("NoObs", {}, "the observation None, which is not of Box"),
    ("Words", {}, r"the observation \['a', 'b', 'c'\], which is not of Box"),
    ("NaN", {}, "reset gave an observation that is not finite"),
    ("Huge", {}, "observation that is not finite"),
    ("NaNReward", {}, "step gave the reward nan"),
    ("NoReward", {}, "step gave the reward None"),
    ("Rewards", {}, "step gave the reward array"),
    ("NoEnd", {}, "step gave None as terminated"),
    ("NaNSuccess", {}, "step's info has success nan"),
    ("FloatPicture", DRAWN, "a picture of float64, not of uint8"),
    ("ListPicture", DRAWN, r"render returned \[\[0\]\], not an array"),
    ("NoPicture", DRAWN, "render returned None"),
    ("ChannelsFirst", DRAWN, r"a picture of the shape \(3, 8, 8\)"),
    ("EmptyPicture", DRAWN, r"a picture of the shape \(0, 8, 3\)"),
])
def test_a_broken_contract_is_told_at_once(name, options, message, own_environments):
    """Before a first episode begins, in one line that names the environment."""
    with pytest.raises(UserError, match=message) as refused:
        suite.VecGymnasium(f"environments:{name}-v0", 1, seed=0, **options)
    assert str(refused.value).startswith(f"environments:{name}-v0 breaks Gymnasium's contract: ")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "message"), [
    ("LateNaN", "step gave an observation that is not finite"),
    ("LateNaNReward", "step gave the reward -inf"),
])
def test_a_contract_that_is_broken_later(name, message, own_environments, close):
    """The step that breaks it returns nothing that could be stored."""
    envs = close(suite.VecGymnasium(f"environments:{name}-v0", 1, seed=0))
    envs.reset()
    for _ in range(29):
        assert envs.step(np.zeros((1, 2))).reward == 1
    with pytest.raises(UserError, match=f"environments:{name}-v0 breaks .* {message}"):
        envs.step(np.zeros((1, 2)))


@pytest.mark.parametrize(("name", "colour"), [("GreyPicture", 3 * (70,)), ("RGBA", (70, 80, 90))])
def test_grey_and_transparent_pictures_are_converted(name, colour, own_environments, close):
    envs = close(suite.VecGymnasium(f"environments:{name}-v0", 1, seed=0, **DRAWN))
    _, frames = envs.reset()
    assert frames.shape == (1, 16, 16, 3) and (frames == colour).all()


def test_is_success_counts_as_success(own_environments, close):
    envs = close(suite.VecGymnasium("environments:IsSuccess-v0", 1, seed=0))
    envs.reset()
    assert [envs.step(np.zeros((1, 2))).success.item() for _ in range(3)] == [False, True, True]


def test_global_generators_are_each_environments_own(own_environments, close, capsys):
    """Whatever the number of workers; the state is saved, and a line tells."""
    def play(envs: suite.VecGymnasium, num_steps: int) -> np.ndarray:
        return np.array([envs.step(np.zeros((3, 2))).obs for _ in range(num_steps)])

    flags.note.cache_clear()
    envs, others = (close(suite.VecGymnasium("environments:Global-v0", 3, seed=4, num_workers=n))
                    for n in (1, 2))
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("note: environments:Global-v0 draws from Python's or NumPy's global")
    for one in (envs, others):
        one.reset()
    first = play(envs, 7)
    np.testing.assert_array_equal(first, play(others, 7))
    assert len(np.unique(first[..., 1])) == first[..., 1].size, "no two draw the same"
    assert not envs.resumes_episodes
    saved = envs.get_state()
    np.testing.assert_array_equal(envs.set_state(saved), others.set_state(saved))
    np.testing.assert_array_equal(play(envs, 3), play(others, 3))


def test_the_endless_cartpole():
    """Falls without an end: -1 when the original would have ended, whose physics it has till then.

    The pole swings all the way round, and the cart stays on the track.
    """
    env, original = (suite.make_env(name, seed=0, index=0, frame_size=0)
                     for name in ("CartPoleEndless-v1", "CartPole-v1"))
    env.unwrapped.state = original.unwrapped.state = np.array([0.0, 0.5, 0.05, 0.0])
    dropped, angles = False, []
    for _ in range(190):
        obs, reward, terminated, truncated, _ = env.step(1)
        assert not terminated and not truncated
        if not dropped:
            expected, _, dropped, _, _ = original.step(1)
            np.testing.assert_array_equal(obs, expected)
        if abs(obs[2]) > 12 * np.pi / 180:
            assert reward == -1
        elif abs(obs[0]) < 2.3:
            assert reward == 1
        assert abs(obs[0]) <= np.float32(2.4) and abs(obs[2]) <= np.float32(np.pi)
        angles.append(obs[2])
    assert dropped and max(np.abs(angles)) > 3


@pytest.mark.parametrize("env_id", ["MountainCarAbsorbing-v0", "MountainCarTextured-v0"])
def test_the_car_stays_at_its_goal(env_id):
    env = suite.make_env(env_id, seed=0, index=0, frame_size=0)
    env.unwrapped.state = np.array([0.44, 0.02])
    _, reward, terminated, _, info = env.step(np.array([1.0], np.float32))
    assert reward > 99 and not terminated and info["success"]
    goal = env.unwrapped.state.copy()
    for _ in range(3):  # it would roll back
        obs, reward, terminated, _, info = env.step(np.array([-1.0], np.float32))
        np.testing.assert_array_equal(obs, goal)
        assert reward == 0 and not terminated and info["success"]


def test_the_textured_car_is_drawn_where_it_is():
    """Red pixels follow the position; everything else stays as it is."""
    env = suite.make_env("MountainCarTextured-v0", seed=0, index=0, frame_size=32)
    pictures = []
    for position in (-1.0, -0.5, 0.4):
        env.unwrapped.state = np.array([position, 0.0])
        pictures.append(env.render().astype(int))
        red = (pictures[-1] == (190, 30, 35)).all(-1)
        assert red.nonzero()[1].mean() == pytest.approx((position + 1.2) / 1.8 * 600, abs=12)
    assert (pictures[0][:, 300:500] == pictures[1][:, 300:500]).mean() > 0.99


def test_a_squeezed_picture_keeps_its_borders():
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, 55:] = 255
    assert suite.square(picture, 24).shape == (24, 24, 3)
    assert suite.square(picture, 24)[:, -1].min() > 200


def test_prompts_are_table_3s():
    assert suite.SUITE.prompt_for("CartPoleEndless-v1", None) == (
        "pole vertically upright on top of the cart")
    baseline = suite.SUITE.baseline_prompt_for("MountainCarTextured-v0", None)
    assert baseline == "a car in the mountain"
    assert suite.SUITE.prompt_for("Reacher-v5", " touch the ball ") == "touch the ball"
    with pytest.raises(UserError, match="Reacher-v5 has no prompt of its own: give --prompt"):
        suite.SUITE.prompt_for("Reacher-v5", None)
    with pytest.raises(UserError, match="--baseline-prompt must not be empty"):
        suite.SUITE.baseline_prompt_for("CartPole-v1", " ")
    for task in vlm_rm_tasks.TASKS.values():
        gymnasium.spec(task.evaluated_on)


# -------------------------------------------------------------------------- evaluation


def test_evaluation_is_on_the_original(close):
    """Endless CartPole's policy is judged by CartPole's returns, first episodes only."""
    evaluate = close(Evaluator("CartPoleEndless-v1", seed=0, goal="fixed", num_episodes=3))
    found = evaluate(lambda obs: np.ones(3, int))
    returns = []
    for i in range(3):
        env = gymnasium.make("CartPole-v1")
        env.reset(seed=first_seed(EVAL_SEED_OFFSET, i))
        env.reset()
        length = 1
        while not env.step(1)[2]:
            length += 1
        returns.append(length)
    assert found["eval/return"] == found["eval/length"] == np.mean(returns)
    assert found == evaluate(lambda obs: np.ones(3, int)), "the same episodes each time"
    assert found["eval/success_once"] == 0
    np.testing.assert_array_equal(evaluate.episodes["length"], returns)
    assert np.shape(evaluate.actions) == (max(returns), 3)
    # Two side by side, in two rounds: of the fourth episode nothing is counted.
    rounds = close(Evaluator(
        "CartPoleEndless-v1", seed=0, goal="fixed", num_episodes=3, num_envs=2))
    found = rounds(lambda obs: np.ones(2, int))
    np.testing.assert_array_equal(rounds.episodes["length"][:2], returns[:2])
    assert rounds.episodes["return"].shape == (3,)
    assert found["eval/return"] == rounds.episodes["return"].mean()
    assert np.shape(rounds.actions) == (max(returns[:2]), 2), "those of the first round"


# -------------------------------------------------------------------------------- DQN

ARGS = dqn.Args(batch_size=16, hidden_features=(32,), buffer_size=64)
SIZES = Sizes(obs=4, action=3, embedding=6)


def random_batch(seed: int) -> Transition:
    rng = np.random.default_rng(seed)
    return Transition(
        rng.normal(size=(16, 4)).astype(np.float32), rng.integers(0, 3, (16, 1)).astype(np.float32),
        rng.normal(size=(16, 4)).astype(np.float32), rng.normal(size=16).astype(np.float32),
        rng.integers(0, 2, 16).astype(np.float32), rng.normal(size=(16, 6)).astype(np.float32),
    )


def q_in_numpy(params: dict, obs: np.ndarray) -> np.ndarray:
    """Of one hidden layer, with layer normalisation if there is one."""
    layers = jax.tree.map(np.asarray, params["params"])
    hidden = obs @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"]
    if norm := layers.get("LayerNorm_0"):
        hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True)
                                                                    + 1e-6)
        hidden = hidden * norm["scale"] + norm["bias"]
    return np.maximum(hidden, 0) @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_q_loss_against_numpy(layer_norm):
    agent = dqn.init_agent(jax.random.key(0), SIZES, replace(ARGS, layer_norm=layer_norm))
    assert ("LayerNorm_0" in agent.params["params"]) == layer_norm
    agent = agent.replace(target=jax.tree.map(lambda x: x + 0.3, agent.params))
    batch = random_batch(0)
    reward = np.linspace(-3, 3, 16).astype(np.float32)  # both branches of Huber's loss
    loss, metrics = dqn.q_loss(agent.params, agent, batch, reward, ARGS)
    next_q = q_in_numpy(agent.target, batch.next_obs).max(1)
    target = reward + 0.99 * (1 - batch.terminated) * next_q
    q = q_in_numpy(agent.params, batch.obs)[np.arange(16), batch.action[:, 0].astype(int)]
    error = np.abs(q - target)
    assert (error < 1).any() and (error > 1).any()
    expected = np.where(error < 1, error**2 / 2, error - 0.5).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["q"], q.mean(), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_dqn_learns_from_the_vlm_reward_alone(alpha):
    """Of the environment's own there is nothing in the loss where a VLM is given."""
    args, key = replace(ARGS, alpha=alpha), jax.random.key(3)
    agent, buffers = dqn.init_agent(jax.random.key(0), SIZES, args), dqn.init_buffers(SIZES, args)
    buffers = dqn.Buffers(replay.add_rows(buffers.transitions, random_batch(0)))
    vlm = dqn.VLMInputs(jnp.arange(6.0), jnp.ones(6))
    batch = replay.take(buffers.transitions, replay.sample_slots(buffers.transitions, key, 16))
    images = batch.embedding.astype(jnp.float32)
    fuzzy = (dqn.cosine_similarity(vlm.text, images) if alpha == 0
             else dqn.goal_baseline_reward(vlm.text, vlm.baseline, images, alpha))
    for inputs, reward in ((vlm, fuzzy), (None, batch.reward)):
        _, metrics = dqn.update_once(agent, buffers, inputs, key, args)
        expected, _ = dqn.q_loss(agent.params, agent, batch, reward, args)
        np.testing.assert_allclose(metrics["losses/q_loss"], expected, rtol=1e-5)


def test_dqn_finds_a_known_q():
    """A chain of two states: action 1 leads on (reward 0, then 1 and the end), 0 stays (0.1)."""
    args = replace(ARGS, gamma=0.5, learning_rate=1e-2, num_envs=8, target_update_every=80)
    states = np.eye(2, dtype=np.float32)
    rows = Transition(
        obs=states[[0, 0, 1, 1]], action=np.float32([[0], [1], [0], [1]]),
        next_obs=states[[0, 1, 1, 1]], reward=np.float32([0.1, 0, 0.1, 1]),
        terminated=np.float32([0, 0, 0, 1]),
    )
    sizes = Sizes(obs=2, action=2)
    agent, buffers = dqn.init_agent(jax.random.key(1), sizes, args), dqn.init_buffers(sizes, args)
    buffers = dqn.Buffers(replay.add_rows(buffers.transitions, rows))
    for env_steps in range(8, 2400, 8):
        agent, _ = dqn.update(agent, buffers, None, jax.random.key(0), env_steps, args)
    # Q(1, on) = 1; Q(1, stay) = 0.1 + 1/2; Q(0, on) = 1/2; Q(0, stay) = 0.1 + 1/4.
    np.testing.assert_allclose(agent.network.apply(agent.params, states), [[0.35, 0.5], [0.6, 1]],
                               atol=0.01)
    np.testing.assert_array_equal(dqn.policy(agent, states), [1, 1])


def test_the_target_changes_when_it_is_due():
    args = replace(ARGS, target_update_every=100, num_envs=8)
    agent, buffers = dqn.init_agent(jax.random.key(0), SIZES, args), dqn.init_buffers(SIZES, args)
    buffers = dqn.Buffers(replay.add_rows(buffers.transitions, random_batch(0)))
    inputs = dqn.VLMInputs(jnp.ones(6), jnp.ones(6))
    changed = []
    for env_steps in range(8, 320, 8):
        before = jax.tree.map(np.array, agent)
        agent, _ = dqn.update(agent, buffers, inputs, jax.random.key(0), env_steps, args)
        same = jax.tree.map(np.array_equal, before.target, agent.target)
        if not all(jax.tree.leaves(same)):
            changed.append(env_steps)
            jax.tree.map(np.testing.assert_array_equal, before.params, agent.target)
    assert changed == [104, 200, 304]


def test_gradients_are_clipped():
    gradients = {"w": jnp.array([30.0, 40.0])}
    ours = dqn.optimizer(ARGS)
    moments = ours.update(gradients, ours.init(gradients))[1][1][0]
    np.testing.assert_allclose(moments.mu["w"], [0.6, 0.8])  # a tenth of the norm 10


def test_exploration_falls_linearly():
    args = replace(ARGS, total_timesteps=1000, exploration=0.5, epsilon=0.2)
    args = replace(args, learning_starts=0)
    np.testing.assert_allclose([dqn.epsilon(s, args) for s in (0, 250, 500, 900)],
                               [1, 0.6, 0.2, 0.2])
    assert dqn.epsilon(900, replace(args, learning_starts=901)) == 1
    args = replace(args, learning_starts=10, epsilon=0.0)
    agent = dqn.init_agent(jax.random.key(0), SIZES, args)
    obs = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
    best = np.asarray(dqn.policy(agent, obs))
    np.testing.assert_array_equal(dqn.act(agent, obs, 900, args), best)
    for env_steps, share in ((0, 1 / 3), (250, 1 - 0.5 * 2 / 3)):  # a random one may be the best
        assert abs((dqn.act(agent, obs, env_steps, args) == best).mean() - share) < 0.1


# ------------------------------------------------------------------------ whole runs


def metrics_of(folder: Path) -> list[tuple]:
    with open(folder / "metrics.csv", newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)
                if not row["key"].startswith("time/")]


SMALL = dict(total_timesteps=1200, learning_starts=400, num_envs=4, batch_size=8, eval_every=600,
             log_every=200, checkpoint_every=600, hidden_features=(16,), eval_episodes=2)


def test_dqn_runs_and_is_resumed(tmp_path, capsys):
    """Endless CartPole with the embedded VLM, and once more in two halves."""
    args = dqn.Args(**SMALL, run_dir=str(tmp_path / "whole"), alpha=0.5, exploration=0.0)
    evaluation = dqn.main(args)
    assert 5 < evaluation["eval/return"] < 500
    rows = metrics_of(tmp_path / "whole")
    assert {"losses/q_loss", "reward/vlm_mean", "eval/length", "charts/epsilon"} <= {
        key for _, key, _ in rows}
    again = evaluate_tool.main(evaluate_tool.Args(
        tmp_path / "whole", episodes=3, output=tmp_path / "evaluation"))
    assert (tmp_path / "evaluation/episode_0.mp4").stat().st_size > 1000
    assert again["env_id"] == "CartPole-v1" and again["episodes"] == 3
    each = again["per_episode"]
    assert again["return"]["mean"] == np.mean(each["return"]) == again["length"]["mean"]
    assert again["success_at_end"]["rate"] == 0 and again["success_at_end"]["wilson_95"][1] < 0.6
    assert again["video_curve"].startswith("VLM reward"), "of the pictures of training"
    frames = imageio.mimread(tmp_path / "evaluation/episode_0.mp4", memtest=False)
    assert len(frames) == len(range(0, int(each["length"][0]), 2)) + (each["length"][0] % 2 == 0)
    # Of the kept policies, the one that the run's evaluations or its VLM reward put first. They
    # are counted on other episodes than those.
    measured = {int(step): float(value) for step, key, value in rows if key == "eval/return"}
    assert list(kept_policies(tmp_path / "whole")) == sorted(measured)
    best = evaluate_tool.main(evaluate_tool.Args(
        tmp_path / "whole", best=True, episodes=2, videos=0, output=tmp_path / "best"))
    assert best["env_steps"] == max(measured, key=lambda step: (measured[step], step))
    assert best["seed"] not in (args.seed, args.seed + EVAL_SEED_OFFSET)
    rewards = {int(step): float(value) for step, key, value in rows if key == "reward/vlm_mean"}
    rewards = {step: rewards[step] for step in measured if step in rewards}
    chosen = evaluate_tool.chosen_step(evaluate_tool.Args(tmp_path / "whole", best_reward=True))
    assert chosen == max(rewards, key=rewards.get)
    assert f"--best-reward: step {chosen} of" in capsys.readouterr().out

    dqn.main(replace(args, total_timesteps=600, run_dir=str(tmp_path / "half")))
    dqn.main(replace(args, resume=str(tmp_path / "half")))
    again = metrics_of(tmp_path / "half")  # whose evaluations end at other times
    assert {row[1] for row in again} == {row[1] for row in rows}
    for key in {row[1] for row in rows}:
        assert [row for row in again if row[1] == key] == [row for row in rows if row[1] == key]


def test_an_evaluation_without_a_video(own_environments, tmp_path, capsys):
    """An environment that draws nothing: the figures are kept, and a line says what is missing.

    They are in the run's own folder, and the same evaluation again replaces them.
    """
    settings = {"frame_stack": 0, "frame_size": 0, "camera_id": 0, "quality": "fast",
                "action_repeat": 1}
    script = SimpleNamespace(policy=lambda state, obs: np.ones(len(obs), int))
    trained = Trained(
        tmp_path / "0", {"script": "mine", "evaluation": settings}, script,
        SimpleNamespace(env_id="environments:Blind-v0", seed=0), env_steps=5, state=None)
    args = evaluate_tool.Args(trained.folder, episodes=2)
    for _ in range(2):
        results = evaluate_tool.evaluate(trained, args)
        assert results["per_episode"]["return"] == [1, 1] and results["length"]["mean"] == 3
        assert "note: without a video: environments:Blind-v0 draws" in capsys.readouterr().out
    [folder] = (tmp_path / "0/evaluations").iterdir()
    assert [path.name for path in folder.iterdir()] == ["evaluation.json"]


def test_an_evaluation_is_played_again_where_no_state_can_be_saved(own_environments, tmp_path):
    """The observations, which hold the number of the episode, are those of the evaluation."""
    settings = {"frame_stack": 0, "frame_size": 0, "camera_id": 0, "quality": "fast",
                "action_repeat": 1}
    where, seen = {"env_id": "environments:Line-v0", "goal": "fixed", "seed": 0}, []
    script = SimpleNamespace(policy=lambda state, obs: np.ones(len(obs), int))
    trained = Trained(tmp_path, {"evaluation": settings}, script, SimpleNamespace(**where), 0, None)
    with contextlib.closing(trained.evaluator(num_episodes=2, **where)) as evaluator:
        evaluator(lambda obs: seen.append(obs) or trained.policy(obs))
    again = trained.play_again(np.array(evaluator.actions), **where)
    np.testing.assert_array_equal(again.states[:-1], seen)


def test_frames_are_drawn_and_embedded_every_k_th_step(tmp_path, monkeypatch):
    """300 steps of an episode in each of 4 environments, of which 1, 10, 20 to 300 are drawn."""
    sizes, saved, load_vlm, save = [], [], vlm_rm.load_vlm, checkpoint.save

    def load(*args, **kwargs):
        vlm = load_vlm(*args, **kwargs)
        embed = vlm.embed_images
        vlm.embed_images = lambda frames: sizes.append(len(frames)) or embed(frames)
        return vlm

    monkeypatch.setattr(vlm_rm, "load_vlm", load)
    monkeypatch.setattr(checkpoint, "save", lambda *args: saved.append(
        np.asarray(args[3]["transitions"].data.embedding)) or save(*args))
    args = vlm_rm.Args(**SMALL | {"checkpoint_every": 0}, env_id="MountainCarTextured-v0",
                       draw_every=10, buffer_size=1200)
    vlm_rm.main(replace(args, run_dir=str(tmp_path / "run")))
    assert len(sizes) == 31 and set(sizes) == {4}
    embeddings = saved[-1].reshape(300, 4, -1)
    time = np.arange(300) + 1
    drawn = np.where((time == 1) | (time % 10 == 0), np.arange(300), 0)
    np.testing.assert_array_equal(embeddings, embeddings[np.maximum.accumulate(drawn)])
    assert (embeddings[0] != embeddings[299]).any()


@pytest.mark.parametrize(("script", "args", "message"), [
    (sac, {"env_id": "CartPole-v1"}, "has discrete actions"),
    (vlm_rm, {"env_id": "CartPole-v1"}, "has discrete actions"),
    (dqn, {"env_id": "Pendulum-v1", "vlm_reward": False}, "continuous actions, which DQN cannot"),
    (dqn, {"env_id": "Acrobot-v1"}, "Acrobot-v1 has no prompt of its own: give --prompt"),
    (dqn, {"baseline_prompt": "a cart"}, "--baseline-prompt has no effect without --alpha"),
    (dqn, {"vlm_reward": False, "alpha": 0.5}, "have no effect with --no-vlm-reward"),
    (sac, {"env_id": "Pendulum-v1", "engine": "envpool"}, "envpool has Meta-World's tasks, not"),
    (sac, {"env_id": "HalfCheetah-v6"}, "Or, of Gymnasium, HalfCheetah-v5"),
    (dqn, {"env_id": "drawer-open-v3"}, "unknown environment 'drawer-open-v3'"),
])
def test_what_scripts_refuse(script, args, message, tmp_path):
    with pytest.raises(UserError, match=message):
        script.main(script.Args(**{"run_dir": str(tmp_path / "run")} | args))
    assert not (tmp_path / "run").exists()


def test_ends_reach_the_replay(own_environments, tmp_path, monkeypatch):
    """What a step led to stands in its row, not the episode that begins then."""
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a: saved.append(
        jax.tree.map(np.asarray, a[3])) or save(*a))
    sac.main(sac.Args(**SMALL | {"checkpoint_every": 0, "total_timesteps": 800}, buffer_size=1000,
                      env_id="environments:ContinuousLine-v0", run_dir=str(tmp_path / "run")))
    returns = [float(value) for _, key, value in metrics_of(tmp_path / "run")
               if key == "charts/return"]
    assert 0 < returns[0] < 1, "some of the random episodes reach the end"
    rows: Transition = jax.tree.map(lambda x: x[:800], saved[-1]["transitions"].data)
    rows = jax.tree.map(lambda x: x.reshape(200, 4, *x.shape[1:]), rows)  # [steps, num_envs, ...]
    reached = rows.next_obs[..., 1] >= 3
    assert reached.any() and not reached.all()
    np.testing.assert_array_equal(rows.terminated, reached)
    np.testing.assert_array_equal(rows.reward, reached)
    goes_on = rows.next_obs[:-1, :, 0] == rows.obs[1:, :, 0]  # the number of the episode
    np.testing.assert_array_equal(rows.obs[1:][goes_on], rows.next_obs[:-1][goes_on])
    assert not (goes_on & reached[:-1]).any() and (rows.obs[1:, :, 1][~goes_on] == 0).all()
    assert (~goes_on & ~reached[:-1]).any(), "some run out of time"


def test_a_landscape_of_the_textured_car(tmp_path, capsys):
    """The embedded VLM's reward is highest near the flag."""
    landscape.main(landscape.Args(
        ("MountainCarTextured-v0",), alpha=(0.0, 1.0), repeats=1, output=tmp_path / "out"))
    with open(tmp_path / "out/landscape.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 91 and (tmp_path / "out/landscape.png").stat().st_size > 10_000
    values = [float(row["value"]) for row in rows if row["alpha"] == "0.0"]
    rewards = [float(row["reward"]) for row in rows if row["alpha"] == "0.0"]
    assert abs(values[int(np.argmax(rewards))] - 0.45) < 0.15
    assert "Spearman with nearness 0.9" in capsys.readouterr().out
    with pytest.raises(UserError, match="Pendulum-v1 has no axis to draw over; these have: CartP"):
        landscape.main(landscape.Args(("Pendulum-v1",), output=tmp_path / "no"))


@pytest.mark.parametrize("name", [
    "MLP", "cosine_similarity", "goal_baseline_reward", "load_reward",
])
def test_dqn_and_sac_have_the_same_reward(name):
    """Byte for byte, as `test_scripts_agree` asks it of the scripts of the FuRL paper."""
    assert definitions("vlm_rm_dqn")[name] == definitions("vlm_rm_baseline")[name]
