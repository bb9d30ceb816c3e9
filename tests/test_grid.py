"""tools.grid: its commands are those of docs/paper.md, and interrupted grids end with the numbers
of runs that were started by hand. Ray and SLURM are real."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import HEED_SIGNALS, ROOT

from common import run_folder
from tools.grid import __main__ as grid
from tools.grid import cells, engines
from tools.grid.cells import Cell, Job, Outcome
from tools.grid.paper_tables import METHODS, PRESETS, TABLES

TINY = ("--num-envs 2 --batch-size 16 --hidden-features 16 16 --learning-starts 600 "
        "--eval-every 1000 --log-every 200 --checkpoint-every 1000").split()
ONE_CORE = {**os.environ, "FURL_NUM_CORES": "1", "OMP_NUM_THREADS": "1", "NPROC": "1"}


def command(output: Path, *words: str, steps: int, seeds: int = 1) -> list[str]:
    return [sys.executable, "-m", "tools.grid", "--scripts", "sac_baseline.py", "--env-ids",
            "reach-v3", "--seeds", str(seeds), "--output", str(output), "--memory-per-run", "1",
            *words, "--", "--total-timesteps", str(steps), *TINY]


def by_hand(folder: Path, steps: int, seed: int = 0) -> list[str]:
    subprocess.run(
        [sys.executable, "sac_baseline.py", "--env-id", "reach-v3", "--seed", str(seed),
         "--total-timesteps", str(steps), *TINY, "--run-dir", str(folder)],
        cwd=ROOT, env=ONE_CORE, check=True, capture_output=True,
    )
    return rows(folder)


def rows(folder: Path) -> list[str]:
    """metrics.csv without what depends on the clock."""
    return [line for line in (folder / "metrics.csv").read_text().splitlines()
            if ",time/" not in line]


@pytest.fixture
def start():
    """`start(words)` begins a grid in the background; none outlives its test."""
    started: list[subprocess.Popen] = []

    def begin(words: list[str]) -> subprocess.Popen:
        heeding = [sys.executable, "-c", HEED_SIGNALS, *words[1:]]
        started.append(subprocess.Popen(heeding, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # its runs save and end
            process.communicate()


def wait_until(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


def run_of(folder: Path) -> tuple[int, int]:
    """The process that holds a run folder, and its parent."""
    for process in psutil.process_iter(["cmdline", "ppid"]):
        words = process.info["cmdline"] or []
        if str(folder) in words and words[1].endswith(".py"):
            return process.pid, process.info["ppid"]
    raise AssertionError(f"no process has {folder}")


# ------------------------------------------------------------------------------ commands


def test_a_reader_that_takes_one_line_of_a_dry_run():
    ours, theirs = os.pipe()
    process = subprocess.Popen([sys.executable, "-m", "tools.grid", "table1", "--dry-run"],
                               cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(ours)  # as `| head -1` does
    os.close(theirs)
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 0


def dry_run(capsys, *words: str, extra: tuple[str, ...] = ()) -> list[str]:
    assert grid.main(grid.tyro.cli(grid.Args, args=[*words, "--dry-run"]), list(extra)) == 0
    return capsys.readouterr().out.splitlines()


def test_commands(capsys, tmp_path):
    words = ("--env-ids", "reach", "drawer-open", "--seeds", "2", "--output", str(tmp_path))
    lines = dry_run(capsys, "table1", *words, "--methods", "sac", "furl")
    assert len(lines) == 2 * 2 * 2
    folder = os.path.relpath(tmp_path)
    assert lines[0] == ("FURL_NUM_CORES=1 python sac_baseline.py --env-id reach-v3 --seed 0 "
                        f"--total-timesteps 1000000 --run-dir {folder}/sac/reach-v3/0")
    assert lines[7] == ("FURL_NUM_CORES=1 python furl_sac_state.py --env-id drawer-open-v3 "
                        "--seed 1 --total-timesteps 1000000 --quality paper --vlm liv --run-dir "
                        f"{folder}/furl/drawer-open-v3/1")
    # Flags that a script lacks are left out, the user's come last, and variants are compared.
    lines = dry_run(capsys, "--scripts", "sac_baseline.py", "furl_sac_state.py --rho 0.1", *words,
                    "--preset", "laptop", extra=("--vlm", "clip", "--batch-size", "32"))
    assert "--vlm" not in lines[0] and "--batch-size 32" in lines[0]
    assert "--batch-size 64" not in lines[0] and "--learning-rate 3e-4" in lines[0]
    assert "--rho 0.1 --vlm clip" in lines[1] and "/furl_sac_state_rho_0.1/reach-v3/0" in lines[1]
    # A preset's VLM is for scripts as for tables' methods, unless they have one of their own.
    lines = dry_run(capsys, "--scripts", "furl_sac_state.py", "furl_sac_state.py --vlm clip",
                    "sac_baseline.py", "--preset", "paper", *words)[:3]
    assert [re.findall("--vlm [a-z]+", line) for line in lines] == [["--vlm liv"], ["--vlm clip"],
                                                                   []]


def test_environments_of_any_suite(capsys, tmp_path):
    lines = dry_run(capsys, "--scripts", "vlm_rm_baseline.py", "--seeds", "1", "--env-ids", "reach",
                    "CartPole-v1", "HumanoidStandingUp-v0", "--output", str(tmp_path))
    assert [re.search(r"--env-id (\S+)", line)[1] for line in lines] == [
        "reach-v3", "CartPole-v1", "HumanoidStandingUp-v0"]


def test_tables_share_runs():
    args = grid.Args(names=("table1", "figure8", "figure9"))
    _, content, planned = grid.plan(args, [])
    assert len(planned) == len({cell.name for cell in planned}) == (8 + 3 + 1) * 10 * 5
    assert content["name"] == "table1+figure8+figure9" and content["total_timesteps"] == 1_000_000
    assert content["methods"]["no-align"] == {
        "script": "furl_sac_state.py", "label": "no reward alignment",
        "flags": "--total-timesteps 1000000 --quality paper --no-align --vlm liv",
    }


def test_paper_page_has_the_same_commands():
    """Each table of docs/paper.md is one of tools/grid/paper_tables.py: labels, commands, order."""
    text = (ROOT / "docs/paper.md").read_text()
    shown = {}
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        found = re.findall(r"^\| ([^|]+?) \| `python ([^`]+)`", body, re.MULTILINE)
        if name := re.match(r"`([\w-]+)`", title):  # FuRL plus's
            shown[name[1]] = found
        for kind, number in re.findall(r"(Table|Figure) (\d+)", title.partition(":")[0]):
            if found:
                shown[kind.lower() + number] = found
    quality = " --quality paper"  # of the paper's preset: $LIV and $CLIP have it
    assert quality in PRESETS["paper"].flags
    vlms = {"liv": " $LIV", "clip": " $CLIP", None: ""}
    assert shown == {
        name: [(m.label, f"{m.script} {m.flags}".strip()
                + (vlms[m.vlm] if table.preset == "paper" else "")
                + quality * (m.script == "drq_baseline.py"))
               for m in (METHODS[method] for method in table.methods)]
        for name, table in TABLES.items()
    }
    for name, flags in PRESETS["paper"].vlms.items():
        assert f'{name.upper()}="{flags}{quality}"' in text
    for line in re.findall(r"python -m tools\.grid (.+)", text):
        words, _, extra = line.partition(" -- ")
        grid.plan(grid.tyro.cli(grid.Args, args=shlex.split(words)), shlex.split(extra))


@pytest.mark.parametrize(("words", "extra", "message"), [
    (["table9"], [], "unknown table 'table9'; there are table1,"),
    ([], [], "name a table or figure (table1,"),
    (["table1", "--methods", "sca"], [], "unknown method 'sca'; there are sac,"),
    (["table1", "--env-ids", "reahc-v3"], [], "did you mean reach-v3"),
    (["--scripts", "no_such.py"], [], "no_such.py cannot be read"),
    (["--scripts", "tools/grid/cells.py"], [], "cells.py has no class Args"),
    (["table1", "plus"], [], "have the presets paper and plus: choose one by --preset"),
    (["table1"], ["--nonsense", "1"], "no script of this grid has the flag --nonsense"),
    (["table1"], ["--seed", "1"], "--seed is the grid's own"),
    (["--scripts", "sac_baseline.py --env-id CartPole-v1"], [],
     "--env-id is the grid's own: use --env-ids"),
    (["table1", "--detach"], [], "--detach is for --engine slurm"),
    (["--scripts", "'x"], [], "is no script with flags"),
    (["table1", "--cores-per-run", "0"], [], "--cores-per-run must be 1 or more, not 0"),
    (["table1", "--gpus-per-run", "1.5"], [], "--gpus-per-run must be a fraction or a whole"),
    (["table1", "--gpus-per-run", "-1"], [], "--gpus-per-run must be a fraction or a whole"),
    (["table1", "--memory-per-run", "nan"], [], "--memory-per-run must be above 0, not nan"),
])
def test_refusals(capsys, words, extra, message):
    with pytest.raises(grid.UserError) as error:
        dry_run(capsys, *words, extra=tuple(extra))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_script_whose_flags_are_not_all_in_it_is_refused(capsys, tmp_path):
    """Else it would run without the preset's, beside others that have them."""
    script = tmp_path / "my_sub.py"
    script.write_text("import sac_baseline\nclass Args(sac_baseline.Args):\n    x: int = 0\n")
    with pytest.raises(grid.UserError, match=r"subclass of flags\.RunArgs itself"):
        dry_run(capsys, "--scripts", str(script))


