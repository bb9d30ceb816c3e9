"""What FuRL plus adds to FuRL: returns, targets and noise against numbers worked out by hand."""

import csv
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import furl_plus_state as script
from common import checkpoint, replay
from common.envs import metaworld_suite as metaworld
from common.errors import UserError
from common.replay import Sizes, Transition
from furl_plus_state import Args, Batch, Phase, VLMInputs

SMALL = Args(
    num_envs=2, batch_size=4, buffer_size=40, embedding_buffer_size=20, hidden_features=(16,),
    projection_features=(8, 4), lag=2, n_step=3, gamma=0.5, success_share=0.0, init_q=0.0,
    layer_norm=False, relay_bonus=0.0,
)
RAW = replace(SMALL, align=False)  # phi is the cosine similarity: targets can be done by hand
SIZES = Sizes(39, 4, 2)
TEXT = VLMInputs(jnp.array([1.0, 0.0]), jnp.zeros(2))
SEARCH, AFTER = Phase(True, True, "none"), Phase(False, False, "none")
assert_close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)  # embeddings: float16


# ---------------------------------------------------------------- n-step returns and targets


@pytest.mark.parametrize(("bonus", "changes", "low", "high"), [
    # The sum of 0.99^k is 100: rewards of -1, and 0.05 r_VLM with r_VLM from -1 to 1; kappa 5.
    (0, {}, -110, 0), (0.05, {}, -110, 5), (0, {"kappa": 0.0}, -105, 0),
    (0.2, {"rho": 0.2}, -125, 20), (0.05, {"gamma": 0.9}, -15.5, 0.5),
    (0.05, {"clip_targets": False}, -np.inf, np.inf), (1.0, {}, -110, 100),
])
def test_bounds_follow_from_the_flags(bonus, changes, low, high):
    assert_close(script.value_bounds(bonus, replace(Args(), **changes)), (low, high))


def test_displacement():
    """Of the object alone, numbers 4 to 6: 0.3 m and 0.1 m."""
    obs, first = np.zeros((2, 3, 39)), np.zeros((3, 39))
    obs[:, :, 0], obs[0, :, 4], obs[1, :, 6], first[2] = 9, 0.3, -0.1, 1
    obs[:, 2] += 1
    assert_close(script.displacement(obs, first), [[0.75] * 3, [0.5] * 3])


def test_the_relay_agent_is_drawn_to_moving_things():
    """Observations are the numbers of rows: the object is 2 m sqrt(3) further in every step, from
    where it is after the first one."""
    _, without, _ = batches()
    furl, relay, metrics = batches(replace(RAW, relay_bonus=2.0))
    where = (np.array([[0, 1, 2], [1, 2, 3], [3, 4, np.nan], [4, np.nan, np.nan]]) * 2)
    moved = where * np.sqrt(3) / (where * np.sqrt(3) + 0.1)
    bonus = np.nansum(moved * [1, 0.5, 0.25], 1)
    assert_close(relay.reward - without.reward, 2 * bonus)
    assert_close(furl.reward, batches()[0].reward)
    assert (relay.bounds[1], without.bounds[1]) == pytest.approx((4, 0))
    assert_close(metrics["reward/displacement"], moved[:, 0].mean())


@pytest.mark.parametrize("goal", ["fixed", "random"])
def test_a_hand_that_does_nothing_gets_no_bonus(goal):
    """On window-close an episode's first observation has the window where it is not."""
    env = metaworld.make_env("window-close-v3", seed=0, index=0, goal=goal, show_goal=False)
    first, _ = env.reset()
    early, later = (env.step(np.zeros(4))[0] for _ in range(2))
    assert script.displacement(later, early) == 0
    assert script.displacement(later, first) > 0.5


def at_angles(cosines) -> np.ndarray:
    """Unit embeddings whose similarity to the text is `cosines`."""
    cosines = np.asarray(cosines, np.float32)
    return np.stack([cosines, np.sqrt(1 - cosines**2)], -1)


