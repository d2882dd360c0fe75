"""The HTML report is whole, self-contained and escaped, and its bars add up to the plan's numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from test_passes_plan import made

from passes.plan.plan import Plan
from passes.plan.report_html import plan_html
from passes.play.schedule import play
from passes.play.timeline import timeline_of

VOID = {"meta", "br", "link", "img", "input", "hr"}
EVIL = "<script>alert('x')</script>\"&"


class Page(HTMLParser):
    """A page's elements and text; an element closed out of turn fails."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.bars: dict[str, list[tuple[str, float, float]]] = {}
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        given = {name: value or "" for name, value in attrs}
        if tag == "svg" and given.get("class") == "bar":
            self.bars[given["aria-label"].split(":")[0]] = []
        if tag == "rect" and given.get("x", "").endswith("%"):
            start, width = (float(given[name].rstrip("%")) for name in ("x", "width"))
            self.bars[list(self.bars)[-1]].append((given["class"], start, width))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of turn in {self.open}"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@lru_cache
def with_timeline(strategy: str = "megatron", name: str = "llama") -> Plan:
    plan, space, assignment, _ = made(name, strategy)
    return replace(plan, timeline=timeline_of(play(space, assignment, events=True), 512))


@lru_cache
def page(strategy: str = "megatron", name: str = "llama") -> Page:
    plan = with_timeline() if (strategy, name) == ("megatron", "llama") else made(name, strategy)[0]
    return Page(plan_html(plan))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_everything_in_the_plan_is_in_the_page(name: str, strategy: str) -> None:
    plan, text = made(name, strategy)[0], page(strategy, name).text
    assert plan.collectives
    for pattern, placed in plan.parameters.items():
        assert pattern in text
        assert f"[{', '.join(placed.dims)}]" in text
        assert f"{placed.at_rest} → {placed.in_compute}" in text
    for each in plan.collectives:
        assert " ".join(each.reason.split()) in text
        assert each.source in text
    for words in (*plan.machine, *plan.notes, *plan.baselines, *plan.breakdown.memory_bytes, plan.fingerprint):
        assert " ".join(words.split()) in text
    for other in plan.aliases:
        assert f"{other} is tied to" in text


def test_what_is_computed_and_gathered_again_is_told() -> None:
    plan = made("llama", "fsdp")[0]
    text = Page(plan_html(replace(plan, recompute="widening"))).text
    assert "Backward computes again: pointwise ops and products that give more than they read" in text
    assert "reshard_after_forward=False" not in text
    text = Page(plan_html(replace(plan, reshard=False, regather=True, postpone=False))).text
    for told in ("reshard_after_forward=False", "regather_activations=True", "Weight gradients run at once"):
        assert told in text


def test_nothing_is_loaded_and_nothing_runs() -> None:
    found = page()
    assert not found.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for tag, name, value in found.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert value.startswith("#"), (tag, name, value)
    assert not re.search(r"https?:|url\((?!#)|@import", plan_html(with_timeline()))


def test_every_link_and_id_meets_once() -> None:
    ids = Counter(value for _, name, value in page().attributes if name == "id")
    links = [value.removeprefix("#") for _, name, value in page().attributes if name == "href"]
    assert links
    assert set(ids.values()) == {1}
    assert set(links) <= ids.keys()


def test_no_word_of_a_drawing_is_cut_off() -> None:
    page = plan_html(with_timeline())
    drawings = re.findall(r'<svg[^>]*class="plot".*?</svg>', page, re.DOTALL)
    assert len(drawings) >= 2
    for drawing in drawings:
        box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
        assert box is not None
        places = re.findall(r'<text style="[^"]*font-size: ([\d.]+)px" x="([\d.-]+)" y="([\d.-]+)"', drawing)
        assert places
        for size, x, y in (map(float, place) for place in places):
            assert 0 <= x <= float(box[1])
            assert 0.7 * size <= y <= float(box[2])


