"""FuRL on states: losses against numbers worked out by hand or in numpy, and what learns what."""

from dataclasses import replace
from functools import partial
from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import furl_sac_state as script
from common import replay
from common.replay import LaggedFrames, Sizes, Transition
from furl_sac_state import AgentState, Args, Phase, VLMInputs

SMALL = Args(
    num_envs=3, batch_size=16, buffer_size=64, embedding_buffer_size=40, hidden_features=(16,),
    projection_features=(8, 4), lag=2, rho=0.5,
)
RAW = replace(SMALL, align=False)  # r_VLM is the cosine similarity: losses can be done by hand
EMBED_DIM = 3
SIZES = Sizes(39, 4, EMBED_DIM)
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def at_angles(cosines) -> jax.Array:
    """Unit embeddings [n, 3] whose similarity to the text (1, 0, 0) is `cosines`."""
    cosines = np.asarray(cosines, np.float32)
    return jnp.stack([cosines, np.sqrt(1 - cosines**2), np.zeros_like(cosines)], 1)


TEXT = jnp.array([1.0, 0.0, 0.0])
NO_GOAL = VLMInputs(TEXT, jnp.zeros(3))


def random_batch(seed: int, n: int = 16) -> Transition:
    rng = np.random.default_rng(seed)
    return Transition(
        obs=rng.normal(size=(n, 39)).astype(np.float32),
        action=rng.uniform(-1, 1, (n, 4)).astype(np.float32),
        next_obs=rng.normal(size=(n, 39)).astype(np.float32),
        reward=(rng.random(n) < 0.3).astype(np.float32),
        terminated=(rng.random(n) < 0.3).astype(np.float32),
        embedding=rng.normal(size=(n, EMBED_DIM)).astype(np.float16),
    )


@pytest.fixture(scope="module")
def agent() -> AgentState:
    """Its target critic and temperature differ from what they start as."""
    agent = script.init_agent(jax.random.key(0), SIZES, SMALL)
    target = jax.tree.map(lambda x: 0.7 * x + 0.05, agent.target_critic)
    params = agent.params | {"log_alpha": jnp.log(0.3)}
    return agent.replace(params=params, target_critic=target)


@pytest.fixture(scope="module")
def buffers() -> script.Buffers:
    buffers = script.init_buffers(SIZES, SMALL)
    rng = np.random.default_rng(5)

    def trajectory(length):
        time = np.arange(length, dtype=np.int32)
        images = rng.normal(size=(length, EMBED_DIM)).astype(np.float16)
        return replay.EmbeddedFrame(images, time, np.full(length, True), time)

    return script.Buffers(
        replay.add_rows(buffers.transitions, random_batch(1, 50)),
        replay.add_rows(buffers.positives, trajectory(7)),
        replay.add_rows(buffers.negatives, trajectory(12)),
    )


init_state = jax.jit(script.init_state, static_argnums=(1, 2))
update_once = jax.jit(script.update_once, static_argnames=("args", "phase"))
VLM = VLMInputs(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 1.0, 0.0]))


def changed(before, after) -> bool:
    return any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


# --------------------------------------------------------------------------- FuRL's losses


def test_cosine_similarity():
    text = jnp.array([3.0, 4.0])
    images = jnp.array([[3.0, 4.0], [-6.0, -8.0], [4.0, -3.0], [0.0, 2.0], [0.0, 0.0]])
    assert_close(script.cosine_similarity(text, images), [1, -1, 0, 0.8, 0])
    assert_close(script.cosine_similarity(jnp.zeros(2), images), np.zeros(5))


def test_cosine_similarity_of_zero_has_finite_gradients():
    gradient = jax.grad(lambda x: script.cosine_similarity(jnp.ones(2), x).sum())
    assert np.isfinite(gradient(jnp.zeros((1, 2)))).all()
    # d cos / d image at (1, 0) for the text (1, 1): (0, 1 / sqrt 2).
    assert_close(gradient(jnp.array([[1.0, 0.0]])), [[0, 0.70710678]])


def test_vlm_reward_is_the_similarity_of_the_projections():
    params = script.Projection(SMALL.projection_features).init(
        jax.random.key(0), VLM.text, jnp.zeros((1, EMBED_DIM))
    )
    images = np.random.default_rng(0).normal(size=(5, EMBED_DIM)).astype(np.float32)

    def head(name, x):
        layers = jax.tree.map(np.asarray, params["params"][name])
        x = np.maximum(x @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"], 0)
        return x @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]

    text, projected = head("language", np.asarray(VLM.text)), head("image", images)
    norms = np.linalg.norm(text) * np.linalg.norm(projected, axis=1)
    assert_close(script.vlm_reward(params, images, VLM, SMALL), projected @ text / norms, rtol=1e-4)


