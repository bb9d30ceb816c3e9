"""tools.results and tools.wandb_report: numbers by hand, folders in, tables and figures out."""

import csv
import json
import re
import socket
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from scipy.stats import binom

from common.envs.metaworld_tasks import MT10
from common.errors import UserError
from tools import wandb_report
from tools.results import __main__ as results
from tools.results import curves, page, runs, statistics
from tools.results.paper_numbers import TABLES, find_column
from tools.results.runs import Run, make_run
from tools.results.summary import Results, scores_of
from tools.shared.names import folder_name


def a_run(method: str, task: str, seed: int, at_end, *, every: int = 100, **changes) -> Run:
    """A run that was evaluated every `every` steps, at ten steps a second."""
    at_end = np.array(at_end, float)
    env_steps = every * np.arange(1, len(at_end) + 1)
    facts = {
        "method": method, "label": method, "script": "script", "args": {"goal": "fixed"},
        "task": task, "seed": seed, "budget": int(env_steps[-1]), "env_steps": env_steps,
        "success_once": np.maximum.accumulate(at_end), "success_at_end": at_end,
        "seconds": env_steps / 10, "about": {"command": "script.py", "hardware": {}},
        "place": f"{method}/{task}/{seed}",
    }
    return Run(**{**facts, **changes})


