"""Vectorised official Meta-World: several environments per worker process, shared memory.

A worker is this module run as a program (`python -m common.envs`), so that it never imports the
training script. Commands go through a socket, arrays through shared memory. A worker whose parent
is gone ends itself; a worker that fails ends the run with its traceback.
"""

import contextlib
import hashlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import traceback
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import mujoco
import numpy as np

from common.cores import ONE_THREAD, num_cores
from common.errors import UserError
from common.rendering import (
    KEPT_FACES,
    MIN_FACES,
    QUALITIES,
    WELD,
    Renderer,
    cached_arrays,
)
from common.tasks import expert_action, expert_policy, resolve_env_id

OBS_DIM, ACTION_DIM = 39, 4
MAX_EPISODE_STEPS = 500  # Meta-World's own limit
GOALS = ("fixed", "random", "random-hidden")
# What tasks move in the model itself when they are reset.
MODEL_FIELDS = ("body_pos", "body_quat", "site_pos", "site_quat", "geom_pos", "geom_quat",
                "eq_data")
PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION
# Some tasks keep views of these arrays as attributes, so that what they call an initial position
# moves along with the simulation.
VIEWED_FIELDS = ("xpos", "xipos", "site_xpos", "geom_xpos")
# Ctrl-C, and what terminals and schedulers send before they kill, to the whole job: the training
# process saves and ends (common/run.py), the workers wait for it.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
WORKER_MODULE = "common.envs"  # the program that a worker is; tools/trace.py has its own


class WorkerError(RuntimeError):
    """A worker process has failed; the text holds its traceback."""


class Step(NamedTuple):
    """One step of all environments; N = num_envs, all arrays are copies.

    An episode that is truncated starts again at once (Gymnasium's same-step autoreset).
    """

    obs: np.ndarray  # [N, 39] float32, what to act on next: a new episode's first where truncated
    final_obs: np.ndarray  # [N, 39] float32, the state reached: what belongs into the replay
    frames: np.ndarray | None  # [N, size, size, 3] uint8, picture of the state reached
    reset_frames: np.ndarray | None  # [N, size, size, 3], of `obs` where truncated (draw_resets)
    success: np.ndarray  # [N] bool
    sparse_reward: np.ndarray  # [N] float32, 1 on success, else 0
    terminated: np.ndarray  # [N] bool, always False: Meta-World's episodes end by time alone
    truncated: np.ndarray  # [N] bool


def make_env(env_id: str, *, seed: int, index: int, goal: str, show_goal: bool):
    """One official environment.

    `fixed`: Meta-World's own goal-hidden (or goal-observable) environment of `seed`. `random`: its
    goals come from a generator of (seed, index), so that they do not depend on the worker.
    """
    from metaworld.env_dict import (
        ALL_V3_ENVIRONMENTS_GOAL_HIDDEN,
        ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE,
    )

    if show_goal or goal == "random":
        env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{env_id}-goal-observable"](seed=seed)
    else:
        env = ALL_V3_ENVIRONMENTS_GOAL_HIDDEN[f"{env_id}-goal-hidden"](seed=seed)
    if goal != "fixed":
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env.np_random = np.random.default_rng(np.random.SeedSequence((seed, index)))
    return env


def get_env_state(env) -> dict[str, Any]:
    """Everything that the next steps of an environment depend on."""
    physics = np.empty(mujoco.mj_stateSize(env.model, PHYSICS))
    mujoco.mj_getState(env.model, env.data, physics, PHYSICS)
    plain = bool | int | float | str | np.ndarray | np.generic | None
    attributes, views = {}, {}
    for name, value in vars(env).items():
        if isinstance(value, np.ndarray) and (view := _view_of(env.data, value)):
            views[name] = view
        elif isinstance(value, plain):
            attributes[name] = value.copy() if isinstance(value, np.ndarray) else value
    return {
        "physics": physics,
        "model": {name: getattr(env.model, name).copy() for name in MODEL_FIELDS},
        "attributes": attributes,
        "views": views,
        "rng": env.np_random.bit_generator.state,
    }


def _view_of(data: mujoco.MjData, value: np.ndarray) -> tuple[str, int, int] | None:
    """The field, first element and size of the simulator's array that `value` is a view of."""
    for name in VIEWED_FIELDS:
        field = getattr(data, name)
        if np.may_share_memory(value, field):
            return name, (value.ctypes.data - field.ctypes.data) // field.itemsize, value.size
    return None


