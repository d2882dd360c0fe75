"""Tables: never wider than asked, nothing of a cell lost that can be broken, rows that can be told apart."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.plan.tables import broken, text_rows, text_table

WORDS = st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=12).map(" ".join)


@given(st.lists(st.tuples(WORDS, WORDS, st.integers(0, 10**6).map(str)), min_size=1, max_size=6), st.integers(40, 120))
def test_a_table_fits_and_keeps_every_word(rows: list[tuple[str, str, str]], width: int) -> None:
    head, bodies = text_rows(rows, ["one", "two", "number"], width, shrink=[0, 1], right=[2])
    lines = [*head, *(line for body in bodies for line in body)]
    assert max(map(len, lines)) <= width
    assert len(bodies) == len(rows)
    for row, body in zip(rows, bodies, strict=True):
        assert sorted(" ".join(body).split()) == sorted(" ".join(row).split())
        assert body[0].endswith(row[2])


def test_columns_that_fit_are_left_as_they_are() -> None:
    lines = text_table([["a b", "1"], ["c", "22"]], ["name", "n"], 80, right=[1])
    assert lines == ["  name   n", "  ----  --", "  a b    1", "  c     22"]


def test_columns_that_give_way_last_do_so_where_the_others_are_not_enough() -> None:
    row, headers = ["reduce_scatter", "first second third", "12"], ["what", "of", "n"]
    assert text_table([row], headers, 32, shrink=[1], last=[0])[2:] == [
        "  reduce_scatter  first   12",
        "                  second",
        "                  third",
    ]
    assert max(map(len, text_table([row], headers, 26, shrink=[1], last=[0]))) <= 26
    assert max(map(len, text_table([row], headers, 26, shrink=[1]))) > 26


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("matmul 176 us, attention 22.5 us, other 78 us", 34, ["matmul 176 us, attention 22.5 us,", "other 78 us"]),
        ("gradients blocks.*", 10, ["gradients", "blocks.*"]),
        ("model.layers.*.self_attn.q_proj", 18, ["model.layers.*", "  .self_attn", "  .q_proj"]),
        ("incomprehensible", 10, ["inc~nsible"]),
        ("short", 10, ["short"]),
        ("shard,tp", 7, ["shard,", "  tp"]),
    ],
)
def test_where_a_cell_is_broken(text: str, width: int, lines: list[str]) -> None:
    assert broken(text, width) == lines


@given(st.from_regex(r"[a-z]{1,9}([._][a-z0-9]{1,9}){0,8}", fullmatch=True), st.integers(12, 30))
def test_a_name_is_never_cut(name: str, width: int) -> None:
    lines = broken(name, width)
    assert max(map(len, lines)) <= width
    assert re.sub(r"\n +", "", "\n".join(lines)) == name
