"""Evaluate a trained policy: a task, N episodes, a table, a JSON and a video.

    python -m tools.evaluate runs/<folder>                       # the run's own task and goals
    python -m tools.evaluate runs/<folder> --goal random-hidden  # goals that it has never seen
    python -m tools.evaluate runs/<folder> --env-id drawer-open-v3 --goal random --seed 7
    python -m tools.evaluate runs/<folder> --best                # not the last policy, but the best

The mean action is played. Random goals, and what else differs between episodes, come from a seed
that neither training nor the run's own evaluations use; with a fixed goal of Meta-World all
episodes are the same, so that one is played. What it writes is in evaluations/ in the run folder;
nothing else there is changed. The video shows the reward as it unfolds: the run's VLM reward, or
the environment's.
"""

import json
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from annotated_types import Ge, Le

from common.cli import run_script
from common.envs.registry import suite_for
from common.envs.workers import WorkerError
from common.errors import UserError
from common.evaluate import EVAL_SEED_OFFSET
from common.flags import Goal, NotNegativeInt, PositiveInt, check_ranges
from common.names import file_name
from common.policies import scores
from common.run_folder import kept_policies, read_config, read_metrics
from common.versions import git_commit, versions
from tools.evaluate.trained import Trained, open_run
from tools.evaluate.video import film
from tools.shared.folders import new_folder, writable_folder, written_whole
from tools.shared.measures import standard_error, wilson_interval, without_nan

RUN_FACTS = ("script", "args", "command", "commit", "script_sha256", "versions", "engine", "vlm_id",
             "prompt", "continued")


@dataclass(frozen=True)
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """run folder"""
    episodes: PositiveInt = 100
    """episodes to play; with a fixed goal one is, as all would be the same"""
    step: int | None = None
    """which of the kept policies, by its environment steps; default: the newest checkpoint's, or
    the newest where the checkpoints are deleted"""
    best: bool = False
    """the kept policy that did best in the run's own evaluations: success_at_end, then return"""
    best_reward: bool = False
    """the kept policy at which the VLM reward of training was highest, as in the VLM-RM paper"""
    env_id: str | None = None
    """another task than the run's own"""
    goal: Goal | None = None
    """default: as in training"""
    seed: NotNegativeInt | None = None
    """of the goals; default: the run's own for a fixed goal, else one unused so far"""
    videos: Annotated[int, Ge(0), Le(4)] = 1
    """episodes to film, the first ones, at most 4 (their frames take 0.2 GB of memory each); 0:
    none"""
    run_code: bool = False
    """execute the copy of the script that the run folder keeps; only for folders that you trust"""
    output: Path | None = None
    """new folder for results; default: in the run folder, evaluations/<what is evaluated>, where
    the same evaluation as before replaces it"""


# ------------------------------------------------------------------------ which policy


def chosen_step(args: Args) -> int | None:
    """The environment steps of the policy that the flags ask for; None: the newest checkpoint's.

    Raises:
        UserError: the flags contradict each other, or the run has nothing to choose from.
    """
    if (args.step is not None) + args.best + args.best_reward > 1:
        raise UserError("give one of --step, --best and --best-reward, not several")
    if not (args.best or args.best_reward):
        return args.step
    flag = "--best" if args.best else "--best-reward"
    read_config(args.run, str(args.run))  # is it a run?
    kept = kept_policies(args.run)
    if not kept:
        raise UserError(f"{args.run} has no policies/ for {flag} to choose from: it is older than "
                        "these, or has not evaluated yet; without the flag its last checkpoint is "
                        "evaluated")
    of = scores(args.run) if args.best else training_rewards(args.run, [*kept])
    if not of.keys() & kept.keys():
        what = "evaluations" if args.best else "VLM reward (reward/vlm_mean)"
        raise UserError(f"{args.run}: its metrics.csv has no {what} for {flag} to choose by")
    chosen = max(kept.keys() & of.keys(), key=lambda steps: (of[steps], steps))
    if args.best:
        found = "success_at_end {:.0%}, return {:.1f} in its own evaluation".format(*of[chosen])
    else:
        found = f"VLM reward {of[chosen]:.4f} in training"
    print(f"{flag}: step {chosen} of {len(kept)} kept policies: {found}")
    return chosen


def training_rewards(run_dir: Path, at: list[int]) -> dict[int, float]:
    """The VLM reward of training at these environment steps, or just before; where there is one."""
    rows = [(steps, value) for steps, key, value in read_metrics(run_dir).rows
            if key == "reward/vlm_mean"]
    before = {steps: [value for logged, value in rows if logged <= steps] for steps in at}
    return {steps: values[-1] for steps, values in before.items() if values}


# ----------------------------------------------------------------------------- figures