def test_vlm_reward_without_projections():
    assert_close(script.vlm_reward({}, at_angles([0.6, -0.2]), NO_GOAL, RAW), [0.6, -0.2])


def test_ranking_loss():
    better, worse = jnp.array([0.5, 0.5, 0.5, 0.0]), jnp.array([0.0, 0.45, 0.9, 0.0])
    # max(0, worse - better + 0.1): 0, 0.05, 0.5, 0.1
    assert_close(script.ranking_loss(better, worse, 0.1, jnp.full(4, True)), 0.65 / 4)
    some = jnp.array([True, False, True, False])
    assert_close(script.ranking_loss(better, worse, 0.1, some), 0.25)
    assert_close(script.ranking_loss(better, worse, 0.1, jnp.full(4, False)), 0)


def test_negatives_loss_is_eq_5_over_all_pairs():
    """The goal image is the origin: distances are norms, which do not change similarities."""
    cosines, norms = np.array([0.5, 0.8, 0.3, 0.4]), np.array([1.0, 2.0, 1.1, 1.6])
    images = at_angles(cosines) * norms[:, None]
    # Pairs whose distances differ by more than 0.2, the nearer one first, and what they cost:
    # (0, 1): worse by 0.3: 0.4.   (0, 3): better by 0.1: 0.   (2, 1): worse by 0.5: 0.6.
    # (2, 3): worse by 0.1: 0.2.   (3, 1): worse by 0.4: 0.5.  (0, 2) differ by 0.1: no pair.
    loss, metrics = script.negatives_loss({}, images, NO_GOAL, RAW)
    assert_close(loss, (0.4 + 0 + 0.6 + 0.2 + 0.5) / 5)
    assert_close(metrics["neg_neg_loss"], loss)
    assert_close(metrics["neg_neg_pairs"], 2 * 5 / 4**2)
    shuffled = script.negatives_loss({}, images[::-1], NO_GOAL, RAW)[0]
    assert_close(shuffled, loss)
    wide = replace(RAW, reward_margin=0.5, l2_margin=0.95)  # pair (0, 1) alone: 0.3 + 0.5
    assert_close(script.negatives_loss({}, images, NO_GOAL, wide)[0], 0.8)


def test_negatives_loss_agrees_with_a_loop_in_numpy():
    rng = np.random.default_rng(4)
    images = rng.normal(size=(12, EMBED_DIM)).astype(np.float32)
    reward = np.asarray(script.vlm_reward({}, images, VLM, RAW))
    distance = np.linalg.norm(images - np.asarray(VLM.goal), axis=1)
    losses = [max(0, reward[j] - reward[i] + RAW.reward_margin)
              for i in range(12) for j in range(12) if distance[i] + RAW.l2_margin < distance[j]]
    assert_close(script.negatives_loss({}, images, VLM, RAW)[0], np.mean(losses))


def test_negatives_loss_measures_from_the_goal_image():
    goal = VLMInputs(TEXT, jnp.array([0.0, 2.0, 0.0]))
    near, far = [0.0, 2.0, 0.0], [1.0, 0.0, 0.0]  # rewards 0 and 1
    for images in [(near, far), (far, near)]:
        assert_close(script.negatives_loss({}, jnp.array(images), goal, RAW)[0], 1.1)


def test_negatives_loss_without_a_pair():
    loss, metrics = script.negatives_loss({}, at_angles([0.5, 0.5]), NO_GOAL, RAW)
    assert loss == 0 and metrics["neg_neg_pairs"] == 0


def test_positives_loss_is_eq_4():
    positives, earlier = at_angles([0.9, 0.5, 0.3]), at_angles([0.2, 0.6, 0.9])
    negatives = at_angles([0.1, 0.7, 0.25])
    # Above negatives: 0, 0.3, 0.05. Above the earlier frames: 0, 0.2, (0.7, which has no pair).
    yes = jnp.array([True, True, True])
    loss, metrics = script.positives_loss(
        {}, LaggedFrames(positives, yes, earlier, jnp.array([True, True, False])), negatives,
        jnp.array(True), NO_GOAL, RAW,
    )
    assert_close(metrics["pos_neg_loss"], 0.35 / 3)
    assert_close(metrics["pos_pos_loss"], 0.1)
    assert_close(loss, 0.35 / 3 + 0.1)


