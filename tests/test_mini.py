"""The embedded VLM: its file, its text side, its losses, and that MT10 is unseen."""

import math

import mujoco
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import spearmanr

from common import flags
from common.envs.metaworld_suite import make_env
from common.envs.metaworld_tasks import (
    ENV_IDS,
    MT10,
    MT10_INSTRUCTIONS,
    expert_action,
    expert_policy,
)
from common.envs.registry import METAWORLD
from common.envs.rendering import Renderer, Square
from common.errors import UserError
from common.vlms import View, load_vlm, view_for
from common.vlms.mini import (
    CROP_LEFT,
    CROP_SIZE,
    CROP_TOP,
    EMBED_DIM,
    FRAME_SIZE,
    WEIGHTS,
    Mini,
    init_mini,
    keypoints,
    load_mini,
    save_mini,
    word_pieces,
)
from tools.mini import scenes
from tools.mini.pretrain import (
    NUM_PICTURES,
    SHARPNESS,
    SPLITS,
    SUMMARY,
    add_norms,
    batch_loss,
    draw_sample,
    fold_norms,
    quantise,
    ranking,
    summarise,
)
from tools.mini.scenes import TRAINING_TASKS, Places, scene_distance
from tools.mini.sentences import (
    MT10_PARAPHRASES,
    OPPOSITE_SENTENCES,
    TRAINING_SENTENCES,
    overlap,
)
from tools.shared.measures import auc


@pytest.fixture(scope="module")
def model() -> Mini:
    return load_mini()


def pictures(n: int, size: int = CROP_SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator)


def test_the_shipped_file_is_small():
    assert WEIGHTS.stat().st_size <= 8 * 2**20


def test_loaded_by_name():
    vlm = load_vlm("mini", device="cpu")
    assert view_for(vlm, METAWORLD) == View(FRAME_SIZE, Square(CROP_TOP, CROP_LEFT, CROP_SIZE))
    assert vlm.frame_size == CROP_SIZE and vlm.name == "mini"
    assert vlm.id.startswith("mini-") and f"-{FRAME_SIZE}px-" in vlm.id
    images = np.asarray(vlm.embed_images(pictures(2).numpy()))
    np.testing.assert_allclose(np.linalg.norm(images, axis=-1), 4, rtol=1e-5)


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


