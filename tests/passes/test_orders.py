"""Pipeline schedules against their closed forms."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.ir.errors import CompileError
from weft.passes.orders import (
    BACKWARD,
    FORWARD,
    ORDERS,
    Order,
    forward_only,
    gpipe,
    in_flight,
    interleaved,
    one_f_one_b,
    orders_of,
)

counts = st.integers(1, 9)


def slots(orders: tuple[Order, ...], chunks: int) -> int:
    """Time of all orders when a forward and a backward of a chunk take one slot each and a stage
    begins as soon as it can; fails where the stages wait for each other."""
    stages = len(orders)
    end: dict[tuple[str, int, int], int] = {}
    place, free = [0] * stages, [0] * stages
    left = sum(map(len, orders))
    while left:
        before = left
        for stage, order in enumerate(orders):
            while place[stage] < len(order):
                phase, micro, chunk = order[place[stage]]
                part = chunk * stages + stage
                last = part == stages * chunks - 1
                needs = (FORWARD, micro, part - 1) if phase == FORWARD else (BACKWARD, micro, part + 1)
                if phase == BACKWARD and last:
                    needs = (FORWARD, micro, part)
                first = phase == FORWARD and part == 0
                if not first and needs not in end:
                    break
                start = max(free[stage], 0 if first else end[needs])
                end[phase, micro, part] = free[stage] = start + 1
                place[stage] += 1
                left -= 1
        assert left < before, "the stages wait for each other"
    return max(free)


@settings(max_examples=60, deadline=None)
@given(stages=counts, micro=counts, chunks=st.integers(1, 4))
def test_each_stage_computes_each_part_once_and_all_come_to_an_end(
    stages: int, micro: int, chunks: int
) -> None:
    wanted = Counter((p, k, c) for p in (FORWARD, BACKWARD) for k in range(micro) for c in range(chunks))
    for name in ORDERS:
        if name == "1f1b" and chunks > 1:
            continue
        orders = orders_of(name, stages, micro, chunks)
        assert len(orders) == stages
        assert all(Counter(map(tuple, order)) == wanted for order in orders)
        slots(orders, chunks)


@settings(max_examples=40, deadline=None)
@given(stages=counts, micro=counts)
def test_in_flight_and_time_are_those_of_the_closed_forms(stages: int, micro: int) -> None:
    for orders in (gpipe(stages, micro), one_f_one_b(stages, micro)):
        # the bubble of both is (p - 1) forwards and backwards
        assert slots(orders, 1) == 2 * (micro + stages - 1)
    assert [in_flight(order) for order in gpipe(stages, micro)] == [micro] * stages
    assert [in_flight(order) for order in one_f_one_b(stages, micro)] == [
        min(micro, stages - stage) for stage in range(stages)
    ]


@settings(max_examples=40, deadline=None)
@given(stages=st.integers(2, 6), groups=st.integers(1, 3), chunks=st.integers(2, 4))
def test_virtual_stages_divide_the_bubble(stages: int, groups: int, chunks: int) -> None:
    micro = groups * stages
    orders = interleaved(stages, micro, chunks)
    # Megatron-LM: the bubble is (p - 1) slots of each kind, of 1 / chunks of a stage's time
    assert slots(orders, chunks) == 2 * (micro * chunks + stages - 1)
    assert [in_flight(order) for order in orders] == [
        min(micro * chunks, 2 * (stages - 1 - stage) + (chunks - 1) * stages + 1)
        for stage in range(stages)
    ]


def test_programs_without_a_backward_have_forwards_only() -> None:
    assert {slot.phase for order in forward_only(gpipe(2, 3)) for slot in order} == {FORWARD}


@pytest.mark.parametrize(("name", "code"), [("zigzag", "W1001"), ("1f1b", "W0404")])
def test_unknown_schedules_are_refused(name: str, code: str) -> None:
    with pytest.raises(CompileError) as caught:
        orders_of(name, 2, 4, 2)
    assert caught.value.code == code and caught.value.hint