def write_run(folder: Path, task: str, seed: int, at_end, *, steps: int | None = None, **args):
    """The same as a run folder; `steps`: its --total-timesteps."""
    folder.mkdir(parents=True)
    script = args.pop("script", "furl_sac_state")
    args = {"env_id": task, "seed": seed, "total_timesteps": steps or 100 * len(at_end),
            "goal": "fixed", "rho": 0.05, "align": True, "run_dir": str(folder), **args}
    (folder / "config.json").write_text(json.dumps({
        "args": args, "script": script, "run_id": folder.as_posix(), "commit": "0123456789ab",
        "command": f"{script}.py --env-id {task} --run-dir {folder} --seed {seed}",
        "versions": {"jax": "1"}, "cpu_count": 2, "num_cores": 1, "jax_devices": ["cpu:0"],
    }))
    rows = ["env_steps,key,value"]
    for i, value in enumerate(at_end):
        rows += [f"{100 * i + 100},eval/success_once,1", f"{100 * i + 100},losses/q,3",
                 f"{100 * i + 100},eval/success_at_end,{value}",
                 f"{100 * i + 100},time/steps_per_second,50"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")


def run_tool(*sources, draw: bool = False, **options):
    """`draw`: the page has its figures, which take most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(page, "plot_curves", lambda results, by_time: None)
        return results.main(results.Args(runs=tuple(map(str, sources)), **options))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------- statistics


def test_wilson_intervals_of_cells_by_hand():
    """z^2 = 3.8415: of 0 in 5 the upper end is z^2 / (5 + z^2); 3 in 5 by the formula."""
    low, high = statistics.interval_of_cell(np.zeros(5))
    assert (low, high) == pytest.approx((0, 3.841459 / 8.841459), abs=1e-6)
    centre = (0.6 + 0.3841459) / 1.7682918
    half = 1.959964 * np.sqrt(0.6 * 0.4 / 5 + 3.841459 / 100) / 1.7682918
    found = statistics.interval_of_cell(np.array([1, 1, 0, 0, 1.0]))
    assert found == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert found == pytest.approx((0.2307, 0.8824), abs=1e-4)


def test_bootstraps_by_hand():
    """Two runs are drawn as (a, a), (a, b), (b, a) or (b, b), so each extreme has a quarter."""
    assert statistics.interval_of_cell(np.array([0.2, 0.4])) == pytest.approx((0.2, 0.4))
    samples = [np.array([0.0, 1]), np.array([1.0, 1])]  # tasks are kept: the second is always 1
    found = statistics.interval_over_runs(samples, statistics.mean_of_tasks)
    assert found == pytest.approx((0.5, 1))
    one = statistics.interval_over_runs([np.ones(1)], statistics.mean_of_tasks)
    assert np.isnan(one).all()


def test_intervals_of_means_are_exact():
    """Of ten tasks with three runs each, one of them a success, the sum is binomial."""
    samples = [np.array([0, 0, 1.0])] * 10
    cumulated = binom.cdf(np.arange(31), 30, 1 / 3)
    ends = [np.argmax(cumulated >= share) / 30 for share in (0.025, 0.975)]
    assert statistics.interval_over_runs(samples, statistics.mean_of_tasks) == pytest.approx(ends)
    # Where the mean has too many values the bootstrap comes near to it.
    rng = np.random.default_rng(0)
    samples = [rng.random(5) for _ in range(6)]
    assert statistics.interval_of_mean(samples) is None
    low, high = statistics.interval_over_runs(samples, statistics.mean_of_tasks)
    error = np.sqrt(sum(x.var() / 5 for x in samples)) / 6
    mean = np.mean(samples)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.01)


def test_interquartile_mean_and_deviation_over_seeds_by_hand():
    samples = [np.array([0, 0.1, 0.2, 10]), np.array([0.3, 0.4, 0.5, 0.6])]
    assert statistics.interquartile_mean(*samples) == pytest.approx(
        (0.2 + 0.3 + 0.4 + 0.5) / 4)
    assert statistics.std_of_seeds(np.array([[1, 0], [1, 1.0]])) == pytest.approx(0.25)
    # The paper's "60 (49)" are three of five.
    of_five = np.array([[1], [1], [1], [0], [0.0]])
    assert round(100 * statistics.std_of_seeds(of_five)) == 49


def test_probability_of_improvement_by_hand():
    """Of nine pairs of the first task four are won and four tied; of the second all are tied."""
    ours, theirs = [np.array([1, 1, 0.0]), np.zeros(2)], [np.array([0, 0, 1.0]), np.zeros(3)]
    share, (low, high) = statistics.probability_of_improvement(ours, theirs)
    assert share == pytest.approx((6 / 9 + 1 / 2) / 2) and low <= share <= high
    assert statistics.probability_of_improvement(theirs, ours)[0] == pytest.approx(
        1 - share)


@pytest.mark.parametrize(("late", "held"), [
    ([1] * 10, True), ([1] * 9 + [0], True), ([1] * 8 + [0, 0], False), ([0.9] * 10, True),
])
def test_held_success_looks_at_the_last_quarter(late, held):
    at_end = np.array([0] * 30 + late)
    share = statistics.last_quarter(np.arange(1, 41) * 100, at_end, 4000)
    assert share == pytest.approx(np.mean(late)) and statistics.is_held(share) == held


def test_without_an_evaluation_in_the_last_quarter_the_last_one_counts():
    assert statistics.last_quarter(np.array([100, 200]), np.array([0, 1.0]), 400) == 1


# -------------------------------------------------------------------------- the paper's


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_papers_percentages_give_its_averages(table):
    """Entered as success rates of five seeds, as runs are; so does what stands beside ours."""
    runs = [a_run(method, task, seed, [0, column.means[row] / 100], args={"goal": table.goal})
            for method, column in table.columns.items() for row, task in enumerate(MT10)
            for seed in range(5)]
    found = Results(runs)
    records = found.records()
    assert list(found.names) == list(table.columns), "in the paper's order"
    for method, column in table.columns.items():
        mean = records[method, "mean"]
        assert 100 * mean["success_at_end"] == pytest.approx(column.average)
        assert 100 * mean["paper"] == pytest.approx(column.average)
        assert mean["runs"] == 50 and records[method, "push-v3"]["runs"] == 5


def test_what_counts_of_a_run():
    assert scores_of(a_run("m", "push-v3", 0, [0, 1, 0]), False) == {
        "success_at_end": 0, "last_quarter": 0, "held": False, "success_once": 1}


def test_the_papers_column_is_found_by_method_and_goal():
    assert find_column("furl-random", "random")[1].average == 64.6
    assert find_column("furl", "random")[0] == "Table 2" and find_column("furl", "fixed")[
        0] == "Table 1"
    assert find_column("furl-pixels", "random") is None
    assert find_column("furl", "random-hidden") is None
    assert find_column(folder_name("FuRL w/o goal-image"), "fixed")[1].average == 70.0


def test_methods_of_one_label_are_told_apart():
    """Tables 1 and 2 both have FuRL."""
    runs = [a_run(method, "push-v3", 0, [0, 1], label="FuRL", args={"goal": goal})
            for method, goal in (("furl-random", "random"), ("furl", "fixed"))]
    found = Results([*runs, a_run("sac", "push-v3", 0, [0, 1], label="SAC")])
    assert list(found.names.values()) == ["SAC", "furl", "furl-random"]
    records = found.records()
    assert records["furl", "push-v3"]["paper"] == 0.8
    assert records["furl-random", "push-v3"]["paper_std"] == pytest.approx(0.08)


def test_means_are_over_the_tasks_that_all_methods_have():
    runs = [a_run("sac", "reach-v3", 0, [0, 1]), a_run("sac", "reach-v3", 1, [0, 0]),
            a_run("sac", "push-v3", 0, [0, 0]),
            a_run("furl", "reach-v3", 0, [0, 1]), a_run("furl", "reach-v3", 1, [0, 1])]
    found = Results(runs)
    records = found.records()
    assert found.tasks == ["push-v3", "reach-v3"] and found.common == ["reach-v3"]
    assert records["sac", "mean"]["success_at_end"] == 0.5
    assert records["sac", "mean"]["paper"] == 0.6 and records["furl", "mean"]["paper"] == 1
    assert records["sac", "mean"]["std"] == 0.5
    share, (low, high) = found.improvements()["furl", "sac"]
    assert (share, low, high) == (0.75, 0.5, 1)
    assert found.improvements()["sac", "furl"] == (0.25, (0, 0.5))
    text = page.make_tables(found, records, found.improvements())[0].markdown()
    assert "Means are over the tasks that every method has: reach-v3." in text and "| – |" in text


# --------------------------------------------------------------------------- run folders


def test_wall_clock_by_hand():
    """100 steps at 10 a second, then 100 at 5: 10 s and 20 s more."""
    found = runs.wall_clock([(100, 10.0), (200, 5.0)], np.array([50, 100, 150, 200]))
    assert found.tolist() == [5, 10, 20, 30]
    for speeds in ([], [(100, 10.0), (200, 0.0)], [(100, np.nan)], [(100, np.inf)]):
        assert np.isnan(runs.wall_clock(speeds, np.array([1]))).all()


def test_from_run_folders_to_a_table_and_back(tmp_path, capsys):
    """FuRL first, SAC added later; then once more from the CSVs alone, to the last byte."""
    for seed, at_end in enumerate(([0, 0, 1, 1], [0, 1, 0, 0])):
        write_run(tmp_path / f"runs/f{seed}", "reach-v3", seed, at_end)
    write_run(tmp_path / "sac", "reach-v3", 0, [0, 0, 0, 1], script="sac_baseline")
    output = tmp_path / "results/mine"
    run_tool(tmp_path / "runs", output=output, label="FuRL")
    run_tool(tmp_path / "sac", output=output, label="SAC", draw=True)
    assert "| reach-v3 | 100 (21 to 100) | 60 | 50 (9 to 91) | 100 |" in capsys.readouterr().out
    assert (output / "furl/reach-v3.csv").read_text().splitlines()[:6] == [
        "seed,env_steps,success_once,success_at_end", "0,100,1,0", "0,200,1,0", "0,300,1,1",
        "0,400,1,1", "1,100,1,0"]
    data = json.loads((output / "furl/reach-v3.json").read_text())
    first = data["runs"][0]
    assert first["command"] == "furl_sac_state.py --env-id reach-v3 --seed 0"
    assert first["commit"] == "0123456789ab" and first["versions"] == {"jax": "1"}
    assert first["hardware"]["cpu_count"] == 2 and first["seconds"] == [2, 4, 6, 8]
    assert str(tmp_path) not in json.dumps(data["args"])
    by_task = {(row["method"], row["task"]): row for row in rows_of(output / "table.csv")}
    assert by_task["FuRL", "reach-v3"]["success_at_end"] == "0.5"
    assert by_task["FuRL", "reach-v3"]["held"] == "0.5", "seed 0 alone ends in success"
    assert by_task["FuRL", "reach-v3"]["last_quarter"] == "0.5"
    assert by_task["SAC", "mean"]["paper"] == "0.6"
    page = (output / "index.html").read_text()
    assert page.count("data:image/png;base64") == 2 and "http" not in page
    assert "FuRL" in page and "50 (9 to 91)" in page and "50; 1 of 2 held" in page
    assert "<span>--env-id</span> <span>reach-v3</span>" in page, "a flag is not broken in two"
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert {path.name for path in before} >= {
        "README.md", "curves.png", "curves.svg", "wall_clock.png", "wall_clock.svg"}
    run_tool(output, draw=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_run_that_was_continued_further(tmp_path):
    """Its evaluations go beyond the steps that its config.json has, as older runs' do."""
    write_run(tmp_path / "a", "reach-v3", 0, [0, 1], steps=100)
    [run] = run_tool(tmp_path / "a", output=tmp_path / "out", label="FuRL")
    assert run.budget == 200
    assert json.loads((tmp_path / "out/furl/reach-v3.json").read_text())["budget"] == 200


def test_a_continued_run_takes_the_place_of_its_first_part(tmp_path):
    """Continuing it has added a command, here with other code on another machine; a run with
    another id is another run."""
    write_run(tmp_path / "a", "reach-v3", 0, [0, 1])
    run_tool(tmp_path / "a", output=tmp_path / "out", label="FuRL")
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["command"] += " && furl_sac_state.py --resume a --total-timesteps 300"
    config["args"]["total_timesteps"] = 300
    config |= {"script_sha256": "a" * 64, "continued": [
        {"env_steps": 200, "commit": "fedcba987654+dirty", "script_sha256": "b" * 64},
        {"env_steps": 250, "num_cores": 2, "jax_devices": ["cuda:0"]}]}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with open(tmp_path / "a/metrics.csv", "a") as file:
        file.write("300,eval/success_once,1\n300,eval/success_at_end,1\n")
    [run] = run_tool(tmp_path / "a", output=tmp_path / "out", label="FuRL")
    assert run.budget == 300
    run_tool(tmp_path / "a", output=tmp_path / "cut", label="FuRL", budget=200)
    text = (tmp_path / "cut/README.md").read_text()
    assert "| 0123456 |" in text and "cuda" not in text, "what came later is not in it"
    run_tool(tmp_path / "out")  # from the CSVs and JSON files
    [made] = [line for line in (tmp_path / "out/README.md").read_text().splitlines()
              if "--resume" in line]
    assert "| 0123456, fedcba9+dirty (2 versions of furl_sac_state.py) |" in made.replace("\\", "")
    assert "| cpu; 1 of 2 cores; cuda; 2 of 2 cores |" in made
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"run_id": "another"}))
    with pytest.raises(UserError, match="is another run of FuRL"):
        run_tool(tmp_path / "a", output=tmp_path / "out", label="FuRL")


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_run(tmp_path / "a", "reach-v3", 0, [0, 1])
    write_run(tmp_path / "b", "push-v3", 0, [0, 1])
    out = tmp_path / "out"

    def fail(*_):
        raise TypeError("a bug")

    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(results, "write_page", fail)
        run_tool(tmp_path / "a", output=out, label="FuRL")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    run_tool(tmp_path / "a", output=out, label="FuRL")
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(results, "write_page", fail)
        run_tool(tmp_path / "b", output=out, label="FuRL")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    run_tool(tmp_path / "b", output=out, label="FuRL")
    assert (out / "notes.txt").exists() and (out / "furl/push-v3.csv").exists()


