"""FuRL on pixels: stacking, augmentation, who trains the encoder, and runs end to end."""

import csv
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drq_baseline
import furl_drq_pixels
import furl_drq_pixels as script
from common import convolution, pixels, replay
from common.cli import run_script
from common.envs.workers import Step
from common.replay import Sizes, Transition
from furl_drq_pixels import Args

SMALL = Args(
    num_envs=3, action_repeat=100, batch_size=64, buffer_size=60, embedding_buffer_size=40,
    hidden_features=(16,), encoder_features=(2, 2, 2, 2), encoder_dim=5,
    projection_features=(8, 4),
)
SIZES = Sizes(39, 4, 1)
LENGTH = 5  # actions per episode
assert SMALL.layout.episode_length == LENGTH


# ------------------------------------------------------------------------------ stacking


def write_blocks(num_blocks: int):
    """A ring whose every field tells episode, time and environment of its row."""
    buffers = script.init_buffers(SIZES, SMALL)
    envs = np.arange(SMALL.num_envs)
    for block in range(num_blocks):
        episode, time = divmod(block, LENGTH + 1)
        picture = np.zeros((SMALL.num_envs, 84, 84, 3), np.uint8)
        picture[...] = np.stack([envs * 0 + time, envs, envs * 0 + episode], -1)[:, None, None]
        number = (100 * episode + 10 * time + envs).astype(np.float32)
        if time == 0:
            buffers = buffers._replace(steps=pixels.add_first(buffers.steps, picture))
        else:
            rows = pixels.PixelStep(picture, np.stack([number] * 4, 1), number, number,
                             number[:, None].astype(np.float16))
            buffers = buffers._replace(steps=replay.add_rows(buffers.steps, rows))
    return buffers.steps


sample = jax.jit(script.sample_batch, static_argnames="args")


@pytest.mark.parametrize("num_blocks", [2, 6, 9, 19, 20, 21, 27, 33])
def test_samples_are_whole_stacks_of_one_episode(num_blocks):
    """The ring holds 20 blocks: from 21 on it has wrapped, not at an episode's end."""
    ring, seen = write_blocks(num_blocks), set()
    for seed in range(12):
        batch = sample(ring, jax.random.key(seed), SMALL)
        assert batch.obs.shape == batch.next_obs.shape == (64, 84, 84, 9)
        assert (batch.obs == batch.obs[:, :1, :1]).all()  # shifting one colour changes nothing
        obs, next_obs = (np.asarray(x[:, 0, 0]).reshape(-1, 3, 3).astype(int)
                         for x in (batch.obs, batch.next_obs))
        for i in range(64):
            time, env, episode = next_obs[i, -1]
            assert 1 <= time <= LENGTH
            number = 100 * episode + 10 * time + env
            assert batch.reward[i] == batch.terminated[i] == batch.action[i, 0] == number
            assert batch.embedding[i, 0] == number
            expected = [[max(0, time - back), env, episode] for back in (3, 2, 1)]
            np.testing.assert_array_equal(obs[i], expected)
            np.testing.assert_array_equal(next_obs[i], [*expected[1:], [time, env, episode]])
            seen.add((episode, time, env))
    oldest = max(0, num_blocks - 20 + SMALL.frame_stack)
    allowed = {(block // (LENGTH + 1), block % (LENGTH + 1), env)
               for block in range(oldest, num_blocks) if block % (LENGTH + 1)
               for env in range(SMALL.num_envs)}
    assert seen == allowed


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 6, 7, 20, 21, 33])
def test_the_policy_sees_the_newest_pictures_of_the_running_episode(num_blocks):
    """What a run acts on at first, also when it goes on from a checkpoint."""
    obs = np.asarray(pixels.newest_stack(write_blocks(num_blocks), SMALL.layout))
    assert obs.shape == (SMALL.num_envs, 84, 84, 9) and (obs == obs[:, :1, :1]).all()
    episode, time = divmod(num_blocks - 1, LENGTH + 1)
    for env in range(SMALL.num_envs):
        expected = [[max(0, time - back), env, episode] for back in (2, 1, 0)]
        np.testing.assert_array_equal(obs[env, 0, 0].reshape(3, 3), expected)