def test_positives_of_an_episodes_first_steps_take_no_part():
    """Without the second positive, the first and third are left: 0 and 0.05 above negatives."""
    positives, earlier = at_angles([0.9, 0.5, 0.3]), at_angles([0.2, 0.6, 0.9])
    old_enough = jnp.array([True, False, True])
    _, metrics = script.positives_loss(
        {}, LaggedFrames(positives, old_enough, earlier, jnp.array([True, False, False])),
        at_angles([0.1, 0.7, 0.25]), jnp.array(True), NO_GOAL, RAW,
    )
    assert_close(metrics["pos_neg_loss"], 0.05 / 2)
    assert_close(metrics["pos_pos_loss"], 0)


def test_positives_loss_without_negatives_or_pairs():
    images, yes = (at_angles([0.9, 0.5]), at_angles([0.95, 0.6])), jnp.array([True, True])
    loss, metrics = script.positives_loss(
        {}, LaggedFrames(images[0], yes, images[1], yes), jnp.zeros((2, 3)), jnp.array(False),
        NO_GOAL, RAW,
    )
    assert metrics["pos_neg_loss"] == 0
    assert_close(loss, (0.15 + 0.2) / 2)
    loss, _ = script.positives_loss(
        {}, LaggedFrames(images[0], yes, images[1], ~yes), jnp.zeros((2, 3)), jnp.array(False),
        NO_GOAL, RAW,
    )
    assert loss == 0


# ------------------------------------------------------------------------------- SAC


def fixed_actor(agent: AgentState, mean, log_std) -> dict:
    """Actor parameters that give the same Gaussian for every observation."""
    actor = jax.tree.map(jnp.zeros_like, agent.params["actor"])
    layers = actor["params"]["MLP_0"]
    layers["Dense_1"]["bias"] = jnp.concatenate([jnp.asarray(mean), jnp.asarray(log_std)])
    return actor


def test_log_prob_is_the_density_of_the_squashed_gaussian(agent):
    mean, log_std = np.array([0.3, -1.0, 0.0, 1.5]), np.array([0.0, -1.0, 0.5, -0.3])
    actor = fixed_actor(agent, mean, log_std)
    action, log_prob = script.sample_action(
        agent.actor, actor, jnp.zeros((50, 39)), jax.random.key(3)
    )
    action, std = np.asarray(action, np.float64), np.exp(log_std)
    # The density as the derivative of the cumulative distribution, Phi((artanh(a) - mean) / std).
    def cumulative(x):
        return 0.5 * (1 + np.vectorize(erf)((np.arctanh(x) - mean) / std / np.sqrt(2)))

    h = 1e-4 * (1 - np.abs(action))
    density = (cumulative(action + h) - cumulative(action - h)) / (2 * h)
    # float32 keeps few digits of 1 - |a|, so actions close to the bounds are left out.
    inside = (1 - np.abs(action)).min(1) > 1e-2
    assert inside.sum() > 20
    expected = np.log(density).sum(1)
    np.testing.assert_allclose(np.asarray(log_prob)[inside], expected[inside], atol=1e-3)


def test_log_prob_integrates_to_one(agent):
    """E[1 / p(a)] over samples is the size of the action space: 2^4."""
    actor = fixed_actor(agent, np.zeros(4), np.full(4, -0.2))
    _, log_prob = script.sample_action(
        agent.actor, actor, jnp.zeros((40_000, 39)), jax.random.key(1)
    )
    assert abs(np.exp(-np.asarray(log_prob, np.float64)).mean() / 16 - 1) < 0.05


