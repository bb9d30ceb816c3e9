"""`mini`: the embedded vision-language model, small enough to be shipped and used offline.

A convolutional net embeds pictures. A sentence is the weighted mean of token vectors, distilled
from a sentence encoder, through a small MLP; unknown words fall into word pieces. Both embeddings
have unit length. `tools/mini/pretrain.py` makes the weights; docs/mini.md says what they are worth.
"""

import json
import re
import unicodedata
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common.envs.rendering import Square
from common.errors import UserError
from common.vlms.interface import VLM, View, state_digest

EMBED_DIM = 128
FRAME_SIZE = 176  # of whole pictures; a square of CROP_SIZE of them is seen: where the hand can be
CROP_SIZE, CROP_TOP, CROP_LEFT = 96, 40, 27
KEYPOINTS = 64
TOKEN_DIM = 128
# The unit vectors are stretched so that Table 5's margin of 0.2 on the distance to the goal
# image (Eq. 5) is a small step: an episode's start is about 1.0 x 4 away from its goal.
EMBEDDING_SCALE = 4.0
WEIGHTS = Path(__file__).with_name("mini.safetensors")


class Mini(nn.Module):
    """The image and the text encoder. `common.vlms.toy` has another image encoder.

    Args:
        vocabulary: word pieces in BERT's notation (continuations start with '##').
        token_vectors: [len(vocabulary), TOKEN_DIM] int8.
        token_scale: [TOKEN_DIM] float32, vector = int8 * scale.
        token_weights: [len(vocabulary)] float32, rarer pieces count more.
    """

    name = "mini"
    weights = WEIGHTS
    preprocessing = f"{FRAME_SIZE}px-crop{CROP_SIZE}"  # of pictures; a part of the VLM's id
    view = View(FRAME_SIZE, Square(CROP_TOP, CROP_LEFT, CROP_SIZE))

    def __init__(
        self,
        vocabulary: list[str],
        token_vectors: torch.Tensor,
        token_scale: torch.Tensor,
        token_weights: torch.Tensor,
    ):
        super().__init__()
        self.vocabulary = vocabulary
        self.number = {piece: i for i, piece in enumerate(vocabulary)}
        self.register_buffer("token_vectors", token_vectors)
        self.register_buffer("token_scale", token_scale)
        self.register_buffer("token_weights", token_weights)
        self.build_image_encoder()
        self.text_head = nn.Sequential(
            nn.Linear(TOKEN_DIM, 256), nn.ReLU(), nn.Linear(256, EMBED_DIM)
        )

    def build_image_encoder(self) -> None:
        self.early = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU(),
        )  # [B, 3, 96, 96] -> [B, 48, 24, 24]
        self.late = nn.Sequential(
            nn.Conv2d(48, 96, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(96, 96, 3, padding=1), nn.ReLU(),
            nn.Conv2d(96, 32, 1), nn.ReLU(),
        )  # -> [B, 32, 12, 12]: where things are must survive, so no pooling
        self.keypoint_maps = nn.Conv2d(48, KEYPOINTS, 1)  # of what `early` gives
        self.image_head = nn.Sequential(
            nn.Linear(32 * 12 * 12 + 2 * KEYPOINTS, 256), nn.ReLU(), nn.Linear(256, EMBED_DIM)
        )

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """What `view` shows, uint8 [B, H, W, 3], RGB -> unit vectors, float32 [B, EMBED_DIM]."""
        return self.encode_crops(resized(images, self.view.square.side))

    def encode_crops(self, crops: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, CROP_SIZE, CROP_SIZE] in [0, 1] -> unit vectors [B, EMBED_DIM]."""
        return self.embed_features(self.features(crops))

    def features(self, crops: torch.Tensor) -> torch.Tensor:
        """[B, 3, CROP_SIZE, CROP_SIZE] in [0, 1] -> the last hidden layer, [B, 256]."""
        crops = (crops - 0.5).contiguous(memory_format=torch.channels_last)
        early = self.early(crops)
        places = keypoints(self.keypoint_maps(early))
        return self.image_head[:2](torch.cat([self.late(early).flatten(1), places], 1))

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """[B, 256] -> unit vectors [B, EMBED_DIM]."""
        return F.normalize(self.image_head[2](features), dim=-1)

    def encode_text(self, sentences: list[str]) -> torch.Tensor:
        """N sentences -> unit vectors, float32 [N, EMBED_DIM]."""
        return self.encode_token_means(torch.stack([self.token_mean(s) for s in sentences]))

    def encode_token_means(self, means: torch.Tensor) -> torch.Tensor:
        """[N, TOKEN_DIM] of `token_mean` -> unit vectors [N, EMBED_DIM]."""
        return F.normalize(self.text_head(means), dim=-1)

    def token_mean(self, sentence: str) -> torch.Tensor:
        """The weighted mean of a sentence's token vectors, scaled to unit length, [TOKEN_DIM]."""
        numbers = [self.number[piece] for piece in word_pieces(sentence, self.number)]
        if not numbers:
            return torch.zeros(TOKEN_DIM)
        vectors = self.token_vectors[numbers].float() * self.token_scale
        weights = self.token_weights[numbers, None]
        return F.normalize((vectors * weights).sum(0), dim=0)


class MiniVLM(VLM):
    """`Mini`, or another `kind` of it, as a VLM."""

    def __init__(
        self, weights: Path | None, pretrained: bool, device: torch.device, seed: int,
        kind: type[Mini] = Mini,
    ):
        super().__init__(device)
        self.name = kind.name
        model = load_mini(weights, kind) if pretrained else init_mini(seed, kind)
        digest = state_digest(model)
        self._model = model.to(device)
        self.embed_dim, self.view, self.frame_size = EMBED_DIM, kind.view, kind.view.square.side
        self.id = f"{self.name}-{digest}-{kind.preprocessing}-x{EMBEDDING_SCALE:g}"

    def knows(self, prompt: str) -> bool:
        """Not of other scripts and emoji, whose pieces are none, nor of marks alone."""
        pieces = word_pieces(prompt, self._model.number)
        return any(c.isalnum() for piece in pieces for c in piece)

    def _encode_images(self, frames: torch.Tensor) -> torch.Tensor:
        return EMBEDDING_SCALE * self._model.encode_images(frames)

    def _encode_text(self, prompts: list[str]) -> torch.Tensor:
        return self._model.encode_text(prompts)


def keypoints(maps: torch.Tensor) -> torch.Tensor:
    """Where each map [B, K, H, W] is high: the mean place under its softmax, -1 to 1, [B, 2 K].

    Places to a fraction of a pixel, which flattened features only hold coarsely (Levine et al.,
    2016, "End-to-end training of deep visuomotor policies").
    """
    height, width = maps.shape[2:]
    shares = maps.flatten(2).softmax(-1).unflatten(-1, (height, width))
    rows = torch.linspace(-1, 1, height, device=maps.device)
    columns = torch.linspace(-1, 1, width, device=maps.device)
    return torch.cat([(shares.sum(3) * rows).sum(2), (shares.sum(2) * columns).sum(2)], 1)


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, size, size] in [0, 1]."""
    images = images.permute(0, 3, 1, 2).float() / 255
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(
        images, (size, size), mode="bilinear", antialias=True, align_corners=False
    )


def word_pieces(sentence: str, vocabulary: dict[str, int]) -> list[str]:
    """BERT's uncased scheme: words and marks, each split greedily into the longest known pieces."""
    text = unicodedata.normalize("NFD", sentence.lower())
    text = "".join(c for c in text if unicodedata.category(c) != "Mn")
    pieces = []
    for word in re.findall(r"\w+|[^\w\s]", text):
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                if prefix + word[start:end] in vocabulary:
                    pieces.append(prefix + word[start:end])
                    start = end
                    break
            else:
                start += 1  # a character that no piece holds
    return pieces


