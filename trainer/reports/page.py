"""Pages as one offline file each: templates of this folder, or of a package that brings its own, with shared filters.

One thing to know before changing it: text is escaped; only what passes the filter `svg` is not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from trainer.reports.findings import decimals, significant


def render_page(name: str, context: Mapping[str, Any], *more_folders: Path) -> str:
    """A template's page.

    Args:
        name: of the template.
        context: what it shows.
        more_folders: where templates lie, besides this folder.
    """
    folders = jinja2.FileSystemLoader([*more_folders, Path(__file__).parent])
    environment = jinja2.Environment(
        loader=folders, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(duration=duration, decimals=decimals, significant=significant, svg=Markup)
    return environment.get_template(name).render(context)


def duration(seconds: float) -> str:
    """As 2 d 3 h, 3 h 20 min, 4 min 10 s or 12.3 s."""
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size:.0f} {name} {seconds % size // small:.0f} {small_name}"
    return f"{seconds:.1f} s"
