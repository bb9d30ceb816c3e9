"""Opening a run of each script, and evaluating it: figures by hand, videos, what is refused."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm

import furl_drq_pixels as drq
import furl_plus_state as plus
import furl_sac_state as furl
import relay_baseline as relay
import sac_baseline as sac
import vlm_rm_baseline as vlm_rm
from common import checkpoint, pixels
from common.envs.metaworld_suite import goal_image
from common.envs.metaworld_tasks import expert_action, expert_policy
from common.envs.registry import METAWORLD
from common.envs.rendering import Square
from common.envs.workers import WorkerError
from common.errors import UserError
from common.evaluate import EVAL_SEED_OFFSET
from common.replay import Sizes
from common.run_folder import kept_policies
from common.vlms import View, view_for
from tools import filmstrip
from tools.evaluate import __main__ as evaluate
from tools.evaluate import video
from tools.evaluate.trained import Trained, open_run
from tools.shared import folders
from tools.shared.measures import (
    auc,
    check_finite,
    epic_distance,
    spearman,
    standard_error,
    wilson_interval,
    without_nan,
)

# ------------------------------------------------------------------------------ measures


def test_wilson_intervals_by_hand():
    """5 of 10 at z = 2: (0.5 + 0.2) / 1.4 -+ 2 / 1.4 * sqrt(0.025 + 0.01)."""
    level = 2 * norm.cdf(2) - 1
    low, high = wilson_interval(5, 10, level)
    assert (low, high) == pytest.approx((0.5 - 0.267261, 0.5 + 0.267261), abs=1e-6)
    # No success in 10 at z = 2: from 0 to z^2 / (n + z^2) = 4 / 14.
    assert wilson_interval(0, 10, level) == pytest.approx((0.0, 4 / 14))
    assert wilson_interval(10, 10, level) == pytest.approx((10 / 14, 1.0))
    # 95 %: the value that Newcombe (1998, Table I) gives for 81 of 263.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            wilson_interval(successes, trials)


def test_standard_error_by_hand():
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)  # sqrt(2) / sqrt(2)
    assert np.isnan(standard_error(np.array([1.0])))


def test_auc_by_hand():
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert auc(np.array([0.0]), np.array([1.0, 2.0])) == 0
    # Pairs (1, 0), (1, 1), (1, 2): won, tied, lost.
    assert auc(np.array([1.0]), np.array([0.0, 1.0, 2.0])) == pytest.approx(0.5)
    assert np.isnan(auc(np.array([]), np.array([1.0])))


def test_spearman_by_hand():
    assert spearman(np.arange(4), np.array([1.0, 10.0, 100.0, 1000.0])) == pytest.approx(1)
    # Ranks 1 2 3 against 1 3 2: 1 - 6 * 2 / (3 * 8).
    assert spearman(np.arange(3), np.array([0.0, 5.0, 4.0])) == pytest.approx(0.5)
    assert np.isnan(spearman(np.arange(3), np.ones(3)))


def test_epic_distance_by_hand():
    is_goal = np.array([True, False, False, True])
    for reward in (is_goal, 3.0 * is_goal - 7):  # the same up to a positive affine map
        assert epic_distance(reward, is_goal) == pytest.approx(0, abs=1e-7)
    assert epic_distance(-2.0 * is_goal, is_goal) == pytest.approx(1)
    assert epic_distance(np.array([1.0, 1.0, 0.0, 0.0]), is_goal) == pytest.approx(0.5**0.5)
    # Lemma 1: goal states have 2, the others 0 and 1; Var(r) = 11/16, share 1/4.
    reward, one_goal = np.array([2.0, 0.0, 1.0, 1.0]), np.array([True, False, False, False])
    correlation = (3 / 16 / 0.5) ** 0.5 * (2 - 2 / 3)
    assert epic_distance(reward, one_goal) == pytest.approx(((1 - correlation) / 2) ** 0.5)
    rng = np.random.default_rng(0)
    reward, some = rng.normal(size=50), rng.random(50) < 0.3
    expected = np.sqrt((1 - np.corrcoef(reward, some)[0, 1]) / 2)
    assert epic_distance(reward, some) == pytest.approx(expected)
    assert np.isnan(epic_distance(np.ones(4), is_goal))
    assert np.isnan(epic_distance(np.arange(4), np.zeros(4, bool)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_figure(bad):
    """Above all no perfect one: sqrt(max(0, 1 - NaN)) would be the best EPIC distance."""
    values, is_goal = np.array([0.0, 1.0, bad, 2.0]), np.array([False, True, True, False])
    for figure in (epic_distance(values, is_goal), auc(values[is_goal], values[~is_goal]),
                   spearman(np.arange(4), values), spearman(values, np.arange(4)),
                   standard_error(values)):
        assert np.isnan(figure)
    with pytest.raises(UserError, match="the reward of it is not finite for 1 of 4 pictures"):
        check_finite(values, "the reward of it")
    assert without_nan({"a": [bad, 1.0], "b": (bad,)}) == {"a": [None, 1.0], "b": [None]}


def test_summary_by_hand():
    """Three steps of four episodes: solved and kept, solved and lost, twice nothing."""
    success = np.zeros((3, 4), bool)
    success[1:, 0] = True
    success[1, 1] = True
    episodes = {"success_once": success.any(0), "success_at_end": success[-1],
                "return": success.sum(0), "length": np.full(4, 3)}
    figures = evaluate.summarise(episodes, independent=True)
    assert figures["success_once"]["rate"] == 0.5 and figures["success_at_end"]["rate"] == 0.25
    assert figures["success_once"]["wilson_95"] == pytest.approx(wilson_interval(2, 4))
    assert figures["return"]["mean"] == 0.75  # 2, 1, 0, 0
    assert figures["return"]["standard_error"] == pytest.approx((2.75 / 3) ** 0.5 / 2)
    assert figures["per_episode"]["return"] == [2, 1, 0, 0]
    assert figures["length"] == {"mean": 3, "standard_error": 0}
    one = evaluate.summarise({k: v[:1] for k, v in episodes.items()}, independent=False)
    assert one["success_once"]["wilson_95"] is None and one["return"]["standard_error"] is None
    assert "100.0%   -" in evaluate.table(one) and "length" not in evaluate.table(one)
    none = {k: v[2:] for k, v in episodes.items()}
    shown = evaluate.table(evaluate.summarise(none, independent=True), lengths=True)
    assert "length" in shown and "success" not in shown, "the environment may know no success"


# ---------------------------------------------------------------------------- a run opened

TINY = dict(env_id="drawer-close-v3", num_envs=4, total_timesteps=8, learning_starts=100,
            batch_size=8, buffer_size=2000, hidden_features=(16,), checkpoint_every=4)
UPDATED = TINY | dict(total_timesteps=16, learning_starts=4, utd=0.25)
RUNS = {
    "furl": (furl, furl.Args(**UPDATED, projection_features=(8, 4))),
    "plus": (plus, plus.Args(**UPDATED, projection_features=(8, 4), quiet_envs=1)),
    "drq": (drq, drq.Args(**TINY | {"total_timesteps": 160, "learning_starts": 200},
                          encoder_features=(4, 4), action_repeat=20)),
    "sac": (sac, sac.Args(**UPDATED, goal="random", eval_episodes=2)),
    "relay": (relay, relay.Args(**TINY)),
    "vlm-rm": (vlm_rm, vlm_rm.Args(**TINY, alpha=0.5, projection=True)),
}


def moved(state, *_):
    """In place of an update, which takes long to compile: all networks change, each differently."""
    leaves, tree = jax.tree.flatten(state)
    return tree.unflatten([x + 0.01 * (i + 1) / len(leaves) if x.dtype == jnp.float32 else x
                           for i, x in enumerate(leaves)]), {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name -> (run folder, the tree of its last checkpoint), each trained when first asked for."""
    runs = {}

    def train(name: str):
        if name not in runs:
            script, args = RUNS[name]
            folder = tmp_path_factory.mktemp("runs") / name
            saved = []
            with pytest.MonkeyPatch.context() as patch:
                save = checkpoint.save
                patch.setattr(checkpoint, "save", lambda *a: saved.append(
                    jax.tree.map(np.asarray, a[2])) or save(*a))
                patch.setattr(script, "update", moved)
                script.main(script.Args(**vars(args) | {"run_dir": str(folder)}))
            runs[name] = folder, saved[-1]
        return runs[name]

    return train


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    return {str(f.relative_to(folder)): (
        f.stat().st_mtime_ns, hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "")
        for f in folder.rglob("*")}


