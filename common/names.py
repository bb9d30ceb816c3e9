"""Names that are parts of paths and of what is compared."""

import re
from urllib.parse import quote


def file_name(env_id: str) -> str:
    """An environment's id as a part of a path: two ids never have the same.

    What `gymnasium` allows beyond plain names (`ALE/Pong-v5`, letters of other scripts) is
    percent-encoded.
    """
    return quote(env_id, safe=":")


def without_precision(vlm_id: str) -> str:
    """A VLM's id without the number format, which is the machine's choice."""
    return re.sub("-(fp16|bf16|fp32)$", "", vlm_id)
