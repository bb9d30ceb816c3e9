"""Evaluate a trained policy: a checkpoint, a task, N episodes, a table, a JSON and a video.

    python -m tools.evaluate runs/<folder>                       # the run's own task and goals
    python -m tools.evaluate runs/<folder> --goal random-hidden  # goals that it has never seen
    python -m tools.evaluate runs/<folder> --env-id drawer-open-v3 --goal random --seed 7

The mean action is played. Random goals come from a seed that neither training nor the scripts' own
evaluations use; with a fixed goal all episodes are the same, so that one is played. What it writes
is in evaluations/ in the run folder; nothing else there is changed. The video shows the reward as
it unfolds: the run's VLM reward, or the sparse one.
"""

import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from common.cli import check_ranges, run_script
from common.envs.metaworld import VecMetaWorld
from common.envs.metaworld_tasks import prompt_for, resolve_env_id
from common.envs.rendering import Camera
from common.envs.suites import suite_for
from common.envs.workers import WorkerError
from common.errors import UserError
from common.evaluate import EVAL_SEED_OFFSET, Evaluator, write_video
from common.flags import NotNegativeInt
from common.names import file_name
from common.versions import git_commit, versions
from tools.evaluate.trained import Trained, open_run
from tools.shared.folders import new_folder, writable_folder, written_whole
from tools.shared.measures import standard_error, wilson_interval, without_nan

BATCH = 20  # environments side by side; not the number of cores: it decides which goals are drawn
MAX_VIDEOS = 4  # their frames are all in memory: 0.2 GB each
VIDEO_SIZE = 384  # pixels, of the picture in the video
CURVE_HEIGHT = 136
RUN_FACTS = ("script", "args", "command", "commit", "versions", "engine", "vlm_id", "prompt")
WHITE, INK, GREY, BLUE, GREEN = "#ffffff", "#1f2933", "#8a94a0", "#1565c0", "#2e7d32"


@dataclass(frozen=True)
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """run folder"""
    episodes: int = 100
    """episodes to play; with a fixed goal one is, as all would be the same"""
    step: int | None = None
    """which of the kept checkpoints, by its environment steps; default: the newest"""
    env_id: str | None = None
    """another task than the run's own"""
    goal: Literal["fixed", "random", "random-hidden"] | None = None
    """default: as in training"""
    seed: NotNegativeInt | None = None
    """of the goals; default: the run's own for a fixed goal, else one unused so far"""
    videos: int = 1
    """episodes to film, the first ones, at most 4; 0: none"""
    run_code: bool = False
    """execute the copy of the script that the run folder keeps; only for folders that you trust"""
    output: Path | None = None
    """new folder for results; default: in the run folder, evaluations/<what is evaluated>, where
    the same evaluation as before replaces it"""


class Episodes(NamedTuple):
    """E episodes of T steps of the policy."""

    success: np.ndarray  # [T, E] bool
    actions: np.ndarray  # [T, E, 4] float32
    obs: np.ndarray  # [T + 1, E, 39] float32, of the states, the first before the first step


def environments(trained: Trained, num_envs: int, *, env_id: str, goal: str, seed: int,
                 frame_size: int = 0) -> VecMetaWorld:
    """Environments as the run's script makes them for its evaluations."""
    settings = trained.evaluation
    camera = Camera(frame_size, settings["camera_id"], settings["quality"])
    return VecMetaWorld(
        env_id, num_envs, seed=seed, goal=goal, camera=camera if frame_size else None,
        action_repeat=settings["action_repeat"],
    )


def play(trained: Trained, num_episodes: int, **where: Any) -> Episodes:
    """Play the mean action, `BATCH` episodes side by side; `where`: for `environments`."""
    frame_stack = trained.evaluation["frame_stack"]
    size = trained.evaluation["frame_size"] if frame_stack else 0  # what the policy sees
    envs = environments(trained, min(BATCH, num_episodes), frame_size=size, **where)
    rounds = []
    for _ in range(math.ceil(num_episodes / envs.num_envs)):
        state, frames = envs.reset()
        seen = np.concatenate([frames] * frame_stack, -1) if size else state
        success, actions, states, ended = [], [], [state], False
        while not ended:  # all episodes have the same length
            actions.append(trained.policy(seen))
            step = envs.step(actions[-1])
            seen = np.concatenate([seen[..., 3:], step.frames], -1) if size else step.obs
            success.append(step.success)
            states.append(step.final_obs)
            ended = step.truncated.all()
        rounds.append((success, actions, states))
    envs.close()
    joined = (np.concatenate([np.array(x) for x in parts], 1)[:, :num_episodes]
              for parts in zip(*rounds, strict=True))
    return Episodes(*joined)


