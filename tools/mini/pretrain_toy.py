"""Train the embedded vision-language models `toy` and `poses` from nothing, and measure them.

    python -m tools.mini.pretrain_toy collect                # draw the pictures: data/toy
    python -m tools.mini.pretrain_toy train --model poses    # the shipped weights
    python -m tools.mini.pretrain_toy evaluate --model poses # all trained seeds, an untrained one

The paper's prompts are not among the training sentences (tools/mini/toy_sentences.py).
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # before pygame: pictures need no screen

import mujoco
import numpy as np
import torch
import tyro
from scipy.stats import spearmanr
from torch.nn import functional as F

from common.envs.gymnasium_suite import make_env, square
from common.envs.humanoid import EPISODE_LENGTH, POSES, set_pose
from common.envs.rendering import prepare_gl
from common.vlms.mini import TOKEN_DIM, init_mini, load_mini, save_mini, word_pieces
from common.vlms.toy import FRAME_SIZE, Poses, Toy
from tools.mini.toy_sentences import (
    CARTPOLE,
    HUMANOID,
    MEANINGS,
    MOUNTAIN_CAR,
    PROMPTS,
    Meaning,
)
from tools.shared.measures import goal_baseline_reward

DATA = Path("data/toy")
Name = Literal["toy", "poses"]
# One model for each: a single one of this size that saw all scenes was worse on CartPole
# (docs/lab_notes.md).
MODELS: dict[Name, tuple[type[Toy], tuple[str, ...]]] = {
    "toy": (Toy, (CARTPOLE, MOUNTAIN_CAR)), "poses": (Poses, (HUMANOID,)),
}
# Environment: what its pictures show, and how many are drawn for training.
SCENES = {
    "CartPole-v1": (CARTPOLE, 8000),
    "MountainCarContinuous-v0": (MOUNTAIN_CAR, 2500),
    "MountainCarTextured-v0": (MOUNTAIN_CAR, 2500),
    "HumanoidKneeling-v0": (HUMANOID, 8000),  # whose pictures are those of all poses
}
TRACK, POSITIONS = 2.4, (-1.2, 0.6)  # |cart| is at most TRACK
BALANCED = 12.0  # degrees: further from upright CartPole-v1's episodes end
# What a pose is known by: where these are.
POINTS = ("torso", "pelvis", "right_shin", "left_shin", "right_lower_arm", "left_lower_arm")
TIPS = ("head", "right_hand", "left_hand", "right_foot", "left_foot")
NOISE, TURN, PLACE = 25.0, 25.0, 0.15  # of poses: of a joint and the robot, degrees; metres
NO_POINTS = np.full(3 * len(POINTS + TIPS), np.nan)
POINT_SPREAD = 0.25  # metres: the standard deviation of where a part is
ROLLOUT_EVERY = 6  # steps between the states that are kept of an episode
VOCABULARY = 10_000  # the most frequent of mini's word pieces
# What a picture's cosine similarity to a sentence is to be.
ELSEWHERE, SCENE, LEAST, MOST = 0.0, 0.5, 0.2, 0.9
# Kernel of the distance between states: a straight line to the largest distance, so that the
# similarity falls everywhere, and a peak of this width, so that it falls most near the goal.
LARGEST = {"angle": 180.0, "cart": 2 * TRACK, "position": POSITIONS[1] - POSITIONS[0],
           "height": 1.3} | dict.fromkeys(POSES, 1.8)
WIDTH = {"angle": 15.0, "cart": 0.4, "position": 0.25, "height": 0.2} | dict.fromkeys(POSES, 0.3)
HIGH = 1.0  # metres: a torso above it is that of a robot on its feet
STEPS_TOLD = 100


@dataclass(frozen=True)
class Args:
    command: Annotated[
        Literal["collect", "train", "evaluate"], tyro.conf.Positional
    ]  # what to do
    model: Name = "toy"  # toy: CartPole and MountainCar; poses: the humanoid
    seed: int = 0  # of training
    steps: int = 3000  # gradient steps
    batch_size: int = 64  # pictures per step
    learning_rate: float = 2e-3  # AdamW's peak
    threads: int = 1  # torch's; two are slower where other work needs the cores


# --------------------------------------------------------------------------- pictures


class Pictures(NamedTuple):
    """n pictures and what they show."""

    frames: np.ndarray  # uint8 [n, FRAME_SIZE, FRAME_SIZE, 3]
    scene: np.ndarray  # [n] str
    states: dict[str, np.ndarray]  # [n] by `Meaning.quantity`; NaN where a picture has none
    points: np.ndarray  # of the humanoid, see `body_points`, [n, 3 (POINTS and TIPS)], or NaN


def draw(env_id: str, states: np.ndarray) -> Pictures:
    """Pictures of one environment.

    Args:
        env_id: one of `SCENES`.
        states: (cart, angle) [n, 2] of CartPole, positions [n, 1] of MountainCar, or the
            humanoid's joints' positions [n, nq].
    """
    scene = SCENES[env_id][0]
    if scene == HUMANOID:
        prepare_gl()
    env = make_env(env_id, seed=0, index=0, frame_size=FRAME_SIZE)
    frames, points = [], []
    for state in states:
        show(env.unwrapped, scene, state)
        frames.append(square(env.render(), FRAME_SIZE))
        points.append(body_points(env.unwrapped).ravel() if scene == HUMANOID else NO_POINTS)
    known: dict[str, np.ndarray] = {}
    if scene == CARTPOLE:
        known["cart"], known["angle"] = states.T
    elif scene == MOUNTAIN_CAR:
        known["position"] = states[:, 0]
    else:
        known = distances_to_poses(env.unwrapped, np.array(points)) | {"height": states[:, 2]}
    env.close()
    nothing = np.full(len(states), np.nan)
    return Pictures(np.stack(frames), np.full(len(states), scene),
                    {quantity: known.get(quantity, nothing) for quantity in LARGEST},
                    np.array(points))


def show(env, scene: str, state: np.ndarray) -> None:
    """Put an environment into a state of `draw`, at rest, which pictures do not show."""
    if scene == CARTPOLE:
        cart, angle = state
        env.state = np.array([cart, 0.0, np.radians(angle), 0.0])
    elif scene == MOUNTAIN_CAR:
        env.state = np.array([state[0], 0.0])
    else:
        env.set_state(state, np.zeros(env.model.nv))


def body_points(env) -> np.ndarray:
    """Where the humanoid's parts are, metres: forward, left, up of the floor below the torso,
    [POINTS and TIPS, 3]."""
    data = env.data
    places = np.array([data.body(name).xpos for name in POINTS]
                      + [data.geom(name).xpos for name in TIPS])
    forward = data.body("torso").xmat[[0, 3]]  # x axis of the torso, seen from above
    cosine, sine = forward / max(np.linalg.norm(forward), 1e-6)
    places[:, :2] -= data.body("torso").xpos[:2]
    return places @ np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])


def distances_to_poses(env, points: np.ndarray) -> dict[str, np.ndarray]:
    """How far the farthest part is from where it is in a pose's example, or in its mirror image.

    Arms count only in the poses that are about arms: where the example names a joint of theirs.

    Args:
        env: a humanoid, which is moved.
        points: of `body_points`, [n, 3 (POINTS and TIPS)].

    Returns:
        metres, [n], by pose.
    """
    names = POINTS + TIPS
    swap = {"right": "left", "left": "right"}
    other = [names.index("_".join(swap.get(word, word) for word in name.split("_")))
             for name in names]
    is_arm = np.array(["arm" in name or "hand" in name for name in names])
    distances = {}
    for pose in POSES:
        set_pose(env, pose)
        example = body_points(env)
        with_arms = any("shoulder" in joint or "elbow" in joint for joint in POSES[pose].joints)
        counts = np.full(len(names), True) if with_arms else ~is_arm
        distances[pose] = np.min([
            np.linalg.norm(points.reshape(-1, len(names), 3) - target, axis=-1)[:, counts].max(1)
            for target in (example, example[other] * (1, -1, 1))
        ], axis=0)
    return distances


def random_states(env_id: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """States for `draw`: half of the poles are near upright, half are anywhere; half of the
    humanoids are in a pose or on the way there, half come from episodes of random actions."""
    scene = SCENES[env_id][0]
    if scene == CARTPOLE:
        near = rng.normal(0, BALANCED, n)
        angle = np.where(rng.random(n) < 0.5, near, rng.uniform(-180, 180, n))
        return np.stack([rng.uniform(-TRACK, TRACK, n), angle], 1)
    if scene == MOUNTAIN_CAR:
        return rng.uniform(*POSITIONS, (n, 1))
    env = make_env(env_id, seed=int(rng.integers(2**31)), index=0, frame_size=0)
    posed = [random_pose(env.unwrapped, rng) for _ in range(n // 2)]
    moving: list[np.ndarray] = []
    while len(moving) < n - len(posed):
        moving += rollout(env, rng)
    env.close()
    return np.array(posed + moving[: n - len(posed)])


def random_pose(env, rng: np.random.Generator) -> np.ndarray:
    """Joints' positions of the humanoid in any pose, or on the way there, turned and moved."""
    share = 1.0 if rng.random() < 0.5 else rng.uniform()
    set_pose(env, rng.choice(list(POSES)), share, rng, NOISE * rng.uniform() ** 2)
    qpos = env.data.qpos.copy()
    qpos[:2] += rng.normal(0, PLACE, 2)
    turn = np.zeros(4)
    mujoco.mju_axisAngle2Quat(turn, np.array([0.0, 0.0, 1.0]), np.radians(rng.normal(0, TURN)))
    mujoco.mju_mulQuat(qpos[3:7], turn, qpos[3:7].copy())
    return qpos


