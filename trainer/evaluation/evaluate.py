"""One evaluation, from a run's folder to its files: everything is checked first, then slides are scored and measured.

One thing to know before changing it: scoring takes hours, so whatever can be refused is refused before it, and what was
scored is kept whatever happens after.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manifests.files import atomic_path, write_text
from tiler.progress import Counter
from trainer.cohort import Cohort
from trainer.errors import TrainerError
from trainer.evaluation.against import Other, compare, open_other
from trainer.evaluation.given import is_outdated, kept_scores, read_given, refuse_missing
from trainer.evaluation.pictures import PICTURES, draw_all
from trainer.evaluation.sections import answers_of, assess
from trainer.evaluation.subgroups import Values, compare_subgroups, read_values, subgroups_csv
from trainer.evaluation.units import Floats, Pool, Units, at_level, levels_of, units_of
from trainer.measures.merits import measure_all
from trainer.measures.operating import Rule
from trainer.measures.resampling import NUM_REPLICATES
from trainer.outcome import keep_scores, score_anew
from trainer.prepare import open_run, read_config
from trainer.reports.report import write_report
from trainer.scoring import Tick, write_result


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked, as the flags of `slidegrad evaluate` say it."""

    run: Path
    split: str = "test"
    manifests: Path | None = None
    pool: Pool = "mean"
    rules: tuple[Rule, ...] = ()
    by: tuple[str, ...] = ()
    labels: Path | None = None
    against: Path | None = None
    scores: Path | None = None

    @property
    def is_own(self) -> bool:
        """The scores are the run's own, read or made anew."""
        return self.scores is None or self.scores.resolve() == (self.run / "scores.parquet").resolve()

    @property
    def name(self) -> str:
        """Of the files: what is found for given scores does not replace what is known of the run's own."""
        return self.split if self.is_own else f"{self.split}_given"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found."""

    result: dict[str, Any]
    """As the command prints it."""
    levels: dict[str, Any]
    """Level to its section, as in the file."""
    subgroups: list[dict[str, Any]]
    against: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """What could be read before anything was scored."""

    request: Request
    cohort: Cohort
    values: Values
    other: Other | None
    given: dict[str, Floats] | None


def evaluate(request: Request, tick: Tick) -> Evaluation:
    """Checks, scores, measures, and writes `RUN/evaluation/`.

    Raises:
        TrainerError: whatever cannot be evaluated; before anything is scored, where that can be known.
    """
    checked = _check(request)
    cohort = checked.cohort
    if checked.given is not None:
        scores, result = checked.given, _result_of_given(checked)
    else:
        result = score_anew(open_run(request.run, request.manifests), request.split, tick)
        scores = kept_scores(request.run, request.split, cohort.task) or {}
    slides = units_of(scores, cohort, request.split)
    _refuse_one_answer(slides, f"{request.run}: the {len(slides.ids)} slides of {request.split} that could be scored")
    validation, val_skipped = _validation(checked, tick)
    found = _measure(checked, slides, validation, result)
    found.result["val_skipped"] = val_skipped
    if request.scores is None:
        write_result(request.run, found.result)
    if request.is_own and (request.run / "report.html").is_file():  # It shows what was found.
        write_report(request.run)
    return found


def _check(request: Request) -> _Checked:
    run, split = request.run, request.split
    head = read_config(run).head
    cohort = Cohort.read(run / "cohort.csv", head=head)
    whole = {case.slide_id: np.full(len(cohort.outputs), 0.5) for case in cohort.cases}
    if not cohort.of(split):
        raise TrainerError(f"{run}: no slides in the split {split!r}")
    _refuse_one_answer(units_of(whole, cohort, split), f"{run}: the {len(cohort.of(split))} slides of {split}")
    if chosen := [rule.text for rule in request.rules if rule.is_chosen]:
        what = f"--threshold {chosen[0]} is chosen on validation slides"
        if not cohort.of("val"):
            raise TrainerError(f"{what}, and the run has none; give a number")
        _refuse_one_answer(units_of(whole, cohort, "val"), f"{what}, and these", "give a number")
    values: Values = {}
    if request.labels is not None:
        values = read_values(request.labels, request.by, cohort, head, split)
    if request.against is not None and request.is_own and request.against.resolve() == run.resolve():
        raise TrainerError(f"--against {request.against}: the run itself; give another, or other scores as --scores")
    other = open_other(request.against, cohort, split) if request.against is not None else None
    given = None
    if request.scores is not None:
        if request.is_own and is_outdated(run, split):
            raise TrainerError(f"--scores {request.scores}: of an older checkpoint; score anew, without --scores")
        given = read_given(request.scores, cohort)
        refuse_missing(request.scores, given, cohort, split)
        if chosen and split != "val":
            refuse_missing(request.scores, given, cohort, "val", f", where --threshold {chosen[0]} is chosen")
    return _Checked(request=request, cohort=cohort, values=values, other=other, given=given)


def _refuse_one_answer(units: Units, what: str, instead: str = "give another --split") -> None:
    """Raises TrainerError where no question has two answers among the units."""
    if units.task == "classes":
        present = np.unique(units.labels_N)
        if len(present) < 2:
            named = units.names[present[0]] if len(present) else "none"
            raise TrainerError(f"{what} are of one class ({named}), which nothing can be told apart from; {instead}")
        return
    known = [answers_of(units, position)[0] for position in range(len(units.names))]
    if all(len(np.unique(truth)) < 2 for truth in known):
        raise TrainerError(f"{what} have one value in {' and in '.join(units.names)}: nothing to tell apart; {instead}")


def _result_of_given(checked: _Checked) -> dict[str, Any]:
    """What a scored run's result has, as far as scores alone tell it."""
    assert checked.given is not None, "scores were given"
    request, cohort = checked.request, checked.cohort
    slides = units_of(checked.given, cohort, request.split)
    measured = measure_all(cohort.task, cohort.outputs, slides.truth_NT, slides.found_NC, slides.patients)
    return {
        **measured,
        "num_slides": len(slides.ids),
        "split": request.split,
        "num_skipped": 0,
        "skipped": [],
        "task": cohort.task,
        **({"classes": list(cohort.classes)} if cohort.task == "classes" else {"columns": list(cohort.columns)}),
        "run": str(request.run),
    }


