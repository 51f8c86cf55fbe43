"""The report page: complete in itself, small, and true to the plan."""

from __future__ import annotations

import base64
import gzip
import json
import re
import xml.etree.ElementTree as ET
from functools import cache
from typing import Any

from tests.frontend.targets import net

import weft
from weft.costmodel.cluster import parse_cluster
from weft.costmodel.simulate import Timeline
from weft.frontend.options import OPTIONS
from weft.frontend.plan import Plan
from weft.frontend.report import Dump, render_report
from weft.frontend.report_svg import memory_svg, timeline_svg
from weft.ir.parser import parse_module
from weft.ir.text import print_module

PIPELINE = "simplify,outline,differentiate,simplify,random-place[mesh=2x2 seed=3],lower,fuse,schedule"


@cache
def plan() -> Plan:
    """Blocks trained on 2 x 2 ranks, placed at random."""
    model, (x,), _ = net()
    options = OPTIONS.with_({"pipeline": PIPELINE})
    made: Plan = weft.plan(model, (x,), cluster="2x2:cpu", optimizer="adamw", options=options)
    return made


@cache
def page() -> str:
    return plan().report()


def unpacked(text: str) -> Any:
    found = re.search(r'<script id="packed" type="text/plain">([^<]*)</script>', text)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_the_page_needs_nothing_from_outside() -> None:
    assert not re.search(r'(?:src|href)="(?!#)', page())
    assert "http" not in page().replace("http-equiv", "")
    assert len(page()) < 3_000_000 and page().rstrip().endswith("</html>")


def test_every_link_of_the_page_leads_somewhere() -> None:
    for target in re.findall(r'href="#(\w+)"', page()):
        assert f'id="{target}"' in page()


def test_the_page_holds_every_dump_whole() -> None:
    dumps = unpacked(page())["dumps"]
    assert [d["name"] for d in dumps] == [d.name for d in plan().dumps]
    for shown, dump in zip(dumps, plan().dumps, strict=True):
        assert shown["text"] == print_module(dump.module)


def test_the_history_of_a_block_goes_through_all_levels() -> None:
    data = unpacked(page())
    for dump in data["dumps"]:
        paths = {data["paths"][op[0]] for op in dump["ops"]}
        assert "blocks.2" in paths, dump["name"]


def test_parameters_and_collectives_are_on_the_page() -> None:
    for word in ("blocks.3.weight", "exp_avg/blocks.0.weight", "rank 3", "all_gather", "Replicated"):
        assert word in page()


def test_a_large_program_is_cut_to_a_page_that_opens() -> None:
    lines = "".join(f"  %v{i} = exp(%x) : f32[{i + 8}]{{B}}\n" for i in range(4000))
    text = f'weft 1 spmd\nmesh [a=2] "cpu"\n\nfunc @main(%x: f32[8]{{B}}) -> (f32[8]{{B}}) {{\n{lines}  return %x\n}}\n'
    module = parse_module(text)
    dumps = [Dump(f"pass{i}", module) for i in range(40)]
    shown = render_report("t", "s", [], dumps, Timeline(), parse_cluster("1x2:cpu"))
    assert len(shown) < 3_000_000
    assert len(unpacked(shown)["dumps"]) == 40


def test_names_from_the_program_cannot_change_the_page() -> None:
    text = """weft 1 spmd
mesh [a=2] "cpu"

func @main(%x: f32[8]{B} {role = "param", name = "</script><b>x"}) -> (f32[8]{B}) {
  return %x
}
"""
    dumps = [Dump("trace", parse_module(text))]
    timeline = Timeline([("compute", "<b>", "</script>", 0.0, 1.0)], 1.0)
    timeline.memory = [(0.0, 1)]
    shown = render_report("<b>t", "s", [], dumps, timeline, parse_cluster("1x2:cpu"))
    assert "</script><b>" not in shown and "<b>t" not in shown


def test_pictures_are_well_formed_and_cover_the_step() -> None:
    timeline = plan().timeline
    picture, tracks = timeline_svg(timeline)
    boxes = ET.fromstring(picture)
    assert [t.name for t in tracks][0] == "compute" and len(boxes) == len(timeline.slices)
    for box in boxes:
        assert 0 <= float(box.attrib["x"]) <= 1000
    memory = ET.fromstring(memory_svg(timeline, 10))
    assert memory.attrib["class"] == "memory"


def test_many_slices_become_few_boxes() -> None:
    slices = [("compute", "einsum", "m", float(i), 1.0) for i in range(50_000)]
    picture, _ = timeline_svg(Timeline(slices, 50_000.0))
    boxes = list(ET.fromstring(picture))
    assert len(boxes) <= 4000
    assert sum(float(b.attrib["width"]) for b in boxes) > 990
