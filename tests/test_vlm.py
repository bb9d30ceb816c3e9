"""Frozen encoders: weights land where they should, pictures go in as each model wants them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import furl_sac_state
from common import vlms
from common.envs.rendering import Square
from common.errors import UserError
from common.vlms import interface, load_vlm, mini, openclip_vlm, task
from common.vlms.openclip_vlm import read_state_dict

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["open the drawer", "Push the GREEN button!"]
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
TINY = {
    "tiny-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "tiny-vit": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
}


@pytest.fixture(scope="module", autouse=True)
def tiny_architectures(tmp_path_factory):
    """CLIP's two kinds of image tower at a size at which a test costs nothing.

    open_clip is imported here, as it takes 5 s: every test process imports all of these files.
    """
    global open_clip, PreprocessCfg, image_transform_v2
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    folder = tmp_path_factory.mktemp("configs")
    for name, vision in TINY.items():
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test meets the prompts of another run."""
    monkeypatch.setenv("FURL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_source(architecture: str, quick_gelu: bool = False) -> torch.nn.Module:
    """A model with random weights, and batch norms that do not happen to be the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = open_clip.create_model(architecture, force_quick_gelu=quick_gelu).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, 0, 0.1)
    return model


@pytest.fixture(scope="module")
def source(tiny_architectures):
    return make_source("tiny-resnet")


@pytest.fixture
def checkpoint(source, tmp_path):
    path = tmp_path / "tiny.pt"
    torch.save(source.state_dict(), path)
    return path


def make_frames(count: int, height: int, width: int | None = None, seed: int = 0) -> np.ndarray:
    """Coloured blots under noise: a wrong resize or channel order would be seen in both."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 6, 6, 3), np.uint8)
    size = (width or height, height)
    blots = [np.asarray(Image.fromarray(c).resize(size, Image.BICUBIC)) for c in coarse]
    noise = rng.integers(-40, 40, (count, height, width or height, 3))
    return np.clip(np.stack(blots) + noise, 0, 255).astype(np.uint8)


def expected_images(model: torch.nn.Module, frames: np.ndarray) -> np.ndarray:
    """The open_clip way: its own transform on PIL images, then the untouched model."""
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    with torch.inference_mode():
        batch = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
        return model.encode_image(batch).numpy()


def expected_text(model: torch.nn.Module, prompts: list[str]) -> np.ndarray:
    with torch.inference_mode():
        return model.encode_text(open_clip.tokenize(prompts)).numpy()


def assert_close(actual: np.ndarray, expected: np.ndarray, bf16: bool = False) -> None:
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, atol=5e-2 if bf16 else 1e-4)


def assert_same_function(model: vlms.VLM, source: torch.nn.Module) -> None:
    frames = make_frames(3, model.frame_size)
    bf16 = openclip_vlm.cpu_multiplies_bf16()
    assert_close(model.embed_images(frames), expected_images(source, frames), bf16)
    assert_close(model.embed_text(PROMPTS), expected_text(source, PROMPTS))
    assert model.embed_dim == expected_text(source, PROMPTS).shape[1]


def on_cpu(name: str, **arguments) -> vlms.VLM:
    return load_vlm(name, device="cpu", **arguments)


# ---------------------------------------------------------------- weights land where they should


def test_liv_checkpoint_of_the_real_shape(tmp_path):
    """RN50 in half precision, under DataParallel's and LIV's prefixes, beside trainer's state."""
    source = make_source("RN50", quick_gelu=True)
    source.load_state_dict({k: v.half().float() for k, v in source.state_dict().items()})
    state = {
        f"module.model.{key}": value.half() if value.is_floating_point() else value
        for key, value in source.state_dict().items()
    }
    torch.save({"liv": state, "global_step": 3}, tmp_path / "model.pt")
    model = on_cpu("liv", weights=tmp_path / "model.pt")
    assert (model.frame_size, model.embed_dim) == (224, 1024)
    assert model.id.startswith("liv-")
    assert_same_function(model, source)


