"""An algorithm of another library: steps a second, for `tools.dev.benchmark --only peers`.

    pip install stable-baselines3 sbx-rl tfp-nightly    # sbx-rl's own tfp is too old for this JAX
    python -m tools.dev.peer --package sbx
    python -m tools.dev.peer --package stable_baselines3 --algorithm DQN --env-id CartPole-v1

One environment, one update a step, two hidden layers of 256, as our scripts do per step; all else
is the library's default.
"""

import importlib
import time
from dataclasses import dataclass
from typing import Literal, get_args

import gymnasium
import torch
import tyro

from common.envs import metaworld_suite
from common.envs.registry import METAWORLD, suite_for

Package = Literal["stable_baselines3", "sbx"]
PACKAGES: tuple[Package, ...] = get_args(Package)


@dataclass(frozen=True)
class Args:
    package: Package
    algorithm: Literal["SAC", "DQN"] = "SAC"
    env_id: str = "drawer-close-v3"
    batch_size: int = 256
    warm_up: int = 1000
    """steps before the clock starts: random ones, compilation"""
    steps: int = 2000
    """steps that are timed"""


def make_env(env_id: str) -> gymnasium.Env:
    if suite_for(env_id) is not METAWORLD:
        return gymnasium.make(env_id)
    env = metaworld_suite.make_env(env_id, seed=0, index=0, goal="fixed", show_goal=False)
    return gymnasium.wrappers.TimeLimit(env, metaworld_suite.MAX_EPISODE_STEPS)


def steps_per_second(args: Args) -> float:
    """Environment steps a second of `model.learn` after the warm-up."""
    algorithm = getattr(importlib.import_module(args.package), args.algorithm)
    torch.set_num_threads(1)  # what is best for stable-baselines3's small networks
    model = algorithm(
        "MlpPolicy", make_env(args.env_id), learning_starts=args.warm_up // 2,
        batch_size=args.batch_size, train_freq=1, gradient_steps=1,
        policy_kwargs={"net_arch": [256, 256]}, seed=0,
    )
    model.learn(args.warm_up)
    start = time.perf_counter()
    model.learn(args.steps, reset_num_timesteps=False)
    return args.steps / (time.perf_counter() - start)


if __name__ == "__main__":
    print(f"{steps_per_second(tyro.cli(Args)):.4g}")