def test_samples_follow_mean_and_std(agent):
    mean, log_std = np.array([0.3, -1.0, 0.0, 0.5]), np.array([-1.0, -2.0, 0.0, -0.5])
    actor = fixed_actor(agent, mean, log_std)
    action, _ = script.sample_action(
        agent.actor, actor, jnp.zeros((20_000, 39)), jax.random.key(2)
    )
    pre_tanh = np.arctanh(np.asarray(action, np.float64))
    np.testing.assert_allclose(pre_tanh.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(pre_tanh.std(0), np.exp(log_std), rtol=0.03)


def test_log_prob_stays_finite_far_out(agent):
    actor = fixed_actor(agent, np.full(4, 40.0), np.full(4, 9.0))  # the log std is clipped to 2
    action, log_prob = script.sample_action(
        agent.actor, actor, jnp.zeros((9, 39)), jax.random.key(1)
    )
    assert np.isfinite(log_prob).all() and np.abs(action).max() <= 1


def state_with(furl: dict, relay: dict) -> script.FuRLState:
    """A state whose agents have these actors."""
    state = init_state(jax.random.key(0), SIZES, SMALL)
    agents = (agent.replace(params=agent.params | {"actor": actor})
              for agent, actor in ((state.furl, furl), (state.relay, relay)))
    return script.FuRLState(*agents, state.projection, state.projection_opt)


def test_the_policy_is_tanh_of_the_evaluated_agents_mean(agent):
    actor = fixed_actor(agent, [0.3, -1.0, 0.0, 1.5], np.zeros(4))
    other = fixed_actor(agent, np.full(4, 0.7), np.zeros(4))
    action = script.policy(state_with(actor, other), jnp.ones((2, 39)))
    assert_close(action, np.tanh([[0.3, -1.0, 0.0, 1.5]] * 2))


def critic_in_numpy(params: dict, obs, action) -> np.ndarray:
    [layers] = params["params"].values()
    values = []
    for i in range(2):
        x = np.concatenate([obs, action], 1)
        for name in ("Dense_0", "Dense_1"):
            x = x @ np.asarray(layers[name]["kernel"][i]) + np.asarray(layers[name]["bias"][i])
            x = np.maximum(x, 0) if name == "Dense_0" else x
        values.append(x[:, 0])
    return np.stack(values)


def test_critics_differ_and_are_what_they_seem(agent):
    batch = random_batch(0)
    q = agent.critic.apply(agent.params["critic"], batch.obs, batch.action)
    expected = critic_in_numpy(agent.params["critic"], batch.obs, batch.action)
    np.testing.assert_allclose(q, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_critic_loss_is_the_soft_bellman_error(agent):
    batch, key = random_batch(0), jax.random.key(4)
    reward = np.random.default_rng(1).normal(size=16).astype(np.float32)
    args = replace(SMALL, gamma=0.9)
    loss, metrics = script.critic_loss(agent.params["critic"], agent, batch, reward, key, args)

    action, log_prob = script.sample_action(agent.actor, agent.params["actor"], batch.next_obs, key)
    next_q = critic_in_numpy(agent.target_critic, batch.next_obs, np.asarray(action)).min(0)
    target = reward + 0.9 * (1 - batch.terminated) * (next_q - 0.3 * np.asarray(log_prob))
    q = critic_in_numpy(agent.params["critic"], batch.obs, batch.action)
    expected = ((q[0] - target) ** 2).mean() + ((q[1] - target) ** 2).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], q.mean(), rtol=1e-4, atol=1e-5)


def test_termination_cuts_the_bootstrap(agent):
    batch = random_batch(0)._replace(terminated=np.ones(16, np.float32))
    reward = np.full(16, 2.5, np.float32)
    loss, _ = script.critic_loss(
        agent.params["critic"], agent, batch, reward, jax.random.key(0), SMALL
    )
    q = critic_in_numpy(agent.params["critic"], batch.obs, batch.action)
    np.testing.assert_allclose(loss, ((q - 2.5) ** 2).mean(1).sum(), rtol=1e-4)


def test_actor_loss(agent):
    batch, key = random_batch(0), jax.random.key(4)
    loss, metrics = script.actor_loss(agent.params["actor"], agent, batch, key)
    action, log_prob = script.sample_action(agent.actor, agent.params["actor"], batch.obs, key)
    q = critic_in_numpy(agent.params["critic"], batch.obs, np.asarray(action)).min(0)
    np.testing.assert_allclose(loss, (0.3 * log_prob - q).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], -np.mean(log_prob), rtol=1e-5)


def test_each_sac_loss_moves_its_own_parameters(agent):
    """The gradient of the sum is, part by part, the gradient of that part's loss alone."""
    batch, key = random_batch(0), jax.random.key(7)
    reward = np.ones(16, np.float32)
    gradients = jax.jit(jax.grad(
        lambda p: script.sac_loss(p, agent, batch, reward, key, SMALL)[0]
    ))(agent.params)
    critic_key, actor_key = jax.random.split(key)
    critic = jax.jit(jax.grad(
        lambda p: script.critic_loss(p, agent, batch, reward, critic_key, SMALL)[0]
    ))(agent.params["critic"])
    actor = jax.jit(jax.grad(
        lambda p: script.actor_loss(p, agent, batch, actor_key)[0]
    ))(agent.params["actor"])
    entropy = script.actor_loss(agent.params["actor"], agent, batch, actor_key)[1]["entropy"]
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, gradients["critic"], critic)
    jax.tree.map(close, gradients["actor"], actor)
    close(gradients["log_alpha"], 0.3 * (entropy + 2))
    for part in gradients.values():
        assert any(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(part))


