"""What the executor assumes about memory: which results may share it, which operands are done."""

from __future__ import annotations

import pytest
from tests.runtime.examples import EXAMPLES, Case
from tests.runtime.measured import allocated, large_step
from torch import Tensor

from weft.ir.module import Function, Op, Value
from weft.ir.ops import OPS
from weft.ir.types import TensorType
from weft.runtime.context import OpContext, results_of
from weft.runtime.executor import Executor
from weft.runtime.lifetimes import last_readers, may_alias


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", EXAMPLES)
def test_only_ops_that_say_so_return_the_memory_of_an_operand(name: str) -> None:
    def run(case: Case, fused: bool) -> None:
        values = case.values()
        out = results_of(case.op, OPS[name].ref(OpContext(case.op, fused=fused), *values))
        found = [memory(tensor) for tensor in out if tensor.numel()]
        assert len(set(found)) == len(found), "two results share memory"
        if not may_alias(case.op):
            assert not set(found) & {memory(tensor) for tensor in values if tensor.numel()}

    for case in EXAMPLES[name]:
        run(case, fused=False)
        run(case, fused=True)


def value(name: str) -> Value:
    return Value(name, TensorType("f32", (4,), ()))


def reduce(operand: str, result: str, later: bool = False) -> Op:
    attrs = {"axis": "x", "async": True} if later else {"axis": "x"}
    return Op("all_reduce", (value(operand),), (value(result),), attrs)


def last(*ops: Op, results: str = "z") -> set[int]:
    entry = Function("main", (value("p"),), ops, tuple(value(r) for r in results.split()))
    return {i for i in last_readers(entry) if ops[i].name == "all_reduce"}


MAKE = Op("neg", (value("p"),), (value("x"),))
READ = Op("exp", (value("x"),), (value("e"),))
VIEW = Op("reshape", (value("x"),), (value("v"),))
FREE = Op("free", (value("x"),), ())


def test_an_all_reduce_may_take_the_memory_of_what_nothing_reads_later() -> None:
    assert last(MAKE, READ, reduce("x", "z"), FREE) == {2}
    assert last(MAKE, reduce("x", "z"), READ, FREE) == set()
    assert last(reduce("p", "z")) == set()  # a parameter
    assert last(MAKE, reduce("x", "y"), FREE, results="x") == set()  # a result
    assert last(MAKE, VIEW, reduce("x", "y"), results="v") == set()  # a result looks at it
    assert last(MAKE, VIEW, reduce("v", "z")) == set()  # a view of something else


def test_a_transfer_reads_its_operand_until_its_wait() -> None:
    start = reduce("x", "h", later=True)
    wait = Op("wait", (value("h"),), (value("z"),))
    assert last(MAKE, start, wait, FREE) == {1}
    assert last(MAKE, start, READ, wait, FREE) == set()
    assert last(MAKE, start, reduce("x", "y"), wait) == set()  # the first still reads it
    assert last(MAKE, start, wait, reduce("x", "y")) == {3}


def test_the_planned_peak_is_what_a_step_allocates() -> None:
    """The plan adds what is there before the step; a semantics may need a temporary more."""
    module, inputs = large_step()
    executor = Executor(module)
    executor.run(inputs)
    before = executor.state_bytes() + sum(t.nbytes for t in inputs)
    planned, measured = executor.planned_bytes() - before, allocated(executor, inputs)
    assert 0.8 < measured / planned < 1.2
