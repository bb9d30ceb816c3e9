"""The embedded VLM: its file, its text side, its losses, and that MT10 is unseen."""

import math

import mujoco
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import spearmanr

from common.envs.metaworld import make_env
from common.envs.metaworld_tasks import (
    ENV_IDS,
    MT10,
    MT10_INSTRUCTIONS,
    expert_action,
    expert_policy,
)
from common.envs.rendering import Camera, Renderer
from common.errors import UserError
from common.vlms.mini import (
    EMBED_DIM,
    WEIGHTS,
    Mini,
    init_mini,
    load_mini,
    quantise,
    save_mini,
    word_pieces,
)
from tools.mini.pretrain import (
    HELD_OUT,
    SHARPNESS,
    SUMMARY,
    TRAINING_TASKS,
    Episodes,
    auc,
    batch_loss,
    draw_batch,
    ranking,
    summarise,
)
from tools.mini.sentences import MT10_PARAPHRASES, TRAINING_SENTENCES, overlap


@pytest.fixture(scope="module")
def model() -> Mini:
    return load_mini()


def pictures(n: int, size: int = 112) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator)


def test_the_shipped_file_is_small():
    assert WEIGHTS.stat().st_size <= 8 * 2**20


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(model):
    images = model.encode_images(pictures(5))
    assert images.shape == (5, EMBED_DIM) and images.dtype == torch.float32
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(model.encode_images(pictures(5)[2:3]), images[2:3],
                               atol=1e-5, rtol=1e-4)
    assert model.encode_images(pictures(2, size=224)).shape == (2, EMBED_DIM)


@pytest.mark.parametrize(
    "prompt",
    ["Open a drawer.", "None", "Défenestrate the zyzzyva!", "?!", "", "   ", "push " * 2000,
     "机器人 打开 抽屉", "OPEN THE DRAWER"],
)
def test_any_prompt_works(model, prompt):
    text = model.encode_text([prompt])
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(1))
    torch.testing.assert_close(text, load_mini().encode_text([prompt]))


def test_words_have_meaning_beyond_their_letters(model):
    def similarity(a: str, b: str) -> float:
        return float(model.token_mean(a) @ model.token_mean(b))

    assert similarity("shut the drawer", "close the drawer") > similarity(
        "shut the drawer", "eat the banana")
    assert similarity("Open A Drawer", "open a drawer") == pytest.approx(1, abs=1e-6)


def test_word_pieces_take_the_longest_known_piece():
    pieces = ["draw", "drawer", "##er", "##s", "un", "##lock", "."]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert word_pieces("Drawers.", vocabulary) == ["drawer", "##s", "."]
    assert word_pieces("unlock", vocabulary) == ["un", "##lock"]
    assert word_pieces("drawlock", vocabulary) == ["draw", "##lock"]
    assert word_pieces("xyz", vocabulary) == []


def test_quantised_vectors_are_near(model):
    vectors = np.random.default_rng(0).normal(size=(50, 8))
    numbers, scale = quantise(vectors)
    assert numbers.dtype == torch.int8
    assert np.abs(numbers.numpy() * scale.numpy() - vectors).max() <= scale.max() * 0.51


def test_saved_and_loaded_weights_give_the_same_embeddings(model, tmp_path):
    save_mini(model, tmp_path / "copy.safetensors")
    copy = load_mini(tmp_path / "copy.safetensors")
    assert torch.equal(copy.encode_images(pictures(3)), model.encode_images(pictures(3)))
    assert torch.equal(copy.encode_text(["lift"]), model.encode_text(["lift"]))


