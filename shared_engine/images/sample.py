"""A drawn picture, where one is needed to see that images work."""

from __future__ import annotations

from PIL import Image


def draw_sample(width: int = 700, height: int = 500) -> Image.Image:
    """Return a grey disc that fades to its rim: no file, and the same everywhere."""
    return Image.radial_gradient("L").resize((width, height))