@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path, engine):
    monkeypatch.setitem(sys.modules, {"ray": "ray", "slurm": "submitit"}[engine], None)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    args = grid.Args(names=("table1",), engine=engine, output=tmp_path)
    with pytest.raises(grid.UserError, match=r"pip install -r requirements-grid\.txt"):
        grid.main(args, [])


def test_what_a_run_gets():
    """A core each without GPUs; four runs to a GPU, each with its part of the cores."""
    args = grid.Args(memory_per_run=3)
    assert engines.share_of(args, cores=16) == engines.Share(1, 0.0, 3 * 2**30)
    shared = engines.share_of(args, cores=16, gpus=1)
    assert (shared.cores, shared.gpus) == (4, 0.25)
    assert shared.variables == {"FURL_NUM_CORES": "4", "OMP_NUM_THREADS": "4", "NPROC": "4",
                                "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    args = grid.Args(memory_per_run=3, gpus_per_run=1, cores_per_run=2)
    alone = engines.share_of(args, cores=16, gpus=2)
    assert (alone.cores, alone.gpus) == (2, 1) and len(alone.variables) == 3


def test_no_slurm_here_is_one_line(tmp_path):
    """As a command: nothing but the line on stderr, and status 2."""
    result = subprocess.run(
        command(tmp_path / "grid", "--engine", "slurm", steps=1000), cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "PATH": str(tmp_path)},
    )
    assert result.returncode == 2
    assert result.stderr == "error: --engine slurm: there is no SLURM here (no sbatch)\n"