def test_update_agent_moves_the_target_by_tau(agent):
    args = replace(SMALL, tau=0.25)
    after, _ = jax.jit(script.update_agent, static_argnames="args")(
        agent, random_batch(0), np.ones(16, np.float32), jax.random.key(0), args
    )
    assert all(changed(agent.params[name], after.params[name]) for name in agent.params)
    jax.tree.map(
        assert_close, after.target_critic,
        jax.tree.map(
            lambda old, new: 0.75 * old + 0.25 * new, agent.target_critic, after.params["critic"]
        ),
    )


def test_first_adam_step_is_the_learning_rate(agent):
    """Adam's first step is the learning rate against the gradient's sign."""
    args = replace(SMALL, learning_rate=0.01)
    params = {"x": jnp.array([3.0, -2.0])}
    opt = script.optax.adam(args.learning_rate).init(params)
    after, _, metrics = script.adam_step(
        lambda p: ((p["x"] ** 2).sum(), {"sum": p["x"].sum()}), params, opt, args
    )
    assert_close(after["x"], [2.99, -1.99])
    assert metrics["sum"] == 1


def test_initial_state():
    state = init_state(jax.random.key(0), SIZES, SMALL)
    for agent in (state.furl, state.relay):
        assert not changed(agent.params["critic"], agent.target_critic)
        assert_close(jnp.exp(agent.params["log_alpha"]), SMALL.init_temperature)
    assert changed(state.furl.params, state.relay.params), "two agents, two initialisations"


def test_init_q_moves_both_critics_and_their_targets():
    """Only what they say: their parameters are as without it."""
    before, after = (
        init_state(jax.random.key(0), SIZES, replace(SMALL, init_q=q)).furl for q in (0.0, -100.0)
    )
    assert not changed(before.params, after.params)
    obs, action = jnp.ones((5, SIZES.obs)), jnp.ones((5, SIZES.action))
    for network in ("critic", "target"):
        zero, moved = (
            agent.critic.apply(agent.target_critic if network == "target" else
                               agent.params["critic"], obs, action)
            for agent in (before, after)
        )
        assert_close(moved, zero - 100)


# -------------------------------------------------------------------------------- probes


def learn(args: Args, reward_of, terminated: float, num_updates: int):
    """Train, all but without entropy, on uniform actions in one state; (Q [2, n], mean action).

    Actions are drawn anew for each update: in a fixed batch the policy would find actions whose
    Q nothing corrects.
    """
    agent = script.init_agent(jax.random.key(0), SIZES, args)
    agent = agent.replace(params=agent.params | {"log_alpha": jnp.array(-30.0)})
    n = 32
    obs = jnp.zeros((n, 39))

    def once(agent, update_key):
        action_key, agent_key = jax.random.split(update_key)
        action = jax.random.uniform(action_key, (n, 4), minval=-1, maxval=1)
        ends = jnp.full(n, terminated)
        batch = Transition(obs, action, obs, jnp.zeros(n), ends, jnp.zeros((n, 3)))
        return script.update_agent(agent, batch, reward_of(action), agent_key, args)[0], action

    agent, actions = jax.jit(
        lambda agent, key: jax.lax.scan(once, agent, jax.random.split(key, num_updates))
    )(agent, jax.random.key(1))
    assert float(jnp.exp(agent.params["log_alpha"])) < 1e-10
    q = agent.critic.apply(agent.params["critic"], obs, actions[-1])
    mean, _ = agent.actor.apply(agent.params["actor"], obs[0])
    return np.asarray(q), np.tanh(mean)


PROBE = replace(SMALL, learning_rate=3e-3, tau=0.1, gamma=0.75)


def test_probe_one_step():
    """A reward of 1.5, then the end: Q = 1.5."""
    q, _ = learn(PROBE, lambda action: jnp.full(32, 1.5), 1.0, 1500)
    np.testing.assert_allclose(q, 1.5, atol=0.1)


def test_probe_forever():
    """A reward of -1 for ever: Q = -1 / (1 - gamma) = -4."""
    q, _ = learn(PROBE, lambda action: jnp.full(32, -1.0), 0.0, 1000)
    np.testing.assert_allclose(q, -4, atol=0.2)


def test_probe_the_action_decides():
    """The reward is the first action: the policy learns to push it to its bound."""
    _, action = learn(PROBE, lambda action: action[:, 0], 1.0, 800)
    assert action[0] > 0.9


# ----------------------------------------------------------------------------- the update

