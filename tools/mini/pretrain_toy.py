"""Train the embedded vision-language model `toy` from nothing, and measure it.

    python -m tools.mini.pretrain_toy collect             # draw the pictures: data/toy
    python -m tools.mini.pretrain_toy train --seed 0      # the shipped weights
    python -m tools.mini.pretrain_toy evaluate            # all trained seeds and an untrained one

The paper's prompts are not among the training sentences (tools/mini/toy_sentences.py). Humanoid's
poses are not drawn: `SCENES`, `state_of` and `Meaning` are where they would go.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # before pygame: pictures need no screen

import numpy as np
import torch
import tyro
from scipy.stats import spearmanr
from torch.nn import functional as F

from common.envs.gymnasium import make_env, square
from common.vlms.mini import TOKEN_DIM, init_mini, load_mini, save_mini, word_pieces
from common.vlms.toy import FRAME_SIZE, Toy
from tools.mini.toy_sentences import (
    CARTPOLE,
    MEANINGS,
    MOUNTAIN_CAR,
    PROMPTS,
    TRAINING_SENTENCES,
    Meaning,
)
from vlm_rm_dqn import goal_baseline_reward

DATA = Path("data/toy")
# Environment: what its pictures show, and how many are drawn for training.
SCENES = {
    "CartPole-v1": (CARTPOLE, 8000),
    "MountainCarContinuous-v0": (MOUNTAIN_CAR, 2500),
    "MountainCarTextured-v0": (MOUNTAIN_CAR, 2500),
}
TRACK, POSITIONS = 2.4, (-1.2, 0.6)  # |cart| is at most TRACK
BALANCED = 12.0  # degrees: further from upright CartPole-v1's episodes end
VOCABULARY = 10_000  # the most frequent of mini's word pieces
# What a picture's cosine similarity to a sentence is to be.
ELSEWHERE, SCENE, LEAST, MOST = 0.0, 0.5, 0.2, 0.9
# Kernel of the distance between states: a straight line to the largest distance, so that the
# similarity falls everywhere, and a peak of this width, so that it falls most near the goal.
LARGEST = {"angle": 180.0, "cart": 2 * TRACK, "position": POSITIONS[1] - POSITIONS[0]}
WIDTH = {"angle": 15.0, "cart": 0.4, "position": 0.25}
STEPS_TOLD = 100


@dataclass(frozen=True)
class Args:
    command: Annotated[
        Literal["collect", "train", "evaluate"], tyro.conf.Positional
    ]  # what to do
    seed: int = 0  # of training
    steps: int = 3000  # gradient steps
    batch_size: int = 64  # pictures per step
    learning_rate: float = 2e-3  # AdamW's peak
    threads: int = 1  # torch's; two are slower where other work needs the cores


# --------------------------------------------------------------------------- pictures


class Pictures(NamedTuple):
    """n pictures and what they show; a quantity that they do not have is NaN."""

    frames: np.ndarray  # uint8 [n, FRAME_SIZE, FRAME_SIZE, 3]
    scene: np.ndarray  # [n] str
    angle: np.ndarray  # [n] degrees, -180 to 180, to the right
    cart: np.ndarray  # [n]
    position: np.ndarray  # [n]


def draw(env_id: str, states: np.ndarray) -> Pictures:
    """Pictures of one environment: (cart, angle) [n, 2] of CartPole, or positions [n, 1]."""
    env = make_env(env_id, seed=0, index=0, frame_size=FRAME_SIZE)
    frames = []
    for state in states:
        env.unwrapped.state = state_of(env_id, state)
        frames.append(square(env.render(), FRAME_SIZE))
    env.close()
    n, scene = len(states), SCENES[env_id][0]
    nothing = np.full(n, np.nan)
    cart, angle = states.T if scene == CARTPOLE else (nothing, nothing)
    position = nothing if scene == CARTPOLE else states[:, 0]
    return Pictures(np.stack(frames), np.full(n, scene), angle, cart, position)


def state_of(env_id: str, state: np.ndarray) -> np.ndarray:
    """The environment's whole state, at rest, which pictures do not show."""
    if SCENES[env_id][0] == CARTPOLE:
        cart, angle = state
        return np.array([cart, 0.0, np.radians(angle), 0.0])
    return np.array([state[0], 0.0])


