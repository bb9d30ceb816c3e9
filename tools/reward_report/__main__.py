"""Should I trust this VLM with this prompt on this task? A report, without training.

    python -m tools.reward_report --env-id drawer-open-v3
    python -m tools.reward_report --env-id drawer-open-v3 --prompt "Open a drawer." long --vlm clip
    python -m tools.reward_report --env-id drawer-close-v3 --checkpoints runs/<folder>

The expert, an expert that gives up half-way and wanders, and random actions play the same goals;
the VLM scores what is seen. Writes PNGs, one HTML page that needs nothing else, and a JSON. The
figures are those of the FuRL paper (Fu et al., ICML 2024: 1, 2, 11, 16, 17) and of the VLM-RM paper
(Rocamonde et al., ICLR 2024: 4a, 7), the EPIC distance is that of its Lemma 1.
"""

import json
import math
import multiprocessing
import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from common.cli import run_script
from common.cores import num_cores
from common.envs.metaworld_suite import MAX_EPISODE_STEPS, goal_image, make_env
from common.envs.metaworld_tasks import (
    baseline_prompt_for,
    expert_action,
    expert_policy,
    prompt_for,
    resolve_env_id,
)
from common.envs.registry import METAWORLD
from common.envs.rendering import Camera
from common.errors import UserError
from common.evaluate import EVAL_SEED_OFFSET
from common.flags import NotNegativeInt, PositiveInt, check_ranges
from common.run_folder import make_free_folder
from common.versions import git_commit, versions
from common.vlms import VLM, load_vlm, view_for
from common.vlms.interface import centre_view
from tools.evaluate.trained import Trained, open_run
from tools.reward_report.episodes import (
    EXPERT,
    KINDS,
    SUBOPTIMAL,
    WORKER_ENVIRONMENT,
    Data,
    Scene,
    draw_episodes,
)
from tools.reward_report.page import (
    COLUMNS,
    cell,
    page,
    plot_curves,
    plot_epic,
    plot_frames,
    plot_histograms,
    plot_paths,
    table_rows,
)
from tools.shared.folders import new_folder, writable_folder, written_whole
from tools.shared.measures import (
    auc,
    check_finite,
    epic_distance,
    goal_baseline_reward,
    means_the_same,
    pixel_embedding,
    spearman,
    standard_error,
    without_nan,
)
from tools.shared.plots import plt

ALPHAS = np.linspace(0, 1, 11).round(1)  # strengths of goal-baseline regularisation


@dataclass(frozen=True)
class Args:
    env_id: str = "drawer-open-v3"
    """any Meta-World v3 task"""
    vlm: str = "mini"
    """mini, liv, clip, or an open_clip pair such as ViT-B-32/openai"""
    vlm_weights: str | None = None
    """local weights file for --vlm"""
    prompt: tuple[str, ...] = ()
    """prompts to compare; default: the task's instruction; short, long, none as in training"""
    baseline_prompt: str | None = None
    """for goal-baseline regularisation; default: the task's own"""
    checkpoints: tuple[Path, ...] = ()
    """run folders: their reward after alignment, and the paths of their policies"""
    episodes: Annotated[int, Ge(2)] = 50
    """goals, each played by the expert, sub-optimally and at random"""
    steps: int = 200
    """environment steps of an episode"""
    every: PositiveInt = 4
    """environment steps from one picture to the next"""
    goal: Literal["fixed", "random"] | None = None
    """default: as the first checkpoint was trained, else random"""
    seed: NotNegativeInt | None = None
    """of goals and behaviour; default: the first checkpoint's fixed goal, else unseen ones"""
    camera_id: int = 2
    """camera of the pictures"""
    quality: Literal["fast", "paper"] = "fast"
    """of the pictures; paper: MuJoCo's default, slow"""
    run_code: bool = False
    """execute the copies of scripts in the run folders; only for folders that you trust"""
    workers: NotNegativeInt = 0
    """processes that play and draw; 0: one per core; no effect on the results"""
    output: Path | None = None
    """new folder; default: reports/<task>__<vlm>, with -2, -3 ... behind it if that exists"""


# ------------------------------------------------------------------------------- data