def test_a_grid_of_other_runs_is_refused(tmp_path):
    args = grid.Args(names=("table1",), seeds=2, output=tmp_path, methods=("sac",))
    first, second = (grid.plan(args, extra)[1] for extra in ([], ["--utd", "0.5"]))
    grid.write_grid(tmp_path, first)
    with pytest.raises(grid.UserError, match=r"holds other runs of sac "
                       r"\(sac_baseline\.py --total-timesteps 1000000\): choose"):
        grid.write_grid(tmp_path, second)
    more = grid.plan(grid.Args(names=("table1",), seeds=3, methods=("furl",)), [])[1]
    grid.write_grid(tmp_path, more)  # more seeds and methods join
    joined = json.loads((tmp_path / "grid.json").read_text())
    assert list(joined["methods"]) == ["sac", "furl"]
    seeds = [name.split("/") for name in joined["runs"]]
    assert len(seeds) == 50 and {(method, seed) for method, _, seed in seeds} == {
        ("sac", "0"), ("sac", "1"), ("furl", "0"), ("furl", "1"), ("furl", "2")}
    args = grid.Args(names=("table1", "figure8"), seeds=1, methods=("sac", "no-align"))
    grid.write_grid(tmp_path, grid.plan(args, [])[1])  # another table too; the name is the first's
    joined = json.loads((tmp_path / "grid.json").read_text())
    assert list(joined["methods"]) == ["sac", "furl", "no-align"] and joined["name"] == "table1"
    (tmp_path / "grid.json").write_text('{"name": "table1"}')
    with pytest.raises(grid.UserError, match=r"cannot be read .*: choose another --output"):
        grid.write_grid(tmp_path, first)