def random_states(env_id: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """States for `draw`: half of the poles are near upright, half are anywhere."""
    if SCENES[env_id][0] == CARTPOLE:
        near = rng.normal(0, BALANCED, n)
        angle = np.where(rng.random(n) < 0.5, near, rng.uniform(-180, 180, n))
        return np.stack([rng.uniform(-TRACK, TRACK, n), angle], 1)
    return rng.uniform(*POSITIONS, (n, 1))


def collect() -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for env_id, (_, n) in SCENES.items():
        start = time.time()
        np.savez_compressed(DATA / f"{env_id}.npz",
                            **draw(env_id, random_states(env_id, n, rng))._asdict())
        print(f"{env_id}: {n} pictures in {time.time() - start:.0f} s")


def load_pictures() -> Pictures:
    files = [np.load(DATA / f"{env_id}.npz") for env_id in SCENES]
    return Pictures(*(np.concatenate([file[column] for file in files])
                      for column in Pictures._fields))


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
        far = distance(meaning, getattr(pictures, meaning.quantity))
        line = 1 - far / LARGEST[meaning.quantity]
        peak = np.exp(-far / WIDTH[meaning.quantity])
        similarity = LEAST + (MOST - LEAST) * (line + peak) / 2
    return np.where(pictures.scene == meaning.scene, similarity, ELSEWHERE)


def states_to_tell(pictures: Pictures) -> np.ndarray:
    """The state as numbers of size one, [n, 5]; NaN where a picture does not have it."""
    radians = np.radians(pictures.angle)
    return np.stack([np.sin(radians), np.cos(radians), np.tanh(pictures.angle / BALANCED),
                     pictures.cart / TRACK, pictures.position], 1)


def new_model(seed: int) -> Toy:
    """An untrained `toy` with mini's token vectors: the most frequent pieces, single characters
    (all words fall into pieces), and what the training sentences need."""
    mini = load_mini()
    number = {piece: i for i, piece in enumerate(mini.vocabulary)}
    needed = {piece for s in TRAINING_SENTENCES for piece in word_pieces(s, number)}
    kept = [i for i, piece in enumerate(mini.vocabulary)
            if i < VOCABULARY or len(piece.removeprefix("##")) == 1 or piece in needed]
    torch.manual_seed(seed)
    model = Toy([mini.vocabulary[i] for i in kept], mini.token_vectors[kept], mini.token_scale,
                mini.token_weights[kept])
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            torch.nn.init.zeros_(module.bias)
    return model


def train(args: Args) -> None:
    """Similarities of pictures to sentences are regressed; the file is DATA/seed<k>.safetensors."""
    model, rng = new_model(args.seed), np.random.default_rng(args.seed)
    pictures = load_pictures()
    columns = np.repeat(np.arange(len(MEANINGS)), [len(m.sentences) for m in MEANINGS])
    # Each meaning counts the same, however many sentences it has.
    weights = torch.from_numpy(1 / np.bincount(columns)[columns] / len(MEANINGS)).float()
    targets = np.stack([target_similarity(m, pictures) for m in MEANINGS], 1)  # [n, meanings]
    targets, told = (torch.from_numpy(x).float() for x in (targets, states_to_tell(pictures)))
    means = torch.stack([model.token_mean(sentence) for sentence in TRAINING_SENTENCES])
    teacher = torch.nn.Linear(model.image_head.in_features, told.shape[1])  # thrown away later
    parameters = [*model.parameters(), *teacher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps,
                                                   pct_start=0.1)
    start, total = time.time(), np.zeros(2)
    for step in range(1, args.steps + 1):
        rows = rng.integers(0, len(targets), args.batch_size)
        crops = torch.from_numpy(pictures.frames[rows]).permute(0, 3, 1, 2).float() / 255
        hidden = model.features(crops)
        images = F.normalize(model.image_head(hidden), dim=-1)
        # Noise of length 0.6, a turn by 31 degrees, so that paraphrases stay near a sentence:
        # exchanging one of its words turns its mean by 20 to 50.
        noisy = means + 0.6 * torch.randn_like(means) / TOKEN_DIM**0.5
        texts = model.encode_token_means(F.normalize(noisy, dim=-1))
        errors = (images @ texts.T - targets[rows][:, columns]) ** 2  # [batch, sentences]
        similarity = (errors * weights).sum(1).mean()
        known = ~told[rows].isnan()
        state = ((teacher(hidden) - told[rows].nan_to_num()) ** 2 * known).sum() / known.sum()
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
    path = DATA / f"seed{args.seed}.safetensors"
    save_mini(model, path)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(model.vocabulary):,} word pieces, {path.stat().st_size / 1e6:.1f} MB -> {path}")
    if args.seed == 0:
        shutil.copyfile(path, Toy.weights)
        print(f"shipped as {Toy.weights}")