def collect(scene: Scene, episodes: int, workers: int, vlm: VLM, goal: np.ndarray | None) -> Data:
    """Play, draw and embed; pictures are embedded as they come, so that few are held.

    `goal`: the goal picture as it is drawn, of which the VLM sees its own view.
    """
    view = view_for(vlm, METAWORLD)
    embeddings, distance, success, first_success, first = [], [], [], [], None
    before = dict(os.environ)
    os.environ.update(WORKER_ENVIRONMENT)  # the pool's processes start with these
    pool = multiprocessing.get_context("spawn").Pool(workers)
    os.environ.clear()
    os.environ.update(before)
    with pool:
        for drawn in pool.imap(partial(draw_episodes, scene), range(episodes)):
            whole = drawn.frames.reshape(-1, *drawn.frames.shape[2:])
            embeddings.append(np.asarray(vlm.embed_images(view.crop(whole))))
            if goal is not None:
                pixels = middle_pixels(whole) - middle_pixels(goal[None])
                distance.append(np.linalg.norm(pixels, axis=-1))
            success.append(drawn.success)
            first_success.append(drawn.first_success)
            first = view.crop(drawn.frames) if first is None else first
    shape = np.shape(success)
    embedded = np.stack(embeddings).reshape(*shape, -1)
    nearness = {}
    if goal is not None:
        goal_embedding = np.asarray(vlm.embed_images(view.crop(goal[None])))[0]
        nearness = {vlm.name: -np.linalg.norm(embedded - goal_embedding, axis=-1),
                    "raw pixels": -np.reshape(distance, shape)}
    return Data(embedded, nearness, np.array(success), np.array(first_success), first)