def test_a_grid_gives_names_and_where_to_write(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        write_run(tmp_path / f"grid/furl-random/push-v3/{seed}", "push-v3", seed, [0, 0.4],
                  goal="random")
    (tmp_path / "grid/grid.json").write_text(json.dumps({
        "name": "table2", "preset": "laptop",
        "runs": [f"furl-random/push-v3/{seed}" for seed in range(3)],
        "methods": {"furl-random": {"script": "furl_sac_state.py", "flags": "", "label": "FuRL"}},
        "total_timesteps": 200}))
    runs = run_tool("grid")
    assert [(run.method, run.label, run.seed) for run in runs] == [
        ("furl-random", "FuRL", 0), ("furl-random", "FuRL", 1)]
    assert not (tmp_path / "results").exists(), "published tables are there, of other runs"
    text = (tmp_path / "grid/results/README.md").read_text()
    assert text.startswith("# table2, preset laptop\n") and "| 40 (40 to 40) ± 0 | 6 ± 8 |" in text
    assert "grid: 1 of 3 runs have not begun" in capsys.readouterr().err
    with pytest.raises(UserError, match="--label mine is for run folders: the methods in grid"):
        run_tool("grid", label="mine")
    (tmp_path / "unfinished/a").mkdir(parents=True)
    (tmp_path / "unfinished/a/config.json").touch()
    with pytest.raises(UserError, match="no finished run among those given"):
        run_tool("unfinished", label="mine", output=tmp_path / "out")


def test_methods_are_named_by_the_flags_in_which_they_differ(tmp_path):
    write_run(tmp_path / "a", "push-v3", 0, [0, 1])
    write_run(tmp_path / "b", "push-v3", 0, [0, 1], rho=0.1, align=False)
    write_run(tmp_path / "c", "push-v3", 0, [0, 1], script="sac_baseline")
    runs = run_tool(*(tmp_path / name for name in "abc"), output=tmp_path / "out")
    assert [run.label for run in runs] == [
        "furl_sac_state --rho 0.05 --align", "furl_sac_state --rho 0.1 --no-align", "sac_baseline"]
    assert runs[1].method == "furl_sac_state_--rho_0.1_--no-align"
    assert (tmp_path / "out" / runs[1].method / "push-v3.csv").exists()


def test_what_cannot_be_in_one_table_is_one_line(tmp_path, refused, capfd):
    write_run(tmp_path / "a", "push-v3", 0, [0, 1])
    write_run(tmp_path / "longer", "push-v3", 1, [0, 1, 1])
    write_run(tmp_path / "again", "push-v3", 0, [0, 0])
    write_run(tmp_path / "other", "push-v3", 1, [0, 0], rho=0.1)
    write_run(tmp_path / "unfinished", "push-v3", 2, [0, 0], steps=1000)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/README.md").write_text("mine")

    def check(sources: str, message: str, *flags: str, output: str = "out") -> None:
        paths = [str(tmp_path / name) for name in sources.split()]
        refused(results, [*paths, "--output", str(tmp_path / output), *flags], message)
        assert not (tmp_path / "out").exists(), "nothing is written"

    check("a longer", "different budgets cannot be in one table: 200 (")
    check("a again", "are both furl_sac_state on push-v3 with seed 0")
    check("a other", "runs of FuRL differ in --rho: 0.05 (", "--label", "FuRL")
    check("empty", "not a run folder (it has no config.json)")
    check("nowhere", "no such folder")
    check("a", "is no results folder: choose another --output", output="notes")
    check("a", "cannot be written (Not a directory)", output="notes/README.md/below")
    check("a", "--budget must be 1 or more, not 0", "--budget", "0")
    refused(results, [str(tmp_path / "a")], "say where to write")
    with pytest.raises(UserError, match="no finished run"):
        run_tool(tmp_path / "unfinished", output=tmp_path / "out")
    with pytest.raises(UserError, match="no finished run"):
        run_tool(tmp_path / "a", output=tmp_path / "out", budget=50)
    assert "unfinished is unfinished and left out: evaluated at 200 of 1,000 steps" in (
        capfd.readouterr().err)
    assert (tmp_path / "notes/README.md").read_text() == "mine"

    runs = run_tool(*(tmp_path / n for n in ("a", "longer", "unfinished")), budget=200,
                    output=tmp_path / "cut")
    assert [(run.seed, run.budget, run.done) for run in runs] == [
        (0, 200, 200), (1, 200, 200), (2, 200, 200)]
    before = (tmp_path / "cut/furl_sac_state/push-v3.csv").read_bytes()
    refused(results, [str(tmp_path / "again"), "--output", str(tmp_path / "cut")],
            "is another run of furl_sac_state than")
    refused(results, [str(tmp_path / "cut"), "--budget", "100"], "would cut")
    assert (tmp_path / "cut/furl_sac_state/push-v3.csv").read_bytes() == before


def test_a_method_has_one_value_of_each_flag(tmp_path, capsys):
    """Also where its first run is older than the flag, and from one call to the next."""
    write_run(tmp_path / "old", "push-v3", 0, [0, 1])
    write_run(tmp_path / "weak", "push-v3", 1, [0, 1], contrastive=0.0)
    write_run(tmp_path / "strong", "push-v3", 2, [0, 1], contrastive=0.5)
    old, weak, strong = (tmp_path / name for name in ("old", "weak", "strong"))
    differ = r"runs of mine differ in --contrastive: 0\.0 \(.*\), 0\.5 \("
    with pytest.raises(UserError, match=differ):
        run_tool(old, weak, strong, output=tmp_path / "out", label="mine")
    run_tool(old, weak, output=tmp_path / "out", label="mine")
    assert f"not all runs of mine have the flag --contrastive: {old} is older" in (
        capsys.readouterr().err)
    with pytest.raises(UserError, match=differ):
        run_tool(strong, output=tmp_path / "out", label="mine")


def test_a_method_has_one_vlm_on_a_task(tmp_path):
    """Its number format may differ; so may the VLMs of two tasks."""
    ids = {("push-v3", 0): "a-fp32", ("push-v3", 1): "a-bf16", ("reach-v3", 0): "b"}
    for number, ((task, seed), vlm_id) in enumerate([*ids.items(), (("push-v3", 2), "b")]):
        write_run(tmp_path / str(number), task, seed, [0, 1])
        config = json.loads((tmp_path / f"{number}/config.json").read_text())
        (tmp_path / f"{number}/config.json").write_text(json.dumps(config | {"vlm_id": vlm_id}))
    run_tool(*(tmp_path / n for n in "012"), output=tmp_path / "out", label="mine")
    assert "| a-bf16, a-fp32, b |" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(UserError, match=r"differ in the VLM on push-v3: a \(.*, b \("):
        run_tool(tmp_path / "3", output=tmp_path / "out", label="mine")


def test_a_budget_between_two_evaluations(tmp_path, capsys):
    """The evaluation before it counts, a line says so, and the results can be added to."""
    for seed in (0, 1):
        write_run(tmp_path / str(seed), "push-v3", seed, [0, 1, 0, 0])
    out = tmp_path / "out"
    run_tool(tmp_path / "0", output=out, label="FuRL", budget=250)
    assert "0 is taken as it was after 200 steps, its last evaluation within --budget 250" in (
        capsys.readouterr().err)
    before = (out / "furl/push-v3.csv").read_bytes()
    run_tool(out)
    assert (out / "furl/push-v3.csv").read_bytes() == before
    runs = run_tool(tmp_path / "1", output=out, label="FuRL", budget=250)
    assert [(run.seed, run.done, run.budget) for run in runs] == [(0, 200, 250), (1, 200, 250)]
    write_run(tmp_path / "2", "push-v3", 2, [0, 1, 0, 0])
    with pytest.raises(UserError, match=r"different budgets cannot be in one table: 250 .* 400"):
        run_tool(tmp_path / "2", output=out, label="FuRL")


def test_what_is_kept_stays_while_its_run_goes_on(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), "push-v3", seed, [0, 1])
        run_tool(tmp_path / str(seed), output=tmp_path / "out", label="FuRL")
    before = (tmp_path / "out/furl/push-v3.csv").read_bytes()
    config = json.loads((tmp_path / "0/config.json").read_text())
    config["args"]["total_timesteps"] = 400
    (tmp_path / "0/config.json").write_text(json.dumps(config))
    run_tool(tmp_path / "0", output=tmp_path / "out", label="FuRL")
    assert "unfinished and left out: evaluated at 200 of 400" in capsys.readouterr().err
    assert (tmp_path / "out/furl/push-v3.csv").read_bytes() == before