def buffers_with(rewards, phi, first_phi=0.5, terminated=None) -> script.Buffers:
    """One episode of two environments, begun: rewards and potentials [steps, 2]; obs encode the
    row, next_obs the row and a half."""
    buffers = script.init_buffers(SIZES, RAW)
    num = len(rewards)
    row = np.arange(2 * num, dtype=np.float32)[:, None] * np.ones((1, 39), np.float32)
    terminated = np.zeros((num, 2)) if terminated is None else terminated
    rows = Transition(row, row[:, :4], row + 0.5, rewards.reshape(-1), terminated.reshape(-1),
                      at_angles(phi.reshape(-1)))
    starts = replay.add_rows(buffers.starts, at_angles([first_phi, -first_phi]))
    return buffers._replace(transitions=replay.add_rows(buffers.transitions, rows), starts=starts)


PHI = np.array([[0.1, 0.0], [0.2, 0.0], [0.4, 0.0], [0.6, 0.0], [0.8, 0.0]])
REWARDS = np.array([[0, 0], [0, 0], [1, 0], [0, 0], [1, 0]], np.float32)


def batches(args=RAW, phase=AFTER, slots=(0, 2, 6, 8), **changes):
    buffers = buffers_with(REWARDS, PHI, **changes)
    return script.make_batches({}, buffers, jnp.array(slots), TEXT, args, phase)


def test_n_steps_are_summed_up_to_the_newest_one():
    """Environment 0, steps 0, 1, 3 and 4 of 5: three, three, two and one are there."""
    _, relay, _ = batches()
    assert_close(relay.reward, [-1 - 0.5 + 0, -1 + 0 - 0.25, -1 + 0, 0])
    assert_close(relay.discount, [0.125, 0.125, 0.25, 0.5])
    assert_close(relay.obs[:, 0], [0, 2, 6, 8])
    assert_close(relay.next_obs[:, 0], [4.5, 6.5, 8.5, 8.5])
    assert_close(relay.action[:, 0], [0, 2, 6, 8])


def test_nothing_follows_a_termination():
    terminated = np.zeros((5, 2))
    terminated[1, 0] = 1
    _, relay, _ = batches(terminated=terminated)
    assert_close(relay.reward[:2], [-1 - 0.5, -1])
    assert_close(relay.discount[:2], [0, 0])


def test_the_vlm_reward_is_a_potential():
    """kappa (gamma^m phi(s_m) - phi(s_0)); an episode's first phi is that of its first picture."""
    furl, relay, metrics = batches(replace(RAW, kappa=2.0))
    first, last, discount = ([0.5, 0.1, 0.4, 0.6], [0.4, 0.6, 0.8, 0.8], relay.discount)
    assert_close(furl.reward - relay.reward, 2 * (discount * np.array(last) - np.array(first)))
    assert_close(metrics["reward/vlm_mean"], np.mean(last))
    furl, relay, _ = batches(replace(RAW, kappa=2.0), slots=(1,) * 4)  # it begins at -0.5
    assert_close(furl.reward - relay.reward, 2 * (0 + 0.5))


def test_a_potential_changes_no_return():
    """Over a whole episode its sum is gamma^n phi(s_n) - phi(s_0), whatever happens between."""
    args = replace(RAW, kappa=3.0, n_step=1)
    furl, relay, _ = batches(args, slots=(0, 2, 4, 6))
    gains = (furl.reward - relay.reward) * 0.5 ** np.arange(4)
    assert_close(gains.sum(), 3 * (0.5**4 * 0.6 - 0.5))


def test_first_pictures_are_found_when_their_ring_has_wrapped():
    """Two environments, the fifth episodes: their pictures are rows 8 and 9 of a ring of eight."""
    buffers, length = script.init_buffers(SIZES, replace(RAW, buffer_size=2100)), 500
    for episode in range(5):
        phi = 0.1 * episode + np.array([0, 0.05])
        buffers = buffers._replace(starts=replay.add_rows(buffers.starts, at_angles(phi)))
        zeros = np.zeros(2 * (length if episode < 4 else 3), np.float32)
        rows = Transition(*(np.zeros((len(zeros), n), np.float32) for n in (39, 4, 39)), zeros,
                          zeros, at_angles(zeros))
        buffers = buffers._replace(transitions=replay.add_rows(buffers.transitions, rows))
    assert buffers.starts.capacity == 8
    slots = jnp.array([4 * 2 * length, 4 * 2 * length + 1]) % 2100
    furl, relay, _ = script.make_batches({}, buffers, slots, TEXT, replace(RAW, kappa=2.0), AFTER)
    assert_close(furl.reward - relay.reward, [2 * -0.4, 2 * -0.45])


