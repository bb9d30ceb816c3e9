"""Frozen vision-language models behind one small interface.

`load_vlm` gives an object with `embed_images` and `embed_text`; scripts know nothing else of it.
Embeddings are returned as the model gives them, not normalised: Eq. 5's distance is measured in
that space. Prompt embeddings are computed once and cached on disk.
"""

import difflib
import hashlib
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common import mini
from common.errors import UserError
from common.rendering import cached_arrays

LIV_REPOSITORY, LIV_FILE = "jasonyma/LIV", "model.pt"
LIV_PREFIX = "module.model."
ALIASES = {"clip": "RN50/openai"}
ALLOWED = "mini, liv, clip, or an open_clip pair such as ViT-B-32/laion2b_s34b_b79k"


class VLM:
    """A frozen model.

    Attributes:
        name: as asked for.
        id: model, hash of the weights and preprocessing: what a cached embedding depends on.
        embed_dim: D.
        frame_size: the size to draw frames at, pixels; other square sizes are resized.
    """

    name: str
    id: str
    embed_dim: int
    frame_size: int

    def __init__(self, device: torch.device):
        self.device = device

    def embed_images(self, frames: np.ndarray) -> np.ndarray:
        """RGB uint8 [B, H, W, 3] -> float32 [B, D]."""
        with torch.inference_mode():
            batch = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device)
            return self._encode_images(batch).float().cpu().numpy()

    def embed_text(self, prompts: list[str]) -> np.ndarray:
        """N prompts -> float32 [N, D], from the disk's cache where it has them."""
        return np.stack([self._embed_prompt(prompt) for prompt in prompts])

    def _embed_prompt(self, prompt: str) -> np.ndarray:
        def compute() -> dict[str, np.ndarray]:
            with torch.inference_mode():
                return {"embedding": self._encode_text([prompt]).float().cpu().numpy()[0]}

        key = hashlib.sha256(f"{self.id}\n{prompt}".encode()).hexdigest()[:32]
        return cached_arrays("prompts", key, compute)["embedding"]

    def _encode_images(self, frames: torch.Tensor) -> torch.Tensor:
        raise TypeError("use a subclass")

    def _encode_text(self, prompts: list[str]) -> torch.Tensor:
        raise TypeError("use a subclass")


class MiniVLM(VLM):
    """The embedded model of `common.mini`."""

    def __init__(self, weights: Path | None, pretrained: bool, device: torch.device, seed: int):
        super().__init__(device)
        self.name = "mini"
        if pretrained:
            model = mini.load_mini(weights)
            digest = mini.weights_digest(weights or mini.WEIGHTS)
        else:
            model, digest = mini.init_mini(seed), f"random{seed}"
        self._model = model.to(device)
        self.embed_dim, self.frame_size = mini.EMBED_DIM, mini.FRAME_SIZE
        self.id = f"mini-{digest}-{mini.FRAME_SIZE}px-crop{mini.CROP_SIZE}"

    def _encode_images(self, frames: torch.Tensor) -> torch.Tensor:
        return self._model.encode_images(frames)

    def _encode_text(self, prompts: list[str]) -> torch.Tensor:
        return self._model.encode_text(prompts)


