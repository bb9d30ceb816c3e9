"""Which frames of which episodes the FuRL scripts rank as positive or negative."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import furl_drq_pixels as drq
import furl_sac_state as furl
from common import checkpoint
from common.envs import VecMetaWorld

COMMON = dict(env_id="drawer-close-v3", num_envs=2, batch_size=8, learning_starts=10**6,
              eval_every=10**6, hidden_features=(16,), relay_until=10**6)
# Episodes of 500 steps, or of five actions; a run's last step is never stored.
CASES = {
    "furl": (furl, furl.Args(**COMMON, total_timesteps=2002, buffer_size=2002), 500),
    "drq": (drq, drq.Args(**COMMON, total_timesteps=2200, buffer_size=200, action_repeat=100,
                          encoder_features=(4, 4)), 5),
}


@pytest.mark.parametrize("name", CASES)
def test_positives_are_all_up_to_the_last_success(name, tmp_path, monkeypatch):
    """Two episodes of two environments; successes as prescribed, all else as in a run."""
    script, args, length = CASES[name]
    successes = {  # (episode, environment): times
        (0, 0): {1, 3},  # the failure between them counts, what follows does not
        (1, 1): {length - 1},
    }
    step_wait, steps = VecMetaWorld.step_wait, 0

    def prescribed(self):
        nonlocal steps
        step = step_wait(self)
        if self.num_envs != args.num_envs:  # the evaluation's
            return step
        episode, time = divmod(steps, length)
        steps += 1
        success = [time in successes.get((episode, env), ()) for env in range(2)]
        return step._replace(success=np.array(success))

    saved = []
    save = checkpoint.save
    monkeypatch.setattr(VecMetaWorld, "step_wait", prescribed)
    monkeypatch.setattr(checkpoint, "save", lambda *a: saved.append(
        (jax.tree.map(np.asarray, a[3]), a[4]["script"]["loop"])) or save(*a))
    script.main(replace(args, run_dir=str(tmp_path / "run")))
    rings, (_, counts, *_) = saved[-1]
    embeddings = rings["transitions" if name == "furl" else "pixels"].data.embedding

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
        assert ring.total == counts[kind] == total
        np.testing.assert_array_equal(ring.data.embedding[:total], np.concatenate(expected))
        first, second = np.split(ring.data.trajectory[:total], [len(expected[0])])
        assert (first == first[0]).all() and (second == second[0]).all() and first[0] != second[0]
        assert (np.ptp(np.concatenate(expected), axis=0) > 0).any(), "all pictures look the same"