@pytest.mark.parametrize(("prompt", "known"), [
    ("Open a drawer.", True), ("Öffne", True), ("打开 drawer", True), ("7", True),
    ("打开抽屉", False), ("откройте ящик", False), ("🤖👉🚪", False), ("🤖!", False), ("?!", False),
])
def test_prompts_without_a_known_word_are_named(prompt, known, capsys):
    """Once, in a line."""
    vlm = load_vlm("mini", device="cpu")
    assert vlm.knows(prompt) == known
    flags.note.cache_clear()
    vlm.embed_text([prompt])
    vlm.embed_text([prompt])
    line = f"note: mini knows no word of the prompt {prompt!r}: all such prompts are the same to it"
    assert capsys.readouterr().out == ("" if known else f"{line}\n")


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
    models = [init_mini(seed) for seed in (1, 1, 2)]
    one, again, two = (random.encode_images(pictures(2)) for random in models)
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
    dense = "image_head.0.weight"
    cases = [
        ({"token_vectors": good["token_vectors"][:9].clone()}, metadata, "for token_vectors"),
        ({"token_weights": good["token_weights"][:9].clone()}, metadata, "for token_weights"),
        ({"token_scale": good["token_scale"][:9].clone()}, metadata, "for token_scale"),
        ({dense: good[dense][:, :9].clone()}, metadata, f"mismatch for {dense}"),
        ({dense: good[dense] * math.nan}, metadata, f"{dense} is not finite"),
        ({"other": torch.zeros(1)}, metadata, 'Unexpected key.*"other"'),
        ({dense: None}, metadata, f'Missing key.*"{dense}"'),
        ({}, {"vocabulary": "5"}, "not of mini"),
        ({}, {"vocabulary": "[1, 2]"}, "not of mini"),
        ({}, {"vocabulary": '["one"]'}, "size mismatch for token"),
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
    for held_out in SPLITS.values():
        assert set(held_out) < set(TRAINING_TASKS)
    assert set(OPPOSITE_SENTENCES) < set(TRAINING_TASKS)
    unseen = [*MT10_INSTRUCTIONS.values(), *(s for p in MT10_PARAPHRASES.values() for s in p)]
    for sentences in (*TRAINING_SENTENCES.values(), *OPPOSITE_SENTENCES.values()):
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
    """One sample in the plane: the success is the goal, the counterfactual opposite, all else at 90
    degrees and equally far."""
    success, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    images = torch.stack([success, other, other, success, -success, *[other] * 4])[None]
    distance = torch.tensor([[1.0, 1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 1.0]])
    one = torch.ones(1)
    losses = batch_loss(images, success[None], one, distance, one)

    def loss(gap: float) -> float:
        return math.log1p(math.exp(-SHARPNESS * gap))

    far = math.sqrt(2)
    # Pairs: the success before six and before the counterfactual, and six before that.
    assert losses["goal"].item() == pytest.approx(
        (6 * loss(far) + loss(2) + 6 * loss(2 - far)) / 13, rel=1e-4, abs=1e-9)
    assert losses["goal_counterfactual"].item() == pytest.approx(loss(2), rel=1e-4, abs=1e-9)
    assert losses["text"].item() == pytest.approx((12 * loss(1) + loss(2)) / 13, rel=1e-4)
    assert losses["contrast"].item() == pytest.approx(0, abs=1e-6)  # one task: nothing to confuse
    untold = batch_loss(images, success[None], 0 * one, distance, 0 * one)
    for name in ("text", "text_counterfactual", "goal_counterfactual", "contrast"):
        assert untold[name] == 0
    assert untold["goal"] == losses["goal"]


def places(hand, part) -> Places:
    """One moving part, at `part`, its axis tips with it."""
    parts = np.full((1, scenes.NUM_PARTS, 4, 3), np.nan)
    if part is not None:
        parts[0, 0] = part
    return Places(np.array([hand], float), parts)


def test_scene_distance_by_hand():
    goal = places([0.3, 0, 0], [0.3, 0, 0])
    there = scene_distance(goal, goal)[0]
    unmoved_at_part = scene_distance(places([0, 0, 0], [0, 0, 0]), goal)[0]
    unmoved_at_goal = scene_distance(places([0.3, 0, 0], [0, 0, 0]), goal)[0]
    moved_far_hand = scene_distance(places([0.3, 0.2, 0], [0.3, 0, 0]), goal)[0]
    o, g, h = scenes.OBJECT_WEIGHT, scenes.GRASP_WEIGHT, scenes.HAND_WEIGHT
    assert there == 0
    assert unmoved_at_part == pytest.approx(0.3 * o + 0.3 * h)
    assert unmoved_at_goal == pytest.approx(0.3 * o + 0.3 * g)
    assert moved_far_hand == pytest.approx(0.2 * g + 0.2 * h)
    # The hand belongs to the part before it is where the goal picture has it.
    assert there < moved_far_hand < unmoved_at_part < unmoved_at_goal
    # Where nothing moves, the hand alone counts.
    nothing = scene_distance(places([0, 0, 0], None), places([0.1, 0, 0], None))[0]
    assert nothing == pytest.approx(0.1 * (g + h))


def test_drawn_scenes(tmp_path):
    """A task's pictures and an invented scene's: objects are where each kind of picture says."""
    with np.load(scenes.collect_task(tmp_path / "plate-slide-v3.npz", 4, 0, varied=True)) as file:
        rows = dict(file)
    assert rows["frames"].shape[1:] == (scenes.STORED_SIZE, scenes.STORED_SIZE, 3)
    kinds, episodes = rows["kind"], rows["episode"]
    assert set(kinds) == {scenes.ORDINARY, scenes.COUNTERFACTUAL, scenes.MIXED}
    assert set(episodes) == set(range(4)) and (rows["success_step"][episodes == 3] < 0).all()
    first = [np.flatnonzero(episodes == episode)[0] for episode in range(4)]
    for row in np.flatnonzero(kinds == scenes.COUNTERFACTUAL):
        start = first[episodes[row]]
        np.testing.assert_allclose(rows["parts"][row], rows["parts"][start], atol=1e-4)
        assert np.linalg.norm(rows["hand"][row] - rows["hand"][start]) > 0.05
    done = np.flatnonzero(rows["success"])
    moved = np.linalg.norm(rows["parts"][done, 0, 0] - rows["parts"][first[0], 0, 0], axis=-1)
    assert (moved > 0.1).all() and len(done) >= 3

    seen, (there, back) = scenes.draw_invented(
        np.random.default_rng(0), rows["robot"], rows["hand"], 7)
    assert set(seen["group"]) == {7} and len(seen["frames"]) == 55
    assert bool(there) == bool(back) and set(there).isdisjoint(back)
    at_start = seen["step"] == 0
    assert {*seen["step"][seen["success"]]} == {100} and at_start.sum() >= 18
    parts = seen["parts"][at_start]
    np.testing.assert_allclose(parts, parts[:1].repeat(len(parts), 0), atol=1e-5)
    end = seen["parts"][seen["success"]][0]
    assert np.nanmax(np.linalg.norm(end - parts[0], axis=-1)) > 0.02
    assert (np.ptp(seen["frames"].astype(int), axis=0) > 20).any()


def test_samples_are_what_they_are_called():
    """The way there, and one time in three the way back, where the object has not moved."""
    scene = {
        "goals": np.arange(10, 13), "counterfactual": np.arange(20, 23),
        "mixed": np.arange(30, 40), "failures": np.arange(40, 50), "unmoved": [3],
        "paths": [np.arange(0, 10)],
    }
    rng, backs = np.random.default_rng(0), 0
    for _ in range(300):
        sample = draw_sample(scene, ["there"], ["back"], rng)
        goal, earlier, later, success, counterfactual, *others = sample.rows
        assert len(sample.rows) == NUM_PICTURES and sample.has_counterfactual
        assert earlier < later < 10 and min(others) >= 30
        if sample.sentence == "back":
            backs += 1
            assert goal == success == 3 and 10 <= counterfactual < 13
        else:
            assert sample.sentence == "there" and 20 <= counterfactual < 23
            assert 10 <= goal < 13 and 10 <= success < 13
    assert 70 < backs < 140
    lonely = scene | {"counterfactual": np.arange(0), "mixed": np.arange(0)}
    sample = draw_sample(lonely, ["there"], [], rng)
    assert not sample.has_counterfactual and min(sample.rows[4:]) >= 40


def test_folded_normalisation_gives_the_same_embeddings():
    torch.manual_seed(0)
    model = init_mini(0)
    add_norms(model)
    model.requires_grad_(True).train()
    for _ in range(3):  # running means and variances that are not the first ones
        model.encode_images(pictures(8))
    model.eval()
    with torch.inference_mode():
        before = model.encode_images(pictures(4))
        fold_norms(model)
        torch.testing.assert_close(model.encode_images(pictures(4)), before, atol=1e-5, rtol=1e-4)
    assert model.state_dict().keys() == init_mini(0).state_dict().keys()


def test_keypoints_are_where_a_map_is_high():
    maps = torch.zeros(1, 2, 5, 5)
    maps[0, 0, 0, 4] = maps[0, 1, 2, 2] = 50.0  # upper right corner, middle
    row, middle_row, column, middle_column = keypoints(maps)[0]
    assert (row, column) == pytest.approx((-1, 1), abs=1e-4)
    assert (middle_row, middle_column) == pytest.approx((0, 0), abs=1e-4)


def test_the_crop_shows_where_the_hand_can_be():
    """All corners of the hand's workspace are inside."""
    env = make_env("faucet-open-v3", seed=0, index=0, goal="fixed", show_goal=False)
    env.reset()
    camera = env.model.camera("corner2").id
    rotation = env.data.cam_xmat[camera].reshape(3, 3)
    focal = 0.5 / np.tan(np.radians(env.model.cam_fovy[camera]) / 2)
    low, high = [*env.mocap_low[:2], 0.05], env.mocap_high  # above the table
    for corner in np.ndindex(2, 2, 2):
        x, y, z = rotation.T @ (np.where(corner, high, low) - env.data.cam_xpos[camera])
        # Upright: Meta-World mounts this camera upside down.
        column, row = (FRAME_SIZE * (0.5 + focal * v / -z) for v in (x, y))
        assert CROP_LEFT - 3 <= column <= CROP_LEFT + CROP_SIZE + 3
        assert CROP_TOP - 3 <= row <= CROP_TOP + CROP_SIZE + 3


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
    renderer = Renderer(env.model, model.view.camera(2, "fast"))
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
