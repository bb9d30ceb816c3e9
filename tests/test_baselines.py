"""The baselines: rewards worked out by hand, what is learned from them, and runs end to end."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import furl_sac_state as furl
import relay_baseline as relay
import sac_baseline as sac
import vlm_rm_baseline as vlm_rm
import vlm_rm_dqn
from common import replay
from common.cli import run_script
from common.envs.metaworld_suite import VecMetaWorld
from common.envs.metaworld_tasks import MT10, baseline_prompt_for, prompt_for
from common.errors import UserError
from common.replay import Sizes, Transition

SMALL = {"num_envs": 3, "batch_size": 16, "buffer_size": 64, "hidden_features": (16,)}
EMBED_DIM = 3
SIZES = Sizes(39, 4, EMBED_DIM)


def transitions(embed_dim: int | None = EMBED_DIM, n: int = 50) -> Transition:
    rng = np.random.default_rng(0)
    return Transition(
        obs=rng.normal(size=(n, 39)).astype(np.float32),
        action=rng.uniform(-1, 1, (n, 4)).astype(np.float32),
        next_obs=rng.normal(size=(n, 39)).astype(np.float32),
        reward=(rng.random(n) < 0.3).astype(np.float32),
        terminated=np.zeros(n, np.float32),
        embedding=embed_dim and rng.normal(size=(n, embed_dim)).astype(np.float16),
    )


# -------------------------------------------------------------- goal-baseline regularisation


GOAL, BASE = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 1.0, 0.0])


def test_goal_baseline_reward_by_hand():
    """s = (0, 0, 1), line from (0, 1, 0) to (1, 0, 0): its projection is (0.5, 0.5, 0)."""
    states = jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    # alpha 1: |(0.5, 0.5, 0) - (1, 0, 0)|^2 = 0.5; the goal: 0; the baseline: 2.
    np.testing.assert_allclose(
        vlm_rm.goal_baseline_reward(GOAL, BASE, states, 1.0), [0.75, 1.0, 0.0], atol=1e-6)
    # alpha 0.5: (0.25, 0.25, 0.5) - (1, 0, 0), squared: 0.5625 + 0.0625 + 0.25 = 0.875.
    np.testing.assert_allclose(
        vlm_rm.goal_baseline_reward(GOAL, BASE, states, 0.5), [0.5625, 1.0, 0.0], atol=1e-6)


def test_goal_baseline_reward_at_alpha_0_is_the_plain_reward():
    rng = np.random.default_rng(1)
    text, base, images = (jnp.asarray(rng.normal(size=s)) for s in ((8,), (8,), (20, 8)))
    np.testing.assert_allclose(
        vlm_rm.goal_baseline_reward(text, base, images, 0.0),
        vlm_rm.cosine_similarity(text, images), atol=1e-6)


def test_goal_baseline_reward_at_alpha_1_depends_on_the_line_alone():
    rng = np.random.default_rng(2)
    text, base, image = rng.normal(size=(3, 8))
    goal, base = text / np.linalg.norm(text), base / np.linalg.norm(base)
    direction = (goal - base) / np.linalg.norm(goal - base)
    # Another unit vector with the same component along the line: turned about it.
    state = image / np.linalg.norm(image)
    along = state @ direction
    across = rng.normal(size=8)
    across -= across @ direction * direction
    across *= np.sqrt(1 - along**2) / np.linalg.norm(across)
    other = along * direction + across
    assert np.abs(other - state).max() > 0.1
    one, two = vlm_rm.goal_baseline_reward(goal, base, jnp.stack([state, other]), 1.0)
    np.testing.assert_allclose(one, two, atol=1e-6)
    three, four = vlm_rm.goal_baseline_reward(goal, base, jnp.stack([state, other]), 0.5)
    assert abs(three - four) > 1e-3


def test_baseline_prompts():
    for env_id in MT10:
        assert baseline_prompt_for(env_id, None) != prompt_for(env_id, None)
    assert baseline_prompt_for("hammer-v3", None) == "A robot arm and a table."
    assert baseline_prompt_for("reach-v3", " a desk ") == "a desk"
    with pytest.raises(UserError, match="--baseline-prompt must not be empty"):
        baseline_prompt_for("reach-v3", " ")


# ------------------------------------------------------------- which method is which reward


def vlm_inputs(args: vlm_rm.Args) -> vlm_rm.VLMInputs:
    text, base = jnp.array([1.0, 2.0, 3.0]), jnp.array([3.0, -1.0, 1.0])
    heads = vlm_rm.Projection(args.projection_features)
    return vlm_rm.VLMInputs(text, base, heads.init(jax.random.key(3), text, text[None]))


def test_each_methods_reward():
    images = transitions().embedding.astype(np.float32)
    plain = vlm_rm.Args(**SMALL)
    vlm = vlm_inputs(plain)
    cosine = vlm_rm.cosine_similarity(vlm.text, images)
    np.testing.assert_array_equal(vlm_rm.vlm_reward(images, vlm, plain), cosine)
    regularised = vlm_rm.vlm_reward(images, vlm, replace(plain, alpha=0.4))
    np.testing.assert_array_equal(
        regularised, vlm_rm.goal_baseline_reward(vlm.text, vlm.baseline, images, 0.4))
    projected = vlm_rm.vlm_reward(images, vlm, replace(plain, projection=True))
    text, features = vlm_rm.Projection(plain.projection_features).apply(
        vlm.projection, vlm.text, images)
    np.testing.assert_array_equal(projected, vlm_rm.cosine_similarity(text, features))
    assert np.abs(projected - cosine).max() > 0.05


@pytest.mark.parametrize(("task_reward", "shift"), [(False, 0.0), (True, -1.0)])
def test_the_task_reward_is_added_only_when_asked(task_reward, shift, monkeypatch):
    """VLM-RM learns from r_VLM, LIV from r_task - 1 + rho r_VLM."""
    args = vlm_rm.Args(**SMALL, task_reward=task_reward, rho=0.5)
    buffers = vlm_rm.init_buffers(SIZES, args)
    buffers = vlm_rm.Buffers(replay.add_rows(buffers.transitions, transitions()))
    vlm = vlm_inputs(args)
    seen = {}

    def spy(agent, batch, reward, key, args):
        seen.update(reward=reward, batch=batch)
        return agent, {}

    monkeypatch.setattr(vlm_rm, "update_agent", spy)
    agent = vlm_rm.init_agent(jax.random.key(0), SIZES, args)
    vlm_rm.update_once(agent, buffers, vlm, jax.random.key(1), args)
    batch = seen["batch"]
    fuzzy = vlm_rm.cosine_similarity(vlm.text, batch.embedding.astype(jnp.float32))
    expected = fuzzy if not task_reward else batch.reward + shift + 0.5 * fuzzy
    np.testing.assert_allclose(seen["reward"], expected, atol=1e-6)


def test_vlm_rm_learns_as_sac_does_but_may_keep_its_temperature():
    args, key = vlm_rm.Args(**SMALL), jax.random.key(4)
    agent = vlm_rm.init_agent(jax.random.key(0), SIZES, args)
    batch, reward = transitions(None), np.linspace(-1, 1, 50, dtype=np.float32)
    tuned, kept = (
        jax.grad(vlm_rm.sac_loss, has_aux=True)(
            agent.params, agent, batch, reward, key, replace(args, tune_temperature=tune))[0]
        for tune in (True, False))
    expected, _ = jax.grad(sac.sac_loss, has_aux=True)(
        agent.params, agent, batch, reward, key, sac.Args(**SMALL))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), tuned, expected)
    assert tuned["log_alpha"] != 0 and kept["log_alpha"] == 0
    for part in ("actor", "critic"):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
                     kept[part], expected[part])


@pytest.mark.parametrize("script", [sac, vlm_rm])
def test_only_metaworlds_reward_is_shifted(script):
    assert script.Args(env_id="reach-v3").reward_shift == -1
    assert script.Args(env_id="Pendulum-v1").reward_shift == 0


def test_sac_learns_from_the_shifted_task_reward(monkeypatch):
    args = sac.Args(**SMALL)
    empty = sac.init_buffers(SIZES._replace(embedding=0), args)
    buffers = sac.Buffers(replay.add_rows(empty.transitions, transitions(None)))
    seen = {}

    def spy(agent, batch, reward, key, args):
        seen.update(reward=reward, batch=batch)
        return agent, {}

    monkeypatch.setattr(sac, "update_agent", spy)
    agent = sac.init_agent(jax.random.key(0), SIZES, args)
    sac.update_once(agent, buffers, jax.random.key(1), args)
    np.testing.assert_array_equal(seen["reward"], seen["batch"].reward - 1)


def test_scanned_updates_equal_single_ones():
    args = sac.Args(**SMALL)
    empty = sac.init_buffers(SIZES._replace(embedding=0), args)
    buffers = sac.Buffers(replay.add_rows(empty.transitions, transitions(None)))
    agent = sac.init_agent(jax.random.key(0), SIZES, args)
    key = jax.random.key(2)
    single, collected = agent, []
    once = jax.jit(sac.update_once, static_argnames="args")
    for update_key in jax.random.split(jax.random.fold_in(key, 24), args.updates_per_iteration):
        single, metrics = once(single, buffers, update_key, args)
        collected.append(metrics["losses/critic_loss"])
    other, _ = sac.update(jax.tree.map(jnp.copy, agent), buffers, key, 27, args)
    scanned, metrics = sac.update(agent, buffers, key, 24, args)  # donates `agent`
    np.testing.assert_allclose(metrics["losses/critic_loss"], np.mean(collected), rtol=1e-4)
    assert any((a != b).any() for a, b in zip(
        jax.tree.leaves(scanned), jax.tree.leaves(other), strict=True)), "another step's batches"
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("script", [sac, vlm_rm])
def test_exploration_is_a_function_of_the_step(script):
    agent = script.init_agent(jax.random.key(0), SIZES, script.Args(**SMALL))
    obs, key = jnp.asarray(transitions().obs[:3]), jax.random.key(1)
    first, again, other = (np.asarray(script.act(agent, obs, key, step)) for step in (8, 8, 16))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (3, 4) and np.abs(first - other).min() > 1e-5
    mean, _ = agent.actor.apply(agent.params["actor"], obs)
    np.testing.assert_allclose(script.policy(agent, obs), np.tanh(mean), atol=1e-6)


def test_relay_evaluates_the_vlm_agent():
    state = relay.init_state(jax.random.key(0), SIZES, relay.Args(**SMALL))
    obs = transitions().obs[:3]
    mean, _ = state.furl.actor.apply(state.furl.params["actor"], obs)
    np.testing.assert_allclose(relay.policy(state, obs), np.tanh(mean), atol=1e-6)
    other = relay.policy(state._replace(furl=state.relay), obs)
    assert np.abs(other - relay.policy(state, obs)).max() > 1e-3


@pytest.mark.parametrize("script", [furl, relay, vlm_rm])
@pytest.mark.parametrize("pretrained", [True, False])
def test_embeddings_of_random_encoders_are_kept_in_float32(script, pretrained):
    """Two pictures whose embeddings differ by 1e-5 of their size are told apart only there."""
    args = script.Args(**SMALL, pretrained=pretrained)
    buffers = script.init_buffers(SIZES, args)
    for ring in buffers:
        assert ring.data.embedding.dtype == (np.float16 if pretrained else np.float32)
    rows = transitions(n=2)._replace(embedding=jnp.array([[1.0, 1, 1], [1 + 1e-5, 1, 1]]))
    stored = replay.add_rows(buffers.transitions, rows).data.embedding[:2]
    assert (stored[0, 0] == stored[1, 0]) == pretrained


class FakeVLM:
    """Gives each prompt an embedding of its own, from its letters."""

    embed_dim = EMBED_DIM

    def embed_text(self, prompts: list[str]) -> np.ndarray:
        return np.stack([
            np.random.default_rng(list(p.encode())).normal(size=EMBED_DIM) for p in prompts
        ]).astype(np.float32)


@pytest.mark.parametrize("projection", [False, True])
def test_the_reward_that_tools_show_is_that_of_training(projection):
    """The heads of LIV-Proj are not saved: they are drawn again, from the seed."""
    args = vlm_rm.Args(**SMALL, projection=projection, alpha=0.3)
    images = transitions().embedding.astype(np.float32)
    vlm = vlm_rm.embed_task(FakeVLM(), args)
    prompts = FakeVLM().embed_text([prompt_for(args.env_id, None),
                                    baseline_prompt_for(args.env_id, None)])
    np.testing.assert_array_equal(jnp.stack([vlm.text, vlm.baseline]), prompts)
    shown = vlm_rm.load_reward(None, FakeVLM(), args)(images)
    np.testing.assert_allclose(shown, vlm_rm.vlm_reward(images, vlm, args), atol=1e-5)
    other = vlm_rm.load_reward(None, FakeVLM(), replace(args, seed=1))(images)
    assert (np.abs(other - shown).max() > 0.05) == projection


@pytest.mark.parametrize("script", [vlm_rm, vlm_rm_dqn])
@pytest.mark.parametrize(("alpha", "asked"), [(0.0, 1), (0.5, 2)])
def test_only_prompts_that_are_looked_at_are_embedded(script, alpha, asked):
    """Of an empty one a VLM would say that it knows none of its words."""
    seen = []

    class Listening(FakeVLM):
        def embed_text(self, prompts: list[str]) -> np.ndarray:
            seen.extend(prompts)
            return super().embed_text(prompts)

    script.embed_task(Listening(), script.Args(env_id="CartPole-v1", alpha=alpha))
    assert len(seen) == asked and all(seen)


# ------------------------------------------------------------------------------ end to end


TINY = [
    "--env-id", "drawer-close-v3", "--num-envs", "4", "--total-timesteps", "800",
    "--learning-starts", "200", "--batch-size", "32", "--eval-every", "400",
    "--checkpoint-every", "400", "--log-every", "200", "--buffer-size", "600", "--utd", "0.5",
    "--hidden-features", "16", "16",
]


def run(script, *flags: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
    run_script(script.main, script.Args)


def metrics(run_dir: Path) -> dict[tuple[int, str], float]:
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {(int(row["env_steps"]), row["key"]): float(row["value"]) for row in rows
            if not row["key"].startswith("time/")}


def check_resumption(script, whole: Path, monkeypatch) -> None:
    """A run that goes on from its last checkpoint but one logs what it logged before."""
    halves = whole.with_name("halves")
    shutil.copytree(whole, halves)
    *_, last = sorted((halves / "checkpoints").glob("step_*"))
    shutil.rmtree(last)
    run(script, "--resume", str(halves), monkeypatch=monkeypatch)
    assert last.exists()
    assert metrics(halves) == metrics(whole)


def check_config(script, run_dir: Path) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    vlm_dim = 0 if script is sac else 128
    assert config["sizes"] == {"obs": 39, "action": 4, "embedding": vlm_dim}
    assert config["script"] == script.__name__ and "mujoco 3.3.0" in config["engine"]


def test_relay_is_furl_without_alignment(tmp_path, monkeypatch):
    """Two files, one method: all that both log is the same number, to the last digit.

    Also after a resumption, from 800 steps: before the phase changes.
    """
    step_wait, times = VecMetaWorld.step_wait, iter([])

    def prescribed(self):
        step = step_wait(self)
        if self.num_envs == 2:  # not the evaluation's: the first environment succeeds once
            success = np.array([next(times) == 100, False])
            step = step._replace(success=success, reward=success.astype(np.float32))
        return step

    monkeypatch.setattr(VecMetaWorld, "step_wait", prescribed)
    flags = [*TINY, "--num-envs", "2", "--total-timesteps", "1200", "--relay-until", "60",
             "--eval-every", "600", "--buffer-size", "1200", "--draw-every", "4"]
    found = []
    for script, more in ((relay, []), (furl, ["--no-align"])):
        script.update.clear_cache()
        times = iter(range(600))
        folder = tmp_path / script.__name__
        run(script, *flags, *more, "--run-dir", str(folder), monkeypatch=monkeypatch)
        found.append(metrics(folder))
        assert script.update._cache_size() == 2, "compiled once for each phase"
    times = iter(range(400, 600))
    check_resumption(relay, tmp_path / "relay_baseline", monkeypatch)
    check_config(relay, tmp_path / "relay_baseline")
    ours, theirs = found
    assert {step for step, key in ours if key == "eval/success_once"} == {600, 1200}
    assert all(np.isfinite(value) for value in ours.values())
    assert ours.keys() <= theirs.keys()
    assert {key for _, key in theirs.keys() - ours.keys()} == {"charts/num_negatives"}
    assert ours == {key: theirs[key] for key in ours}
    assert ours[1200, "losses/critic_loss"] > 0
    assert ours[800, "losses/relay_critic_loss"] > 0
    assert ours[800, "charts/relaying"] == 1 and ours[800, "charts/num_positives"] == 0
    assert ours[1200, "charts/relaying"] == 0 and ours[1200, "charts/num_positives"] == 101


@pytest.mark.parametrize(("script", "flags"), [
    pytest.param(sac, [], id="sac"),
    pytest.param(vlm_rm, ["--alpha", "0.5", "--task-reward", "--projection"], id="vlm-rm"),
])
def test_a_run_and_its_resumption(script, flags, tmp_path, monkeypatch):
    run(script, *TINY, *flags, "--run-dir", str(tmp_path / "whole"), monkeypatch=monkeypatch)
    check_resumption(script, tmp_path / "whole", monkeypatch)
    check_config(script, tmp_path / "whole")
    rows = metrics(tmp_path / "whole")
    assert {step for step, key in rows if key == "eval/success_once"} == {400, 800}
    assert all(np.isfinite(value) for value in rows.values())
    assert (800, "losses/critic_loss") in rows
    assert not {key for _, key in rows if key.startswith("losses/relay_")}


def test_sac_on_the_native_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("FURL_NUM_CORES", "2")  # two threads of EnvPool
    run_dir = tmp_path / "run"
    flags = [*TINY, "--engine", "envpool", "--goal", "random", "--eval-episodes", "2"]
    run(sac, *flags, "--run-dir", str(run_dir), monkeypatch=monkeypatch)
    run(sac, "--resume", str(run_dir), "--total-timesteps", "1000", monkeypatch=monkeypatch)
    rows = metrics(run_dir)
    assert rows[1000, "charts/num_updates"] > rows[800, "charts/num_updates"] > 0
    assert "envpool" in json.loads((run_dir / "config.json").read_text())["engine"]


@pytest.mark.parametrize(("script", "flags", "message"), [
    (sac, ["--engine", "envpool"], "cannot have --goal fixed: use --goal random"),
    (sac, ["--env-id", "drawer-opn-v3"], "did you mean drawer-open-v3"),
    (sac, ["--vlm", "mini"], "--vlm"),
    (relay, ["--relay-periods", "0"], "--relay-periods"),
    (relay, ["--buffer-size", "3999"], "--buffer-size must hold an episode of each of 8"),
    (vlm_rm, ["--alpha", "1.5"], "--alpha must be at most 1, not 1.5"),
    (vlm_rm, ["--alpha", "1", "--baseline-prompt", " "], "--baseline-prompt must not be empty"),
    (vlm_rm, ["--baseline-prompt", "A desk."], "--baseline-prompt has no effect without --alpha"),
    (vlm_rm, ["--alpha", "0.5", "--prompt", "A desk.", "--baseline-prompt", "a DESK."],
     "means the same as the prompt"),
])
def test_bad_input_ends_with_status_2(script, flags, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(script, *flags, monkeypatch=monkeypatch)
    assert stop.value.code == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()
