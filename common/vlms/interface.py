"""What the scripts know of a frozen vision-language model.

Embeddings are returned as the model gives them, not normalised: Eq. 5's distance is measured in
that space. Prompt embeddings are computed once and cached on disk.

torch and open_clip are imported when a model is loaded, not with `common.vlms`: they cost seconds
that `--help` and a misspelt argument need not wait for.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.cache import cached_arrays
from common.envs.rendering import Camera, Square
from common.errors import UserError
from common.flags import note
from common.names import without_precision

if TYPE_CHECKING:
    import torch

    from common.envs.suite import Suite

MAX_BATCH = 32  # frames per forward pass: RN50 needs some 50 MB each


class VLM:
    """A frozen model.

    A subclass has two methods more, both with tensors: `_encode_images`, RGB pictures of any size,
    uint8 [B, H, W, 3] -> [B, D], and `_encode_text`, N prompts -> [N, D].

    Attributes:
        name: as asked for.
        id: model, hash of the weights and preprocessing: what a cached embedding depends on.
        embed_dim: D.
        frame_size: width and height of its input, pixels; other sizes are resized.
        view: what it is given of a scene; None: what the suite gives, see `view_for`.
        settings: arguments of `load_vlm` that give the same model again.
    """

    name: str
    id: str
    embed_dim: int
    frame_size: int
    view: View | None = None
    settings: dict[str, Any]

    def __init__(self, device: torch.device):
        self.device = device

    def embed_images(self, frames: np.ndarray) -> jax.Array:
        """RGB uint8 [B, H, W, 3] -> float32 [B, D], on JAX's device.

        Raises:
            ValueError: another shape or dtype.
        """
        import torch

        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(
                f"frames must be uint8 [B, H, W, 3], not {frames.dtype} {list(frames.shape)}"
            )
        embeddings = [torch.zeros((0, self.embed_dim), device=self.device)]
        with torch.inference_mode():
            for start in range(0, len(frames), MAX_BATCH):
                part = np.require(frames[start : start + MAX_BATCH], requirements=["C", "W"])
                batch = torch.from_numpy(part).to(self.device)
                embeddings.append(self._encode_images(batch).float())
            return to_jax(torch.cat(embeddings))

    def embed_text(self, prompts: list[str]) -> np.ndarray:
        """N prompts -> float32 [N, D], from the disk's cache where it has them.

        Raises:
            UserError: an embedding is not finite, or zero: no picture could be compared with it.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings")
        empty = np.zeros((0, self.embed_dim), np.float32)
        return np.concatenate([empty, *(self._embed_prompt(p)[None] for p in prompts)])

    def knows(self, prompt: str) -> bool:
        """Whether there is a word in it that means something to the model."""
        return True

    def _embed_prompt(self, prompt: str) -> np.ndarray:
        import torch

        if not self.knows(prompt):
            note(f"{self.name} knows no word of the prompt {prompt!r}: all such prompts are the "
                 "same to it")

        def compute() -> dict[str, np.ndarray]:
            with torch.inference_mode():
                return {"embedding": self._encode_text([prompt]).float().cpu().numpy()[0]}

        asked = f"{self.id}\n{prompt}".encode(errors="surrogateescape")  # whatever a shell gives
        key = hashlib.sha256(asked).hexdigest()[:32]
        embedding = cached_arrays("prompts", key, compute)["embedding"]
        if not np.isfinite(embedding).all() or not embedding.any():
            raise UserError(f"{self.name} has no embedding of {prompt!r} that is finite and not "
                            "zero: its weights are damaged, or it knows none of these words")
        return embedding


class View(NamedTuple):
    """What a VLM sees of a scene: a part of pictures of `size` px."""

    size: int  # width and height of the whole picture, pixels
    square: Square  # the part of it that is seen

    def crop(self, pictures: np.ndarray) -> np.ndarray:
        """What is seen of whole pictures, [..., size, size, 3] -> [..., side, side, 3]."""
        return self.square.of(pictures)

    def camera(self, camera_id: int, quality: str) -> Camera:
        """What draws just the part that is seen."""
        return Camera(self.size, camera_id, quality, self.square)


def centre_view(size: int, margin: int) -> View:
    """Pictures of `size` px without `margin` px at each side."""
    return View(size, Square(margin, margin, size - 2 * margin))


def view_for(vlm: VLM, suite: Suite) -> View:
    """What a VLM is given of a suite's pictures.

    On Meta-World FuRL's authors draw 256 px and keep rows and columns 32 to 224, which their CLIP
    resizes to its 224 px (fuyw/FuRL, `crop_center`): the same share of the picture here for models
    of any input size that have no view of their own.
    """
    if vlm.view is not None:
        return vlm.view
    if not suite.crops_border:
        return centre_view(vlm.frame_size, 0)
    size = 256 * vlm.frame_size // 224
    return centre_view(size, size // 8)


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """A tensor as JAX's; where both libraries use the same device, nothing is copied or waited for.

    The tensor must not be changed afterwards.
    """
    backend = jax.default_backend()
    if tensor.device.type == ("cuda" if backend == "gpu" else backend):
        return jnp.from_dlpack(tensor)
    return jnp.asarray(tensor.cpu().numpy())


def state_digest(model: torch.nn.Module) -> str:
    """The first 12 characters of the sha256 over all weights, of whatever origin."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def check_same_vlm(run_dir: Path, config: dict[str, Any], vlm: VLM) -> None:
    """Whether `vlm` is the one that a run with this `config` learned from.

    Raises:
        UserError: it is not. The number format, which is the machine's choice, may differ.
    """
    ours, theirs = vlm.id, str(config.get("vlm_id"))
    if without_precision(ours) != without_precision(theirs):
        raise UserError(f"{run_dir} was trained with the VLM {theirs}, this one is {ours}: its "
                        "reward would mean nothing")
