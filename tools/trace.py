"""Where the time of an iteration goes: a trace that Perfetto opens, and its summary.

    python -m tools.trace furl_sac_state.py                 # to trace.json.gz
    python -m tools.trace my_idea.py --output mine.json.gz -- --utd 0.25
    python -m tools.trace furl_sac_state.py --xla traces/   # XLA's own threads as well

Open the file at https://ui.perfetto.dev (nothing is uploaded). Rows: the script's main thread, the
updates (from their dispatch until their result is there), and each environment worker. A script
knows nothing of this: its `act` and `update` and the functions that it calls are wrapped from
outside, also in the workers. `update` must return (state, metrics).
"""

import contextlib
import functools
import gzip
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from common import replay
from common.cli import parse_args, run_script
from common.cores import num_cores
from common.envs import workers
from common.envs.suite import Suite
from common.errors import UserError
from common.flags import NotNegativeInt, PositiveInt, check_ranges
from tools.evaluate.trained import load_script

FOLDER = "FURL_TRACE_FOLDER"  # where workers write their events
MAIN, UPDATES = 1, 2  # rows; workers have their process id


@dataclass(frozen=True)
class Args:
    script: Annotated[Path, tyro.conf.Positional]
    """file of the script whose iterations are traced"""
    output: Path = Path("trace.json.gz")
    """file to write"""
    iterations: PositiveInt = 20
    """last iterations of the run that are kept"""
    first: NotNegativeInt = 4000
    """environment steps before them; 4,000: with eight environments whole episodes have ended, and
    so there are projection heads to train"""
    xla: Path | None = None
    """folder for JAX's own profile of the whole run (large)"""


class Recorder:
    """Events (row, name, start, end), in nanoseconds of the clock that all processes share."""

    def __init__(self) -> None:
        self.events: list[tuple[int, str, int, int]] = []

    @contextlib.contextmanager
    def span(self, row: int, name: str):
        start = time.monotonic_ns()
        try:
            yield
        finally:
            self.events.append((row, name, start, time.monotonic_ns()))

    def wrap(self, owner: Any, function: str, name: str, row: int = MAIN) -> None:
        """Make `owner.function` leave an event at each call."""
        original = getattr(owner, function)

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            with self.span(row, name):
                return original(*args, **kwargs)

        setattr(owner, function, wrapped)


def work(socket_fd: int, memory_fd: int) -> None:
    """An environment worker that keeps its events; see `common.envs.workers`."""
    recorder, pid = Recorder(), os.getpid()
    serve, suite_of = workers._work, workers._suite

    def traced_suite(module: str) -> Suite:
        suite = suite_of(module)

        def make_env(*args, **kwargs):
            env = suite.make_env(*args, **kwargs)
            recorder.wrap(env, "step", "physics", pid)
            return env

        def make_draw(*args):
            draw = suite.make_draw(*args)

            def traced_draw(*args, **kwargs):
                with recorder.span(pid, "draw"):
                    return draw(*args, **kwargs)

            return traced_draw

        return replace(suite, make_env=make_env, make_draw=make_draw)

    def serve_and_write(*args) -> None:
        try:
            serve(*args)
        finally:
            path = Path(os.environ[FOLDER]) / f"{pid}.json"
            path.write_text(json.dumps(recorder.events))

    workers._work, workers._suite = serve_and_write, traced_suite
    workers._main(socket_fd, memory_fd)


def wrap_script(recorder: Recorder, script: Any) -> ThreadPoolExecutor:
    """Trace what a script's main calls; the thread that waits for the updates' results."""
    from common.envs.metaworld_envpool import EnvPoolMetaWorld
    from common.run import Run
    from common.vlms import VLM

    for engine in (workers.VecEnv, EnvPoolMetaWorld):
        recorder.wrap(engine, "step_async", "send actions")
        recorder.wrap(engine, "step_wait", "wait for workers")
    recorder.wrap(VLM, "embed_images", "embed")
    recorder.wrap(replay, "add_rows", "store")
    for owner, name in ((replay, "sort_episodes"), (script, "count_positives")):
        if hasattr(owner, name):
            recorder.wrap(owner, name, "sort episodes")
    recorder.wrap(Run, "_play_on", "evaluate")
    recorder.wrap(Run, "save", "checkpoint")
    recorder.wrap(Run, "log_training", "log")
    act, update = script.act, script.update
    waiter = ThreadPoolExecutor(1)

    def traced_act(*args):
        with recorder.span(MAIN, "wait for actions"):  # and for the updates before them
            return jax.block_until_ready(act(*args))

    def wait(start: int, metrics: Any) -> None:
        jax.block_until_ready(metrics)
        recorder.events.append((UPDATES, "updates", start, time.monotonic_ns()))

    def traced_update(*args):
        start = time.monotonic_ns()
        with recorder.span(MAIN, "dispatch updates"):
            state, metrics = update(*args)
        waiter.submit(wait, start, metrics)
        return state, metrics

    script.act, script.update = traced_act, traced_update
    return waiter