PHASES = [Phase(False, "goal-image"), Phase(True, "success"), Phase(True, "none")]


def test_scanned_updates_equal_single_ones(buffers):
    phase = PHASES[0]
    state, key = init_state(jax.random.key(3), SIZES, SMALL), jax.random.key(9)
    expected, collected = state, []
    for update_key in jax.random.split(jax.random.fold_in(key, 24), 3):
        expected, metrics = update_once(expected, buffers, VLM, update_key, SMALL, phase)
        collected.append(metrics)
    assert changed(state, expected)
    actual, means = script.update(state, buffers, VLM, key, 24, SMALL, phase)  # donates `state`
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-6)
    jax.tree.map(close, actual, expected)
    for name, mean in means.items():
        close(mean, np.mean([metrics[name] for metrics in collected]))


@pytest.mark.parametrize("phase", PHASES)
def test_what_an_update_changes(buffers, phase):
    before = init_state(jax.random.key(3), SIZES, SMALL)
    after, metrics = update_once(before, buffers, VLM, jax.random.key(9), SMALL, phase)
    assert changed(before.furl.params, after.furl.params)
    assert changed(before.relay, after.relay) == phase.relaying
    assert changed(before.projection, after.projection) == (phase.alignment != "none")
    names = {name.split("/")[1] for name in metrics}
    assert ("relay_critic_loss" in names) == phase.relaying
    assert ("neg_neg_loss" in names) == (phase.alignment == "goal-image")
    assert ("pos_pos_loss" in names) == (phase.alignment == "success")


@pytest.mark.parametrize("alignment", ["none", "success", "goal-image"])
def test_the_goal_image_is_for_eq_5_alone(buffers, alignment):
    """So --no-goal-image changes nothing but the phase before the first success."""
    state = script.init_state(jax.random.key(0), SIZES, SMALL)
    other = VLM._replace(goal=-VLM.goal + 0.3)
    phase = Phase(True, alignment)
    first, second = (
        update_once(state, buffers, vlm, jax.random.key(1), args=SMALL, phase=phase)[0]
        for vlm in (VLM, other)
    )
    assert changed(first, second) == (alignment == "goal-image")


def test_no_pretrained_reaches_the_vlm(monkeypatch):
    asked = {}

    def load_vlm(name, **options):
        asked.update(options)
        raise KeyboardInterrupt  # that is all there is to see

    monkeypatch.setattr(script, "load_vlm", load_vlm)
    for flag in (True, False):
        with pytest.raises(KeyboardInterrupt):
            script.main(replace(Args(), pretrained=flag))
        assert asked["pretrained"] is flag


def test_both_agents_learn_from_one_batch_with_their_own_rewards(buffers):
    """relay: r_task = sparse - 1 (B.2); furl: r_task + rho r_VLM (Eq. 1)."""
    args, key = SMALL, jax.random.key(9)
    before = init_state(jax.random.key(3), SIZES, SMALL)
    after, metrics = update_once(before, buffers, VLM, key, args, Phase(True, "none"))

    sample_key, furl_key, relay_key, _ = jax.random.split(key, 4)
    slots = replay.sample_slots(buffers.transitions, sample_key, args.batch_size)
    batch = replay.take(buffers.transitions, slots)
    fuzzy = script.vlm_reward(before.projection, batch.embedding.astype(jnp.float32), VLM, args)
    task = np.asarray(batch.reward) - 1
    assert set(task.tolist()) == {-1.0, 0.0}
    update_agent = jax.jit(script.update_agent, static_argnames="args")
    furl, _ = update_agent(before.furl, batch, task + 0.5 * fuzzy, furl_key, args)
    relay, _ = update_agent(before.relay, batch, task, relay_key, args)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, after.furl, furl)
    jax.tree.map(close, after.relay, relay)
    close(metrics["reward/vlm_mean"], fuzzy.mean())
    close(metrics["reward/task_mean"], task.mean() + 1)