def test_a_run_is_in_a_table_once(tmp_path):
    """Without labels another run may give a method another name."""
    write_run(tmp_path / "a", "push-v3", 0, [0, 1])
    write_run(tmp_path / "b", "push-v3", 0, [0, 1], rho=0.1)
    run_tool(tmp_path / "a", output=tmp_path / "out")
    with pytest.raises(UserError, match="a is there already, as furl_sac_state: give it that"):
        run_tool(tmp_path / "a", tmp_path / "b", output=tmp_path / "out")


def test_two_results_folders_are_not_written_into_the_first(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / f"run-{name}", "push-v3", 0, [0, 1])
        run_tool(tmp_path / f"run-{name}", output=tmp_path / name, label=name)
    with pytest.raises(UserError, match=r"b would be written into .*a: say where to write with"):
        run_tool(tmp_path / "a", tmp_path / "b")
    runs = run_tool(tmp_path / "a", tmp_path / "b", output=tmp_path / "both")
    assert [run.label for run in runs] == ["a", "b"]


def test_a_folder_without_runs_keeps_its_title(tmp_path):
    (tmp_path / "results.json").write_text('{"title": "T"}')
    assert results.kept_runs(tmp_path, 100) == ([], {"title": "T"})


@pytest.mark.parametrize("bad", ["nan", "inf", "1.5"])
def test_a_success_that_is_no_share_is_refused(tmp_path, bad):
    write_run(tmp_path / "a", "push-v3", 0, [0, bad])
    with pytest.raises(UserError, match=f"success_at_end is {bad} at step 200, not 0 to 1"):
        run_tool(tmp_path / "a", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_garbage_in_metrics_is_left_out_with_a_line(tmp_path, capsys):
    """As a machine that lost power leaves it at the end."""
    write_run(tmp_path / "a", "push-v3", 0, [0, 1])
    with open(tmp_path / "a/metrics.csv", "ab") as file:
        file.write(b"\x00" * 4000 + b"\n300,eval/success_once,1\n300,eval/succ\xff\xfe\n1,2,x\n")
    [run] = run_tool(tmp_path / "a", output=tmp_path / "out", label="FuRL")
    assert run.env_steps.tolist() == [100, 200]
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("3 lines of its metrics.csv cannot be read and are left out")


@pytest.mark.parametrize(("command", "kept"), [
    ("a.py --run-dir 'x y' --seed 1", "a.py --seed 1"),
    ("a.py --resume=x", "a.py --resume RUN_DIR"),
    ("a.py --seed 1 --total-timesteps 4 && a.py --resume 'x y' --total-timesteps 8",
     "a.py --seed 1 --total-timesteps 4 && a.py --resume RUN_DIR --total-timesteps 8"),
    ("a.py --prompt 'Open it.' --run-dir x", "a.py --prompt 'Open it.'"),
    ("a.py --prompt Don't --run-dir x", "a.py --prompt Don't"),
])
def test_a_command_without_its_place(command, kept):
    assert runs.without_place(command) == kept


# --------------------------------------------------------------------- names and returns


@pytest.mark.filterwarnings("ignore:Glyph")  # the font lacks some
def test_labels_that_differ_stay_two_methods(tmp_path):
    """Also when they come one by one, and whatever is in them."""
    labels = ["方法 一", "方法 二", "a b", "a_b", "A|b", "$x_1$ \\frac", "_hidden", "w/o $",
              "x" * 300]
    out = tmp_path / "out"
    for number, label in enumerate(labels):
        write_run(tmp_path / str(number), "push-v3", 0, [0, 1], rho=0.1 * number)
        run_tool(tmp_path / str(number), output=out, label=label)
    assert {run.label for run in run_tool(out)} == set(labels)
    again = run_tool(tmp_path / "1", output=out, label=labels[1], draw=True)
    assert len(again) == len(labels), "the same label has the same folder"
    assert len(list(out.glob("*/push-v3.csv"))) == len(labels)
    table = (out / "README.md").read_text().split("## ")[1]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert columns == {len(labels) + 2} and r"A\|b" in rows[0] and r"\$x_1\$ \\frac" in rows[0]


def test_a_label_that_is_no_text_is_refused(tmp_path):
    """Before anything is written: such a folder could never be read again."""
    write_run(tmp_path / "a", "push-v3", 0, [0, 1])
    with pytest.raises(UserError, match=r"--label '\\udcff' cannot be written"):
        run_tool(tmp_path / "a", output=tmp_path / "out", label="\udcff")
    assert not (tmp_path / "out").exists()


def write_returns(folder: Path, task: str, seed: int, returns, success=0.0) -> None:
    write_run(folder, task, seed, [success] * len(returns))
    text = (folder / "metrics.csv").read_text()
    if not success:
        text = text.replace("success_once,1", "success_once,0")
    rows = [f"{100 * i + 100},eval/return,{value}" for i, value in enumerate(returns)]
    (folder / "metrics.csv").write_text(text + "\n".join(rows) + "\n")


def test_of_an_environment_without_success_the_return_counts(tmp_path, capsys):
    for seed, returns in enumerate([[-300, -200, -160, -150], [-500, -400, -200, -100]]):
        write_returns(tmp_path / "runs" / str(seed), "Pendulum-v1", seed, returns)
        write_returns(tmp_path / "runs" / f"own{seed}", "mine:A/Own-v0", seed, [1, 2, 3, 4])
        write_returns(tmp_path / "runs" / f"push{seed}", "push-v3", seed, [0, 0, 0, 0])
    run_tool(tmp_path / "runs", output=tmp_path / "out", label="SAC", draw=True)
    for _ in range(2):
        text = capsys.readouterr().out
        section = text[text.index("## Return"):].split("##")[1]
        assert "| Pendulum-v1 | -125 (-150 to -100) ± 25; last quarter -125 |" in section
        assert "| mine:A/Own-v0 | 4 (4 to 4) ± 0; last quarter 4 |" in section
        assert "push" not in section and "Pendulum" not in text[: text.index("## Return")]
        assert "| push-v3 | 0 (0 to 66) |" in text, "it has a success, which was not reached"
        run_tool(tmp_path / "out")  # from the CSVs alone
    assert (tmp_path / "out/sac/Pendulum-v1.csv").read_text().splitlines()[:2] == [
        "seed,env_steps,success_once,success_at_end,return", "0,100,0,0,-300"]
    assert (tmp_path / "out/sac/mine:A%2FOwn-v0.csv").exists()
    assert (tmp_path / "out/sac/push-v3.csv").read_text().startswith(runs.HEADER + "\n")
    [row] = [r for r in rows_of(tmp_path / "out/table.csv") if r["task"] == "Pendulum-v1"]
    assert (row["return"], row["std"], row["success_at_end"]) == ("-125", "25", "")


def test_an_environment_with_a_success_shows_it(tmp_path):
    """One of two runs on it had one."""
    for seed, success in enumerate((0.0, 0.5)):
        write_returns(tmp_path / str(seed), "mine:Own-v0", seed, [5, 6], success)
    found = run_tool(tmp_path / "0", tmp_path / "1", output=tmp_path / "out", label="SAC")
    assert not runs.tasks_of_returns(found) and runs.tasks_of_returns(found[:1])
    assert Results(found).tasks == ["mine:Own-v0"]


def test_what_is_damaged_is_named(tmp_path, capsys):
    write_run(tmp_path / "runs/a", "push-v3", 0, [0, 1])
    (tmp_path / "runs/dead").mkdir()
    (tmp_path / "runs/dead/config.json").touch()  # killed as it began
    [run] = run_tool(tmp_path / "runs", output=tmp_path / "out", label="FuRL")
    assert "left out: " in capsys.readouterr().err and run.seed == 0
    for seed in (0, 1):
        write_run(tmp_path / f"grid/sac/push-v3/{seed}", "push-v3", seed, [0, 1])
    (tmp_path / "grid/sac/push-v3/1/config.json").write_text("")
    (tmp_path / "grid/grid.json").write_text(json.dumps({
        "name": "mine", "preset": "none", "methods": {"sac": {"label": "SAC"}},
        "tasks": ["push-v3"], "seeds": [0, 1]}))
    [run] = run_tool(tmp_path / "grid")
    assert "left out: " in capsys.readouterr().err and run.seed == 0
    path = tmp_path / "out/furl/push-v3.csv"
    path.write_text(path.read_text().replace("0,200,1,1\n", ""))
    with pytest.raises(UserError, match=r"cannot be read: .*its CSV differ for seed 0"):
        run_tool(tmp_path / "out")


# ------------------------------------------------------------------------------- curves


def test_curves_are_means_over_seeds_on_a_common_axis():
    quick = a_run("furl", "push-v3", 0, [0, 1])
    slow = a_run("furl", "push-v3", 1, [0, 0.5], seconds=np.array([20.0, 40]))
    x, values = curves.curve([quick, slow], by_time=False)
    assert x.tolist() == [100, 200] and values.tolist() == [[0, 1], [0, 0.5]]
    x, values = curves.curve([quick, slow], by_time=True)
    assert (x[0], x[-1]) == (20, 40)
    assert values[0].tolist() == [1] * len(x), "a run that has ended keeps its last value"
    assert values[1, -1] == 0.5 and values[1, 0] == 0
    long = a_run("furl", "push-v3", 2, [0] * 20 + [1] * 20)  # mean of the last two evaluations
    assert curves.curve([long], by_time=False)[1][0, 19:22].tolist() == [0, 0.5, 1]


def test_the_figure_has_a_panel_for_each_task_and_for_the_mean():
    runs = [a_run(method, task, seed, [0, value]) for method, value in (("sac", 0), ("furl", 1))
            for task in ("reach-v3", "push-v3") for seed in (0, 1)]
    figure = curves.plot_curves(Results(runs), by_time=False)
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == ["push", "reach", "mean of the tasks"]
    for axis in panels.values():
        lines = {line.get_label(): line.get_ydata().tolist() for line in axis.get_lines()}
        assert lines == {"sac": [0, 0], "furl": [0, 100]}
        assert len(axis.collections) == 2, "a band for each method"
    no_time = [a_run("sac", "push-v3", 0, [0, 1], seconds=np.full(2, np.nan))]
    assert curves.plot_curves(Results(no_time), by_time=True) is None


def test_a_long_legend_stays_within_the_figure():
    runs = [a_run(f"a method with a long name {i}", task, 0, [0, 1])
            for i in range(7) for task in ("push-v3", "reach-v3")]
    figure = curves.plot_curves(Results(runs), by_time=False)
    assert len(figure.legends) == 1 and len(figure.legends[0].get_texts()) == 7
    assert figure.legends[0].get_window_extent().width <= figure.bbox.width


def test_one_figure_of_several_folders(tmp_path, capsys):
    write_run(tmp_path / "a", "push-v3", 0, [0, 1])
    write_run(tmp_path / "b", "push-v3", 0, [0, 1, 1], script="sac_baseline")
    figure = tmp_path / "curves.png"
    runs = run_tool(tmp_path / "a", tmp_path / "b", budget=200, figure=figure)
    assert [run.budget for run in runs] == [200, 200]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "curves.png"}
    with pytest.raises(UserError, match="cannot be written: Format 'foo' is not"):
        run_tool(tmp_path / "a", figure=tmp_path / "curves.foo")
    with pytest.MonkeyPatch.context() as patch:  # as matplotlib does where LaTeX is missing
        patch.setattr("matplotlib.figure.Figure.savefig", mock.Mock(side_effect=RuntimeError("x")))
        with pytest.raises(UserError, match=r"curves\.pgf cannot be written: x"):
            run_tool(tmp_path / "a", figure=tmp_path / "curves.pgf")
    for wrong in ({"figure": tmp_path / "curves"}, {"figure": figure, "output": tmp_path / "out"}):
        with pytest.raises(UserError, match="is all that is written then, without --output"):
            run_tool(tmp_path / "a", **wrong)