@pytest.mark.parametrize("name", RUNS)
def test_the_policy_and_the_reward_are_those_of_the_script(name, trained):
    folder, state = trained(name)
    script, args = RUNS[name]
    before = contents(folder)
    run = open_run(folder)
    assert run.script is script and run.args.env_id == args.env_id
    assert run.env_steps == args.total_timesteps
    rng = np.random.default_rng(0)
    agent = state if name in ("sac", "vlm-rm") else state.furl
    if name == "drq":
        obs = rng.integers(0, 256, (2, 112, 112, 9), np.uint8)
        features = script.encode(agent.encoder, agent.params["encoder"], pixels.scale_down(obs))
    else:
        obs = features = rng.normal(size=(2, 39)).astype(np.float32)
    params = state.mean_actor if name == "plus" else agent.params["actor"]
    mean, _ = agent.actor.apply(params, features)
    np.testing.assert_allclose(run.policy(obs), np.tanh(mean), atol=1e-6)
    assert run.has_vlm == (name != "sac")
    if run.has_vlm:
        vlm = run.vlm
        images = rng.normal(size=(5, vlm.embed_dim)).astype(np.float32)
        text = jnp.asarray(vlm.embed_text(["Push and close a drawer."])[0])
        if name in ("furl", "plus", "drq"):
            heads = script.Projection(args.projection_features)
            expected = script.cosine_similarity(*heads.apply(state.projection, text, images))
        elif name == "vlm-rm":
            heads = script.Projection(args.projection_features)
            params = script.embed_task(vlm, args).projection
            base = jnp.asarray(vlm.embed_text(["A robot arm and a drawer."])[0])
            goal, features = heads.apply(params, text, images)
            expected = script.goal_baseline_reward(
                goal, heads.apply(params, base, images)[0], features, 0.5)
        else:
            expected = images @ text / np.linalg.norm(text) / np.linalg.norm(images, axis=-1)
        np.testing.assert_allclose(run.vlm_reward(vlm)(images), expected, atol=1e-5)
    assert contents(folder) == before


