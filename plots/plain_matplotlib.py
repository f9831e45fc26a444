"""What the figures need of Matplotlib, as it comes: they start, and look alike, whatever a matplotlibrc, a style or a variable says.

Matplotlib is imported here alone, since it reads the user's settings, and may stumble over them, as it is imported. Where that happened
before, in a notebook say, DEFAULTS are still its own settings, and the process stays as it is.
"""
# ruff: noqa: F401 (imported for others)

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import incremental_cifar  # gives a home to a user who has none


@contextlib.contextmanager
def without_settings() -> Iterator[None]:
    """What Matplotlib finds while it is imported for the first time: nothing of the user's."""
    if "matplotlib" in sys.modules:
        yield
        return
    names = ("MPLBACKEND", "MATPLOTLIBRC")
    variables = {name: os.environ.pop(name) for name in names if name in os.environ}  # a notebook's backend may not exist here
    os.environ["MATPLOTLIBRC"] = os.devnull
    folder = os.getcwd() if os.path.exists("matplotlibrc") else None  # settings there would come first
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # nothing about folders that it cannot keep its list of fonts in
    try:
        if folder:
            os.chdir(Path(__file__).parent)
        yield
    finally:
        if folder:
            os.chdir(folder)
        del os.environ["MATPLOTLIBRC"]
        os.environ.update(variables)


with without_settings():
    from matplotlib import font_manager, rc_context, rcParamsDefault
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text
    from matplotlib.transforms import ScaledTranslation

DEFAULTS = {key: value for key, value in rcParamsDefault.items() if key != "backend"}
FONT = "DejaVu Sans"  # comes with Matplotlib: the same figure on every machine
CHARACTERS = frozenset(map(chr, font_manager.get_font(font_manager.findfont(FONT)).get_charmap()))  # that it can show