def middle_pixels(frames: np.ndarray) -> np.ndarray:
    """The middle three quarters of whole pictures [n, size, size, 3] at 32 px, flat."""
    import torch

    size = frames.shape[1]
    middle = centre_view(size, size // 8).crop(frames)
    return pixel_embedding(torch.from_numpy(middle).permute(0, 3, 1, 2).float() / 255)


def cosine_similarity(text: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Eq. 2 of the FuRL paper: text [D], images [..., D] -> [...]."""
    return images @ text / np.linalg.norm(text) / np.linalg.norm(images, axis=-1)


# ---------------------------------------------------------------------------- figures


def measure(reward: np.ndarray, data: Data, every: int, seed: int) -> dict[str, Any]:
    """What one reward [E, 3, n] is worth on `data`; NaN where there is nothing to measure.

    spearman: of reward and time from the start to the first success, per expert episode, the mean;
    auc: P(a success frame scores above another one), over all frames, with the 95 % interval of a
    bootstrap over goals; auc_suboptimal: the same against sub-optimal frames alone; fooled: share
    of sub-optimal episodes with a failure frame that scores like a success (at least the median of
    success frames); epic: Lemma 1, the states being those of all frames.
    """
    ways = [episode[: max(first, 0) // every + 1] for episode, first in
            zip(reward[:, EXPERT], data.first_success[:, EXPERT], strict=True)]
    progress = np.array([spearman(np.arange(len(way)), way) for way in ways if len(way) > 2])
    progress = progress[~np.isnan(progress)]
    goal, other = reward[data.success], reward[~data.success]
    failures = ~data.success[:, SUBOPTIMAL]
    highest = np.where(failures, reward[:, SUBOPTIMAL], -np.inf).max(1)[failures.any(1)]
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(200):
        rows = rng.integers(0, len(reward), len(reward))
        chosen, labels = reward[rows], data.success[rows]
        resampled.append(auc(chosen[labels], chosen[~labels]))
    return {
        "spearman": float(progress.mean()) if len(progress) else math.nan,
        "spearman_standard_error": standard_error(progress),
        "auc": auc(goal, other),
        "auc_95": [float(x) for x in np.nanpercentile(resampled, [2.5, 97.5])]
        if np.isfinite(resampled).any() else [math.nan, math.nan],
        "auc_suboptimal": auc(goal, reward[:, SUBOPTIMAL][failures]),
        "fooled": float(np.mean(highest >= np.median(goal)))
        if len(goal) and len(highest) and np.isfinite(reward).all() else math.nan,
        "epic": epic_distance(reward.ravel(), data.success.ravel()),
    }


ADVICE = {
    "raw": {
        "good": "It can serve as a dense reward as it is.",
        "fuzzy": "It points in the right direction, but is not to be trusted alone: add it to the "
                 "sparse reward and align it, as FuRL does.",
        "misleading": "Do not use it as it is: it can lead an agent away from the task. Try "
                      "another prompt or VLM.",
    },
    "checkpoint": {
        "good": "At this checkpoint the run's reward is a good guide.",
        "fuzzy": "At this checkpoint the run's reward is a guide with gaps.",
        "misleading": "At this checkpoint the run's reward is no guide from start to success.",
    },
}


def verdict(figures: dict[str, Any], kind: str = "raw") -> tuple[str, str]:
    """(good, fuzzy, misleading or unknown; what that means in words) for `measure`'s figures."""
    rises, separates, fooled = figures["spearman"], figures["auc"], figures["fooled"]
    if math.isnan(rises) or math.isnan(separates):
        return "unknown", ("The expert did not succeed often enough in these episodes to tell (try "
                           "more --steps), or the reward is the same everywhere.")
    text = (f"Along the expert's way the reward {'rises' if rises >= 0.2 else 'does not rise'} "
            f"with progress (Spearman {rises:.2f}). A success frame scores higher than another "
            f"frame in {separates:.0%} of all pairs, where guessing gives 50%.")
    if not math.isnan(fooled):
        text += (f" {fooled:.0%} of the sub-optimal episodes contain a failure that scores like a "
                 "success.")
    level = "fuzzy"
    if rises < 0.2 or separates < 0.6:
        level = "misleading"
    elif rises >= 0.7 and separates >= 0.9 and (math.isnan(fooled) or fooled <= 0.2):
        level = "good"
    return level, f"{text} {ADVICE.get(kind, ADVICE['raw'])[level]}"


def epic_by_alpha(text: np.ndarray, baseline: np.ndarray, data: Data) -> list[float] | None:
    """EPIC distance for each of ALPHAS (Figure 4a); None where both texts mean the same."""
    if means_the_same(text, baseline):
        return None
    images, labels = data.embeddings.reshape(-1, len(text)), data.success.ravel()
    return [epic_distance(goal_baseline_reward(text, baseline, images, float(alpha)), labels)
            for alpha in ALPHAS]


def paths(trained: Trained, env_id: str) -> dict[str, list[np.ndarray]]:
    """End-effector paths [T, 3], m, of the policy and of the expert on the same goals (Figure 2).

    The run's own goal if that is fixed, else five that it has not seen.
    """
    goal = trained.args.goal
    count, seed = (1, trained.args.seed) if goal == "fixed" else (
        5, trained.args.seed + 2 * EVAL_SEED_OFFSET)
    where = {"env_id": env_id, "goal": goal, "seed": seed}
    with closing(trained.evaluator(num_episodes=count, **where)) as evaluator:
        evaluator(trained.policy)
    states = trained.play_again(np.array(evaluator.actions), **where).states
    expert, policy = [], expert_policy(env_id)
    for index in range(count):
        env = make_env(env_id, seed=seed, index=index, goal=goal, show_goal=True)
        obs, way, left = env.reset()[0], [], MAX_EPISODE_STEPS
        while left > 0:
            way.append(obs[:3].copy())
            obs, _, _, _, info = env.step(expert_action(policy, obs))
            left = min(left - 1, 10) if info["success"] else left - 1
        expert.append(np.array(way))
    return {"policy": [states[:, i, :3] for i in range(count)], "expert": expert}


# ------------------------------------------------------------------------------- main


def distinct_names(folders: list[Path]) -> list[str]:
    """The folders' last names; where two have the same one, as cells of a grid, their parents' too.

    Raises:
        UserError: a folder is there twice.
    """
    if len(set(folders)) < len(folders):
        raise UserError("--checkpoints holds a folder twice")
    names, count = [], 0
    while len(set(names)) < len(folders):
        count += 1
        names = ["/".join(folder.parts[-count:]) for folder in folders]
    return names


def open_checkpoints(args: Args, env_id: str) -> dict[str, Trained]:
    """The runs of --checkpoints, by the names that the report gives them.

    Raises:
        UserError: one is no run, or of another task, VLM, camera or quality.
    """
    runs = [open_run(folder, run_code=args.run_code) for folder in args.checkpoints]
    names = distinct_names([run.folder.resolve() for run in runs])
    for run in runs:
        if run.args.env_id != env_id:
            raise UserError(f"{run.folder} was trained on {run.args.env_id}, not on {env_id}")
        if not run.has_vlm:
            continue
        settings = {"vlm": run.config["vlm"]["name"], **run.evaluation}
        for name in ("vlm", "camera_id", "quality"):
            ours, theirs = getattr(args, name), settings[name]
            if ours != theirs:
                raise UserError(f"{run.folder} was trained with --{name.replace('_', '-')} "
                                f"{theirs}, not {ours}")
    return dict(zip(names, runs, strict=True))


def goal_picture(env_id: str, goal: str, seed: int, camera: Camera) -> np.ndarray | None:
    """The expert's success: with the fixed goal, or with a random one that is not played here; None
    where the expert fails, with the fifth random goal too."""
    seeds = [seed] if goal == "fixed" else [seed + EVAL_SEED_OFFSET + i for i in range(5)]
    for picture_seed in seeds:
        try:
            return goal_image(env_id, seed=picture_seed, goal=goal, camera=camera)
        except UserError as error:
            if "expert fails" not in str(error):
                raise
    return None


def build_rewards(
    data: Data, texts: dict[str, np.ndarray], runs: dict[str, Trained], vlm: VLM
) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (kind, reward [E, 3, n]) of all that is compared.

    Raises:
        UserError: one of them is not finite.
    """
    shape = data.success.shape
    flat = data.embeddings.reshape(-1, vlm.embed_dim)
    rewards = {f"“{prompt}”": ("raw", cosine_similarity(text, data.embeddings))
               for prompt, text in texts.items()}
    rewards |= {name: ("checkpoint", run.vlm_reward(vlm)(flat).reshape(shape))
                for name, run in runs.items() if run.has_vlm}
    rewards |= {f"goal picture, {what}": ("goal picture", reward)
                for what, reward in data.nearness.items()}
    for name, (_, reward) in rewards.items():
        check_finite(reward, f"the reward of {name}")
    return rewards


def comparable(figures: dict[str, Any], meaningless: set[str]) -> list[str]:
    """The prompts of which one may be called the best: without those that the VLM does not know,
    or that have no AUC."""
    return [name for name, f in figures.items()
            if f["kind"] == "raw" and name not in meaningless and math.isfinite(f["auc"])]


def main(args: Args) -> dict[str, Any]:
    """Write the report; returns what its JSON holds."""
    start = time.monotonic()
    check_ranges(args)
    if not 4 * args.every <= args.steps <= MAX_EPISODE_STEPS - 1:
        raise UserError(f"--steps must be four times --every {args.every} or more and below "
                        f"{MAX_EPISODE_STEPS}, not {args.steps}")
    env_id = resolve_env_id(args.env_id)
    prompts = list(dict.fromkeys(prompt_for(env_id, p) for p in args.prompt or (None,)))
    baseline_prompt = baseline_prompt_for(env_id, args.baseline_prompt)
    default = Path("reports") / f"{env_id}__{args.vlm.replace('/', '-')}"
    output = new_folder(args.output) if args.output else writable_folder(default)
    runs = open_checkpoints(args, env_id)
    first = next(iter(runs.values()), None)
    goal = args.goal or ("fixed" if first and first.args.goal == "fixed" else "random")
    seed = args.seed
    if seed is None:
        seed = first.args.seed if first else 0
        if first and goal == "random":  # goals that neither training nor its evaluations had
            seed += 2 * EVAL_SEED_OFFSET
    vlm = load_vlm(args.vlm, weights=args.vlm_weights)
    view = view_for(vlm, METAWORLD)
    for run in runs.values():
        if run.has_vlm:
            run.check_vlm(vlm)
            if not np.isfinite(run.vlm_reward(vlm)(np.ones((1, vlm.embed_dim)))).all():
                raise UserError(f"{run.folder}: what is left of the run does not hold the reward "
                                "that it learned, which is in checkpoints")
            if (seen := run.view_of(vlm)) != view:
                raise UserError(f"{run.folder} was trained on another part of the picture "
                                f"({seen}) than a report shows ({view})")
    texts = dict(zip(prompts, vlm.embed_text(prompts), strict=True))
    baseline = vlm.embed_text([baseline_prompt])[0]
    camera = Camera(view.size, args.camera_id, args.quality)
    notes = []
    picture = goal_picture(env_id, goal, seed, camera)
    if picture is None:
        notes.append("Without a goal picture: the scripted expert fails on that goal.")
    scene = Scene(env_id, goal, seed, args.steps, args.every, camera)
    workers = min(args.workers or num_cores(), args.episodes)
    data = collect(scene, args.episodes, workers, vlm, picture)
    rewards = build_rewards(data, texts, runs, vlm)
    meaningless = {f"“{prompt}”" for prompt in prompts if not vlm.knows(prompt)}

    figures: dict[str, Any] = {}
    for reward_name, (kind, reward) in rewards.items():
        measured = measure(reward, data, args.every, seed)
        level, words = verdict(measured, kind)
        if reward_name in meaningless:
            level, words = "unknown", (f"{vlm.name} knows no word of this prompt: all such prompts "
                                       "are the same to it, and the figures mean nothing.")
        figures[reward_name] = {"kind": kind, **measured, "verdict": level, "in_words": words}
    raw = comparable(figures, meaningless)
    if len(raw) > 1:
        best = max(raw, key=lambda n: figures[n]["auc"])
        notes.append(f"Of the prompts, {best} separates success best (AUC "
                     f"{cell(figures[best]['auc'])}).")
    plain = figures.get("goal picture, raw pixels")
    if plain and raw and plain["auc"] >= max(figures[n]["auc"] for n in raw):
        notes.append("A goal picture compared in raw pixels separates success as well as the best "
                     f"of these texts, or better (AUC {cell(plain['auc'])}).")
    for name, run in runs.items():
        if run.has_vlm and (run.args.goal, run.args.seed) != (goal, seed):
            notes.append(f"{name} was trained with goal {run.args.goal} and seed "
                         f"{run.args.seed}; this report plays goal {goal}, seed {seed}.")
    epic = {prompt: curve for prompt, text in texts.items()
            if (curve := epic_by_alpha(text, baseline, data))}
    ways = {f"{name}, {run.env_steps:,} steps": paths(run, env_id) for name, run in runs.items()}
    succeeded = (data.first_success >= 0).mean(0)
    goals = f"{args.episodes} random goals"
    if goal == "fixed":
        goals = f"one goal, {args.episodes} episodes of each behaviour"
        notes.append("With one goal, standard errors and intervals are those of noise in the "
                     "behaviour; other goals may differ more.")
    results = {
        "env_id": env_id, "instruction": prompt_for(env_id, None), "vlm": vlm.name,
        "vlm_id": vlm.id, "goal": goal, "seed": seed,
        "setting": f"{goals} (seed {seed}), {args.steps} steps, a picture every {args.every}; "
                   "success: " + ", ".join(
                       f"{kind} {share:.0%}" for kind, share in zip(KINDS, succeeded, strict=True)),
        "success": dict(zip(KINDS, map(float, succeeded), strict=True)),
        "success_frames": int(data.success.sum()), "frames": int(data.success.size),
        "rewards": figures, "notes": notes, "baseline_prompt": baseline_prompt,
        "epic_by_alpha": {"alpha": ALPHAS.tolist(), **epic},
        "args": asdict(args), "commit": git_commit(), "versions": versions(),
    }
    plotted = {name: reward for name, (_, reward) in rewards.items()}
    plots = {"curves": plot_curves(plotted, data, args.every),
             "frames": plot_frames(plotted, data, args.every),
             "histograms": plot_histograms(plotted, data)}
    if epic and data.success.any():
        plots["epic"] = plot_epic(ALPHAS, epic)
    if ways:
        plots["paths"] = plot_paths(ways)
    output = make_free_folder(output)  # another report may have been written meanwhile
    with written_whole(output) as folder:
        for name, plot in plots.items():
            plot.savefig(folder / f"{name}.png", dpi=120)
            plt.close(plot)
        text = json.dumps(without_nan(results), indent=1, default=str)  # paths become text
        (folder / "report.json").write_text(text + "\n")
        pictures = {name: (folder / f"{name}.png").read_bytes() for name in plots}
        (folder / "report.html").write_text(page(results, pictures))
    print_report(results)
    print(f"written in {time.monotonic() - start:.0f} s: {output / 'report.html'}")
    return results


def print_report(results: dict[str, Any]) -> None:
    print(results["setting"])
    rows = [["reward", *COLUMNS], *table_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)))
    for name, f in results["rewards"].items():
        if f["kind"] != "goal picture":
            print(f"{name}: {f['verdict']}. {f['in_words']}")
    for note in results["notes"]:
        print(f"note: {note}")


if __name__ == "__main__":
    run_script(main, Args)
