"""Where the cells of a grid run: Ray (this machine, or a cluster) and SLURM.

An engine has `submit(cells)`, `poll()` for what has ended since the last call, `stop()` to let what
runs save, and `close()`. Neither package is needed before its engine is asked for.
"""

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
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cores import OVERRIDE, num_cores
from common.errors import UserError
from common.run_folder import saved_steps
from tools import ROOT
from tools.grid.cells import Cell, Deaths, Job, Outcome, SlurmJob, run_job

INSTALL = "pip install -r requirements-grid.txt (or: make grid)"
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
    if not (0 <= share <= 1 or (share < 1000 and share == int(share))):
        raise UserError(f"--gpus-per-run must be a fraction or a whole number, not {share:g}")
    if not 0 < args.memory_per_run < 1e6:
        raise UserError(f"--memory-per-run must be above 0 GiB, not {args.memory_per_run:g}")
    chosen = args.cores_per_run
    if chosen is None:  # most steps in total: one core for each run
        chosen = max(1, int(cores * share / gpus)) if gpus else 1
    if chosen < 1:
        raise UserError(f"--cores-per-run must be 1 or more, not {chosen}")
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
        try:
            import ray
        except ImportError:
            raise UserError(f"--engine ray needs Ray: {INSTALL}") from None
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
                 "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}
        settings = {"address": args.address} if args.address else {
            "address": "local", "num_cpus": num_cores(), "include_dashboard": False,
            "object_store_memory": 80 * 2**20}
        for again in (True, True, False):  # it gives itself 30 s, which a busy machine exceeds
            try:
                ray.init(**settings, **quiet)
                break
            except Exception as error:  # Ray's have no common class
                ray.shutdown()
                if again and not args.address:
                    continue
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                where = (f"no Ray cluster answers at {args.address}" if args.address
                         else "Ray does not start on this machine")
                raise UserError(f"{where}: {reason}") from None
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

    def submit(self, cells: list[Cell]) -> None:
        self.task = self.ray.remote(run_job).options(
            num_cpus=self.share.cores, num_gpus=self.share.gpus, memory=self.share.memory,
            max_retries=0,  # Ray would count all deaths, `poll` those since the last progress
        )
        self.cells: dict[Any, Cell] = {}
        self.deaths: defaultdict[str, Deaths] = defaultdict(Deaths)  # of workers and machines
        for cell in cells:
            self.start(cell)

    def start(self, cell: Cell) -> None:
        job = Job([cell], self.share.variables, os.getcwd(), self.args.retries)
        self.cells[self.task.remote(job)] = cell

    def poll(self) -> dict[str, Outcome]:
        """What has ended since the last call."""
        if self._stop_again and time.monotonic() > self._stop_again:
            self.stop()
        done, _ = self.ray.wait(list(self.cells), num_returns=len(self.cells), timeout=0)
        outcomes: dict[str, Outcome] = {}
        for ref in done:
            cell = self.cells.pop(ref)
            try:
                outcomes |= self.ray.get(ref)
            except self.ray.exceptions.TaskCancelledError:
                outcomes[cell.name] = Outcome("stopped")
            except self.ray.exceptions.RayError as error:
                died = not isinstance(error, self.ray.exceptions.RayTaskError)  # else it is a bug
                if (died and self._stop_again is None and
                        self.deaths[cell.name].add(saved_steps(cell.folder)) <= self.args.retries):
                    self.start(cell)
                    continue
                outcomes[cell.name] = Outcome("failed", str(error).strip().splitlines()[-1])
        return outcomes

    def stop(self) -> None:
        """Let what runs save; `poll` tells when it has."""
        for ref in reversed(list(self.cells)):  # waiting ones first: they would start now
            self.ray.cancel(ref)
        # On a busy machine a worker has been seen to miss it: until it ends it is told again.
        self._stop_again = time.monotonic() + STOP_AGAIN_SECONDS

    def close(self) -> None:
        self.ray.shutdown()


