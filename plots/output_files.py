"""Writing figures and tables: each file whole or not at all, and from the same numbers always the same bytes."""

import io
from pathlib import Path

from incremental_cifar.config import UserError
from incremental_cifar.safe_files import check_destinations, write_file
from plots.drawing import in_style
from plots.plain_matplotlib import Figure

# Per format, the entries that would differ from one call to the next.
METADATA = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
SUFFIXES = ", ".join(METADATA)


def check_figure_path(path: Path) -> Path:
    """Return the path of a figure to be written; raise UserError if its suffix names no format, or it cannot be written."""
    if path.suffix.lower() not in METADATA:
        raise UserError(f"--output {path}: the name must end in one of {SUFFIXES}")
    check_destinations(path)
    return path


@in_style
def write_figure(figure: Figure, *paths: Path) -> None:
    """Draw a figure and write it once per path, in the formats of the suffixes. Raises UserError if one cannot be written."""
    drawn = {}
    for path in paths:
        buffer = io.BytesIO()
        suffix = path.suffix.lower()
        figure.savefig(buffer, format=suffix[1:], metadata=METADATA[suffix], dpi=300)
        drawn[path] = buffer.getvalue()
    for path, content in drawn.items():
        write_file(path, content)
        print(f"Wrote {path}")
