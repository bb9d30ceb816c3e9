"""`tools.benchmark`: the speed of a run, whose turn it is, and the flags beside a script."""

import pytest

from common.errors import UserError
from tools.benchmark import in_turns, split_command, time_run


def test_runs_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert in_turns(functions, 2) == {"a": [1, 3], "b": [2, 4]} and calls == ["a", "b", "a", "b"]


def test_speed_of_a_run(tmp_path):
    """The median of the rows after the first third without the last one, in a folder of its own."""
    script = tmp_path / "writes.py"
    script.write_text(
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[len(sys.argv) - sys.argv[::-1].index('--run-dir')])\n"
        "folder.mkdir()\n"
        "rows = ['env_steps,key,value', *(f'{500 * n},time/steps_per_second,{n}'\n"
        "                                 for n in range(1, 7))]\n"
        "(folder / 'metrics.csv').write_text('\\n'.join(rows) + '\\n')\n"
    )
    speed, _ = time_run([str(script), "--run-dir", str(tmp_path / "elsewhere")], steps=3000)
    assert speed == 4  # of 3, 4 and 5
    assert not (tmp_path / "elsewhere").exists()
    # A --total-timesteps among the script's flags is what counts, as in these rows.
    assert time_run([str(script)], steps=9000)[0] == 4
    script.write_text(script.read_text().replace("range(1, 7)", "range(1, 2)"))
    with pytest.raises(UserError, match="too few rows"):
        time_run([str(script)], steps=3000)
    script.write_text("raise KeyError('a mistake')")
    with pytest.raises(UserError, match=r"(?s)the run failed: .*a mistake"):
        time_run([str(script)], steps=3000)


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