def set_env_state(env, state: dict[str, Any]) -> None:
    """Continue from what `get_env_state` returned."""
    for name, value in state["model"].items():
        getattr(env.model, name)[:] = value
    for name, value in state["attributes"].items():
        setattr(env, name, value.copy() if isinstance(value, np.ndarray) else value)
    for name, (field, start, size) in state["views"].items():
        setattr(env, name, getattr(env.data, field).reshape(-1)[start : start + size])
    env.np_random.bit_generator.state = state["rng"]
    mujoco.mj_setState(env.model, env.data, state["physics"], PHYSICS)
    mujoco.mj_forward(env.model, env.data)  # derived quantities; it also moves the warm start ...
    mujoco.mj_setState(env.model, env.data, state["physics"], PHYSICS)  # ... which is put back


def place_goal_marker(env) -> None:
    """Put the goal's marker where the goal is: Meta-World does so in `step` only."""
    for site in env._target_site_config:
        env._set_pos_site(*site)
    mujoco.mj_kinematics(env.model, env.data)


def _layout(num_envs: int, frame_size: int, draw_resets: bool) -> dict[str, tuple]:
    """Name -> (shape, dtype) of the shared arrays."""
    layout: dict[str, tuple] = {
        "obs": ((num_envs, OBS_DIM), np.float32),
        "final_obs": ((num_envs, OBS_DIM), np.float32),
        "actions": ((num_envs, ACTION_DIM), np.float32),
        "success": ((num_envs,), np.bool_),
        "truncated": ((num_envs,), np.bool_),
    }
    if frame_size:
        layout["frames"] = ((num_envs, frame_size, frame_size, 3), np.uint8)
    if frame_size and draw_resets:
        layout["reset_frames"] = layout["frames"]
    return layout


