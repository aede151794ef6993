"""What a heatmap leaves in RUN/heatmaps: where each file lies, and the writing of them.

    SLIDE.png               attention over the thumbnail
    SLIDE_contribution.png  contributions, where the aggregator tells them
    SLIDE_tiles.png         the tiles that stand highest and lowest
    SLIDE.geojson           the tiles for QuPath
    SLIDE.parquet           the values, tile by tile (`values`)

SLIDE is `manifests.files.disk_name` of the slide id.
"""

import hashlib
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifests import Manifest
from manifests.errors import SlidegradError
from manifests.files import atomic_path, disk_name, mask_path, write_text
from tiler.masks import Overview, read_mask
from trainer.cohort import Case
from trainer.heatmaps.cards import ATTENTION, Legend, contribution_legend, draw_card
from trainer.heatmaps.explain import Found
from trainer.heatmaps.goal import Goal
from trainer.heatmaps.painting import color_scale, paint_slide, rank_share, sign_share
from trainer.heatmaps.qupath import draw_layer
from trainer.heatmaps.sheet import Choice, choose_tiles, draw_sheet
from trainer.heatmaps.values import SlideValues, write_values
from trainer.heatmaps.words import describe_model, describe_slide, describe_sum
from trainer.job import Job
from trainer.loading.quarantine import quarantined
from trainer.loading.reading import ShardReader
from trainer.measures.merits import PREDICTED
from trainer.sampler import ShardPlan, draw_rows, plan_scoring
from trainer.scoring import Score


class Places:
    """Where the files of each slide of a run lie.

    One thing to know before changing it: a cohort may have a slide `a` and a slide `a_tiles`. What is made of `a` gives
    way to the heatmap of the other.
    """

    def __init__(self, job: Job) -> None:
        self._folder = job.run / "heatmaps"
        self._taken = {disk_name(case.slide_id) for case in job.cohort.cases}

    def file(self, slide_id: str, suffix: str) -> Path:
        """SLIDE.png, SLIDE.geojson or SLIDE.parquet."""
        return self._folder / f"{disk_name(slide_id)}{suffix}"

    def picture(self, slide_id: str, what: str) -> Path:
        """SLIDE_contribution.png or SLIDE_tiles.png."""
        stem = f"{disk_name(slide_id)}_{what}"
        if stem in self._taken:
            stem += f"-{hashlib.blake2b(slide_id.encode(), digest_size=6).hexdigest()}"
        return self._folder / f"{stem}.png"