def test_names_are_escaped() -> None:
    plan = made()[0]
    placed = next(iter(plan.parameters.values()))
    hostile = replace(
        plan,
        strategy=EVIL,
        hardware=EVIL,
        machine=(EVIL,),
        notes=(EVIL,),
        example=EVIL,
        options={EVIL: EVIL},
        parameters={f"a.{EVIL}": replace(placed, names=EVIL, dims=(EVIL,)), **plan.parameters},
        collectives=tuple(replace(each, reason=EVIL, source=EVIL, module=EVIL) for each in plan.collectives),
        baselines={EVIL: replace(plan.baselines["ddp"], reason=EVIL)},
        aliases={EVIL: EVIL},
        bound=replace(plan.bound, note=EVIL),
        breakdown=replace(plan.breakdown, memory_bytes={EVIL: 1}, peak_moment=EVIL),
    )
    for text in (plan_html(hostile), hostile._repr_html_()):
        assert "script" not in Page(text).tags
        assert "<script" not in text
    assert EVIL in Page(plan_html(hostile)).text


def test_time_bars_are_the_steps_time() -> None:
    plan = made()[0]
    parts = plan.breakdown
    parts = replace(parts, hidden_s=dict.fromkeys(parts.hidden_s, plan.step_time_s / 100))
    for accumulate in (1, 4):
        step_s = accumulate * (plan.step_time_s - parts.optimizer_s) + parts.optimizer_s
        bars = Page(plan_html(replace(plan, accumulate=accumulate, step_time_s=step_s, breakdown=parts))).bars
        pieces = bars["Time per step"]
        assert pieces[0][2] == pytest.approx(100 * accumulate * parts.compute_s / step_s, abs=0.01)
        assert pieces[-1][2] == pytest.approx(100 * parts.optimizer_s / step_s, abs=0.01)
        assert sum(width for _, _, width in pieces) == pytest.approx(100, abs=0.01)
        for (_, start, width), (_, following, _) in pairwise(pieces):
            assert start + width == pytest.approx(following, abs=0.001)
        hidden_s = accumulate * sum(parts.hidden_s.values())
        assert hidden_s > 0
        hidden = sum(width for _, _, width in bars["Hidden behind compute"])
        assert hidden == pytest.approx(100 * hidden_s / step_s, abs=0.01)


@pytest.mark.parametrize(("budget_shares", "filled"), [(4.0, 25.0), (0.5, 100.0), (None, 100.0)])
def test_memory_is_drawn_against_the_budget(budget_shares: float | None, filled: float) -> None:
    plan = made()[0]
    budget = None if budget_shares is None else int(plan.peak_memory_bytes * budget_shares)
    found = Page(plan_html(replace(plan, memory_budget_bytes=budget)))
    pieces = found.bars["Memory by kind"]
    assert sum(width for _, _, width in pieces) == pytest.approx(filled, abs=0.01)
    assert found.tags["line"] == (budget is not None)
    assert ("does not fit" in found.text) == (budget_shares == 0.5)


def test_a_plan_with_next_to_nothing_in_it_has_a_page() -> None:
    plan = made()[0]
    parts = replace(plan.breakdown, exposed_s={}, hidden_s={}, memory_bytes={}, top_tensors=(), compute_by_kind={})
    bare = replace(
        plan, axes=(), roles={}, batch_axes=(), parameters={}, collectives=(), baselines={}, notes=(), breakdown=parts
    )
    text = Page(plan_html(replace(bare, peak_memory_bytes=0, step_time_s=0.0, memory_budget_bytes=None))).text
    assert "one device" in text
    assert "Collectives: none" in text
    assert "Every op has a rule" in text


def test_a_baseline_that_cannot_be_made_has_no_numbers() -> None:
    assert made()[0].baselines["fsdp"].step_time_s == math.inf
    assert "inf" not in re.findall(r"\w+", page().text)
    assert "no : no layout" in page().text


def test_many_collectives_are_folded_away_but_there() -> None:
    plan = made()[0]
    many = tuple(replace(plan.collectives[0], reason=f"reason number {i}.") for i in range(60))
    text = Page(plan_html(replace(plan, collectives=many))).text
    assert "35 more lines" in text
    assert all(f"reason number {i}." in text for i in range(60))


def test_report_writes_the_page_and_a_notebook_shows_it(tmp_path: Path) -> None:
    plan: Plan = made()[0]
    plan.report(tmp_path / "report.html")
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert written == plan_html(plan)
    assert written.startswith("<!DOCTYPE html>")
    framed = Page(plan._repr_html_())
    assert framed.tags == {"iframe": 1}
    assert ("iframe", "srcdoc", written) in framed.attributes
