"""The embedded vision-language models of VLM-RM's environments: `toy` knows CartPole's and
MountainCar's pictures, `poses` the humanoid's.

`mini` with a smaller image encoder, which sees whole pictures, and with fewer word pieces.
`tools/mini/pretrain_toy.py` makes its weights; docs/toy.md says what they are worth.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common.vlms.mini import EMBED_DIM, Mini

FRAME_SIZE = 96
KEYPOINTS = 32


class Toy(Mini):
    """The image and the text encoder."""

    weights = Path(__file__).with_name("toy.safetensors")
    view = f"{FRAME_SIZE}px"
    frame_size = FRAME_SIZE

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

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3], square, RGB -> unit vectors, float32 [B, EMBED_DIM]."""
        images = images.permute(0, 3, 1, 2).float() / 255
        if images.shape[-2:] != (FRAME_SIZE, FRAME_SIZE):
            images = F.interpolate(
                images, (FRAME_SIZE, FRAME_SIZE), mode="bilinear", antialias=True,
                align_corners=False,
            )
        return self.encode_crops(images)

    def encode_crops(self, crops: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, FRAME_SIZE, FRAME_SIZE] in [0, 1] -> unit vectors [B, EMBED_DIM]."""
        return F.normalize(self.image_head(self.features(crops)), dim=-1)

    def features(self, crops: torch.Tensor) -> torch.Tensor:
        """[B, 3, FRAME_SIZE, FRAME_SIZE] in [0, 1] -> the last hidden layer, [B, 192]."""
        early = self.early((crops - 0.5).contiguous(memory_format=torch.channels_last))
        places = mean_places(self.keypoint_maps(early))
        return self.hidden(torch.cat([self.late(early).flatten(1), places], 1))


class Poses(Toy):
    """The same for the humanoid."""

    weights = Path(__file__).with_name("poses.safetensors")


def mean_places(maps: torch.Tensor) -> torch.Tensor:
    """[B, K, H, W] -> the mean place under each map's softmax, -1 to 1, [B, 2 K].

    Angles of a few degrees move a pole's end by a pixel or two: these places hold fractions of one
    (Levine et al., 2016, "End-to-end training of deep visuomotor policies").
    """
    height, width = maps.shape[2:]
    shares = maps.flatten(2).softmax(-1).unflatten(-1, (height, width))
    rows = torch.linspace(-1, 1, height, device=maps.device)
    columns = torch.linspace(-1, 1, width, device=maps.device)
    return torch.cat([(shares.sum(3) * rows).sum(2), (shares.sum(2) * columns).sum(2)], 1)
