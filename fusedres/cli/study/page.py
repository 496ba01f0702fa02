"""The page of all four studies: one file that holds its pictures, and needs no network."""

from __future__ import annotations

import base64
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import jinja2

from fusedres.cli.study.panels import Panel, svg

CLAIMS = {  # what each study is about, in the words of the argument
    "gradients": "A gradient through many layers is a product of derivatives. With an activation that maps into "
    "(0, 1), such as sigmoid, it goes to 0, with ReLU less so but still in very deep networks. With y = F(x) + x the "
    "derivative is a sum, so the gradient passes undiminished.",
    "depth": "Past some depth a plain network gets worse, in training error too.",
    "exits": "The best depth differs from sample to sample: for some data the best features appear early, and more "
    "convolutions distort them; a shortcut lets them pass.",
    "landscape": "Shortcuts make the loss surface smoother and closer to convex.",
}


def embedded(panel: Panel) -> str:
    """The panel as an image's address that holds the image."""
    drawn = svg([panel], columns=1).encode()
    return "data:image/svg+xml;base64," + base64.b64encode(drawn).decode()


def html(
    found: dict[str, Any], drawn: dict[str, list[Panel]], compared: Callable[[dict[str, Any]], str]
) -> str:
    template = files("fusedres.cli.study").joinpath("page.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    studies = [
        {
            "name": name,
            "claim": CLAIMS[name],
            "compared": compared(study),
            "panels": [{"says": panel.says, "image": embedded(panel)} for panel in drawn[name]],
            **study,
        }
        for name, study in found["studies"].items()
    ]
    return environment.from_string(template).render(found=found, studies=studies)
