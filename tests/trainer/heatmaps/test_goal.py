"""What contributions add up to, task by task, against the head's own predictions."""

import numpy as np
import pytest
import torch

from trainer.errors import TrainerError
from trainer.heads import Head
from trainer.heatmaps.goal import Goal

OUTPUTS_C = np.array([0.4, -1.3, 2.2])
PARTS_KC = np.array([[0.1, -0.5, 1.0], [0.2, -0.3, 0.7], [-0.1, 0.0, 0.2]])
"""What is missing to the outputs is the bias."""


def predict(head: Head, outputs_C: np.ndarray) -> np.ndarray:
    return head.predict(torch.tensor(outputs_C)).numpy()


def test_of_two_classes_it_is_the_log_odds_of_the_last() -> None:
    head, outputs_C = Head.of_classes(2), OUTPUTS_C[:2]
    goal = Goal.of(head, ("normal", "tumour"))
    probs = predict(head, outputs_C)
    assert goal.total(outputs_C) == pytest.approx(np.log(probs[1] / probs[0]), abs=1e-12)
    assert goal.tiles(PARTS_KC[:, :2]) == pytest.approx(PARTS_KC[:, 1] - PARTS_KC[:, 0], abs=1e-12)
    assert goal.what == "log-odds of class tumour over normal"
    assert goal.ends == ("towards class normal", "towards class tumour")
    other = Goal.of(head, ("normal", "tumour"), "normal")
    assert other.total(outputs_C) == -goal.total(outputs_C)
    assert other.ends == goal.ends[::-1]


def test_of_more_classes_what_all_logits_have_in_common_does_not_count() -> None:
    goal = Goal.of(Head.of_classes(3), ("a", "b", "c"), "b")
    assert goal.total(OUTPUTS_C) == pytest.approx(-1.3 - (0.4 + 2.2) / 2)
    assert goal.total(OUTPUTS_C + 7) == pytest.approx(goal.total(OUTPUTS_C))
    assert goal.tiles(PARTS_KC + 5) == pytest.approx(goal.tiles(PARTS_KC))
    assert Goal.of(Head.of_classes(3), ("a", "b", "c")).output == "c"


def test_of_columns_it_is_the_log_odds_of_a_yes() -> None:
    head = Head(task="multilabel", num_outputs=3, weights=(1.0, 1.0, 1.0))
    goal = Goal.of(head, ("er", "pr", "her2"), "her2")
    p = predict(head, OUTPUTS_C)[2]
    assert goal.total(OUTPUTS_C) == pytest.approx(np.log(p / (1 - p)), abs=1e-12)
    assert Goal.of(head, ("er", "pr", "her2")).output == "er"
    assert goal.ends == ("against her2", "for her2")


def test_of_numbers_it_is_the_number_in_its_own_unit() -> None:
    head = Head(task="regression", num_outputs=3, means=(10.0, 50.0, 0.1), stds=(2.0, 25.0, 0.01))
    for name, column in (("", 0), ("ki67", 1), ("hrd", 2)):
        goal = Goal.of(head, ("score", "ki67", "hrd"), name)
        assert goal.total(OUTPUTS_C) == pytest.approx(predict(head, OUTPUTS_C)[column], abs=1e-12)
        assert goal.tiles(PARTS_KC) == pytest.approx(head.stds[column] * PARTS_KC[:, column], abs=1e-12)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Head.of_classes(2), r"^--output no: expected a class of the run, one of a, b$"),
        (Head(task="multilabel", num_outputs=2), r"^--output no: expected a column of the run, one of a, b$"),
    ],
)
def test_an_output_that_is_none_is_refused(head: Head, message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        Goal.of(head, ("a", "b"), "no")
