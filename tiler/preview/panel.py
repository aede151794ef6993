"""The words of a picture: title, phrases, legend and scale bar, wrapped so that nothing is ever cut off. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
"""Red, green, blue, 0 to 255."""

# The constant's name is of old: OpenCV 5 draws a TrueType font with it, and knows letters of many scripts.
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK, _MUTED = (27, 31, 36), (70, 78, 88)
_MARGIN_PX, _GAP_PX, _LINE_PX, _BREAK_PX, _SWATCH_PX = 14, 18, 21, 5, 13
_TITLE_SCALE, _TEXT_SCALE = 0.6, 0.5


@dataclass(frozen=True)
class Words:
    """A phrase; it moves to the next line as a whole where it does not fit."""

    text: str


@dataclass(frozen=True)
class Swatch:
    """A colour and what it means, shown as it is drawn on the slide: an area, a tile or a line."""

    text: str
    colour: Colour
    look: Literal["area", "box", "line"] = "area"


@dataclass(frozen=True)
class Bar:
    """A scale bar; `mpp` microns per px of the picture."""

    mpp: float


Item = Words | Swatch | Bar


def bar_length_um(room_um: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50 … microns that is not longer than the room there is."""
    power = 10.0 ** math.floor(math.log10(room_um))
    return power * max(step for step in (1, 2, 5) if step * power <= room_um * (1 + 1e-9))


def bar_text(length_um: float) -> str:
    """Its length as people write it: mm from 1 mm on."""
    return f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"


def draw_panel(title: str, rows: Sequence[Sequence[Item]], width: int) -> NDArray[np.uint8]:
    """The panel, RGB (as high as it takes, width, 3).

    Args:
        title: set large, broken anywhere.
        rows: each begins a new line and wraps between its items; a phrase wider than the panel is broken.
        width: px.
    """
    room = width - 2 * _MARGIN_PX
    titles = break_text(title, room, _TITLE_SCALE, 2)
    groups = [_wrap(row, room) for row in rows]
    num_lines = len(titles) + sum(map(len, groups))
    panel = np.full((2 * _MARGIN_PX + _LINE_PX * num_lines + _BREAK_PX * len(groups), width, 3), 255, np.uint8)
    y = _MARGIN_PX + 15
    for text in titles:
        _write(panel, text, _MARGIN_PX, y, _TITLE_SCALE, _INK, 2)
        y += _LINE_PX
    for lines in groups:
        y += _BREAK_PX
        for line in lines:
            for x, item in line:
                _draw(panel, item, _MARGIN_PX + x, y, room)
            y += _LINE_PX
    return panel


def _wrap(row: Sequence[Item], room: int) -> list[list[tuple[int, Item]]]:
    """Lines of (left end, px, and item); no line is wider than the room."""
    lines: list[list[tuple[int, Item]]] = [[]]
    x = 0
    for item in _broken(row, room):
        wide = _width(item, room)
        if lines[-1] and x + wide > room:
            lines.append([])
            x = 0
        lines[-1].append((x, item))
        x += wide + _GAP_PX
    return lines


def break_text(text: str, room: int, scale: float, thickness: int = 1) -> list[str]:
    """Pieces of the text, each at most `room` px wide; broken after any character."""
    pieces = [""]
    for character in text:
        if pieces[-1] and _text_width(pieces[-1] + character, scale, thickness) > room:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _broken(row: Sequence[Item], room: int) -> list[Item]:
    """The row with too wide phrases in pieces."""
    found: list[Item] = []
    for item in row:
        if isinstance(item, Words) and _width(item, room) > room:
            found += [Words(piece) for piece in break_text(item.text, room, _TEXT_SCALE)]
        else:
            found.append(item)
    return found


def _width(item: Item, room: int) -> int:
    if isinstance(item, Words):
        return _text_width(item.text, _TEXT_SCALE)
    if isinstance(item, Swatch):
        return _SWATCH_PX + 7 + _text_width(item.text, _TEXT_SCALE)
    return room


def _draw(panel: NDArray[np.uint8], item: Item, x: int, y: int, room: int) -> None:
    """Draws an item with its left end at x and its base line at y."""
    if isinstance(item, Words):
        _write(panel, item.text, x, y, _TEXT_SCALE, _MUTED)
    elif isinstance(item, Swatch):
        top = y - _SWATCH_PX + 1
        corners = (x, top), (x + _SWATCH_PX, top + _SWATCH_PX)
        if item.look == "line":
            cv2.line(panel, (x, y - 5), (x + _SWATCH_PX, y - 5), item.colour, 2)
        else:
            fill = item.colour if item.look == "area" else tuple(230 + c // 10 for c in item.colour)
            cv2.rectangle(panel, *corners, fill, -1)
            cv2.rectangle(panel, *corners, item.colour if item.look == "box" else _MUTED, 1)
        _write(panel, item.text, x + _SWATCH_PX + 7, y, _TEXT_SCALE, _INK)
    elif item.mpp > 0:
        length_um = bar_length_um(min(240, room * 0.5) * item.mpp)
        end = x + round(length_um / item.mpp)
        # Filled, not stroked: a thick line's round ends would add 5 px to its length.
        for left, right, rise in ((x, end, 1), (x, x + 2, 5), (end - 2, end, 5)):
            panel[y - 5 - rise : y - 3 + rise, left:right] = _INK
        _write(panel, bar_text(length_um), end + 10, y, _TEXT_SCALE, _INK)


def _text_width(text: str, scale: float, thickness: int = 1) -> int:
    return int(cv2.getTextSize(text, _FONT, scale, thickness)[0][0])


def _write(
    panel: NDArray[np.uint8], text: str, x: int, y: int, scale: float, colour: Colour, thickness: int = 1
) -> None:
    cv2.putText(panel, text, (x, y), _FONT, scale, colour, thickness, cv2.LINE_AA)