def test_two_scripts_of_one_name_are_two(tmp_path):
    def content(folder: str, script: str) -> dict:
        (tmp_path / folder).mkdir(exist_ok=True)
        copy = shutil.copy(ROOT / "sac_baseline.py", tmp_path / folder / script)
        return grid.plan(grid.Args(scripts=(str(copy),), output=tmp_path / "grid"), [])[1]

    grid.write_grid(tmp_path / "grid", content("a", "mine.py"))
    grid.write_grid(tmp_path / "grid", content("a", "mine.py"))
    with pytest.raises(grid.UserError, match=r"holds other runs of mine \(.*/a/mine\.py \)"):
        grid.write_grid(tmp_path / "grid", content("b", "mine.py"))


def test_slurm_that_does_not_answer_gets_no_job_twice(tmp_path):
    engine = object.__new__(engines.SlurmEngine)
    engine.record, engine.left = tmp_path / "jobs.json", lambda: None
    engine.record.write_text('{"7": ["sac/reach-v3/0"]}')
    with pytest.raises(grid.UserError, match=r"SLURM does not answer .* try again later"):
        engine.submit([])


# ----------------------------------------------------------------------------- one worker

FAKE = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--run-dir") + 1])
with open(folder / "starts", "a") as file:
    file.write("x")
print({says!r}, flush=True)
{then}
"""


@pytest.mark.parametrize(("says", "then", "starts", "outcome"), [
    ("error: --rho must be 0 or more", "sys.exit(2)", 1,
     Outcome("refused", "error: --rho must be 0 or more")),
    ("oh", "import os; os.kill(os.getpid(), 9)", 3, "failed SIGKILL, 3 times: oh"),
    ("oh", "sys.exit(0 if len((folder / 'starts').read_text()) > 1 else 1)", 2,
     Outcome("finished")),
])
def test_deaths_are_tried_again_and_user_errors_are_not(
        tmp_path, monkeypatch, says, then, starts, outcome):
    monkeypatch.setattr(cells, "FIRST_PAUSE", 0)
    script = tmp_path / "script.py"
    script.write_text(FAKE.format(says=says, then=then))
    cell = Cell("m/t/0", str(script), (), tmp_path / "m/t/0")
    result = Job([cell], {}, str(tmp_path), retries=2).run()["m/t/0"]
    if isinstance(outcome, str):
        assert f"{result.state} {result.text}".startswith(outcome)
    else:
        assert result == outcome
    assert (cell.folder / "starts").read_text() == "x" * starts


def test_deaths_count_since_the_last_progress():
    deaths = cells.Deaths()
    assert [deaths.add(saved) for saved in (None, None, 0, 0, 100, 200, 200)] == [
        1, 2, 1, 2, 1, 1, 2]
    pauses = []
    for _ in range(4):
        deaths.add(200)
        pauses.append(deaths.pause)
    assert pauses == [100, 600, 600, 600], "the third, and on"


def test_a_cell_whose_worker_died_is_submitted_again(tmp_path, monkeypatch):
    """Up to --retries times without any progress, each time with the others that died with it."""

    class Engine:
        stopped_by, submitted = (), []

        def submit(self, cells: list[Cell]) -> None:
            self.submitted.append(cells)

        def poll(self) -> list[tuple[Cell, Outcome]]:
            return [(cell, Outcome("died", "see a log")) for cell in self.submitted[-1]]

    monkeypatch.setattr(grid.time, "sleep", lambda seconds: None)
    mine = [Cell(f"m/t/{seed}", "", (), tmp_path / str(seed)) for seed in (0, 1)]
    engine = Engine()
    engine.submit(mine)
    outcomes = grid.run_grid(engine, mine, 2, io.StringIO())
    assert engine.submitted == [mine] * 3
    assert outcomes == {cell.name: Outcome("died", "see a log") for cell in mine}


def test_two_grids_of_the_same_cell_take_turns(tmp_path):
    """Started while the first one's run is being set up, the second waits until it has ended."""
    script = tmp_path / "script.py"
    script.write_text(FAKE.format(says="hello", then="""
time.sleep(2)
(folder / "config.json").write_text('{"args": {"env_id": "reach-v3", "total_timesteps": 5}}')
(folder / "checkpoints/step_0000000005").mkdir(parents=True)
"""))
    code = ("import sys; from pathlib import Path; from tools.grid.cells import Cell, Job;"
            f"cell = Cell('m/t/0', {str(script)!r}, (), Path({str(tmp_path / 'm/t/0')!r}));"
            f"print(Job([cell], {{}}, {str(tmp_path)!r}).run()['m/t/0'].state)")
    grids = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                              text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in grids] == ["finished\n"] * 2
    assert (tmp_path / "m/t/0/starts").read_text() == "x"


