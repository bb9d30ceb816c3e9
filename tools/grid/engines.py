"""Where the cells of a grid run: Ray (this machine, or a cluster) and SLURM.

An engine has `submit(cells)`, `poll()` for what has ended since the last call, and `stop()` to let
what runs save. Neither package is needed before its engine is asked for.
"""

import contextlib
import json
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cores import OVERRIDE, num_cores
from common.errors import UserError, first_line
from common.system import python_path
from tools import ROOT
from tools.grid.cells import Cell, Job, Outcome
from tools.shared.folders import written_whole

RUNS_PER_GPU = 4
MANY = 1_000_000  # requeues at SLURM's time limit
STOP_AGAIN_SECONDS = 10


@dataclass(frozen=True)
class Share:
    """What a run gets."""

    cores: int
    gpus: float
    memory: int  # bytes

    @property
    def variables(self) -> dict[str, str]:
        """For its environment. Ray sets OMP_NUM_THREADS, which common/cores.py would keep."""
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if 0 < self.gpus < 1 else {}
        return {OVERRIDE: str(self.cores), "OMP_NUM_THREADS": str(self.cores),
                "NPROC": str(self.cores), **shared}


def share_of(args: Any, cores: float = 0, gpus: float = 0) -> Share:
    """By the flags, else by the machines, which have `cores` and `gpus` together."""
    share = args.gpus_per_run
    if share is None:
        share = 1 / RUNS_PER_GPU if gpus else 0.0
    if not (0 <= share < 1000 and (share <= 1 or share == int(share))):
        raise UserError(f"--gpus-per-run must be a fraction or a whole number, not {share:g}")
    # Without GPUs a core for each run gives most steps in total.
    chosen = args.cores_per_run or (max(1, int(cores * share / gpus)) if gpus else 1)
    return Share(chosen, share, int(args.memory_per_run * 2**30))


