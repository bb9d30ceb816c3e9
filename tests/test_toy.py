"""The embedded VLM `toy`: its file, that the paper's prompts are unseen, its reward's landscape."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from common.envs import vlm_rm_tasks
from common.errors import UserError
from common.vlms import load_vlm, view_for
from common.vlms.mini import EMBED_DIM, WEIGHTS, init_mini, load_mini, word_pieces
from common.vlms.toy import FRAME_SIZE, Toy, mean_places
from tools.mini.pretrain_toy import (
    ELSEWHERE,
    LARGEST,
    LEAST,
    MOST,
    SCENE,
    WIDTH,
    Pictures,
    distance,
    draw,
    new_model,
    random_states,
    rewards,
    target_similarity,
)
from tools.mini.sentences import overlap
from tools.mini.toy_sentences import (
    CARTPOLE,
    MEANINGS,
    MOUNTAIN_CAR,
    PROMPTS,
    TRAINING_SENTENCES,
    Meaning,
)


@pytest.fixture(scope="module")
def model() -> Toy:
    return load_mini(kind=Toy)


@pytest.fixture(scope="module")
def poles() -> Pictures:
    """Every three degrees of the circle, at random places of the cart."""
    angles = np.arange(-180, 181, 3.0)
    cart = np.random.default_rng(2).uniform(-2.2, 2.2, len(angles))
    return draw("CartPole-v1", np.stack([cart, angles], 1))


def noise(n: int, size: int = FRAME_SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator)


def test_the_shipped_file_is_small():
    assert Toy.weights.stat().st_size <= 4_000_000


def test_loaded_by_name(poles):
    vlm = load_vlm("toy", device="cpu")
    view = view_for(vlm)
    assert view.size == vlm.frame_size == FRAME_SIZE and view.margin == 0
    assert vlm.name == "toy" and vlm.id.startswith("toy-") and f"-{FRAME_SIZE}px-" in vlm.id
    images = np.asarray(vlm.embed_images(poles.frames[:2]))
    assert images.shape == (2, vlm.embed_dim)
    np.testing.assert_allclose(np.linalg.norm(images, axis=-1), 4, rtol=1e-5)
    random = load_vlm("toy", pretrained=False, seed=1, device="cpu")
    assert not np.allclose(random.embed_images(poles.frames[:2]), images, atol=0.1)


def test_embeddings_are_the_same_again_and_do_not_depend_on_the_batch(model):
    images = model.encode_images(noise(5))
    assert images.shape == (5, EMBED_DIM) and images.dtype == torch.float32
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(5))
    assert torch.equal(load_mini(kind=Toy).encode_images(noise(5)), images)
    text = model.encode_text(["pole and cart"])
    assert torch.equal(load_mini(kind=Toy).encode_text(["pole and cart"]), text)
    torch.testing.assert_close(model.encode_images(noise(5)[2:3]), images[2:3],
                               atol=1e-5, rtol=1e-4)
    assert model.encode_images(noise(2, size=224)).shape == (2, EMBED_DIM)
    one, again, two = (init_mini(seed, Toy).encode_images(noise(2)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, two, atol=1e-3)


def test_unknown_words_fall_into_pieces(model):
    vocabulary = {piece: i for i, piece in enumerate(model.vocabulary)}
    pieces = word_pieces("zyzzyva flagpoles", vocabulary)
    assert "".join(piece.removeprefix("##") for piece in pieces) == "zyzzyvaflagpoles"
    # The training sentences have the same pieces as with mini's larger vocabulary.
    larger = {piece: i for i, piece in enumerate(load_mini().vocabulary)}
    assert len(larger) > len(vocabulary)
    for sentence in TRAINING_SENTENCES:
        assert word_pieces(sentence, vocabulary) == word_pieces(sentence, larger), sentence
    for prompt in ("", "?!", "机器人", "Défenestrate the zyzzyva!"):
        torch.testing.assert_close(model.encode_text([prompt]).norm(), torch.tensor(1.0))


def test_damaged_and_foreign_files_are_one_clear_line(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(Toy.weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cannot read .*weights\.safetensors"):
        load_vlm("toy", weights=path)
    with pytest.raises(UserError, match="does not hold"):
        load_vlm("toy", weights=WEIGHTS)  # mini's own


def test_the_prompts_are_the_papers_and_unseen():
    for scene, env_id in ((CARTPOLE, "CartPole-v1"), (MOUNTAIN_CAR, "MountainCarContinuous-v0")):
        task = vlm_rm_tasks.TASKS[env_id]
        assert PROMPTS[scene][0] == (task.prompt, task.baseline_prompt)
        for pair, limit in zip(PROMPTS[scene], (0.5, 0.6, 0.6), strict=True):
            for unseen in pair:
                nearest = max(TRAINING_SENTENCES, key=lambda s: overlap(s, unseen))
                assert overlap(nearest, unseen) <= limit - 0.01, (nearest, unseen)


def test_target_similarities_by_hand():
    nan = np.full(4, np.nan)
    pictures = Pictures(np.zeros((4, 1, 1, 3), np.uint8),
                        np.array([CARTPOLE, CARTPOLE, CARTPOLE, MOUNTAIN_CAR]),
                        np.array([-170.0, 90.0, 30.0, np.nan]), np.zeros(4), nan)
    fallen = Meaning(CARTPOLE, "angle", ((100, 180), (170, 175)), ())
    np.testing.assert_allclose(distance(fallen, pictures.angle[:3]), [10, 10, 70])
    expected = [LEAST + (MOST - LEAST) * ((1 - d / LARGEST["angle"]) + np.exp(-d / WIDTH["angle"]))
                / 2 for d in (10, 10, 70)]
    np.testing.assert_allclose(target_similarity(fallen, pictures), [*expected, ELSEWHERE])
    scene = target_similarity(Meaning(CARTPOLE, None, (), ()), pictures)
    np.testing.assert_allclose(scene, [SCENE, SCENE, SCENE, ELSEWHERE])
    other = target_similarity(Meaning(None, None, (), ()), pictures)
    assert (other == ELSEWHERE).all()


def test_places_are_where_a_map_is_high():
    maps = torch.zeros(1, 2, 5, 5)
    maps[0, 0, 0, 4] = maps[0, 1, 2, 2] = 50.0  # upper right corner, middle
    assert mean_places(maps)[0].tolist() == pytest.approx([-1, 0, 1, 0], abs=1e-4)


def test_pictures_show_their_state():
    """The pole's pixels are on the side to which it leans; the car is where the position says."""
    right, left, upright = draw("CartPole-v1", np.array([[0, 45.0], [0, -45], [0, 0]])).frames
    middle = FRAME_SIZE // 2

    def pole_columns(frame: np.ndarray) -> np.ndarray:
        """Columns of brown pixels: red well above blue."""
        return np.nonzero(frame[..., 0].astype(int) - frame[..., 2] > 60)[1]

    assert pole_columns(right).mean() > middle + 3 and pole_columns(left).mean() < middle - 3
    assert abs(pole_columns(upright).mean() - middle) < 1
    for env_id in ("MountainCarContinuous-v0", "MountainCarTextured-v0"):
        valley, flag = draw(env_id, np.array([[-0.5], [0.45]])).frames.astype(int)
        changed = np.nonzero(np.abs(valley - flag).sum(-1) > 60)[1]
        expected = [FRAME_SIZE * (x + 1.2) / 1.8 for x in (-0.5, 0.45)]
        assert set(np.round(changed / FRAME_SIZE)) == {0, 1}
        for side, place in zip((changed < middle, changed >= middle), expected, strict=True):
            assert abs(changed[side].mean() - place) < 3


