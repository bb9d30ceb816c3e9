"""The VLM-RM paper's humanoid: poses and their conditions, pictures, and the report of VLMs."""

import csv
import json

import mujoco
import numpy as np
import pytest

import vlm_rm_baseline as vlm_rm
from common.envs import gymnasium_suite as suite
from common.envs import humanoid
from common.envs.humanoid import POSES, Body, set_pose
from common.envs.rendering import Camera
from tools import pose_report


@pytest.fixture(scope="module")
def env():
    made = humanoid.PosingHumanoid("Kneeling")
    made.reset(seed=0)
    return made


@pytest.mark.parametrize("pose", POSES)
def test_an_example_holds_its_own_condition_and_no_other(env, pose):
    """But for standing, which four other poses are as well."""
    set_pose(env, pose)
    held = {name for name in POSES if POSES[name].holds(Body(env.model, env.data))}
    standing = {"ArmsRaised", "HandsOnHips", "ArmsCrossed", "OneLeg"}
    assert held == ({pose, "StandingUp"} if pose in standing else {pose})


@pytest.mark.parametrize(("pose", "joint", "degrees"), [
    ("Kneeling", "left_knee", -10),  # one leg straight
    ("Lotus", "right_hip_z", 30),  # a knee inwards
    ("StandingUp", "abdomen_y", -75),  # which tips the legs' plane: the feet leave the floor
    ("ArmsRaised", "left_elbow", 50),
    ("Splits", "right_knee", -90),
    ("HandsOnHips", "left_shoulder2", -60),
    ("ArmsCrossed", "right_elbow", 50),
    ("ArmsCrossed", "left_shoulder2", 30),
    ("OneLeg", "left_knee", -150),
])
def test_one_wrong_joint_ends_a_pose(env, pose, joint, degrees):
    set_pose(env, pose)
    env.data.joint(joint).qpos[0] = np.radians(degrees)
    mujoco.mj_forward(env.model, env.data)
    assert not POSES[pose].holds(Body(env.model, env.data))


@pytest.mark.parametrize(("pose", "name", "joints"), [
    ("arms that hang", "HandsOnHips", {"shoulder1": 45, "shoulder2": -30, "elbow": -90}),
    ("front splits", "Splits", {"right_hip_y": -85, "left_hip_y": 20, "hip_x": -5, "hip_z": -20}),
    ("a squat", "StandingUp", {"hip_y": -60, "knee": -100}),
    ("hands before the face", "ArmsCrossed", {"shoulder1": -21, "shoulder2": 53, "elbow": -20}),
])
def test_what_resembles_a_pose_is_none(env, monkeypatch, pose, name, joints):
    monkeypatch.setitem(POSES, pose, humanoid.Pose("", POSES[name].holds, joints))
    set_pose(env, pose)
    assert not POSES[name].holds(Body(env.model, env.data))


def test_falling_and_lying_are_no_pose(env):
    set_pose(env, "StandingUp")
    env.data.qvel[0] = 3.0
    assert not POSES["StandingUp"].holds(Body(env.model, env.data))
    set_pose(env, "Kneeling")
    env.data.qpos[3:7] = (np.sqrt(0.5), np.sqrt(0.5), 0, 0)  # on its side
    mujoco.mj_forward(env.model, env.data)
    assert not POSES["Kneeling"].holds(Body(env.model, env.data))


def test_places_are_measured_in_metres(env):
    """On the lowest sphere stands the robot; a hand's place does not depend on where it stands."""
    set_pose(env, "StandingUp")
    body = Body(env.model, env.data)
    assert min(body.bottom(f"{side}_foot") for side in body.SIDES) == pytest.approx(0, abs=1e-9)
    assert body.bottom("head") == pytest.approx(env.data.geom("head").xpos[2] - 0.09)
    before = body.hand("left")
    assert before[1] > 0 > body.hand("right")[1]
    env.data.qpos[:2] = 1.0, -2.0
    env.data.qpos[3:7] = (np.sqrt(0.5), 0, 0, np.sqrt(0.5))  # turned to the left by 90 degrees
    mujoco.mj_forward(env.model, env.data)
    np.testing.assert_allclose(Body(env.model, env.data).hand("left"), before, atol=1e-9)