# ---------------------------------------------------------------------- Weights & Biases

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_reports_specification_needs_no_network(tmp_path, no_network, capsys):
    for number, (name, rho) in enumerate((("low", 0.05), ("high", 0.1))):
        write_run(tmp_path / name, "push-v3", number, [0, 1], rho=rho)
        run_tool(tmp_path / name, output=tmp_path / "out", label=name)
    wandb_report.main(wandb_report.Args(
        project="mine", results=tmp_path / "out", dry_run=tmp_path / "spec.json"))
    with pytest.raises(UserError, match=r"no/spec\.json cannot be written"):
        wandb_report.main(wandb_report.Args(
            results=tmp_path / "out", dry_run=tmp_path / "no/spec.json"))
    blocks = json.loads((tmp_path / "spec.json").read_text())["blocks"]
    texts = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    assert "| push-v3 | 100 (21 to 100) | 100 (21 to 100) |" in texts[0]
    [grid] = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    shown = {}
    for run_set in grid["runSets"]:
        [shown[run_set["name"]]] = run_set["filters"]["filters"]
    for name, one in shown.items():  # W&B's filters call a run's id its name
        run_id = json.loads((tmp_path / name / "config.json").read_text())["run_id"]
        assert one["key"] == {"section": "run", "name": "name"}
        assert (one["op"], one["value"]) == ("IN", [run_id])
    assert shown.keys() == {"low", "high"}
    assert all(one["grouping"] for one in grid["runSets"])
    panels = [panel["config"] for panel in grid["panelBankSectionConfig"]["panels"]]
    assert [panel["metrics"] for panel in panels] == [[key] for key in wandb_report.CURVES]
    assert all(panel["xAxis"] == "env_steps" for panel in panels)


