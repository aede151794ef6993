"""Slides that share a patient, a specimen or a file, through however many others, stay together."""

import random

from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from trainer.splits.grouping import group_slides

Row = tuple[dict[str, str], str]


def rows_of(links: list[tuple[int, int, int]]) -> list[Row]:
    """A row for each (patient, specimen, file)."""
    return [
        ({"slide_id": f"s{i}", "patient_id": f"p{patient}", "specimen_id": f"sp{specimen}"}, f"f{file}")
        for i, (patient, specimen, file) in enumerate(links)
    ]


def test_a_chain_of_copies_is_one_group() -> None:
    """Patient 5 shares a file with 4, 4 with 3, and so on; each link comes after the one before."""
    links = [(5, 0), (4, 0), (4, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3)]
    groups = group_slides(rows_of([(patient, i, file) for i, (patient, file) in enumerate(links)]))
    assert set(groups.values()) == {"0 patient p1"}


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 14), st.integers(0, 14)), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
)
def test_groups_are_the_connected_slides_in_any_order(
    links: list[tuple[int, int, int]], shuffler: random.Random
) -> None:
    rows = rows_of(links)
    shuffled = rows.copy()
    shuffler.shuffle(shuffled)
    groups = group_slides(rows)
    assert groups == group_slides(shuffled)
    # Slides and what they name are the nodes of a graph; scipy finds its parts.
    ends = [(i, offset + link[j]) for i, link in enumerate(links) for j, offset in enumerate((40, 60, 80))]
    from_, to = zip(*ends, strict=True)
    _, part = connected_components(coo_array(([1] * len(ends), (from_, to)), shape=(100, 100)), directed=False)
    for i in range(len(links)):
        together = {f"s{j}" for j in range(len(links)) if part[j] == part[i]}
        assert {slide_id for slide_id, group in groups.items() if group == groups[f"s{i}"]} == together
        assert groups[f"s{i}"] == min(f"0 patient p{links[j][0]}" for j in range(len(links)) if part[j] == part[i])