def test_the_view_of_a_run_is_the_one_that_it_recorded(trained):
    run = open_run(trained("furl")[0])
    view = run.view_of(run.vlm)
    assert view == view_for(run.vlm, METAWORLD)
    run.config["view"] = {"size": view.size, "margin": 0}  # as older runs have it
    assert run.view_of(run.vlm) == view
    del run.config["view"]  # as of a copy that tells none
    assert run.view_of(run.vlm) == view
    run.config["view"] = {"size": 50, "square": [1, 2, 3]}  # a copy's own
    assert run.view_of(run.vlm) == View(50, Square(1, 2, 3))


@pytest.mark.parametrize("script", [furl, drq])
def test_a_reward_may_use_the_goal_image(script, trained, monkeypatch):
    """As that of a copy may: it is given the one of training."""
    run = open_run(trained("furl")[0])
    camera = run.view_of(run.vlm).camera(run.args.camera_id, run.args.quality)
    picture = goal_image(run.args.env_id, seed=run.args.seed, goal=run.args.goal, camera=camera)
    expected = run.vlm.embed_images(picture[None])[0]
    monkeypatch.setattr(script, "vlm_reward", lambda params, images, vlm, args: vlm.goal)
    reward = script.load_reward(run.state, run.vlm, run.args)
    np.testing.assert_allclose(reward(np.zeros((1, run.vlm.embed_dim))), expected, atol=1e-6)
    assert np.abs(expected).max() > 0