def draw_again(trained: Trained, actions: np.ndarray, size: int, **where: Any) -> np.ndarray:
    """Frames uint8 [T, E, size, size, 3] of the first E episodes: their actions [T, E, 4] again.

    An environment's goals depend on the seed and its number alone, and physics is deterministic.
    """
    envs = environments(trained, actions.shape[1], frame_size=size, **where)
    envs.reset()
    frames = np.stack([envs.step(action).frames for action in actions])
    envs.close()
    return frames


def summarise(success: np.ndarray, independent: bool) -> dict[str, Any]:
    """The figures of success [T, E] bool; no intervals unless episodes are `independent`."""
    num_episodes = success.shape[1]
    returns = success.sum(0)
    figures: dict[str, Any] = {"episodes": num_episodes}
    for name, outcome in (("success_once", success.any(0)), ("success_at_end", success[-1])):
        successes = int(outcome.sum())
        figures[name] = {
            "rate": successes / num_episodes, "successes": successes,
            "wilson_95": list(wilson_interval(successes, num_episodes)) if independent else None,
        }
    figures["return"] = {
        "mean": float(returns.mean()),
        "standard_error": standard_error(returns) if independent and num_episodes > 1 else None,
    }
    figures["per_episode"] = {
        "success_once": success.any(0).tolist(), "success_at_end": success[-1].tolist(),
        "return": returns.tolist(),
    }
    return figures


