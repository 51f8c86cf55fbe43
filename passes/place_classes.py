"""Variables of a cost network that look alike: classes that share messages (`place_bound`).

Colour refinement (Weisfeiler and Leman, 1968): variables have one colour if their costs are the same
object, and, step by step, if the same edges lead to neighbours of one colour.

A deep model is a chain of layers, of which those near its ends differ from the others. Where classes
part in the midst of a layer, dozens of edges lead from one class to a variable that a message of
another class is meant for, and the bound is lost there. So layers are told apart as wholes: a *unit*
is the blocks (calls) that belong together, such as forward, backward and update of one layer, and
what touches no other unit. Units differ if any of their variables do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from itertools import combinations

from .place_network import Network

#: a variable that touches more blocks than this says nothing about which of them belong together
_SHARED = 4

Colours = Mapping[int, int]  #: of each variable


def classes(network: Network, radius: int) -> tuple[Colours, Colours]:
    """A class for each variable, and the coarser classes of one step less.

    Args:
        radius: edges within which variables must look alike to form a class.
    """
    units = units_of(network)
    colour = _numbered({v: _own(network, v) for v in network.unary})
    before = colour
    for _ in range(radius):
        before, colour = colour, _whole(_step(network, colour), units)
        if len(set(colour.values())) == len(set(before.values())):
            break
    # between units, what leads to units that differ differs
    refined = _step(network, colour)
    last = {v: (c, -1 if v in units else refined[v]) for v, c in colour.items()}
    return _numbered(last), before


def _own(network: Network, variable: int) -> tuple[int, ...]:
    """The costs of a variable and, in a block, its position there."""
    costs = id(network.unary[variable])
    if variable not in network.blocks:
        return (costs,)
    first, kind = network.blocks[variable]
    return costs, id(kind), variable - first


def _step(network: Network, colour: Colours) -> dict[int, int]:
    return _numbered({
        v: (colour[v], *sorted([(table.number, colour[u]) for u, table in row.items()]))
        for v, row in network.near.items()
    })  # fmt: skip


def _whole(colour: Colours, units: Colours) -> dict[int, int]:
    """Colours that differ in two units where any colour does."""
    members: dict[int, list[int]] = {}
    for v, c in colour.items():
        if v in units:
            members.setdefault(units[v], []).append(c)
    kinds = _numbered({unit: tuple(sorted(row)) for unit, row in members.items()})
    return _numbered({
        v: (c, kinds[units[v]] if v in units else -1) for v, c in colour.items()
    })  # fmt: skip


def _numbered(keys: Mapping[int, Hashable]) -> dict[int, int]:
    table: dict[Hashable, int] = {}
    return {v: table.setdefault(key, len(table)) for v, key in keys.items()}


def units_of(network: Network) -> Colours:
    """The unit of each variable that belongs to one; found once for a network and its clones.

    Blocks are joined by falling number of edges between them, direct or through one variable
    outside of blocks, never two of one kind.
    """
    if network.units is None:
        network.units = _units(network)
    return network.units


def _units(network: Network) -> dict[int, int]:
    block = {v: network.blocks[v][0] for v in network.unary if v in network.blocks}
    kinds = {number: {id(kind)} for number, kind in network.blocks.values()}
    first = {number: number for number in kinds}

    def find(number: int) -> int:
        while first[number] != number:
            number = first[number]
        return number

    links = _links(network, block)
    for left, right in sorted(links, key=lambda pair: (-links[pair], pair)):
        a, b = find(left), find(right)
        if a != b and kinds[a].isdisjoint(kinds[b]):
            first[b] = a
            kinds[a] |= kinds[b]
    units = {v: find(number) for v, number in block.items()}
    while True:
        more = {}
        for v, row in network.near.items():
            near = {units[u] for u in row if u in units} if v not in units else ()
            if len(near) == 1:
                (more[v],) = near
        if not more:
            return units
        units |= more


def _links(network: Network, block: Mapping[int, int]) -> Counter[tuple[int, int]]:
    """How many ways lead from one block to another, the earlier one first."""
    links: Counter[tuple[int, int]] = Counter()
    for v, row in network.near.items():
        beside = {block[u] for u in row if u in block}
        if v in block:
            links.update((block[v], other) for other in beside if other > block[v])
        elif len(beside) <= _SHARED:
            links.update(combinations(sorted(beside), 2))
    return links


def ports(
    network: Network, colour: Colours, before: Colours
) -> dict[tuple[int, int], tuple[int, int]]:
    """A key for each (variable, neighbour); edges of a variable that are alike have the same.

    All variables of a class have the same keys: by the classes of their neighbours if they have
    these in common, else by the coarser classes.
    """
    common: dict[int, list[tuple[int, int]]] = {}
    mixed = set()
    for v, row in network.near.items():
        fine = sorted([(table.number, colour[u]) for u, table in row.items()])
        if common.setdefault(colour[v], fine) != fine:
            mixed.add(colour[v])
    return {
        (v, u): (table.number, before[u] if colour[v] in mixed else colour[u])
        for v, row in network.near.items()
        for u, table in row.items()
    }
