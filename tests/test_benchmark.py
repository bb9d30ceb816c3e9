"""The benchmarks: what tools.dev.benchmark updates, and the flags that tools.benchmark takes."""

import numpy as np
import pytest

import furl_sac_state as furl
from common.errors import UserError
from tools.benchmark import split_command, time_run
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
    # Both return nothing: a wrong call or shape raises.
    updating(buffers, EMBED_DIM, args, PHASES["relaying, Eq. 4"])()
    storing(buffers, args.num_envs)()


def test_speed_of_a_run(tmp_path):
    """The median of the rows after the warm-up without the last one, in the given folder."""
    script = tmp_path / "writes.py"
    script.write_text(
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[len(sys.argv) - sys.argv[::-1].index('--run-dir')])\n"
        "folder.mkdir()\n"
        "rows = ['env_steps,key,value', *(f'{500 * n},time/steps_per_second,{n}'\n"
        "                                 for n in range(1, 7))]\n"
        "(folder / 'metrics.csv').write_text('\\n'.join(rows) + '\\n')\n"
    )
    speed, _ = time_run(script, ["--run-dir", "elsewhere"], tmp_path / "run", warm_up=1000)
    assert speed == 4  # of 3, 4 and 5
    with pytest.raises(UserError, match="too few rows"):
        time_run(script, [], tmp_path / "short", warm_up=2500)


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