def rollout(env, rng: np.random.Generator) -> list[np.ndarray]:
    """Joints' positions in an episode of smooth random actions, from standing or from a pose."""
    env.reset()
    if rng.random() < 0.5:
        qpos = random_pose(env.unwrapped, rng)
        env.unwrapped.set_state(qpos, np.zeros(env.unwrapped.model.nv))
    strength, action, states = rng.uniform(), np.zeros(env.action_space.shape, np.float32), []
    for step in range(EPISODE_LENGTH - 1):
        action = 0.8 * action + 0.6 * rng.normal(0, strength, action.shape).astype(np.float32)
        env.step(np.clip(action, -1, 1))
        if step % ROLLOUT_EVERY == 0:
            states.append(env.unwrapped.data.qpos.copy())
    return states


def collect() -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for env_id, (_, n) in SCENES.items():
        start = time.time()
        pictures = draw(env_id, random_states(env_id, n, rng))
        np.savez_compressed(DATA / f"{env_id}.npz", frames=pictures.frames, scene=pictures.scene,
                            points=pictures.points, **pictures.states)
        print(f"{env_id}: {n} pictures in {time.time() - start:.0f} s", flush=True)


def load_pictures(scenes: tuple[str, ...]) -> Pictures:
    files = [np.load(DATA / f"{env_id}.npz") for env_id in SCENES if SCENES[env_id][0] in scenes]

    def column(name: str) -> np.ndarray:
        return np.concatenate([file[name] for file in files])

    return Pictures(column("frames"), column("scene"), {name: column(name) for name in LARGEST},
                    column("points"))


