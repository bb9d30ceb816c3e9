"""LIV, CLIP and every other model of open_clip, with weights from the hub or a local file."""

import difflib
import hashlib
import logging
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, first_line
from common.system import cpu_description
from common.vlms.interface import VLM, state_digest
from common.vlms.toy import EMBEDDED

LIV_HUB = "jasonyma/LIV/model.pt"
LIV_PREFIX = "module.model."  # DataParallel, then LIV's own module, then CLIP
LIV_ARCHITECTURE = "RN50-quickgelu"  # CLIP's RN50, and CLIP uses the quick GELU
OPEN_CLIP_FILES = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
ALIASES = {"clip": "RN50/openai"}
PAIR = "ViT-B-32/laion2b_s34b_b79k"
ALLOWED = f"{', '.join(EMBEDDED)}, liv, clip, or an open_clip pair such as {PAIR}"
TIMEOUT = 5  # seconds until a hub that does not answer counts as unreachable
SHORT_NAMES = {"float16": "fp16", "bfloat16": "bf16", None: "fp32"}  # of precisions, for ids


class OpenClipVLM(VLM):
    """Any model of open_clip, and LIV, which is a fine-tuned CLIP RN50.

    Args:
        name: as asked for.
        model: in float32 on the CPU, its weights loaded; it is changed in place.
        tokenize: prompts -> token numbers, int64 [N, context].
        preprocess: `mean`, `std`, `interpolation` and `resize_mode` of open_clip's tables.
        device: where it runs.
        exact: in float32 whatever the device: embeddings of a network with random weights differ
            so little that rounding would be all that is left (Figure 9).
    """

    def __init__(
        self, name: str, model: torch.nn.Module, tokenize: Any, preprocess: dict[str, Any],
        device: torch.device, exact: bool = False,
    ):
        from open_clip.modified_resnet import ModifiedResNet

        super().__init__(device)
        self.name = name
        digest = state_digest(model)
        model = model.eval().requires_grad_(False)
        if isinstance(model.visual, ModifiedResNet):
            fold_batch_norm(model.visual)
        self._model = model.to(device, memory_format=torch.channels_last)
        self._tokenize = tokenize
        self._precision = None if exact else fast_precision(device)
        size = model.visual.image_size
        self.frame_size = size[0] if isinstance(size, tuple | list) else size
        self._mean, self._std = preprocess["mean"], preprocess["std"]
        self._interpolation = preprocess["interpolation"]
        self._squash = preprocess["resize_mode"] == "squash"
        steps = repr((self._mean, self._std, self._interpolation, self._squash))
        self.id = (
            f"{name.replace('/', '-')}-{digest}-{self.frame_size}px-"
            f"{hashlib.sha256(steps.encode()).hexdigest()[:4]}-{SHORT_NAMES[self._precision]}"
        )
        with torch.inference_mode():
            self.embed_dim = self._encode_text(["a"]).shape[-1]

    def preprocess(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, S, S]: what open_clip's own transform does.

        Shorter side to S (or both, for models trained on squashed pictures), centre crop,
        normalise. Frames drawn at S are only normalised.
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as transforms

        size = self.frame_size
        images = frames.permute(0, 3, 1, 2)
        if images.shape[-2:] != (size, size):
            images = transforms.resize(
                images, [size, size] if self._squash else [size],
                InterpolationMode(self._interpolation), antialias=True,
            )
            images = transforms.center_crop(images, [size, size])
        return transforms.normalize(images.float() / 255, self._mean, self._std)

    def _encode_images(self, frames: torch.Tensor) -> torch.Tensor:
        images = self.preprocess(frames).contiguous(memory_format=torch.channels_last)
        if self._precision is None:
            # Not in TF32 either, which has float16's ten bits.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return self._model.encode_image(images)
        with torch.autocast(self.device.type, getattr(torch, self._precision)):
            return self._model.encode_image(images)

    def _encode_text(self, prompts: list[str]) -> torch.Tensor:
        return self._model.encode_text(self._tokenize(prompts).to(self.device))


