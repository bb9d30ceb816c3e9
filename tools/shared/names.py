"""Labels that come from users, as names of folders and as text in tables."""

import hashlib
import re

LONGEST = 200  # characters of a folder's name; file systems allow 255 bytes


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


def markdown(text: str) -> str:
    """`text` as a cell of a Markdown table shows it, whatever is in it."""
    escaped = re.sub(r"([\\|`*<>$\[\]~])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)  # emphasis; not the _ within a word
