"""What an environment of Gymnasium has promised, and checks that it keeps to it.

A picture of another shape, an observation that is broadcast or a reward of NaN would be learned
from without a word. `Checked` stands around an environment and raises at once.
"""

import inspect
import random
from collections.abc import Mapping
from typing import Any, NoReturn

import gymnasium
import numpy as np

from common.errors import UserError

LARGEST = float(np.finfo(np.float32).max)  # the replay holds float32
TRIAL_STEPS = 20
SUCCESS = ("success", "is_success")  # in info; the second is Stable-Baselines3's and of robotics


class Checked(gymnasium.Wrapper):
    """Passes on what the environment returns if that is what Gymnasium asks for.

    Args:
        env: as `gymnasium.make` returns it: observations and actions are the environment's own.
        registered_id: what messages call it.

    Raises:
        UserError: names the environment and what it did, from `reset`, `step` and `render`.
    """

    def __init__(self, env: gymnasium.Env, registered_id: str):
        super().__init__(env)
        self.registered_id = registered_id

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = check_reset(self.env.reset(**options), self.registered_id)
        self._check_observation(obs, "reset")
        return obs, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The reward is a float, both ends are bools."""
        obs, reward, terminated, truncated, info = check_step(
            self.env.step(action), self.registered_id)
        self._check_observation(obs, "step")
        number = _number(reward)
        if number is None or not abs(number) <= LARGEST:  # which is False for NaN
            self._breach(f"step gave the reward {_shown(reward)}")
        ends = {"terminated": terminated, "truncated": truncated}
        for name, value in ends.items():
            ends[name] = _number(value)
            if ends[name] not in (0, 1):
                self._breach(f"step gave {_shown(value)} as {name}")
        for name in SUCCESS:
            value = info.get(name)
            if value is not None and ((found := _number(value)) is None or found != found):
                self._breach(f"step's info has {name} {_shown(value)}")
        return obs, number, bool(ends["terminated"]), bool(ends["truncated"]), info

    def render(self) -> np.ndarray:
        """uint8 [H, W, 3]; grey pictures are repeated, of RGBA the last channel is left out."""
        picture = self.env.render()
        if not isinstance(picture, np.ndarray):
            self._breach(f"render returned {_kind(picture)}, not an array")
        if picture.dtype != np.uint8:
            self._breach(f"render returned a picture of {picture.dtype}, not of uint8")
        grey = picture[..., None] if picture.ndim == 2 else picture
        if grey.ndim != 3 or grey.shape[-1] not in (1, 3, 4) or not grey.size:
            self._breach(f"render returned a picture of the shape {picture.shape}, not [H, W, 3]")
        return np.repeat(grey, 3, -1) if grey.shape[-1] == 1 else grey[..., :3]

    def _check_observation(self, obs: Any, method: str) -> None:
        if problem := misfit(self.observation_space, obs):
            self._breach(f"{method} gave an observation that {problem}")

    def _breach(self, what: str) -> NoReturn:
        raise breach(self.registered_id, what)


def breach(env_id: str, what: str) -> UserError:
    return UserError(f"{env_id} breaks Gymnasium's contract: {what}")


def check_reset(result: Any, env_id: str) -> tuple[Any, dict[str, Any]]:
    """What `reset` returned, if it is (observation, info).

    Raises:
        UserError: it is something else.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise breach(env_id, f"reset returned {_kind(result)}, not (observation, info)")
    if not isinstance(result[1], dict):
        raise breach(env_id, f"reset gave {_shown(result[1])} as info, not a dictionary")
    return result


def check_step(result: Any, env_id: str) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """What `step` returned, if it has Gymnasium's five parts.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(result, tuple) or len(result) != 5:
        raise breach(env_id, f"step returned {_kind(result)}, not (observation, reward, "
                             "terminated, truncated, info)")
    if not isinstance(result[4], dict):
        raise breach(env_id, f"step gave {_shown(result[4])} as info, not a dictionary")
    return result


def misfit(space: gymnasium.Space, value: Any) -> str | None:
    """How an observation differs from its space; None if it fits.

    Numbers outside the bounds of a Box, or of another precision, are no fault: many environments
    are generous there.
    """
    spaces = gymnasium.spaces
    if isinstance(space, spaces.Dict):
        if not isinstance(value, Mapping) or value.keys() != space.keys():
            return f"is {_kind(value)}, not a dictionary with {', '.join(space.keys())}"
        parts = ((name, part, value[name]) for name, part in space.items())
    elif isinstance(space, spaces.Tuple):
        if not isinstance(value, tuple | list) or len(value) != len(space):
            return f"is {_kind(value)}, not a tuple of {len(space)}"
        parts = ((str(i), part, value[i]) for i, part in enumerate(space))
    elif isinstance(space, spaces.Box):
        return _misfit_of_numbers(space, value)
    else:
        return None if space.contains(value) else f"is {_shown(value)}, which is not in {space}"
    for name, part, inner in parts:
        if problem := misfit(part, inner):
            return f"has a part {name!r} that {problem}"
    return None


def _misfit_of_numbers(space: gymnasium.spaces.Box, value: Any) -> str | None:
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return f"is {_kind(value)}, not an array"
    if array.dtype.kind not in "buif":
        return f"is {_kind(value)}, not numbers"
    if array.shape != space.shape:
        return f"has the shape {array.shape}, not {space.shape}"
    if array.dtype.kind == "f" and not (np.abs(array) <= LARGEST).all():
        return "is not finite"
    return None


def _number(value: Any) -> float | None:
    """A number, also where an array holds one alone; None for anything else."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return float(array.item()) if array.size == 1 and array.dtype.kind in "buif" else None


def _kind(value: Any) -> str:
    """`a tuple of 4`, `an array of shape (3,)`, `None`, or the name of a type."""
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of the shape {value.shape}"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _shown(value: Any) -> str:
    """A value in a message, short and on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


# ------------------------------------------------------------------------ before a run


def try_out(env: gymnasium.Env, env_id: str) -> None:
    """A few steps of an environment that is thrown away, so that what is wrong is found at once.

    Raises:
        UserError: it breaks the contract.
    """
    layer = env
    while True:
        parameters = inspect.signature(layer.reset).parameters
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        if not takes_any and not {"seed", "options"} <= parameters.keys():
            raise breach(env_id, f"reset of {type(layer).__name__} takes no seed or no options")
        if layer is env.unwrapped:
            break
        layer = layer.env
    # The bare environment first, if it works alone: wrappers take apart what they get.
    base = env.unwrapped
    try:
        begun = base.reset(seed=0)
        base.action_space.seed(0)
        stepped = base.step(base.action_space.sample())
    except Exception:
        begun = stepped = None
    if begun is not None:
        check_reset(begun, env_id)
        check_step(stepped, env_id)
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(TRIAL_STEPS):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()


# ---------------------------------------------------------------- the global generators


def global_state() -> dict[str, Any]:
    """Of Python's and NumPy's global generators, in what a checkpoint can hold."""
    version, numbers, gauss = random.getstate()
    kind, key, position, has_gauss, second = np.random.get_state()  # noqa: NPY002
    return {"python": [version, np.array(numbers, np.uint32), gauss],
            "numpy": [kind, key, position, has_gauss, second]}


def set_global_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002


def seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether nothing was drawn between two calls of `global_state`."""
    return all(np.array_equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


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
