"""The reward report: figures by hand, episodes, the page, a whole report, what is refused."""

import base64
import json
import math
import re
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import furl_sac_state as furl
import sac_baseline as sac
import vlm_rm_baseline as vlm_rm
from common.envs.metaworld_suite import make_env
from common.envs.rendering import Camera
from common.errors import UserError
from common.evaluate import EVAL_SEED_OFFSET
from tools.reward_report import __main__ as report
from tools.reward_report.episodes import (
    EXPERT,
    RANDOM,
    SUBOPTIMAL,
    Data,
    Scene,
    draw_episodes,
    play_episode,
)
from tools.shared.measures import epic_distance, goal_baseline_reward, without_nan

NUM, EVERY = 6, 10  # pictures of an episode, steps between them


def data(num_goals: int = 4) -> Data:
    """The expert succeeds at step 35 and stays, others never do; embeddings are random."""
    rng = np.random.default_rng(0)
    success = np.zeros((num_goals, 3, NUM), bool)
    success[:, EXPERT, 4:] = True
    first = np.full((num_goals, 3), -1)
    first[:, EXPERT] = 35
    return Data(rng.normal(size=(num_goals, 3, NUM, 8)).astype(np.float32), {}, success, first,
                np.zeros((3, NUM, 8, 8, 3), np.uint8))


def test_a_reward_that_is_success_or_its_opposite():
    d = data()
    ramp = np.arange(NUM) * 0.01  # rises within each episode, far less than success does
    good = report.measure(d.success + ramp, d, EVERY, seed=0)
    assert good["spearman"] == pytest.approx(1) and good["spearman_standard_error"] == 0
    assert good["auc"] == good["auc_suboptimal"] == 1 and good["auc_95"] == [1, 1]
    assert good["fooled"] == 0
    exact = report.measure(5.0 * d.success - 1, d, EVERY, seed=0)
    assert exact["epic"] == pytest.approx(0, abs=1e-6)
    assert math.isnan(exact["spearman"])  # constant until success
    bad = report.measure(-1.0 * d.success - ramp, d, EVERY, seed=0)
    assert bad["spearman"] == pytest.approx(-1) and bad["auc"] == 0 and bad["fooled"] == 1
    assert report.measure(-1.0 * d.success, d, EVERY, seed=0)["epic"] == pytest.approx(1)


def test_fooled_counts_sub_optimal_episodes():
    """Success scores 1; in one of four sub-optimal episodes a failure does, too."""
    d = data()
    reward = d.success.astype(float)
    reward[2, SUBOPTIMAL, 3] = 1.0
    reward[:, RANDOM] = 1.0
    figures = report.measure(reward, d, EVERY, seed=0)
    assert figures["fooled"] == 0.25
    # Against the 24 sub-optimal frames: 23 won, 1 tied.
    assert figures["auc_suboptimal"] == pytest.approx(23.5 / 24)


def test_fooled_compares_with_the_median_of_success():
    """Half of the frames in success score 1, the other half 3, but for one with 9: it is 2."""
    d = data()
    reward = np.zeros((4, 3, NUM))
    reward[:, EXPERT, 4], reward[:, EXPERT, 5], reward[0, EXPERT, 5] = 1, 3, 9
    reward[1, SUBOPTIMAL, 3], reward[2, SUBOPTIMAL, 3] = 2.1, 1.9  # the mean is 2.75
    assert report.measure(reward, d, EVERY, seed=0)["fooled"] == 0.25


def test_the_interval_is_of_goals():
    """Of two goals one is ranked rightly and one wrongly: a quarter of resamples has one twice. And
    whatever is drawn, a picture keeps its own label."""
    d = data(2)
    reward = d.success.astype(float)
    reward[1] = 1 - reward[1]
    assert report.measure(reward, d, EVERY, seed=0)["auc_95"] == [0, 1]
    d.success[0, EXPERT, 1:] = True  # another number of pictures in success
    assert report.measure(d.success.astype(float), d, EVERY, seed=0)["auc_95"] == [1, 1]


def test_spearman_ends_at_the_first_success():
    """What comes after step 35 does not count: pictures of the steps 0 to 30 do."""
    d = data()
    reward = np.zeros((4, 3, NUM))
    reward[:, EXPERT] = [0, 1, 2, 3, -9, -9]
    assert report.measure(reward, d, EVERY, seed=0)["spearman"] == pytest.approx(1)