def test_an_episode_counts_the_steps_in_the_pose():
    """100 steps, no end before, reward 1 for each step in the pose; the states are v5's."""
    own = suite.make_env("HumanoidStandingUp-v0", seed=0, index=0, frame_size=0)
    plain = suite.make_env("Humanoid-v5", seed=0, index=0, frame_size=0)
    obs, expected = own.reset()[0], plain.reset()[0]
    rewards, rng = [], np.random.default_rng(0)
    for step in range(1, humanoid.EPISODE_LENGTH + 1):
        np.testing.assert_array_equal(obs, expected)
        action = 0.2 * rng.uniform(-1, 1, 17).astype(np.float32)
        obs, reward, terminated, truncated, info = own.step(action)
        expected, *_ = plain.step(action)
        rewards.append(reward)
        assert info["success"] == (sum(rewards) >= 50) and not terminated
        assert truncated == (step == humanoid.EPISODE_LENGTH)
    assert 0 < sum(rewards) < 50, "it lands on its feet, and falls without a policy"


def test_half_of_the_steps_in_the_pose_are_a_success(env, monkeypatch):
    """And a new episode counts from nothing."""
    for _ in range(2):
        env.reset(seed=1)
        holds = iter([True, False] * 20 + [True] * 60)
        monkeypatch.setattr(env, "holds", lambda body, holds=holds: next(holds))
        found = [env.step(np.zeros(17))[4]["success"] for _ in range(100)]
        assert found.index(True) == 40 + 30 - 1 and all(found[69:])


def test_three_looks_of_the_same_robot():
    """Figure 3: physics and observations are equal, pictures differ."""
    pictures, observations = [], []
    for look in humanoid.LOOKS:
        env_id = humanoid.env_id("Kneeling", look)
        envs = suite.VecGymnasium(env_id, 1, seed=0, camera=Camera(48, 0, "fast"))
        _, frames = envs.reset()
        observations.append(envs.step(np.full((1, 17), 0.3, np.float32)).final_obs)
        pictures.append(frames[0].astype(int))
        envs.close()
    np.testing.assert_array_equal(observations[0], observations[1])
    np.testing.assert_array_equal(observations[0], observations[2])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(pictures[a] - pictures[b]).mean() > 5


def test_vlm_rm_trains_on_a_pose(tmp_path):
    """Table 3's prompts; the evaluation's return is the steps in the pose."""
    run_dir = tmp_path / "run"
    vlm_rm.main(vlm_rm.Args(
        env_id="HumanoidKneeling-v0", num_envs=2, total_timesteps=400, learning_starts=100,
        batch_size=8, hidden_features=(8,), buffer_size=1000, eval_every=400, eval_episodes=1,
        checkpoint_every=0, log_every=200, run_dir=str(run_dir),
    ))
    config = json.loads((run_dir / "config.json").read_text())
    assert config["prompt"] == "a humanoid robot kneeling"
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = {(int(r["env_steps"]), r["key"]): float(r["value"]) for r in csv.DictReader(file)}
    assert rows[400, "eval/length"] == 100 and 0 <= rows[400, "eval/return"] <= 100


def test_the_report(tmp_path, capsys):
    pose_report.main(pose_report.Args(
        pose="Splits", look=("original", "camera"), vlm=("poses",), alpha=(0.0, 1.0), samples=10,
        output=tmp_path,
    ))
    out = capsys.readouterr().out
    assert "camera: 80 states" in out and "poses, original, alpha 1: EPIC distance" in out
    with open(tmp_path / "rewards.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 80
    goals = [row for row in rows if row["is_goal"] == "1"]
    assert 0 < len(goals) and {int(row["state"]) // 10 for row in goals} == {4}, "of its own pose"
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "original.png", "camera.png", "epic.png", "histograms.png"}


def test_a_baseline_that_is_the_goal(refused, tmp_path):
    """Its direction is 0 / 0: no reward that could be perfect."""
    refused(pose_report, ["--vlm", "poses", "--baseline-prompt", "a humanoid robot kneeling",
                          "--output", str(tmp_path / "no")],
            "--baseline-prompt 'a humanoid robot kneeling' means the same as the prompt")
    assert not (tmp_path / "no").exists()


def test_an_unknown_pose(refused):
    refused(pose_report, ["--pose", "Kneel"], "--pose Kneel is unknown; these are: Kneeling, Lotus")


def test_every_pose_and_look_is_registered():
    for pose in POSES:
        for look in humanoid.LOOKS:
            env_id = humanoid.env_id(pose, look)
            assert suite.SUITE.evaluated_on(env_id) == env_id
            assert suite.max_episode_steps(env_id) == 100
            assert suite.SUITE.prompt_for(env_id, None) == POSES[pose].prompt
            assert suite.SUITE.baseline_prompt_for(env_id, None) == "a humanoid robot"
