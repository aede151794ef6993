"""What rows say together: settings in order, pairs by split, trends; and the tables they become."""

import csv
import io
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from trainer.sweep.results import EpochRow, Row
from trainer.sweep.statistics import paired_difference
from trainer.sweep.summary import Series, curves_by_k, summarise
from trainer.sweep.tables import (
    comparison_table,
    main_csv,
    main_table,
    series_names,
    to_markdown,
    to_result,
    trend_sentences,
    trend_table,
)

E2E, FROZEN = Series("end_to_end", "float32", 1), Series("frozen_gma", "float32", 1)


def row(method: str, k: int | None, split: int, test: float | None, **more: Any) -> Row:
    known: dict[str, Any] = {
        "state": "done",
        "val_best": None if test is None else test + 0.05,
        "final_train_loss": 0.5,
    }
    known |= {"num_train": 80, "num_val": 16, "num_test": 24, "precision": "float32", "nproc": 1, "test": test}
    tiles = "own" if k is None else "fixed"
    return Row(run=f"{method} {k} {split}", method=method, k=k, tiles=tiles, split=f"s{split:03d}", **(known | more))


def test_methods_are_compared_split_by_split() -> None:
    """Splits differ by more than methods; one split is not done on one side, one on the other."""
    ours = {0: 0.60, 1: 0.71, 2: 0.83, 3: 0.90}
    theirs = {0: 0.62, 1: 0.72, 2: 0.84, 4: 0.10}
    rows = [row("frozen_gma", 50, split, auc) for split, auc in ours.items()]
    rows += [row("end_to_end", 50, split, auc) for split, auc in theirs.items()]
    rows += [row("end_to_end", 50, 3, None, state="failed"), row("frozen_gma", 50, 4, 0.99, state="begun")]
    summary = summarise(rows)
    assert summary.reference == "end_to_end"
    (found,) = summary.comparisons
    assert found.test == paired_difference([0.60, 0.71, 0.83], [0.62, 0.72, 0.84], [0.3] * 3)
    assert found.val == paired_difference([0.65, 0.76, 0.88], [0.67, 0.77, 0.89], [0.2] * 3)
    frozen, end_to_end = (line for line in summary.lines)
    assert frozen.test.mean == pytest.approx(np.mean([0.60, 0.71, 0.83, 0.90]))
    assert frozen.test.std == pytest.approx(np.std([0.60, 0.71, 0.83, 0.90], ddof=1))
    assert (frozen.num_done, frozen.num_runs) == (4, 5)
    assert end_to_end.num_done == 4


def test_a_method_without_k_is_compared_with_the_largest_k() -> None:
    rows = [row("end_to_end", k, split, 0.7 + k / 1e4) for k in (50, 350) for split in range(3)]
    rows += [row("max_pool", None, split, 0.6) for split in range(3)]
    summary = summarise(rows)
    (found,) = summary.comparisons
    assert found.against.k == 350
    assert found.test.mean == pytest.approx(-0.135)
    table = comparison_table(summary, "auc")
    assert table is not None
    assert table.rows[0][:2] == ("max-pool MIL (reference: K 350)", "its own")
    # The other way round each K is compared with the one that has none.
    assert [c.test.mean for c in summarise(rows, "max_pool").comparisons] == pytest.approx([0.105, 0.135])


def test_settings_come_by_method_precision_processes_and_k() -> None:
    rows = [
        row(method, k, 0, 0.7, precision=precision)
        for method in ("frozen_gma", "end_to_end")
        for k in (2100, 50, 350)
        for precision in ("float32", "bf16")
    ]
    order = [(s.series.method, s.series.precision, s.k) for s in (line.setting for line in summarise(rows).lines)]
    methods = ("frozen_gma", "end_to_end")
    assert order == [(m, p, k) for m in methods for p in ("float32", "bf16") for k in (50, 350, 2100)]


