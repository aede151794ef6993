"""`slidegrad heatmap`: where a run's model looks in a slide, and what each tile adds to its answer."""

import sys
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tiler.progress import Counter
from trainer.errors import TrainerError

if TYPE_CHECKING:
    from trainer.cohort import Case, Cohort

_MAX_TOP = 120
_MAX_TOLD = 20


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """Attention of a run over slides, and the part that each tile has in the output: pictures over the thumbnail, a
    sheet of the tiles that stand highest and lowest, a layer for QuPath, and a table, in RUN/heatmaps.

    The run's chosen checkpoint is loaded once. Slides whose values an earlier call left are drawn again without it.
    """

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    slide_ids: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SLIDE_ID ...]")] = ()
    """Slides of the run's cohort."""
    split: Literal["train", "val", "test"] | None = None
    """All slides of this split, in the place of SLIDE_ID."""
    output: str = ""
    """What contributions go to: a class, or a column of the labels; by default the last class, or the first column."""
    top: int = 12
    """Tiles on the sheet that stand highest, and as many that stand lowest."""
    sheet: bool = True
    """Draw the sheet, for which tiles are read from the slide."""
    manifests: Path | None = None
    """The manifests folder, if it is not where it was."""

    def run(self) -> tuple[dict[str, Any], int]:
        from trainer.memory import full_memory_told

        if not 1 <= self.top <= _MAX_TOP:
            raise TrainerError(f"--top {self.top}: expected 1 to {_MAX_TOP}")
        if bool(self.slide_ids) == bool(self.split):
            both = "not both" if self.split else "got neither"
            raise TrainerError(f"expected ids of slides behind the run, or --split test; {both}")
        with full_memory_told():
            return self._draw()

    def _draw(self) -> tuple[dict[str, Any], int]:
        from manifests.errors import SlidegradError
        from manifests.privacy import without_paths
        from trainer.heatmaps.drawing import Drawer
        from trainer.heatmaps.explain import Explainer
        from trainer.prepare import open_run
        from trainer.reports.report import write_report

        job = open_run(self.run_folder, self.manifests)
        cases = self._choose(job.cohort)
        explainer = Explainer(job, self.output)
        drawer = Drawer(job, explainer.goal, missing=explainer.missing, top=self.top, with_sheet=self.sheet)
        files = {case.slide_id: drawer.places.file(case.slide_id, ".parquet") for case in cases}
        slides: dict[str, dict[str, Any]] = {}
        failed: dict[str, str] = {}
        with Counter("drawing heatmaps") as counter, closing(explainer.explain(cases, files)) as found_slides:
            counter.start(len(cases))
            for found in found_slides:
                slide_id, error = found.case.slide_id, found.error
                try:
                    if not error:
                        slides[slide_id] = drawer.draw(found)
                except SlidegradError as lost:
                    error = f"slide {slide_id}: {without_paths(str(lost))}"
                if error:
                    failed[slide_id] = error
                counter.advance()
        if slides and (self.run_folder / "report.html").is_file():  # It shows what was drawn.
            write_report(self.run_folder)
        return self._tell(cases, slides, failed, explainer.missing, job.config.encoder.batchnorm)

    def _choose(self, cohort: "Cohort") -> "list[Case]":
        """The cases that are asked for, in that order, each once.

        Raises:
            TrainerError: not slides of the cohort, or none in the split.
        """
        if self.split is not None:
            cases = list(cohort.of(self.split).values())
            if not cases:
                raise TrainerError(f"{self.run_folder}: no slides in the split {self.split!r}")
            return cases
        known = {case.slide_id: case for case in cohort.cases}
        unknown = [slide_id for slide_id in dict.fromkeys(self.slide_ids) if slide_id not in known]
        if unknown:
            from trainer.targets import few

            near = get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; {self.run_folder}/cohort.csv lists its slides"
            named = f"slide {unknown[0]}" if len(unknown) == 1 else f"{len(unknown)} slides, {few(unknown)}"
            raise TrainerError(f"{named}: not in the cohort of {self.run_folder}{hint}")
        return [known[slide_id] for slide_id in dict.fromkeys(self.slide_ids)]

    def _tell(
        self,
        cases: "list[Case]",
        slides: dict[str, dict[str, Any]],
        failed: dict[str, str],
        missing: str,
        batchnorm: str,
    ) -> tuple[dict[str, Any], int]:
        """Sentences to stderr, and the result: of one slide named its own, else a list."""
        notes = [missing] if missing else []
        if batchnorm == "virtual":
            notes.append(
                "encoder.batchnorm is virtual: a tile's features depend on the tiles encoded with it, so that a focus "
                "can sway the output through others and be dark itself"
            )
        without = [slide["no_sheet"] for slide in slides.values() if self.sheet and "no_sheet" in slide]
        for about, sentences in (("note", notes), ("no sheet", without), ("failed", list(failed.values()))):
            for sentence in sentences[:_MAX_TOLD]:
                print(f"{about}: {sentence}", file=sys.stderr)
            if len(sentences) > _MAX_TOLD:
                print(f"… and {len(sentences) - _MAX_TOLD} more; the result lists them", file=sys.stderr)
        drawn = [slides[case.slide_id] for case in cases if case.slide_id in slides]
        if self.split is None and len(cases) == 1:
            if failed:
                raise TrainerError(failed[cases[0].slide_id])
            return drawn[0], 0
        result: dict[str, Any] = {"num_slides": len(drawn), "num_failed": len(failed), "run": str(self.run_folder)}
        lost = [{"slide_id": slide_id, "reason": reason} for slide_id, reason in failed.items()]
        return result | {"slides": drawn, "failed": lost}, 1 if failed else 0