class RayEngine:
    """This machine, or a Ray cluster whose machines share this folder's file system."""

    stopped_by = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    _stop_again: float | None = None

    def __init__(self, args: Any):
        # All of these are read when Ray is imported or started.
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
        if args.address and (Path.home() / ".ray/auth_token").exists():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` does
        import ray

        self.ray, self.args = ray, args
        if args.address:  # Ray itself tries for minutes
            host, _, port = args.address.rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=20).close()
            except (OSError, ValueError) as error:
                raise UserError(f"no Ray cluster answers at {args.address} ({error}): --address "
                                "is the head's <host>:<port>") from None
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        quiet = {"log_to_driver": False, "configure_logging": False,
                 "runtime_env": {"env_vars": {"PYTHONPATH": python_path(ROOT)}}}
        settings = {"address": args.address} if args.address else {
            "address": "local", "num_cpus": num_cores(), "include_dashboard": False,
            "object_store_memory": 80 * 2**20}
        for tries_left in (0,) if args.address else (2, 1, 0):
            try:  # it gives itself 30 s to start here, which a busy machine exceeds
                ray.init(**settings, **quiet)
                break
            except Exception as error:  # Ray's have no common class
                ray.shutdown()
                if not tries_left:
                    raise UserError(f"Ray does not start: {first_line(error)}") from None
        total = ray.cluster_resources()
        self.share = share_of(args, total.get("CPU", 0), total.get("GPU", 0))
        wanted = {"CPU": self.share.cores, "GPU": self.share.gpus, "memory": self.share.memory}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(k, 0) >= v for k, v in wanted.items()) for node in nodes):
            most = max(nodes, key=lambda node: node.get("CPU", 0))
            raise UserError(
                f"a run asks for {self.share.cores} cores, {self.share.gpus:g} GPUs and "
                f"{args.memory_per_run:g} GiB, and no machine has that (the largest: "
                f"{most.get('CPU', 0):g}, {most.get('GPU', 0):g}, "
                f"{most.get('memory', 0) / 2**30:.1f} GiB): see --cores-per-run, --gpus-per-run "
                "and --memory-per-run")
        self.where = f"Ray, {total.get('CPU', 0):g} cores, {total.get('GPU', 0):g} GPUs"
        self.task = ray.remote(Job.run).options(
            num_cpus=self.share.cores, num_gpus=self.share.gpus, memory=self.share.memory,
            max_retries=0,  # Ray would count all deaths, not those since the last progress
        )
        self.cells: dict[Any, Cell] = {}  # by Ray's references to their jobs

    def submit(self, cells: list[Cell]) -> None:
        for cell in cells:
            job = Job([cell], self.share.variables, os.getcwd(), self.args.retries)
            self.cells[self.task.remote(job)] = cell

    def poll(self) -> list[tuple[Cell, Outcome]]:
        """What has ended since the last call."""
        if self._stop_again and time.monotonic() > self._stop_again:
            self.stop()
        done, _ = self.ray.wait(list(self.cells), num_returns=len(self.cells), timeout=0)
        ended = []
        for ref in done:
            cell = self.cells.pop(ref)
            try:
                outcome = self.ray.get(ref)[cell.name]
            except self.ray.exceptions.TaskCancelledError:
                outcome = Outcome("stopped")
            except self.ray.exceptions.RayError as error:
                outcome = Outcome("died", (str(error).strip().splitlines() or [
                    type(error).__name__])[-1])
            ended.append((cell, outcome))
        return ended

    def stop(self) -> None:
        """Let what runs save; `poll` tells when it has."""
        for ref in reversed(list(self.cells)):  # waiting ones first: they would start now
            self.ray.cancel(ref)
        # On a busy machine a worker has been seen to miss it: until it ends it is told again.
        self._stop_again = time.monotonic() + STOP_AGAIN_SECONDS


class SlurmEngine:
    """SLURM by submitit. There may be no accounting: `squeue` tells which jobs are left.

    jobs.json beside the jobs' logs says which cells are in which job, so that the same command
    finds the jobs of one that has gone.
    """

    stopped_by = (signal.SIGINT, signal.SIGTERM)  # a closed terminal leaves the jobs as they are

    def __init__(self, args: Any, output: Path):
        if shutil.which("sbatch") is None:
            raise UserError("--engine slurm: there is no SLURM here (no sbatch)")
        from submitit import SlurmExecutor

        self.args, self.share = args, share_of(args)
        if not 0 < args.signal_delay < 60 * args.time_limit:
            raise UserError("--signal-delay must be positive and less than --time-limit")
        # A job asks for whole GPUs, so runs that share one share a job.
        whole = int(1 / self.share.gpus) if 0 < self.share.gpus < 1 else 1
        self.together = args.runs_per_job or whole
        gpus = math.ceil(self.together * self.share.gpus - 1e-9)
        more = dict(pair.partition("=")[::2] for pair in args.sbatch)
        cores = self.together * self.share.cores
        self.executor = SlurmExecutor(output.resolve() / "slurm", max_num_timeout=MANY)
        self.executor.update_parameters(
            job_name="furl-grid", time=args.time_limit, partition=args.partition, nodes=1,
            ntasks_per_node=1, cpus_per_task=cores, signal_delay_s=args.signal_delay,
            mem=f"{self.together * self.share.memory // 2**20}M",
            srun_args=[f"--cpus-per-task={cores}"],  # srun no longer takes it from sbatch
            setup=[f"export PYTHONPATH={shlex.quote(python_path(ROOT))}"],
            additional_parameters={"requeue": True, **more},
            **({"gpus_per_node": gpus} if gpus else {}),
        )
        self.where = f"SLURM, {self.together} runs a job"
        self.record = self.executor.folder / "jobs.json"
        self.jobs: dict[str, tuple[Any, list[Cell]]] = {}  # id -> (submitit's job, its cells)
        self.stopping = False

    def left(self) -> set[str] | None:
        """The ids of our jobs that wait or run; None: SLURM does not answer."""
        try:
            return set(subprocess.run(
                ["squeue", "--me", "--array", "--noheader", "--format=%i"], check=True, text=True,
                capture_output=True, timeout=20,
            ).stdout.split())
        except (OSError, subprocess.SubprocessError):
            return None

    def known_jobs(self) -> dict[str, list[str]]:
        """Id -> names of the cells of every job that this grid has submitted."""
        return json.loads(self.record.read_text()) if self.record.exists() else {}

    def submit(self, cells: list[Cell]) -> None:
        """As one array of jobs, but for cells that a job has already."""
        from submitit import SlurmJob
        from submitit.core.utils import FailedJobError

        left, known, wanted = self.left(), self.known_jobs(), {cell.name: cell for cell in cells}
        if left is None and known:  # or their cells would be submitted twice
            raise UserError(f"SLURM does not answer (squeue), and {self.record} names jobs that "
                            "may still run: try again later")
        for id, names in known.items():
            if id in left and id not in self.jobs:
                mine = [wanted.pop(name) for name in names if name in wanted]
                self.jobs[id] = SlurmJob(self.executor.folder, id), mine
        rest = list(wanted.values())
        groups = [rest[i : i + self.together] for i in range(0, len(rest), self.together)]
        try:
            with self.executor.batch():
                jobs = [self.executor.submit(Job(group, self.share.variables, os.getcwd(),
                                                 self.args.retries)) for group in groups]
        except FailedJobError as error:
            raise UserError("SLURM refused the jobs: "
                            + first_line(error).removeprefix("sbatch: error: ")) from None
        new = {job.job_id: (job, group) for job, group in zip(jobs, groups, strict=True)}
        self.jobs |= new
        names = {id: [cell.name for cell in group] for id, (_, group) in new.items()}
        with written_whole(self.record.parent, keep=True) as folder:
            (folder / self.record.name).write_text(json.dumps(known | names, indent=1) + "\n")

    def poll(self) -> list[tuple[Cell, Outcome]]:
        """What has ended since the last call."""
        ended, left = [], self.left()
        for id in [id for id in self.jobs if left is not None and id not in left]:
            job, cells = self.jobs.pop(id)
            killed = Outcome("stopped" if self.stopping else "died", f"see {job.paths.stderr}")
            outcomes = {}
            if job.paths.result_pickle.exists():
                with contextlib.suppress(Exception):  # the job's own, whatever it was
                    outcomes = job.results()[0]
            ended += [(cell, outcomes.get(cell.name, killed)) for cell in cells]
        return ended

    def stop(self) -> None:
        self.stopping = True
        subprocess.run(["scancel", *self.jobs], check=False)