def test_names_of_openai_weights_mean_quick_gelu():
    for name in ("clip", "RN50/openai"):
        architecture, config = openclip_vlm._look_up(name, tag_needed=True)
        assert architecture == "RN50" and config["quick_gelu"]
    assert openclip_vlm._look_up("liv", tag_needed=True)[0] == "RN50-quickgelu"
    assert open_clip.get_model_config("RN50-quickgelu")["quick_gelu"]
    architecture, config = openclip_vlm._look_up("ViT-bigG-14/laion2b_s39b_b160k", tag_needed=True)
    assert architecture == "ViT-bigG-14" and not config.get("quick_gelu", False)


@pytest.mark.parametrize("layout", ["plain", "openai", "trainer", "liv", "liv-finetuned"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_layouts(layout, suffix, source, tmp_path):
    state = {key: value.contiguous().clone() for key, value in source.state_dict().items()}
    if layout == "openai":
        numbers = ("input_resolution", "context_length", "vocab_size")
        state |= {key: torch.tensor(64) for key in numbers}
    prefix = {"trainer": "module.", "liv": "module.model.", "liv-finetuned": "model."}
    state = {prefix.get(layout, "") + key: value for key, value in state.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        wrapper = {"trainer": "state_dict", "liv": "liv", "liv-finetuned": "liv"}.get(layout)
        torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    assert_same_function(on_cpu("tiny-resnet", weights=path), source)


def test_transformer_tower(tmp_path):
    source = make_source("tiny-vit")
    save_file({k: v.clone() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    assert_same_function(on_cpu("tiny-vit", weights=tmp_path / "w.safetensors"), source)


def test_tag_decides_activation_and_preprocessing(tmp_path, monkeypatch):
    tag = {
        "hf_hub": "somewhere/", "quick_gelu": True, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4),
        "interpolation": "bilinear", "resize_mode": "squash",
    }
    monkeypatch.setattr(open_clip, "is_pretrained_cfg", lambda model, name: name == "made_up")
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, name: tag)
    source = make_source("tiny-vit", quick_gelu=True)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    model = on_cpu("tiny-vit/made_up", weights=tmp_path / "w.pt")
    assert_close(model.embed_text(PROMPTS), expected_text(source, PROMPTS))
    assert np.abs(expected_text(source, PROMPTS) - expected_text(
        make_source("tiny-vit"), PROMPTS)).max() > 1e-4  # the other activation would be noticed
    frames = make_frames(2, 40, 60)
    config = {k: v for k, v in tag.items() if k not in ("hf_hub", "quick_gelu")}
    transform = image_transform_v2(PreprocessCfg(size=32, **config), is_train=False)
    expected = torch.stack([transform(Image.fromarray(f)) for f in frames])
    assert mean_difference(model.preprocess(torch.from_numpy(frames)), expected) < 0.5


def test_mini_is_the_shipped_network(tmp_path):
    model, network = on_cpu("mini"), mini.load_mini()
    frames = make_frames(4, mini.CROP_SIZE)
    with torch.inference_mode():
        assert_close(model.embed_images(frames),
                     mini.EMBEDDING_SCALE * network.encode_images(torch.from_numpy(frames)).numpy())
        assert_close(model.embed_text(PROMPTS), network.encode_text(PROMPTS).numpy())
    assert (model.frame_size, model.embed_dim) == (mini.CROP_SIZE, mini.EMBED_DIM)
    shutil.copy(mini.WEIGHTS, tmp_path / "other.safetensors")
    assert on_cpu("mini", weights=tmp_path / "other.safetensors").id == model.id


# ------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize(
    "shape", [(64, 64), (100, 100), (40, 40), (75, 131), (131, 75), (480, 480)], ids=str
)
def test_preprocessing_equals_open_clips_own(shape, source, checkpoint):
    model = on_cpu("tiny-resnet", weights=checkpoint)
    frames = make_frames(2, *shape)
    transform = image_transform_v2(PreprocessCfg(**source.visual.preprocess_cfg), is_train=False)
    expected = torch.stack([transform(Image.fromarray(f)) for f in frames])
    got = model.preprocess(torch.from_numpy(frames))
    assert got.shape == (2, 3, 64, 64) and got.dtype == torch.float32
    if shape == (64, 64):
        torch.testing.assert_close(got, expected)
    # In grey levels; PIL rounds and clips between its two passes.
    assert mean_difference(got, expected) < 0.3
    model._interpolation = "bilinear"
    if shape != (64, 64):  # the tolerance tells one interpolation from another
        assert mean_difference(model.preprocess(torch.from_numpy(frames)), expected) > 0.4


def mean_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """In grey levels of 255."""
    return float((first - second).abs().mean() * 0.2687 * 255)


def test_red_is_the_first_channel(checkpoint):
    model = on_cpu("tiny-resnet", weights=checkpoint)
    red = np.zeros((1, 80, 80, 3), np.uint8)
    red[..., 0] = 255
    means = model.preprocess(torch.from_numpy(red)).mean((0, 2, 3))
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(means, (np.array([1, 0, 0]) - mean) / std, rtol=1e-5)


def test_batches_do_not_change_an_embedding(checkpoint, monkeypatch):
    """In float32: the embeddings of two frames differ by less than bfloat16 can tell."""
    monkeypatch.setattr(openclip_vlm, "cpu_multiplies_bf16", lambda: False)
    tolerance = 1e-4
    for model in (on_cpu("tiny-resnet", weights=checkpoint), on_cpu("mini")):
        frames = make_frames(interface.MAX_BATCH + 5, model.frame_size)
        together = model.embed_images(frames)
        assert together.shape == (interface.MAX_BATCH + 5, model.embed_dim)
        scale = np.abs(together).max()
        for i in (0, 15, interface.MAX_BATCH + 4):
            alone = model.embed_images(frames[i : i + 1])[0]
            np.testing.assert_allclose(alone / scale, together[i] / scale, atol=tolerance)
        assert np.abs(together[0] - together[1]).max() > 10 * tolerance * scale
        assert model.embed_images(frames[:0]).shape == (0, model.embed_dim)
        assert model.embed_text([]).shape == (0, model.embed_dim)


def test_bf16_where_the_machine_has_it(source, checkpoint, monkeypatch):
    frames = make_frames(3, 64)
    for has in (False, True):
        monkeypatch.setattr(openclip_vlm, "cpu_multiplies_bf16", lambda has=has: has)
        assert openclip_vlm.fast_precision(torch.device("cpu")) == ("bfloat16" if has else None)
        assert openclip_vlm.fast_precision(torch.device("cuda")) == "float16"
        model = on_cpu("tiny-resnet", weights=checkpoint)
        assert_close(model.embed_images(frames), expected_images(source, frames), bf16=has)
        assert_close(model.embed_text(PROMPTS), expected_text(source, PROMPTS))
        assert model.id.endswith("-bf16" if has else "-fp32")


@pytest.mark.parametrize("has", [False, True])
def test_random_weights_are_always_computed_in_float32(has, monkeypatch):
    """Rounding would be most of what their embeddings differ by (Figure 9)."""
    monkeypatch.setattr(openclip_vlm, "cpu_multiplies_bf16", lambda: has)
    model = on_cpu("tiny-resnet", pretrained=False, seed=3)
    assert model.id.endswith("-fp32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        source = open_clip.create_model("tiny-resnet").eval()
    frames = make_frames(3, 64)
    expected = expected_images(source, frames)
    np.testing.assert_allclose(
        model.embed_images(frames), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    with torch.autocast("cpu", torch.bfloat16):  # the tolerance tells one format from the other
        rounded = expected_images_as_float(source, frames)
    assert np.abs(rounded - expected).max() > 1e-3 * np.abs(expected).max()


def expected_images_as_float(model: torch.nn.Module, frames: np.ndarray) -> np.ndarray:
    """`expected_images` within autocast, where results may be of a format numpy does not know."""
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    with torch.inference_mode():
        batch = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
        return model.encode_image(batch).float().numpy()


def test_models_see_all_that_they_are_given(checkpoint):
    """What is cut off a picture is cut off before."""
    for model in (on_cpu("mini"), on_cpu("tiny-resnet", weights=checkpoint)):
        frames = make_frames(1, model.frame_size)
        framed = np.zeros_like(frames)
        framed[:, 5:-5, 5:-5] = frames[:, 5:-5, 5:-5]
        one, two = (np.asarray(model.embed_images(x)) for x in (frames, framed))
        assert not np.allclose(one, two, atol=1e-3 * np.abs(one).max())


def test_settings_give_the_same_model_again(checkpoint):
    for name, options in (
        ("tiny-resnet", {"weights": checkpoint}), ("mini", {}),
        ("tiny-resnet", {"pretrained": False, "seed": 5}), ("mini", {"pretrained": False}),
    ):
        model = on_cpu(name, **options)
        settings = json.loads(json.dumps(model.settings))  # as config.json keeps them
        assert on_cpu(**settings).id == model.id
        assert settings["pretrained"] == options.get("pretrained", True)


def test_frames_may_be_read_only_or_strided(recwarn):
    model = on_cpu("mini")
    frames = make_frames(2, mini.CROP_SIZE)
    expected = model.embed_images(frames)
    mirrored = np.ascontiguousarray(frames[:, :, ::-1])[:, :, ::-1]
    frames.flags.writeable = False
    np.testing.assert_array_equal(model.embed_images(frames), expected)
    np.testing.assert_array_equal(model.embed_images(mirrored), expected)
    assert not recwarn.list


@pytest.mark.parametrize("bad", [
    np.zeros((2, 176, 176, 3), np.float32), np.zeros((176, 176, 3), np.uint8),
    np.zeros((2, 3, 176, 176), np.uint8),
])
def test_frames_of_another_kind_are_refused(bad):
    with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 3\]"):
        on_cpu("mini").embed_images(bad)


# -------------------------------------------------------------------------------- text's cache


def test_prompts_are_computed_once_per_id(checkpoint, cache, monkeypatch):
    model = on_cpu("tiny-resnet", weights=checkpoint)
    computed = model.embed_text(PROMPTS)
    files = sorted((cache / "prompts").iterdir())
    assert len(files) == 2
    again, calls = on_cpu("tiny-resnet", weights=checkpoint), []
    encode = again._encode_text
    monkeypatch.setattr(again, "_encode_text", lambda texts: calls.append(texts) or encode(texts))
    np.testing.assert_array_equal(again.embed_text(PROMPTS[::-1]), computed[::-1])
    assert not calls
    files[0].write_bytes(files[0].read_bytes()[:50])  # a damaged file is computed again
    np.testing.assert_array_equal(again.embed_text(PROMPTS), computed)
    assert len(calls) == 1
    again.id += "x"  # another model's embeddings are never taken
    again.embed_text(PROMPTS)
    assert len(calls) == 3


def test_a_cache_that_cannot_be_written_is_no_error(cache, checkpoint):
    expected = on_cpu("mini").embed_text(PROMPTS)
    shutil.rmtree(cache)
    cache.write_text("not a folder")
    np.testing.assert_array_equal(on_cpu("mini").embed_text(PROMPTS), expected)


def test_id_follows_weights_and_name(source, checkpoint, tmp_path):
    first = on_cpu("tiny-resnet", weights=checkpoint)
    save_file({k: v.clone() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    assert on_cpu("tiny-resnet", weights=tmp_path / "w.safetensors").id == first.id
    changed = source.state_dict() | {"text_projection": source.text_projection.detach() * 1.001}
    torch.save(changed, tmp_path / "changed.pt")
    assert on_cpu("tiny-resnet", weights=tmp_path / "changed.pt").id != first.id


@pytest.mark.parametrize("name", ["tiny-resnet", "mini"])
def test_random_weights_follow_the_seed(name):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first, same, other = (on_cpu(name, pretrained=False, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    frames = make_frames(2, first.frame_size)
    np.testing.assert_array_equal(first.embed_images(frames), same.embed_images(frames))
    np.testing.assert_array_equal(first.embed_text(PROMPTS), same.embed_text(PROMPTS))
    assert not np.allclose(first.embed_images(frames), other.embed_images(frames))
    assert first.id == same.id != other.id


# --------------------------------------------------------------------------- what can go wrong


def one_line_error(pattern: str, name: str, **arguments) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        on_cpu(name, **arguments)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


def test_unknown_names_say_what_is_allowed():
    one_line_error(r"allowed are mini, toy, poses, liv.*did you mean ViT-B-32/openai",
                   "ViT-B32/openai")
    one_line_error(r"did you mean mini", "mimi")
    one_line_error(r"did you mean RN50/openai", "RN50")
    one_line_error(r"unknown VLM ''", "")
    one_line_error(r"unknown VLM 'no/such/thing'", "no/such/thing", pretrained=False)


def test_arguments_are_checked(checkpoint):
    one_line_error("exclude each other", "tiny-resnet", weights=checkpoint, pretrained=False)


@pytest.mark.parametrize("name", ["tiny-resnet", "mini"])
def test_files_that_are_no_weights(name, tmp_path, checkpoint):
    one_line_error("no such file", name, weights=tmp_path / "missing.pt")
    one_line_error("is not a file", name, weights=tmp_path)
    whole = checkpoint.read_bytes()
    contents = {"empty": b"", "text": b"hello, world", "truncated": whole[: len(whole) // 2]}
    for kind, content in contents.items():
        for suffix in (".pt", ".safetensors"):
            path = tmp_path / f"{kind}{suffix}"
            path.write_bytes(content)
            one_line_error(kind, name, weights=path)


def test_weights_that_do_not_fit(source, tmp_path):
    state = source.state_dict()
    path = tmp_path / "w.pt"
    torch.save(state | {"visual.conv1.weight": torch.zeros(8, 3, 5, 5)}, path)
    one_line_error(r"does not fit.*mismatch.*visual.conv1.weight", "tiny-resnet", weights=path)
    torch.save({k: v for k, v in state.items() if k != "visual.conv1.weight"}, path)
    one_line_error(r"does not fit.*Missing.*visual.conv1.weight", "tiny-resnet", weights=path)
    torch.save(state | {"surplus": torch.zeros(3)}, path)
    one_line_error(r"does not fit.*Unexpected.*surplus", "tiny-resnet", weights=path)
    torch.save(state | {"logit_scale": torch.zeros(3)}, path)
    one_line_error(r"does not fit", "tiny-resnet", weights=path)
    torch.save({}, path)
    one_line_error(r"does not fit", "tiny-resnet", weights=path)
    torch.save({"epoch": 3, "loss": 0.5}, path)
    one_line_error(r"no state dict", "tiny-resnet", weights=path)
    torch.save([torch.zeros(3)], path)
    one_line_error(r"no state dict", "tiny-resnet", weights=path)


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("name", ["tiny-resnet", "liv", "clip", "mini"])
def test_a_malicious_pickle_is_not_executed(name, source, tmp_path):
    target, state = tmp_path / "exploded", source.state_dict()
    bomb = state | {"logit_scale": Bomb(target)}
    torch.save(bomb, tmp_path / "zip.pt")
    torch.save({"liv": bomb}, tmp_path / "liv.pt")
    torch.save(bomb, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(target)))
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps(Bomb(target)))
    for file in ("zip.pt", "liv.pt", "legacy.pt", "plain.pt", "named.safetensors"):
        pickled = file.endswith(".pt") and name != "mini"  # mini's are safetensors, whatever named
        reason = "tensors alone" if pickled else "cannot"
        one_line_error(f"{file}.*{reason}|{reason}.*{file}", name, weights=tmp_path / file)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists()  # it was a live one


def test_torchscript_archives_are_refused(source, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but how OpenAI's files were made
        script = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
        torch.jit.save(script, tmp_path / "RN50.pt")
    one_line_error("TorchScript archives.*safetensors", "clip", weights=tmp_path / "RN50.pt")


def test_without_network_one_line_says_what_helps(tmp_path):
    """In a process of its own, where nothing is cached and the hub's door is shut."""
    code = (
        "import sys, time\n"
        "from common.errors import UserError\n"
        "from common.vlms import load_vlm\n"
        "assert 'torch' not in sys.modules\n"
        "import open_clip\n"
        "for name in ('liv', 'clip'):\n"
        "    start = time.time()\n"
        "    try: load_vlm(name)\n"
        "    except UserError as error: print(error)\n"
        "    assert time.time() - start < 10\n"
    )
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=120,
                          capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for name, line in zip(("liv", "clip"), done.stdout.splitlines(), strict=True):
        assert f"the weights of {name}" in line and "could not be downloaded" in line
        assert "access to the network" in line and "--vlm-weights PATH" in line


def test_without_network_for_a_plain_url(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg",
                        lambda model, tag: {"url": "http://127.0.0.1:9/rn50.pt"})
    one_line_error("127.0.0.1:9/rn50.pt.*--vlm-weights PATH", "RN50/cc12m")


def test_a_tokenizer_out_of_reach_is_said_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    one_line_error("ViT-B-16-SigLIP cannot be built here.*clip and liv do not",
                   "ViT-B-16-SigLIP/webli", pretrained=False)
    assert time.monotonic() - start < 10


def test_a_cached_download_is_used_without_network(source, tmp_path, monkeypatch):
    """The hub's cache layout, and safetensors before the pickle."""
    snapshot = tmp_path / "models--some--one" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--one" / "refs").mkdir()
    (tmp_path / "models--some--one" / "refs" / "main").write_text("abc")
    state = {k: v.clone() for k, v in source.state_dict().items()}
    save_file(state, snapshot / "open_clip_model.safetensors")
    (snapshot / "open_clip_pytorch_model.bin").write_bytes(b"not this one")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(open_clip, "is_pretrained_cfg", lambda model, tag: True)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: {"hf_hub": "some/one/"})
    assert_same_function(on_cpu("tiny-resnet/made_up"), source)


def test_read_state_dict_keeps_names_and_values(source, checkpoint):
    state = read_state_dict(checkpoint)
    assert state.keys() == source.state_dict().keys()
    for key, value in source.state_dict().items():
        assert torch.equal(state[key], value)


def test_embeddings_go_to_jax_without_a_copy():
    import jax

    with torch.inference_mode():
        tensor = torch.rand(8, 16, device="cuda" if jax.default_backend() == "gpu" else "cpu")
    array = interface.to_jax(tensor)
    assert isinstance(array, jax.Array) and array.dtype == np.float32
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    np.testing.assert_array_equal(array, tensor.cpu().numpy())


def test_embeddings_of_another_device_are_copied(monkeypatch):
    tensor = torch.rand(8, 16)
    monkeypatch.setattr(interface.jax, "default_backend", lambda: "gpu")  # and torch on the CPU
    array = interface.to_jax(tensor)
    assert array.unsafe_buffer_pointer() != tensor.data_ptr()
    np.testing.assert_array_equal(array, tensor.numpy())


def test_a_runs_prompt_and_goal_picture_are_embedded(monkeypatch):
    """Of its own seed, goal, camera and quality; a text as its length, a picture as its colour."""
    asked = []

    def goal_image(env_id, **where):
        asked.append((env_id, where))
        return np.full((192, 192, 3), 7, np.uint8)

    monkeypatch.setattr(task, "goal_image", goal_image)
    vlm = types.SimpleNamespace(
        view=None, frame_size=224, embed_text=lambda texts: np.array([[len(texts[0]), 1]]),
        embed_images=lambda pictures: np.array([[pictures[0, 0, 0, 0], 2]]))
    args = furl_sac_state.Args(env_id="reach-v3", seed=7, goal="random", camera_id=1,
                               quality="paper", prompt="Go.")
    text, goal = task.load_inputs(vlm, args)
    assert text.tolist() == [3, 1] and goal.tolist() == [7, 2]
    camera = interface.View(256, Square(32, 32, 192)).camera(1, "paper")
    assert asked == [("reach-v3", {"seed": 7, "goal": "random", "camera": camera})]
    for without in ({"goal_image": False}, {"align": False}):
        assert task.load_inputs(vlm, replace(args, **without)).goal.tolist() == [0, 0]
    assert len(asked) == 1, "no picture is drawn for nothing"