def _validation(checked: _Checked, tick: Tick) -> tuple[Units | None, list[str]]:
    """The validation slides, if a threshold is chosen on them, and why some of them could not be scored."""
    request, cohort = checked.request, checked.cohort
    if not any(rule.is_chosen for rule in request.rules):
        return None, []
    scores, skipped = checked.given, list[str]()
    if scores is None:
        scores = kept_scores(request.run, "val", cohort.task)
    if scores is None:
        skipped = keep_scores(open_run(request.run, request.manifests), "val", tick)
        scores = kept_scores(request.run, "val", cohort.task) or {}
    return units_of(scores, cohort, "val"), skipped


def _measure(checked: _Checked, slides: Units, validation: Units | None, result: dict[str, Any]) -> Evaluation:
    """Measures everything, writes the files, and adds to the result what it prints of them."""
    request, cohort = checked.request, checked.cohort
    all_units = levels_of(slides, cohort.of(request.split), request.pool)
    sections: dict[str, Any] = {}
    subgroups: list[dict[str, Any]] = []
    against = None
    with Counter("measuring") as counter:
        counter.start(len(all_units) + len(checked.values) + (checked.other is not None) + 1)
        for units in all_units:
            chosen_on = None
            if validation is not None:
                chosen_on = at_level(validation, cohort.of("val"), units.level, request.pool)
            sections[units.level] = assess(units, request.rules, chosen_on)
            counter.advance(f" {units.level}")
        for column, of_slide in checked.values.items():
            subgroups += compare_subgroups(slides, {column: of_slide})
            counter.advance(f" by {column}")
        if checked.other is not None:
            against = compare(slides, checked.other, cohort, request.split, request.pool)
            counter.advance(" the other run")
        pictures = draw_all(slides, sections["slides"])
        counter.advance(" pictures")
    result |= {
        "scores": "run" if request.is_own else "given",
        "pool": request.pool,
        "levels": {level: _brief(section) for level, section in sections.items()},
        **({"against": against} if against else {}),
        "evaluation": str(request.run / "evaluation" / f"{request.name}.json"),
    }
    about = {name: result[name] for name in ("split", "task", "scores", "pool", "num_slides", "num_skipped")}
    content = {
        **about,
        "names": list(cohort.outputs),
        "best_epoch": result.get("best_epoch"),
        "num_replicates": NUM_REPLICATES,
        "confidence": 0.95,
        "levels": sections,
        "subgroups": subgroups,
        "against": against,
    }
    _write(request, content, subgroups, pictures)
    return Evaluation(result=result, levels=sections, subgroups=subgroups, against=against)


def _write(
    request: Request, content: dict[str, Any], subgroups: list[dict[str, Any]], pictures: Mapping[str, bytes]
) -> None:
    """Replaces the last evaluation of the same name, whole: files that this one does not have go."""
    folder, name = request.run / "evaluation", request.name
    if subgroups:
        write_text(folder / f"{name}_subgroups.csv", subgroups_csv(subgroups))
    else:
        (folder / f"{name}_subgroups.csv").unlink(missing_ok=True)
    for kind in PICTURES:
        file = folder / f"{name}_{kind}.png"
        if kind not in pictures:
            file.unlink(missing_ok=True)
            continue
        with atomic_path(file) as partial:
            partial.write_bytes(pictures[kind])
    files = [f"{name}_{kind}.png" for kind in pictures] + ([f"{name}_subgroups.csv"] if subgroups else [])
    text = json.dumps({**content, "files": files}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / f"{name}.json", text)


def _brief(section: Any) -> Any:
    """Without the tables that are for the file alone."""
    if not isinstance(section, dict):
        return section
    return {name: _brief(value) for name, value in section.items() if name not in ("reliability", "confusion")}