# --------------------------------------------------------------------------- training


def distance(meaning: Meaning, values: np.ndarray) -> np.ndarray:
    """How far states are from the nearest that a sentence describes, [n]."""
    turns = (-360, 0, 360) if meaning.quantity == "angle" else (0,)
    return np.min([np.maximum(0, np.maximum(low - values - turn, values + turn - high))
                   for low, high in meaning.intervals for turn in turns], axis=0)


def target_similarity(meaning: Meaning, pictures: Pictures) -> np.ndarray:
    """What the cosine similarity of each picture to a meaning's sentences is to be, [n]."""
    if meaning.quantity is None:
        similarity = SCENE
    else:
        far = distance(meaning, pictures.states[meaning.quantity])
        line = 1 - far / LARGEST[meaning.quantity]
        peak = np.exp(-far / WIDTH[meaning.quantity])
        similarity = LEAST + (MOST - LEAST) * (line + peak) / 2
    return np.where(pictures.scene == meaning.scene, similarity, ELSEWHERE)


def states_to_tell(pictures: Pictures) -> np.ndarray:
    """The state as numbers of size one, [n, numbers]; NaN where a picture does not have it."""
    states = pictures.states
    radians = np.radians(states["angle"])
    numbers = np.stack([np.sin(radians), np.cos(radians), np.tanh(states["angle"] / BALANCED),
                        states["cart"] / TRACK, states["position"]], 1)
    return np.concatenate([numbers, pictures.points / POINT_SPREAD], 1)