@pytest.mark.parametrize("alignment", ["success", "goal-image"])
def test_alignment_ranks_the_frames(buffers, alignment):
    """Repeated steps of Eq. 4, or of Eq. 5, lower its loss; Eq. 4 lifts successes over failures."""
    args = replace(SMALL, learning_rate=3e-3)
    frames = buffers.positives.data
    away = frames._replace(embedding=frames.embedding + jnp.float16([3, 0, 0]))  # can be told apart
    buffers = buffers._replace(positives=buffers.positives._replace(data=away))
    state = init_state(jax.random.key(3), SIZES, SMALL)

    @jax.jit
    def train(state, key):
        def once(state, update_key):
            return script.update_projection(
                state, buffers, VLM, update_key, args, Phase(False, alignment)
            )
        return jax.lax.scan(once, state, jax.random.split(key, 400))

    state, metrics = train(state, jax.random.key(0))
    losses = metrics["pos_neg_loss" if alignment == "success" else "neg_neg_loss"]
    assert losses[-20:].mean() < 0.3 * losses[:20].mean()
    if alignment == "success":
        positive, negative = (
            script.vlm_reward(state.projection, ring.data.embedding[:n], VLM, args)
            for ring, n in ((buffers.positives, 7), (buffers.negatives, 12))
        )
        assert positive[args.lag :].min() > negative.mean() + args.reward_margin


# --------------------------------------------------------------------------------- relay