def test_the_rewards_heads_are_those_that_the_script_used(monkeypatch, tmp_path):
    """LIV-Proj's heads are drawn again: compared with what its update was given."""
    seen = []
    monkeypatch.setattr(vlm_rm, "update", lambda agent, buffers, vlm, *rest: (
        seen.append(vlm), (agent, {}))[1])
    args = vlm_rm.Args(**UPDATED, seed=3, projection=True, run_dir=str(tmp_path / "r"))
    vlm_rm.main(args)
    run = open_run(tmp_path / "r")
    vlm = run.vlm
    images = np.random.default_rng(0).normal(size=(5, vlm.embed_dim)).astype(np.float32)
    expected = vlm_rm.vlm_reward(images, seen[0], args)
    np.testing.assert_allclose(run.vlm_reward(vlm)(images), expected, atol=1e-6)


def test_a_kept_checkpoint_is_chosen_by_its_steps(trained):
    folder, _ = trained("furl")
    old = open_run(folder, 12)
    assert old.env_steps == 12
    obs = np.ones((1, 39), np.float32)
    assert np.abs(old.policy(obs) - open_run(folder).policy(obs)).max() > 1e-6
    with pytest.raises(UserError, match="no policy of step 5; kept are: 12, 16"):
        open_run(folder, 5)


@pytest.mark.parametrize("name", ["furl", "drq", "sac", "vlm-rm"])
def test_a_kept_policy_is_that_of_its_checkpoint(name, trained, tmp_path):
    """And is there when the checkpoint is not; a reward that was learned is then unknown."""
    folder = copy_of(trained(name)[0], tmp_path)
    [env_steps] = kept_policies(folder)
    whole = open_run(folder, env_steps)
    shutil.rmtree(folder / f"checkpoints/step_{env_steps:010d}")
    kept = open_run(folder, env_steps)
    assert kept.env_steps == env_steps and open_run(folder).env_steps < env_steps
    obs = np.ones((2, 112, 112, 9), np.uint8) if name == "drq" else np.ones((2, 39), np.float32)
    np.testing.assert_array_equal(kept.policy(obs), whole.policy(obs))
    if kept.has_vlm:
        reward = kept.vlm_reward(kept.vlm)(np.ones((1, kept.vlm.embed_dim)))
        assert np.isfinite(reward) == (name == "vlm-rm"), "which learns none"
    shutil.rmtree(folder / "checkpoints")
    assert open_run(folder).env_steps == env_steps


@pytest.fixture
def evaluated(trained, tmp_path):
    """A run folder with the policies of steps 1 to 8 and 16, and rows of metrics of each."""
    folder = copy_of(trained("furl")[0], tmp_path)
    rows = "".join(
        f"{step},eval/success_at_end,{int(step in (3, 5, 6))}\n{step},eval/return,{step % 6}\n"
        for step in range(1, 9))
    rows += "2,reward/vlm_mean,0.5\n5,reward/vlm_mean,0.25\n7,reward/vlm_mean,0.5\n"
    (folder / "metrics.csv").write_text("env_steps,key,value\n" + rows)
    policy = folder / "policies/0000000016.npz"
    for step in range(1, 9):
        shutil.copy(policy, policy.with_name(f"000000000{step}.npz"))
    return folder