def meanings_of(name: Name) -> list[Meaning]:
    """Of a model's scenes, and of none."""
    return [meaning for meaning in MEANINGS if meaning.scene in (*MODELS[name][1], None)]


def new_model(name: Name, seed: int) -> Toy:
    """An untrained model with mini's token vectors: the most frequent pieces, single characters
    (all words fall into pieces), and what the training sentences need."""
    mini = load_mini()
    number = {piece: i for i, piece in enumerate(mini.vocabulary)}
    sentences = [sentence for meaning in meanings_of(name) for sentence in meaning.sentences]
    needed = {piece for sentence in sentences for piece in word_pieces(sentence, number)}
    kept = [i for i, piece in enumerate(mini.vocabulary)
            if i < VOCABULARY or len(piece.removeprefix("##")) == 1 or piece in needed]
    torch.manual_seed(seed)
    kind, _ = MODELS[name]
    model = kind([mini.vocabulary[i] for i in kept], mini.token_vectors[kept], mini.token_scale,
                 mini.token_weights[kept])
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            torch.nn.init.zeros_(module.bias)
    return model


def train(args: Args) -> None:
    """Similarities of pictures to sentences are regressed; the file is
    DATA/<model>-seed<k>.safetensors."""
    kind, scenes = MODELS[args.model]
    model, rng = new_model(args.model, args.seed), np.random.default_rng(args.seed)
    pictures, meanings = load_pictures(scenes), meanings_of(args.model)
    sentences = [sentence for meaning in meanings for sentence in meaning.sentences]
    columns = np.repeat(np.arange(len(meanings)), [len(m.sentences) for m in meanings])
    # Each meaning counts the same, however many sentences it has.
    weights = torch.from_numpy(1 / np.bincount(columns)[columns] / len(meanings)).float()
    targets = np.stack([target_similarity(m, pictures) for m in meanings], 1)  # [n, meanings]
    targets, told = (torch.from_numpy(x).float() for x in (targets, states_to_tell(pictures)))
    told = told[:, ~told.isnan().all(0)]
    means = torch.stack([model.token_mean(sentence) for sentence in sentences])
    teacher = torch.nn.Linear(model.image_head.in_features, told.shape[1])  # thrown away later
    parameters = [*model.parameters(), *teacher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps,
                                                   pct_start=0.1)
    start, total = time.time(), np.zeros(2)
    for step in range(1, args.steps + 1):
        rows = rng.integers(0, len(targets), args.batch_size)
        crops = torch.from_numpy(pictures.frames[rows]).permute(0, 3, 1, 2).float() / 255
        features = model.features(crops)
        images = model.embed_features(features)
        # Noise of length 0.6, a turn by 31 degrees, so that paraphrases stay near a sentence:
        # exchanging one of its words turns its mean by 20 to 50.
        noisy = means + 0.6 * torch.randn_like(means) / TOKEN_DIM**0.5
        texts = model.encode_token_means(F.normalize(noisy, dim=-1))
        errors = (images @ texts.T - targets[rows][:, columns]) ** 2  # [batch, sentences]
        similarity = (errors * weights).sum(1).mean()
        known = ~told[rows].isnan()
        off = (teacher(features) - told[rows].nan_to_num()) ** 2 * known
        state = (off.sum(1) / known.sum(1)).mean()  # each picture counts the same
        optimizer.zero_grad(set_to_none=True)
        (similarity + 0.3 * state).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += similarity.item(), state.item()
        if step % STEPS_TOLD == 0:
            row = "similarity {:.5f}, state {:.5f}".format(*(total / STEPS_TOLD))
            print(f"{step}/{args.steps} ({time.time() - start:.0f} s): {row}", flush=True)
            total[:] = 0
    path = DATA / f"{args.model}-seed{args.seed}.safetensors"
    save_mini(model, path)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(model.vocabulary):,} word pieces, {path.stat().st_size / 1e6:.1f} MB -> {path}")
    if args.seed == 0:
        shutil.copyfile(path, kind.weights)
        print(f"shipped as {kind.weights}")


