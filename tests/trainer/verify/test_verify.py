"""Gradient equivalence on gloo, over some optimiser steps, and that each way of being wrong is noticed."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from rich.console import Console

from tests.conftest import Ended
from trainer.cli import Verify
from trainer.errors import TrainerError
from trainer.verify import comparison
from trainer.verify.cases import Case, Fault, build_halves
from trainer.verify.comparison import plan_cases, verify
from trainer.verify.errors import LIMITS, Result, Trace, compare, merge
from trainer.verify.plot import plot_errors
from trainer.verify.single import as_single, named_state, run_single
from trainer.verify.table import build_table, describe_limits, summarise

CASE = Case(encoder="conv", dtype="float32", num_tiles=(23, 2, 9), num_steps=1, num_ranks=1, num_virtual=1)


def plan(**given: Any) -> list[Case]:
    """A small grid: slides of 23, 2 and 9 tiles, on 2 encoder ranks, in 1 and 2 groups, but for what is given."""
    usual: dict[str, Any] = {
        "encoders": ["conv"],
        "aggregators": ["gma"],
        "dtypes": ["float64", "float32"],
        "ranks": [2],
        "virtual_ranks": [1, 3],
        "groups": [1, 2],
        "num_tiles": [23, 2, 9],
        "num_steps": 2,
    }
    return plan_cases(**(usual | given))


@pytest.mark.slow
def test_ranks_virtual_ranks_and_groups_give_one_process() -> None:
    """Losses, gradients and parameters of S, P and H, with graphs kept and not, aggregators of their own and shared."""
    dtypes = ["float64", "float32", "bf16"]
    cases = [
        *plan(dtypes=dtypes, ranks=[1, 3], groups=[1], num_steps=3),
        *plan(encoders=["linear"], dtypes=dtypes, groups=[2]),
        *plan(encoders=["test_resnet"], dtypes=dtypes, ranks=[1], groups=[2]),
    ]
    ways = {(case.num_groups, case.keep, case.is_shared) for case in cases}
    assert ways == {(1, None, False), (2, None, False), (1, 0, True), (2, 0, True)}
    results = list(verify(cases))
    assert not [result for result in results if not result.holds]
    assert all(result.moved > 0.02 for result in results)


@pytest.mark.slow
def test_a_vision_transformer_and_every_aggregator_give_one_process() -> None:
    cases = [
        *plan(encoders=["vit_tiny_patch16_224"], ranks=[1], virtual_ranks=[3], groups=[2], num_steps=1),
        *plan(aggregators=["transmil", "mean", "max", "tile_mean", "tile_max"], virtual_ranks=[3], groups=[1]),
    ]
    assert len(cases) == 6 * 2 * 2
    assert not [result for result in verify(cases) if not result.holds]


@pytest.mark.slow
def test_batchnorm_by_virtual_rank_gives_one_process_with_the_same() -> None:
    """Its running statistics too; a slide of a single tile, and virtual ranks of single tiles."""
    cases = [
        *plan(batchnorm="virtual", virtual_ranks=[1, 6]),
        *plan(batchnorm="virtual", virtual_ranks=[3], encoders=["test_resnet"], groups=[1], num_tiles=[47, 20, 1]),
    ]
    for result in verify(cases):
        assert "buffers" in result.errors
        assert result.holds


@pytest.mark.slow
def test_every_injected_fault_shows_in_gradients_and_parameters() -> None:
    """Over groups too; in one go, as starting processes takes longer than what they do."""
    faults: tuple[Fault, ...] = ("scale", "drop", "swap", "group")
    cases = [case for fault in faults for case in plan(fault=fault)]
    cases += [case for fault in faults for case in plan(fault=fault, batchnorm="virtual", dtypes=["float64"])]
    num_groups = {fault: {case.num_groups for case in cases if case.fault == fault} for fault in faults}
    assert num_groups == {"scale": {1, 2}, "drop": {1, 2}, "swap": {1, 2}, "group": {2}}
    unnoticed = [r for r in verify(cases) if not {"gradients", "worst_tensor", "parameters"} <= set(r.exceeded)]
    assert not unnoticed


def test_the_single_process_moves_batchnorms_statistics_by_its_virtual_ranks_alone() -> None:
    """Frozen ones stand still, and then virtual ranks are nothing to it; else each number of them is another answer."""
    encoder, aggregator, _ = build_halves(CASE)
    start = named_state({"encoder": encoder, "aggregator": aggregator})["buffers"]
    frozen, virtual = (replace(CASE, num_virtual=3, batchnorm=b) for b in ("frozen", "virtual"))
    assert as_single(frozen) == as_single(CASE)
    assert all(torch.equal(value, start[name]) for name, value in run_single(as_single(frozen)).buffers.items())
    three, six = (run_single(as_single(replace(virtual, num_virtual=num))) for num in (3, 6))
    assert not any(torch.equal(value, start[name]) for name, value in three.buffers.items())
    errors = compare(six, three).errors
    assert errors["gradients"] > 1e-2
    assert errors["buffers"] > 1e-4


def test_all_limits_count() -> None:
    limits = LIMITS["float32"]
    assert Result(CASE, limits).holds
    for what, limit in limits.items():
        assert Result(CASE, {**limits, what: 1.01 * limit}).exceeded == [what]
        assert Result(CASE, {**limits, what: float("nan")}).exceeded == [what]


def test_a_rank_that_differs_from_the_others_is_the_one_that_counts() -> None:
    def trace(value: float) -> Trace:
        tensors = {"encoder.weight": torch.full((3,), value)}
        return Trace(losses=tensors, gradients=tensors, parameters=tensors, buffers={})

    near, far, lost = (compare(trace(value), trace(1.0)) for value in (1.0, 1.5, float("nan")))
    for ranks in ([near, far], [far, near]):
        assert merge(ranks).errors == dict.fromkeys(("loss", "gradients", "worst_tensor", "parameters"), 0.5)
    for ranks in ([far, lost, near], [lost, far]):
        assert all(math.isnan(error) for error in merge(ranks).errors.values())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"ranks": "0"}, "--ranks 0: expected numbers from 1"),
        ({"tiles": "9,x"}, "--tiles 9,x: expected numbers from 1"),
        ({"groups": "1,4"}, "--groups 4 with slides of --tiles 23,2,9: expected a slide for each group"),
        ({"steps": 0}, "--steps 0: expected at least 1"),
        ({"encoder": ("linear", "resnot")}, "--encoder resnot: timm does not know it"),
        ({"plot": Path("no_such_folder/errors.png")}, "--plot no_such_folder/errors.png: expected a .png in a folder"),
        ({"plot": Path("errors.jpg")}, "--plot errors.jpg: expected a .png in a folder"),
        ({"inject_fault": "group", "groups": "1"}, "--inject-fault group: expected --groups above 1"),
        ({"inject_fault": "swap", "aggregator": ("mean",)}, "--inject-fault swap: expected an --aggregator other than"),
        ({"bn": "virtual", "encoder": ("linear",)}, "--bn virtual with --encoder linear: it has no BatchNorm"),
        ({"aggregator": ()}, "--encoder, --aggregator and --dtype: expected at least one of each"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence_before_anything_runs(
    flags: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "run_ranks", lambda *_: pytest.fail("something runs"))
    with pytest.raises(TrainerError, match=f"^{sentence}"):
        Verify(**flags).run()


def test_processes_that_do_not_answer_are_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(comparison, "run_ranks", silent)
    with pytest.raises(TrainerError, match="processes did not all answer within their time"):
        list(verify([CASE]))


def some_results() -> list[Result]:
    """One that holds, one that does not, one far off, one that is not a number."""
    errors = dict.fromkeys(LIMITS["float32"], 0.0)
    wide = replace(CASE, num_groups=2, dtype="bf16")
    return [
        Result(CASE, errors),
        Result(replace(CASE, num_virtual=4), {**errors, "loss": 1e-4}),
        Result(replace(wide, encoder="linear"), {**errors, "gradients": 0.5}),
        Result(wide, {**errors, "parameters": float("nan")}),
    ]


def test_the_table_shows_what_was_varied_and_what_does_not_hold() -> None:
    written = io.StringIO()
    Console(file=written, width=150).print(build_table(some_results()))
    head, _, *rows = [line.split() for line in written.getvalue().splitlines() if line.strip()]
    assert " ".join(head) == (
        "encoder as groups virtual ranks loss gradients worst tensor parameters buffers holds"  # Not what never varies.
    )
    assert [row[-1] for row in rows] == ["yes", "NO", "NO", "NO"]
    assert rows[2][:3] == ["linear", "H", "bf16"]
    assert "5.0e-01" in rows[2]
    limits, _ = describe_limits(some_results())
    assert limits.endswith("float32 1e-05 (worst tensor 5e-05); bf16 3e-02")


def test_the_summary_is_json_with_the_largest_errors() -> None:
    summary = summarise(some_results())
    assert (summary["holds"], summary["num_cases"]) == (False, 4)
    assert summary["max_error"]["float32"]["loss"] == 1e-4
    assert summary["max_error"]["bf16"] == {
        "loss": 0.0,
        "gradients": 0.5,
        "worst_tensor": 0.0,
        "parameters": None,
        "buffers": 0.0,
    }


def test_the_plot_is_a_picture_of_errors_of_all_sizes(tmp_path: Path) -> None:
    file = tmp_path / "errors.png"
    file.write_bytes(plot_errors(some_results()))
    picture = cv2.imread(str(file))
    assert picture is not None
    assert min(picture.shape[:2]) > 400
    held = plot_errors(some_results()[:1])
    assert held != plot_errors([replace(some_results()[0], errors={**some_results()[0].errors, "loss": 0.1})])


@pytest.mark.slow
def test_the_command_tells_whether_it_holds_and_draws(slidegrad: Callable[..., Ended], tmp_path: Path) -> None:
    small = ("--encoder", "linear", "--dtype", "float64", "--ranks", "2", "--virtual-ranks", "2", "--groups", "1")
    ended = slidegrad("verify", *small, "--steps", "2", "--plot", tmp_path / "errors.png")
    assert ended.code == 0, ended.stderr
    assert ended.result is not None
    assert ended.result["holds"]
    assert ended.result["num_cases"] == 2
    assert (tmp_path / "errors.png").stat().st_size > 10_000
    assert "2 AdamW steps on slides of 23, 2 and 9 tiles; dropout off;" in ended.stderr


def test_a_fault_ends_the_command_with_code_1() -> None:
    command = Verify(
        encoder=("linear",), dtype=("float64",), ranks="1", virtual_ranks="2", groups="1", steps=1, inject_fault="drop"
    )
    result, code = command.run()
    assert code == 1
    assert not result["holds"]
    assert result["fault"] == "drop"