# ------------------------------------------------------------------------- evaluation


def embed(model: Toy, frames: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([model.encode_images(torch.from_numpy(chunk)).numpy()
                               for chunk in np.array_split(frames, len(frames) // 64 + 1)])


def rewards(model: Toy, images: np.ndarray, prompt: str, baseline: str, alpha: float):
    """VLM-RM's reward of embeddings [n, EMBED_DIM], [n]; with alpha 0 the cosine similarity."""
    with torch.inference_mode():
        goal, base = model.encode_text([prompt, baseline]).numpy()
    return np.asarray(goal_baseline_reward(goal, base, images, alpha))


def evaluation_states(env_id: str) -> np.ndarray:
    """The whole circle, balanced poles again, and the whole track, at random cart positions; or all
    positions. Not those of training."""
    if SCENES[env_id][0] == MOUNTAIN_CAR:
        return np.linspace(*POSITIONS, 361)[:, None]
    angles = np.concatenate([np.linspace(-180, 180, 721), np.linspace(-BALANCED, BALANCED, 481)])
    cart = np.random.default_rng(1).uniform(-TRACK, TRACK, len(angles))
    return np.stack([cart, angles], 1)


def landscape(reward: np.ndarray, pictures: Pictures) -> dict[str, float]:
    """What is asked of a reward: how well its order is that of nearness to the goal."""
    if pictures.scene[0] == MOUNTAIN_CAR:
        return {
            "Spearman": spearmanr(reward, pictures.position).statistic,
            "best at": pictures.position[reward.argmax()],
        }
    circle, nearness = np.arange(len(reward)) < 721, -np.abs(pictures.angle)
    near = ~circle
    return {
        "Spearman": spearmanr(reward[circle], nearness[circle]).statistic,
        "balanced Spearman": spearmanr(reward[near], nearness[near]).statistic,
        "best at": pictures.angle[reward.argmax()],
    }


def evaluate() -> None:
    """Print the tables of docs/toy.md."""
    models = {path.stem: load_mini(path, Toy) for path in sorted(DATA.glob("seed*.safetensors"))}
    models["untrained"] = init_mini(0, Toy)
    drawn = {env_id: draw(env_id, evaluation_states(env_id)) for env_id in SCENES}
    for name, model in models.items():
        images = {env_id: embed(model, pictures.frames) for env_id, pictures in drawn.items()}
        for env_id, pictures in drawn.items():
            scene = SCENES[env_id][0]
            other = "CartPole-v1" if scene == MOUNTAIN_CAR else "MountainCarContinuous-v0"
            for prompt, baseline in PROMPTS[scene]:
                for alpha in (0.0, 0.5):
                    reward = rewards(model, images[env_id], prompt, baseline, alpha)
                    figures = landscape(reward, pictures) | {
                        "least": reward.min(), "most": reward.max(),
                        "other scene": rewards(model, images[other], prompt, baseline, alpha).max(),
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
        evaluate()


if __name__ == "__main__":
    main(tyro.cli(Args))
