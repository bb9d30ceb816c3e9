"""The embedded VLMs `toy` and `poses`: their files, that the paper's prompts are unseen, and the
landscapes of their rewards."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from common.envs import humanoid, registry, vlm_rm_tasks
from common.errors import UserError
from common.vlms import load_vlm, view_for
from common.vlms.interface import centre_view
from common.vlms.mini import EMBED_DIM, WEIGHTS, init_mini, load_mini, word_pieces
from common.vlms.toy import FRAME_SIZE, Poses, Toy
from tools.mini.pretrain_toy import (
    ELSEWHERE,
    LARGEST,
    LEAST,
    MOST,
    SCENE,
    WIDTH,
    Pictures,
    body_points,
    distance,
    distances_to_poses,
    draw,
    meanings_of,
    new_model,
    random_pose,
    random_states,
    rewards,
    target_similarity,
)
from tools.mini.sentences import overlap
from tools.mini.toy_sentences import (
    CARTPOLE,
    HUMANOID,
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


@pytest.mark.parametrize("kind", [Toy, Poses])
def test_the_shipped_files_are_small(kind):
    assert kind.weights.stat().st_size <= 4_000_000


@pytest.mark.parametrize(("env_id", "name"), [
    ("CartPole-v1", "toy"), ("Reacher-v5", "toy"), ("HumanoidKneeling-v0", "poses"),
    ("HumanoidSplitsOriginal-v0", "poses"), ("reach-v3", "mini"),
])
def test_the_default_is_the_one_that_knows_the_pictures(env_id, name):
    assert registry.suite_for(env_id).default_vlm(env_id) == name


def test_loaded_by_name(poles):
    vlm = load_vlm("toy", device="cpu")
    view = view_for(vlm, registry.METAWORLD)
    assert view == centre_view(FRAME_SIZE, 0) and vlm.frame_size == FRAME_SIZE
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
    for kind, name in ((Toy, "toy"), (Poses, "poses")):
        vocabulary = {piece: i for i, piece in enumerate(load_mini(kind=kind).vocabulary)}
        for meaning in meanings_of(name):
            for sentence in meaning.sentences:
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


def nearest(unseen: str) -> str:
    return max(TRAINING_SENTENCES, key=lambda sentence: overlap(sentence, unseen))


def test_the_prompts_are_the_papers_and_unseen():
    for scene, env_id in ((CARTPOLE, "CartPole-v1"), (MOUNTAIN_CAR, "MountainCarContinuous-v0")):
        task = vlm_rm_tasks.TASKS[env_id]
        assert PROMPTS[scene][0] == (task.prompt, task.baseline_prompt)
        for pair, limit in zip(PROMPTS[scene], (0.5, 0.6, 0.6), strict=True):
            for unseen in pair:
                assert overlap(nearest(unseen), unseen) <= limit - 0.01, (nearest(unseen), unseen)
    assert [prompt for prompt, _ in PROMPTS[HUMANOID]] == [
        pose.prompt for pose in humanoid.POSES.values()]
    for pair in PROMPTS[HUMANOID]:
        for unseen in pair:
            assert overlap(nearest(unseen), unseen) <= 0.49, (nearest(unseen), unseen)


def test_target_similarities_by_hand():
    angle = np.array([-170.0, 90.0, 30.0, np.nan])
    pictures = Pictures(np.zeros((4, 1, 1, 3), np.uint8),
                        np.array([CARTPOLE, CARTPOLE, CARTPOLE, MOUNTAIN_CAR]), {"angle": angle},
                        np.full((4, 3), np.nan))
    fallen = Meaning(CARTPOLE, "angle", ((100, 180), (170, 175)), ())
    np.testing.assert_allclose(distance(fallen, angle[:3]), [10, 10, 70])
    expected = [LEAST + (MOST - LEAST) * ((1 - d / LARGEST["angle"]) + np.exp(-d / WIDTH["angle"]))
                / 2 for d in (10, 10, 70)]
    np.testing.assert_allclose(target_similarity(fallen, pictures), [*expected, ELSEWHERE])
    scene = target_similarity(Meaning(CARTPOLE, None, (), ()), pictures)
    np.testing.assert_allclose(scene, [SCENE, SCENE, SCENE, ELSEWHERE])
    other = target_similarity(Meaning(None, None, (), ()), pictures)
    assert (other == ELSEWHERE).all()


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
    one, again, two = (new_model("toy", seed).image_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, two)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_reward_is_highest_for_upright_poles(model, poles, alpha):
    images = model.encode_images(torch.from_numpy(poles.frames)).numpy()
    reward = rewards(model, images, *PROMPTS[CARTPOLE][0], alpha)
    off = np.abs(poles.states["angle"])
    assert off[reward.argmax()] <= 5
    assert spearmanr(reward, -off).statistic > 0.9
    assert spearmanr(reward[off <= 12], -off[off <= 12]).statistic > 0.7  # of nine pictures


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


@pytest.fixture(scope="module")
def humanoids() -> Pictures:
    return draw("HumanoidKneeling-v0",
                random_states("HumanoidKneeling-v0", 240, np.random.default_rng(3)))


def test_poses_are_known_by_where_the_parts_are():
    """Whichever way the robot faces, wherever it is, and on whichever leg it stands."""
    env = humanoid.PosingHumanoid("OneLeg")
    env.reset(seed=0)
    humanoid.set_pose(env, "OneLeg")
    example = body_points(env)
    qpos = env.data.qpos.copy()
    qpos[:2] += 0.3, -0.2
    qpos[3:7] = np.cos(np.pi / 4), 0, 0, np.sin(np.pi / 4)  # a quarter turn to the left
    env.set_state(qpos, env.data.qvel)
    np.testing.assert_allclose(body_points(env), example, atol=1e-9)
    for side in ("right", "left"):
        humanoid.set_pose(env, "StandingUp")
        qpos = env.data.qpos.copy()
        for name, angle in humanoid.POSES["OneLeg"].joints.items():
            joint = env.model.joint(name.replace("right", side))
            qpos[joint.qposadr[0]] = np.radians(angle)
        env.set_state(qpos, env.data.qvel)
        far = distances_to_poses(env, body_points(env).reshape(1, -1))
        assert far["OneLeg"][0] < 0.02 < 0.3 < far["Kneeling"][0], side


def test_random_humanoids_are_everywhere(humanoids):
    """Half are posed, so each pose's example is near; half have moved, and many have fallen."""
    states = humanoids.states
    assert all(states[pose].min() < 0.15 and states[pose].max() > 0.5 for pose in humanoid.POSES)
    posed, moving = np.split(states["height"] < 0.4, 2)
    assert moving.mean() > 0.15 > posed.mean()
    assert np.isnan(states["angle"]).all() and not np.isnan(humanoids.points).any()
    env = humanoid.PosingHumanoid("Kneeling")
    env.reset(seed=0)
    rng = np.random.default_rng(5)
    assert np.std([random_pose(env, rng)[[0, 1, 6]] for _ in range(20)], axis=0).min() > 0.05


@pytest.mark.parametrize("pose", humanoid.POSES)
def test_reward_tells_a_pose(humanoids, pose):
    """Nearness to it, among all states and among those of robots that are on their feet."""
    model = load_mini(kind=Poses)
    images = model.encode_images(torch.from_numpy(humanoids.frames)).numpy()
    far = humanoids.states[pose]
    reward = rewards(model, images, humanoid.POSES[pose].prompt, humanoid.BASELINE_PROMPT, 0.0)
    assert spearmanr(reward, -far).statistic > 0.5
    if pose in ("StandingUp", "ArmsRaised", "ArmsCrossed", "OneLeg"):  # hands on hips: it cannot
        high = humanoids.states["height"] > 1
        assert spearmanr(reward[high], -far[high]).statistic > 0.3


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