def test_rho_guides_during_the_search_only():
    args = replace(RAW, rho=0.2)
    without, _, _ = batches(replace(args, rho=0.0), SEARCH)
    during, _, _ = batches(args, SEARCH)
    ends = np.array([0.9, 0.7, 1.2, 1.4]) / 2  # mean of phi at both ends
    assert_close(during.reward - without.reward, 0.2 * ends * [1.75, 1.75, 1.5, 1])
    after, _, _ = batches(args, AFTER)
    assert_close(after.reward, without.reward)
    always, _, _ = batches(replace(args, rho_always=True), AFTER)
    assert_close(always.reward, during.reward)


def test_bounds_move_with_the_state():
    """target + kappa phi(s_0) is the task's value: 0 at most, 2 rho more while guided."""
    args = replace(RAW, kappa=2.0, rho=0.1)
    first = np.array([0.5, 0.1, 0.4, 0.6])
    furl, relay, _ = batches(args, AFTER)
    assert_close(furl.bounds, (-2 * 1.1 - 2 - 2 * first, -2 * first))
    assert relay.bounds == pytest.approx((-4.2, 0))
    furl, _, _ = batches(args, SEARCH)
    assert_close(furl.bounds[1], 0.2 - 2 * first)


@pytest.mark.parametrize(("entropy", "during", "after"), [
    ("never", 0, 0), ("search", 1, 0), ("always", 1, 1),
])
def test_when_targets_count_the_entropy(entropy, during, after):
    args = replace(RAW, entropy=entropy)
    both = [batches(args, phase)[:2] for phase in (SEARCH, AFTER)]
    assert [batch.entropy_weight for two in both for batch in two] == [during] * 2 + [after] * 2


def test_critic_loss_is_clipped_and_discounted():
    agent = script.init_agent(jax.random.key(0), SIZES, SMALL)
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(4, 39)), rng.uniform(-1, 1, (4, 4))
    reward, discount = np.array([-1.0, -2.0, 30.0, -30.0]), np.array([0.5, 0.25, 0.5, 0.0])
    bounds = np.array([-9.0, -8, -7, -6]), np.array([3.0, 2, 1, 0])
    key = jax.random.key(1)
    next_action, log_prob = script.sample_action(agent.actor, agent.params["actor"], obs, key)
    next_q = agent.critic.apply(agent.target_critic, obs, next_action).min(0)
    q = agent.critic.apply(agent.params["critic"], obs, action)
    for entropy in (0.0, 1.0):
        batch = Batch(obs, action, obs, reward, discount, bounds, entropy)
        loss, metrics = script.critic_loss(agent.params["critic"], agent, batch, key)
        value = next_q - entropy * SMALL.init_temperature * log_prob
        target = np.clip(reward + discount * value, *bounds)
        assert target[2] == 1 and target[3] == -6
        assert_close(loss, ((q - target) ** 2).mean(1).sum())
        assert_close(metrics["q_max"], q.max())


def random_agent_and_batch() -> tuple[script.AgentState, Batch]:
    agent = script.init_agent(jax.random.key(0), SIZES, SMALL)
    agent = agent.replace(params=agent.params | {"log_alpha": jnp.log(0.3)})
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(4, 39)), rng.uniform(-1, 1, (4, 4))
    return agent, Batch(obs, action, obs + 1, rng.normal(size=4), np.full(4, 0.5), (-9.0, 9.0), 1.0)


def test_actor_loss():
    """It rises with the log-probability and falls with the smaller Q."""
    (agent, batch), key = random_agent_and_batch(), jax.random.key(4)
    loss, metrics = script.actor_loss(agent.params["actor"], agent, batch, key)
    action, log_prob = script.sample_action(agent.actor, agent.params["actor"], batch.obs, key)
    q = agent.critic.apply(agent.params["critic"], batch.obs, action).min(0)
    assert_close(loss, (0.3 * log_prob - q).mean())
    assert_close(metrics["entropy"], -log_prob.mean())