def test_without_success_nothing_is_claimed():
    d = data()._replace(success=np.zeros((4, 3, NUM), bool), first_success=np.full((4, 3), -1))
    figures = report.measure(np.random.default_rng(0).normal(size=(4, 3, NUM)), d, EVERY, seed=0)
    assert all(math.isnan(figures[k]) for k in ("spearman", "auc", "fooled", "epic"))
    level, words = report.verdict(figures)
    assert level == "unknown" and "did not succeed" in words
    assert without_nan(figures)["auc_95"] == [None, None]


def test_a_reward_that_is_not_finite_is_neither_measured_nor_compared():
    d = data()
    reward = 5.0 * d.success
    reward[0, SUBOPTIMAL, 0] = np.nan  # a failure that scores like nothing fools nobody
    figures = report.measure(reward, d, EVERY, seed=0)
    assert all(math.isnan(figures[k]) for k in ("auc", "auc_suboptimal", "fooled", "epic"))
    vlm = types.SimpleNamespace(embed_dim=8, name="mini")
    with pytest.raises(UserError, match=r"the reward of “Go\.” is not finite for 72 of 72"):
        report.build_rewards(d, {"Go.": np.full(8, np.nan)}, {}, vlm)


def test_only_prompts_that_mean_something_are_compared():
    figures = {name: {"kind": kind, "auc": auc} for name, kind, auc in (
        ("a", "raw", 0.6), ("b", "raw", math.nan), ("c", "raw", 0.9), ("d", "checkpoint", 1.0))}
    assert report.comparable(figures, set()) == ["a", "c"]
    assert report.comparable(figures, {"c"}) == ["a"]


@pytest.mark.parametrize(("spearman", "auc", "fooled", "level"), [
    (0.8, 0.95, 0.1, "good"),
    (0.8, 0.95, 0.5, "fuzzy"),
    (0.5, 0.95, 0.1, "fuzzy"),
    (0.8, 0.55, 0.1, "misleading"),
    (-0.3, 0.95, 0.1, "misleading"),
    (0.8, math.nan, 0.1, "unknown"),
])
def test_verdicts(spearman, auc, fooled, level):
    got, words = report.verdict({"spearman": spearman, "auc": auc, "fooled": fooled})
    assert got == level
    assert ("does not rise" in words) == (spearman < 0.2)
    if level != "unknown":
        assert words.endswith(report.ADVICE["raw"][level])


def test_epic_by_alpha_against_the_script():
    d = data()
    text, baseline = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    curve = report.epic_by_alpha(text, baseline, d)
    images, labels = d.embeddings.reshape(-1, 8), d.success.ravel()
    assert len(curve) == len(report.ALPHAS) == 11
    assert curve[0] == pytest.approx(
        epic_distance(report.cosine_similarity(text, images), labels), abs=1e-5)
    regularised = np.asarray(vlm_rm.goal_baseline_reward(text, baseline, images, 0.3))
    np.testing.assert_allclose(
        goal_baseline_reward(text, baseline, images, 0.3), regularised, atol=1e-6)
    assert curve[3] == pytest.approx(epic_distance(regularised, labels), abs=1e-6)
    assert report.epic_by_alpha(text, 2 * text, d) is None


def test_the_goal_picture_is_of_a_goal_on_which_the_expert_succeeds(monkeypatch):
    """Random goals: up to five are tried, none of them the report's own; a fixed goal: that one."""
    tried, works = [], {1_000_007}

    def picture(env_id, *, seed, goal, camera):
        tried.append(seed)
        if seed in works:
            return "picture"
        raise UserError("the scripted expert fails on it")

    monkeypatch.setattr(report, "goal_image", picture)
    assert report.goal_picture("reach-v3", "random", 3, Camera(112)) == "picture"
    assert tried == [1_000_006, 1_000_007]
    works.clear()
    assert report.goal_picture("reach-v3", "random", 3, Camera(112)) is None and len(tried) == 7
    assert report.goal_picture("reach-v3", "fixed", 3, Camera(112)) is None and tried[7:] == [3]


# ---------------------------------------------------------------------------- episodes