def test_a_run_that_someone_was_quicker_to_start_is_waited_for(tmp_path, monkeypatch):
    script, cell_folder = tmp_path / "script.py", tmp_path / "m/t/0"
    script.write_text(FAKE.format(says="error: in use", then="sys.exit(2)"))
    in_use = iter([False, True, True])
    monkeypatch.setattr(cells, "is_in_use", lambda folder: next(in_use))
    finished = iter([False, False, True])
    monkeypatch.setattr(cells, "is_finished", lambda folder: next(finished))
    cell = Cell("m/t/0", str(script), (), cell_folder)
    assert Job([cell], {}, str(tmp_path)).run() == {"m/t/0": Outcome("finished")}
    assert (cell_folder / "starts").read_text() == "x"


@pytest.mark.parametrize(("task", "success", "mean_return", "shown"), [
    ("reach-v3", 0.0, 0.0, "success 0%"), ("CartPole-v1", 0.0, 312.25, "return 312.2"),
    ("Humanoid-v5", 0.25, 90.0, "success 25%"), ("reach-v3", None, None, "-"),
])
def test_success_is_shown_where_it_exists(task, success, mean_return, shown):
    run = run_folder.Progress(success=success, mean_return=mean_return)
    assert grid.last_evaluation(task, run) == shown
    assert Cell(f"method/{task}/0", "", (), Path()).task == task


def test_progress_is_read_from_the_folder(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"args": {"env_id": "reach-v3", "total_timesteps": 3000}}')
    (tmp_path / "metrics.csv").write_text(
        "env_steps,key,value\n900,eval/success_at_end,0.5\n1000,time/steps_per_second,50\n1200,lo"
    )
    run = run_folder.read_progress(tmp_path)
    assert (run.steps, run.total, run.speed, run.success) == (1000, 3000, 50.0, 0.5)
    assert run.seconds_left == 40 and not run_folder.is_finished(tmp_path)
    (tmp_path / "checkpoints/step_0000003000").mkdir(parents=True)
    assert run_folder.is_finished(tmp_path) and not run_folder.is_in_use(tmp_path)


# -------------------------------------------------------------------------------- engines


def skip_where_ray_does_not_start() -> None:
    """Whatever our code asks of it: it gives up after 30 s on a machine that is too busy."""
    code = "import ray; ray.init(num_cpus=1, include_dashboard=False); ray.shutdown()"
    try:
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=150)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"Ray does not start on this machine: {error}")


