"""Which frames of which episodes the scripts count or rank as positive or negative."""

import csv
from dataclasses import replace

import jax
import numpy as np
import pytest

import furl_drq_pixels as drq
import furl_sac_state as furl
import relay_baseline as relay
from common import checkpoint
from common.envs.metaworld_suite import VecMetaWorld

COMMON = dict(env_id="drawer-close-v3", num_envs=2, batch_size=8, learning_starts=10**6,
              eval_every=10**6, hidden_features=(16,), relay_until=10**6)
# Episodes of 500 steps, or of five actions; two are played and one more is begun.
CASES = {
    "furl": (furl, furl.Args(**COMMON, total_timesteps=2002, buffer_size=2002), 500),
    "drq": (drq, drq.Args(**COMMON, total_timesteps=2200, buffer_size=200, action_repeat=100,
                          encoder_features=(4, 4), lag=2), 5),
}


SUCCESSES = {  # (episode, environment): times, which the environments are made to report
    (0, 0): (1, 3),  # the failure between them counts, what follows does not
    (1, 1): (-1,),  # the episode's last step
}


@pytest.fixture
def prescribe(monkeypatch):
    """`prescribe(length)`: training environments succeed as in SUCCESSES, and never else."""
    step_wait = VecMetaWorld.step_wait

    def patch(length: int) -> None:
        steps = 0

        def prescribed(self):
            nonlocal steps
            step = step_wait(self)
            if self.num_envs != COMMON["num_envs"]:  # the evaluation's
                return step
            episode, time = divmod(steps, length)
            steps += 1
            success = np.array([
                time in [t % length for t in SUCCESSES.get((episode, env), ())] for env in range(2)
            ])
            return step._replace(success=success, reward=success.astype(np.float32))

        monkeypatch.setattr(VecMetaWorld, "step_wait", prescribed)

    return patch


@pytest.mark.parametrize("name", CASES)
def test_positives_are_all_up_to_the_last_success(name, tmp_path, monkeypatch, prescribe):
    """Two episodes of two environments; successes as prescribed, all else as in a run."""
    script, args, length = CASES[name]
    prescribe(length)
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a: saved.append(
        jax.tree.map(np.asarray, a[3])) or save(*a))
    script.main(replace(args, run_dir=str(tmp_path / "run")))
    rings = saved[-1]
    embeddings = rings["transitions" if name == "furl" else "steps"].data.embedding

    def frames(episode: int, env: int, count: int) -> np.ndarray:
        start = episode * length
        if name == "drq":  # each episode's first pictures are rows of their own
            start += episode + 1
        return np.stack([embeddings[(start + time) * 2 + env] for time in range(count)])

    for kind, expected in (
        ("positives", [frames(0, 0, 4), frames(1, 1, length)]),
        ("negatives", [frames(0, 1, length), frames(1, 0, length)]),
    ):
        ring, total = rings[kind], sum(map(len, expected))
        assert ring.total == total
        np.testing.assert_array_equal(ring.data.embedding[:total], np.concatenate(expected))
        np.testing.assert_array_equal(
            ring.data.time[:total], np.concatenate([np.arange(len(x)) for x in expected]))
        assert (np.ptp(np.concatenate(expected), axis=0) > 0).any(), "all pictures look the same"
    before = [True, True, False, False] + [True] * length  # up to each episode's first success
    np.testing.assert_array_equal(rings["positives"].data.before_success[: len(before)], before)


def test_relay_counts_the_same_positives(tmp_path, prescribe):
    """Its two environments' positives are counted when episodes end, and not before."""
    prescribe(500)
    args = relay.Args(**COMMON, total_timesteps=2002, buffer_size=1000, log_every=1000,
                      draw_every=100)
    relay.main(replace(args, run_dir=str(tmp_path / "run")))
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        counts = {int(row["env_steps"]): float(row["value"]) for row in csv.DictReader(file)
                  if row["key"] == "charts/num_positives"}
    # 4 frames of the first episode and 500 of the second, each counted in the step that follows.
    assert counts == {1000: 0, 2000: 4, 2002: 504}
