"""What an environment of Gymnasium has promised, and checks that it keeps to it.

A picture of another shape, an observation that is broadcast or a reward of NaN would be learned
from without a word. `Checked` stands around an environment and raises at once.
"""

import inspect
import random
from typing import Any, NoReturn

import gymnasium
import numpy as np
from gymnasium import spaces

from common.errors import UserError

LARGEST = float(np.finfo(np.float32).max)  # the replay holds float32
TRIAL_STEPS = 20
SUCCESS = ("success", "is_success")  # in info; the second is Stable-Baselines3's and of robotics
PARTS = {  # of what a method returns
    "reset": ("observation", "info"),
    "step": ("observation", "reward", "terminated", "truncated", "info"),
}


class Checked(gymnasium.Wrapper):
    """Passes on what the environment returns if that is what Gymnasium asks for.

    An observation is flattened to a vector. Numbers outside the bounds of a Box, or of another
    precision, are no fault: many environments are generous there.

    Args:
        env: as `gymnasium.make` returns it: observations and actions are the environment's own.
        registered_id: what messages call it.

    Raises:
        UserError: observations cannot be flattened; from `reset`, `step` and `render` it names the
            environment and what it did.
    """

    def __init__(self, env: gymnasium.Env, registered_id: str):
        super().__init__(env)
        self.registered_id = registered_id
        space = getattr(env, "observation_space", None)
        try:
            flat = spaces.flatten_space(space)
        except NotImplementedError:  # so Gymnasium says that a space, e.g. Graph, is no vector
            flat = None
        if not isinstance(flat, spaces.Box) or not flat.shape[0]:
            raise UserError(f"the observations of {registered_id} are {space}, which cannot be "
                            "flattened to a vector of numbers")
        self.observation_space = flat

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        obs, info = self._parts("reset", self.env.reset(**options))
        return self._vector("reset", obs), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The reward is a float, both ends are bools."""
        obs, reward, *ends, info = self._parts("step", self.env.step(action))
        vector, number = self._vector("step", obs), _number(reward)
        if not abs(number) <= LARGEST:  # which is False for NaN
            self._breach(f"step gave the reward {_shown(reward)}")
        for name, value in zip(("terminated", "truncated"), ends, strict=True):
            if _number(value) not in (0, 1):
                self._breach(f"step gave {_shown(value)} as {name}")
        for name in SUCCESS:
            value = info.get(name)
            if value is not None and np.isnan(_number(value)):
                self._breach(f"step's info has {name} {_shown(value)}")
        return vector, number, *(bool(_number(value)) for value in ends), info

    def render(self) -> np.ndarray:
        """uint8 [H, W, 3]; grey pictures are repeated, of RGBA the last channel is left out."""
        picture = self.env.render()
        if not isinstance(picture, np.ndarray):
            self._breach(f"render returned {_shown(picture)}, not an array")
        if picture.dtype != np.uint8:
            self._breach(f"render returned a picture of {picture.dtype}, not of uint8")
        grey = picture[..., None] if picture.ndim == 2 else picture
        if grey.ndim != 3 or grey.shape[-1] not in (1, 3, 4) or not grey.size:
            self._breach(f"render returned a picture of the shape {picture.shape}, not [H, W, 3]")
        return np.repeat(grey, 3, -1) if grey.shape[-1] == 1 else grey[..., :3]

    def _parts(self, method: str, result: Any) -> tuple:
        parts = PARTS[method]
        if not isinstance(result, tuple) or len(result) != len(parts):
            self._breach(f"{method} returned {_shown(result)}, not ({', '.join(parts)})")
        if not isinstance(result[-1], dict):
            self._breach(f"{method} gave {_shown(result[-1])} as info, not a dictionary")
        return result

    def _vector(self, method: str, obs: Any) -> np.ndarray:
        space = self.env.observation_space
        try:
            vector = spaces.flatten(space, obs)
        except Exception:  # each kind of space has errors of its own
            vector = None
        if vector is None or vector.shape != self.observation_space.shape:
            self._breach(f"{method} gave the observation {_shown(obs)}, which is not of {space}")
        if not (np.abs(vector) <= LARGEST).all():
            self._breach(f"{method} gave an observation that is not finite")
        return vector

    def _breach(self, what: str) -> NoReturn:
        raise breach(self.registered_id, what)


def breach(env_id: str, what: str) -> UserError:
    return UserError(f"{env_id} breaks Gymnasium's contract: {what}")


def try_out(env: gymnasium.Env, env_id: str) -> None:
    """A few steps of an environment that is thrown away, so that what is wrong is found at once.

    Raises:
        UserError: it breaks the contract.
    """
    base = env.unwrapped
    try:
        inspect.signature(base.reset).bind(seed=0, options=None)
    except TypeError:
        what = f"reset of {type(base).__name__} takes no seed or no options"
        raise breach(env_id, what) from None
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(TRIAL_STEPS):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()


def _number(value: Any) -> float:
    """A number, also where an array holds one alone; NaN for anything else."""
    try:
        array = np.asarray(value)
    except ValueError:
        return np.nan
    return float(array.item()) if array.size == 1 and array.dtype.kind in "buif" else np.nan


def _shown(value: Any) -> str:
    """A value in a message, short and on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


# ---------------------------------------------------------------- the global generators


def global_state() -> dict[str, Any]:
    """Of Python's and NumPy's global generators, in what can be compared and saved."""
    kind, key, *rest = np.random.get_state()  # noqa: NPY002
    return {"python": random.getstate(), "numpy": (kind, key.tolist(), *rest)}


def set_global_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002


def seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


class OwnGlobals(gymnasium.Wrapper):
    """Gives an environment a state of the global generators that is its own.

    Else what it draws would depend on the other environments of its process. Only around those that
    draw from there: it costs some 100 microseconds a step.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.global_state = global_state()

    def reset(self, **options: Any) -> Any:
        return self._call(self.env.reset, **options)

    def step(self, action: Any) -> Any:
        return self._call(self.env.step, action)

    def render(self) -> Any:
        return self._call(self.env.render)

    def _call(self, method: Any, *args: Any, **options: Any) -> Any:
        set_global_state(self.global_state)
        try:
            return method(*args, **options)
        finally:
            self.global_state = global_state()
