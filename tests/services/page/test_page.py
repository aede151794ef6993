"""The page as people use it, in a real browser: with the mouse, with the keyboard alone, in the dark, on a phone."""

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from manifests import Manifest, open_manifests, sample_tiles, shard
from tests.services.page.conftest import TOKEN, Visit
from tiler import open_slide, read_tiles

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'slidegrad[test]'")
expect = sync_api.expect
expect.set_options(timeout=15_000)
if TYPE_CHECKING:
    from playwright.sync_api import Page

SLIDE, PENNED = "synth_0000", "synth_0006"


@pytest.fixture
def manifest(manifests: Path) -> Manifest:
    return open_manifests(manifests)[SLIDE]


def _middle(page: "Page", manifest: Manifest, row: int) -> tuple[float, float]:
    """Where a tile's middle lies in the map, px, while the whole slide is shown."""
    box = page.locator("#map").bounding_box()
    assert box is not None
    slide, footprint = manifest.slide, manifest.footprint_l0
    scale = 0.96 * min(box["width"] / slide.width_l0, box["height"] / slide.height_l0)
    x = box["width"] / 2 + scale * (manifest.x_l0[row] + footprint[0] / 2 - slide.width_l0 / 2)
    y = box["height"] / 2 + scale * (manifest.y_l0[row] + footprint[1] / 2 - slide.height_l0 / 2)
    return float(x), float(y)


def _point_at(page: "Page", manifest: Manifest, row: int) -> None:
    x, y = _middle(page, manifest, row)
    page.locator("#map").hover(position={"x": x, "y": y})


def _colours(page: "Page", selector: str = "#map") -> np.ndarray[Any, Any]:
    """What a canvas shows, RGBA (h, w, 4)."""
    content = page.locator(selector).evaluate("canvas => canvas.toDataURL()").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA"))


def _colour_at(page: "Page", manifest: Manifest, row: int) -> list[int]:
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # Is drawn.
    x, y = _middle(page, manifest, row)
    return [int(channel) for channel in _colours(page)[round(y), round(x), :3]]


def _open_slide(visit: Visit, view: str = f"#slide={SLIDE}") -> "Page":
    """The page with a slide whose picture and tiles are drawn."""
    page = visit().open(view)
    expect(page.locator("#verdict")).to_contain_text("ready for training")
    expect(page.locator("#areas-legend li")).not_to_have_count(0)
    expect(page.locator("#run option")).not_to_have_count(0)
    page.mouse.move(0, 0)
    return page


def test_the_archive_is_told_in_numbers_and_failures_lead_to_their_slides(visit: Visit) -> None:
    page = visit().open()
    figures = page.locator("#figures > div")
    expect(figures.filter(has_text="ready")).to_contain_text("3")
    expect(figures.filter(has_text="without tissue")).to_contain_text("60")
    expect(figures.filter(has_text="failed")).to_contain_text("2")
    expect(page.locator("#bars tr")).to_have_text([re.compile(r"20 – 49\s*1"), re.compile(r"50 – 99\s*2")])
    expect(page.locator("#left-out")).to_contain_text("pen marks")
    failure = page.locator("#failure-rows details")
    expect(failure).to_have_count(1)
    expect(failure.locator("summary")).to_contain_text("2")
    failure.locator("summary").click()
    failure.get_by_role("link", name="broken_2").click()
    expect(page.locator("#slide-name")).to_have_text("broken_2")
    expect(page.locator("#verdict")).to_contain_text("This slide cannot be used.")
    expect(page.locator("#map-room")).to_be_hidden()
    page.get_by_role("link", name="All failed slides").click()
    expect(page.locator("#rows tr")).to_have_text([re.compile("broken_1"), re.compile("broken_2")])