def test_a_saved_report_prints_its_address(tmp_path, monkeypatch, no_network, capsys):
    """With W&B's server replaced where wandb-workspaces asks it."""
    from wandb_workspaces.reports.v2 import interface

    sent = []

    def answer(_api, _query, variables):
        sent.append(variables)
        kept = {"id": "Vmlldzox", "name": variables["name"], "spec": variables["spec"],
                "displayName": variables["displayName"], "description": variables["description"],
                "project": {"name": "mine", "entityName": "us"}, "createdAt": "2026-01-01T00:00:00",
                "updatedAt": "2026-01-01T00:00:00"}
        return {"upsertView": {"view": kept}}

    project = types.SimpleNamespace(name="mine")
    monkeypatch.setattr(interface, "_get_api", lambda: types.SimpleNamespace(
        projects=lambda entity: [project]))
    monkeypatch.setattr(interface, "execute_graphql", answer)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.example")
    write_run(tmp_path / "a", "push-v3", 0, [0, 1])
    run_tool(tmp_path / "a", output=tmp_path / "out", label="FuRL")
    wandb_report.main(wandb_report.Args(project="mine", entity="us", results=tmp_path / "out"))
    address = "https://wandb.example/us/mine/reports/mine:-methods-compared--Vmlldzox"
    assert capsys.readouterr().out.splitlines()[-1] == address
    assert [(one["entityName"], one["projectName"], one["type"]) for one in sent] == [
        ("us", "mine", "runs")]


