"""Names that come from users, as names of files and folders and as text in figures and tables."""

import hashlib
import re
from urllib.parse import quote

LONGEST = 200  # characters of a folder's name; file systems allow 255 bytes


def file_name(env_id: str) -> str:
    """An environment's id as a part of a path: two ids never have the same.

    What `gymnasium` allows beyond plain names (`ALE/Pong-v5`, letters of other scripts) is
    percent-encoded.
    """
    return quote(env_id, safe=":")


def folder_name(label: str) -> str:
    """`label` in plain characters: "FuRL w/o goal-image" is furl_w_o_goal-image.

    Labels that differ may get the same name, see `distinct_name`.
    """
    name = re.sub(r"[^a-z0-9.-]+", "_", label.lower()).strip("_.")
    return name if name and len(name) <= LONGEST else marked(name[: LONGEST // 2], label)


def marked(name: str, text: str) -> str:
    """`name` with a mark that belongs to `text` alone."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{name}-{digest}".lstrip("-")


def distinct_name(name: str, text: str, owners: dict[str, str]) -> str:
    """`name`, or a marked one if that belongs to another text already.

    Args:
        name: as a folder is to be called.
        text: what it stands for.
        owners: name -> text of those that are taken; gets this one too.
    """
    if owners.setdefault(name, text) == text:
        return name
    name = marked(name, text)
    owners[name] = text
    return name


def without_precision(vlm_id: str) -> str:
    """A VLM's id without the number format, which is the machine's choice."""
    return re.sub("-(fp16|bf16|fp32)$", "", vlm_id)


def markdown(text: str) -> str:
    """`text` as a cell of a Markdown table shows it, whatever is in it."""
    escaped = re.sub(r"([\\|`*<>$\[\]~])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)  # emphasis; not the _ within a word