def test_the_best_of_the_kept_policies(evaluated, five_steps, capsys):
    """By success, then by return (steps 3, 5 and 6 have 3, 5 and 0); by the VLM reward of the row
    at the policy or before it, of equal ones the latest."""
    best = evaluate.main(evaluate.Args(evaluated, best=True, videos=0))
    assert best["env_steps"] == 5 and best["evaluation"]["best"]
    assert "--best: step 5 of 9 kept policies: success_at_end 100%, return 5.0" in (
        capsys.readouterr().out)
    rewarded = evaluate.main(evaluate.Args(evaluated, best_reward=True, videos=0))
    assert rewarded["env_steps"] == 16
    assert "--best-reward: step 16 of 9 kept policies: VLM reward 0.5000" in (
        capsys.readouterr().out)
    assert evaluate.training_rewards(evaluated, [1, 2, 6]) == {2: 0.5, 6: 0.25}
    (evaluated / "policies/0000000005.npz").write_bytes(b"PK")
    for args, message in [
        ({"step": 9}, "no policy of step 9; 10 are kept, the nearest are: 4, 5, 6, 7, 8, 12"),
        ({"step": 3, "best": True}, "give one of --step, --best and --best-reward"),
        ({"best": True}, "0000000005.npz cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate.main(evaluate.Args(evaluated, **args))


def test_a_run_with_nothing_to_choose_from(evaluated):
    (evaluated / "metrics.csv").write_text("env_steps,key,value\n")
    with pytest.raises(UserError, match=r"has no VLM reward \(reward/vlm_mean\) for --best-rew"):
        evaluate.chosen_step(evaluate.Args(evaluated, best_reward=True))
    with pytest.raises(UserError, match="has no evaluations for --best to choose by"):
        evaluate.chosen_step(evaluate.Args(evaluated, best=True))
    shutil.rmtree(evaluated / "policies")  # as of an older run, whose last checkpoint still is one
    with pytest.raises(UserError, match="has no policies/ for --best to choose from"):
        evaluate.chosen_step(evaluate.Args(evaluated, best=True))
    assert open_run(evaluated).env_steps == 16


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_damaged_checkpoint_is_passed_over_and_stays(trained, tmp_path, capsys):
    folder = copy_of(trained("furl")[0], tmp_path)
    newest = folder / "checkpoints/step_0000000016/state.npz"
    newest.write_bytes(newest.read_bytes()[:-10])
    before = contents(folder)
    assert open_run(folder).env_steps == 12
    assert "step_0000000016 is passed over" in capsys.readouterr().err
    assert contents(folder) == before
    with pytest.raises(UserError, match="no usable checkpoint") as error:
        open_run(folder, 16)
    assert "\n" not in str(error.value) and "does not match its checksum" in str(error.value)


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c.update(script="ppo"), r"there is no ppo\.py in this checkout$"),
    (lambda c: c.update(script="../evil"), "another version's run"),
    (lambda c: c.pop("sizes"), "another version's run"),
    (lambda c: c["args"].update(hidden_features=[32]), "other shapes.*; with --run-code the"),
    (lambda c: c["args"].update(hidden_features=[16, 16]), "other shapes"),
    (lambda c: c["sizes"].update(obs=12), "other shapes"),
])
def test_runs_that_the_checkouts_script_does_not_fit(change, message, trained, tmp_path):
    folder = copy_of(trained("furl")[0], tmp_path)
    change_config(folder, change)
    with pytest.raises(UserError, match=message) as error:
        open_run(folder)
    assert "\n" not in str(error.value)


def test_flags_that_came_or_went_since_the_run(trained, tmp_path, capsys):
    folder = copy_of(trained("furl")[0], tmp_path)
    change_config(folder, lambda c: c["args"].update(gone=3))
    change_config(folder, lambda c: c["args"].pop("rho"))
    assert open_run(folder).args.rho == furl.Args().rho
    new, gone = [line for line in capsys.readouterr().out.splitlines() if "flags" in line]
    assert new.endswith("take their defaults: --rho") and gone.endswith("ignored: --gone 3")


def test_the_folders_own_code_runs_only_when_told(trained, tmp_path, capsys):
    """It is the folder's if it does something else than the checkout's: here, act backwards."""
    folder = copy_of(trained("furl")[0], tmp_path)
    kept = folder / "furl_sac_state.py"
    kept.write_text(kept.read_text().replace("return jnp.tanh(mean)", "return -jnp.tanh(mean)"))
    obs = np.ones((1, 39), np.float32)
    present = open_run(folder)
    assert present.script is furl
    assert "furl_sac_state.py has changed since this run" in capsys.readouterr().out
    own = open_run(folder, run_code=True)
    assert own.script is not furl and "do so only with folders that you trust" in (
        capsys.readouterr().out)
    np.testing.assert_allclose(own.policy(obs), -present.policy(obs))
    other = copy_of(folder, tmp_path / "other")
    (other / kept.name).write_text("raise KeyError('a mistake')")
    with pytest.raises(UserError, match=r"does not fit this run \(KeyError: 'a mistake'\)$"):
        open_run(other, run_code=True)