def test_trends_over_k() -> None:
    losses = {50: 0.7, 100: 0.6, 350: 0.65, 700: 0.3}
    rows = [
        row(
            "end_to_end",
            k,
            split,
            0.7 + 0.1 * (k == 700) + 0.01 * split * (k == 50),
            final_train_loss=loss + split / 100,
        )
        for k, loss in losses.items()
        for split in range(4)
    ]
    (trend,) = summarise(rows).trends
    assert trend.ks == (50, 100, 350, 700)
    assert trend.loss_rho == pytest.approx(stats.spearmanr(list(losses), list(losses.values())).statistic)
    assert trend.test.mean == pytest.approx(0.1 - 0.015)
    summary = summarise(rows)
    (sentence,) = trend_sentences(summary, "auc")
    assert sentence.startswith(
        "end to end: the mean final training loss falls with K, not at every step (Spearman's rho −0.80 over 4 K)"
    )
    assert "test AUC at K 700 less at K 50: +0.085 (95 % interval +0.0" in sentence
    assert sentence.endswith("rises.")
    (told,) = to_result(summary, "auc")["trends"]
    assert told["verdict"] == "rises"
    assert told["loss_rho"] == pytest.approx(-0.8)
    assert told["test_auc"]["num_splits"] == 4
    # One K is no trend.
    assert summarise(rows[:4]).trends == []
    assert trend_table(summarise(rows[:4]), "auc") is None


def test_a_fall_is_told() -> None:
    rows = [
        row("end_to_end", k, split, 0.7 - k / 1e4 + 0.001 * split * (k > 50)) for k in (50, 350) for split in range(5)
    ]
    assert trend_sentences(summarise(rows), "auc")[0].endswith("falls.")
    rows = [row("end_to_end", k, 0, 0.7) for k in (50, 350)]
    assert trend_sentences(summarise(rows), "auc")[0].endswith("one split, no interval.")


def test_tables_name_both_measures_and_only_axes_that_differ() -> None:
    rows = [row(method, 50, split, 0.7 + split / 10) for method in ("end_to_end", "frozen_gma") for split in range(3)]
    summary = summarise(rows)
    table = main_table(summary, "auc")
    assert table.header == ("Method", "Runs", "Best validation AUC", "Test AUC", "Final training loss")
    assert table.rows[0] == ("end to end", "3", "0.850 (0.100)", "0.800 (0.100)", "0.500 (0.000)")
    assert main_table(summary, "r2").header[2:4] == ("Best validation R²", "Test R²")
    text = to_markdown([table], ["One note."])
    assert "| end to end | 3 | 0.850 (0.100) | 0.800 (0.100) | 0.500 (0.000) |" in text
    assert text.endswith("\n\n- One note.\n")
    records = list(csv.DictReader(io.StringIO(main_csv(summary, "auc"))))
    assert [record["method"] for record in records] == ["end_to_end", "frozen_gma"]
    assert float(records[0]["test_auc_mean"]) == pytest.approx(0.8)
    assert records[0]["test_auc_difference_mean"] == ""
    assert float(records[1]["test_auc_difference_mean"]) == 0
    assert comparison_table(summarise(rows[:3]), "auc") is None


def test_nothing_done_is_dashes() -> None:
    rows = [
        row(method, k, 0, None, state="open", final_train_loss=None)
        for method in ("end_to_end", "x")
        for k in (50, 350)
    ]
    summary = summarise(rows)
    assert main_table(summary, "auc").rows[0] == ("end to end", "50", "0 of 1", "–", "–", "–")
    assert summary.trends == []
    assert to_result(summary, "auc")["differences"][0]["test_auc"]["mean"] is None


def test_series_are_called_by_what_tells_them_apart() -> None:
    assert series_names([E2E, FROZEN]) == {E2E: "end to end", FROZEN: "frozen encoder, GMA"}
    parallel = E2E._replace(nproc=3)
    assert series_names([E2E, parallel]) == {E2E: "end to end, 1 process", parallel: "end to end, 3 processes"}


def test_curves_are_lined_up_by_epoch() -> None:
    axes: dict[str, Any] = {"method": "end_to_end", "tiles": "fixed", "precision": "float32", "nproc": 1, "split": ""}
    lines = [EpochRow(run="b", k=350, epoch=e, train_loss=loss, **axes) for e, loss in ((0, 0.9), (1, None), (2, 0.7))]
    lines += [
        EpochRow(run="a", k=50, epoch=0, train_loss=0.8, **axes),
        EpochRow(run="c", k=350, epoch=0, train_loss=0.6, **axes),
    ]
    curves = curves_by_k(lines, E2E)
    assert [setting.k for setting in curves] == [50, 350]
    nan = math.nan
    np.testing.assert_array_equal(list(curves.values())[1], [[0.9, nan, 0.7], [0.6, nan, nan]])