def summarise(episodes: dict[str, np.ndarray], independent: bool) -> dict[str, Any]:
    """The figures of what an `Evaluator` has measured of each of E episodes, [E] each.

    No intervals unless the episodes are `independent`.
    """
    num_episodes = len(episodes["return"])
    figures: dict[str, Any] = {"episodes": num_episodes}
    for name in ("success_once", "success_at_end"):
        successes = int(episodes[name].sum())
        figures[name] = {
            "rate": successes / num_episodes, "successes": successes,
            "wilson_95": list(wilson_interval(successes, num_episodes)) if independent else None,
        }
    for name in ("return", "length"):
        error = standard_error(episodes[name]) if independent and num_episodes > 1 else None
        figures[name] = {"mean": float(episodes[name].mean()), "standard_error": error}
    figures["per_episode"] = {name: values.tolist() for name, values in episodes.items()}
    return figures


def table(figures: dict[str, Any], lengths: bool = False) -> str:
    """`lengths`: those of episodes can differ, and then success need not be known."""
    lines = [f"{'measure':<16}{'value':>10}   95 % interval"]
    for name in ("success_once", "success_at_end"):
        row = figures[name]
        if lengths and not figures["success_once"]["successes"]:
            continue
        interval = "-"
        if row["wilson_95"]:
            interval = f"{row['wilson_95'][0]:.1%} to {row['wilson_95'][1]:.1%} (Wilson)"
        lines.append(f"{name:<16}{row['rate']:>10.1%}   {interval}")
    for name in ("return", "length") if lengths else ("return",):
        error = figures[name]["standard_error"]
        remark = "-" if error is None else f"standard error {error:.1f}"
        lines.append(f"{name:<16}{figures[name]['mean']:>10.1f}   {remark}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- main


def evaluate(trained: Trained, args: Args) -> dict[str, Any]:
    """Play, print and write; returns what the JSON holds.

    Raises:
        UserError: the flags do not fit the run.
    """
    suite = suite_for(trained.args.env_id)
    if suite.starts_differ and (args.env_id is not None or args.goal is not None):
        raise UserError(f"--env-id and --goal are for Meta-World; this run is on "
                        f"{trained.args.env_id}")
    env_id = suite.evaluated_on(suite.resolve_env_id(args.env_id or trained.args.env_id))
    own_goal = getattr(trained.args, "goal", "fixed")
    goal = args.goal or own_goal
    same = suite_for(env_id).all_same(goal)
    # Training takes the run's seed, its own evaluations that plus the offset.
    seed = trained.args.seed + (0 if same else 2 * EVAL_SEED_OFFSET)
    seed = seed if args.seed is None else args.seed
    num_episodes = 1 if same else args.episodes
    where = {"env_id": env_id, "goal": goal, "seed": seed}
    name = (f"step_{trained.env_steps}__{file_name(env_id)}__{goal}__{seed}__{num_episodes}"
            "_episodes")
    output = (new_folder(args.output) if args.output else
              writable_folder(trained.folder / "evaluations" / name))
    print(f"{trained.folder}: {trained.config['script']}.py, {trained.env_steps:,} steps of "
          f"training on {trained.args.env_id} (goal {own_goal}, seed {trained.args.seed})")
    print(f"played: {num_episodes} episode{'s' * (num_episodes > 1)} of {env_id}, goal {goal}, "
          f"seed {seed}")
    notes = []
    if same:
        notes.append("with a fixed goal all episodes of the mean action are the same: one is "
                     "played, and there is no interval; --goal random-hidden plays unseen goals")
    if same and args.best:
        notes.append("--best chose the policy by this same episode: see the curve for what others "
                     "do")
    if goal == "random" and own_goal != "random":
        notes.append("this policy has never been shown a goal: --goal random-hidden hides it, as "
                     "in training")
    if goal != "random" and own_goal == "random":
        notes.append("this policy was trained with the goal in the observation, which is now "
                     "hidden")
    for note in notes:
        print(f"note: {note}")
    with closing(trained.evaluator(num_episodes=num_episodes, **where)) as evaluator:
        evaluator(trained.policy)
    figures = summarise(evaluator.episodes, independent=not same)
    print(table(figures, lengths=suite.lengths_differ))
    results = {
        **where, **figures, "notes": notes, "env_steps": trained.env_steps,
        "action_repeat": trained.evaluation["action_repeat"], "evaluation": {
            **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()},
            "commit": git_commit(), "versions": versions(),
        },
        "run": {key: trained.config.get(key) for key in RUN_FACTS},
    }
    with written_whole(output) as folder:
        write_results(folder, results)
    if args.videos:  # whatever becomes of them, the figures are there
        try:
            with written_whole(output, keep=True) as folder:
                results["videos"], results["video_curve"] = film(
                    trained, evaluator, min(args.videos, num_episodes), folder, **where)
                write_results(folder, results)
        except (UserError, WorkerError, ImportError) as error:
            print(f"note: without a video: {error}")
    print(f"written: {output}")
    return results


def write_results(folder: Path, results: dict[str, Any]) -> None:
    (folder / "evaluation.json").write_text(json.dumps(without_nan(results), indent=1) + "\n")


def main(args: Args) -> dict[str, Any]:
    """Evaluate, and return what the JSON holds."""
    check_ranges(args)
    return evaluate(open_run(args.run, chosen_step(args), args.run_code), args)


if __name__ == "__main__":
    run_script(main, Args)