# ------------------------------------------------------------------------- evaluation


def embed(model: Toy, frames: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([model.encode_images(torch.from_numpy(chunk)).numpy()
                               for chunk in np.array_split(frames, len(frames) // 64 + 1)])


def rewards(model: Toy, images: np.ndarray, prompt: str, baseline: str, alpha: float):
    """VLM-RM's reward of embeddings [n, EMBED_DIM], [n]; with alpha 0 the cosine similarity."""
    with torch.inference_mode():
        goal, base = model.encode_text([prompt, baseline]).numpy()
    return goal_baseline_reward(goal, base, images, alpha)


def evaluation_states(env_id: str) -> np.ndarray:
    """The whole circle, balanced poles again, and the whole track, at random cart positions; or all
    positions; or other humanoids. Not those of training."""
    scene, rng = SCENES[env_id][0], np.random.default_rng(1)
    if scene == MOUNTAIN_CAR:
        return np.linspace(*POSITIONS, 361)[:, None]
    if scene == HUMANOID:
        return random_states(env_id, 800, rng)
    angles = np.concatenate([np.linspace(-180, 180, 721), np.linspace(-BALANCED, BALANCED, 481)])
    return np.stack([rng.uniform(-TRACK, TRACK, len(angles)), angles], 1)


def landscape(reward: np.ndarray, pictures: Pictures, prompt: str) -> dict[str, float]:
    """What is asked of a reward: how well its order is that of nearness to the prompt's goal."""
    states = pictures.states
    if pictures.scene[0] == HUMANOID:
        far = next(states[name] for name, pose in POSES.items() if pose.prompt == prompt)
        # Among robots on their feet, those in the pose: standing alone is not enough.
        high = states["height"] > HIGH
        return {
            "Spearman": spearmanr(reward, -far).statistic,
            "Spearman, torso above 1 m": spearmanr(reward[high], -far[high]).statistic,
            "best at": far[reward.argmax()],
        }
    if pictures.scene[0] == MOUNTAIN_CAR:
        return {
            "Spearman": spearmanr(reward, states["position"]).statistic,
            "best at": states["position"][reward.argmax()],
        }
    circle, nearness = np.arange(len(reward)) < 721, -np.abs(states["angle"])
    near = ~circle
    return {
        "Spearman": spearmanr(reward[circle], nearness[circle]).statistic,
        "balanced Spearman": spearmanr(reward[near], nearness[near]).statistic,
        "best at": states["angle"][reward.argmax()],
    }


def evaluate(args: Args) -> None:
    """Print the figures of docs/mini.md."""
    kind, scenes = MODELS[args.model]
    paths = sorted(DATA.glob(f"{args.model}-seed*.safetensors"))
    models = {path.stem: load_mini(path, kind) for path in paths}
    models["untrained"] = init_mini(0, kind)
    drawn = {env_id: draw(env_id, evaluation_states(env_id)) for env_id in SCENES}
    for name, model in models.items():
        images = {env_id: embed(model, pictures.frames) for env_id, pictures in drawn.items()}
        for env_id, pictures in drawn.items():
            scene = SCENES[env_id][0]
            if scene not in scenes:
                continue
            others = np.concatenate([images[i] for i in SCENES if SCENES[i][0] != scene])
            for prompt, baseline in PROMPTS[scene]:
                for alpha in (0.0, 0.5):
                    reward = rewards(model, images[env_id], prompt, baseline, alpha)
                    figures = landscape(reward, pictures, prompt) | {
                        "least": reward.min(), "most": reward.max(),
                        "other scenes": rewards(model, others, prompt, baseline, alpha).max(),
                    }
                    row = ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
                    print(f"{name} | {env_id} | {prompt} | alpha {alpha} | {row}", flush=True)


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    if args.command == "collect":
        collect()
    elif args.command == "train":
        train(args)
    else:
        evaluate(args)


if __name__ == "__main__":
    main(tyro.cli(Args))
