"""Figures of merit that several tools share.

A figure of numbers that are not all finite is NaN: it has no value, and above all no perfect one.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binomtest, mannwhitneyu, sem, spearmanr

from common.errors import UserError

if TYPE_CHECKING:
    import torch

SAME = 0.9999  # cosine similarity from which two texts mean the same


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927).

    Unlike the normal approximation it stays within [0, 1], and has a width without successes too.

    Raises:
        ValueError: no trials, or successes outside 0 to `trials`.
    """
    interval = binomtest(successes, trials).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of `values` [n]; NaN for fewer than two."""
    return float(sem(values)) if len(values) > 1 and np.isfinite(values).all() else math.nan


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """P(positive > negative), ties count half (Mann-Whitney); NaN without both kinds."""
    if not len(positive) or not len(negative):
        return float("nan")
    if not np.isfinite(positive).all() or not np.isfinite(negative).all():
        return float("nan")
    # The statistic is the number of pairs won, computed in its input's dtype: float32 would round.
    won = mannwhitneyu(np.asarray(positive, np.float64), np.asarray(negative, np.float64),
                       method="asymptotic").statistic
    return float(won / (len(positive) * len(negative)))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of x [n] and y [n]; NaN where one of them is constant."""
    if len(x) < 2 or not np.isfinite(x).all() or not np.isfinite(y).all():
        return float("nan")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(spearmanr(x, y).statistic)


def epic_distance(reward: np.ndarray, is_goal: np.ndarray) -> float:
    """EPIC distance of a reward to the indicator of goal states: Lemma 1 of the VLM-RM paper.

    Rocamonde et al., ICLR 2024, Appendix A; the state distribution mu is the sample. 0: equal up to
    a positive affine map; 0.71: uncorrelated; 1: opposite. NaN where one of them is constant.

    Args:
        reward: [n], of states.
        is_goal: [n] bool, the sparse reward of the same states.
    """
    reward, is_goal = np.asarray(reward, np.float64), np.asarray(is_goal, bool)
    if is_goal.all() or not is_goal.any() or not np.isfinite(reward).all():
        return float("nan")
    if np.ptp(reward) == 0:
        return float("nan")
    share = is_goal.mean()
    difference = reward[is_goal].mean() - reward[~is_goal].mean()
    correlation = math.sqrt(share * (1 - share)) / reward.std() * difference
    return math.sqrt(max(0.0, 1 - correlation) / 2)


def goal_baseline_reward(
    text: np.ndarray, baseline: np.ndarray, images: np.ndarray, alpha: float
) -> np.ndarray:
    """Goal-baseline regularisation: Definition 1 and Eq. 3 of the VLM-RM paper.

    In numpy, and apart from the script that trains on it, so that a report depends on no script.

    Args:
        text, baseline: embeddings [D] of the goal's and the baseline's prompt; they must differ
            where alpha is above 0, see `check_baseline`.
        images: embeddings [n, D].
        alpha: strength, 0 (the cosine similarity) to 1 (the position along the line through both).

    Returns:
        [n], at most 1.
    """
    goal, base = text / np.linalg.norm(text), baseline / np.linalg.norm(baseline)
    state = images / np.linalg.norm(images, axis=-1, keepdims=True)
    projected = state
    if alpha > 0:
        direction = (goal - base) / np.linalg.norm(goal - base)
        projected = base + ((state - base) @ direction)[:, None] * direction
    return 1 - 0.5 * ((alpha * projected + (1 - alpha) * state - goal) ** 2).sum(-1)


def means_the_same(text: np.ndarray, other: np.ndarray) -> bool:
    """Whether two embeddings [D] point in one direction, as far as float32 can tell."""
    return not text @ other <= SAME * np.linalg.norm(text) * np.linalg.norm(other)


def check_baseline(
    text: np.ndarray, baseline: np.ndarray, prompts: Sequence[str], alphas: Sequence[float]
) -> None:
    """Whether there is a line through a goal and its baseline, where one is asked for.

    Args:
        text, baseline: embeddings [D] of the two `prompts`.
        alphas: strengths of the regularisation; 0 needs no baseline.

    Raises:
        UserError: both mean the same to the VLM.
    """
    if max(alphas, default=0) > 0 and means_the_same(text, baseline):
        raise UserError(f"--baseline-prompt {prompts[1]!r} means the same as the prompt "
                        f"{prompts[0]!r} to this VLM: there is no line through both")


def check_finite(reward: np.ndarray, what: str) -> np.ndarray:
    """`reward`, of which something is going to be called the best.

    Raises:
        UserError: there is a number in it that is not finite; `what` says whose.
    """
    if not np.isfinite(reward).all():
        raise UserError(f"{what} is not finite for {(~np.isfinite(reward)).sum()} of "
                        f"{reward.size} pictures: it cannot be judged")
    return reward


def without_nan(value: Any) -> Any:
    """For JSON, which has neither NaN nor infinity: None in their place."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pixel_embedding(crops: "torch.Tensor") -> np.ndarray:
    """What embeddings are compared with: pictures float [n, 3, size, size] at 32 px, flat."""
    from torch.nn import functional as F

    return F.interpolate(crops, (32, 32), mode="area").flatten(1).numpy()
