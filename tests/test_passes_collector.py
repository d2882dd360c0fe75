"""The garbage collector while planning: what is left out of collections, and that it is as it was afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
from ranks import forked

from passes.capture.collector import settled


class Ring:
    """An object that only a collection frees."""

    def __init__(self) -> None:
        self.mine = self


def what_is_there_is_not_collected_meanwhile_and_what_is_new_is() -> None:
    gc.collect()
    old = weakref.ref(Ring())
    before = gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()
    with settled():
        new = weakref.ref(Ring())
        gc.collect()
        assert old() is not None
        assert new() is None
    gc.collect()
    assert old() is None
    assert (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()) == before


def one_within_another_leaves_out_what_was_made_between_them_until_the_outer_ends() -> None:
    gc.collect()
    with settled():
        between = weakref.ref(Ring())
        with settled():
            gc.collect()
            assert between() is not None
        gc.collect()
        assert between() is not None
        new = weakref.ref(Ring())
        gc.collect()
        assert new() is None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert between() is None


@pytest.mark.parametrize(
    "check",
    [
        what_is_there_is_not_collected_meanwhile_and_what_is_new_is,
        one_within_another_leaves_out_what_was_made_between_them_until_the_outer_ends,
    ],
)
def test_in_a_process_without_what_other_tests_left(check: Callable[[], None]) -> None:
    """Of that, each collection would take seconds."""
    forked(check)


def test_an_error_ends_it_and_it_nests() -> None:
    with pytest.raises(KeyError), settled(), settled():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_the_user_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with settled():
            pass
        assert gc.get_freeze_count() > 0.9 * count  # some of what was frozen may be freed by its owners
    finally:
        gc.unfreeze()
