"""The trace of an iteration: what is kept, how it is summed up, and a real run."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from tools import trace

ROOT = Path(__file__).resolve().parent.parent
MS = 1_000_000
WORKER = 4711


def iteration(start: int) -> list[tuple[int, str, int, int]]:
    """10 ms: updates from 2 to 8, a worker that draws from 1 to 3 and steps from 3 to 5."""
    spans = [(trace.MAIN, "send actions", 0, 1), (trace.UPDATES, "updates", 2, 8),
             (WORKER, "draw", 1, 3), (WORKER, "physics", 3, 5)]
    return [(row, name, (start + a) * MS, (start + b) * MS) for row, name, a, b in spans]


def test_a_union_of_intervals():
    assert trace.covered([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]


def test_the_last_iterations_are_kept_and_evaluations_are_not():
    events = [event for start in range(0, 50, 10) for event in iteration(start)]
    # Steps of an evaluation at the end, which send actions too.
    events += [(trace.MAIN, "evaluate", 50 * MS, 80 * MS)]
    events += [(trace.MAIN, "send actions", t * MS, (t + 1) * MS) for t in range(51, 79)]
    kept, start, end = trace.keep_last(events, 2)
    assert (start, end) == (20 * MS, 40 * MS)
    assert kept == iteration(20) + iteration(30)
    with pytest.raises(UserError, match="only 4 iterations, not 5"):
        trace.keep_last(events, 5)


def test_the_summary_by_hand():
    text = trace.summarise(iteration(0) + iteration(10), 0, 20 * MS, 2, cores=2)
    assert "one iteration: 10.0 ms (mean of 2, 2 cores)" in text
    assert "updates            updates" not in text
    [updates] = [line for line in text.splitlines() if line.split()[:2] == ["updates", "updates"]]
    assert updates.split()[2:] == ["6.00", "ms", "60.0%"]
    # The worker is busy from 1 to 5, the updates run from 2 on: 3 of 4 ms.
    assert "environments step or draw 4.0 ms of it, 75% of that while updates run" in text


@pytest.mark.parametrize("output", ["", "none/trace.json.gz"])
def test_a_trace_that_could_not_be_written_is_not_made(tmp_path, output):
    args = trace.Args(ROOT / "sac_baseline.py", tmp_path / output)
    with pytest.raises(UserError, match="must be a file's name in a folder that exists"):
        trace.main(args, [])


@pytest.mark.parametrize(("script", "flags", "expected"), [
    ("sac_baseline.py", [], {"physics"}),
    ("sac_baseline.py", ["--engine", "envpool", "--goal", "random"], set()),  # threads of its own
    ("vlm_rm_baseline.py", ["--env-id", "MountainCarAbsorbing-v0"], {"physics", "draw", "embed"}),
])
def test_a_real_run(tmp_path, script, flags, expected):
    output = tmp_path / "sac.json.gz"
    result = subprocess.run(
        [sys.executable, "-m", "tools.trace", script, "--output", str(output), "--iterations", "3",
         "--first", "400", "--", "--num-envs", "2", "--batch-size", "8", "--hidden-features", "8",
         "8", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "one iteration:" in result.stdout and str(output) in result.stdout
    with gzip.open(output, "rt") as file:
        events = json.load(file)["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["ph"] == "M"}
    names = [event["name"] for event in events if event["ph"] == "X"]
    assert {"main thread", "updates"} <= rows
    assert names.count("send actions") == names.count("dispatch updates") == 3
    assert {"physics", "draw", "embed"} & set(names) == expected
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event["ph"] == "X")
