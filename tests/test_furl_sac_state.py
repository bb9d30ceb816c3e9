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
from common.replay import Transition
from furl_sac_state import AgentState, Args, Phase, RelaySchedule, VLMInputs

SMALL = Args(
    num_envs=3, batch_size=16, buffer_size=64, embedding_buffer_size=40, hidden_features=(16,),
    projection_features=(8, 4), lag=2, rho=0.5,
)
RAW = replace(SMALL, align=False)  # r_VLM is the cosine similarity: losses can be done by hand
EMBED_DIM = 3
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
        sparse_reward=(rng.random(n) < 0.3).astype(np.float32),
        terminated=(rng.random(n) < 0.3).astype(np.float32),
        embedding=rng.normal(size=(n, EMBED_DIM)).astype(np.float16),
    )


@pytest.fixture(scope="module")
def agent() -> AgentState:
    """Its target critic and temperature differ from what they start as."""
    agent = script.init_agent(jax.random.key(0), SMALL)
    target = jax.tree.map(lambda x: 0.7 * x + 0.05, agent.target_critic)
    params = agent.params | {"log_alpha": jnp.log(0.3)}
    return agent._replace(params=params, target_critic=target)


@pytest.fixture(scope="module")
def buffers() -> script.Buffers:
    buffers = script.init_buffers(EMBED_DIM, SMALL)
    rng = np.random.default_rng(5)

    def trajectory(length):
        time = np.arange(length, dtype=np.int32)
        images = rng.normal(size=(length, EMBED_DIM)).astype(np.float16)
        return replay.Frame(images, np.full_like(time, length), time)

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


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    """These networks are tiny: most of the time would go into XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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


def test_negatives_loss_is_eq_5():
    """The goal image is the origin: distances are norms, which do not change similarities."""
    cosine_i, norm_i = np.array([0.5, 0.5, 0.2, 0.8, 0.3]), np.array([1.0, 2.0, 1.0, 1.3, 1.0])
    cosine_j, norm_j = np.array([0.1, 0.1, 0.4, 0.2, 0.9]), np.array([2.0, 1.0, 3.0, 1.0, 1.1])
    # 0: i nearer and better by 0.4: 0.      1: j nearer, but worse by 0.4: 0.4 + 0.1.
    # 2: i nearer, worse by 0.2: 0.3.        3: j nearer, worse by 0.6: 0.7.
    # 4: the distances differ by less than the margin 0.2: no pair.
    images_i = at_angles(cosine_i) * norm_i[:, None]
    images_j = at_angles(cosine_j) * norm_j[:, None]
    expected = (0 + 0.5 + 0.3 + 0.7) / 4
    for first, second in [(images_i, images_j), (images_j, images_i)]:
        loss, metrics = script.negatives_loss({}, first, second, NO_GOAL, RAW)
        assert_close(loss, expected)
        assert_close(metrics["neg_neg_loss"], expected)
        assert_close(metrics["neg_neg_pairs"], 4 / 5)
    wide = replace(RAW, reward_margin=0.5, l2_margin=1.5)  # pair 2 alone: 0.2 + 0.5
    assert_close(script.negatives_loss({}, images_i, images_j, NO_GOAL, wide)[0], 0.7)


def test_negatives_loss_measures_from_the_goal_image():
    goal = VLMInputs(TEXT, jnp.array([0.0, 2.0, 0.0]))
    near, far = jnp.array([[0.0, 2.0, 0.0]]), jnp.array([[1.0, 0.0, 0.0]])  # rewards 0 and 1
    for images in [(near, far), (far, near)]:
        assert_close(script.negatives_loss({}, *images, goal, RAW)[0], 1.1)


def test_negatives_loss_without_a_pair():
    images = at_angles([0.5, 0.1])
    loss, metrics = script.negatives_loss({}, images, images, NO_GOAL, RAW)
    assert loss == 0 and metrics["neg_neg_pairs"] == 0


def test_positives_loss_is_eq_4():
    positives, earlier = at_angles([0.9, 0.5, 0.3]), at_angles([0.2, 0.6, 0.9])
    negatives = at_angles([0.1, 0.7, 0.25])
    # Above negatives: 0, 0.3, 0.05. Above the earlier frames: 0, 0.2, (0.7, which has no pair).
    loss, metrics = script.positives_loss(
        {}, positives, earlier, jnp.array([True, True, False]), negatives, jnp.array(True),
        NO_GOAL, RAW,
    )
    assert_close(metrics["pos_neg_loss"], 0.35 / 3)
    assert_close(metrics["pos_pos_loss"], 0.1)
    assert_close(loss, 0.35 / 3 + 0.1)


def test_positives_loss_without_negatives_or_pairs():
    images = at_angles([0.9, 0.5]), at_angles([0.95, 0.6])
    loss, metrics = script.positives_loss(
        {}, *images, jnp.array([True, True]), jnp.zeros((2, 3)), jnp.array(False), NO_GOAL, RAW
    )
    assert metrics["pos_neg_loss"] == 0
    assert_close(loss, (0.15 + 0.2) / 2)
    loss, _ = script.positives_loss(
        {}, *images, jnp.array([False, False]), jnp.zeros((2, 3)), jnp.array(False), NO_GOAL, RAW
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
    action, log_prob = script.sample_action(actor, jnp.zeros((50, 39)), jax.random.key(3), SMALL)
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
    _, log_prob = script.sample_action(actor, jnp.zeros((40_000, 39)), jax.random.key(1), SMALL)
    assert abs(np.exp(-np.asarray(log_prob, np.float64)).mean() / 16 - 1) < 0.05


def test_samples_follow_mean_and_std(agent):
    mean, log_std = np.array([0.3, -1.0, 0.0, 0.5]), np.array([-1.0, -2.0, 0.0, -0.5])
    actor = fixed_actor(agent, mean, log_std)
    action, _ = script.sample_action(actor, jnp.zeros((20_000, 39)), jax.random.key(2), SMALL)
    pre_tanh = np.arctanh(np.asarray(action, np.float64))
    np.testing.assert_allclose(pre_tanh.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(pre_tanh.std(0), np.exp(log_std), rtol=0.03)


def test_log_prob_stays_finite_far_out(agent):
    actor = fixed_actor(agent, np.full(4, 40.0), np.full(4, 9.0))  # the log std is clipped to 2
    action, log_prob = script.sample_action(actor, jnp.zeros((9, 39)), jax.random.key(1), SMALL)
    assert np.isfinite(log_prob).all() and np.abs(action).max() <= 1


def test_act_mean_is_tanh_of_the_mean(agent):
    actor = fixed_actor(agent, [0.3, -1.0, 0.0, 1.5], np.zeros(4))
    action = script.act_mean(actor, jnp.ones((2, 39)), args=SMALL)
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
    q = script.networks(SMALL)[1].apply(agent.params["critic"], batch.obs, batch.action)
    expected = critic_in_numpy(agent.params["critic"], batch.obs, batch.action)
    np.testing.assert_allclose(q, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_critic_loss_is_the_soft_bellman_error(agent):
    batch, key = random_batch(0), jax.random.key(4)
    reward = np.random.default_rng(1).normal(size=16).astype(np.float32)
    args = replace(SMALL, gamma=0.9)
    loss, metrics = script.critic_loss(agent.params["critic"], agent, batch, reward, key, args)

    action, log_prob = script.sample_action(agent.params["actor"], batch.next_obs, key, args)
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
    loss, metrics = script.actor_loss(agent.params["actor"], agent, batch, key, SMALL)
    action, log_prob = script.sample_action(agent.params["actor"], batch.obs, key, SMALL)
    q = critic_in_numpy(agent.params["critic"], batch.obs, np.asarray(action)).min(0)
    np.testing.assert_allclose(loss, (0.3 * log_prob - q).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], -np.mean(log_prob), rtol=1e-5)


@pytest.mark.parametrize(("entropy", "expected"), [(-2.0, 0.0), (1.0, 1.5), (-3.0, -0.5)])
def test_alpha_loss(entropy, expected):
    """alpha (H + |A|/2) with alpha = 0.5 and a target entropy of -2; its own gradient in log."""
    log_alpha = jnp.log(0.5)
    loss, metrics = script.alpha_loss(log_alpha, jnp.array(entropy))
    assert_close(loss, expected)
    assert_close(metrics["alpha"], 0.5)
    gradient, entropy_gradient = jax.grad(
        lambda a, h: script.alpha_loss(a, h)[0], argnums=(0, 1)
    )(log_alpha, jnp.array(entropy))
    assert_close(gradient, expected)  # too much entropy lowers the temperature, too little raises
    assert entropy_gradient == 0


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
        lambda p: script.actor_loss(p, agent, batch, actor_key, SMALL)[0]
    ))(agent.params["actor"])
    entropy = script.actor_loss(agent.params["actor"], agent, batch, actor_key, SMALL)[1]["entropy"]
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
    after, _, metrics = script.descend(
        lambda p: ((p["x"] ** 2).sum(), {"sum": p["x"].sum()}), params, opt, args
    )
    assert_close(after["x"], [2.99, -1.99])
    assert metrics["sum"] == 1


def test_initial_state():
    state = init_state(jax.random.key(0), EMBED_DIM, SMALL)
    for agent in (state.furl, state.relay):
        assert not changed(agent.params["critic"], agent.target_critic)
        assert_close(jnp.exp(agent.params["log_alpha"]), SMALL.init_temperature)
    assert changed(state.furl.params, state.relay.params), "two agents, two initialisations"


# -------------------------------------------------------------------------------- probes


def learn(args: Args, reward_of, terminated: float, num_updates: int):
    """Train, all but without entropy, on uniform actions in one state; (Q [2, n], mean action).

    Actions are drawn anew for each update: in a fixed batch the policy would find actions whose
    Q nothing corrects.
    """
    agent = script.init_agent(jax.random.key(0), args)
    agent = agent._replace(params=agent.params | {"log_alpha": jnp.array(-30.0)})
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
    q = script.networks(args)[1].apply(agent.params["critic"], obs, actions[-1])
    return np.asarray(q), np.asarray(script.act_mean(agent.params["actor"], obs[:1], args=args))[0]


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
    state, key = init_state(jax.random.key(3), EMBED_DIM, SMALL), jax.random.key(9)
    expected, collected = state, []
    next_key, scan_key = jax.random.split(key)
    for update_key in jax.random.split(scan_key, 3):
        expected, metrics = update_once(expected, buffers, VLM, update_key, SMALL, phase)
        collected.append(metrics)
    assert changed(state, expected)
    actual, after, means = script.update(state, buffers, VLM, key, SMALL, phase)  # donates `state`
    assert after == next_key
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-6)
    jax.tree.map(close, actual, expected)
    for name, mean in means.items():
        close(mean, np.mean([metrics[name] for metrics in collected]))


@pytest.mark.parametrize("phase", PHASES)
def test_what_an_update_changes(buffers, phase):
    before = init_state(jax.random.key(3), EMBED_DIM, SMALL)
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
    """So --no-goal-image and --no-stage1 change nothing but the phase before the first success."""
    state = script.init_state(jax.random.key(0), EMBED_DIM, SMALL)
    other = VLM._replace(goal=-VLM.goal + 0.3)
    phase = Phase(True, alignment)
    first, second = (
        update_once(state, buffers, vlm, jax.random.key(1), args=SMALL, phase=phase)[0]
        for vlm in (VLM, other)
    )
    assert changed(first, second) == (alignment == "goal-image")
    for flag in ("goal_image", "stage1", "align"):
        assert not replace(SMALL, **{flag: False}).uses_goal_image


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
    before = init_state(jax.random.key(3), EMBED_DIM, SMALL)
    after, metrics = update_once(before, buffers, VLM, key, args, Phase(True, "none"))

    sample_key, furl_key, relay_key, _ = jax.random.split(key, 4)
    slots = replay.sample_slots(buffers.transitions, sample_key, args.batch_size)
    batch = replay.take(buffers.transitions, slots)
    fuzzy = script.vlm_reward(before.projection, batch.embedding.astype(jnp.float32), VLM, args)
    task = np.asarray(batch.sparse_reward) - 1
    assert set(task.tolist()) == {-1.0, 0.0}
    update_agent = jax.jit(script.update_agent, static_argnames="args")
    furl, _ = update_agent(before.furl, batch, task + 0.5 * fuzzy, furl_key, args)
    relay, _ = update_agent(before.relay, batch, task, relay_key, args)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, after.furl, furl)
    jax.tree.map(close, after.relay, relay)
    close(metrics["reward/vlm_mean"], fuzzy.mean())
    close(metrics["reward/sparse_mean"], task.mean() + 1)


@pytest.mark.parametrize("alignment", ["success", "goal-image"])
def test_alignment_ranks_the_frames(buffers, alignment):
    """Repeated steps of Eq. 4, or of Eq. 5, lower its loss; Eq. 4 lifts successes over failures."""
    args = replace(SMALL, learning_rate=3e-3)
    frames = buffers.positives.data
    away = frames._replace(embedding=frames.embedding + jnp.float16([3, 0, 0]))  # can be told apart
    buffers = buffers._replace(positives=buffers.positives._replace(data=away))
    state = init_state(jax.random.key(3), EMBED_DIM, SMALL)

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
        assert positive.min() > negative.mean() + args.reward_margin


# --------------------------------------------------------------------------------- relay


def test_relay_schedule_table():
    schedule = RelaySchedule(np.array([50, 50, 200]), np.array([True, False, True]))
    for time, expected in [
        (0, [True, False, True]),
        (49, [True, False, True]),
        (50, [False, True, True]),
        (99, [False, True, True]),
        (100, [True, False, True]),
        (199, [False, True, True]),
        (200, [True, False, False]),
        (399, [False, True, False]),
        (400, [True, False, True]),
    ]:
        np.testing.assert_array_equal(script.relay_acts(schedule, np.full(3, time)), expected)


def test_environments_keep_their_own_time():
    schedule = RelaySchedule(np.array([50, 50]), np.array([True, True]))
    acts = script.relay_acts(schedule, np.array([10, 60]))
    np.testing.assert_array_equal(acts, [True, False])


def test_each_environment_draws_its_own_schedule():
    schedule = script.draw_schedule(np.random.default_rng(0), 4000, SMALL)
    values, counts = np.unique(schedule.period, return_counts=True)
    np.testing.assert_array_equal(values, SMALL.relay_periods)
    assert np.abs(counts / 4000 - 0.25).max() < 0.04
    assert abs(schedule.relay_first.mean() - 0.5) < 0.04
    again = script.draw_schedule(np.random.default_rng(0), 4000, SMALL)
    np.testing.assert_array_equal(schedule.period, again.period)


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
    ({"stage1": False}, 0, 500, True, "none"),
    ({"stage1": False}, 1, 500, True, "success"),
    ({"stage2": False}, 1, 500, True, "goal-image"),
    ({"stage2": False}, 2500, 0, False, "none"),
    ({"stage2": False, "stage1": False}, 2500, 500, False, "none"),
    ({"stage2": False, "goal_image": False}, 2500, 500, False, "none"),
])
def test_phase_table(flags, num_positives, num_negatives, relaying, alignment):
    phase = script.choose_phase(num_positives, num_negatives, replace(SMALL, **flags))
    assert phase == Phase(relaying, alignment)


def test_the_mask_selects_per_environment(agent):
    furl = fixed_actor(agent, np.full(4, 1.0), np.full(4, -10.0))
    relay = fixed_actor(agent, np.full(4, -1.0), np.full(4, -10.0))
    obs, mask = jnp.zeros((3, 39)), np.array([True, False, True])
    action, _ = script.act(furl, relay, obs, mask, jax.random.key(0), SMALL, True)
    expected = np.tanh(np.where(mask[:, None], -1.0, 1.0)) * np.ones((3, 4))
    np.testing.assert_allclose(action, expected, atol=1e-3)
    action, _ = script.act(furl, relay, obs, mask, jax.random.key(0), SMALL, False)
    np.testing.assert_allclose(action, np.full((3, 4), np.tanh(1.0)), atol=1e-3)


def test_the_two_agents_explore_with_different_noise(agent):
    actor = fixed_actor(agent, np.zeros(4), np.zeros(4))
    obs, key = jnp.zeros((3, 39)), jax.random.key(0)
    actions = [
        script.act(actor, actor, obs, np.full(3, use), key, SMALL, True)[0]
        for use in (True, False)
    ]
    assert np.abs(np.asarray(actions[0]) - actions[1]).min() > 1e-4


def test_updates_per_iteration():
    assert Args().updates_per_iteration == 8
    assert replace(SMALL, num_envs=4, utd=0.5).updates_per_iteration == 2


def test_no_two_iterations_share_their_randomness(agent):
    actor = fixed_actor(agent, np.zeros(4), np.zeros(4))
    obs, keys, actions = jnp.zeros((3, 39)), [jax.random.key(0)], []
    for _ in range(2):
        action, key = script.act(actor, actor, obs, np.full(3, True), keys[-1], SMALL, True)
        keys, actions = [*keys, key], [*actions, np.asarray(action)]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 3
    assert np.abs(actions[0] - actions[1]).min() > 1e-4
