"""Cards: the slide beside its heatmap, in all shapes and with any words."""

import warnings

import cv2
import numpy as np
import pytest

from trainer.heatmaps.cards import ATTENTION, contribution_legend, draw_card

LEGEND = contribution_legend("log-odds of class 1 over 0", ("towards class 0", "towards class 1"), 0.012, is_cut=True)


@pytest.mark.parametrize("size", [(60, 90), (20, 90), (1, 1), (2000, 30)])
@pytest.mark.parametrize(("legend", "title"), [(ATTENTION, ""), (LEGEND, "slide a")])
def test_a_card_shows_both_pictures_whatever_their_shape(size: tuple[int, int], legend: object, title: str) -> None:
    left, right = np.full((*size, 3), (250, 0, 0), np.uint8), np.full((*size, 3), (0, 0, 250), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card = draw_card(left, right, 8.0, legend, title=title)  # type: ignore[arg-type]
    assert card.startswith(b"\x89PNG")
    picture = cv2.imdecode(np.frombuffer(card, np.uint8), cv2.IMREAD_COLOR).astype(int)
    red = (picture[..., 2] > 200) & (picture[..., :2].max(-1) < 60)
    blue = (picture[..., 0] > 200) & (picture[..., 1:].max(-1) < 60)
    assert red.sum() > 100
    assert blue.sum() == pytest.approx(red.sum(), rel=0.1, abs=400)


def test_any_words_are_shown_without_a_warning() -> None:
    picture = np.full((50, 60, 3), 200, np.uint8)
    legend = contribution_legend("病理 $x_y" * 20, ("towards 病" * 9, "\n"), 1e-30, is_cut=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card = draw_card(picture, picture, 8.0, legend, title="病理 $x_y^" * 30, notes=["\x07" * 200, "", "Größe"])
    assert card.startswith(b"\x89PNG")


def test_the_bar_says_where_its_colours_end() -> None:
    assert "99 % quantile" in LEGEND.label
    assert LEGEND.ticks == ("−0.012\ntowards class 0", "0", "+0.012\ntowards class 1")