def test_random_weights_belong_to_their_seed(model):
    one, again, two = (init_mini(seed).encode_images(pictures(2)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, two)
    assert not torch.allclose(one, model.encode_images(pictures(2)))


def test_damaged_files_are_one_clear_line(tmp_path):
    path = tmp_path / "weights.safetensors"
    for content in (WEIGHTS.read_bytes()[:-1000], b"garbage", b""):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_mini(path)
        assert "\n" not in str(error.value) and "weights.safetensors" in str(error.value)
    with pytest.raises(UserError, match="cannot read"):
        load_mini(tmp_path / "missing.safetensors")


def test_files_that_hold_something_else_are_one_clear_line(tmp_path):
    """Found at loading, not when the first sentence comes."""
    path = tmp_path / "weights.safetensors"
    with safe_open(WEIGHTS, "pt") as file:
        metadata, good = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    dense = "image_head.1.weight"
    cases = [
        ({"token_vectors": good["token_vectors"][:9].clone()}, metadata, "token_vectors has shape"),
        ({"token_weights": good["token_weights"][:9].clone()}, metadata, "token_weights has shape"),
        ({"token_scale": good["token_scale"][:9].clone()}, metadata, "token_scale has shape"),
        ({dense: good[dense][:, :9].clone()}, metadata, f"{dense} has shape"),
        ({dense: good[dense] * math.nan}, metadata, f"{dense} is not finite"),
        ({dense: good[dense].int()}, metadata, f"{dense} is torch.int32"),
        ({"other": torch.zeros(1)}, metadata, "other does not belong there"),
        ({dense: None}, metadata, f"{dense} is missing"),
        ({}, {"vocabulary": "5"}, "no list of words"),
        ({}, {"vocabulary": "[1, 2]"}, "no list of words"),
        ({}, {"vocabulary": '["one"]'}, "has shape"),
        ({}, {"vocabulary": "[1"}, "not of mini"),
        ({}, {"about": "something else"}, "not of mini"),
    ]
    for changes, words, message in cases:
        tensors = {k: v for k, v in (good | changes).items() if v is not None}
        save_file(tensors, path, metadata=words)
        with pytest.raises(UserError, match=message) as error:
            load_mini(path)
        assert "\n" not in str(error.value) and "weights.safetensors" in str(error.value)


def test_mt10_is_unseen_in_pictures_and_words():
    assert set(TRAINING_TASKS) == set(ENV_IDS) - set(MT10) == set(TRAINING_SENTENCES)
    assert set(HELD_OUT) < set(TRAINING_TASKS)
    unseen = [*MT10_INSTRUCTIONS.values(), *(s for p in MT10_PARAPHRASES.values() for s in p)]
    for sentences in TRAINING_SENTENCES.values():
        for sentence in sentences:
            worst = max(unseen, key=lambda other: overlap(sentence, other))
            assert overlap(sentence, worst) < 0.6, (sentence, worst)
            assert max(overlap(sentence, s) for s in MT10_INSTRUCTIONS.values()) < 0.5


def test_overlap_counts_content_words():
    assert overlap("Open a drawer.", "open the drawer") == 1
    assert overlap("Open a drawer.", "Open a window") == pytest.approx(1 / 3)


def test_ranking_by_hand():
    better, worse = torch.tensor([0.5, 0.1]), torch.tensor([0.2, 0.4])
    first, second = (math.log1p(math.exp(SHARPNESS * x)) for x in (-0.3, 0.3))
    assert ranking(better, worse).item() == pytest.approx((first + second) / 2, rel=1e-5)
    masked = ranking(better, worse, torch.tensor([0.0, 1.0]))
    assert masked.item() == pytest.approx(second, rel=1e-5)
    assert ranking(better, worse, torch.zeros(2)).item() == 0


def test_batch_loss_by_hand():
    """One sample in the plane: success is the goal, the far hand opposite, all else 90 degrees."""
    success, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    images = torch.stack([other, success, success, success, other, other, -success])[None]
    losses = batch_loss(images, success[None], torch.ones(1))
    far, similar = math.sqrt(2), 1.0
    for name, gap in (("goal_time", far), ("goal_counterfactual", far), ("goal_failure", far),
                      ("goal_hand", 2 - far), ("text_time", similar), ("text_failure", similar)):
        assert losses[name].item() == pytest.approx(
            math.log1p(math.exp(-SHARPNESS * gap)), rel=1e-4, abs=1e-7)
    assert losses["contrast"].item() == pytest.approx(0, abs=1e-6)  # one task: nothing to confuse


def test_draws_are_what_they_are_called():
    """Two tasks of four episodes: rows, groups, and the nearer hand first."""
    data = Episodes.__new__(Episodes)  # without files
    rng = np.random.default_rng(0)
    data.hands, data.successes, data.failures = rng.uniform(size=(200, 3)), [], []
    for task in range(2):
        start = 100 * task
        data.successes.append([
            {"group": k // 2, "path": np.arange(start + 20 * k, start + 20 * k + 10),
             "done": np.arange(start + 20 * k + 9, start + 20 * k + 12),
             "counterfactual": np.arange(start + 20 * k + 12, start + 20 * k + 12 + 3 * task)}
            for k in range(4)
        ])
        data.failures.append(np.arange(start + 80, start + 100))
    data.trainable = [0, 1]
    rows, tasks, has_counterfactual = draw_batch(data, rng, 300)
    assert set(tasks) == {0, 1}
    np.testing.assert_array_equal(has_counterfactual, tasks == 1)
    assert (rows // 100 == tasks[:, None]).all()
    earlier, later, success, goal, counterfactual, near, far = (rows % 100).T
    assert (earlier < later).all() and (later // 20 == success // 20).all()
    assert (success // 20 != goal // 20).all() and (success % 20 >= 9).all()
    same_goal = (success // 40 == goal // 40).mean()
    assert 0.75 < same_goal < 0.92  # three quarters on purpose, a third of the rest by chance
    assert ((near >= 80) & (far >= 80)).all()
    distance = np.linalg.norm(data.hands[rows[:, 5:]] - data.hands[rows[:, 3:4]], axis=-1)
    assert (distance[:, 0] <= distance[:, 1]).all()
    assert (np.diff(distance) > 0.05).mean() > 0.95
    np.testing.assert_array_equal(counterfactual[tasks == 0], near[tasks == 0])


def test_auc_of_many_float32_scores_is_exact():
    """Against counting the pairs, some tied. Sums of ranks in float32 are off by over 1e-8."""
    rng = np.random.default_rng(0)
    positive, negative = (rng.normal(mean, size=5000).round(3).astype(np.float32)
                          for mean in (0.3, 0.0))
    smaller, at_most = (np.searchsorted(np.sort(negative), positive, side).sum()
                        for side in ("left", "right"))
    assert smaller < at_most
    assert auc(positive, negative) == pytest.approx((smaller + at_most) / 2 / 5000**2, abs=1e-12)


def test_figures_are_summarised_over_the_seeds():
    """The median is taken over the tasks of one seed; mean and range come after it."""
    results = {}
    for seed, shift in (("seed0", 0.0), ("seed1", 0.2), ("untrained", -1.0)):
        for suffix in ("", ", other goal", ", paraphrased"):
            results[seed + suffix] = {
                task: {figure: i / 10 + shift for _, figure in SUMMARY.values()}
                for i, task in enumerate(MT10)
            }
    for task in MT10[:2]:
        results["seed1"][task]["text_auc"] = math.nan
    table = summarise(results)
    assert list(table) == [*MT10, "median"]
    assert table[MT10[3]]["text AUC"] == "0.40 (0.30 to 0.50)"
    assert table["median"]["goal Spearman"] == "0.55 (0.45 to 0.65)"
    assert table[MT10[0]]["text AUC"] == "–"
    assert table["median"]["text AUC"] == "0.60 (0.45 to 0.75)"  # without the two


def test_a_scripted_episode_approaches_the_goal_picture_of_another(model):
    """Behaviour, on a task outside MT10: distance to the goal falls with time."""
    env = make_env("plate-slide-v3", seed=3, index=0, goal="fixed", show_goal=True)
    renderer = Renderer(env.model, Camera(112))
    policy = expert_policy("plate-slide-v3")
    rng = np.random.default_rng(0)

    def episode(noise: float) -> np.ndarray:
        obs, _ = env.reset()
        frames = []
        for _ in range(300):
            action = expert_action(policy, obs) + noise * rng.normal(size=4)
            obs, _, _, _, info = env.step(np.clip(action, -1, 1).astype(np.float32))
            frames.append(renderer.render(env.model, env.data))
            if info["success"]:
                break
        mujoco.mj_resetData(env.model, env.data)
        return np.stack(frames)

    goal = model.encode_images(torch.from_numpy(episode(0.3)[-1:]))[0]
    distance = (model.encode_images(torch.from_numpy(episode(0.0))) - goal).norm(dim=-1).numpy()
    assert spearmanr(np.arange(len(distance)), -distance).statistic > 0.7
    assert distance[-1] < 0.5 * distance[0]