def save_mini(model: Mini, path: Path) -> None:
    """Write the weights as safetensors, the trained part in float16."""
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in model.state_dict().items():
        trained = not name.startswith("token_")
        tensors[name] = (tensor.half() if trained else tensor).contiguous()
    save_file(tensors, path, metadata={"vocabulary": json.dumps(model.vocabulary)})


def load_mini(path: Path | None = None, kind: type[Mini] = Mini) -> Mini:
    """The shipped model, or the one in the file `path` (safetensors written by `save_mini`).

    Raises:
        UserError: there is no such file, it is damaged, or it holds something else.
    """
    path = kind.weights if path is None else Path(path)
    vocabulary, tensors = _read(path, kind.name)
    n = len(vocabulary)
    model = kind(vocabulary, torch.empty(n, TOKEN_DIM, dtype=torch.int8), torch.empty(TOKEN_DIM),
                 torch.empty(n))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # its first line says only that there are errors
        problem = str(error).splitlines()[1].strip()
        raise UserError(f"{path} does not hold {kind.name}'s weights: {problem}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path} does not hold {kind.name}'s weights: {name} is not finite")
    return model.eval().requires_grad_(False)


def init_mini(seed: int, kind: type[Mini] = Mini) -> Mini:
    """The same network and token vectors with untrained weights drawn from `seed`."""
    vocabulary, tensors = _read(kind.weights, kind.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(vocabulary, *(tensors[f"token_{k}"] for k in ("vectors", "scale", "weights")))
    return model.eval().requires_grad_(False)


def _read(path: Path, name: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            vocabulary = json.loads((file.metadata() or {})["vocabulary"])
            if not isinstance(vocabulary, list) or not all(isinstance(v, str) for v in vocabulary):
                raise ValueError("no list of words")
            return vocabulary, {k: file.get_tensor(k) for k in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {name}'s weights {path}: {error}") from None
    except (KeyError, ValueError):
        raise UserError(f"{path} is a safetensors file, but not of {name}") from None