def test_ray_interrupted_and_killed_ends_as_by_hand(start, tmp_path):
    """Ctrl-C and the same command again, then Ray's worker killed by SIGKILL: the same metrics."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-grid.txt")
    output, steps = tmp_path / "grid", 3000
    folders = [output / f"sac_baseline/reach-v3/{seed}" for seed in range(2)]
    words = command(output, steps=steps, seeds=2)

    def steps_of(folder: Path) -> int:
        return run_folder.read_progress(folder).steps

    first = start(words)
    try:
        wait_until(lambda: any(steps_of(folder) >= 800 for folder in folders), first)
    except AssertionError:
        skip_where_ray_does_not_start()
        raise
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to all of the group
    assert "stopping: running cells are saved first" in first.communicate()[0]
    assert first.returncode == 130
    saved = [run_folder.saved_steps(folder) or 0 for folder in folders]
    assert max(saved) >= 800 and not any(map(run_folder.is_in_use, folders))
    victim = saved.index(min(saved))

    second = start(words)
    wait_until(lambda: steps_of(folders[victim]) >= max(1000, saved[victim] + 200), second)
    _, worker = run_of(folders[victim])
    os.kill(worker, signal.SIGKILL)
    printed = second.communicate()[0]
    assert second.returncode == 0 and printed.endswith("2 finished\n"), printed
    assert "resumed at" in (folders[victim] / cells.LOG).read_text()
    for seed, folder in enumerate(folders):
        assert rows(folder) == by_hand(tmp_path / str(seed), steps, seed)

    before = [(folder / "metrics.csv").stat().st_mtime_ns for folder in folders]
    third = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, timeout=180)
    assert third.returncode == 0 and "2 runs, 2 finished before" in third.stdout
    assert before == [(folder / "metrics.csv").stat().st_mtime_ns for folder in folders]


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-grid.txt")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    result = subprocess.run(command(tmp_path / "grid", "--address", address, steps=1000), cwd=ROOT,
                            text=True, capture_output=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: no Ray cluster answers at {address}")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM of one node on the loopback address, without accounting."""
    pytest.importorskip("submitit", reason="pip install -r requirements-grid.txt")
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) or os.getuid():
        pytest.skip("needs root and SLURM: apt-get install slurm-wlm munge")
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        subprocess.run(["sh", "-c", "mkdir -p /run/munge && chown munge: /run/munge && "
                        "su -s /bin/sh munge -c munged"], check=True)
    conf, host = tmp_path / "slurm.conf", socket.gethostname()
    ports = []
    for _ in range(2):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            ports.append(unused.getsockname()[1])
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    conf.write_text(f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
StateSaveLocation={tmp_path}/state
SlurmdSpoolDir={tmp_path}/spool
SlurmctldPidFile={tmp_path}/slurmctld.pid
SlurmdPidFile={tmp_path}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
""")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    servers = []
    for name in ("slurmctld", "slurmd"):
        servers.append(subprocess.Popen([name, "-D", "-f", str(conf)], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL))
        time.sleep(2)
    wait_until(lambda: "idle" in subprocess.run(["sinfo", "-h"], capture_output=True,
                                                text=True).stdout, servers[0], 60)
    yield
    subprocess.run(["scancel", "--user", "root"], check=False)
    for server in reversed(servers):
        server.terminate()
        server.wait()


def test_slurm_requeues_at_the_time_limit_and_ends_as_by_hand(slurm, start, tmp_path):
    """Also: a job that was submitted by a command that has gone is found again."""
    output, steps = tmp_path / "grid", 20_000
    folder = output / "sac_baseline/reach-v3/0"
    words = command(output, "--engine", "slurm", "--time-limit", "60", "--signal-delay", "100",
                    steps=steps)
    refused = subprocess.run([*words[:3], "--partition", "none", *words[3:]], cwd=ROOT, text=True,
                             capture_output=True)
    assert refused.returncode == 2
    assert refused.stderr == "error: SLURM refused the jobs: invalid partition specified: none\n"
    subprocess.run([*words[:3], "--detach", *words[3:]], cwd=ROOT, check=True, timeout=60)
    (job,) = json.loads((output / "slurm/jobs.json").read_text())
    process = start(words)

    def slurm_says(*words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def waits_to_begin() -> bool:
        return "PD BeginTime" in slurm_says("squeue", "-h", "-j", job, "-o", "%t %r")

    started = time.monotonic()
    wait_until(lambda: run_folder.read_progress(folder).steps >= 1000, process)
    limit = int((time.monotonic() - started) / 60) + 2  # minutes: the signal is due at once
    slurm_says("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    wait_until(waits_to_begin, process)
    assert (run_folder.saved_steps(folder) or 0) >= 1000
    time.sleep(15)  # SLURM cleans up, and would wait for two minutes
    slurm_says("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60")
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0 and printed.endswith("1 finished\n"), printed
    assert list(json.loads((output / "slurm/jobs.json").read_text())) == [job]
    assert "resumed at" in (folder / cells.LOG).read_text()
    assert rows(folder) == by_hand(tmp_path / "hand", steps)
