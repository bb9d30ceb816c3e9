"""The embedded vision-language models of VLM-RM's environments: `toy` knows CartPole's and
MountainCar's pictures, `poses` the humanoid's.

`mini` with a smaller image encoder, which sees whole pictures, and with fewer word pieces.
`tools/mini/pretrain_toy.py` makes its weights; docs/mini.md says what they are worth.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common.vlms.interface import centre_view
from common.vlms.mini import EMBED_DIM, Mini, keypoints

FRAME_SIZE = 96
KEYPOINTS = 32


class Toy(Mini):
    """The image and the text encoder."""

    name = "toy"
    weights = Path(__file__).with_name("toy.safetensors")
    preprocessing = f"{FRAME_SIZE}px"
    view = centre_view(FRAME_SIZE, 0)

    def build_image_encoder(self) -> None:
        self.early = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        )  # [B, 3, 96, 96] -> [B, 32, 24, 24]
        self.late = nn.Sequential(
            nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(48, 16, 1), nn.ReLU(),
        )  # -> [B, 16, 12, 12]: where things are must survive, so no pooling
        self.keypoint_maps = nn.Conv2d(32, KEYPOINTS, 1)  # of what `early` gives
        self.hidden = nn.Sequential(nn.Linear(16 * 12 * 12 + 2 * KEYPOINTS, 192), nn.ReLU())
        self.image_head = nn.Linear(192, EMBED_DIM)

    def features(self, crops: torch.Tensor) -> torch.Tensor:
        """[B, 3, FRAME_SIZE, FRAME_SIZE] in [0, 1] -> the last hidden layer, [B, 192]."""
        early = self.early((crops - 0.5).contiguous(memory_format=torch.channels_last))
        places = keypoints(self.keypoint_maps(early))
        return self.hidden(torch.cat([self.late(early).flatten(1), places], 1))

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """[B, 192] -> unit vectors [B, EMBED_DIM]."""
        return F.normalize(self.image_head(features), dim=-1)


class Poses(Toy):
    """The same for the humanoid."""

    name = "poses"
    weights = Path(__file__).with_name("poses.safetensors")


# What ships here.
EMBEDDED: dict[str, type[Mini]] = {kind.name: kind for kind in (Mini, Toy, Poses)}