def keep_last(events: list, iterations: int) -> tuple[list, int, int]:
    """Events of the last iterations, which begin as actions are sent; (events, start, end)."""
    pauses = [event[2:] for event in events if event[1] == "evaluate"]  # it acts as well
    sent = sorted(
        start for _, name, start, _ in events
        if name == "send actions" and not any(begin < start < end for begin, end in pauses)
    )
    if len(sent) <= iterations:
        raise UserError(f"the run has only {len(sent) - 1} iterations, not {iterations}")
    first, end = sent[-1 - iterations], sent[-1]
    return [event for event in events if first <= event[2] and event[3] <= end], first, end


def summarise(events: list, start: int, end: int, iterations: int, cores: int) -> str:
    """Milliseconds an iteration by row and name, and how much of the time what overlaps."""
    wall = (end - start) / 1e6 / iterations
    totals: dict[tuple[str, str], float] = defaultdict(float)
    workers = sorted({row for row, *_ in events} - {MAIN, UPDATES})
    for row, name, begin, stop in events:
        kind = {MAIN: "main thread", UPDATES: "updates"}.get(row, f"{len(workers)} workers")
        totals[kind, name] += (stop - begin) / 1e6 / iterations
    lines = [f"one iteration: {wall:.1f} ms (mean of {iterations}, {cores} cores)"]
    for (kind, name), total in sorted(totals.items(), key=lambda item: (item[0][0], -item[1])):
        lines.append(f"  {kind:12} {name:18} {total:8.2f} ms  {total / wall:6.1%}")
    drawing = covered([e[2:] for e in events if e[0] in workers])
    updating = covered([e[2:] for e in events if e[0] == UPDATES])
    both = sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in drawing for b in updating)
    length = sum(b - a for a, b in drawing)
    if length and updating:
        lines.append(f"  environments step or draw {length / 1e6 / iterations:.1f} ms of it, "
                     f"{both / length:.0%} of that while updates run")
    return "\n".join(lines)


def covered(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of intervals, as disjoint intervals."""
    union: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


def chrome_trace(events: list, start: int) -> dict[str, Any]:
    """The events in Chrome's trace format, microseconds since `start`."""
    rows = {MAIN: "main thread", UPDATES: "updates"}
    workers = sorted({row for row, *_ in events} - set(rows))
    rows |= {row: f"environment worker {number}" for number, row in enumerate(workers)}
    return {"displayTimeUnit": "ms", "traceEvents": [
        *({"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": {"name": name}}
          for row, name in rows.items()),
        *({"ph": "X", "pid": 1, "tid": row, "name": name, "ts": (begin - start) / 1e3,
           "dur": (end - begin) / 1e3} for row, name, begin, end in sorted(events)),
    ]}


def main(args: Args, flags: list[str]) -> None:
    """Run the script with `flags` on top of the defaults here, and write its trace."""
    check_ranges(args)
    try:
        script = load_script(args.script)
    except Exception as error:
        raise UserError(f"{args.script} cannot be imported ({type(error).__name__}: {error})"
                        ) from None
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():  # else found too late
        raise UserError(f"--output {args.output} must be a file's name in a folder that exists")
    missing = [name for name in ("Args", "main", "act", "update") if not hasattr(script, name)]
    if missing:
        raise UserError(f"{args.script} has no {', '.join(missing)} to trace")
    defaults = ["--learning-starts", str(min(1000, args.first)), "--checkpoint-every", "0",
                "--eval-every", "1000000000", "--log-every", "400"]
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        os.environ[FOLDER] = folder
        workers.WORKER_MODULE = "tools.trace"
        script_args = parse_args(
            script.Args, [*defaults, *flags, "--run-dir", f"{folder}/run"])
        iteration = script_args.steps_per_iteration
        # Seven iterations more than asked for: in the first ones functions are compiled.
        steps = (-(-args.first // iteration) + 5 + args.iterations + 2) * iteration
        script_args = replace(script_args, total_timesteps=steps)
        waiter = wrap_script(recorder, script)
        if args.xla:
            stack.enter_context(jax.profiler.trace(args.xla, create_perfetto_trace=True))
        script.main(script_args)
        waiter.shutdown()
        events = list(recorder.events)
        for path in Path(folder).glob("*.json"):
            events += map(tuple, json.loads(path.read_text()))
    kept, start, end = keep_last(events, args.iterations)
    with gzip.open(args.output, "wt", compresslevel=9) as file:
        json.dump(chrome_trace(kept, start), file)
    print(summarise(kept, start, end, args.iterations, num_cores()))
    print(f"{args.output}: open it at https://ui.perfetto.dev")


if __name__ == "__main__":
    if FOLDER in os.environ:
        work(int(sys.argv[1]), int(sys.argv[2]))
    else:
        split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
        flags = sys.argv[split + 1 :]
        del sys.argv[split:]
        run_script(functools.partial(main, flags=flags), Args)
