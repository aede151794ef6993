"""Gradient equivalence on gloo, over some optimiser steps, and that each way of being wrong is noticed."""

import queue
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from rich.console import Console

from tests.conftest import Ended
from trainer import verify as verify_module
from trainer.cli import Verify
from trainer.errors import TrainerError
from trainer.verify import plan_cases, verify
from trainer.verify_cases import Case, build_halves
from trainer.verify_errors import LIMITS, Result, Trace, compare, merge
from trainer.verify_plot import plot_errors
from trainer.verify_single import as_single, named_state, run_single
from trainer.verify_table import build_table, describe_limits, summarise

CASE = Case(encoder="conv", dtype="float32", num_tiles=(23, 2, 9), num_steps=1, num_ranks=1, num_virtual=1)


def run(**given: Any) -> list[Result]:
    """A small grid: slides of 23, 2 and 9 tiles, 1 and 3 encoder ranks in 1 and 2 groups, unless something else is given."""
    usual: dict[str, Any] = {
        "encoders": ["conv"],
        "aggregators": ["gma"],
        "dtypes": ["float64", "float32"],
        "ranks": [1, 3],
        "virtual_ranks": [1, 3],
        "groups": [1, 2],
        "num_tiles": [23, 2, 9],
        "num_steps": 3,
    }
    results = list(verify(plan_cases(**(usual | given))))
    assert results
    return results


@pytest.mark.slow
def test_ranks_virtual_ranks_and_groups_give_one_process() -> None:
    """Losses, gradients and parameters of S, P and H, with graphs kept and not, aggregators of their own and shared."""
    results = run(encoders=["linear", "conv", "test_resnet"], dtypes=["float64", "float32", "bf16"])
    assert not [result for result in results if not result.is_within_fixed]
    assert all(result.moved > 0.02 for result in results)
    ways = {(r.case.num_groups, r.case.keep, r.case.is_shared) for r in results}
    assert ways == {(1, None, False), (2, None, False), (1, 0, True), (2, 0, True)}


@pytest.mark.slow
def test_a_vision_transformer_gives_one_process() -> None:
    results = run(encoders=["vit_tiny_patch16_224"], ranks=[2], virtual_ranks=[3], groups=[2], num_steps=2)
    assert [result.case.is_shared for result in results] == [False, True] * 2
    assert all(result.is_within_fixed for result in results)


@pytest.mark.slow
def test_every_aggregator_gives_one_process() -> None:
    results = run(aggregators=["transmil", "mean", "max"], ranks=[2], virtual_ranks=[3], groups=[2])
    assert {result.case.aggregator for result in results} == {"transmil", "mean", "max"}
    assert all(result.is_within_fixed for result in results)


@pytest.mark.slow
def test_batchnorm_by_virtual_rank_gives_one_process_with_the_same() -> None:
    """Its running statistics too; 6 virtual ranks on each of 2 ranks leave some a single tile."""
    results = run(batchnorm="virtual", ranks=[2], virtual_ranks=[1, 6])
    assert all(result.is_within_fixed and "buffers" in result.errors for result in results)
    # A ResNet's last maps are one pixel: rounding grows, in the single process too.
    deep = run(batchnorm="virtual", encoders=["test_resnet"], ranks=[2], virtual_ranks=[3], groups=[1])
    assert all(result.holds and result.errors["gradients"] < 1e-5 for result in deep)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["scale", "drop", "swap", "group"])
@pytest.mark.parametrize("batchnorm", ["frozen", "virtual"])
def test_every_injected_fault_shows_in_gradients_and_parameters(fault: str, batchnorm: str) -> None:
    results = run(fault=fault, batchnorm=batchnorm, ranks=[2])
    assert {result.case.num_groups for result in results} == ({2} if fault == "group" else {1, 2})
    for result in results:
        assert {"gradients", "worst_tensor", "parameters"} <= set(result.exceeded), result


def test_the_single_process_moves_batchnorms_statistics_by_its_virtual_ranks_alone() -> None:
    """Frozen ones stand still, and then virtual ranks are nothing to it; else each number of them is an answer apart."""
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
    assert Result(CASE, limits).is_within_fixed
    for what, limit in limits.items():
        assert Result(CASE, {**limits, what: 1.01 * limit}).exceeded == [what]
        assert Result(CASE, {**limits, what: float("nan")}).exceeded == [what]