class Drawer:
    """Writes the files of slides of a run, one after another.

    Args:
        job: the run.
        goal: what contributions add up to; None where there are none.
        missing: then why.
        top: tiles of each part of the sheet.
        with_sheet: whether there is one.
    """

    def __init__(
        self, job: Job, goal: Goal | None, *, missing: str = "", top: int = 12, with_sheet: bool = True
    ) -> None:
        self._job, self._goal, self._missing, self._top, self._with_sheet = job, goal, missing, top, with_sheet
        self._quarantined = quarantined(job.run)
        self.places = Places(job)

    def draw(self, found: Found) -> dict[str, Any]:
        """Writes all files of a slide whose values are known.

        Returns:
            The slide's part of the result: predictions, the files, and in `no_…` why one is missing.

        Raises:
            SlidegradError: its thumbnail is lost; the files without it are written.
        """
        case, manifest, values = found.case, found.manifest, found.values
        assert manifest is not None, "or there is an error"
        assert values is not None, "likewise"
        slide_id, places = case.slide_id, self.places
        table, layer = (places.file(slide_id, suffix) for suffix in (".parquet", ".geojson"))
        sheet, contribution = (places.picture(slide_id, what) for what in ("tiles", "contribution"))
        if found.is_new:  # Pictures of other values must not stay beside them.
            sheet.unlink(missing_ok=True)
            contribution.unlink(missing_ok=True)
            write_values(table, manifest, values)
        choice = choose_tiles(values.leading, self._top)
        write_text(layer, draw_layer(manifest, values, choice))
        no_sheet = self._draw_sheet(sheet, case, manifest, values, choice) if self._with_sheet else "not asked for"
        self._draw_cards(contribution, case, manifest, values)
        result: dict[str, Any] = {
            "slide_id": slide_id,
            PREDICTED[self._job.cohort.task]: list(values.predictions),
            "heatmap": str(places.file(slide_id, ".png")),
            "contribution": str(contribution) if self._goal else None,
            "sheet": None if no_sheet else str(sheet),
            "geojson": str(layer),
            "table": str(table),
        }
        reasons = {"no_contribution": self._missing, "no_sheet": no_sheet}
        return result | {name: why for name, why in reasons.items() if why}

    def _draw_sheet(self, file: Path, case: Case, manifest: Manifest, values: SlideValues, choice: Choice) -> str:
        """Writes the sheet; returns why it cannot be."""
        if not len(choice.rows):
            return f"slide {case.slide_id}: no tile has a value; the model diverged"
        (step,) = plan_scoring({case.slide_id: case.num_tiles}, tiles=self._job.config.tiles)
        tile_px = manifest.slide.tile_px
        tiles_NHWC = np.empty((len(choice.rows), tile_px, tile_px, 3), np.uint8)
        num_threads = self._job.config.machine.reader_threads or len(os.sched_getaffinity(0))
        reader = ShardReader(self._job.source, self._job.paths, num_threads, _wait, quarantined=self._quarantined)
        try:
            reader.read(ShardPlan(step, 0, choice.rows), tiles_NHWC)
        except (SlidegradError, OSError) as error:
            return reader.tell(case.slide_id, error)
        lines = (f"slide {case.slide_id}", describe_slide(case, values, self._job.cohort), describe_model(values))
        _write(file, draw_sheet(manifest, values, choice, tiles_NHWC, lines))
        return ""

    def _draw_cards(self, contribution: Path, case: Case, manifest: Manifest, values: SlideValues) -> None:
        overview = _overview(self._job, case)
        title, notes = f"slide {case.slide_id}", [describe_slide(case, values, self._job.cohort)]
        share = rank_share(values.attention)
        file = self.places.file(case.slide_id, ".png")
        _write_card(file, overview, manifest, share, ATTENTION, title, [*notes, describe_model(values)])
        if self._goal is None:
            return
        scale = color_scale(values.contribution)
        is_cut = bool((np.abs(values.contribution) > scale).any())
        legend = contribution_legend(self._goal.what, self._goal.ends, scale, is_cut=is_cut)
        share = sign_share(values.contribution, scale)
        notes += [describe_sum(values), describe_model(values)]
        _write_card(contribution, overview, manifest, share, legend, title, notes)


def draw_attention(job: Job, case: Case, score: Score) -> Path:
    """Writes RUN/heatmaps/SLIDE.png alone, of a slide that was scored.

    Raises:
        SlidegradError: its manifest or its thumbnail is lost.
    """
    manifest = job.source[case.slide_id]
    (step,) = plan_scoring({case.slide_id: case.num_tiles}, tiles=job.config.tiles)
    attention = np.full(len(manifest), math.nan)
    attention[draw_rows(step, job.config.seed)] = score.attention
    file = Places(job).file(case.slide_id, ".png")
    title = f"slide {case.slide_id}"
    _write_card(file, _overview(job, case), manifest, rank_share(attention), ATTENTION, title, [])
    return file


def _overview(job: Job, case: Case) -> Overview:
    return read_mask(mask_path(job.root, case.slide_id)).overview


def _write_card(
    file: Path,
    overview: Overview,
    manifest: Manifest,
    share: NDArray[np.float64],
    legend: Legend,
    title: str,
    notes: list[str],
) -> None:
    painted = paint_slide(overview.thumbnail, overview.mpp, manifest, share, legend.colors)
    notes = [note for note in notes if note]
    _write(file, draw_card(overview.thumbnail, painted, overview.mpp, legend, title=title, notes=notes))


def _write(file: Path, content: bytes) -> None:
    with atomic_path(file) as partial:
        partial.write_bytes(content)


def _wait(delay_s: float) -> bool:
    """Between two attempts to read."""
    time.sleep(delay_s)
    return True