def test_searching_filtering_and_turning_pages_change_the_list_and_the_address(visit: Visit) -> None:
    page = visit().open()
    count = page.locator("#count")
    expect(count).to_have_text("1–50 of 65 slides")
    expect(page.locator("#rows tr")).to_have_count(50)
    page.get_by_role("button", name="Next").click()
    expect(count).to_have_text("51–65 of 65 slides")
    expect(page.locator("#rows tr").first).to_contain_text("waste_45")
    expect(page.get_by_role("button", name="Next")).to_be_disabled()
    page.get_by_role("button", name="Previous").click()
    expect(count).to_have_text("1–50 of 65 slides")
    page.get_by_label("Search").fill("SYNTH")
    expect(count).to_have_text("3 slides")
    expect(page).to_have_url(re.compile("#q=SYNTH$"))
    expect(page.get_by_role("button", name="Next")).to_be_hidden()
    page.get_by_label("Search").fill("nothing of that kind")
    expect(page.locator("#none")).to_be_visible()
    page.get_by_label("Search").fill("")
    page.get_by_label("Status").select_option("failed")
    expect(count).to_have_text("2 slides")
    page.reload()
    expect(count).to_have_text("2 slides")
    expect(page.get_by_label("Status")).to_have_value("failed")
    page.get_by_label("Search").fill("broken_1")
    expect(count).to_have_text("1 slide")
    page.evaluate("() => { location.hash = '#'; }")  # A link to the whole archive, while the field has the focus.
    expect(count).to_have_text("1–50 of 65 slides")
    expect(page.get_by_label("Search")).to_have_value("")


def test_the_list_can_be_ordered(visit: Visit) -> None:
    page = visit().open()
    page.get_by_label("Order").select_option("most tiles")
    expect(page.locator("#rows tr").first).to_contain_text(SLIDE)
    expect(page).to_have_url(re.compile("#sort=-num_tiles$"))


def test_a_slide_opens_from_the_list_with_its_picture_areas_and_tiles(visit: Visit, manifest: Manifest) -> None:
    page = visit().open()
    page.get_by_role("link", name=SLIDE).click()
    expect(page.locator("#verdict")).to_have_text(f"{len(manifest)} tiles of tissue, ready for training")
    expect(page.get_by_role("link", name=SLIDE)).to_have_attribute("aria-current", "page")
    expect(page).to_have_title(f"{SLIDE} – Slidegrad")
    expect(page.locator("#facts")).to_contain_text("of 32 px at 1 µm per px")
    expect(page.locator("#scale-bar")).to_have_text(re.compile("µm"))
    expect(page.locator("#areas-legend li")).not_to_have_count(0)
    row = int(np.argmax(manifest.tissue))
    page.get_by_role("checkbox", name="Tiles", exact=True).uncheck()
    tissue = _colour_at(page, manifest, row)
    assert tissue[0] > tissue[1] + 10  # Pink or purple, not glass.
    page.get_by_role("checkbox", name="Areas").check()
    expect(page.locator("#areas-legend")).to_contain_text("tissue")
    assert _colour_at(page, manifest, row)[0] < tissue[0] - 30  # Green over it.
    page.get_by_role("checkbox", name="Picture").uncheck()
    page.get_by_role("checkbox", name="Areas").uncheck()
    assert _colour_at(page, manifest, row) == [255, 255, 255]


def test_pen_marks_are_in_the_legend(visit: Visit) -> None:
    page = _open_slide(visit, f"#slide={PENNED}")
    page.get_by_role("checkbox", name="Areas").check()
    expect(page.locator("#areas-legend")).to_have_text(re.compile(r"tissue \d+ %.*pen marks \d+ %"))
    expect(page.locator("#facts")).to_contain_text("pen marks")


def test_hovering_tells_a_tiles_tissue(visit: Visit, manifest: Manifest) -> None:
    page = _open_slide(visit)
    for row in (0, 17, len(manifest) - 1):
        _point_at(page, manifest, row)
        percent = int(100 * float(manifest.tissue[row]) + 0.5)
        expect(page.locator("#read-out")).to_have_text(
            re.compile(rf"^Tile {row} · tissue {percent} % · .* mm from the")
        )
    page.locator("#map").hover(position={"x": 3, "y": 3})
    expect(page.locator("#read-out")).to_have_text("")