def _map_arrays(memory_fd: int, layout: dict[str, tuple]) -> dict[str, np.ndarray]:
    """The shared arrays in an anonymous memory file, each at a multiple of 64 bytes."""
    sizes = [-(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64
             for shape, dtype in layout.values()]
    if os.fstat(memory_fd).st_size == 0:
        os.ftruncate(memory_fd, sum(sizes))
    memory = mmap.mmap(memory_fd, sum(sizes))
    offsets = np.cumsum([0, *sizes[:-1]])
    return {
        name: np.frombuffer(memory, dtype, int(np.prod(shape)), int(offset)).reshape(shape)
        for (name, (shape, dtype)), offset in zip(layout.items(), offsets, strict=True)
    }


class VecMetaWorld:
    """N environments of one task in worker processes.

    Args:
        env_id: a task of `common.tasks`.
        num_envs: N.
        seed: decides the fixed goal, or the sequences of random goals.
        goal: `fixed`: hidden, one per seed, the same in all environments and episodes; `random`:
            new in every episode and part of the observation; `random-hidden`: new, not observed.
        frame_size: width and height of frames in pixels; 0: none are drawn.
        camera_id: id or name of the camera.
        quality: `fast` or `paper`.
        num_workers: processes; default: one per core, at most N.
        max_episode_steps: 1 to 500, physics steps.
        action_repeat: physics steps per call of `step`, all with the same action; only the last
            state is drawn and observed, and success at any of them counts.
        draw_resets: also draw the first state of new episodes.
        show_goal: put the goal into the observation whatever `goal` says (scripted experts need
            it).

    Attributes:
        obs_dim, action_dim: numbers in an observation and in an action.
        episode_length: actions in an episode.
        engine: the simulator and its version.

    Raises:
        UserError: an argument is not allowed, or frames cannot be drawn here.
        WorkerError: a worker has failed.
    """

    obs_dim, action_dim = OBS_DIM, ACTION_DIM
    resumes_episodes = True  # `set_state` goes on in the middle of an episode

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        seed: int,
        goal: str = "fixed",
        frame_size: int = 0,
        camera_id: int | str = 2,
        quality: str = "fast",
        num_workers: int | None = None,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        action_repeat: int = 1,
        draw_resets: bool = False,
        show_goal: bool = False,
    ):
        self.env_id, self.num_envs = resolve_env_id(env_id), num_envs
        self.engine = f"metaworld {metadata.version('metaworld')}, mujoco {mujoco.__version__}"
        if goal not in GOALS:
            raise UserError(f"unknown goal mode {goal!r}; allowed: {', '.join(GOALS)}")
        if quality not in QUALITIES:
            raise UserError(f"unknown quality {quality!r}; allowed: {', '.join(QUALITIES)}")
        if num_envs < 1 or frame_size < 0 or seed < 0:
            raise UserError(f"num_envs must be positive, frame_size and seed not negative; they "
                            f"are {num_envs}, {frame_size} and {seed}")
        if not 1 <= max_episode_steps <= MAX_EPISODE_STEPS:
            raise UserError(f"max_episode_steps must be 1 to {MAX_EPISODE_STEPS}, not "
                            f"{max_episode_steps}")
        if action_repeat < 1 or max_episode_steps % action_repeat:
            raise UserError(f"action_repeat must divide {max_episode_steps}, the steps of an "
                            f"episode, but is {action_repeat}")
        if num_workers is not None and num_workers < 1:
            raise UserError(f"num_workers must be positive, not {num_workers}")
        self.episode_length = max_episode_steps // action_repeat
        self.action_space = gymnasium.spaces.Box(-1, 1, (num_envs, ACTION_DIM), np.float32)
        self.observation_space = gymnasium.spaces.Box(
            -np.inf, np.inf, (num_envs, OBS_DIM), np.float32
        )
        layout = _layout(num_envs, frame_size, draw_resets)
        memory_fd = os.memfd_create("furl_envs")
        self._arrays = _map_arrays(memory_fd, layout)
        self._workers: list[tuple[subprocess.Popen, Connection]] = []
        self._is_stepping = False
        num_workers = min(num_workers or num_cores(), num_envs)
        for indices in np.array_split(np.arange(num_envs), num_workers):
            options = dict(
                env_id=self.env_id, indices=indices.tolist(), seed=seed, goal=goal,
                frame_size=frame_size, camera_id=camera_id, quality=quality,
                max_episode_steps=max_episode_steps, action_repeat=action_repeat,
                draw_resets=draw_resets, show_goal=show_goal, layout=layout,
            )
            self._workers.append(_start_worker(memory_fd, options))
        os.close(memory_fd)
        self._receive()  # all environments are built

    def reset(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Start new episodes; (obs [N, 39] float32, frames [N, size, size, 3] uint8 or None)."""
        self._send("reset")
        self._receive()
        frames = self._arrays.get("frames")
        return self._arrays["obs"].copy(), None if frames is None else frames.copy()

    def observations(self) -> np.ndarray:
        """The observations to act on, [N, 39] float32."""
        return self._arrays["obs"].copy()

    def step_async(self, actions: np.ndarray) -> None:
        """Let the workers step and draw; `actions` [N, 4], clipped to [-1, 1] by Meta-World."""
        if np.shape(actions) != self.action_space.shape:
            raise ValueError(f"actions must be {self.action_space.shape}, not {np.shape(actions)}")
        self._arrays["actions"][:] = actions
        self._send("step")
        self._is_stepping = True

    def step_wait(self) -> Step:
        """The result of `step_async`."""
        self._receive()
        self._is_stepping = False
        copies = {name: array.copy() for name, array in self._arrays.items() if name != "actions"}
        success = copies["success"]
        return Step(
            copies["obs"], copies["final_obs"], copies.get("frames"), copies.get("reset_frames"),
            success, success.astype(np.float32), np.zeros_like(success), copies["truncated"],
        )

    def step(self, actions: np.ndarray) -> Step:
        self.step_async(actions)
        return self.step_wait()

    def get_state(self) -> list[dict[str, Any]]:
        """The state of each environment: physics, goals, generators, counters, observation."""
        self._send("get_state")
        return [state for states in self._receive() for state in states]

    def set_state(self, states: list[dict[str, Any]]) -> np.ndarray:
        """Continue bit by bit from what `get_state` returned, with any number of workers.

        Returns:
            the observations to act on, [N, 39] float32.
        """
        self._send("set_state", states)
        self._receive()
        return self.observations()

    def close(self) -> None:
        """End the workers."""
        for process, connection in self._workers:
            connection.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._workers = []

    def __del__(self):
        if getattr(self, "_workers", None):
            self.close()

    def _send(self, command: str, payload: Any = None) -> None:
        if self._is_stepping:
            raise RuntimeError(f"{command} before step_wait")
        for process, connection in self._workers:
            try:
                connection.send((command, payload))
            except OSError:
                self._fail(process, connection)

    def _receive(self) -> list[Any]:
        replies = []
        for process, connection in self._workers:
            try:
                kind, reply = connection.recv()
            except (EOFError, OSError):
                self._fail(process, connection)
            if kind == "user error":
                self.close()
                raise UserError(reply)
            if kind == "error":
                self.close()
                raise WorkerError(f"an environment worker failed:\n{reply}")
            replies.append(reply)
        return replies

    def _fail(self, process: subprocess.Popen, connection: Connection) -> None:
        try:  # its last words, if it had time for them
            while connection.poll():
                kind, reply = connection.recv()
                if kind in ("error", "user error"):
                    self.close()
                    raise WorkerError(f"an environment worker failed:\n{reply}")
        except (EOFError, OSError):
            pass
        try:
            status = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = None
        self.close()
        how = f"by signal {-status}" if status is not None and status < 0 else f"status {status}"
        raise WorkerError(f"an environment worker has died ({how}) without a traceback: out of "
                          "memory, or killed from outside")


def _start_worker(memory_fd: int, options: dict) -> tuple[subprocess.Popen, Connection]:
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MUJOCO_GL": "egl",
        "FURL_ENV_WORKER": "1",
        **ONE_THREAD,
    }
    process = subprocess.Popen(
        # -P: a folder named `common` where the user happens to be is not ours.
        [sys.executable, "-P", "-m", WORKER_MODULE, str(theirs.fileno()), str(memory_fd)],
        pass_fds=(theirs.fileno(), memory_fd), env=environment, stdin=subprocess.DEVNULL,
        process_group=0,  # a terminal's Ctrl-C is not for it
    )
    theirs.close()
    connection = Connection(ours.detach())
    connection.send(options)
    return process, connection


def _work(connection: Connection, memory_fd: int) -> None:
    """A worker's life: build its environments, then answer commands until the socket closes."""
    options = connection.recv()
    arrays = _map_arrays(memory_fd, options["layout"])
    indices = options["indices"]
    envs = [
        make_env(options["env_id"], seed=options["seed"], index=i, goal=options["goal"],
                 show_goal=options["show_goal"])
        for i in indices
    ]
    renderer = None
    if options["frame_size"]:
        renderer = Renderer(
            envs[0].model, options["frame_size"], options["camera_id"], options["quality"]
        )
    connection.send(("ok", None))

    def reset(i: int, env, frames: str) -> None:
        arrays["obs"][i] = env.reset()[0]
        if renderer is not None and frames in arrays:
            place_goal_marker(env)
            arrays[frames][i] = renderer.render(env.model, env.data)

    while True:
        command, payload = connection.recv()
        reply = None
        if command == "step":
            for i, env in zip(indices, envs, strict=True):
                success = False
                for _ in range(options["action_repeat"]):
                    obs, _, _, truncated, info = env.step(arrays["actions"][i])
                    success |= bool(info["success"])
                truncated = truncated or env.curr_path_length >= options["max_episode_steps"]
                arrays["obs"][i] = arrays["final_obs"][i] = obs
                arrays["success"][i] = success
                arrays["truncated"][i] = truncated
                if renderer is not None:
                    arrays["frames"][i] = renderer.render(env.model, env.data)
                if truncated:
                    reset(i, env, "reset_frames")
        elif command == "reset":
            for i, env in zip(indices, envs, strict=True):
                reset(i, env, "frames")
        elif command == "get_state":
            reply = [get_env_state(env) | {"obs": arrays["obs"][i].copy()}
                     for i, env in zip(indices, envs, strict=True)]
        elif command == "set_state":
            for i, env in zip(indices, envs, strict=True):
                set_env_state(env, payload[i])
                arrays["obs"][i] = payload[i]["obs"]
        connection.send(("ok", reply))


def goal_image(
    env_id: str, *, seed: int, goal: str, size: int, camera_id: int | str = 2,
    quality: str = "fast",
) -> np.ndarray:
    """The picture at the scripted expert's first success, uint8 [size, size, 3], cached on disk.

    With a fixed goal it is the run's own; with random goals it is one goal's (B.2 of the paper).

    Raises:
        UserError: an argument is not allowed, or the expert does not succeed within 500 steps.
    """
    env_id = resolve_env_id(env_id)
    if goal not in GOALS:
        raise UserError(f"unknown goal mode {goal!r}; allowed: {', '.join(GOALS)}")

    def play() -> dict[str, np.ndarray]:
        env = make_env(env_id, seed=seed, index=0, goal=goal, show_goal=True)
        policy = expert_policy(env_id)
        obs, _ = env.reset()
        for _ in range(MAX_EPISODE_STEPS):
            obs, _, _, _, info = env.step(expert_action(policy, obs))
            if info["success"]:
                renderer = Renderer(env.model, size, camera_id, quality)
                picture = renderer.render(env.model, env.data)
                renderer.close()
                return {"picture": picture}
        raise UserError(f"the scripted expert fails on {env_id} with seed {seed}, so there is no "
                        "goal image: use --no-goal-image or another --seed")

    drawing = (KEPT_FACES, WELD, MIN_FACES) if quality == "fast" else ()
    settings = (goal, camera_id, quality, drawing, metadata.version("metaworld"),
                mujoco.__version__)
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    key = f"{env_id}-{seed}-{size}-{digest}"
    return cached_arrays("goal_images", key, play)["picture"]


def _main(socket_fd: int, memory_fd: int) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(socket_fd)
    last_words = None
    try:
        _work(connection, memory_fd)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has closed the socket, or is gone
    except UserError as error:
        last_words = ("user error", str(error))
    except Exception:
        last_words = ("error", traceback.format_exc())
    if last_words is not None:
        with contextlib.suppress(OSError):  # another worker's failure has already ended the run
            connection.send(last_words)
    # Not through the interpreter's shutdown: MuJoCo's GL context prints errors there.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
