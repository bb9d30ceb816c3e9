"""The benchmarks: what tools.dev.benchmark updates, and the flags that tools.benchmark takes."""

import numpy as np
import pytest

import furl_sac_state as furl
from common.errors import UserError
from tools.benchmark import split_command
from tools.dev.benchmark import PHASES, filled_buffers, storing, updating

EMBED_DIM = 12


def test_updates_and_storing_run():
    args = furl.Args(
        batch_size=8, hidden_features=(16, 16), projection_features=(16, 8), buffer_size=6000,
        embedding_buffer_size=2000,
    )
    buffers = filled_buffers(EMBED_DIM, 5000, args)
    assert int(buffers.transitions.total) == 5000
    assert int(buffers.positives.total) == int(buffers.negatives.total) == 2000
    assert np.asarray(buffers.transitions.data.embedding[:5000]).any(1).all()
    for frames in (buffers.positives.data, buffers.negatives.data):
        np.testing.assert_array_equal(frames.time, np.tile(np.arange(500), 4))
        assert np.asarray(frames.before_success).all()
    # Neither is in what it returns: a wrong call or shape raises.
    updating(buffers, EMBED_DIM, args, PHASES["relaying, Eq. 4"])()
    storing(buffers, args.num_envs)()


def test_scripts_with_flags(tmp_path):
    script = tmp_path / "my idea.py"
    script.touch()
    assert split_command(str(script)) == [str(script)]
    assert split_command(f"'{script}' --num-envs 16") == [str(script), "--num-envs", "16"]
    for wrong, message in ((f"'{script}", "No closing quotation"), ("", "no such script"),
                           (str(tmp_path / "other.py"), "no such script")):
        with pytest.raises(UserError, match=message) as error:
            split_command(wrong)
        assert "\n" not in str(error.value)