def test_agents_change_after_each_environments_own_period():
    """Read off what acts: T_i is the first change, and the agents go on changing after as long."""
    many = replace(SMALL, num_envs=4000)

    def acts(episode: int, args: Args = many) -> np.ndarray:  # [times, num_envs]
        return np.stack([script.relay_acts(episode, time, args) for time in range(0, 500, 10)])

    def periods(table: np.ndarray) -> np.ndarray:
        return 10 * (table != table[0]).argmax(0)

    table = acts(3)
    values, counts = np.unique(periods(table), return_counts=True)
    np.testing.assert_array_equal(values, SMALL.relay_periods)
    assert np.abs(counts / 4000 - 0.25).max() < 0.04
    assert abs(table[0].mean() - 0.5) < 0.04, "the relay agent is the first in half of them"
    for time in range(0, 500, 10):
        turn = time // periods(table)
        np.testing.assert_array_equal(table[time // 10], table[0] ^ (turn % 2 == 1))
    np.testing.assert_array_equal(acts(3), table)
    for other in (acts(4), acts(3, replace(many, seed=1))):
        assert abs((periods(other) == periods(table)).mean() - 0.25) < 0.04, "drawn anew"
        assert abs((other[0] == table[0]).mean() - 0.5) < 0.04


def test_the_agents_change_at_the_period():
    for time, changed_since in [(0, False), (49, False), (50, True), (99, True), (100, False)]:
        args = replace(SMALL, relay_periods=(50,))
        acts, first = (script.relay_acts(0, t, args) for t in (time, 0))
        np.testing.assert_array_equal(acts, first ^ changed_since)


def frames(num: int, first_time: int = 0) -> replay.Ring:
    """A ring with `num` frames of one trajectory, from `first_time` on."""
    ring = script.init_buffers(SIZES, SMALL).positives
    time = np.arange(first_time, first_time + num, dtype=np.int32)
    rows = replay.EmbeddedFrame(np.zeros((num, EMBED_DIM)), time, np.full(num, True), time)
    return replay.add_rows(ring, rows)._replace(total=jnp.int32(num)) if num else ring


@pytest.mark.parametrize(("flags", "num_positives", "num_negatives", "relaying", "alignment"), [
    ({}, 0, 0, True, "none"),
    ({}, 0, 500, True, "goal-image"),
    ({}, 1, 0, True, "success"),
    ({}, 1, 500, True, "success"),
    ({}, 2499, 500, True, "success"),
    ({}, 2500, 500, False, "success"),
    ({"relay_until": 0}, 0, 500, False, "goal-image"),
    ({"relay": False}, 0, 500, False, "goal-image"),
    ({"relay": False}, 1, 500, False, "success"),
    ({"align": False}, 0, 500, True, "none"),
    ({"align": False}, 2500, 500, False, "none"),
    ({"goal_image": False}, 0, 500, True, "none"),
    ({"goal_image": False}, 1, 500, True, "success"),
    ({"stage2": False}, 1, 500, True, "goal-image"),
    ({"stage2": False}, 2500, 0, False, "none"),
    ({"stage2": False, "goal_image": False}, 1, 500, True, "none"),
    ({"stage2": False, "goal_image": False}, 2500, 500, False, "none"),
])
def test_phase_table(flags, num_positives, num_negatives, relaying, alignment):
    kept = min(num_positives, SMALL.embedding_buffer_size)  # the ring wraps, the count goes on
    positives = frames(kept, first_time=SMALL.lag)._replace(total=jnp.int32(num_positives))
    negatives = frames(0)._replace(total=jnp.int32(num_negatives))
    buffers = script.Buffers(None, positives, negatives)
    phase = script.choose_phase(buffers, replace(SMALL, **flags))
    assert phase == Phase(relaying, alignment)


@pytest.mark.parametrize(("num_positives", "stage2_after", "alignment"), [
    (2, 1, "goal-image"), (3, 1, "success"), (4, 3, "goal-image"), (5, 3, "success"),
])
def test_eq_4_waits_for_positives_with_a_predecessor(num_positives, stage2_after, alignment):
    """As in the authors' code: from the k-th step of a successful episode on; k = 2 here."""
    negatives = frames(0)._replace(total=jnp.int32(500))
    buffers = script.Buffers(None, frames(num_positives), negatives)
    args = replace(SMALL, stage2_after=stage2_after)
    assert script.choose_phase(buffers, args) == Phase(True, alignment)


def test_a_full_buffer_does_not_fall_back_behind_eq_4():
    """The positives that were enough are overwritten by an episode's early ones."""
    args = replace(SMALL, stage2_after=5)
    negatives = frames(0)._replace(total=jnp.int32(500))
    few = frames(3, first_time=SMALL.lag)
    for total, alignment in ((3, "goal-image"), (few.capacity, "success")):
        positives = few._replace(total=jnp.int32(total))
        phase = script.choose_phase(script.Buffers(None, positives, negatives), args)
        assert phase.alignment == alignment


def test_phases_are_named_after_what_happens_in_them():
    for relaying, alignment, name in [
        (True, "success", "relay"), (True, "none", "relay"), (False, "success", "aligned"),
        (False, "goal-image", "aligned"), (False, "none", "vlm"),
    ]:
        assert Phase(relaying, alignment).name == name


QUIET = replace(SMALL, relay_noise=0.0)


def test_the_mask_selects_per_environment(agent):
    state = state_with(
        furl=fixed_actor(agent, np.full(4, 1.0), np.full(4, -10.0)),
        relay=fixed_actor(agent, np.full(4, -1.0), np.full(4, -10.0)),
    )
    obs, mask, key = jnp.zeros((3, 39)), np.array([True, False, True]), jax.random.key(0)
    action = script.act(state, obs, mask, key, 0, QUIET, True)
    expected = np.tanh(np.where(mask[:, None], -1.0, 1.0)) * np.ones((3, 4))
    np.testing.assert_allclose(action, expected, atol=1e-3)
    action = script.act(state, obs, mask, key, 0, QUIET, False)
    np.testing.assert_allclose(action, np.full((3, 4), np.tanh(1.0)), atol=1e-3)


def test_only_the_relay_agents_actions_are_noisy(agent):
    """Gaussian noise of 0.2 on actions (not before tanh), clipped to the action space."""
    mean = np.array([0.0, 0.5, 3.0, -3.0])
    actor, n = fixed_actor(agent, mean, np.full(4, -10.0)), 4000
    state = state_with(actor, actor)
    obs, key = jnp.zeros((n, 39)), jax.random.key(0)
    quiet, noisy = (np.asarray(script.act(state, obs, np.full(n, use), key, 0, SMALL, True))
                    for use in (False, True))
    np.testing.assert_allclose(quiet, np.tanh(mean) * np.ones((n, 4)), atol=1e-3)
    noise = noisy - quiet
    np.testing.assert_allclose(noise[:, 0].std(), 0.2, rtol=0.05)
    np.testing.assert_allclose(noise[:, :2].mean(0), 0, atol=0.02)
    assert noisy[:, 2].max() == 1 and noisy[:, 3].min() == -1
    assert np.abs(np.corrcoef(noise.T)[0, 1:]).max() < 0.06, "each number has its own"


def test_the_two_agents_explore_with_different_noise(agent):
    actor = fixed_actor(agent, np.zeros(4), np.zeros(4))
    state, obs, key = state_with(actor, actor), jnp.zeros((3, 39)), jax.random.key(0)
    relay, furl = (np.asarray(script.act(state, obs, np.full(3, use), key, 0, QUIET, True))
                   for use in (True, False))
    assert np.abs(relay - furl).min() > 1e-4


def test_updates_per_iteration():
    assert Args().updates_per_iteration == 8
    assert replace(SMALL, num_envs=4, utd=0.5).updates_per_iteration == 2


def test_randomness_is_a_function_of_the_step(agent):
    """Another step acts with other noise, the same step with the same."""
    actor = fixed_actor(agent, np.zeros(4), np.zeros(4))
    state, obs, key = state_with(actor, actor), jnp.zeros((3, 39)), jax.random.key(0)
    first, again, other = (
        np.asarray(script.act(state, obs, np.full(3, True), key, env_steps, SMALL, True))
        for env_steps in (8, 8, 16)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).min() > 1e-4