def load_open_clip(
    name: str, weights: Path | None, pretrained: bool, device: torch.device, seed: int
) -> OpenClipVLM:
    """`load_vlm` for LIV and the models of open_clip; raises as it does."""
    architecture, config = _look_up(name, tag_needed=pretrained and weights is None)
    state = None
    if pretrained:  # first, because it is what fails
        state = read_state_dict(weights or _download(name, config))

    import open_clip

    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        try:
            _reach_text_side(architecture)
            # pretrained_text: never fetch a part of the network behind the user's back.
            model = open_clip.create_model(
                architecture, pretrained=None, pretrained_text=False,
                force_quick_gelu=config.get("quick_gelu", False),
            )
            tokenize = open_clip.get_tokenizer(architecture)
        except Exception as error:  # some need the transformers package and files of the hub
            raise UserError(
                f"{architecture} cannot be built here ({_reason(error)}): its tokenizer or "
                "text encoder needs the package transformers and files of the Hugging Face hub; "
                "clip and liv do not"
            ) from None
    if state is not None:
        _load_into(model, state, weights or name)
    preprocess = open_clip.get_model_preprocess_cfg(model) | {
        key: config[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in config
    }
    return OpenClipVLM(name, model, tokenize, preprocess, device, exact=not pretrained)


def _look_up(name: str, tag_needed: bool) -> tuple[str, dict[str, Any]]:
    """open_clip's architecture, and how the pretrained weights were made and where they are.

    Raises:
        UserError: names what is allowed.
    """
    if name == "liv":
        return LIV_ARCHITECTURE, {"hf_hub": LIV_HUB}
    import open_clip

    architecture, _, tag = ALIASES.get(name, name).partition("/")
    pairs = [f"{model}/{tag}" for model, tag in open_clip.list_pretrained()]
    if tag and open_clip.is_pretrained_cfg(architecture, tag):
        return architecture, dict(open_clip.get_pretrained_cfg(architecture, tag))
    if not tag and not tag_needed and architecture in open_clip.list_models():
        return architecture, {}
    names = [*EMBEDDED, "liv", "clip", *pairs]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    tagged = [pair for pair in pairs if pair.startswith(f"{architecture}/")]
    hint = f"; did you mean {', '.join(tagged[:5] or close)}?" if tagged or close else ""
    raise UserError(f"unknown VLM {name!r}: allowed are {ALLOWED}{hint}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what open_clip and the hub's client log: the one error line says what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _download(name: str, config: dict[str, Any]) -> Path:
    """The weights' file, from the cache or the network.

    Raises:
        UserError: neither has it.
    """
    hub, url = config.get("hf_hub", ""), config.get("url", "")
    try:
        with _quiet():
            if hub:
                repository, _, file = hub.rpartition("/")
                return _hub_file(repository, [file] if file else OPEN_CLIP_FILES)
            import open_clip

            before = socket.getdefaulttimeout()
            socket.setdefaulttimeout(TIMEOUT)  # open_clip opens the URL without one
            try:
                return Path(open_clip.download_pretrained_from_url(url))
            finally:
                socket.setdefaulttimeout(before)
    except Exception as error:  # the hub's client raises a dozen kinds without a network
        raise UserError(
            f"the weights of {name} ({hub or url}) are not on this machine and could not be "
            f"downloaded ({_reason(error)}): run once with access to the network, or give a "
            "local file with --vlm-weights PATH"
        ) from None


def _reach_text_side(architecture: str) -> None:
    """Raise at once where files for the text are out of reach: transformers would try for long."""
    import open_clip
    from huggingface_hub.errors import RemoteEntryNotFoundError

    text = open_clip.get_model_config(architecture)["text_cfg"]
    for key in ("hf_tokenizer_name", "hf_model_name"):
        if key in text:
            try:
                _hub_file(text[key], ["tokenizer_config.json", "config.json"])
            except RemoteEntryNotFoundError:  # not every repository has it, but this one answers
                pass


def _hub_file(repository: str, files: list[str]) -> Path:
    """The first of `files` that the repository has."""
    import huggingface_hub as hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for file in files:
        cached = hub.try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    for file in files:
        try:
            # Asked once here, because the download itself would try for half a minute.
            hub.get_hf_file_metadata(hub.hf_hub_url(repository, file), timeout=TIMEOUT)
            return Path(hub.hf_hub_download(repository, file))
        except RemoteEntryNotFoundError:
            if file == files[-1]:
                raise


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from .safetensors or .pt, without the wrappers that trainers leave.

    Raises:
        UserError: the file is damaged, holds no state dict, or would execute code.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with _quiet():
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen kinds on a damaged file
        raise UserError(
            f"{path} cannot be read ({_reason(error)}): give tensors alone, which cannot "
            "execute code, as .safetensors or as a state dict"
        ) from None
    for wrapper in ("liv", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict (a table of tensors by name)")
    for prefix in (LIV_PREFIX, "module.", "model."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    # OpenAI's state dicts carry three numbers that describe the network.
    numbers = ("input_resolution", "context_length", "vocab_size")
    return {key: value for key, value in state.items() if key not in numbers}


def _load_into(model: torch.nn.Module, state: dict[str, torch.Tensor], source: object) -> None:
    """Copy the weights, converting older layouts as open_clip does.

    Raises:
        UserError: they do not fit.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    try:
        state = convert_state_dict(model, state)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        for key in ("logit_scale", "logit_bias"):  # a number, or a list of one
            if key in state and getattr(model, key, None) is not None:
                state[key] = state[key].reshape(getattr(model, key).shape)
        model.load_state_dict({key: value.float() for key, value in state.items()})
    except (RuntimeError, KeyError) as error:
        lines = str(error).splitlines()
        reason = lines[1].strip() if len(lines) > 1 else lines[0]
        raise UserError(f"{source} does not fit the network: {reason[:160]}") from None


def fold_batch_norm(module: torch.nn.Module) -> None:
    """Fold each frozen batch norm of open_clip's ModifiedResNet into its convolution, in place.

    The same function up to rounding, and a pass over every activation less: 10 to 15 % of the time.
    """
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    children = dict(module.named_children())
    # conv1 and bn1, conv2 and bn2, ...; and a downsampling Sequential's 0 and 1.
    pairs = [(name, f"bn{name[4:]}") for name in children if name.startswith("conv")]
    for first, second in [*pairs, ("0", "1")]:
        conv, norm = children.get(first), children.get(second)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, first, fuse_conv_bn_eval(conv, norm))
            setattr(module, second, nn.Identity())
    for child in children.values():
        fold_batch_norm(child)


def fast_precision(device: torch.device) -> str | None:
    """The number format for images: on CUDA float16, the FuRL authors'; bfloat16 on a CPU that
    multiplies it; else None, which is float32."""
    if device.type == "cuda":
        return "float16"
    return "bfloat16" if cpu_multiplies_bf16() else None


def cpu_multiplies_bf16() -> bool:
    """Whether this x86-64 CPU has bf16 instructions; without them bf16 is many times slower than
    fp32. (What it gains on ARM, whose flag is bf16, has not been measured.)"""
    flags = cpu_description()
    return "amx_bf16" in flags or "avx512_bf16" in flags


def _reason(error: Exception) -> str:
    """An exception's kind and first line, for a message of one line."""
    return f"{type(error).__name__}: {first_line(error)[:120]}"