class OpenClipVLM(VLM):
    """Any model of open_clip, and LIV, which is a fine-tuned CLIP RN50."""

    def __init__(self, name: str, model: torch.nn.Module, architecture: str, digest: str,
                 device: torch.device):
        import open_clip

        super().__init__(device)
        self.name = name
        model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self._model = model
        self._tokenize = open_clip.get_tokenizer(architecture)
        size = model.visual.image_size
        self.frame_size = size[0] if isinstance(size, tuple) else size
        config = open_clip.get_model_preprocess_cfg(model)
        self._mean = torch.tensor(config["mean"], device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(config["std"], device=device).view(1, 3, 1, 1)
        self._bf16 = device.type == "cuda" or cpu_multiplies_bf16()
        precision = "bf16" if self._bf16 else "fp32"
        self.id = f"{name.replace('/', '-')}-{digest}-{self.frame_size}px-bicubic-{precision}"
        with torch.inference_mode():
            self.embed_dim = self._encode_text(["a"]).shape[-1]

    def preprocess(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, S, S]: shorter side to S, centre crop, normalise.

        What open_clip's own transform does on PIL images, in one pass over the batch.
        """
        images = frames.permute(0, 3, 1, 2).float() / 255
        height, width = images.shape[-2:]
        size = self.frame_size
        if (height, width) != (size, size):
            scale = size / min(height, width)
            shape = (round(height * scale), round(width * scale))
            images = F.interpolate(images, shape, mode="bicubic", antialias=True,
                                   align_corners=False).clamp(0, 1)
            top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
            images = images[..., top : top + size, left : left + size]
        return (images - self._mean) / self._std

    def _encode_images(self, frames: torch.Tensor) -> torch.Tensor:
        images = self.preprocess(frames).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            return self._model.encode_image(images)

    def _encode_text(self, prompts: list[str]) -> torch.Tensor:
        return self._model.encode_text(self._tokenize(prompts).to(self.device))


def load_vlm(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    device: str = "auto",
    num_threads: int | None = None,
    seed: int = 0,
) -> VLM:
    """Load a frozen VLM.

    Args:
        name: mini, liv, clip (RN50/openai), or `<open_clip model>/<pretrained tag>`.
        weights: a local file instead of a download: .safetensors, or .pt holding a state dict.
        pretrained: False: the same network with random weights drawn from `seed`.
        device: auto, cpu or cuda.
        num_threads: torch's threads on the CPU; None leaves them.
        seed: of random weights.

    Raises:
        UserError: unknown name, no network and no file, or a file that does not fit. Files are
            never unpickled in a way that could execute code.
    """
    if weights is not None and not pretrained:
        raise UserError("--vlm-weights and --no-pretrained exclude each other")
    if weights is not None:
        weights = Path(weights)
        if not weights.is_file():
            raise UserError(f"--vlm-weights {weights}: no such file")
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.device(device)
    if name == "mini":
        return MiniVLM(weights, pretrained, target, seed)
    architecture, tag = _architecture(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(architecture)
    if pretrained:
        state = read_state_dict(weights) if weights else _download(name, architecture, tag)
        _load_into(model, state, weights or name)
    return OpenClipVLM(name, model, architecture,
                       state_digest(model) if pretrained else f"random{seed}", target)


def _architecture(name: str) -> tuple[str, str]:
    """open_clip's model name and pretrained tag; OpenAI's weights need quick GELU.

    Raises:
        UserError: names what is allowed.
    """
    if name == "liv":
        return "RN50-quickgelu", ""
    import open_clip

    model, _, tag = ALIASES.get(name, name).partition("/")
    pairs = [f"{m}/{t}" for m, t in open_clip.list_pretrained()]
    if f"{model}/{tag}" not in pairs:
        close = difflib.get_close_matches(name, [*pairs, "mini", "liv", "clip"], n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UserError(f"unknown VLM {name!r}: allowed are {ALLOWED}{hint}")
    if tag == "openai" and f"{model}-quickgelu" in open_clip.list_models():
        model = f"{model}-quickgelu"
    return model, tag


def _build(architecture: str) -> torch.nn.Module:
    import logging

    import open_clip

    logging.getLogger().setLevel(logging.ERROR)  # it warns that no weights were loaded
    return open_clip.create_model(architecture, pretrained=None)


def _download(name: str, architecture: str, tag: str) -> dict[str, torch.Tensor]:
    """The state dict from the hub (or its cache)."""
    import open_clip
    from huggingface_hub import hf_hub_download

    try:
        if name == "liv":
            path = hf_hub_download(LIV_REPOSITORY, LIV_FILE)
        else:
            config = open_clip.get_pretrained_cfg(architecture, tag)
            path = open_clip.download_pretrained(config, prefer_hf_hub=True)
    except Exception as error:  # the hub's client raises a dozen kinds without a network
        reason = type(error).__name__
        raise UserError(
            f"the weights of {name} are not on this machine and could not be downloaded "
            f"({reason}): run once with access to the Hugging Face hub, or give a local file with "
            "--vlm-weights PATH"
        ) from None
    return read_state_dict(Path(path))


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
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it is not a plain file of tensors (loading it could "
                        "execute code); save it as .safetensors or as a state dict") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript archive, which is a program: save its "
                            "state_dict() as .safetensors and give that") from None
        raise UserError(f"{path} cannot be read ({type(error).__name__}): truncated, or not a "
                        "weights file") from None
    except Exception as error:  # safetensors' own error, and what torch raises on garbage
        raise UserError(f"{path} cannot be read ({type(error).__name__}): truncated, or not a "
                        "weights file") from None
    for wrapper in ("liv", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict (a table of tensors by name)")
    for prefix in (LIV_PREFIX, "module.", "model."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    # OpenAI's files carry three numbers that describe the network.
    numbers = ("input_resolution", "context_length", "vocab_size")
    return {key: value for key, value in state.items() if key not in numbers}


def _load_into(model: torch.nn.Module, state: dict[str, torch.Tensor], source: object) -> None:
    try:
        model.load_state_dict({key: value.float() for key, value in state.items()})
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = lines[1].strip() if len(lines) > 1 else lines[0]
        raise UserError(f"{source} does not fit the network: {reason[:160]}") from None


def state_digest(model: torch.nn.Module) -> str:
    """The first 12 characters of the sha256 over all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 instructions; without them bf16 is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