def test_the_numbers_of_a_step_can_be_changed_and_the_tiles_follow(visit: Visit, manifest: Manifest) -> None:
    page = _open_slide(visit)
    page.get_by_label("Show them").check()
    expect(page.locator("#step-said")).to_contain_text(f"of {len(manifest)}.")
    for seed, epoch, part, num_parts in ((0, 0, 0, 1), (5, 0, 0, 1), (5, 2, 1, 3)):
        for name, number in (("k", 20), ("seed", seed), ("epoch", epoch), ("num_parts", num_parts), ("part", part)):
            page.locator(f"#step-{name}").fill(str(number))
        rows = shard(
            sample_tiles(len(manifest), k=20, seed=seed, epoch=epoch, slide_id=SLIDE), part=part, num_parts=num_parts
        )
        expect(page).to_have_url(re.compile(rf"k=20&seed={seed}&epoch={epoch}&part={part}&num_parts={num_parts}"))
        expect(page.locator("#step-said")).to_contain_text(f"{len(set(rows.tolist()))} tiles of {len(manifest)}")
        others = np.setdiff1d(np.arange(len(manifest)), rows)
        _point_at(page, manifest, int(rows[0]))
        expect(page.locator("#read-out")).to_have_text(re.compile("· in this step"))
        _point_at(page, manifest, int(others[0]))
        expect(page.locator("#read-out")).to_have_text(re.compile("not in this step"))


def test_numbers_that_make_no_step_are_told_beside_them(visit: Visit) -> None:
    visitor = visit()
    page = visitor.open(f"#slide={SLIDE}&k=10&part=4&num_parts=3")
    expect(page.locator("#step-said")).to_have_text(re.compile("part is 4 of 3"))
    expect(page.locator("#step-part")).to_have_value("4")
    visitor.expect_refusal(400)


def test_a_click_shows_the_very_pixels_of_a_tile(visit: Visit, manifest: Manifest, archive: Path) -> None:
    page, row = _open_slide(visit), 23
    x, y = _middle(page, manifest, row)
    page.locator("#map").click(position={"x": x, "y": y})
    expect(page.locator("#tile-name")).to_have_text("Tile 23")
    expect(page.locator("#tile-said")).to_contain_text("32 × 32 px")
    expected = read_tiles(open_slide(archive / f"{SLIDE}.svs"), manifest, np.array([row]))[0]
    assert np.array_equal(_colours(page, "#pixels")[..., :3], expected)
    expect(page).to_have_url(re.compile("tile=23"))
    page.reload()
    expect(page.locator("#tile-name")).to_have_text("Tile 23")
    page.get_by_role("button", name="Close the tile").click()
    expect(page.locator("#tile")).to_be_hidden()
    expect(page).not_to_have_url(re.compile("tile="))


def test_pixels_that_cannot_be_had_are_told_and_the_rest_stays(visit: Visit, archive: Path) -> None:
    visitor = visit()
    file = archive / "synth_0001.svs"
    file.rename(archive / "away")
    try:
        page = visitor.open("#slide=synth_0001&tile=4")
        expect(page.locator("#tile-said")).to_contain_text("No pixels: slide synth_0001: its file is not where it was")
        expect(page.locator("#verdict")).to_contain_text("ready for training")
        visitor.expect_refusal(503)
    finally:
        (archive / "away").rename(file)


def test_back_and_forward_go_through_what_was_looked_at(visit: Visit) -> None:
    page = visit().open("#q=synth")
    name = page.locator("#slide-name")
    page.get_by_role("link", name=SLIDE).click()
    expect(name).to_have_text(SLIDE)
    page.get_by_role("link", name=PENNED).click()
    expect(name).to_have_text(PENNED)
    page.locator("#step-seed").fill("7")  # No step of its own for the back button.
    expect(page).to_have_url(re.compile("seed=7"))
    page.go_back()
    expect(name).to_have_text(SLIDE)
    page.go_back()
    expect(page.locator("#overview")).to_be_visible()
    expect(page.locator("#count")).to_have_text("3 slides")
    page.go_forward()
    expect(name).to_have_text(SLIDE)
    page.get_by_role("link", name="← Archive").click()
    expect(page.locator("#overview")).to_be_visible()
    expect(page.locator("#slide")).to_be_hidden()


