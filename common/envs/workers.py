"""Vectorised environments: several per worker process, arrays in shared memory.

A worker is this module run as a program (`python -m common.envs.workers`), so that it never imports
the training script. It knows no suite: it imports the module whose name it is given, and uses its
SUITE. Commands go through a socket, arrays through shared memory. A worker whose parent
is gone ends itself; a worker that fails ends the run with its traceback.
"""

import contextlib
import importlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import traceback
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from common.cores import ONE_THREAD, num_cores
from common.envs.rendering import Camera
from common.envs.suite import Suite
from common.errors import UserError
from common.system import memory_file, python_path

# Ctrl-C, and what terminals and schedulers send before they kill, to the whole job: the training
# process saves and ends (common/run.py), the workers wait for it.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
WORKER_MODULE = "common.envs.workers"  # the program that a worker is; tools/trace.py has its own


class WorkerError(RuntimeError):
    """A worker process has failed; the text holds its traceback."""


class Step(NamedTuple):
    """One step of all environments; N = num_envs, all arrays are copies.

    An episode that has ended starts again at once (Gymnasium's same-step autoreset).
    """

    obs: np.ndarray  # [N, obs_dim] float32, what to act on next: after an end a new episode's
    final_obs: np.ndarray  # [N, obs_dim] float32, the state reached: belongs into the replay
    frames: np.ndarray | None  # [N, size, size, 3] uint8, what the camera draws of `final_obs`
    reset_frames: np.ndarray | None  # [N, size, size, 3], of `obs` where one ended (draw_resets)
    success: np.ndarray  # [N] bool
    reward: np.ndarray  # [N] float32, the task's; where that is sparse 1 on success, else 0
    terminated: np.ndarray  # [N] bool, the task is over: nothing follows the state reached
    truncated: np.ndarray  # [N] bool, the episode's time is up
    drawn: np.ndarray | None = None  # [N] bool, where `frames` is new; else it is an older one

    @property
    def ended(self) -> np.ndarray:
        """Where an episode has ended, [N] bool."""
        return self.terminated | self.truncated


def _map_arrays(memory_fd: int, layout: dict[str, tuple]) -> dict[str, np.ndarray]:
    """The shared arrays in a file without a name, each at a multiple of 64 bytes.

    `layout`: name -> (shape, dtype).
    """
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