def test_a_limit_gives_way_to_what_a_rounding_does_to_the_single_process() -> None:
    by_rounding = Result(CASE, {"loss": 9e-4}, {"loss": 1e-4})
    assert by_rounding.holds
    assert not by_rounding.is_within_fixed
    assert not Result(CASE, {"loss": 1.1e-3}, {"loss": 1e-4}).holds
    assert not Result(CASE, {"loss": 0.4}, {"loss": 1.0}).holds
    assert not Result(replace(CASE, dtype="bf16"), {"loss": 0.04}, {"loss": 0.1}).holds


def test_a_rank_that_differs_from_the_others_is_the_one_that_counts() -> None:
    def trace(value: float) -> Trace:
        tensors = {"encoder.weight": torch.full((3,), value)}
        return Trace(losses=tensors, gradients=tensors, parameters=tensors, buffers={})

    near, far, lost = (compare(trace(value), trace(1.0)) for value in (1.0, 1.5, float("nan")))
    for ranks in ([near, far], [far, near]):
        assert merge(ranks).errors == dict.fromkeys(("loss", "gradients", "worst_tensor", "parameters"), 0.5)
    for ranks in ([far, lost, near], [lost, far]):
        assert Result(CASE, merge(ranks).errors).exceeded == ["loss", "gradients", "worst_tensor", "parameters"]


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
        ({"aggregator": ()}, "--encoder, --aggregator and --dtype: expected at least one of each"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence_before_anything_runs(
    flags: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "run_ranks", lambda *_: pytest.fail("something runs"))
    with pytest.raises(TrainerError, match="^" + sentence.replace("+", r"\+")):
        Verify(**flags).run()


def test_processes_that_do_not_answer_are_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> None:
        raise queue.Empty

    monkeypatch.setattr(verify_module, "run_ranks", silent)
    with pytest.raises(TrainerError, match="processes did not all answer within their time"):
        list(verify([CASE]))


def some_results() -> list[Result]:
    """One that holds, one at rounding, one that does not, one that is not a number."""
    errors = dict.fromkeys(LIMITS["float32"], 0.0)
    wide = replace(CASE, num_groups=2, dtype="bf16")
    return [
        Result(CASE, errors),
        Result(replace(CASE, num_virtual=4), {**errors, "loss": 1e-4}, {"loss": 1e-4}),
        Result(replace(wide, encoder="linear"), {**errors, "gradients": 0.5}),
        Result(wide, {**errors, "parameters": float("nan")}),
    ]


def test_the_table_shows_what_was_varied_and_what_does_not_hold() -> None:
    console = Console(width=150, record=True, quiet=True)
    console.print(build_table(some_results()))
    head, _, *rows = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert " ".join(head) == (
        "encoder as groups virtual ranks loss gradients worst tensor parameters buffers holds"  # Not what never varies.
    )
    assert [row[-1] for row in rows] == ["yes", "rounding", "NO", "NO"]
    assert rows[2][:3] == ["linear", "H", "bf16"]
    assert "5.0e-01" in rows[2]
    limits, rounding = describe_limits(some_results())
    assert limits.endswith("float32 1e-05 (worst tensor 5e-05); bf16 3e-02")
    assert rounding.startswith("rounding: above such a limit, and less than 10 times")


def test_the_summary_is_json_with_the_largest_errors() -> None:
    summary = summarise(some_results())
    assert (summary["holds"], summary["num_cases"], summary["num_at_rounding"]) == (False, 4, 1)
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
    small = (*small, "--steps", "2", "--plot", tmp_path / "errors.png")
    ended = slidegrad("verify", *small)
    assert ended.code == 0, ended.stderr
    assert ended.result is not None
    assert ended.result["holds"]
    assert ended.result["num_cases"] == 2
    assert (tmp_path / "errors.png").stat().st_size > 10_000
    assert "2 AdamW steps on slides of 23, 2 and 9 tiles; dropout off; BatchNorm frozen" in ended.stderr
    wrong = slidegrad("verify", *small, "--inject-fault", "drop")
    assert wrong.code == 1
    assert wrong.result is not None
    assert not wrong.result["holds"]
    assert wrong.result["fault"] == "drop"