def test_runs_of_wandb_are_read_as_folders_are(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "push-v3", 0, [0, 1])
    config = json.loads((tmp_path / "a/config.json").read_text())
    rows = [(int(row["env_steps"]), row["key"], float(row["value"]))
            for row in rows_of(tmp_path / "a/metrics.csv")]

    def scan_history(keys):
        for step in (100, 200):
            yield {"env_steps": step} | {key: value for at, key, value in rows
                                         if at == step and key in keys}

    facts = {key: value for key, value in config.items() if key not in ("args", "script")}
    ours = types.SimpleNamespace(
        config={"exp_name": config["script"], **config["args"], "facts": facts},
        name="a", id=config["run_id"], scan_history=scan_history)
    others = types.SimpleNamespace(config={"lr": 1}, name="another's", id="2")
    broken = types.SimpleNamespace(
        config={"exp_name": "mine", "env_id": "push-v3"}, name="broken", id="3",
        scan_history=scan_history)
    api = types.SimpleNamespace(runs=lambda path: {"us/furl": [ours, others, broken]}[path])
    monkeypatch.setattr("wandb.Api", lambda: api)
    [found], _ = runs.find_runs("wandb:us/furl", None)
    folder = make_run(config, rows, None, "a")
    assert found.success_at_end.tolist() == [0, 1] and found.seconds.tolist() == [2, 4]
    assert (found.args, found.about, found.budget) == (folder.args, folder.about, folder.budget)
    notes = capsys.readouterr().err
    assert "another's: not one of these scripts' runs" in notes and "left out: broken" in notes
    with pytest.raises(UserError, match=r"wandb:us/none: W&B's runs cannot be read"):
        runs.find_runs("wandb:us/none", None)


