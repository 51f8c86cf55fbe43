"""The static check of all ranks' schedules: no false alarm, and every mutation is caught."""

from __future__ import annotations

from random import Random

import pytest
from tests.runtime.random_schedules import (
    MESHES,
    MUTATIONS,
    Programs,
    swap_equal_all_reduces,
    valid,
    with_twin,
)
from tests.runtime.schedules import TRAIN_STEP, random_schedule

from weft.ir.errors import RunError
from weft.ir.module import Function, Op, Value
from weft.ir.parser import parse_module
from weft.ir.types import B, Mesh, TensorType
from weft.runtime.schedule_check import check


def test_no_false_alarm_on_a_thousand_random_valid_schedules() -> None:
    for seed in range(1000):
        check(*valid(seed))


def test_schedules_that_the_passes_make_are_valid() -> None:
    for seed in range(40):
        check(random_schedule(seed, MESHES[seed % len(MESHES)]).schedule)


# -- mutations of one rank's program ----------------------------------------------------------------


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_caught(name: str) -> None:
    mutate, caught, seed = MUTATIONS[name], 0, 0
    while caught < 60:
        programs, mesh = valid(seed)
        rng = Random(seed)
        rank = rng.randrange(len(programs))
        mutant = mutate(rng, programs[rank], len(programs))
        seed += 1
        assert seed < 4000, "too few schedules have what this mutation needs"
        if mutant is None or mutant == programs[rank]:
            continue
        with pytest.raises(RunError) as error:
            check({**programs, rank: mutant}, mesh)
        assert error.value.code == "W0802", f"seed {seed - 1}"
        assert "rank" in str(error.value), f"seed {seed - 1}"
        caught += 1


def test_swapped_equal_all_reduces_are_caught() -> None:
    caught = 0
    for seed in range(200):
        programs, mesh = valid(seed)
        function = programs[0]
        one, two = with_twin(Random(seed), function, 0), swap_equal_all_reduces(
            Random(seed), function, 0)  # fmt: skip
        if one is None or two is None:
            continue
        programs = {r: one if f is function else f for r, f in programs.items()}
        check(programs, mesh)
        with pytest.raises(RunError, match="differ in collective"):
            check({**programs, 0: two}, mesh)
        caught += 1
    assert caught > 30


# -- deadlocks ------------------------------------------------------------------------------------


def tensor(name: str, rank: int = 1) -> Value:
    return Value(name, TensorType("f32", (4,), (B,) * rank))


def function(*ops: Op, rank: int = 1) -> Function:
    return Function("main", (tensor("x", rank),), ops, ())


def send(to: int, tag: int = 0, later: bool = False) -> Op:
    attrs = {"to": to, "tag": tag, **({"async": True} if later else {})}
    return Op("send", (tensor("x"),), (tensor(f"s{tag}"),), attrs)


def recv(source: int, tag: int = 0) -> Op:
    return Op("recv", (), (tensor(f"r{tag}"),), {"source": source, "tag": tag})


PAIR = Mesh((("x", 1),))


def test_two_ranks_that_both_send_first_deadlock() -> None:
    """
    rank 0: send(1) ... recv(1)
    rank 1: send(0) ... recv(0)      each send waits for a receive that comes after it
    """
    programs = {0: function(send(1), recv(1)), 1: function(send(0), recv(0))}
    with pytest.raises(RunError, match="deadlock") as error:
        check(programs, PAIR)
    assert "rank 0" in error.value.reason and "rank 1" in error.value.reason


def test_asynchronous_sends_let_both_receive() -> None:
    wait = Op("wait", (tensor("s0"),), ())
    programs = {0: function(send(1, later=True), recv(1), wait),
                1: function(send(0, later=True), recv(0), wait)}  # fmt: skip
    check(programs, PAIR)


