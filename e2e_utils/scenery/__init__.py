"""Draws scenes that look like satellite pictures; `sample.py` makes files of them."""

from .scene import draw_scene, strip_of

__all__ = ["draw_scene", "strip_of"]