def test_offline_logging_keeps_script_and_video(tmp_path, monkeypatch):
    from common.evaluate import write_video
    from common.flags import RunArgs
    from common.logger import Logger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_RUN_GROUP", "group-of-mine")
    config = {"args": {"env_id": "push-v3"}, "script": "furl_sac_state", "run_id": "0123abcd"}
    log = Logger(tmp_path, config, RunArgs(track=True, wandb_entity="us", total_timesteps=10))
    video = tmp_path / "videos/00000010.mp4"
    write_video(video, [np.zeros((32, 32, 3), np.uint8)] * 4)
    log.log(10, {"eval/success_once": 1.0})
    log.log_video(10, video)
    log.log_video(20, tmp_path / "videos/none.mp4")  # not drawn
    log.close()
    [folder] = (tmp_path / "wandb").glob("offline-run-*-0123abcd")
    [kept] = folder.rglob("*.mp4")
    assert kept.read_bytes() == video.read_bytes()
    [log] = folder.glob("*.wandb")
    deadline = time.monotonic() + 60  # W&B's own process writes it
    written = (b"group-of-mine", b"exp_name", b"eval/success_once", b"videos/evaluation")
    while not all(x in log.read_bytes() for x in written) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [x for x in written if x not in log.read_bytes()] == []