def test_the_expert_gives_up_when_told():
    env = make_env("drawer-close-v3", seed=0, index=0, goal="fixed", show_goal=True)
    rng = np.random.default_rng(0)
    whole, success, _ = play_episode(env, "drawer-close-v3", 0.0, rng, num_steps=120)
    assert whole.shape[0] == success.shape[0] == 121 and success[-1] and not success[0]
    part, failed, _ = play_episode(env, "drawer-close-v3", 0.0, rng, num_steps=120, give_up=20)
    np.testing.assert_array_equal(part[:21], whole[:21])
    assert np.abs(part[22] - whole[22]).max() > 1e-6 and not failed[:40].any()


def test_one_goal_three_behaviours_whatever_was_drawn_before():
    scene = Scene("drawer-close-v3", "random", 3, 100, 20, Camera(48))
    first, second = draw_episodes(scene, 0), draw_episodes(scene, 1)
    assert second.frames.shape == (3, 6, 48, 48, 3) and second.success.shape == (3, 6)
    assert second.first_success[0] > 0 and second.success[0, -1]
    assert not second.success[RANDOM].any()
    for kind in (1, 2):  # the same goal: the same beginning
        np.testing.assert_array_equal(second.frames[0, 0], second.frames[kind, 0])
        assert (second.frames[0, -1] != second.frames[kind, -1]).any()
    assert (first.frames[0, 0] != second.frames[0, 0]).any()
    again = draw_episodes(scene, 1)
    for a, b in zip(second, again, strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------ reports

TINY = dict(env_id="drawer-close-v3", num_envs=4, total_timesteps=8, learning_starts=100,
            batch_size=8, buffer_size=2000, hidden_features=(16,))
SMALL = dict(env_id="drawer-close-v3", episodes=2, steps=100, every=10)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """A FuRL run and a SAC run, too short for an update."""
    folder = tmp_path_factory.mktemp("runs")
    furl.main(furl.Args(**TINY, run_dir=str(folder / "furl")))
    sac.main(sac.Args(**TINY, goal="random", eval_episodes=1, run_dir=str(folder / "sac")))
    return folder / "furl", folder / "sac"


def test_raw_pixels_are_those_of_the_middle():
    frames = np.random.default_rng(0).integers(0, 256, (2, 176, 176, 3), np.uint8)
    pixels = report.middle_pixels(frames)
    assert pixels.shape == (2, 3 * 32 * 32)
    framed, other = frames.copy(), frames.copy()
    framed[:, :22] = framed[:, :, -22:] = 0  # an eighth of the picture
    other[:, 22] = 0
    np.testing.assert_array_equal(report.middle_pixels(framed), pixels)
    assert not np.array_equal(report.middle_pixels(other), pixels)


def test_a_report_of_two_prompts_and_two_runs(runs, tmp_path, capsys):
    prompts = ("Push and close a drawer.", "<b>Open</b> & shut")
    args = report.Args(**SMALL, prompt=prompts, checkpoints=runs, workers=1, goal="random",
                       output=tmp_path / "out")
    results = report.main(args)
    assert "written in" in capsys.readouterr().out
    names = {f"“{p}”" for p in prompts} | {"furl", "goal picture, mini",
                                           "goal picture, raw pixels"}
    assert set(results["rewards"]) == names
    for what in ("mini", "raw pixels"):  # pictures near to that of success are those of success
        assert results["rewards"][f"goal picture, {what}"]["auc"] > 0.7
    assert results["success"]["expert"] == 1 and "2 random goals" in results["setting"]
    assert results["frames"] == 2 * 3 * 11
    assert results["seed"] == 2 * EVAL_SEED_OFFSET, "goals of training would be no test"
    assert any("furl was trained with goal fixed" in note for note in results["notes"])
    stored = json.loads((tmp_path / "out/report.json").read_text())
    assert stored["rewards"].keys() == names and len(stored["epic_by_alpha"]["alpha"]) == 11
    # At alpha 0 the regularised reward is the plain one.
    for prompt in prompts:
        assert stored["epic_by_alpha"][prompt][0] == pytest.approx(
            stored["rewards"][f"“{prompt}”"]["epic"], abs=1e-4)
    pictures = {f.stem for f in (tmp_path / "out").glob("*.png")}
    assert pictures == {"curves", "frames", "histograms", "epic", "paths"}
    page = (tmp_path / "out/report.html").read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(embedded) == 5
    assert all(base64.b64decode(e).startswith(b"\x89PNG") for e in embedded)
    text = re.sub(r'base64,[^"]+', "", page)  # pictures may spell anything
    assert "http" not in text and "<b>Open</b>" not in text
    assert "&lt;b&gt;Open&lt;/b&gt; &amp; shut" in page
    with pytest.raises(ValueError, match="exists: choose another --output"):
        report.main(args)


def test_the_same_report_with_any_number_of_workers(tmp_path, monkeypatch):
    """A fixed goal: the expert's actions get noise, so that its episodes differ.

    While the second one is made another takes its folder: neither is lost.
    """
    def make(workers: int, output: Path):
        results = report.main(report.Args(**SMALL, goal="fixed", seed=1, workers=workers,
                                          output=output))
        results.pop("args")
        return results

    one, collect = make(1, tmp_path / "1"), report.collect
    monkeypatch.setattr(report, "collect", lambda *args: (
        (tmp_path / "2").mkdir(), collect(*args))[1])
    two = make(2, tmp_path / "2")
    assert one["rewards"] == two["rewards"] and one == two
    assert (tmp_path / "1/curves.png").read_bytes() == (tmp_path / "2-2/curves.png").read_bytes()
    assert not list((tmp_path / "2").iterdir())


def test_paths_are_those_of_the_end_effector(runs):
    ways = report.paths(report.open_run(runs[0]), "drawer-close-v3")
    assert [w.shape for w in ways["policy"]] == [(501, 3)] and len(ways["expert"]) == 1
    expert = ways["expert"][0]
    np.testing.assert_allclose(ways["policy"][0][0], expert[0], atol=1e-6)  # one start
    assert np.linalg.norm(expert[-1] - expert[0]) > 0.1
    assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), ways))


