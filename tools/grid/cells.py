"""The runs of a grid, one at a time or several side by side, as processes that are looked after.

A cell is one run: a method on a task with a seed. This module is what a worker of Ray or SLURM
imports; `__main__` decides what runs where.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from common.run_folder import is_finished, is_in_use, saved_steps, take_lock

POLL_SECONDS = 0.5
LOG = "output.log"  # what the runs of a folder print
CLAIM = "grid.lock"  # held by the grid that has started the run of a folder
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 600.0  # seconds before a run that died is started again


def planned_runs(folder: Path, grid: dict[str, Any]) -> list[str]:
    """The names of the runs of `folder`'s grid.json, `<method>/<task>/<seed>`; of an older one,
    which has only all tasks and seeds, those that have begun."""
    if "runs" in grid:
        return grid["runs"]
    names = [f"{method}/{task}/{seed}" for seed in grid["seeds"] for task in grid["tasks"]
             for method in grid["methods"]]
    return [name for name in names if (folder / name).exists()]


@dataclass(frozen=True)
class Cell:
    """One run. `script` and `folder` are absolute; `flags` lack only --run-dir."""

    name: str  # <method>/<task>/<seed>
    script: str
    flags: tuple[str, ...]
    folder: Path

    @property
    def task(self) -> str:
        return "/".join(self.name.split("/")[1:-1])  # an environment's id may hold one

    def command(self) -> list[str]:
        """What a user would type after `python`: to begin, or to go on where it was saved."""
        if saved_steps(self.folder) is not None:
            return [self.script, "--resume", str(self.folder)]
        return [self.script, *self.flags, "--run-dir", str(self.folder)]


@dataclass(frozen=True)
class Outcome:
    """How a cell ended, and why: finished, stopped, refused (a user error), failed, or died with
    its worker, machine or job."""

    state: str
    text: str = ""


@dataclass
class Deaths:
    """Deaths of one run since its last progress: if it makes some each time, there is no limit."""

    count: int = 0
    saved: int | None = None  # steps of its newest checkpoint when it died last

    def add(self, saved: int | None) -> int:
        """One more, with `saved` steps in its newest checkpoint; how many there are now."""
        self.count = self.count + 1 if saved == self.saved else 1
        self.saved = saved
        return self.count

    @property
    def pause(self) -> float:
        """Seconds to wait now, ever longer: a full disk or memory may pass."""
        return min(FIRST_PAUSE * 10.0 ** min(self.count - 1, 9), LONGEST_PAUSE)


def last_words(folder: Path) -> str:
    """The last line that a run printed."""
    text = (folder / LOG).read_text(errors="replace").strip()
    return text.split("\n")[-1] or "it printed nothing"


@dataclass
class Job:
    """Cells that share what an engine gives one task, run side by side."""

    cells: list[Cell]
    variables: dict[str, str]  # for the runs' environment, beside this process's own
    cwd: str  # where they start
    retries: int = 3  # of a cell that died, without any progress; a user error is never tried again

    def __post_init__(self) -> None:
        self._running: dict[str, subprocess.Popen] = {}
        self._claims: dict[str, TextIO] = {}
        self._deaths: defaultdict[str, Deaths] = defaultdict(Deaths)
        self._start_at: dict[str, float] = {}

    def run(self) -> dict[str, Outcome]:
        """Run the cells to their ends; whatever interrupts this lets them save first.

        It polls: a worker that waits in a system call cannot be cancelled.
        """
        outcomes: dict[str, Outcome] = {}
        try:
            while len(outcomes) < len(self.cells):
                for cell in self.cells:
                    if cell.name not in outcomes and (outcome := self._look_after(cell)):
                        outcomes[cell.name] = outcome
                if len(outcomes) < len(self.cells):
                    time.sleep(POLL_SECONDS)
        finally:
            self.stop()
        return outcomes

    def stop(self) -> None:
        """Tell the runs to save, and wait for them."""
        while True:
            try:
                for process in self._running.values():
                    process.terminate()
                for process in self._running.values():
                    process.wait()
                while self._claims:
                    self._claims.popitem()[1].close()
                return
            except KeyboardInterrupt:  # Ray cancels by it, maybe more than once
                continue

    def _look_after(self, cell: Cell) -> Outcome | None:
        """Start a cell, or look at its process; how it ended, if it has."""
        process = self._running.get(cell.name)
        if process is None:
            if is_finished(cell.folder):
                return Outcome("finished")
            # The run of a worker that was killed is saving, or another grid has the same cell.
            if (time.monotonic() >= self._start_at.get(cell.name, 0) and self._claim(cell)
                    and not is_in_use(cell.folder)):
                self._running[cell.name] = self._start(cell)
            return None
        status = process.poll()
        if status is None:
            return None
        del self._running[cell.name]
        if status == 0:
            return Outcome("finished")
        words = last_words(cell.folder)
        if status == 2:  # if someone was quicker to start it, it is waited for
            return None if is_in_use(cell.folder) else Outcome("refused", words)
        deaths = self._deaths[cell.name]
        if deaths.add(saved_steps(cell.folder)) > self.retries:
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            return Outcome("failed", f"{how}, {deaths.count} times: {words} ({cell.folder / LOG})")
        self._start_at[cell.name] = time.monotonic() + deaths.pause
        return None

    def _claim(self, cell: Cell) -> bool:
        """Whether the cell is this job's to start. (A run locks its folder when it is set up.)"""
        if cell.name not in self._claims:
            cell.folder.mkdir(parents=True, exist_ok=True)
            if claim := take_lock(cell.folder / CLAIM):
                self._claims[cell.name] = claim
        return cell.name in self._claims

    def _start(self, cell: Cell) -> subprocess.Popen:
        command = [sys.executable, *cell.command()]
        if shutil.which("setpriv"):  # should this process be killed, the run saves and ends
            command = ["setpriv", "--pdeathsig", "TERM", *command]
        with open(cell.folder / LOG, "ab") as log:
            # A session of its own: Ctrl-C in a terminal is for the grid, which tells its runs.
            return subprocess.Popen(
                command, cwd=self.cwd, env={**os.environ, **self.variables},
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    # What submitit asks for: a call that runs the job, and what to submit again in its place. It
    # calls `checkpoint` before SLURM's time limit.

    def __call__(self) -> dict[str, Outcome]:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # scancel: the runs save
        return self.run()

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        self.stop()
        return DelayedSubmission(dataclasses.replace(self))  # without its processes