def test_the_policy_sees_what_the_replay_keeps():
    """Two episodes of five steps: a picture's shade is 10 episode + time."""
    def shade(number: int) -> np.ndarray:
        return np.full((3, 84, 84, 3), number, np.uint8)

    ring = script.init_buffers(SIZES, SMALL).steps
    ring = pixels.add_first(ring, shade(0))
    obs, seen = np.asarray(pixels.newest_stack(ring, SMALL.layout)), []
    zeros = np.zeros(3, np.float32)
    for episode, time in [(e, t) for e in (0, 1) for t in range(1, LENGTH + 1)]:
        ended = np.full(3, time == LENGTH)
        step = Step(None, None, shade(10 * episode + time), shade(10 * episode + 10), ended, zeros,
                    zeros, ended)
        obs, picture, first = pixels.observe(obs, step, 3)
        rows = pixels.PixelStep(picture, np.zeros((3, 4)), zeros, zeros, np.zeros((3, 1)))
        ring = pixels.add_step(ring, rows, first)
        np.testing.assert_array_equal(obs, pixels.newest_stack(ring, SMALL.layout))
        seen.append(obs[0, 0, 0, ::3].tolist())
    assert seen[:6] == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [10, 10, 10], [10, 10, 11]]
    assert seen[-1] == [20, 20, 20]


def test_scaling_down():
    frames = np.zeros((2, 168, 168, 3), np.uint8)
    frames[0, :, 84:] = 200
    frames[1] = np.array([10, 20, 30])
    small = pixels.scale_down(frames)
    assert small.shape == (2, 84, 84, 3) and small.dtype == jnp.uint8
    assert (small[0, :, :41] == 0).all() and (small[0, :, 43:] == 200).all()
    assert (small[1] == np.array([10, 20, 30])).all()
    same = np.random.default_rng(0).integers(0, 256, (2, 84, 84, 9), np.uint8)
    np.testing.assert_array_equal(pixels.scale_down(same), same)


