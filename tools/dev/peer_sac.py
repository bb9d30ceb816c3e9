"""SAC of another library on the same task: steps a second, for `tools.dev.benchmark --only peers`.

    pip install stable-baselines3 sbx-rl tfp-nightly    # sbx-rl's own tfp is too old for this JAX
    python -m tools.dev.peer_sac --package sbx

One environment, one update of 256 samples a step, two hidden layers of 256: what each library calls
its defaults, and what sac_baseline.py does per environment step.
"""

import importlib
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from gymnasium.wrappers import TimeLimit

from common.envs.metaworld import MAX_EPISODE_STEPS, make_env

PACKAGES = ("stable_baselines3", "sbx")


@dataclass(frozen=True)
class Args:
    package: Literal["stable_baselines3", "sbx"]
    env_id: str = "drawer-close-v3"
    warm_up: int = 1000
    """steps before the clock starts: random ones, compilation"""
    steps: int = 2000
    """steps that are timed"""


def steps_per_second(args: Args) -> float:
    """Environment steps a second of `model.learn` after the warm-up."""
    env = TimeLimit(
        make_env(args.env_id, seed=0, index=0, goal="fixed", show_goal=False), MAX_EPISODE_STEPS
    )
    sac = importlib.import_module(args.package).SAC
    torch.set_num_threads(1)  # what is best for stable-baselines3's small networks
    model = sac("MlpPolicy", env, learning_starts=args.warm_up // 2, batch_size=256, train_freq=1,
                gradient_steps=1, policy_kwargs={"net_arch": [256, 256]}, seed=0)
    model.learn(args.warm_up)
    start = time.perf_counter()
    model.learn(args.steps, reset_num_timesteps=False)
    return args.steps / (time.perf_counter() - start)


if __name__ == "__main__":
    print(f"{steps_per_second(tyro.cli(Args)):.4g}")
