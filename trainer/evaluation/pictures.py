"""Pictures of an evaluation, PNG bytes: ROC and precision-recall curves, and calibration.

Numbers in, pictures out, in the style of the report's. One question has its band; several share a picture without.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer.evaluation.sections import answers_of, why_not
from trainer.evaluation.units import Floats, Units
from trainer.measures.calibration import calibrate
from trainer.measures.ranking import average_precision, precision_band
from trainer.measures.statistics import auc, roc_band
from trainer.reports.plots import BLUE, GREEN, INK, MUTED, ORANGE, styled_figure

PICTURES = ("roc", "pr", "calibration")
_MAX_CURVES = 9
"""More are no picture; the numbers are in the evaluation's JSON."""
_MAX_MARKS = 500
_MAX_NAME = 24
_BAND: dict[str, Any] = {"color": BLUE, "alpha": 0.2, "linewidth": 0}
_ROC = "false-positive rate (1 − specificity)", "sensitivity"
_PRECISION = "recall (sensitivity)", "precision (positive predictive value)"
_CALIBRATION = "predicted probability", "share of positives"
_GUIDE: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (1, 2))}


class _Question(NamedTuple):
    """What has two answers."""

    name: str
    labels: Floats
    scores: Floats
    clusters: NDArray[np.int64] | None


def draw_all(slides: Units, section: Mapping[str, Any]) -> dict[str, bytes]:
    """Name of the picture, of `PICTURES`, to PNG; none for numbers, or where nothing can be drawn.

    Args:
        slides: what was measured.
        section: what `sections.assess` found.
    """
    if slides.task == "regression":
        return {}
    positions = (1,) if slides.task == "classes" and len(slides.names) == 2 else range(len(slides.names))
    questions = []
    for position in positions:
        labels, scores, known_N = answers_of(slides, position)
        if why_not(labels, scores) is None:
            questions.append(_Question(slides.names[position], labels, scores, slides.clusters(known_N)))
    if not 0 < len(questions) <= _MAX_CURVES:
        return {}
    if len(questions) > 1:
        return {
            "roc": _draw_rocs(questions),
            "pr": _draw_precisions(questions),
            "calibration": _draw_calibrations(questions),
        }
    (one,) = questions
    found = section.get("by_column", {}).get(one.name, section)  # Of columns one may be all that can be drawn.
    return {
        "roc": _draw_roc(one, found),
        "pr": _draw_precision(one, found),
        "calibration": _draw_calibration(one, found["calibration"]),
    }


def _draw_roc(one: _Question, found: Mapping[str, Any]) -> bytes:
    band = roc_band(one.labels, one.scores, clusters=one.clusters)
    with styled_figure(*_ROC) as (figure, axes):
        axes.plot([0, 1], [0, 1], label="chance", **_GUIDE)
        axes.fill_between(band.fpr, band.low, band.high, label="95 % band", **_BAND)
        axes.plot(np.append(0, band.fpr), np.append(0, band.tpr), label=_label("AUC", found, "auc"), **_style(0))
        axes.legend(loc="lower right", reverse=True)
        return _png(figure, axes)


def _draw_precision(one: _Question, found: Mapping[str, Any]) -> bytes:
    curve = precision_band(one.labels, one.scores, clusters=one.clusters)
    with styled_figure(*_PRECISION) as (figure, axes):
        axes.axhline(one.labels.mean(), label="share of positives", **_GUIDE)
        axes.fill_between(curve.recall, curve.low, curve.high, label="95 % band", **_BAND)
        axes.plot(curve.recall, curve.precision, label=_label("AP", found, "average_precision"), **_style(0))
        axes.legend(loc="lower left", reverse=True)
        return _png(figure, axes)


def _draw_calibration(one: _Question, found: Mapping[str, Any]) -> bytes:
    rows = found["reliability"]
    x, y = ([row[name] for row in rows] for name in ("predicted", "observed"))
    bars = np.abs(np.array([row["observed_ci"] for row in rows], np.float64).T - y)
    label = f"Brier {found['brier']:.3f}"
    if found["slope"] is not None:
        label += f"\nslope {found['slope']:.2f}, intercept {found['intercept']:.2f}"
    order = np.random.default_rng(0).permutation(len(one.scores))
    with styled_figure(*_CALIBRATION) as (figure, axes):
        axes.plot([0, 1], [0, 1], label="perfect", **_GUIDE)
        axes.errorbar(x, y, yerr=bars, fmt="o-", color=BLUE, elinewidth=1, capsize=2, label=label)
        for answer, colour, name in ((0, MUTED, "a negative"), (1, ORANGE, "a positive")):
            marks = one.scores[order][one.labels[order] == answer][:_MAX_MARKS]
            place = np.full(len(marks), float(answer))
            axes.plot(marks, place, "|", color=colour, markersize=7, alpha=0.5, clip_on=False, label=name)
        axes.legend(loc="best")
        return _png(figure, axes)


def _draw_rocs(questions: Sequence[_Question]) -> bytes:
    with styled_figure(*_ROC) as (figure, axes):
        axes.plot([0, 1], [0, 1], **_GUIDE)
        for i, one in enumerate(questions):
            band = roc_band(one.labels, one.scores, num_replicates=1)
            label = f"{auc(one.labels, one.scores):.3f} {_short(one.name)}"
            axes.plot(np.append(0, band.fpr), np.append(0, band.tpr), label=label, **_style(i))
        axes.legend(loc="lower right", title="AUC")
        return _png(figure, axes)


def _draw_precisions(questions: Sequence[_Question]) -> bytes:
    with styled_figure(*_PRECISION) as (figure, axes):
        for i, one in enumerate(questions):
            curve = precision_band(one.labels, one.scores, num_replicates=1)
            axes.axhline(one.labels.mean(), **{**_GUIDE, "color": _style(i)["color"]})
            label = f"{average_precision(one.labels, one.scores):.3f} {_short(one.name)}"
            axes.plot(curve.recall, curve.precision, label=label, **_style(i))
        axes.legend(loc="lower left", title="average precision (dotted: share of positives)")
        return _png(figure, axes)


def _draw_calibrations(questions: Sequence[_Question]) -> bytes:
    with styled_figure(*_CALIBRATION) as (figure, axes):
        axes.plot([0, 1], [0, 1], **_GUIDE)
        for i, one in enumerate(questions):
            found = calibrate(one.labels, one.scores)
            x, y = [bin.predicted for bin in found.bins], [bin.observed.value for bin in found.bins]
            axes.plot(x, y, marker="o", label=f"{found.brier:.3f} {_short(one.name)}", **_style(i))
        axes.legend(loc="upper left", title="Brier score")
        return _png(figure, axes)


def _label(name: str, found: Mapping[str, Any], measure: str) -> str:
    low, high = found[f"{measure}_ci"]
    return f"{name} {found[measure]:.3f}" + ("" if low is None else f" ({low:.3f}–{high:.3f})")


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


def _style(i: int) -> dict[str, Any]:
    return {"color": (BLUE, ORANGE, GREEN)[i % 3], "linestyle": ("-", "--", ":")[i // 3 % 3], "linewidth": 2}


def _png(figure: Figure, axes: Axes) -> bytes:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.tick_params(labelcolor=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