# -------------------------------------------------------------------------- convolutions


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(9, 9), (8, 11)])
def test_convolutions_and_their_gradients_are_xlas(monkeypatch, stride, height, width):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, height, width, 3))
    kernel = jax.random.normal(keys[1], (3, 3, 3, 5))

    def xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def results(function):
        y, pull_back = jax.vjp(function, x, kernel)
        return y, *pull_back(jax.random.normal(keys[2], y.shape))

    theirs = results(xla)
    for on_cpu in (True, False):
        monkeypatch.setattr(convolution, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        jax.clear_caches()  # the platform is asked for when a function is traced
        ours = results(lambda x, kernel: convolution.convolve(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_encoding_a_few_at_a_time_changes_nothing():
    agent = script.init_agent(jax.random.key(0), SIZES, SMALL)
    params = agent.params["encoder"]
    pictures = np.random.default_rng(0).integers(0, 256, (6, 84, 84, 9), np.uint8)
    few = script.encode(agent.encoder, params, pictures)
    at_once = script.Encoder(SMALL.encoder_features).apply(params, pictures)
    assert few.shape == (6, 35 * 35 * 2)
    np.testing.assert_allclose(few, at_once, atol=1e-5)


# -------------------------------------------------------------------------- augmentation


def test_a_shift_of_zero_is_the_identity():
    pictures = np.random.default_rng(0).integers(0, 256, (5, 84, 84, 9), np.uint8)
    shifted = script.random_shift(jnp.asarray(pictures), jax.random.key(0), 0)
    np.testing.assert_array_equal(shifted, pictures)


def test_shifted_content_is_where_it_should_be():
    """Every picture is a window of the edge-padded one, all channels from the same place."""
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (40, 20, 20, 9), np.uint8)
    shifted = np.asarray(script.random_shift(jnp.asarray(pictures), jax.random.key(1), 4))
    offsets = set()
    for before, after in zip(pictures, shifted, strict=True):
        padded = np.pad(before, ((4, 4), (4, 4), (0, 0)), "edge")
        found = [(dy, dx) for dy in range(9) for dx in range(9)
                 if np.array_equal(padded[dy : dy + 20, dx : dx + 20], after)]
        assert len(found) == 1
        offsets |= set(found)
    assert len(offsets) > 20  # of 81, in 40 draws
    assert {dy for dy, _ in offsets} == {dx for _, dx in offsets} == set(range(9))


def test_obs_and_next_obs_are_shifted_apart(monkeypatch):
    keys = []
    monkeypatch.setattr(script, "random_shift", lambda x, key, shift: keys.append(key) or x)
    script.sample_batch(write_blocks(6), jax.random.key(0), SMALL)
    assert len(keys) == 2 and (jax.random.key_data(keys[0]) != jax.random.key_data(keys[1])).any()


# ------------------------------------------------------------------ which loss moves what


def batch() -> Transition:
    rng = np.random.default_rng(3)
    n = 6
    return Transition(
        obs=rng.integers(0, 256, (n, 84, 84, 9), np.uint8),
        action=rng.uniform(-1, 1, (n, 4)).astype(np.float32),
        next_obs=rng.integers(0, 256, (n, 84, 84, 9), np.uint8),
        reward=(rng.random(n) < 0.5).astype(np.float32),
        terminated=np.zeros(n, np.float32),
        embedding=rng.normal(size=(n, 3)).astype(np.float16),
    )


def test_each_loss_moves_its_own_parameters():
    agent, key = script.init_agent(jax.random.key(0), SIZES, SMALL), jax.random.key(1)
    reward = jnp.arange(6.0)
    critic_key, actor_key = jax.random.split(key)

    def joint(params):
        return script.drq_loss(params, agent, batch(), reward, key, SMALL)[0]

    def critic(params):
        return script.critic_loss(params, agent, batch(), reward, critic_key, SMALL)[0]

    features = script.encode(agent.encoder, agent.params["encoder"], batch().obs)
    action, log_prob = script.sample_action(
        agent.actor, agent.params["actor"], features, actor_key)
    q = agent.critic.apply(agent.params["critic"], features, action).min(0)
    loss, metrics = script.actor_loss(agent.params["actor"], agent, features, actor_key)
    np.testing.assert_allclose(loss, (SMALL.init_temperature * log_prob - q).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], -log_prob.mean(), rtol=1e-4)

    def actor(params):
        return script.actor_loss(params["actor"], agent, features, actor_key)[0]

    joint, critic, actor = (jax.grad(f)(agent.params) for f in (joint, critic, actor))
    for part, alone in (("encoder", critic), ("critic", critic), ("actor", actor)):
        for a, b in zip(jax.tree.leaves(joint[part]), jax.tree.leaves(alone[part]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(alone[part]))
    assert not any(np.abs(x).max() > 0 for x in jax.tree.leaves(critic["actor"]))
    assert not any(np.abs(x).max() > 0 for x in jax.tree.leaves((actor["encoder"],
                                                                 actor["critic"])))
    np.testing.assert_allclose(  # 2: |A| / 2
        joint["log_alpha"], SMALL.init_temperature * (metrics["entropy"] + 2), rtol=1e-4)


def test_each_agent_learns_from_its_own_reward(monkeypatch):
    """furl: r_task - 1 + rho r_VLM (Eq. 1); relay: r_task - 1, and not once relaying has ended."""
    args = replace(SMALL, align=False, rho=0.5)  # embeddings of one number: r_VLM is 1
    state = script.init_state(jax.random.key(0), SIZES, args)
    buffers = script.init_buffers(SIZES, args)._replace(steps=write_blocks(9))
    learned = []

    def spy(agent, batch, reward, key, args):
        learned.append((agent, batch.reward, reward))
        return agent, {}

    monkeypatch.setattr(script, "update_agent", spy)
    vlm = script.VLMInputs(jnp.ones(1), jnp.zeros(1))
    script.update_once(state, buffers, vlm, jax.random.key(1), args, script.Phase(True, "none"))
    (furl, task, shaped), (relay, _, plain) = learned
    assert furl is state.furl and relay is state.relay
    fuzzy = (task > 0).astype(np.float32)  # the similarity of a zero is 0
    np.testing.assert_allclose(shaped, task - 1 + 0.5 * fuzzy, atol=1e-4)
    np.testing.assert_array_equal(plain, task - 1)
    script.update_once(state, buffers, vlm, jax.random.key(1), args, script.Phase(False, "none"))
    assert len(learned) == 3 and learned[2][0] is state.furl


def test_the_relay_agent_gets_noise_on_its_actions():
    """Of a standard deviation of 0.2, where its own is next to nothing."""
    state = script.init_state(jax.random.key(0), SIZES, SMALL)
    certain = jax.tree.map(jnp.zeros_like, state.relay.params["actor"])
    certain["params"]["MLP_0"]["Dense_1"]["bias"] = jnp.array([0.0] * 4 + [-10.0] * 4)
    relay = state.relay.replace(params=state.relay.params | {"actor": certain})
    pictures = jnp.zeros((400, 84, 84, 9), jnp.uint8)
    action = script.act(state._replace(relay=relay), pictures, np.ones(400, bool),
                        jax.random.key(1), 0, SMALL, True)
    np.testing.assert_allclose(np.std(action, 0), 0.2, atol=0.03)


def test_the_target_follows_encoder_and_critic_by_tau():
    agent = script.init_agent(jax.random.key(0), SIZES, SMALL)
    new, metrics = script.update_agent(agent, batch(), jnp.arange(6.0), jax.random.key(1), SMALL)
    for part in ("encoder", "critic"):
        for old, moved, target in zip(*(jax.tree.leaves(x) for x in (
            agent.target[part], new.params[part], new.target[part])), strict=True):
            np.testing.assert_allclose(target, 0.99 * old + 0.01 * moved, rtol=1e-5, atol=1e-7)
    assert all(np.isfinite(float(x)) for x in jax.tree.leaves(metrics))


def test_shapes_of_table_5():
    """84 px, kernels of 3, strides 2, 1, 1, 1 without padding: 41, 39, 37, 35."""
    args = Args()
    shapes = jax.eval_shape(
        lambda key: script.init_agent(key, SIZES, args), jax.random.key(0)).params
    kernels = [shapes["encoder"]["params"][f"Conv_{i}"]["kernel"].shape for i in range(4)]
    assert kernels == [(3, 3, 9, 32), (3, 3, 32, 32), (3, 3, 32, 32), (3, 3, 32, 32)]
    for part in ("actor", "critic"):
        assert shapes[part]["params"]["Neck_0"]["Dense_0"]["kernel"].shape == (35 * 35 * 32, 50)
    picture_bytes = args.buffer_size * 84 * 84 * 3
    assert picture_bytes < 4.6e9


# ------------------------------------------------------------------------------ end to end


TINY = [
    "--env-id", "drawer-close-v3", "--num-envs", "2", "--total-timesteps", "1600",
    "--learning-starts", "1200", "--batch-size", "8", "--eval-every", "800",
    "--checkpoint-every", "800", "--log-every", "400", "--buffer-size", "1000", "--utd", "0.5",
    "--hidden-features", "16", "--encoder-features", "4", "4", "4", "4",
]


def run(*flags: str, monkeypatch, script=script) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
    run_script(script.main, script.Args)


def metrics(run_dir: Path) -> dict[tuple[int, str], float]:
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {(int(row["env_steps"]), row["key"]): float(row["value"]) for row in rows
            if not row["key"].startswith("time/")}


@pytest.mark.parametrize(("script", "flags"), [
    pytest.param(script, ["--embed-every", "3"], id="furl"),
    pytest.param(drq_baseline, [], id="drq"),
])
def test_a_run_and_its_resumption(script, flags, tmp_path, monkeypatch):
    """A run that goes on from its checkpoint half way logs what it logged before."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    embed_drawn, relay_acts = replay.embed_drawn, furl_drq_pixels.relay_acts
    embedded, relayed = [], []
    with monkeypatch.context() as spies:
        spies.setattr(replay, "embed_drawn", lambda vlm, frames, drawn, steps: embedded.append(
            (frames.shape, drawn.all())) or embed_drawn(vlm, frames, drawn, steps))
        spies.setattr(furl_drq_pixels, "relay_acts", lambda episode, time, args: relayed.append(
            (episode, time)) or relay_acts(episode, time, args))
        run(*TINY, *flags, "--run-dir", str(whole), monkeypatch=monkeypatch, script=script)
    if script is furl_drq_pixels:
        shapes, new = zip(*embedded, strict=True)
        assert set(shapes) == {(2, 96, 96, 3)}, "the VLM sees the middle of the picture"
        # Of an episode's 250 pictures the first, every third and the last; 150 of the second one.
        in_episode = [time in (0, 249) or time % 3 == 2 for time in range(250)]
        assert list(new) == in_episode + in_episode[:150]
        # Relay periods count physics steps, two an action: from 200 of the second episode on.
        assert relayed == [(1, time) for time in range(100, 300, 2)]
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints/step_0000001600")
    run("--resume", str(halves), monkeypatch=monkeypatch, script=script)
    assert (halves / "checkpoints/step_0000001600").exists()
    rows = metrics(whole)
    assert metrics(halves) == rows
    # 2 environments x 2 repeated steps an iteration, one update in each from 1200 steps on.
    assert rows[1600, "charts/num_updates"] == (1600 - 1200) / 4
    assert {step for step, key in rows if key == "eval/success_once"} == {800, 1600}
    assert ((1600, "losses/relay_critic_loss") in rows) == (script is not drq_baseline)
    assert all(np.isfinite(value) for value in rows.values())


@pytest.mark.parametrize(("flags", "message"), [
    (["--action-repeat", "3", "--total-timesteps", "24000"],
     "--action-repeat must divide 500"),
    (["--buffer-size", "1992"], "--buffer-size must hold an episode of each of 8 environments"),
    (["--action-repeat", "500", "--buffer-size", "32"],
     "--buffer-size must hold the pictures of an episode of each of 8 environments, 40"),
    (["--frame-stack", "0"], "--frame-stack must be 1 or more"),
])
def test_bad_input_ends_with_status_2(flags, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(*flags, monkeypatch=monkeypatch)
    assert stop.value.code == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_replay_holds_whole_steps_of_all_environments(capsys):
    """A stack is found by counting rows back, which needs a multiple of the environments."""
    for size, whole in ((20_001, 20_008), (20_007, 20_008), (20_008, 20_008)):
        assert pixels.whole_blocks(size, Args().layout) == whole
        note = f"note: --buffer-size {size} becomes {whole}, whole steps of 8 environments\n"
        assert capsys.readouterr().out == (note if size != whole else "")


@pytest.mark.parametrize("pretrained", [True, False])
def test_embeddings_of_random_encoders_are_kept_in_float32(pretrained):
    buffers = script.init_buffers(SIZES, replace(SMALL, pretrained=pretrained))
    for ring in buffers:
        assert ring.data.embedding.dtype == (np.float16 if pretrained else np.float32)


def test_drq_alone_learns_from_the_reward():
    """Its update on a batch is the shared `update_agent` with a reward of 0 on success, else -1."""
    args = drq_baseline.Args(**{name: getattr(SMALL, name) for name in (
        "num_envs", "action_repeat", "batch_size", "buffer_size", "hidden_features",
        "encoder_features", "encoder_dim")})
    steps = write_blocks(9)
    steps = steps._replace(data=steps.data._replace(
        reward=(steps.data.reward % 3 == 0).astype(jnp.float32),
        terminated=jnp.zeros_like(steps.data.terminated),
    ))
    agent, key = drq_baseline.init_agent(jax.random.key(0), SIZES, args), jax.random.key(1)
    sample_key, agent_key = jax.random.split(key)
    batch = drq_baseline.sample_batch(steps, sample_key, args)
    assert 0 < batch.reward.mean() < 1
    expected, _ = script.update_agent(agent, batch, batch.reward - 1, agent_key, args)
    updated, metrics = drq_baseline.update_once(agent, drq_baseline.Buffers(steps), key, args)
    for ours, theirs in zip(jax.tree.leaves(updated), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert metrics["reward/task_mean"] == batch.reward.mean()


def test_the_policy_is_the_evaluated_agents_and_takes_frames_of_any_size():
    state = script.init_state(jax.random.key(0), SIZES, SMALL)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 84, 84, 9), np.uint8)
    action = np.asarray(script.policy(state, pictures))
    assert action.shape == (2, 4)
    features = state.furl.encoder.apply(state.furl.params["encoder"], pictures)
    mean, _ = state.furl.actor.apply(state.furl.params["actor"], features)
    np.testing.assert_allclose(action, np.tanh(mean), atol=1e-5)
    assert np.abs(script.policy(state._replace(furl=state.relay), pictures) - action).max() > 1e-3
    twice = pictures.repeat(2, 1).repeat(2, 2)  # of 168 px, as a VLM's may be
    expected = script.policy(state, pixels.scale_down(twice))
    np.testing.assert_allclose(script.policy(state, twice), expected, atol=1e-6)


def test_exploration_is_a_function_of_the_step():
    state = script.init_state(jax.random.key(0), SIZES, SMALL)
    obs, key = np.zeros((3, 84, 84, 9), np.uint8), jax.random.key(1)

    def act(env_steps, use_relay, relaying=True):
        mask = np.array(use_relay)
        return np.asarray(script.act(state, obs, mask, key, env_steps, SMALL, relaying))

    yes, no = [True] * 3, [False] * 3
    np.testing.assert_array_equal(act(8, yes), act(8, yes))
    assert np.abs(act(8, yes) - act(16, yes)).min() > 1e-4
    np.testing.assert_array_equal(act(8, yes, relaying=False), act(8, no))
    mixed = act(8, [True, False, True])
    np.testing.assert_array_equal(mixed[[0, 2]], act(8, yes)[[0, 2]])
    np.testing.assert_array_equal(mixed[1], act(8, no)[1])
    assert np.abs(act(8, yes) - act(8, no)).max() > 1e-3