def test_all_of_it_can_be_done_with_the_keyboard_alone(visit: Visit, manifest: Manifest) -> None:
    page = visit().open()
    expect(page.locator("#rows tr")).to_have_count(50)
    focused = page.locator(":focus")
    page.keyboard.press("Tab")
    expect(focused).to_have_text("Skip the list")
    expect(focused).to_be_in_viewport()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(focused).to_have_id("q")
    page.keyboard.type(SLIDE)
    expect(page.locator("#rows tr")).to_have_count(1)
    for _ in range(3):
        page.keyboard.press("Tab")
    expect(focused).to_have_text(SLIDE)
    assert focused.evaluate("link => getComputedStyle(link).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_contain_text("ready for training")
    for _ in range(30):
        page.keyboard.press("Tab")
        if focused.get_attribute("id") == "map":
            break
    expect(focused).to_have_id("map")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#spoken")).to_have_text(re.compile(r"^Tile \d+ · tissue"))
    first = page.locator("#spoken").text_content()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#spoken")).not_to_have_text(first or "")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#spoken")).to_have_text(first or "")
    page.keyboard.press("Enter")
    row = int(re.findall(r"\d+", first or "")[0])
    expect(page.locator("#tile-said")).to_contain_text("32 × 32 px")
    expect(page.locator("#tile-name")).to_have_text(f"Tile {row}")
    wide = page.locator("#scale-bar").text_content()
    for _ in range(4):
        page.keyboard.press("+")
    expect(page.locator("#scale-bar")).not_to_have_text(wide or "")
    page.keyboard.press("0")
    expect(page.locator("#scale-bar")).to_have_text(wide or "")
    assert row < len(manifest)


def test_every_control_has_a_name(visit: Visit) -> None:
    page = _open_slide(visit)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button, a, canvas[tabindex]")]
            .filter(one => one.checkVisibility())
            .filter(one => !(one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim()))
            .map(one => one.outerHTML)"""
    )
    assert nameless == []


def test_wheel_drag_and_buttons_zoom_and_move_the_map(visit: Visit, manifest: Manifest) -> None:
    page, row = _open_slide(visit), 30
    bar = page.locator("#scale-bar")
    told, (x, y) = bar.text_content() or "", _middle(page, manifest, row)
    _point_at(page, manifest, row)
    for _ in range(6):
        page.mouse.wheel(0, -300)
    expect(bar).not_to_have_text(told)
    page.mouse.move(0, 0)
    page.locator("#map").hover(position={"x": x, "y": y})
    expect(page.locator("#read-out")).to_have_text(
        re.compile(f"^Tile {row} ")
    )  # What was under the pointer stays there.
    box = page.locator("#map").bounding_box()
    assert box is not None
    page.mouse.down()
    page.mouse.move(box["x"] + x - 60, box["y"] + y, steps=3)
    page.mouse.up()
    expect(page.locator("#tile")).to_be_hidden()  # A drag is no click.
    page.locator("#map").hover(position={"x": x - 60, "y": y})
    expect(page.locator("#read-out")).to_have_text(re.compile(f"^Tile {row} "))
    page.get_by_role("button", name="Whole slide").click()
    expect(bar).to_have_text(told)
    for _ in range(3):
        page.get_by_role("button", name="Zoom in").click()
    expect(bar).not_to_have_text(told)
    for _ in range(3):
        page.get_by_role("button", name="Zoom out").click()
    expect(bar).to_have_text(told)


def test_attention_and_contributions_of_a_run_colour_the_tiles(visit: Visit, manifest: Manifest) -> None:
    page, last = _open_slide(visit), len(manifest) - 1
    page.locator("#colour").select_option("attention")
    expect(page.locator("#prediction")).to_contain_text("normal: 0.25 · tumour: 0.75")
    expect(page.locator("#ramp-high")).to_have_text("highest, by rank")
    _point_at(page, manifest, last)
    expect(page.locator("#read-out")).to_contain_text("attention above 100 % of tiles, contribution +1")
    _point_at(page, manifest, 0)
    expect(page.locator("#read-out")).to_contain_text("not seen by the model")
    page.mouse.move(0, 0)
    page.get_by_role("checkbox", name="Picture").uncheck()
    red, green, blue = _colour_at(page, manifest, last)
    assert red > blue + 60  # Viridis' yellow, over white.
    assert green > blue + 60
    assert _colour_at(page, manifest, 0) == [255, 255, 255]
    page.locator("#colour").select_option("contribution")
    expect(page.locator("#colour-said")).to_have_text("Contributions to: log-odds of class tumour over normal.")
    (red, _, blue), (low_red, _, low_blue) = (_colour_at(page, manifest, row) for row in (last, 1))
    assert red > blue + 60  # Orange raises, blue lowers.
    assert low_blue > low_red + 60
    expect(page).to_have_url(re.compile("run=first&colour=contribution"))
    page.get_by_role("link", name=PENNED).click()
    expect(page.locator("#slide-name")).to_have_text(PENNED)
    expect(page).to_have_url(
        re.compile("run=first&colour=contribution")
    )  # The next slide is looked at in the same way.
    expect(page.locator("#colour-said")).to_contain_text("Contributions to")


def test_values_of_an_earlier_manifest_are_not_drawn_and_it_says_so(visit: Visit) -> None:
    visitor = visit()
    page = visitor.open(f"#slide={SLIDE}&run=old")
    expect(page.locator("#colour-said")).to_contain_text(
        "Not drawn: the values of slide synth_0000 in run old belong to an earlier"
    )
    expect(page.locator("#ramp-field")).to_be_hidden()
    page.get_by_label("Run").select_option("first")
    expect(page.locator("#ramp-field")).to_be_visible()
    visitor.expect_refusal(409)


def test_a_slide_without_heatmaps_says_so_and_offers_none(visit: Visit) -> None:
    page = visit().open("#slide=synth_0001")
    expect(page.locator("#no-runs")).to_be_visible()
    expect(page.locator("#colour option[value=attention]")).to_be_disabled()
    page.locator("#colour").select_option("tissue")
    expect(page.locator("#ramp-low")).to_have_text("0 % tissue")


def test_the_token_is_asked_for_kept_for_the_visit_and_a_wrong_one_is_told(visit: Visit, guarded_address: str) -> None:
    visitor = visit(guarded_address)
    page = visitor.open("#slide=synth_0000")
    token = page.get_by_label("Token")
    expect(token).to_be_focused()
    expect(page.locator("#house")).to_be_hidden()
    token.fill("not the right one")
    page.keyboard.press("Enter")
    expect(page.locator("#door-said")).to_have_text("This token is not the right one.")
    token.fill(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_contain_text("ready for training")
    expect(page.locator("#door")).to_be_hidden()
    assert TOKEN not in page.url
    page.reload()
    expect(page.locator("#verdict")).to_contain_text("ready for training")
    assert visitor.faults
    assert all("401" in fault for fault in visitor.faults)
    visitor.faults.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_in_light_and_dark(visit: Visit, scheme: str) -> None:
    page = visit(color_scheme=scheme).open(f"#slide={SLIDE}")
    expect(page.locator("#verdict")).to_contain_text("ready for training")
    pairs = page.evaluate(
        """() => ["#slide-name", "#verdict", "#read-out", ".soft", "#rows a", "#facts dt", "#count", "label", ".failed"]
            .map(name => document.querySelector(name)).filter(Boolean).map(one => {
                let behind = one;
                while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
                return [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
            })"""
    )

    def luminance(colour: str) -> float:
        channels = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    assert len(pairs) == 9
    for words, behind in pairs:
        low, high = sorted((luminance(words), luminance(behind)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (words, behind)  # WCAG AA
    assert (luminance(pairs[0][1]) < 0.2) == (scheme == "dark")


def test_a_narrow_screen_shows_one_thing_at_a_time_and_nothing_beside_it(visit: Visit) -> None:
    page = visit(viewport={"width": 360, "height": 740}).open()
    expect(page.locator("#figures > div")).not_to_have_count(0)
    for step in ("archive", "slide"):
        wide = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], step
        if step == "archive":
            page.get_by_role("link", name=SLIDE).click()
            expect(page.locator("#verdict")).to_contain_text("ready for training")
            expect(page.locator("#list")).to_be_hidden()
            expect(page.locator("#slide-name")).to_be_focused()


def test_a_service_that_went_away_is_told(visit: Visit) -> None:
    visitor = visit()
    page = visitor.open()
    expect(page.locator("#rows tr")).to_have_count(50)
    page.route("**/v1/**", lambda route: route.abort())
    page.get_by_label("Search").fill("x")
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer")
    visitor.faults.clear()


def test_a_slide_that_is_not_there_is_told(visit: Visit) -> None:
    visitor = visit()
    page = visitor.open("#slide=nobody")
    expect(page.get_by_role("alert")).to_have_text("No slide 'nobody'.")
    visitor.expect_refusal(404)