@pytest.mark.parametrize("name", RUNS)
def test_every_script_has_what_the_tools_use(name):
    script, args = RUNS[name]
    assert {"env_id", "seed", "goal"} <= {f.name for f in dataclasses.fields(script.Args)}
    state = jax.eval_shape(
        lambda key: script.init_state(key, Sizes(39, 4, 8), args), jax.random.key(0))
    assert jax.tree.leaves(state)
    assert callable(script.main) and callable(script.policy)
    assert hasattr(script, "load_reward") == hasattr(args, "vlm")


def test_another_vlm_gives_no_reward(trained, tmp_path):
    folder = copy_of(trained("furl")[0], tmp_path)
    change_config(folder, lambda c: c.update(vlm_id="mini-0000-112px"))
    with pytest.raises(UserError, match="its reward would mean nothing"):
        _ = open_run(folder).vlm


# ---------------------------------------------------------------------------- evaluations


def test_a_fixed_goal_is_played_once_as_the_script_evaluates_it(trained, tmp_path, capsys):
    folder, _ = trained("drq")
    before = contents(folder)
    results = evaluate.main(evaluate.Args(folder, output=tmp_path / "out"))
    assert contents(folder) == before
    assert results["episodes"] == 1 and results["success_once"]["wilson_95"] is None
    assert "all episodes of the mean action are the same" in capsys.readouterr().out
    with open(folder / "metrics.csv", newline="") as file:
        logged = {row["key"]: float(row["value"]) for row in csv.DictReader(file)}
    assert results["return"]["mean"] == logged["eval/return"]
    stored = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert stored["env_steps"] == 160 and stored["run"]["args"]["env_id"] == "drawer-close-v3"
    assert stored["video_curve"].startswith("VLM reward")
    frames = imageio.mimread(tmp_path / "out/episode_0.mp4", memtest=False)
    assert len(frames) == 25 and frames[0].shape[1] == video.SIZE
    with pytest.raises(UserError, match="exists: choose another --output"):
        evaluate.main(evaluate.Args(folder, output=tmp_path / "out"))


@pytest.fixture
def five_steps(monkeypatch):
    """Evaluations of five steps with a success in each, by nobody."""

    class FiveSteps:
        def __init__(self, trained, env_id, num_episodes, **where):
            measures = ("success_once", "success_at_end", "return", "length")
            self.episodes = {name: np.full(num_episodes, 5) for name in measures}
            self.episodes |= {name: np.ones(num_episodes, bool) for name in measures[:2]}

        def __call__(self, policy):
            pass

        def close(self):
            pass

    monkeypatch.setattr(Trained, "evaluator", lambda *args, **where: FiveSteps(*args, **where))


def test_evaluations_are_in_the_runs_own_folder(trained, tmp_path, five_steps):
    """So a grid's cells, which have numbers for names, do not collide; the same is replaced."""
    for method in "ab":
        shutil.copytree(trained("furl")[0], tmp_path / method / "0")
    for goal in ("fixed", "random", "random"):
        for method in "ab":
            evaluate.main(evaluate.Args(tmp_path / method / "0", goal=goal, episodes=7, videos=0))
    for method in "ab":
        folders = sorted((tmp_path / method / "0/evaluations").iterdir())
        assert [folder.name.split("__")[2] for folder in folders] == ["fixed", "random"]
        assert [len(list(folder.iterdir())) for folder in folders] == [1, 1]
        found = json.loads((folders[1] / "evaluation.json").read_text())
        assert found["success_at_end"]["successes"] == 7
        assert found["seed"] not in (0, EVAL_SEED_OFFSET), "neither training's nor its evaluations'"