def test_each_loss_moves_its_own_parameters():
    """The gradient of the sum is, part by part, the gradient of that part's loss alone."""
    (agent, batch), key = random_agent_and_batch(), jax.random.key(7)
    together = jax.grad(lambda p: script.sac_loss(p, agent, batch, key)[0])(agent.params)
    critic_key, actor_key = jax.random.split(key)
    critic = jax.grad(script.critic_loss, has_aux=True)(
        agent.params["critic"], agent, batch, critic_key)[0]
    actor, metrics = jax.grad(script.actor_loss, has_aux=True)(
        agent.params["actor"], agent, batch, actor_key)
    jax.tree.map(assert_close, together["critic"], critic)
    jax.tree.map(assert_close, together["actor"], actor)
    assert_close(together["log_alpha"], 0.3 * (metrics["entropy"] + 2))  # 2: |A| / 2
    for part in together.values():
        assert any(np.abs(x).max() > 0.01 for x in jax.tree.leaves(part))


def test_each_agent_learns_from_its_own_batch():
    """Half of it from the one positive, step 4 of environment 0, the other half from any step."""
    args, key = replace(RAW, kappa=2.0, relay_bonus=1.0, success_share=0.5), jax.random.key(9)
    buffers, before = buffers_with(REWARDS, PHI), script.init_state(jax.random.key(3), SIZES, args)
    success = replay.EmbeddedFrame(at_angles([0.8]), np.array([4]), np.array([True]), np.array([8]))
    buffers = buffers._replace(positives=replay.add_rows(buffers.positives, success))
    after, _ = script.update_once(before, buffers, TEXT, key, args, SEARCH)

    sample_key, furl_key, relay_key, _ = jax.random.split(key, 4)
    slots = replay.sample_with_successes(
        buffers.transitions, buffers.positives, sample_key, args.batch_size, 0.5)
    assert slots[:2].tolist() == [8, 8] and slots[2:].tolist() != [8, 8]
    furl, relay, _ = script.make_batches({}, buffers, slots, TEXT, args, SEARCH)
    assert np.abs(furl.reward - relay.reward).max() > 0.1
    for agent, batch, agent_key, learned in ((before.furl, furl, furl_key, after.furl),
                                             (before.relay, relay, relay_key, after.relay)):
        expected, _ = script.update_agent(agent, batch, agent_key, args)
        # Adam's first step is about the gradient's sign: moments tell one batch from another.
        jax.tree.map(assert_close, learned.opt, expected.opt)
        jax.tree.map(assert_close, learned.params, expected.params)
        assert max(np.abs(x).max() for x in jax.tree.leaves(expected.opt[0].mu)) > 0.1


def test_the_evaluated_actor_is_an_average_over_updates():
    args = replace(RAW, actor_tau=0.25)
    state, buffers = script.init_state(jax.random.key(0), SIZES, args), buffers_with(REWARDS, PHI)
    before = state.furl.params["actor"]
    obs = np.ones((3, 39), np.float32)
    assert_close(script.policy(state, obs), np.tanh(state.furl.actor.apply(before, obs)[0]))
    state, _ = script.update_once(state, buffers, TEXT, jax.random.key(1), args, AFTER)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, before, state.furl.params["actor"])
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), state.mean_actor, expected)
    assert_close(script.policy(state, obs), np.tanh(state.furl.actor.apply(expected, obs)[0]))


# ----------------------------------------------------------------------------- exploration


HOLD = replace(SMALL, num_envs=5, hold_steps=(1, 2, 4), quiet_envs=1)  # 1, 2, 4, 1, 2