def test_collectives_of_two_groups_in_opposite_orders_deadlock() -> None:
    mesh = Mesh((("x", 2), ("y", 2)))

    def reduce(axis: str) -> Op:
        return Op("all_reduce", (tensor("x", 2),), (tensor(f"r{axis}", 2),), {"axis": axis})

    one = function(reduce("x"), reduce("y"), rank=2)
    two = function(reduce("y"), reduce("x"), rank=2)
    check(dict.fromkeys(range(4), one), mesh)
    with pytest.raises(RunError, match="deadlock"):
        check({0: one, 1: two, 2: two, 3: one}, mesh)
    # one rank alone in the other order: x of (1, 3), y of (0, 1), x of (0, 2), y of (2, 3)
    check({0: two, 1: one, 2: one, 3: one}, mesh)


def test_a_cycle_through_three_stages_is_found() -> None:
    programs = {i: function(send((i + 1) % 3, i), recv((i + 2) % 3, (i + 2) % 3)) for i in range(3)}
    with pytest.raises(RunError, match="deadlock") as error:
        check(programs, PAIR)
    assert all(f"rank {i}" in error.value.reason for i in range(3))
    programs[0] = function(*programs[0].ops[::-1])
    check(programs, PAIR)


def interleaved(rng: Random, ranks: int) -> tuple[Programs, list[list[tuple[int, int, int]]]]:
    """Random blocking messages between stages; each rank's order is random, each channel's is not.

    Returns the programs and, for each rank, its (source, target, tag) in order.
    """
    pairs = [rng.sample(range(ranks), 2) for _ in range(rng.randint(2, 6))]
    messages = [(a, b, tag) for tag, (a, b) in enumerate(pairs)]
    orders = []
    for rank in range(ranks):
        mine = [message for message in messages if rank in message[:2]]
        mixed = rng.sample(mine, len(mine))
        queues = {m[:2]: [n for n in mine if n[:2] == m[:2]] for m in mine}
        orders.append([queues[message[:2]].pop(0) for message in mixed])
    programs = {
        rank: function(*(send(b, tag) if a == rank else recv(a, tag) for a, b, tag in order))
        for rank, order in enumerate(orders)
    }
    return programs, orders


def ends(orders: list[list[tuple[int, int, int]]]) -> bool:
    """Run blocking messages: each happens when both sides have come to it."""
    left = [list(order) for order in orders]
    moved = True
    while moved:
        moved = False
        for order in left:
            if order and all(left[side][:1] == order[:1] for side in order[0][:2]):
                source, target, _ = order[0]
                left[source].pop(0)
                left[target].pop(0)
                moved = True
    return not any(left)


def test_a_deadlock_is_reported_exactly_when_running_the_messages_gets_stuck() -> None:
    stuck = 0
    for seed in range(500):
        programs, orders = interleaved(Random(seed), 3 + seed % 2)
        if ends(orders):
            check(programs, PAIR)
        else:
            stuck += 1
            with pytest.raises(RunError, match="deadlock"):
                check(programs, PAIR)
    assert 50 < stuck < 450


# -- messages and scale ---------------------------------------------------------------------------


def test_the_message_names_ranks_action_and_the_users_line() -> None:
    module = parse_module(TRAIN_STEP)
    other = parse_module(TRAIN_STEP.replace('"dp", dim = 0, async', '"dp", dim = 1, async'))
    with pytest.raises(RunError) as error:
        check({0: module.entry, 1: module.entry, 2: other.entry, 3: module.entry}, module.mesh)
    text = str(error.value)
    assert "ranks 0 and 2" in text and "dim 0 against 1" in text
    assert "reduce_scatter(%g)" in text and "model.linear (train.py:12)" in text


def test_one_rank_of_ten_thousand_that_differs_is_found() -> None:
    mesh = Mesh((("dp", 100), ("pp", 10), ("tp", 10)))
    ops = tuple(
        Op("all_reduce", (tensor("x", 3),), (tensor(f"r{i}", 3),), {"axis": mesh.names[i % 3]})
        for i in range(2000)
    )
    program = function(*ops, rank=3)
    check(dict.fromkeys(range(mesh.size), program), mesh)
    odd = program.with_(ops=ops[:-1])
    with pytest.raises(RunError, match="rank .*9876"):
        check({**dict.fromkeys(range(mesh.size), program), 9876: odd}, mesh)


def test_a_rank_without_a_program_is_refused() -> None:
    with pytest.raises(RunError, match="W0802"):
        check({0: function(), 1: function(), 2: function()}, Mesh((("x", 2),)))
