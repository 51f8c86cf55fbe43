"""Learned kernel times: positive, never falling, the same everywhere, and clear about bad queries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weft.costmodel
from weft.costmodel.datasheet import datasheets, find_datasheet, read_device_file
from weft.costmodel.kernel_context import Context
from weft.costmodel.kernel_estimate import Kernel, estimate, estimate_all
from weft.costmodel.kernel_formats import format_of
from weft.costmodel.kernel_interval import quantile_pair
from weft.costmodel.kernel_model import kernel_times, read_model, shipped
from weft.costmodel.kernel_query import Batch
from weft.ir.errors import CompileError

DEVICES = ("H100-SXM5-80GB", "H200-SXM-141GB", "L40S", "RTX-PRO-6000-Server", "V100-PCIE-16GB", "T4",
           "MI300X", "P4", "cpu")  # fmt: skip
#: (op, dtype, impl, timing) of the measurements, and one of no measurement
WAYS = (
    ("gemm", "bfloat16", "trtllm:torch_flow", "cudagraph"),
    ("gemm", "fp8", "vllm:CutlassFP8ScaledMMLinearKernel", "cudagraph"),
    ("linear", "fp32", "torch", "eager_events"),
    ("gemm", "nvfp4", "", "cudagraph"),
    ("bmm", "fp64", "mine:own", "clockwork"),
)
sizes = st.integers(1, 1 << 15)


def products(
    device: str, way: tuple[str, str, str, str], shapes: list[tuple[int, int, int, int]]
) -> Batch:
    op, dtype, impl, timing = way
    context = Context(op, find_datasheet(device), dtype, "", impl, timing)
    columns = {
        name: np.array(column, float)
        for name, column in zip("BMNK", zip(*shapes, strict=True), strict=True)
    }
    return Batch("gemm", (context,), np.zeros(len(shapes), np.intp), columns)


@settings(deadline=None)
@given(
    device=st.sampled_from(DEVICES),
    way=st.sampled_from(WAYS),
    m=sizes,
    n=sizes,
    k=sizes,
    b=st.integers(1, 64),
)
def test_products_never_get_faster_when_a_size_doubles(
    device: str, way: tuple[str, str, str, str], m: int, n: int, k: int, b: int
) -> None:
    shapes = [(b, m, n, k), (2 * b, m, n, k), (b, 2 * m, n, k), (b, m, 2 * n, k), (b, m, n, 2 * k)]
    found = kernel_times(products(device, way, shapes))
    assert np.isfinite(found.time_us).all() and (found.low_us > 0).all()
    assert (found.low_us <= found.time_us).all() and (found.time_us <= found.high_us).all()
    assert (found.time_us[1:] >= found.time_us[0]).all()


@settings(deadline=None)
@given(
    device=st.sampled_from(DEVICES), op=st.sampled_from(["add", "softmax", "rmsnorm", "unheard_of"]),
    dtype=st.sampled_from(["fp32", "bf16"]), rows=st.integers(1, 1 << 18), cols=st.integers(1, 1 << 15),
)  # fmt: skip
def test_streams_never_get_faster_when_bytes_double(
    device: str, op: str, dtype: str, rows: int, cols: int
) -> None:
    less, *more = estimate_all(
        [
            Kernel(op, [shape], [dtype], device)
            for shape in ((rows, cols), (2 * rows, cols), (rows, 2 * cols))
        ]
    )
    assert 0 < less.low_us <= less.time_us <= less.high_us < np.inf
    assert all(other.time_us >= less.time_us for other in more)


@settings(deadline=None)
@given(
    device=st.sampled_from(DEVICES), op=st.sampled_from(["attn_prefill", "attn_decode", "attn_encoder"]),
    b=st.integers(1, 64), heads=st.sampled_from([1, 8, 40]), s=st.integers(1, 8192),
    tokens=st.integers(1, 1 << 14),
)  # fmt: skip
def test_attention_and_experts_never_get_faster_when_bytes_double(
    device: str, op: str, b: int, heads: int, s: int, tokens: int
) -> None:
    def attend(b: int, s: int) -> Kernel:
        q = (b, heads, 1 if op == "attn_decode" else s, 128)
        return Kernel(op, [q, (b, heads, s, 128)], ["bf16", "bf16"], device)

    def experts(tokens: int) -> Kernel:
        shapes = [(tokens, 2048), (64, 2048, 768)]
        return Kernel("moe", shapes, ["bf16"], device, options={"topk": 8})

    found = estimate_all(
        [attend(b, s), attend(2 * b, s), attend(b, 2 * s), experts(tokens), experts(2 * tokens)]
    )
    times = [e.time_us for e in found]
    assert times[1] >= times[0] and times[2] >= times[0] and times[4] >= times[3]
    assert all(0 < e.low_us <= e.time_us <= e.high_us < np.inf for e in found)


def test_an_answer_does_not_depend_on_its_company() -> None:
    rng = np.random.default_rng(0)
    shapes = [tuple(int(x) for x in row) for row in rng.integers(1, 8192, (300, 4))]
    whole = kernel_times(products("L40S", WAYS[0], shapes))
    order = rng.permutation(300)
    other = kernel_times(products("L40S", WAYS[0], [shapes[i] for i in order]))
    assert (whole.time_us[order] == other.time_us).all() and (
        whole.high_us[order] == other.high_us
    ).all()
    alone = kernel_times(products("L40S", WAYS[0], shapes[7:8]))
    assert alone.time_us[0] == whole.time_us[7]


def test_answers_are_pinned_so_that_every_machine_gives_the_same() -> None:
    assert shipped().info["format"] == "weft-kernels-2"
    first = kernel_times(products("H100-SXM5-80GB", WAYS[0], [(1, 4096, 4096, 4096)])).time_us[0]
    assert 150 < first < 300  # 2 * 4096^3 at 989 TFLOP/s are 139 us
    again = read_model(Path(str(shipped_file())))
    assert again.centre_us(products("H100-SXM5-80GB", WAYS[0], [(1, 4096, 4096, 4096)]))[0] == first


def shipped_file() -> Path:
    return Path(str(weft.costmodel.__file__)).parent / "weights" / "kernels.safetensors"


def test_weights_are_small() -> None:
    assert shipped_file().stat().st_size <= 5e6


def test_wide_where_nothing_is_known_and_narrow_where_it_was_measured() -> None:
    def width(device: str, impl: str) -> float:
        found = estimate("gemm", [(512, 4096), (4096, 4096)], ["bf16"], device, impl=impl)
        return found.high_us / found.low_us

    known = width("h100", "trtllm:torch_flow")
    assert (
        known
        < width("H200", "trtllm:torch_flow")
        < width("RTX-PRO-6000-Server", "trtllm:torch_flow")
    )
    assert known < width("h100", "nobody:nothing")


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([(4, 0), (0, 4)], "the size 0"), ([(2**31, 4), (4, 4)], "the size 2147483648"),
        ([(4, 4), (5, 4)], "does not take"), ([(4,)], "does not take"), ([], "at least one shape"),
        ([(4.5, 4), (4, 4)], "4.5"), ([(-1, 4), (4, 4)], "-1"),
    ],
)  # fmt: skip
def test_sizes_that_no_kernel_has_are_refused(shapes: list[tuple[int, ...]], said: str) -> None:
    with pytest.raises(CompileError, match="W1301") as found:
        estimate("gemm", shapes, ["bf16"], "h100")
    assert said in str(found.value)


def test_an_unknown_device_names_near_ones() -> None:
    with pytest.raises(CompileError) as found:
        estimate("gemm", [(4, 4), (4, 4)], ["bf16"], "H200-SMX")
    assert found.value.code == "W1301" and "H200-SXM-141GB" in found.value.hint


DEVICE_FILE = 'name = "X9"\nsms = 160\nboost_mhz = 2000\nf32 = 90\nf16 = 3000\nbf16 = 3000\nmem_gbs = 9000\nl2_mb = 200\n'


def test_a_device_file_adds_a_device_with_a_wide_interval(tmp_path: Path) -> None:
    path = tmp_path / "x9.toml"
    path.write_text(DEVICE_FILE)
    sheet = read_device_file(path)
    shapes = [(4096, 4096), (4096, 4096)]
    new = estimate("gemm", shapes, ["bf16"], sheet)
    old = estimate("gemm", shapes, ["bf16"], "h100", impl="trtllm:torch_flow")
    assert new.time_us < old.time_us
    assert new.high_us / new.low_us > old.high_us / old.low_us


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sms = ", "cannot be read"), (DEVICE_FILE.replace("sms = 160\n", ""), "sms missing"),
        (DEVICE_FILE + "clock = 3\n", "unknown key 'clock'"), (DEVICE_FILE.replace("160", "-1"), "positive"),
        (DEVICE_FILE.replace("160", '"many"'), "positive"), (DEVICE_FILE.replace('"X9"', "9"), "a text"),
    ],
)  # fmt: skip
def test_device_files_with_mistakes_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(CompileError, match="W1302") as found:
        read_device_file(path)
    assert said in str(found.value)


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for content in (b"", b"\x00" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"):
        path.write_bytes(content)
        with pytest.raises(CompileError, match="W1302"):
            read_model(path)


def test_formats_of_weft_measurements_and_vendors() -> None:
    assert format_of("bf16") == format_of("bfloat16")
    assert format_of("fp8_block").unit == "f8" and format_of("fp8_block").act == 1
    mixed = format_of("float8_e4m3fn|float4_e2m1fn_x2|per_1x32")
    assert mixed.act == 1 and mixed.weight < 0.6 and mixed.unit == "f8"
    assert format_of("w4a16_mxfp4").unit == "bf16"


def test_every_datasheet_can_be_asked() -> None:
    found = estimate_all(
        [Kernel("gemm", [(64, 64), (64, 64)], ["bf16"], name) for name in datasheets()]
    )
    assert all(e.time_us > 0 for e in found)


@settings(deadline=None)
@given(device=st.sampled_from(DEVICES[:-1]), way=st.sampled_from(WAYS), shape=st.tuples(
    st.integers(1, 64), sizes, sizes, sizes), which=st.integers(0, 3))  # fmt: skip
def test_no_column_of_a_product_falls_when_a_size_doubles(
    device: str, way: tuple[str, str, str, str], shape: tuple[int, int, int, int], which: int
) -> None:
    more = tuple(2 * n if i == which else n for i, n in enumerate(shape))
    found = products(device, way, [shape, more]).features()  # type: ignore[list-item]
    assert (found.rising[1] >= found.rising[0] - 1e-12).all()
    assert (found.free[1] == found.free[0]).all()


def test_networks_for_cuda_graphs_serve_devices_near_theirs() -> None:
    gemm = shipped().families["gemm"]
    general = {i for i, net in enumerate(gemm.members) if not net.timing}
    assert general and 0 in general

    def serving(device: str, timing: str) -> set[int]:
        context = Context("gemm", find_datasheet(device), "bfloat16", "", "", timing)
        return set(gemm.members_for(context))

    for device in ("h100", "H200", "RTX-PRO-6000-Server", "A30"):
        assert serving(device, "cudagraph") and not serving(device, "cudagraph") & general
    assert serving("MI300X", "cudagraph") == serving("h100", "eager_events") == general
    assert serving("cpu", "cudagraph") == set()


def test_quantiles_count_devices_alike() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=999)
    assert quantile_pair(values) == quantile_pair(values, np.full(999, 7.0))
    low, high = quantile_pair(values)
    assert 0.9 <= np.mean((low <= values) & (values <= high)) <= 0.91
    # 100 rows of a device that is off by 5 weigh as much as 9900 of one that is not
    both = np.concatenate([rng.normal(size=9900), 5 + rng.normal(size=100)])
    weights = np.concatenate([np.full(9900, 1 / 9900), np.full(100, 1 / 100)])
    assert quantile_pair(both)[1] < 4 < 5 < quantile_pair(both, weights)[1]
