"""matplotlib and HTML pages, for the tools that draw: `from tools.shared.plots import plt`."""

import base64
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import matplotlib.pyplot as plt  # noqa: F401 - for those who import this

matplotlib.use("Agg")  # figures become files; no window is opened
matplotlib.rcParams["text.parse_math"] = False  # a "$" in a prompt or a label begins no formula


def data_url(png: bytes) -> str:
    """A picture as an address that an HTML page can hold."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def fill(template: Path, **values: Any) -> str:
    """The HTML page of a jinja2 template; texts among `values` are escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template.read_text()).render(**values) + "\n"
