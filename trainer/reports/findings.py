"""What a split's scores show, by task, for the report: figures, tables, the slides to look at, and warnings.

Scores in, plain values and SVG out; the layout is in `report.html`. Classes and columns of yes and no are the same
thing here: questions with two answers (`Question`). One thing to know before changing it: nothing here decides what
counts; the headline is `result.json`'s.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.measures.agreement import bootstrap_r2, mean_error, r2, spearman
from trainer.measures.resampling import clusters_of
from trainer.measures.statistics import Interval, auc, bootstrap_auc, roc_band
from trainer.reports import plots
from trainer.reports.runlog import Scores

_FEW_SLIDES = 20
"""Below this many slides of a class the report warns that the interval itself is uncertain."""
_MAX_PICTURES = 6
"""More ROC curves, or scatter plots, than this are no picture; the table has them all."""
_NUM_LISTED = 5
_NUMBERS_HEADER = ("Column", "Slides", "R²", "95 % interval", "Mean error", "Rank correlation")
_NO_SCORES = "No scores in this run's folder yet; they are written by slidegrad evaluate."


class Figure(NamedTuple):
    """One figure: an SVG, or why there is none."""

    title: str
    svg: str = ""
    missing: str = ""
    caption: str = ""


class Table(NamedTuple):
    """One table; its first column is text, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with two answers, and the slides of which the true one is known."""

    name: str
    answers: tuple[str, str]
    """What slides of label 0 and of label 1 are called."""
    slide_ids: list[str]
    labels: NDArray[np.int64]
    """0 or 1, (n,)."""
    scores: NDArray[np.float64]
    """Probability of 1, (n,)."""
    clusters: NDArray[np.int64] | None
    """The patient of each slide, (n,); None where each has one slide."""

    @property
    def counts(self) -> tuple[int, int]:
        """Slides of label 0 and of label 1."""
        num_negative, num_positive = np.bincount(self.labels, minlength=2).tolist()
        return num_negative, num_positive


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the report shows of the scores."""

    measure: str
    """Over the headline, as "AUC, mean over columns"."""
    counts: str
    """Beside the number of slides."""
    figures: list[Figure]
    tables: list[Table] = field(default_factory=list)
    surprises: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_all(scores: Scores | None, task: str) -> Findings:
    """What the scores of a run of this task show; what would be there, where there are none yet."""
    if scores is None:
        if task == "regression":
            return Findings(measure="R²", counts="", figures=[Figure("Predicted against true", missing=_NO_SCORES)])
        titles = ("ROC curve", "Scores by class")
        return Findings(measure="AUC", counts="", figures=[Figure(title, missing=_NO_SCORES) for title in titles])
    return _of_numbers(scores) if scores.task == "regression" else _of_questions(scores, questions_of(scores))


def questions_of(scores: Scores) -> list[Question]:
    """Each column; of two classes whether it is the second; of more, each class against the rest."""
    questions = []
    if scores.task == "multilabel":
        for name, truth, probs in zip(scores.names, scores.targets.T, scores.predictions.T, strict=True):
            known = np.flatnonzero(~np.isnan(truth))
            questions.append(
                Question(
                    name=name,
                    answers=(f"{name} = 0", f"{name} = 1"),
                    slide_ids=[scores.slide_ids[i] for i in known],
                    labels=truth[known].astype(np.int64),
                    scores=probs[known],
                    clusters=clusters_of([scores.patients[i] for i in known]),
                )
            )
        return questions
    is_binary = len(scores.names) == 2
    for position in (1,) if is_binary else range(len(scores.names)):
        name = scores.names[position]
        questions.append(
            Question(
                name=name,
                answers=(scores.names[0] if is_binary else "the rest", name),
                slide_ids=scores.slide_ids,
                labels=(scores.targets[:, 0] == position).astype(np.int64),
                scores=scores.predictions[:, position],
                clusters=clusters_of(scores.patients),
            )
        )
    return questions


def decimals(value: float | None, digits: int = 3) -> str:
    """The number, or a dash where there is none."""
    return f"{value:,.{digits}f}" if value is not None and math.isfinite(value) else "–"


def significant(value: float) -> str:
    """A number of whatever unit, to four digits."""
    return f"{value:,.4g}" if math.isfinite(value) else "–"


def _of_questions(scores: Scores, questions: list[Question]) -> Findings:
    notes = _warn_of_questions(scores, questions)
    if len(questions) == 1:
        (question,) = questions
        (num_negative, num_positive), (negative, positive) = question.counts, question.answers
        return Findings(
            measure="AUC",
            counts=f"{num_positive} {positive}, {num_negative} {negative}",
            figures=_figures_of_question(question),
            surprises=_surprises_of_question(question),
            notes=notes,
        )
    kind = "columns" if scores.task == "multilabel" else "classes"
    return Findings(
        measure=f"AUC, mean over {kind}",
        counts=f"{len(questions)} {kind}",
        figures=_figures_of_questions(questions),
        tables=[_table_of_questions(questions, kind)],
        notes=notes,
    )


def _table_of_questions(questions: list[Question], kind: str) -> Table:
    is_class = kind == "classes"
    rows: list[tuple[str, ...]] = []
    for question in questions:
        num_negative, num_positive = map(str, question.counts)
        counts = (num_positive,) if is_class else (num_positive, num_negative)
        value = auc(question.labels, question.scores)
        interval = bootstrap_auc(question.labels, question.scores, clusters=question.clusters)
        rows.append((question.name, *counts, decimals(value), _range(interval)))
    header = ("Class", "Slides") if is_class else ("Column", "Slides with 1", "Slides with 0")
    title = "Each class against the rest" if is_class else "Each column"
    return Table(title, (*header, "AUC", "95 % interval"), rows)


