"""`load_vlm`: a frozen VLM by its name."""

from pathlib import Path

from common.errors import UserError
from common.vlms.interface import VLM


def load_vlm(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    device: str = "auto",
    seed: int = 0,
) -> VLM:
    """Load a frozen VLM.

    Args:
        name: mini, toy, poses, liv, clip (RN50/openai), or `<open_clip model>/<pretrained tag>`.
            The tag may be left out where `weights` or `pretrained=False` makes it needless.
        weights: a local file instead of a download: .safetensors, or .pt holding a state dict.
        pretrained: False: the same network with random weights drawn from `seed`.
        device: auto, cpu or cuda.
        seed: of random weights.

    Raises:
        UserError: unknown name, no network and no file, or a file that does not fit.
            Files are never unpickled in a way that could execute code.
    """
    if weights is not None and not pretrained:
        raise UserError("--vlm-weights and --no-pretrained exclude each other")
    if weights is not None:
        weights = Path(weights).expanduser()
        if not weights.is_file():
            reason = "is not a file" if weights.exists() else "no such file"
            raise UserError(f"--vlm-weights {weights}: {reason}")
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    from common.vlms.toy import EMBEDDED

    if name in EMBEDDED:
        from common.vlms.mini import MiniVLM

        vlm: VLM = MiniVLM(weights, pretrained, torch.device(device), seed, EMBEDDED[name])
    else:
        from common.vlms.openclip_vlm import load_open_clip

        vlm = load_open_clip(name, weights, pretrained, torch.device(device), seed)
    vlm.settings = {"name": name, "weights": weights and str(weights.resolve()),
                    "pretrained": pretrained, "seed": seed}
    return vlm
