"""Vectorised Meta-World: episodes, goals, determinism, exact states, faults."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from common.envs.metaworld_suite import (
    VecMetaWorld,
    get_env_state,
    goal_image,
    make_env,
    set_env_state,
)
from common.envs.metaworld_tasks import MT10, expert_action, expert_policy
from common.envs.rendering import Camera
from common.envs.workers import STOP_SIGNALS, WorkerError
from common.errors import UserError


def actions(num_steps: int, num_envs: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (num_steps, num_envs, 4)).astype(np.float32)


def play(envs: VecMetaWorld, sequence: np.ndarray) -> list:
    return [envs.step(action) for action in sequence]


def make(num_envs: int = 3, **options) -> VecMetaWorld:
    return VecMetaWorld("drawer-open-v3", num_envs, **({"seed": 0} | options))


def test_the_final_observation_is_kept_at_truncation():
    short, long = make(max_episode_steps=5), make()
    first_obs, frames = short.reset()
    long.reset()
    assert frames is None and first_obs.dtype == np.float32 and first_obs.shape == (3, 39)
    sequence = actions(5, 3)
    steps, reference = play(short, sequence), play(long, sequence)
    for step, other in zip(steps[:-1], reference[:-1], strict=True):
        assert not step.truncated.any()
        np.testing.assert_array_equal(step.obs, step.final_obs)
        np.testing.assert_array_equal(step.obs, other.obs)
    last = steps[-1]
    assert last.truncated.all() and not last.terminated.any()
    np.testing.assert_array_equal(last.final_obs, reference[-1].final_obs)
    np.testing.assert_array_equal(last.obs, first_obs)  # a fixed goal starts alike every time
    assert np.abs(last.final_obs - last.obs).max() > 1e-3
    assert not reference[-1].truncated.any()


def test_a_seed_gives_the_same_episodes_whatever_the_number_of_workers():
    results = []
    for num_workers in (1, 2):
        envs = make(goal="random", num_workers=num_workers, max_episode_steps=6)
        results.append((envs.reset()[0], play(envs, actions(15, 3))))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    for one, two in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(one.obs, two.obs)
        np.testing.assert_array_equal(one.final_obs, two.final_obs)


def test_a_fixed_goal_is_the_same_everywhere_and_belongs_to_the_seed():
    def goals(seed: int) -> np.ndarray:
        envs = make(2, seed=seed, show_goal=True, max_episode_steps=2)
        starts = [envs.reset()[0], play(envs, actions(2, 2))[-1].obs]
        return np.concatenate(starts)[:, -3:]

    zero, one = goals(0), goals(1)
    assert (zero == zero[0]).all() and (one == one[0]).all()
    assert np.abs(zero[0]).max() > 0 and not np.array_equal(zero[0], one[0])


def test_a_fixed_goal_is_hidden():
    envs = make()
    assert (envs.reset()[0][:, -3:] == 0).all()
    assert (play(envs, actions(2, 3))[-1].obs[:, -3:] == 0).all()


def test_random_goals_differ_and_are_seen_unless_hidden():
    envs = make(goal="random", max_episode_steps=2)
    first = envs.reset()[0][:, -3:]
    second = play(envs, actions(2, 3))[-1].obs[:, -3:]
    goals = np.concatenate([first, second])
    assert len(np.unique(goals, axis=0)) == 6
    hidden = make(goal="random-hidden", max_episode_steps=2)
    start = hidden.reset()[0]
    assert (start[:, -3:] == 0).all()
    # The same generator: what is observed of the scene is that of the visible goals.
    np.testing.assert_array_equal(start[:, :36], make(goal="random").reset()[0][:, :36])


@pytest.mark.parametrize("goal", ["fixed", "random"])
def test_a_state_continues_exactly_with_other_workers_and_across_episodes(goal):
    options = {"goal": goal, "max_episode_steps": 12, "camera": Camera(32)}
    envs = make(num_workers=2, **options)
    envs.reset()
    play(envs, actions(7, 3))
    state = envs.get_state()
    sequence, obs = actions(20, 3, seed=1), envs.observations()
    expected = play(envs, sequence)
    other = make(num_workers=1, **options)
    assert other.resumes_episodes
    np.testing.assert_array_equal(other.set_state(state), obs)
    np.testing.assert_array_equal(other.observations(), obs)
    for one, two in zip(expected, play(other, sequence), strict=True):
        for name in ("obs", "final_obs", "frames", "success", "truncated"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


# Tasks whose attributes are views of the simulator's arrays, and one that moves its model.
@pytest.mark.parametrize("task", ["door-lock-v3", "soccer-v3", "sweep-v3", "assembly-v3"])
def test_a_state_continues_exactly_with_the_dense_reward(task):
    env = make_env(task, seed=0, index=0, goal="random", show_goal=True)
    policy, (obs, _) = expert_policy(task), env.reset()
    for _ in range(40):
        obs = env.step(expert_action(policy, obs))[0]
    state = get_env_state(env)
    other = make_env(task, seed=3, index=1, goal="random", show_goal=True)
    other.reset()
    set_env_state(other, state)
    for number, action in enumerate(actions(30, 1)[:, 0]):
        if number == 20:
            np.testing.assert_array_equal(env.reset()[0], other.reset()[0])
        one, two = env.step(action), other.step(action)
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1] == two[1] and one[4]["success"] == two[4]["success"]


@pytest.mark.parametrize(("options", "length"), [
    ({}, 500), ({"max_episode_steps": 6}, 6), ({"max_episode_steps": 6, "action_repeat": 3}, 2),
])
def test_what_scripts_need_to_know(options, length):
    """Sizes, episodes counted in actions, and the observations to act on."""
    envs = make(2, **options)
    obs, _ = envs.reset()
    assert (envs.obs_dim, envs.action_dim) == (obs.shape[1], envs.action_space.shape[1]) == (39, 4)
    assert envs.episode_length == length
    np.testing.assert_array_equal(envs.observations(), obs)
    for number, action in enumerate(actions(4, 2), start=1):
        step = envs.step(action)
        assert (step.truncated == (number % length == 0)).all()
        assert np.abs(envs.observations() - obs).max() > 1e-4 or number % length == 0
        obs = envs.observations()
        np.testing.assert_array_equal(obs, step.obs)
        obs[:] = 77  # a copy: nobody else sees that
        assert not (envs.observations() == 77).any()
        obs = envs.observations()


def test_a_success_at_any_repeated_step_counts():
    """Hands move through their goals; of some, success ends between two repeated steps."""
    single, repeated = (VecMetaWorld("reach-v3", 6, seed=0, goal="random", num_workers=1,
                                     action_repeat=repeat) for repeat in (1, 2))
    obs, _ = single.reset()
    repeated.reset()
    found = []
    for number in range(70):
        action = np.zeros((6, 4), np.float32)
        action[:, :3] = np.clip(10 * (obs[:, 36:39] - obs[:, :3]), -1, 1) if number < 50 else 1
        both = [single.step(action) for _ in range(2)]
        obs, step = both[1].obs, repeated.step(action)
        np.testing.assert_array_equal(step.obs, obs)
        np.testing.assert_array_equal(step.reward, step.success)
        found.append((both[0].success, both[1].success, step.success))
    first, second, either = np.swapaxes(found, 0, 1)
    np.testing.assert_array_equal(either, first | second)
    assert (first & ~second).any() and (second & ~first).any()


def test_frames_show_the_state_reached_and_reset_frames_the_new_episode():
    envs = make(2, camera=Camera(48), max_episode_steps=4, draw_resets=True)
    _, first = envs.reset()
    step = play(envs, np.ones((4, 2, 4), np.float32))[-1]
    assert step.frames.shape == (2, 48, 48, 3) and step.frames.dtype == np.uint8
    np.testing.assert_array_equal(step.reset_frames, first)
    assert np.abs(step.frames.astype(int) - first).mean() > 0.3


def test_only_the_first_environments_are_drawn_if_asked():
    """Also where a worker has none to draw."""
    envs, all_drawn = (make(3, camera=Camera(48), max_episode_steps=4, draw_resets=True,
                            num_workers=2, num_drawn=n) for n in (1, None))
    (_, frames), (_, expected) = envs.reset(), all_drawn.reset()
    np.testing.assert_array_equal(frames[0], expected[0])
    assert expected.any((1, 2, 3)).all() and len(frames) == 1
    for step, other in zip(*(play(e, actions(5, 3)) for e in (envs, all_drawn)), strict=True):
        np.testing.assert_array_equal(step.obs, other.obs)
        np.testing.assert_array_equal(step.frames[0], other.frames[0])
        np.testing.assert_array_equal(step.reset_frames[0], other.reset_frames[0])
        assert step.drawn.tolist() == [True, False, False] and len(step.frames) == 1
    envs.close()
    all_drawn.close()


@pytest.mark.parametrize("task", MT10)
def test_scripted_experts_succeed_through_these_environments(task):
    envs = VecMetaWorld(task, 2, seed=1, goal="random", show_goal=True)
    obs, _ = envs.reset()
    policy = expert_policy(task)
    succeeded = np.zeros(2, bool)
    for _ in range(500):
        step = envs.step(np.stack([expert_action(policy, o) for o in obs]))
        assert (step.reward == step.success).all()
        succeeded |= step.success
        obs = step.obs
        if succeeded.all():
            break
    envs.close()
    assert succeeded.all()


def test_a_goal_image_shows_another_scene_than_the_start_and_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("FURL_CACHE_DIR", str(tmp_path))
    picture = goal_image("drawer-close-v3", seed=0, goal="fixed", camera=Camera(64))
    envs = VecMetaWorld("drawer-close-v3", 1, seed=0, camera=Camera(64))
    start = envs.reset()[1][0]
    assert np.abs(picture.astype(int) - start).mean() > 0.5
    files = list(tmp_path.rglob("goal_images/*.npz"))
    assert len(files) == 1
    files[0].write_bytes(b"damaged")
    np.testing.assert_array_equal(
        goal_image("drawer-close-v3", seed=0, goal="fixed", camera=Camera(64)), picture
    )


def test_each_seeds_goal_image_is_of_its_own_goal(tmp_path, monkeypatch):
    monkeypatch.setenv("FURL_CACHE_DIR", str(tmp_path))
    one, two = (goal_image("drawer-close-v3", seed=seed, goal="fixed", camera=Camera(64))
                for seed in (1, 2))
    assert (one != two).any()


def test_a_goal_image_says_what_is_wrong():
    with pytest.raises(UserError, match="did you mean drawer-close-v3"):
        goal_image("drawer-closed", seed=0, goal="fixed", camera=Camera(64))
    with pytest.raises(UserError, match="unknown goal mode"):
        goal_image("drawer-close-v3", seed=0, goal="moving", camera=Camera(64))


def test_a_killed_worker_is_an_error_and_no_hang(real_workers):
    envs = make(num_workers=2)
    envs.reset()
    os.kill(envs._workers[1][0].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="has died"):
        for action in actions(3, 3):
            envs.step(action)


def test_a_worker_that_raises_ends_with_its_traceback():
    envs = make(1)
    envs.reset()
    state = envs.get_state()
    state[0]["physics"] = state[0]["physics"][:-1]  # does not fit the model
    with pytest.raises(WorkerError, match=r"Traceback(.|\n)*set_env_state"):
        envs.set_state(state)


def test_workers_end_with_their_environments(real_workers):
    envs = make(num_workers=2)
    processes = [process for process, _ in envs._workers]
    envs.close()
    deadline = time.monotonic() + 10
    while any(process.poll() is None for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(
        "import os, signal\n"
        "from common.envs.metaworld_suite import VecMetaWorld\n"
        "envs = VecMetaWorld('reach-v3', 2, seed=0, num_workers=2)\n"
        "print(*[process.pid for process, _ in envs._workers], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Started where another package has the name of ours.
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "cores.py").write_text("raise RuntimeError('the wrong module')")
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(
        [sys.executable, "-P", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=120,
    )
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2, result.stderr
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:  # a zombie has ended, whoever has to collect it
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def test_actions_of_the_wrong_shape_are_refused():
    envs = make(2)
    envs.reset()
    with pytest.raises(ValueError, match=r"actions must be \(2, 4\)"):
        envs.step(np.zeros(4, np.float32))


def test_steps_go_on_while_the_caller_does_something_else():
    envs = make(2, camera=Camera(32))
    envs.reset()
    envs.step(np.zeros((2, 4), np.float32))
    before = envs._arrays["obs"].copy()
    envs.step_async(np.ones((2, 4), np.float32))
    deadline = time.monotonic() + 10
    while np.array_equal(envs._arrays["obs"], before):  # it changes without step_wait
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert envs.step_wait().obs.shape == (2, 39)


def test_nothing_else_may_happen_between_step_async_and_step_wait():
    envs = make(1)
    envs.reset()
    envs.step_async(np.zeros((1, 4), np.float32))
    with pytest.raises(RuntimeError, match="reset before step_wait"):
        envs.reset()
    assert envs.step_wait().obs.shape == (1, 39)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env_id": "drawer-opn-v3"}, "did you mean drawer-open-v3"),
        ({"goal": "moving"}, "allowed: fixed, random, random-hidden"),
        ({"camera": Camera(32, quality="best")}, "allowed: fast, paper"),
        ({"camera": Camera(32, 77)}, "unknown camera 77"),
    ],
)
def test_bad_arguments_say_what_is_allowed(options, message):
    options = {"env_id": "drawer-open-v3", "num_envs": 1, "seed": 0} | options
    with pytest.raises(UserError, match=message):
        VecMetaWorld(options.pop("env_id"), options.pop("num_envs"), **options)


def test_workers_leave_signals_to_the_process_that_trains(real_workers):
    """A scheduler sends them to the whole job; the worker must live until the run is saved."""
    envs = make(1, max_episode_steps=4)
    envs.reset()
    [(process, _)] = envs._workers
    assert os.getpgid(process.pid) != os.getpgid(0), "a terminal's Ctrl-C does not reach it"
    for number in STOP_SIGNALS:
        process.send_signal(number)
        for _ in range(3):
            assert envs.step(np.zeros((1, 4))).obs.shape == (1, 39)
    envs.close()


@pytest.mark.parametrize(("every", "times"), [(3, [1, 3, 6, 7]), (4, [1, 4, 7]), (50, [1, 7])])
def test_frames_are_drawn_every_k_th_step(every, times):
    """After the first step of an episode, every k-th, and the last; between them the older one."""
    drawn, all_drawn = (make(2, max_episode_steps=7, camera=Camera(size=64), draw_every=k,
                             draw_resets=True, num_workers=1) for k in (every, 1))
    sequence = actions(14, 2)
    for envs in (drawn, all_drawn):
        envs.reset()
    steps, reference = play(drawn, sequence), play(all_drawn, sequence)
    for i, (step, other) in enumerate(zip(steps, reference, strict=True)):
        time = i % 7 + 1
        assert step.drawn.tolist() == [time in times] * 2 and other.drawn.all()
        newest = max(t for t in times if t <= time) + i - time
        np.testing.assert_array_equal(step.frames, reference[newest].frames)
        np.testing.assert_array_equal(step.obs, other.obs)
    np.testing.assert_array_equal(steps[6].reset_frames, reference[6].reset_frames)
    for envs in (drawn, all_drawn):
        envs.close()
