"""Times of collectives: monotone, finite, near what was measured; what no machine has is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.costmodel.cluster import parse_cluster
from weft.costmodel.collectives import (
    Spread,
    collective_time_us,
    spread_of,
    volume,
)
from weft.costmodel.collectives_gloo import GlooCosts, Place, far_share, gloo_costs
from weft.costmodel.collectives_model import Sample, collective_model, dump, read
from weft.costmodel.collectives_prior import START, Prior, columns
from weft.costmodel.collectives_query import (
    COLLECTIVES,
    FABRICS,
    IMPLS,
    TIMINGS,
    Query,
    fabric_of,
    network_of,
)
from weft.costmodel.devices import DEVICES
from weft.ir.errors import CompileError
from weft.ir.types import Mesh

NAMES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "permute_ranks",
         "lse_combine", "send")  # fmt: skip
H100 = Query("all_reduce", 2**20, 8, 8, "H100-SXM5-80GB", "nvlink4")


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(tuple(DEVICES)), name=st.sampled_from(NAMES),
    size=st.floats(0, 1e11), ranks=st.integers(1, 64), per_host=st.sampled_from((1, 4, 8)),
)  # fmt: skip
def test_times_never_fall_when_bytes_or_ranks_double(
    kind: str, name: str, size: float, ranks: int, per_host: int
) -> None:
    cluster = parse_cluster(f"1024x8:{kind}")

    def time_us(size: float, ranks: int) -> float:
        found = collective_time_us(name, size, Spread(ranks, min(ranks, per_host)), cluster)
        assert math.isfinite(found) and (found > 0 or ranks == 1)
        return found

    slack = 1 + 1e-9
    assert time_us(2 * size, ranks) * slack >= time_us(size, ranks)
    assert time_us(size, 2 * ranks) * slack >= time_us(size, ranks)


queries = st.builds(
    Query, st.sampled_from(COLLECTIVES), st.floats(0, 1e12), st.integers(2, 512),
    st.integers(1, 8), st.sampled_from(("H200-SXM-141GB", "B200-SXM", "MI300X", "unheard of", "L40S")),
    st.sampled_from(tuple(FABRICS)), st.sampled_from((0.0, 25.0, 400.0)), st.sampled_from(IMPLS),
    st.sampled_from(TIMINGS), st.integers(0, 24).map(float), st.integers(0, 512).map(float),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(query=queries)
def test_estimates_have_intervals_around_them_and_grow_with_bytes(query: Query) -> None:
    low, high = collective_model().estimate(query), collective_model().estimate(
        replace(query, bytes=2 * query.bytes)
    )
    assert 0 < low.low_us <= low.time_us <= low.high_us < float("inf")
    assert high.time_us * (1 + 1e-9) >= low.time_us


def test_volumes_are_those_of_the_ring_algorithms() -> None:
    whole, p = 1000.0, 4
    assert volume("all_reduce", whole, p) == 2 * whole * (p - 1) / p
    assert volume("all_gather", whole / p, p) == whole * (p - 1) / p
    assert volume("reduce_scatter", whole, p) == whole * (p - 1) / p
    assert volume("all_to_all", whole / p, p) == whole * (p - 1) / p**2
    assert volume("all_reduce", whole, 1) == 0


@pytest.mark.parametrize("kind", ["h100", "a100", "b200"])
@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])
def test_an_all_reduce_costs_no_more_than_scatter_and_gather(kind: str, size: float) -> None:
    cluster, spread = parse_cluster(f"1x8:{kind}"), Spread(8, 8)
    both = collective_time_us("reduce_scatter", size, spread, cluster)
    both += collective_time_us("all_gather", size / 8, spread, cluster)
    assert collective_time_us("all_reduce", size, spread, cluster) <= both * (1 + 1e-9)


def test_published_h200_times_which_no_training_saw_are_met() -> None:
    """all_gather on 8 H200: 382 us for 128 MB, 69 us for 16 MB (apex_plus profiles); all_reduce of
    128 MB 710 us."""
    cluster, spread = parse_cluster("1x8:h200"), Spread(8, 8)
    for name, size, measured_us in (("all_gather", 2**27 / 8, 382.0), ("all_gather", 2**24 / 8, 69.0),
                                    ("all_reduce", 2**27, 710.0)):  # fmt: skip
        predicted = collective_time_us(name, size, spread, cluster)
        assert predicted == pytest.approx(measured_us, rel=0.2)


def test_a_cluster_files_links_change_the_times(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[[groups]]\ndevice = "h100"\nhosts = 2\ndevices = 8\n'
                    "[links.intra]\nbytes_per_s = 1e11\n[links.inter]\nbytes_per_s = 1e9\n")  # fmt: skip
    usual, slow = parse_cluster("2x8:h100"), parse_cluster(str(file))
    for spread in (Spread(8, 8), Spread(2, 1)):
        times = [collective_time_us("all_gather", 1e7, spread, c) for c in (usual, slow)]
        assert times[1] > 2 * times[0]


def test_a_mesh_axis_says_how_its_groups_are_spread() -> None:
    cluster = parse_cluster("2x4:h100")
    mesh = Mesh((("host", 2), ("dev", 4)), "h100")
    assert spread_of(cluster, mesh, "host") == Spread(2, 1)
    assert spread_of(cluster, mesh, "dev") == Spread(4, 4)
    assert spread_of(cluster, Mesh((("rank", 8),), "h100"), "rank") == Spread(8, 4)


def test_samples_of_a_machine_pull_the_estimates_to_it() -> None:
    model = collective_model()
    query = replace(H100, device="H300", collective="all_gather")
    samples = [Sample(replace(query, bytes=float(2**k)), 1.5 * model.time_us(replace(query, bytes=2**k)))
               for k in range(10, 28, 3)]  # fmt: skip
    local = model.calibrated(samples)
    for size in (2**12, 2**20, 2**24):
        asked = replace(query, bytes=float(size))
        assert local.time_us(asked) / model.time_us(asked) == pytest.approx(1.5, rel=0.12)


def test_an_interval_is_wider_for_a_device_that_was_never_measured() -> None:
    model = collective_model()
    known, new = (model.estimate(replace(H100, device=d)) for d in (H100.device, "H200-SXM-141GB"))
    assert new.high_us / new.low_us > known.high_us / known.low_us


def test_weights_survive_being_written_and_read() -> None:
    model = collective_model()
    tensors, about = dump(model.weights, {"data": "x"})
    again = replace(model, weights=read(tensors, about), _curves={})
    assert again.time_us(H100) == pytest.approx(model.time_us(H100), rel=1e-4)


def test_the_prior_is_latency_for_small_and_bandwidth_for_large() -> None:
    prior = Prior({name: start for name, (start, _) in START.items()})
    small, large, larger = prior(columns([replace(H100, bytes=float(b)) for b in (8, 2**28, 2**29)]))
    assert small < 30 < large
    assert larger / large == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("text", "device", "fabric"),
    [("NVLink4-NVSwitch+IB", "H100", "nvlink4"), ("NVLink5-NVL72", "GB200", "nvl72"),
     ("NVLink-bridge-pair+PCIe4", "A100", "bridge3"), ("PCIe5x8", "Arc", "pcie5x8"),
     ("xGMI", "MI300X", "xgmi3"), ("NVLink2-DGX1", "V100", "nvlink2")],
)  # fmt: skip
def test_descriptions_name_fabrics(text: str, device: str, fabric: str) -> None:
    assert fabric_of(text, device) == fabric


@pytest.mark.parametrize(
    ("change", "told"),
    [({"fabric": "nvlink44"}, "nvlink4"), ({"ranks": 16, "per_host": 16}, "at most|joins"),
     ({"collective": "all_reduec"}, "all_reduce"), ({"bandwidth_scale": 0.0}, "positive"),
     ({"bytes": float("nan")}, "bytes"), ({"impl": "ncll"}, "nccl"), ({"ranks": 0}, "ranks")],
)  # fmt: skip
def test_what_no_machine_has_is_refused(change: dict[str, object], told: str) -> None:
    with pytest.raises(CompileError, match="W0501") as caught:
        collective_model().estimate(replace(H100, **change))
    assert any(word in str(caught.value) for word in told.split("|"))


@pytest.mark.parametrize(
    ("links", "told"),
    [('[links]\nfabric = "nvlnk4"\n', "did you mean 'nvlink4'"),
     ('[links]\nfabric = "bridge3"\n', "16"),
     ("[links.intra]\nbytes_per_s = 0\n", "positive"),
     ("[links.inter]\nbytes_per_s = 0.0\n", "positive")],
)  # fmt: skip
def test_bad_links_of_a_cluster_file_are_refused(tmp_path: Path, links: str, told: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'[[groups]]\ndevice = "h100"\nhosts = 2\ndevices = 24\n{links}')
    with pytest.raises(CompileError, match="W0501") as caught:
        parse_cluster(str(file))
    assert told in str(caught.value)


def test_a_named_fabric_is_used(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[[groups]]\ndevice = "h100"\nhosts = 1\ndevices = 8\n[links]\nfabric = "pcie5"\n')
    pcie, usual = parse_cluster(str(file)), parse_cluster("1x8:h100")
    both = [collective_time_us("all_reduce", 1e8, Spread(8, 8), c) for c in (usual, pcie)]
    assert both[1] != both[0]


def test_gloo_pays_two_delays_a_hop_and_the_card_of_each_host() -> None:
    costs = gloo_costs()
    near, far = Place(4, 4, 1.25e8, 1e-3), Place(4, 1, 1.25e8, 1e-3)
    assert costs.time_us("all_reduce", 1024, far) > 6 * 2000  # 2 (4 - 1) hops of 2 ms
    assert costs.time_us("all_reduce", 1024, near) < costs.time_us("all_reduce", 1024, far)
    wire_us = 2 * 2**24 * 3 / 4 / 1.25e8 * 1e6
    assert costs.time_us("all_reduce", 2**24, far) > wire_us
    half = replace(far, bytes_per_s=far.bytes_per_s / 5)
    gained = costs.time_us("all_reduce", 2**24, half) - costs.time_us("all_reduce", 2**24, far)
    assert gained >= 4 * wire_us * 0.99


def test_gloo_numbers_survive_being_written() -> None:
    costs = gloo_costs()
    assert GlooCosts.from_json(costs.to_json()) == costs


def test_the_residual_is_bounded() -> None:
    """Whatever was learned, the prior is changed by at most a factor of two."""
    model = collective_model()
    asked = [replace(H100, bytes=float(2**k)) for k in range(6, 34)]
    prior = Prior(model.weights.parameters)(columns(asked))
    ratio = np.exp(model.raw(asked)) / prior
    assert ratio.max() <= 2.0 and ratio.min() >= 0.5


@pytest.mark.parametrize(
    ("text", "network"),
    [("NVLink4-NVSwitch+EFAv2", "efa"), ("NVLink4-NVSwitch+GPUDirect-TCPXO", "tcp"),
     ("NVLink4-NVSwitch+IB", "ib"), ("PCIe4", "ib")],
)  # fmt: skip
def test_descriptions_name_networks(text: str, network: str) -> None:
    assert network_of(text) == network


def test_more_hosts_than_were_measured_are_less_certain_and_take_longer() -> None:
    model = collective_model()
    spans = [model.estimate(replace(H100, ranks=ranks, net_gb_per_s=50.0)) for ranks in (16, 32, 512)]
    factors = [span.high_us / span.low_us for span in spans]
    assert factors[0] <= factors[1] == pytest.approx(factors[2])
    assert spans[0].time_us < spans[1].time_us < spans[2].time_us
    assert model.level(replace(H100, ranks=32)) == "new"


def test_what_is_known_less_has_no_narrower_interval() -> None:
    spans = collective_model().weights.spans
    for group, found in spans.items():
        words, level = group.rsplit(" ", 1)
        if level != "known":
            assert found >= spans[f"{words} {'known' if level == 'kin' else 'kin'}"] > 0


def test_eight_hosts_reach_what_their_network_carries() -> None:
    """64 H100 over 400 Gbit/s each: nccl-tests of published clusters report a bus bandwidth of 300 to
    480 GB/s for an all_reduce of 8 GB."""
    size = 2.0**33
    found = collective_model().time_us(replace(H100, bytes=size, ranks=64, net_gb_per_s=50.0))
    assert 250 < 2 * 63 / 64 * size / found / 1e3 < 480


def test_ranks_of_a_host_share_what_leaves_it() -> None:
    costs = gloo_costs()
    apart, together = Place(4, 1, 1.25e8, 1e-3, 2.0), Place(4, 2, 1.25e8, 1e-3, 2.0)
    assert far_share("all_gather", apart) == 1 and far_share("all_gather", together) == 0.5
    assert far_share("all_to_all", together) == pytest.approx(2 / 3)
    times = [costs.time_us("all_gather", 2**20, place) for place in (together, apart)]
    assert times[0] < times[1]
