"""Frozen vision-language models behind one small interface."""

from common.vlms.interface import VLM, View, check_same_vlm, view_for
from common.vlms.loading import load_vlm

__all__ = ["VLM", "View", "check_same_vlm", "load_vlm", "view_for"]