def test_folders_are_replaced_whole_or_joined(tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def interrupt():
        raise KeyboardInterrupt

    def write(name: str, fails: bool = False, keep: bool = False) -> list[str]:
        with contextlib.suppress(KeyError), folders.written_whole(folder, keep) as new:
            (new / name).write_text(name)
            if fails:
                raise KeyError
        assert [path.name for path in tmp_path.iterdir()] == ["out"] * folder.exists()
        return sorted(path.name for path in folder.glob("*"))

    assert write("a", fails=True) == [] and write("a") == ["a"]
    assert write("b", fails=True) == ["a"] and write("b") == ["b"]
    assert write("c", keep=True) == ["b", "c"] and write("d", True, keep=True) == ["b", "c"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        rename = Path.rename
        patch.setattr(Path, "rename", lambda path, target: interrupt() if path.name == "new"
                      else rename(path, target))
        write("e")
    assert sorted(path.name for path in folder.iterdir()) == ["b", "c"]
    assert folders.writable_folder(folder) == folder
    with pytest.raises(UserError, match="is no folder: choose another --output"):
        folders.writable_folder(folder / "c")


def test_a_video_that_cannot_be_made_costs_only_itself(
    trained, tmp_path, five_steps, monkeypatch, capsys
):
    def fail(trained, episodes, count, folder, **where):
        (folder / "episode_0.mp4").write_bytes(b"half of it")
        raise WorkerError("no EGL here")

    monkeypatch.setattr(evaluate, "film", fail)
    results = evaluate.main(evaluate.Args(trained("furl")[0], output=tmp_path / "out"))
    assert "note: without a video: no EGL here" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["evaluation.json"]
    assert results["success_once"]["rate"] == 1 and "videos" not in results

    def interrupt(*_args, **_where):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "film", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(evaluate.Args(trained("furl")[0], output=tmp_path / "stopped"))
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["evaluation.json"]


def test_a_run_with_random_goals_is_played_on_new_ones(trained, tmp_path):
    """The run's sparse reward is what its video shows; without videos none is drawn."""
    folder, _ = trained("sac")
    args = evaluate.Args(folder, episodes=3, videos=0, output=tmp_path / "one")
    one = evaluate.main(args)
    assert one["goal"] == "random" and one["episodes"] == 3
    assert one["seed"] not in (0, EVAL_SEED_OFFSET)
    assert one["success_once"]["wilson_95"] == pytest.approx(
        wilson_interval(one["success_once"]["successes"], 3))
    assert [f.name for f in (tmp_path / "one").iterdir()] == ["evaluation.json"]


def expert(env_id: str) -> Trained:
    """A run whose policy is the scripted expert, which sees the goal."""
    policy = expert_policy(env_id)
    settings = {"frame_stack": 0, "frame_size": 0, "camera_id": 2, "quality": "fast",
                "action_repeat": 1}
    script = SimpleNamespace(
        policy=lambda state, obs: np.stack([expert_action(policy, o) for o in obs]))
    return Trained(Path(), {"evaluation": settings}, script, SimpleNamespace(env_id=env_id), 0,
                   None)


def test_the_expert_succeeds_and_is_played_again(monkeypatch):
    """Five episodes in rounds of two; those of the first round again, by their actions alone."""
    monkeypatch.setattr("common.evaluate.SIDE_BY_SIDE", 2)
    where = {"env_id": "drawer-close-v3", "goal": "random", "seed": 5}
    seen = []
    run = expert("drawer-close-v3")
    with contextlib.closing(run.evaluator(num_episodes=5, **where)) as evaluator:
        evaluator(lambda obs: seen.append(obs) or run.policy(obs))
    assert np.shape(evaluator.actions) == (500, 2, 4) and np.shape(seen) == (1500, 2, 39)
    assert evaluate.summarise(evaluator.episodes, True)["success_once"]["rate"] == 1
    assert (evaluator.episodes["length"] == 500).all() and evaluator.steps == 1500
    goals = np.concatenate([seen[t][:, 36:39] for t in (0, 500, 1000)])
    assert len(np.unique(goals, axis=0)) == 6
    again = run.play_again(np.array(evaluator.actions[:40]), 64, **where)
    np.testing.assert_array_equal(again.states, seen[:41])
    assert again.frames.shape == (40, 2, 64, 64, 3)
    assert (again.frames[0] != again.frames[-1]).any()
    assert again.success.shape == again.reward.shape == (40, 2)


def test_pictures_of_the_video():
    """The curve grows, success is marked, and a long instruction gets more lines."""
    frames = np.full((5, 160, 160, 3), 200, np.uint8)
    success = np.array([False, False, False, False, True])
    pictures = video.compose(frames, np.arange(5.0), success, "Open.", "reward", every=2)
    assert len(pictures) == 3 and all(p.shape == pictures[0].shape for p in pictures)
    assert pictures[0].shape[1] == 160 and pictures[0].shape[0] % 8 == 0
    curve = [(p[-video.CURVE_HEIGHT + 34:] == [21, 101, 192]).all(-1).sum() for p in pictures]
    assert 0 < curve[0] < curve[1] < curve[2]
    green = [(p == [46, 125, 50]).all(-1).any() for p in pictures]
    assert green == [False, False, True]
    constant = video.compose(frames, np.zeros(5), success, "word " * 40, "reward", every=9)
    assert constant[0].shape[0] > pictures[0].shape[0] and len(constant) == 2


@pytest.mark.parametrize(("flags", "message"), [
    (["RUN", "--episodes", "0"], "--episodes must be 1 or more"),
    (["RUN", "--seed", "-1"], "--seed must be 0 or more, not -1"),
    (["RUN", "--env-id", "drawer-opn-v3"], "did you mean drawer-open-v3"),
    (["RUN", "--output", "/proc/evaluation"], "/proc/evaluation cannot be written"),
    (["RUN", "--step", "7"], "kept are: 12, 16"),
    (["/nowhere"], "/nowhere: no such folder"),
    (["."], "not a run folder"),
])
def test_bad_input_ends_with_one_line_and_status_2(
    flags, message, trained, tmp_path, monkeypatch, refused
):
    folder = str(trained("furl")[0])
    monkeypatch.chdir(tmp_path)
    refused(evaluate, [folder if f == "RUN" else f for f in flags], message)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ filmstrip


def test_a_filmstrip_shows_before_and_after(trained, tmp_path, monkeypatch, capsys):
    """A column for each run, titles above, steps on the left; a border where there is success."""
    ends = []

    def last_frame(trained):
        ends.append(trained.env_steps)
        return np.full((filmstrip.SIZE, filmstrip.SIZE, 3), 50, np.uint8), len(ends) % 2 == 0

    real = filmstrip.last_frame
    monkeypatch.setattr(filmstrip, "last_frame", last_frame)
    folder, output = trained("furl")[0], tmp_path / "strip.png"
    asked = []
    monkeypatch.setattr(filmstrip, "open_run", lambda *a: asked.append(a) or open_run(*a))
    filmstrip.main(filmstrip.Args((folder, folder), output, run_code=True))
    assert asked == 2 * [(folder, min(kept_policies(folder)), True), (folder, None, True)]
    first, newest = min(kept_policies(folder)), checkpoint.read_newest(folder)[0]
    assert ends == [first, newest] * 2
    picture = np.asarray(Image.open(output))
    cell = filmstrip.SIZE + filmstrip.GAP
    assert picture.shape == (filmstrip.TOP + 2 * cell, filmstrip.LEFT + 2 * cell, 3)
    corners = [[picture[filmstrip.TOP + cell * j, filmstrip.LEFT + cell * i].tolist()
                for i in (0, 1)] for j in (0, 1)]
    assert corners == [[[50] * 3] * 2, [[0x2e, 0x7d, 0x32]] * 2]
    frame, _ = real(open_run(folder))
    assert frame.shape == (filmstrip.SIZE, filmstrip.SIZE, 3) and frame.std() > 10
    with pytest.raises(UserError, match="has no policies/"):
        filmstrip.main(filmstrip.Args((tmp_path,)))
    for wrong in ("strip.foo", "no/such/folder/strip.png"):  # said before anything is played
        with pytest.raises(UserError, match=f"{wrong} must be a picture's name"):
            filmstrip.main(filmstrip.Args((folder,), tmp_path / wrong))
    assert ends == [first, newest] * 2


def test_a_video_of_a_copy_with_several_prompts_or_none_has_a_title():
    args = {"env_id": "drawer-open-v3"}
    assert video.prompt_of({"prompt": "Open the drawer.", "args": args}) == "Open the drawer."
    assert video.prompt_of({"prompt": ["Open it.", "Pull."], "args": args}) == "Open it. / Pull."
    assert video.prompt_of({"args": args}) == "drawer-open-v3"