def test_half_of_the_poles_are_nearly_upright():
    cart, angle = random_states("CartPole-v1", 4000, np.random.default_rng(0)).T
    assert 0.35 < np.mean(np.abs(angle) < 12) < 0.42  # 0.5 * 0.683 + 0.5 * 12 / 180
    assert np.abs(cart).max() <= 2.4 and np.ptp(cart) > 4.7 and np.ptp(angle) > 350


def test_a_new_model_is_untrained_and_belongs_to_its_seed():
    one, again, two = (new_model(seed).image_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, two)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_reward_is_highest_for_upright_poles(model, poles, alpha):
    images = model.encode_images(torch.from_numpy(poles.frames)).numpy()
    reward = rewards(model, images, *PROMPTS[CARTPOLE][0], alpha)
    assert abs(poles.angle[reward.argmax()]) <= 5
    assert spearmanr(reward, -np.abs(poles.angle)).statistic > 0.9
    near = np.abs(poles.angle) <= 12
    assert spearmanr(reward[near], -np.abs(poles.angle[near])).statistic > 0.7  # of nine pictures


@pytest.mark.parametrize("env_id", ["MountainCarContinuous-v0", "MountainCarTextured-v0"])
def test_reward_rises_towards_the_flag(model, poles, env_id):
    positions = np.linspace(-1.2, 0.6, 46)
    cars = draw(env_id, positions[:, None])
    images = model.encode_images(torch.from_numpy(cars.frames)).numpy()
    elsewhere = model.encode_images(torch.from_numpy(poles.frames)).numpy()
    for alpha in (0.0, 0.5):
        reward = rewards(model, images, *PROMPTS[MOUNTAIN_CAR][0], alpha)
        assert spearmanr(reward, positions).statistic > 0.9
        assert 0.35 <= positions[reward.argmax()] <= 0.6
        other = rewards(model, elsewhere, *PROMPTS[MOUNTAIN_CAR][0], alpha)
        assert other.max() < reward.max() - 0.2


def test_baselines_say_nothing_about_the_state(model, poles):
    """The cosine similarity to the scene varies far less than that to the goal."""
    images = model.encode_images(torch.from_numpy(poles.frames)).numpy()
    goal, baseline = PROMPTS[CARTPOLE][0]
    to_goal, to_scene = (np.std(rewards(model, images, a, b, 0.0))
                         for a, b in ((goal, baseline), (baseline, goal)))
    assert to_scene < 0.5 * to_goal


def test_no_sentence_has_two_meanings():
    assert len(set(TRAINING_SENTENCES)) == len(TRAINING_SENTENCES)
    assert all((m.quantity is None) == (m.intervals == ()) for m in MEANINGS)
