"""Memory: bytes at rest by hand, and the peak against a moment-by-moment count."""

from __future__ import annotations

import random

import pytest

from costmodel.memory import OPTIMIZERS, AtRest, Buffer, OptimizerSpec, at_rest, gib, optimizer, peak, rounded, timeline


def test_adamw_in_fp32_keeps_sixteen_bytes() -> None:
    """4 parameter + 4 gradient + 8 states, on a rank's 1024 x 512 part."""
    count = 1024 * 512
    rest = at_rest((1024, 512), "adamw")
    assert rest == AtRest(4 * count, 4 * count, 8 * count, 0)
    assert rest.total == 16 * count


def test_megatron_mixed_precision_keeps_eighteen_bytes() -> None:
    """bf16 parameter, fp32 gradient, fp32 master copy, two fp32 states."""
    rest = at_rest((1000,), "adamw-master", item_bytes=2, gradient_item_bytes=4)
    assert rest.by_kind() == {"parameters": 2000, "gradients": 4000, "optimizer": 8000, "master": 4000}
    assert (rest.states, rest.total) == (12000, 18000)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_megatrons_distributed_optimizer_keeps_six_and_twelve_shared(ranks: int) -> None:
    """Parameter and gradient whole on every rank, master copy and states split: 6 + 12/d bytes per parameter."""
    whole = at_rest((1024,), "adamw-master", item_bytes=2, gradient_item_bytes=4)
    share = at_rest((1024 // ranks,), "adamw-master", item_bytes=2, gradient_item_bytes=4)
    found = whole.parameters + whole.gradients + share.optimizer + share.master
    assert found == 1024 * (6 + 12 / ranks)


@pytest.mark.parametrize(
    ("name", "bytes_per_param"), [("sgd", 0), ("momentum", 4), ("adamw-bf16", 4), ("adamw-8bit", 2), ("lion", 4)]
)
def test_optimizer_states(name: str, bytes_per_param: int) -> None:
    assert at_rest((10, 10), name).optimizer == 100 * bytes_per_param


def test_adafactor_keeps_rows_and_columns() -> None:
    """4096 x 1024: 5120 fp32 values; a stack of 8 such: 8 times; a vector: one value each."""
    assert at_rest((4096, 1024), "adafactor").optimizer == 4 * (4096 + 1024)
    assert at_rest((8, 4096, 1024), "adafactor").optimizer == 8 * 4 * (4096 + 1024)
    assert at_rest((4096,), "adafactor").optimizer == 4 * 4096


def test_a_frozen_parameter_keeps_itself_only() -> None:
    assert at_rest((10, 10), "adamw", trainable=False) == AtRest(400, 0, 0, 0)


def test_parts_add_up() -> None:
    assert at_rest((10,)) + at_rest((20,)) == at_rest((30,))


def test_own_and_unknown_optimizers() -> None:
    mine = OptimizerSpec("mine", 12)
    assert optimizer(mine) is mine
    assert at_rest((10,), mine).optimizer == 120
    with pytest.raises(ValueError, match="unknown optimizer 'adamm'; known are adamw"):
        optimizer("adamm")
    assert optimizer("AdamW") is OPTIMIZERS["adamw"]


def test_peak_by_hand() -> None:
    """b's input a is still alive when b is born; c comes after a is gone."""
    weight = Buffer("w", 100, 0, None, "parameters")
    a, b, c = Buffer("a", 50, 1, 2, "saved"), Buffer("b", 70, 2, 4, "saved"), Buffer("c", 40, 3, 4, "transient")
    found = peak([weight, a, b, c], top=2)
    assert timeline([weight, a, b, c]) == [(0, 100), (1, 150), (2, 220), (3, 210)]
    assert (found.bytes, found.moment) == (220, 2)
    assert found.by_kind == {"parameters": 100, "saved": 120}
    assert found.top == (weight, b)
    assert found.describe()[0] == "peak 220 B at 2"
    sooner = [x._replace(birth=x.birth / 8, death=x.death and x.death / 8) for x in (weight, a, b, c)]
    assert timeline(sooner) == [(0, 100), (0.125, 150), (0.25, 220), (0.375, 210)]


@pytest.mark.parametrize("seed", range(25))
def test_peak_matches_a_count_at_every_moment(seed: int) -> None:
    draw = random.Random(seed)
    buffers = []
    for index in range(draw.randrange(1, 60)):
        birth = draw.randrange(40)
        death = None if draw.random() < 0.2 else birth + draw.randrange(15)
        kind, count = draw.choice(["saved", "logits"]), draw.choice([1, 1, 1, 4])
        buffers.append(Buffer(f"t{index}", draw.randrange(1, 5000), birth, death, kind, count))

    def alive(moment: int) -> list[Buffer]:
        return [x for x in buffers if x.birth <= moment and (x.death is None or moment <= x.death)]

    def size(moment: int) -> int:
        return sum(-(-x.bytes // 512) * 512 * x.copies for x in alive(moment))

    best = max(range(60), key=size)
    found = peak(buffers, granularity_bytes=512, top=3)
    assert found.bytes == size(best) == size(int(found.moment))
    assert sum(found.by_kind.values()) == found.bytes
    sizes = sorted((x.bytes * x.copies for x in alive(int(found.moment))), reverse=True)
    assert [x.bytes * x.copies for x in found.top] == sizes[:3]


def test_nothing_alive_has_no_peak() -> None:
    assert peak([]).bytes == 0


@pytest.mark.parametrize("bad", [Buffer("x", -1, 0, None, "saved"), Buffer("x", 1, 5, 4, "saved")])
def test_impossible_buffers_are_refused(bad: Buffer) -> None:
    with pytest.raises(ValueError, match="buffer 'x'"):
        peak([bad])


def test_sizes_as_people_read_them() -> None:
    assert [gib(3 << 29), gib(3 << 19), gib(2048), gib(17)] == ["1.50 GiB", "1.50 MiB", "2.00 KiB", "17 B"]
    assert [rounded(1), rounded(512), rounded(513), rounded(0)] == [512, 512, 1024, 0]
