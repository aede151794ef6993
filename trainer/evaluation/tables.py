"""An evaluation for people: tables and sentences, for the screen and for the run's report.

Made from what the file `RUN/evaluation/SPLIT.json` holds, and from nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tiler.doctor.words import count
from trainer.measures.operating import Rule
from trainer.reports.findings import Table
from trainer.targets import Task

_MAX_ROWS = 30
"""Of a table of subgroups; the CSV has them all."""
_RATES = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV"}
_NUMBERS = {"r2": "R²", "mae": "mean error", "spearman": "rank correlation"}
Section = Mapping[str, Any]


def build_all(
    task: Task, levels: Mapping[str, Section], subgroups: Sequence[Section], against: Section | None
) -> list[Table]:
    """All that there is of an evaluation."""
    tables = build_tables(task, levels)
    if subgroups:
        tables.append(build_subgroups(subgroups))
    if against:
        tables.append(build_comparison(against))
    return tables


def build_tables(task: Task, levels: Mapping[str, Section]) -> list[Table]:
    """One table of measures, a column for each level; for tasks of two answers one of thresholds."""
    by_level = {level: _questions(section) for level, section in levels.items()}
    names = list(next(iter(by_level.values())))
    measures = Table("Measures", ("", *(f"{level} ({section['num']:,})" for level, section in levels.items())), [])
    for name in names:
        sections = [found[name] for found in by_level.values()]
        prefix = f"{name} " if name else ""
        for label, cells in _rows(sections, task):
            measures.rows.append((prefix + label, *cells))
    if task == "classes" and not names[0]:
        for label, key in (("balanced accuracy", "balanced_accuracy"), ("Brier score", "brier")):
            if all(key in section for section in levels.values()):
                measures.rows.append((label, *(_number(section[key]) for section in levels.values())))
    tables = [measures]
    thresholds = Table("Thresholds", ("called positive from", "of", *_RATES.values()), [])
    for level, found in by_level.items():
        for name, section in found.items():
            for one in section.get("thresholds", ()):
                rule = one["rule"] if one["chosen_on"] is None else f"{one['rule']}: {_number(one['threshold'])}"
                cells = [_share(one[rate]) for rate in _RATES] if "sensitivity" in one else [one["reason"], "", "", ""]
                thresholds.rows.append((rule, f"{level} {name}".rstrip(), *cells))
    return [*tables, thresholds] if thresholds.rows else tables


def build_subgroups(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Subgroups, as many as a screen holds."""
    measure = "R²" if rows and rows[0]["measure"] == "r2" else "AUC"
    table = Table("Subgroups", ("column", "value", "of", "slides", "positive", measure), [])
    for row in rows[:_MAX_ROWS]:
        found = ", ".join(filter(None, [_interval(row["estimate"], [row["low"], row["high"]]), row["reason"]]))
        positive = "" if row["num_positive"] is None else f"{row['num_positive']:,}"
        table.rows.append((row["column"], row["value"], row["of"], f"{row['num_slides']:,}", positive, found))
    return table


def describe_subgroups(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table does not show."""
    return [f"{len(rows) - _MAX_ROWS:,} more rows are in the CSV"] if len(rows) > _MAX_ROWS else []


def build_comparison(against: Mapping[str, Any]) -> Table:
    """This run beside the other."""
    header = ("", "this run", "the other", "difference (bootstrap)", "DeLong")
    table = Table("Beside another run", header, [])
    for level, section in against.items():
        if not isinstance(section, Mapping):
            continue
        parts = {"": section} if "difference" in section else {}
        for name, part in {**parts, **section.get("by_class", {}), **section.get("by_column", {})}.items():
            measure = "r2" if "r2" in part else "auc"
            delong = part.get("delong")
            tested = "" if delong is None or delong["p"] is None else f"{_range(delong['ci'])}, p = {delong['p']:.3g}"
            table.rows.append(
                (
                    f"{level} ({section['num']:,}) {name}".rstrip(),
                    _number(part[measure]),
                    _number(part[f"{measure}_other"]),
                    part["reason"] or _interval(part["difference"], part["difference_ci"]),
                    tested,
                )
            )
    return table


def describe(result: Section, levels: Mapping[str, Section], rules: Sequence[Rule]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    slides, split, notes = levels["slides"], result["split"], []
    higher = {"classes": "the higher class", "multilabel": "yes", "regression": f"their {result['pool']}"}[
        result["task"]
    ]
    if slides["num_patients"] < slides["num"]:
        notes.append(
            f"{count(slides['num'], 'slide')} of {count(slides['num_patients'], 'patient')}: bootstrap intervals draw "
            "patients; DeLong's and Wilson's take slides as independent, so trust theirs for patients"
        )
    for level, section in levels.items():
        if num := section.get("num_differing"):
            what = "are left out" if section["num_left_out"] else f"count as {higher}"
            notes.append(f"{num:,} {level} have slides of different labels: they {what}")
    if split != "test":
        notes.append(f"these are {split} slides, which took part in making the model: expect less on new ones")
    if split == "val" and any(rule.is_chosen for rule in rules):
        notes.append("thresholds were chosen on these same slides: what is told of them is too good")
    return notes


def _questions(section: Section) -> dict[str, Section]:
    """Name to what is measured under it; "" where there is one question only."""
    if "by_class" in section:
        return {"": section, **section["by_class"]}
    columns: dict[str, Section] = section.get("by_column", {"": section})
    return columns


def _rows(sections: Sequence[Section], task: Task) -> list[tuple[str, list[str]]]:
    """Label and a cell for each level."""
    if task == "regression":
        return [
            (label, [_interval(section[key], section[f"{key}_ci"]) for section in sections])
            for key, label in _NUMBERS.items()
        ]
    rows = [
        ("AUC", [_interval(section["auc"], section["auc_ci"]) or section.get("reason") or "–" for section in sections])
    ]
    if "auc_ci_delong" in sections[0]:
        rows.append(("AUC, DeLong", [_range(section["auc_ci_delong"]) for section in sections]))
        average = [_interval(section["average_precision"], section["average_precision_ci"]) for section in sections]
        rows.append(("average precision", average))
        told = [section["calibration"] or {} for section in sections]
        rows.append(("Brier score", [_number(found.get("brier")) for found in told]))
        rows.append(
            (
                "calibration slope, intercept",
                [f"{_number(found.get('slope'))}, {_number(found.get('intercept'))}" for found in told],
            )
        )
        rows.append(("expected calibration error", [_number(found.get("expected_error")) for found in told]))
    return rows


def _share(found: Mapping[str, Any]) -> str:
    if not found["of"]:
        return "none"
    return f"{found['value']:.3f} ({_range(found['ci'])}) {found['num']}/{found['of']}"


def _interval(value: float | None, ends: Sequence[float | None]) -> str:
    if value is None:
        return ""
    return f"{_number(value)} ({_range(ends)})" if ends[0] is not None else _number(value)


def _range(ends: Sequence[float | None]) -> str:
    return "–" if ends[0] is None else f"{_number(ends[0])} to {_number(ends[1])}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.4g}"
