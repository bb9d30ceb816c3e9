"""`mini2`: `mini` with an image encoder that sees objects. docs/mini2.md says what it is worth.

Its text encoder is built like `mini`'s. It is not the default before it has been shown to be better
in learning, not only in seeing. `tools/mini/pretrain.py` makes its weights.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common.vlms.mini import EMBED_DIM, Mini

FRAME_SIZE = 176  # what is drawn; a square of CROP_SIZE of it is seen: where the hand can be
CROP_SIZE, CROP_TOP, CROP_LEFT = 96, 40, 27
KEYPOINTS = 64


class Mini2(Mini):
    """The image and the text encoder."""

    weights = Path(__file__).with_name("mini2.safetensors")
    view = f"{FRAME_SIZE}px-crop{CROP_SIZE}"
    frame_size = FRAME_SIZE

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
        """uint8 [B, H, W, 3], square, RGB -> unit vectors, float32 [B, EMBED_DIM]."""
        return self.encode_crops(crop(images))

    def encode_crops(self, crops: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, CROP_SIZE, CROP_SIZE] in [0, 1] -> unit vectors [B, EMBED_DIM]."""
        return self.embed_hidden(self.hidden(crops))

    def hidden(self, crops: torch.Tensor) -> torch.Tensor:
        """[B, 3, CROP_SIZE, CROP_SIZE] in [0, 1] -> the last hidden layer, [B, 256]."""
        crops = (crops - 0.5).contiguous(memory_format=torch.channels_last)
        early = self.early(crops)
        places = keypoints(self.keypoint_maps(early))
        return self.image_head[:2](torch.cat([self.late(early).flatten(1), places], 1))

    def embed_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, 256] -> unit vectors [B, EMBED_DIM]."""
        return F.normalize(self.image_head[2](hidden), dim=-1)


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


def crop(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, CROP_SIZE, CROP_SIZE] in [0, 1]."""
    crops = images.permute(0, 3, 1, 2).float() / 255
    if crops.shape[-2:] != (FRAME_SIZE, FRAME_SIZE):
        crops = F.interpolate(
            crops, (FRAME_SIZE, FRAME_SIZE), mode="bilinear", antialias=True, align_corners=False
        )
    return crops[..., CROP_TOP : CROP_TOP + CROP_SIZE, CROP_LEFT : CROP_LEFT + CROP_SIZE]