class VecEnv:
    """N environments of one suite in worker processes.

    Args:
        suite: the name of its module, which has a `Suite` named SUITE.
        env: arguments of its `make_env`, but for `index`.
        num_envs: N.
        obs_dim, action_dim: numbers in an observation and in an action.
        max_episode_steps: physics steps.
        discrete: an action is a whole number from 0 to `action_dim` - 1, instead of `action_dim`
            numbers from -1 to 1.
        camera: what draws the frames; None: none are drawn.
        num_workers: processes; default: one per core, at most N.
        action_repeat: physics steps per call of `step`, all with the same action; only the last
            state is drawn and observed, and success at any of them counts.
        num_drawn: only the first so many environments are drawn, and have frames; default: all.
        draw_resets: also draw the first state of new episodes.
        draw_every: K; drawn are the state after an episode's first step, after every K-th, and
            after its last, counted in calls of `step`.

    Attributes:
        env_id, num_envs, obs_dim, action_dim, discrete: as given.
        episode_length: actions in an episode, at most.
        engine: the simulator and its version.
        draws: whether there are frames.

    Raises:
        UserError: an environment cannot be made, or frames cannot be drawn here.
        WorkerError: a worker has failed.
    """

    engine: str
    resumes_episodes = True  # `set_state` goes on in the middle of an episode

    def __init__(
        self,
        suite: str,
        env: dict[str, Any],
        num_envs: int,
        *,
        obs_dim: int,
        action_dim: int,
        max_episode_steps: int,
        discrete: bool = False,
        camera: Camera | None = None,
        num_workers: int | None = None,
        action_repeat: int = 1,
        num_drawn: int | None = None,
        draw_resets: bool = False,
        draw_every: int = 1,
    ):
        self.env_id, self.num_envs = env["env_id"], num_envs
        self.obs_dim, self.action_dim, self.discrete = obs_dim, action_dim, discrete
        self.episode_length = max_episode_steps // action_repeat
        self.action_space = (
            gymnasium.spaces.MultiDiscrete([action_dim] * num_envs) if discrete
            else gymnasium.spaces.Box(-1, 1, (num_envs, action_dim), np.float32)
        )
        self.draws = camera is not None
        num_drawn = num_envs if num_drawn is None else num_drawn
        layout = {
            "obs": ((num_envs, obs_dim), np.float32),
            "final_obs": ((num_envs, obs_dim), np.float32),
            "actions": (self.action_space.shape, self.action_space.dtype),
            "reward": ((num_envs,), np.float32),
        }
        layout |= {name: ((num_envs,), np.bool_) for name in ("success", "terminated", "truncated")}
        if camera:
            layout["frames"] = ((num_drawn, camera.drawn_size, camera.drawn_size, 3), np.uint8)
            layout["drawn"] = ((num_envs,), np.bool_)
            if draw_resets:
                layout["reset_frames"] = layout["frames"]
        memory_fd = memory_file()
        self._arrays = _map_arrays(memory_fd, layout)
        self._workers: list[tuple[subprocess.Popen, Connection]] = []
        weakref.finalize(self, _end, self._workers)
        self._is_stepping = False
        num_workers = min(num_workers or num_cores(), num_envs)
        for indices in np.array_split(np.arange(num_envs), num_workers):
            options = dict(
                suite=suite, env=env, indices=indices.tolist(), camera=camera, layout=layout,
                max_episode_steps=max_episode_steps, action_repeat=action_repeat,
                draw_every=draw_every, num_drawn=num_drawn,
            )
            self._workers.append(_start_worker(memory_fd, options))
        os.close(memory_fd)
        self._receive()  # all environments are built

    def reset(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Start new episodes; (obs [N, obs_dim] float32, frames uint8 [N, size, size, 3] or
        None)."""
        self._send("reset")
        self._receive()
        frames = self._arrays.get("frames")
        return self._arrays["obs"].copy(), None if frames is None else frames.copy()

    def observations(self) -> np.ndarray:
        """The observations to act on, [N, obs_dim] float32."""
        return self._arrays["obs"].copy()

    def step_async(self, actions: np.ndarray) -> None:
        """Let the workers step and draw; `actions` [N, action_dim], or [N] if discrete."""
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
        return Step(**{"frames": None, "reset_frames": None} | copies)

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
            the observations to act on, [N, obs_dim] float32.
        """
        self._send("set_state", states)
        self._receive()
        return self.observations()

    def close(self) -> None:
        """End the workers."""
        _end(self._workers)

    def _send(self, command: str, payload: Any = None) -> None:
        if self._is_stepping:
            raise RuntimeError(f"{command} before step_wait")
        for process, connection in self._workers:
            try:
                connection.send((command, payload))
            except OSError:
                self._receive_from(process, connection)  # its last words, if it had time for them

    def _receive(self) -> list[Any]:
        return [self._receive_from(*worker) for worker in self._workers]

    def _receive_from(self, process: subprocess.Popen, connection: Connection) -> Any:
        try:
            kind, reply = connection.recv()
        except (EOFError, OSError):
            kind, reply = "death", None
        if kind == "ok":
            return reply
        self.close()
        if kind == "user error":
            raise UserError(reply)
        if kind == "error":
            raise WorkerError(f"an environment worker failed:\n{reply}")
        status = process.returncode
        how = f"by signal {-status}" if status < 0 else f"status {status}"
        raise WorkerError(f"an environment worker has died ({how}) without a traceback: out of "
                          "memory, or killed from outside")


def _end(workers: list[tuple[subprocess.Popen, Connection]]) -> None:
    """End the workers and empty their list."""
    for _, connection in workers:
        connection.close()
    while workers:
        process, _ = workers.pop()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start_worker(memory_fd: int, options: dict) -> tuple[subprocess.Popen, Connection]:
    ours, theirs = socket.socketpair()
    environment = os.environ | {
        "PYTHONPATH": python_path(Path(__file__).resolve().parents[2]),
        "SDL_VIDEODRIVER": "dummy",  # pygame, which draws classic control, opens no window
        "PYGAME_HIDE_SUPPORT_PROMPT": "1",
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


def _suite(module: str) -> Suite:
    return importlib.import_module(module).SUITE


def _work(connection: Connection, memory_fd: int) -> None:
    """A worker's life: build its environments, then answer commands until the socket closes."""
    options = connection.recv()
    suite = _suite(options["suite"])
    arrays = _map_arrays(memory_fd, options["layout"])
    indices = options["indices"]
    envs = [suite.make_env(index=i, **options["env"]) for i in indices]
    to_draw = [i for i in indices if i < options["num_drawn"]] if options["camera"] else []
    draw = suite.make_draw(envs[0], options["camera"]) if to_draw else None
    connection.send(("ok", None))

    def reset(i: int, env, frames: str) -> None:
        arrays["obs"][i] = env.reset()[0]
        if frames in arrays and i in to_draw:
            arrays[frames][i] = draw(env)

    while True:
        command, payload = connection.recv()
        reply = None
        if command == "step":
            for i, env in zip(indices, envs, strict=True):
                success, rewards = False, 0.0
                for _ in range(options["action_repeat"]):
                    obs, reward, terminated, truncated, info = env.step(arrays["actions"][i])
                    success |= bool(info.get("success") or info.get("is_success"))
                    rewards += float(reward)
                    truncated |= suite.elapsed_steps(env) >= options["max_episode_steps"]
                    if terminated or truncated:
                        break
                arrays["obs"][i] = arrays["final_obs"][i] = obs
                arrays["success"][i] = success
                arrays["reward"][i] = success if suite.sparse_reward else rewards
                arrays["terminated"][i], arrays["truncated"][i] = terminated, truncated
                ended = terminated or truncated
                if i in to_draw:
                    time = -(-suite.elapsed_steps(env) // options["action_repeat"])
                    drawn = ended or time == 1 or time % options["draw_every"] == 0
                    arrays["drawn"][i] = drawn
                    if drawn:
                        arrays["frames"][i] = draw(env)
                if ended:
                    reset(i, env, "reset_frames")
        elif command == "reset":
            for i, env in zip(indices, envs, strict=True):
                reset(i, env, "frames")
        elif command == "get_state":
            reply = [suite.get_env_state(env) | {"obs": arrays["obs"][i].copy()}
                     for i, env in zip(indices, envs, strict=True)]
        elif command == "set_state":
            for i, env in zip(indices, envs, strict=True):
                obs = suite.set_env_state(env, payload[i])
                arrays["obs"][i] = payload[i]["obs"] if obs is None else obs
        connection.send(("ok", reply))


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
