"""What is kept of evaluated policies: which arrays, which policies, and what comes back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import furl_drq_pixels
import furl_plus_state
import furl_sac_state
import relay_baseline
import sac_baseline
import vlm_rm_baseline
import vlm_rm_dqn
from common import policies
from common.checkpoint import CheckpointError
from common.errors import UserError
from common.replay import Sizes
from common.run_folder import METRICS_HEADER, kept_policies, metrics_line


class State(NamedTuple):
    agent: dict
    count: jax.Array
    other: jax.Array


@jax.jit
def policy(state: State, obs: jax.Array) -> jax.Array:
    _unused = state.other * 2
    return jnp.tanh(obs @ state.agent["w"])


def a_state(scale: float = 1.0) -> State:
    agent = {"opt": jnp.zeros(2), "w": scale * jnp.arange(6.0).reshape(3, 2)}
    return State(agent, jnp.int32(7), jnp.ones(2))


def test_what_a_policy_acts_by_comes_back(tmp_path):
    """What does not come back is NaN, so that whatever depends on it can be told."""
    state, obs = a_state(), np.ones((1, 3), np.float32)
    assert policies.names_used(policy, state, obs) == ["agent/w"]
    policies.save(tmp_path, 30, {"agent/w": policies.named_arrays(state)["agent/w"]}, 10)
    stored = policies.read(tmp_path, 30)
    found = policies.unflatten(stored, jax.eval_shape(a_state))
    np.testing.assert_array_equal(policy(found, obs), policy(state, obs))
    assert np.isnan(found.other).all() and np.isnan(found.agent["opt"]).all()
    assert found.count == 0 and found.count.dtype == jnp.int32
    with pytest.raises(CheckpointError, match="other shapes"):
        policies.unflatten(stored, a_state()._replace(agent={"w": jnp.zeros((3, 4))}))
    with pytest.raises(CheckpointError, match="has no agent/w"):
        policies.unflatten(stored, a_state()._replace(agent={}))
    path = tmp_path / "policies/0000000030.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"0000000030\.npz cannot be read"):
        policies.read(tmp_path, 30)


def test_of_a_policy_that_jax_cannot_trace_all_is_kept():
    names = policies.names_used(lambda state, obs: np.asarray(state.other), a_state(), 0.5)
    assert names == ["agent/opt", "agent/w", "count", "other"]


@pytest.mark.parametrize(("script", "obs_shape", "most"), [
    (furl_sac_state, (1, 39), 0.5), (furl_plus_state, (1, 39), 0.5), (relay_baseline, (1, 39), 0.5),
    (sac_baseline, (1, 39), 0.5), (vlm_rm_baseline, (1, 39), 0.5), (vlm_rm_dqn, (1, 39), 0.5),
    (furl_drq_pixels, (1, 112, 112, 9), 9),
])
def test_policies_of_scripts_are_small(script, obs_shape, most):
    """Megabytes; of DrQ's nearly all are the layer between the encoder and 50 features."""
    state = jax.eval_shape(
        lambda key: script.init_state(key, Sizes(39, 4, 8), script.Args()), jax.random.key(0))
    obs = jax.ShapeDtypeStruct(obs_shape, np.uint8 if len(obs_shape) > 2 else np.float32)
    arrays, names = policies.named_arrays(state), policies.names_used(script.policy, state, obs)
    assert 0.01 < sum(arrays[n].size * arrays[n].dtype.itemsize for n in names) / 1e6 < most
    assert all("critic" not in name and "opt" not in name for name in names)


def play(tmp_path, evaluations: dict[int, tuple[float, float]], eval_every: int = 10) -> list[int]:
    """Write the rows and the policies of evaluations; the steps of those that are kept then."""
    for env_steps, (success, value) in evaluations.items():
        path = tmp_path / "metrics.csv"
        if not path.exists():
            path.write_text(METRICS_HEADER)
        with open(path, "a") as file:
            file.write(metrics_line(env_steps, "eval/success_at_end", success)
                       + metrics_line(env_steps, "eval/return", value))
        policies.save(tmp_path, env_steps, {"w": jnp.zeros(2)}, eval_every)
    return list(kept_policies(tmp_path))


def test_of_evaluations_in_a_row_the_best_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "MOST", 4)
    # All until there are more than four; a last one need not be at a multiple.
    assert play(tmp_path, {12: (0, 0), 21: (1, 3), 30: (0, 5), 40: (0, 0)}) == [12, 21, 30, 40]
    # Then one of two: by success, then by return, and of equal ones the later one.
    assert play(tmp_path, {50: (0, 0)}) == [21, 30, 50]
    assert play(tmp_path, {60: (1, 1), 70: (1, 9), 81: (1, 8)}) == [21, 30, 60, 70]
    # Then one of four.
    assert play(tmp_path, {90: (0, 0), 95: (0, 0)}) == [21, 70, 95]
    assert policies.scores(tmp_path)[70] == (1, 9)
    # What a killed run had made beyond its checkpoint is made again.
    policies.drop_after(tmp_path, 60)
    assert play(tmp_path, {70: (1, 9), 81: (1, 8), 90: (0, 0), 95: (0, 0)}) == [21, 70, 95]


def test_large_policies_are_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "MOST_BYTES", 600)  # a file has about 270
    assert play(tmp_path, {10: (0, 0), 20: (0, 0), 30: (0, 0)}) == [20, 30]
