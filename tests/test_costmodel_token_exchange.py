"""Tokens sent to experts: bytes counted token by token over drawn experts, and an all-to-all where each has one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from costmodel.hardware import Hardware, topology
from costmodel.presets import hardware
from costmodel.token_exchange import token_exchange_s

TOKENS, TOKEN_BYTES = 4000, 4096
SLOW = 1e6
"""Bytes per second: so slow that a link's bytes are all that counts."""


def _with_links(inside: float, across: float) -> Hardware:
    found = hardware("h100")
    return replace(
        found,
        intra_node=replace(found.intra_node, bytes_per_s=inside),
        inter_node=replace(found.inter_node, bytes_per_s=across),
    )


def _counted(ranks: int, experts: int, node: int = 8) -> tuple[float, float]:
    """Bytes that leave rank 0's node, and that go on inside nodes, of tokens whose experts lie on drawn ranks."""
    drawn = random.Random(ranks * 31 + experts)
    across = inside = 0
    for _ in range(TOKENS):
        homes = {drawn.randrange(ranks) for _ in range(experts)}
        across += len({home // node for home in homes} - {0})
        inside += sum(home % node != 0 for home in homes)  # the rank of the same place has it from the network
    return across * TOKEN_BYTES, inside * TOKEN_BYTES


@pytest.mark.parametrize(("ranks", "experts"), [(8, 2), (8, 8), (16, 2), (32, 8), (64, 8), (64, 1)])
def test_bytes_are_those_of_drawn_experts(ranks: int, experts: int) -> None:
    across, inside = _counted(ranks, experts)
    size = float(TOKENS * TOKEN_BYTES)
    for links, counted in (((SLOW, 1e15), inside), ((1e15, SLOW), across)):
        mesh = topology(_with_links(*links), {"ep": ranks})
        assert token_exchange_s(size, experts, (0,), mesh) == pytest.approx(counted / SLOW, rel=0.03, abs=1e-3)


@pytest.mark.parametrize(("ranks", "experts"), [(8, 2), (8, 8), (32, 8), (64, 4)])
def test_sent_for_each_expert_a_token_goes_as_often_as_it_has_experts(ranks: int, experts: int) -> None:
    """Rank 0's rows of drawn experts: those that leave its node, and those that go to others in it."""
    drawn = random.Random(ranks * 31 + experts)
    homes = [drawn.randrange(ranks) for _ in range(TOKENS * experts)]
    across, inside = sum(home >= 8 for home in homes), sum(0 < home < 8 for home in homes)
    size = float(TOKENS * TOKEN_BYTES)
    for links, counted in (((SLOW, 1e15), inside), ((1e15, SLOW), across)):
        mesh = topology(_with_links(*links), {"ep": ranks})
        taken_s = token_exchange_s(size, experts, (0,), mesh, each=True)
        assert taken_s == pytest.approx(counted * TOKEN_BYTES / SLOW, rel=0.05, abs=1e-3)


def test_of_one_expert_both_ways_are_the_same() -> None:
    for ranks in (4, 8, 32):
        mesh = topology(hardware("h100"), {"ep": ranks})
        once_s, each_s = (token_exchange_s(1e9, 1, (0,), mesh, each=each) for each in (False, True))
        assert once_s == pytest.approx(each_s, rel=0.2)  # on several nodes, sent once, all of it goes on inside


def test_one_rank_sends_nothing() -> None:
    assert token_exchange_s(1e9, 8, (0,), topology(hardware("h100"), {"ep": 1, "dp": 8})) == 0.0


def test_more_experts_of_a_token_cross_the_network_no_oftener_than_there_are_nodes() -> None:
    """Two nodes: at most once, however many experts a token has."""
    mesh = topology(_with_links(1e15, SLOW), {"ep": 16})
    assert token_exchange_s(1e6, 1, (0,), mesh) == pytest.approx(0.5, rel=1e-3)
    assert token_exchange_s(1e6, 64, (0,), mesh) == pytest.approx(1.0, rel=1e-3)


def test_starts_are_those_of_both_links() -> None:
    machine = _with_links(1e15, 1e15)
    intra, inter = machine.intra_node, machine.inter_node
    inside_s = intra.base_s + 8 * intra.latency_s
    assert token_exchange_s(0.0, 8, (0,), topology(machine, {"ep": 8})) == pytest.approx(inside_s)
    across_s = inside_s + inter.base_s + inter.latency_s
    assert token_exchange_s(0.0, 8, (0,), topology(machine, {"ep": 16})) == pytest.approx(across_s)