def _figures_of_question(question: Question) -> list[Figure]:
    labels, found, clusters = question.labels, question.scores, question.clusters
    is_drawn = not np.isnan(found).any()
    roc = ""
    if is_drawn and min(question.counts):
        interval = bootstrap_auc(labels, found, clusters=clusters)
        roc = plots.roc(roc_band(labels, found, clusters=clusters), auc(labels, found), interval)
    return [
        Figure(
            "ROC curve",
            roc,
            "Scores of one class only, or scores that are not numbers: there is no ROC curve.",
            "Shaded: pointwise 95 % band of the sensitivity, from the same bootstrap as the interval.",
        ),
        Figure(
            "Scores by class",
            plots.score_distribution(labels, found, names=question.answers) if is_drawn else "",
            "Scores that are not numbers cannot be drawn.",
            "Each dot is a slide; bars count slides, scaled within the class; the upright line is the median.",
        ),
    ]


def _figures_of_questions(questions: list[Question]) -> list[Figure]:
    """All ROC curves in one picture, where they are not too many."""
    curves = {}
    for question in questions:
        if math.isfinite(value := auc(question.labels, question.scores)):
            curves[question.name] = roc_band(question.labels, question.scores, num_replicates=1), value
    return [Figure("ROC curves", plots.rocs(curves))] if 0 < len(curves) <= _MAX_PICTURES else []


def _surprises_of_question(question: Question) -> list[Table]:
    """The positives with the lowest scores, the negatives with the highest."""
    order, (negative, positive) = np.argsort(question.scores, kind="stable"), question.answers
    missed = [i for i in order if question.labels[i] == 1][:_NUM_LISTED]
    feared = [i for i in order[::-1] if question.labels[i] == 0][:_NUM_LISTED]
    return [
        Table(title, ("Slide", "Score"), [(question.slide_ids[i], decimals(question.scores[i])) for i in listed])
        for title, listed in (
            (f"Lowest scores of {positive} slides", missed),
            (f"Highest scores of {negative} slides", feared),
        )
    ]


def _warn_of_questions(scores: Scores, questions: list[Question]) -> list[str]:
    sides = [(n, q.name) for q in questions for n in q.counts if n]
    notes = []
    if sides and min(sides)[0] < _FEW_SLIDES:
        fewest, name = min(sides)
        of_column = f" of {name}" if scores.task == "multilabel" else ""
        notes.append(
            f"The smallest class{of_column} has {fewest} slides; with so few the interval itself is uncertain."
        )
    if parted := [question.name for question in questions if auc(question.labels, question.scores) == 1]:
        what = "the classes" if len(questions) == 1 else ", ".join(parted)
        notes.append(f"The scores separate {what} wholly: the interval is a point, on new slides it would not be.")
    return notes


def _of_numbers(scores: Scores) -> Findings:
    figures, scarce = [], []
    rows: list[tuple[str, ...]] = []
    for name, truth, predicted in zip(scores.names, scores.targets.T, scores.predictions.T, strict=True):
        known = ~np.isnan(truth)
        truth, predicted = truth[known], predicted[known]
        error, correlation = significant(mean_error(truth, predicted)), decimals(spearman(truth, predicted))
        patients = [patient for patient, is_known in zip(scores.patients, known, strict=True) if is_known]
        interval = _range(bootstrap_r2(truth, predicted, clusters=clusters_of(patients)))
        rows.append((name, str(len(truth)), decimals(r2(truth, predicted)), interval, error, correlation))
        if len(scores.names) <= _MAX_PICTURES:
            is_drawn = len(truth) and np.isfinite(predicted).all()
            picture = plots.scatter(truth, predicted, name=name) if is_drawn else ""
            caption = "Each dot is a slide; on the line the prediction is the truth."
            figures.append(Figure(f"{name}: predicted and true", picture, "No numbers to draw.", caption))
        if len(truth) < _FEW_SLIDES:
            scarce.append(f"{name} is known of {len(truth)}")
    is_one = len(rows) == 1
    return Findings(
        measure="R²" if is_one else "R², mean over columns",
        counts=f"mean error {rows[0][4]}, rank correlation {rows[0][5]}" if is_one else f"{len(rows)} columns",
        figures=figures,
        tables=[] if is_one else [Table("Each column", _NUMBERS_HEADER, rows)],  # The headline has one's.
        surprises=_surprises_of_numbers(scores),
        notes=[f"Few slides: {', '.join(scarce)}; then the interval itself is uncertain."] if scarce else [],
    )


def _surprises_of_numbers(scores: Scores) -> list[Table]:
    """The largest errors of the first column, either way."""
    name, truth, predicted = scores.names[0], scores.targets[:, 0], scores.predictions[:, 0]
    error = predicted - truth
    order = np.argsort(error, kind="stable")  # NaN comes last.
    low = [i for i in order if error[i] < 0][:_NUM_LISTED]
    high = [i for i in order[::-1] if error[i] > 0][:_NUM_LISTED]
    return [
        Table(
            f"{name}: most {way}",
            ("Slide", "True", "Predicted"),
            [(scores.slide_ids[i], significant(truth[i]), significant(predicted[i])) for i in listed],
        )
        for way, listed in (("underestimated", low), ("overestimated", high))
    ]


def _range(interval: Interval) -> str:
    return f"{decimals(interval.low)} to {decimals(interval.high)}" if math.isfinite(interval.low) else decimals(None)
