"""`slidegrad splits`: many splits of one cohort by patient, for Monte-Carlo cross-validation or folds."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import TrainerError

if TYPE_CHECKING:
    from trainer.labelled import Labelled
    from trainer.splits.drawing import Drawing
    from trainer.splits.grouping import Split
    from trainer.splits.sides import Side

_DEFAULT_NUM = {"mccv": 20, "kfold": 5}


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What is predicted, which the sides of a split shall have alike."""

    task: Literal["classes", "multilabel", "regression"] = "classes"
    """classes: one of several; multilabel: yes or no for each column; regression: a number for each column."""
    columns: tuple[str, ...] = ("label",)
    """Columns of the labels file."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Draw splits into training, validation and test, for `slidegrad train --split`: by patient, each side with its
    share of every class, the same for a seed everywhere and for ever.

    A patient, a specimen, or a slide that lies in the archive twice, is never on two sides.
    """

    manifests: Path
    """The manifests folder, from `slidegrad tile`."""
    labels: Path
    """CSV with slide_id, label (or what --head.columns names) [, specimen_id] [, patient_id]; no split."""
    out: Path
    """The folder for split_000.csv, … and splits.json; made whole or not at all, and never changed after."""
    method: Literal["mccv", "kfold"] = "mccv"
    """mccv: each split drawn anew from all patients (Monte-Carlo cross-validation); kfold: each patient tests once."""
    num: int | None = None
    """Splits, or folds; by default 20 with mccv and 5 with kfold. Fewer of mccv are the first of more."""
    val_fraction: float = 0.15
    """Share of the patients for validation."""
    test_fraction: float | None = None
    """Share of the patients for the test, by default 0.2; with kfold a fold is the test."""
    seed: int = 0
    """Other seeds, other splits."""
    head: Predicted = field(default_factory=Predicted)

    def run(self) -> tuple[dict[str, Any], int]:
        from manifests import open_manifests
        from tiler.doctor.words import count, tell
        from trainer.config import Head
        from trainer.labelled import read_labelled
        from trainer.splits.files import read_summary, refuse_others
        from trainer.splits.sides import tell_gaps

        drawing = self._drawing()
        head = Head(task=self.head.task, columns=self.head.columns)
        found = read_summary(self.out)
        slides = read_labelled(self.labels, open_manifests(self.manifests), head)
        if slides.has_split:
            raise TrainerError(
                f"--labels {self.labels}: has a column split, beside which drawn splits could not be used; take it out"
            )
        num_patients = len(set(slides.group_of.values()))
        if drawing.method == "kfold" and drawing.num > num_patients:
            raise TrainerError(f"--num {drawing.num}: expected at most {num_patients} folds, one for each patient")
        settings = self._settings(drawing, slides)
        if found is not None:
            refuse_others(self.out, found, settings)
        for note in slides.notes:
            print(f"note: {note}", file=sys.stderr)
        tell({"cohort": f"{count(len(slides.targets), 'slide')} of {count(num_patients, 'patient')}"})
        sides_of = self._keep(drawing, slides, settings, is_there=found is not None)
        for note in tell_gaps(sides_of, slides):
            print(f"note: {note}", file=sys.stderr)
        tell(_describe(sides_of))
        if found is not None:
            print(f"{self.out} holds these splits already; nothing was changed", file=sys.stderr)
        result = {
            "splits": str(self.out),
            "num_splits": drawing.num,
            "method": drawing.method,
            "seed": drawing.seed,
            "num_slides": len(slides.targets),
            "num_patients": num_patients,
            "cohort": settings["cohort"],
            "is_new": found is None,
        }
        return result, 0

    def _drawing(self) -> "Drawing":
        """How to draw.

        Raises:
            TrainerError: flags that make no sense, or would have no effect.
        """
        from trainer.splits.drawing import Drawing

        if self.method == "kfold" and self.test_fraction is not None:
            raise TrainerError(
                f"--test-fraction {self.test_fraction:g} would have no effect: with --method kfold a fold is the test; "
                "give --num instead"
            )
        return Drawing(
            method=self.method,
            num=_DEFAULT_NUM[self.method] if self.num is None else self.num,
            val_fraction=self.val_fraction,
            test_fraction=0.2 if self.test_fraction is None else self.test_fraction,
            seed=self.seed,
        )

    def _settings(self, drawing: "Drawing", slides: "Labelled") -> dict[str, Any]:
        """What the splits follow from."""
        drawn = asdict(drawing)
        if drawing.method == "kfold":
            drawn["test_fraction"] = None
        return {**drawn, "task": self.head.task, "columns": list(self.head.columns), "cohort": slides.digest()}

    def _keep(
        self, drawing: "Drawing", slides: "Labelled", settings: Mapping[str, Any], *, is_there: bool
    ) -> "dict[str, dict[Split, Side]]":
        """Draws all splits into the folder, or compares them with what is there."""
        from trainer.splits.files import SplitFolder, refuse_altered, summarise

        sides_of: dict[str, dict[Split, Side]] = {}
        if is_there:
            for name, splits, sides in self._draw(drawing, slides):
                refuse_altered(self.out, name, splits)
                sides_of[name] = sides
            return sides_of
        with SplitFolder(self.out) as folder:
            for name, splits, sides in self._draw(drawing, slides):
                folder.add(name, splits)
                sides_of[name] = sides
            folder.finish(summarise(settings, sides_of))
        return sides_of

    def _draw(
        self, drawing: "Drawing", slides: "Labelled"
    ) -> "Iterator[tuple[str, dict[str, Split], dict[Split, Side]]]":
        """Each split's name, the split, and what its sides hold.

        Raises:
            TrainerError: a side without patients, or of which nothing could be learnt or measured.
        """
        from tiler.progress import Counter
        from trainer.splits.drawing import draw_splits
        from trainer.splits.files import split_name
        from trainer.splits.sides import count_sides, refuse_poor
        from trainer.targets import refuse_unlearnable

        head, strata, way_out = slides.head, slides.strata, _ways_out(drawing)
        may_be_empty: tuple[Split, ...] = () if drawing.val_fraction else ("val",)
        with Counter("drawing") as counter:
            counter.start(drawing.num)
            for number in range(drawing.num):
                splits = draw_splits(strata, slides.group_of, drawing, number, carries=head.task != "classes")
                name, sides = split_name(number), count_sides(splits, slides)
                refuse_poor(sides, slides, where=name, way_out=way_out, may_be_empty=may_be_empty)
                training = {slide_id: slides.targets[slide_id] for slide_id, side in splits.items() if side == "train"}
                refuse_unlearnable(training, head, slides.classes, name)
                yield name, splits, sides
                counter.advance()


def _ways_out(drawing: "Drawing") -> "dict[Split, str]":
    """What to do if a side has too little."""
    larger = "give a larger --{}-fraction".format
    if drawing.method == "kfold":
        return {
            "train": "give a smaller --val-fraction",
            "val": larger("val"),
            "test": f"give fewer folds than --num {drawing.num}",
        }
    return {"train": "give a smaller --val-fraction or --test-fraction", "val": larger("val"), "test": larger("test")}


def _describe(sides_of: "Mapping[str, Mapping[Split, Side]]") -> dict[str, str]:
    """Side to what it holds, from the least to the most of all splits."""
    from trainer.splits.grouping import SPLITS

    told: dict[str, str] = {}
    for name in SPLITS:
        held = [sides[name] for sides in sides_of.values()]
        words = [f"{_span([side.num_patients for side in held])} patients"]
        words.append(f"{_span([side.num_slides for side in held])} slides")
        words += [f"{label} {_span([side.patients_of[label] for side in held])}" for label in held[0].patients_of]
        told[name] = f"{', '.join(words[:2])}{'; patients of ' + ', '.join(words[2:]) if words[2:] else ''}"
    return told


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