@pytest.mark.parametrize(("flags", "message"), [
    (["--env-id", "drawer-opn-v3"], "did you mean drawer-open-v3"),
    (["--prompt", " "], "--prompt must not be empty"),
    (["--env-id", "reach-v3", "--prompt", "long"], "Table 6's, which has it only for"),
    (["--episodes", "1"], "--episodes must be 2 or more"),
    (["--steps", "8"], "--steps must be four times --every 4"),
    (["--steps", "500"], "below 500"),
    (["--vlm", "RN51/openai"], "unknown VLM 'RN51/openai'"),
    (["--camera-id", "99"], "unknown camera 99"),
    (["--checkpoints", "/nowhere"], "/nowhere: no such folder"),
    (["--env-id", "reach-v3", "--checkpoints", "RUN"], "was trained on drawer-close-v3, not on"),
    (["--env-id", "drawer-close-v3", "--vlm", "clip", "--checkpoints", "RUN"],
     "was trained with --vlm mini, not clip"),
    (["--env-id", "drawer-close-v3", "--camera-id", "1", "--checkpoints", "RUN"],
     "was trained with --camera-id 2, not 1"),
    (["--output", "/proc/report"], "/proc/report cannot be written"),
    (["--output", "."], "exists: choose another --output"),
])
def test_bad_input_ends_with_one_line_and_status_2(
    flags, message, runs, tmp_path, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    flags = [str(runs[0]) if f == "RUN" else f for f in flags]
    refused(report, flags, message)
    assert not list(tmp_path.iterdir())


def test_a_run_without_its_checkpoints_has_no_reward(runs, tmp_path):
    """Its kept policies hold no projection heads."""
    folder = shutil.copytree(runs[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="which is in checkpoints"):
        report.main(report.Args(**SMALL, checkpoints=(folder,), workers=1,
                                output=tmp_path / "out"))


def test_runs_of_one_name_are_told_apart():
    """The cells of a grid are called by their seeds."""
    def names(*paths: str) -> list[str]:
        return report.distinct_names([Path(path) for path in paths])

    assert names() == [] and names("/a/b/0", "/a/c/1") == ["0", "1"]
    assert names("/furl/reach/0", "/sac/reach/0", "/sac/push/0") == [
        "furl/reach/0", "sac/reach/0", "sac/push/0"]
    with pytest.raises(UserError, match="a folder twice"):
        names("/a/0", "/b/0", "/a/0")