class SlurmEngine:
    """SLURM by submitit. There may be no accounting: `squeue` tells which jobs are left.

    jobs.json beside the jobs' logs says which cells are in which job, so that the same command
    finds the jobs of one that has gone.
    """

    stopped_by = (signal.SIGINT, signal.SIGTERM)  # a closed terminal leaves the jobs as they are

    def __init__(self, args: Any, output: Path):
        if shutil.which("sbatch") is None:
            raise UserError("--engine slurm: there is no SLURM here (no sbatch)")
        try:
            from submitit import SlurmExecutor
        except ImportError:
            raise UserError(f"--engine slurm needs submitit: {INSTALL}") from None
        self.args, self.share = args, share_of(args)
        if not 0 < args.signal_delay < 60 * args.time_limit:
            raise UserError("--signal-delay must be positive and less than --time-limit")
        if self.left() is None:
            raise UserError("--engine slurm: SLURM's controller does not answer (see squeue)")
        # A job asks for whole GPUs, so runs that share one share a job.
        whole = int(1 / self.share.gpus) if 0 < self.share.gpus < 1 else 1
        self.together = whole if args.runs_per_job is None else args.runs_per_job
        if self.together < 1:
            raise UserError(f"--runs-per-job must be 1 or more, not {self.together}")
        gpus = math.ceil(self.together * self.share.gpus - 1e-9)
        more = dict(pair.partition("=")[::2] for pair in args.sbatch)
        cores = self.together * self.share.cores
        self.executor = SlurmExecutor(output.resolve() / "slurm", max_num_timeout=MANY)
        self.executor.update_parameters(
            job_name="furl-grid", time=args.time_limit, partition=args.partition, nodes=1,
            ntasks_per_node=1, cpus_per_task=cores, signal_delay_s=args.signal_delay,
            mem=f"{self.together * self.share.memory // 2**20}M",
            srun_args=[f"--cpus-per-task={cores}"],  # srun no longer takes it from sbatch
            setup=[f"export PYTHONPATH={shlex.quote(str(ROOT))}"],
            additional_parameters={"requeue": True, **more},
            **({"gpus_per_node": gpus} if gpus else {}),
        )
        self.where = f"SLURM, {self.together} runs a job"
        self.record = self.executor.folder / "jobs.json"
        self.jobs: dict[str, tuple[Any, list[Cell]]] = {}  # id -> (submitit's job, its cells)
        self.deaths: defaultdict[str, Deaths] = defaultdict(Deaths)  # of jobs, by first cell
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

    def submit(self, cells: list[Cell]) -> None:
        from submitit import SlurmJob as Submitted

        left, wanted = self.left() or set(), {cell.name: cell for cell in cells}
        for id, names in self.known_jobs().items():
            if id in left:
                ours = [wanted.pop(name) for name in names if name in wanted]
                self.jobs[id] = Submitted(self.executor.folder, id), ours
        rest = list(wanted.values())
        if rest:
            self.submit_new([rest[i : i + self.together]
                             for i in range(0, len(rest), self.together)])

    def known_jobs(self) -> dict[str, list[str]]:
        try:
            return json.loads(self.record.read_text())
        except (OSError, ValueError):
            return {}

    def submit_new(self, groups: list[list[Cell]]) -> None:
        """One job for each group of cells, all as one array."""
        from submitit.core.utils import FailedJobError

        jobs = [SlurmJob(cells, self.share.variables, os.getcwd(), self.args.retries)
                for cells in groups]
        try:
            with self.executor.batch():
                submitted = [self.executor.submit(job) for job in jobs]
        except FailedJobError as error:
            reason = next(iter(str(error).strip().splitlines()), "sbatch failed")
            raise UserError("SLURM refused the jobs: "
                            + reason.removeprefix("sbatch: error: ")) from None
        new = {job.job_id: (job, cells) for job, cells in zip(submitted, groups, strict=True)}
        self.jobs |= new
        names = {id: [cell.name for cell in cells] for id, (_, cells) in new.items()}
        self.record.write_text(json.dumps(self.known_jobs() | names, indent=1) + "\n")

    def poll(self) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        left = self.left()
        for id in [id for id in self.jobs if left is not None and id not in left]:
            job, cells = self.jobs.pop(id)
            try:
                ended = job.results()[0] if job.paths.result_pickle.exists() else None
            except Exception:  # the job's own, whatever it was
                ended = None
            if ended is not None:
                outcomes |= ended
            elif not self.stopping and cells and self.deaths[cells[0].name].add(
                    sum(saved_steps(cell.folder) or 0 for cell in cells)) <= self.args.retries:
                self.submit_new([cells])  # the job was killed
            else:
                state = "stopped" if self.stopping else "failed"
                outcomes |= {cell.name: Outcome(state, f"see {job.paths.stderr}")
                             for cell in cells}
        return outcomes

    def stop(self) -> None:
        self.stopping = True
        subprocess.run(["scancel", *self.jobs], check=False)

    def close(self) -> None:
        pass