def table(figures: dict[str, Any]) -> str:
    lines = [f"{'measure':<16}{'value':>10}   95 % interval"]
    for name in ("success_once", "success_at_end"):
        row = figures[name]
        interval = "-"
        if row["wilson_95"]:
            interval = f"{row['wilson_95'][0]:.1%} to {row['wilson_95'][1]:.1%} (Wilson)"
        lines.append(f"{name:<16}{row['rate']:>10.1%}   {interval}")
    error = figures["return"]["standard_error"]
    remark = "-" if error is None else f"standard error {error:.1f}"
    lines.append(f"{'return':<16}{figures['return']['mean']:>10.1f}   {remark}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------ video


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def wrapped(text: str, width: float, size: int) -> list[str]:
    """`text` in lines of at most `width` pixels; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(size).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def compose(
    frames: np.ndarray, reward: np.ndarray, success: np.ndarray, title: str, label: str,
    every: int, steps_per_frame: int = 1,
) -> list[np.ndarray]:
    """The video's pictures: instruction above, scene, reward so far below.

    Args:
        frames: uint8 [T, size, size, 3]; reward: [T]; success: [T] bool.
        title: the instruction; label: what the curve is.
        every: of how many frames one is shown.
        steps_per_frame: environment steps between two frames.
    """
    size = frames.shape[1]
    lines = wrapped(title, size - 24, 17)
    top = 18 + 22 * len(lines)
    height = -(-(top + size + CURVE_HEIGHT) // 8) * 8  # what H.264's blocks need
    low, high = float(reward.min()), float(reward.max())
    high = high if high - low > 1e-6 else low + 1  # a constant runs along the lower line
    left, right, upper, lower = 52, size - 14, top + size + 34, top + size + CURVE_HEIGHT - 18
    x = np.linspace(left, right, len(reward))
    y = lower - (reward - low) / (high - low) * (lower - upper)
    base = Image.new("RGB", (size, height), WHITE)
    draw = ImageDraw.Draw(base)
    for i, line in enumerate(lines):
        draw.text((12, 10 + 22 * i), line, INK, font(17))
    draw.text((12, upper - 26), label, INK, font(13))
    for value, position in ((high, upper), (low, lower)):
        draw.line((left, position, right, position), "#e3e7eb")
        draw.text((left - 6, position), f"{value:.2f}", GREY, font(12), anchor="rm")
    shown = [*range(0, len(frames), every)]
    if shown[-1] != len(frames) - 1:
        shown.append(len(frames) - 1)
    pictures = []
    for t in shown:
        picture = base.copy()
        picture.paste(Image.fromarray(frames[t]), (0, top))
        draw = ImageDraw.Draw(picture)
        now = f"step {(t + 1) * steps_per_frame}"
        draw.text((right, upper - 26), now, GREY, font(13), anchor="ra")
        if success[t]:
            draw.rectangle((size - 92, top + 8, size - 10, top + 30), GREEN)
            draw.text((size - 51, top + 19), "success", WHITE, font(14), anchor="mm")
        if t:
            points = [(float(a), float(b)) for a, b in zip(x[: t + 1], y[: t + 1], strict=True)]
            draw.line(points, BLUE, 2, joint="curve")
        draw.circle((float(x[t]), float(y[t])), 4, BLUE)
        pictures.append(np.asarray(picture))
    return pictures


def film(
    trained: Trained, episodes: Episodes, count: int, folder: Path, **where: Any
) -> tuple[list[str], str]:
    """Write the first episodes as videos; (their names, what the curve in them is)."""
    actions, success = episodes.actions[:, :count], episodes.success[:, :count]
    frames = draw_again(trained, actions, VIDEO_SIZE, **where)
    rewards, label = success.astype(np.float32), "sparse reward"
    if trained.has_vlm:
        try:
            vlm = trained.vlm
        except UserError as error:
            print(f"note: the video shows the sparse reward: {error}")
        else:
            reward_of = trained.vlm_reward(vlm)
            seen = trained.view.crop(draw_again(trained, actions, trained.view.size, **where))
            found = np.stack([reward_of(vlm.embed_images(seen[:, i])) for i in range(count)], 1)
            if np.isfinite(found).all():
                rewards, label = found, f"VLM reward of this run ({vlm.name})"
            else:
                print("note: the video shows the sparse reward: the VLM reward is not finite")
    title = prompt_for(where["env_id"], None)
    if trained.has_vlm and trained.args.env_id == where["env_id"]:
        title = trained.config["prompt"]
    elif trained.has_vlm:
        label += f": {trained.config['prompt']}"
    names = []
    for i in range(count):
        names.append(f"episode_{i}.mp4")
        repeat = trained.evaluation["action_repeat"]
        write_video(folder / names[-1], compose(
            frames[:, i], rewards[:, i], success[:, i], title, label,
            every=1 if repeat > 1 else 2, steps_per_frame=repeat,
        ))
    return names, label


@contextmanager
def or_without_videos(folder: Path) -> Iterator[None]:
    """What keeps videos from being made costs only them, and a line: the figures are there."""
    try:
        yield
    except (UserError, WorkerError, ImportError) as error:
        for path in folder.glob("*.mp4"):
            path.unlink()
        print(f"note: without a video: {error}")


# -------------------------------------------------------------------------- returns


def evaluate_returns(trained: Trained, args: Args) -> dict[str, Any]:
    """What `main` does where a return counts, not a success: on Gymnasium's environments.

    Episodes are played on the original environment, by default other ones than the run's own. The
    video shows the first of them.
    """
    if args.videos > 1:
        raise UserError(f"--videos must be 0 or 1 for a run on {trained.args.env_id}, not "
                        f"{args.videos}")
    if args.env_id is not None or args.goal is not None:
        raise UserError(f"--env-id and --goal are for Meta-World; this run is on "
                        f"{trained.args.env_id}")
    seed = trained.args.seed + 2 * EVAL_SEED_OFFSET if args.seed is None else args.seed
    env_id = suite_for(trained.args.env_id).evaluated_on(trained.args.env_id)
    output = output_folder(args, trained, env_id, seed, args.episodes)
    same = {"seed": seed, "goal": "fixed", "seed_offset": 0}
    with written_whole(output) as folder:
        evaluate = Evaluator(trained.args.env_id, num_episodes=args.episodes, **same)
        means = evaluate(trained.policy)
        evaluate.close()
        if args.videos:  # apart, so that not all episodes are drawn
            with or_without_videos(folder), closing(Evaluator(
                trained.args.env_id, num_episodes=1, capture_video=True, **same
            )) as film:
                film(trained.policy, folder / "episode_0.mp4")
        results = returns_of(trained, evaluate, means, args, env_id, seed)
        (folder / "evaluation.json").write_text(json.dumps(without_nan(results), indent=1) + "\n")
    mean, success = results["return"], results["success_at_end"]
    error = mean["standard_error"]
    interval = "" if error is None else f" (standard error {error:.1f})"
    low, high = success["wilson_95"]
    text = (f"{trained.folder}: {args.episodes} episodes of {env_id}: mean return "
            f"{mean['mean']:.1f}{interval}, mean length {results['length']:.1f}")
    if results["success_once"]:  # else the environment may know none
        text += f", success at the end {success['mean']:.0%} ({low:.0%} to {high:.0%})"
    print(text)
    print(f"written: {output}")
    return results


def returns_of(
    trained: Trained, evaluate: Evaluator, means: dict[str, float], args: Args, env_id: str,
    seed: int,
) -> dict[str, Any]:
    """What the JSON holds of an evaluation that has been played, whose means are `means`."""
    error = standard_error(evaluate.episodes["return"]) if args.episodes > 1 else None
    low, high = wilson_interval(round(means["eval/success_at_end"] * args.episodes), args.episodes)
    return {
        "env_id": env_id, "seed": seed, "env_steps": trained.env_steps, "episodes": args.episodes,
        "return": {"mean": means["eval/return"], "standard_error": error,
                   "each": evaluate.episodes["return"].tolist()},
        "length": means["eval/length"], "success_once": means["eval/success_once"],
        "success_at_end": {"mean": means["eval/success_at_end"], "wilson_95": [low, high]},
        "run": {key: trained.config.get(key) for key in RUN_FACTS},
        "commit": git_commit(), "versions": versions(),
    }

# ------------------------------------------------------------------------------- main


def output_folder(args: Args, trained: Trained, env_id: str, *what: Any) -> Path:
    """Where the results go: --output, which must be new, or by default a folder in the run's own
    that is named by `what` is evaluated.

    Raises:
        UserError: it is there already, or cannot be written.
    """
    if args.output is not None:
        return new_folder(args.output)
    *what, num_episodes = what
    name = "__".join([f"step_{trained.env_steps}", file_name(env_id), *map(str, what),
                      f"{num_episodes}_episodes"])
    return writable_folder(trained.folder / "evaluations" / name)


def main(args: Args) -> dict[str, Any]:
    """Evaluate, and return what the JSON holds."""
    if args.episodes < 1 or not 0 <= args.videos <= MAX_VIDEOS:
        raise UserError(f"--episodes must be 1 or more and --videos 0 to {MAX_VIDEOS}; they are "
                        f"{args.episodes} and {args.videos}")
    check_ranges(args)
    trained = open_run(args.run, args.step, args.run_code)
    if suite_for(trained.args.env_id).EPISODES_DIFFER:
        return evaluate_returns(trained, args)
    env_id = resolve_env_id(args.env_id or trained.args.env_id)
    goal = args.goal or trained.args.goal
    # Training takes the run's seed, its own evaluations that plus the offset.
    seed = trained.args.seed + (0 if goal == "fixed" else 2 * EVAL_SEED_OFFSET)
    seed = seed if args.seed is None else args.seed
    num_episodes = 1 if goal == "fixed" else args.episodes
    output = output_folder(args, trained, env_id, goal, seed, num_episodes)
    print(f"{trained.folder}: {trained.config['script']}.py, {trained.env_steps:,} steps of "
          f"training on {trained.args.env_id} (goal {trained.args.goal}, seed {trained.args.seed})")
    print(f"played: {num_episodes} episode{'s' * (num_episodes > 1)} of {env_id}, goal {goal}, "
          f"seed {seed}")
    notes = []
    if goal == "fixed":
        notes.append("with a fixed goal all episodes of the mean action are the same: one is "
                     "played, and there is no interval; --goal random-hidden plays unseen goals")
    if goal == "random" and trained.args.goal != "random":
        notes.append("this policy has never been shown a goal: --goal random-hidden hides it, as "
                     "in training")
    if goal != "random" and trained.args.goal == "random":
        notes.append("this policy was trained with the goal in the observation, which is now "
                     "hidden")
    for note in notes:
        print(f"note: {note}")
    where = {"env_id": env_id, "goal": goal, "seed": seed}
    episodes = play(trained, num_episodes, **where)
    figures = summarise(episodes.success, independent=goal != "fixed")
    print(table(figures))
    results = {
        **where, **figures, "notes": notes, "env_steps": trained.env_steps,
        "steps_per_return": trained.evaluation["action_repeat"], "evaluation": {
            **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()},
            "commit": git_commit(), "versions": versions(),
        },
        "run": {key: trained.config.get(key) for key in RUN_FACTS},
    }
    with written_whole(output) as folder:
        if args.videos:
            count = min(args.videos, num_episodes)
            with or_without_videos(folder):
                results["videos"], results["video_curve"] = film(
                    trained, episodes, count, folder, **where)
        (folder / "evaluation.json").write_text(json.dumps(without_nan(results), indent=1) + "\n")
    print(f"written: {output}")
    return results


if __name__ == "__main__":
    run_script(main, Args)
