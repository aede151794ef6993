"""`slidegrad evaluate`: what a run is worth on slides that it did not learn from, and on which of them it is not."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tiler.progress import progress_bar
from trainer.errors import TrainerError
from trainer.phases import Phases

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from trainer.evaluation.evaluate import Evaluation
    from trainer.measures.operating import Rule
    from trainer.reports.findings import Table

_DEFAULT_THRESHOLD = ("0.5",)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a split of a run with its best checkpoint: measures with intervals of slides, specimens and patients,
    thresholds, calibration, subgroups, another run; for the test slides the report anew. Files in RUN/evaluation/.
    """

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    split: Literal["train", "val", "test"] = "test"
    """Which slides."""
    manifests: Path | None = None
    """The manifests folder, if it is not where it was."""
    pool: Literal["mean", "max"] = "mean"
    """What a specimen's or a patient's prediction is of those of its slides."""
    threshold: Annotated[tuple[str, ...], tyro.conf.arg(metavar="T …")] = _DEFAULT_THRESHOLD
    """Scores from which a slide is called positive: a number, or youden, sensitivity=S, specificity=S, which are chosen
    on the validation slides."""
    by: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN …")] = ()
    """Columns of --labels whose values make subgroups."""
    labels: Path | None = None
    """A labels file with these columns, for --by."""
    against: Path | None = None
    """Another run, with scores of the same split: is the difference more than chance?"""
    scores: Path | None = None
    """Evaluate these scores in place of the run's: Parquet or CSV with slide_id and probs_NAME (numbers: values_NAME)
    for each class or column. RUN/scores.parquet are those of the run itself, without scoring anew."""

    def run(self) -> tuple[dict[str, Any], int]:
        from trainer.evaluation.evaluate import Request, evaluate
        from trainer.memory import full_memory_told

        rules = self._check()
        request = Request(
            run=self.run_folder,
            split=self.split,
            manifests=self.manifests,
            pool=self.pool,
            rules=rules,
            by=self.by,
            labels=self.labels,
            against=self.against,
            scores=self.scores,
        )
        with progress_bar() as bar, full_memory_told():
            found = evaluate(request, Phases(bar))
        self._tell(found, rules)
        return found.result, 1 if found.result["num_skipped"] or found.result["val_skipped"] else 0

    def _check(self) -> "tuple[Rule, ...]":
        """The thresholds; raises TrainerError for flags that do not go together."""
        from trainer.cohort import Cohort
        from trainer.measures.operating import Rule
        from trainer.prepare import read_config

        if bool(self.by) != (self.labels is not None):
            missing, given = ("--labels FILE", "--by") if self.by else ("--by COLUMN", "--labels")
            raise TrainerError(f"{given} needs {missing} beside it")
        if twice := [column for column in self.by if self.by.count(column) > 1]:
            raise TrainerError(f"--by {' '.join(self.by)}: {twice[0]} is there twice")
        if self.scores is not None and self.manifests is not None:
            raise TrainerError(f"--manifests {self.manifests} would have no effect: --scores are not made from slides")
        rules = []
        for text in self.threshold:
            try:
                rules.append(Rule.parse(text))
            except ValueError as error:
                raise TrainerError(f"--threshold {text}: {error}") from None
        head = read_config(self.run_folder).head
        cohort = Cohort.read(self.run_folder / "cohort.csv", head=head)
        has_two_answers = head.task == "multilabel" or (head.task == "classes" and len(cohort.classes) == 2)
        if self.threshold != _DEFAULT_THRESHOLD and not has_two_answers:
            what = "numbers" if head.task == "regression" else f"{len(cohort.classes)} classes"
            raise TrainerError(f"--threshold {' '.join(self.threshold)} would have no effect: the run predicts {what}")
        return tuple(rules)

    def _tell(self, found: "Evaluation", rules: "tuple[Rule, ...]") -> None:
        """Tables and notes on stderr."""
        from rich.console import Console

        from trainer.evaluation import tables

        # A log is not as narrow as rich takes it for; names of values may hold brackets or colons.
        width = None if sys.stderr.isatty() else 160
        console = Console(file=sys.stderr, width=width, markup=False, emoji=False)
        for table in tables.build_all(found.result["task"], found.levels, found.subgroups, found.against):
            console.print(_for_screen(table))
        notes = tables.describe(found.result, found.levels, rules) + tables.describe_subgroups(found.subgroups)
        for note in notes:
            console.print(f"note: {note}", highlight=False)


def _for_screen(table: "Table") -> "RichTable":
    from rich import box
    from rich.table import Table as RichTable

    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(table.header):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for row in table.rows:
        shown.add_row(*row)
    return shown