def test_noise_is_held_by_environment():
    noise = np.stack([
        script.held_noise(jax.random.normal, jax.random.key(0), 5 * i, HOLD) for i in range(8)
    ])
    for env, hold in enumerate((1, 2, 4, 1, 2)):
        stretches = noise[:, env].reshape(8 // hold, hold, 4)
        np.testing.assert_array_equal(stretches, stretches[:, :1] * np.ones((1, hold, 1)))
        assert len(np.unique(stretches[:, 0, 0])) == 8 // hold
    assert len(np.unique(noise[0])) == 20, "each number has its own"


def test_random_actions_are_uniform_and_held():
    many = replace(HOLD, num_envs=3000)
    first, second = (script.held_noise(jax.random.uniform, jax.random.key(0), 3000 * i, many)
                     for i in (0, 1))
    assert_close(np.quantile(first, [0, 0.25, 0.5, 0.75, 1]), [0, 0.25, 0.5, 0.75, 1], atol=0.015)
    same = (np.asarray(first) == np.asarray(second)).all(1)
    np.testing.assert_array_equal(same, np.arange(3000) % 3 > 0)


def test_quiet_environments_act_as_the_evaluated_policy():
    state = jax.jit(script.init_state, static_argnums=(1, 2))(jax.random.key(0), SIZES, HOLD)
    obs = np.random.default_rng(0).normal(size=(5, 39)).astype(np.float32)
    relays = np.zeros(5, bool)
    action = script.act(state, obs, relays, jax.random.key(1), 0, HOLD, False)
    different = np.abs(np.asarray(action - script.policy(state, obs))).max(1) > 1e-3
    np.testing.assert_array_equal(different, [False, True, True, True, True])
    relayed = script.act(state, obs, ~relays, jax.random.key(1), 0, HOLD, True)
    mean, _ = state.relay.actor.apply(state.relay.params["actor"], obs)
    assert (np.abs(relayed - np.tanh(mean)).max(1) > 1e-3).all(), "the relay agent is never quiet"
    assert np.abs(relayed).max() <= 1


def test_the_relay_agent_gets_noise_on_its_actions():
    """Of a standard deviation of 0.2, where its own is next to nothing."""
    many = replace(HOLD, num_envs=4000, relay_noise=0.2)
    state = jax.jit(script.init_state, static_argnums=(1, 2))(jax.random.key(0), SIZES, many)
    certain = jax.tree.map(jnp.zeros_like, state.relay.params["actor"])
    certain["params"]["MLP_0"]["Dense_1"]["bias"] = jnp.array([0.0] * 4 + [-10.0] * 4)
    state = state._replace(relay=state.relay.replace(params={"actor": certain}))
    action = script.act(state, jnp.zeros((4000, 39)), np.ones(4000, bool), jax.random.key(1), 0,
                        many, True)
    assert_close(np.std(action, 0), np.full(4, 0.2), atol=0.01)
    assert_close(np.mean(action, 0), np.zeros(4), atol=0.02)


@pytest.mark.parametrize("goal", ["fixed", "random-hidden"])
def test_demonstrations_succeed_whatever_the_policy_sees(goal):
    experts = metaworld.Experts("push-v3", 2, seed=3, goal=goal)  # it looks at the goal
    envs = metaworld.VecMetaWorld("push-v3", 3, seed=3, goal=goal, num_workers=1)
    obs, _ = envs.reset()
    assert not obs[:, metaworld.GOAL].any()
    succeeded = np.zeros(3, bool)
    for time in range(200):
        action = np.zeros((3, 4), np.float32)
        action[:2] = experts(obs, time)
        step = envs.step(action)
        obs, succeeded = step.obs, succeeded | step.success
    envs.close()
    assert succeeded.tolist() == [True, True, False]


# ------------------------------------------------------------------------------- the script


@pytest.mark.parametrize(("changes", "num_positives", "num_negatives", "phase"), [
    ({}, 0, 0, Phase(True, True, "none")),
    ({}, 0, 9, Phase(True, True, "goal-image")),
    ({}, 6, 9, Phase(True, True, "goal-image")),  # four of them after k = 2 steps
    ({}, 7, 9, Phase(True, True, "success")),
    ({}, 2499, 9, Phase(True, True, "success")),
    ({}, 2500, 9, Phase(False, False, "success")),
    ({"relay": False}, 0, 9, Phase(True, False, "goal-image")),
    ({"relay": False}, 2500, 9, Phase(False, False, "success")),
    ({"align": False}, 7, 9, Phase(True, True, "none")),
    ({"goal_image": False}, 6, 9, Phase(True, True, "none")),
    ({"goal_image": False}, 7, 9, Phase(True, True, "success")),
    ({"stage2": False}, 2500, 9, Phase(False, False, "goal-image")),
    ({"stage2": False, "goal_image": False}, 7, 9, Phase(True, True, "none")),
])
def test_phase_table(changes, num_positives, num_negatives, phase):
    """Five positives after k steps are enough for Eq. 4 here."""
    buffers, args = script.init_buffers(SIZES, SMALL), replace(SMALL, stage2_after=5, **changes)
    kept = min(num_positives, SMALL.embedding_buffer_size)
    time = np.arange(kept, dtype=np.int32)
    rows = replay.EmbeddedFrame(np.zeros((kept, 2)), time, np.full(kept, True), time)
    positives = replay.add_rows(buffers.positives, rows) if kept else buffers.positives
    positives = positives._replace(total=jnp.int32(num_positives))
    negatives = buffers.negatives._replace(total=jnp.int32(num_negatives))
    buffers = buffers._replace(positives=positives, negatives=negatives)
    assert script.choose_phase(buffers, args) == phase


@pytest.mark.parametrize(("changes", "message"), [
    ({"demos": 9}, "--demos must be at most 8, --num-envs, not 9"),
    ({"num_envs": 2}, "--quiet-envs must be at most 1, below --num-envs, not 2"),
    ({"n_step": 501}, "--n-step must be at most 500, the steps of an episode, not 501"),
    ({"gamma": 1.0}, "--gamma must be below 1"),
])
def test_flags_that_cannot_work(changes, message):
    with pytest.raises(UserError, match=message):
        script.check_flags(replace(Args(), **changes))


TINY = Args(
    env_id="drawer-close-v3", num_envs=2, total_timesteps=2400, learning_starts=1000, batch_size=8,
    utd=0.5, hidden_features=(16,), projection_features=(16, 8), buffer_size=1500,
    embedding_buffer_size=600, eval_every=600, log_every=200, checkpoint_every=700, demos=1,
    stage2_after=100, quiet_envs=1,
)


def metrics_of(folder: Path, left_out: str) -> dict[str, list[tuple[str, str]]]:
    """Of each metric (env_steps, value) in the file's order, but for the steps `left_out`.

    Beside other metrics an evaluation's rows may move: it ends sooner before a checkpoint.
    """
    found = defaultdict(list)
    with open(folder / "metrics.csv", newline="") as file:
        for env_steps, key, value in csv.reader(file):
            if not key.startswith("time/") and env_steps != left_out:
                found[key].append((env_steps, value))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a whole run, and the rings of its last checkpoint."""
    folder, saved = tmp_path_factory.mktemp("whole") / "run", []
    save = checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *a: saved.append(
            jax.tree.map(np.asarray, a[3])) or save(*a))
        script.main(replace(TINY, run_dir=str(folder)))
    return folder, saved[-1]


def test_a_run_is_resumed_to_the_last_digit(whole, tmp_path):
    """The replay wraps, episodes end, an evaluation is under way when the run is stopped."""
    half = tmp_path / "half"
    script.main(replace(TINY, run_dir=str(half), total_timesteps=1300))
    script.main(replace(TINY, resume=str(half)))
    metrics = metrics_of(whole[0], "1300")
    assert metrics_of(half, "1300") == metrics
    steps = [env_steps for env_steps, _ in metrics["eval/success_at_end"]]
    assert steps == ["600", "1200", "1800", "2400"]
    assert metrics.pop("key") == [("env_steps", "value")] and "losses/q_max" in metrics
    for rows in metrics.values():
        steps = [int(env_steps) for env_steps, _ in rows]
        assert steps == sorted(steps), "in order"


def test_the_expert_plays_the_first_episode_of_its_environments(whole):
    """Of the first of two; what the replay still has of that episode are times 450 to 499."""
    rows = replay.read_rows(whole[1]["transitions"], 900, 2400)
    obs, action = (x.reshape(750, 2, -1) for x in (rows.obs, rows.action))
    experts = metaworld.Experts(TINY.env_id, 1, seed=TINY.seed, goal=TINY.goal)
    expected = np.stack([experts(obs[i], (450 + i) % 500)[0] for i in range(750)])
    by_expert = np.isclose(action, expected[:, None], atol=1e-5).all(-1)
    assert by_expert[:50, 0].all() and not by_expert[:, 1].any() and not by_expert[50:].any()
    same_place = np.stack([experts(obs[0], time)[0] for time in range(200)])
    assert_close(same_place.std(0).max(), 0.1, atol=0.02)


def test_each_episodes_first_picture_is_kept(whole):
    """It looks like what follows, not like the end of the episode before."""
    rows = replay.read_rows(whole[1]["transitions"], 900, 2400).embedding.reshape(750, 2, -1)
    starts = whole[1]["starts"]
    assert starts.total == 6  # three episodes have begun
    for episode, first in ((1, 50), (2, 550)):
        for env in range(2):
            start = starts.data[2 * episode + env]
            last, followed = (np.abs(rows[i, env].astype(np.float32) - start).max()
                              for i in (first - 1, first))
            assert followed < 0.2 * last
