"""Trains the kernel-time model and writes `costmodel/weights/kernels.safetensors`.

    python benchmarks/train_costmodel.py --data DIR --work FOLDER

One network per family and member, see `weft/costmodel/kernel_net.py` for its form. Batches hold a few
contexts (device, format, implementation, timing) with equally many rows each, drawn by the context's
number of rows to the power 0.6: a device with a hundred rows is learned too.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import costmodel_splits as splits
import numpy as np
import torch
from costmodel_data import FILES, Table, digest, read_table
from numpy.typing import NDArray
from torch import Tensor, nn

from weft.costmodel.datasheet import Datasheet
from weft.costmodel.kernel_context import Context, numbers
from weft.costmodel.kernel_features import Features
from weft.costmodel.kernel_interval import (
    CONFIG,
    FAR,
    LARGE,
    SIBLING,
    SIBLING_DISTANCE,
    Intervals,
    fit_hardness,
    key,
    larger,
    place,
    quantile_pair,
)
from weft.costmodel.kernel_model import Family, Model, read_model, write_model
from weft.costmodel.kernel_net import Net, fold, limits, settled
from weft.costmodel.kernel_support import distance

WIDTHS = (126, 126)
#: contexts in a batch
CONTEXTS = 16
#: residuals in log2 beyond which the loss is linear (about 6 %: the noise of the measurements)
HUBER = 0.08


@dataclass(frozen=True)
class Fit:
    """How to train: steps, rows of each context in a batch, seed, learning rate, and how often what a
    new device would not have is hidden (tokens) or blurred (numbers)."""

    steps: int = 8000
    rows: int = 64
    seed: int = 0
    rate: float = 5e-3
    token_drop: float = 0.1
    number_noise: float = 0.2
    power: float = 0.6
    widths: tuple[int, ...] = WIDTHS
    context_width: int = 64
    token_width: int = 24


class Trained(nn.Module):
    """The network while it is trained: weights of rising inputs count by their absolute value."""

    def __init__(self, rising: int, free: int, numbers_: int, tokens: int, fit: Fit) -> None:
        super().__init__()
        dims = [rising, *fit.widths]
        self.widths = fit.widths
        self.tok = nn.Parameter(torch.randn(tokens, fit.token_width) * 0.3)
        self.c1 = nn.Linear(numbers_ + fit.token_width, fit.context_width)
        self.c2 = nn.Linear(fit.context_width, fit.context_width)
        self.films = nn.ModuleList(nn.Linear(fit.context_width, 2 * w) for w in fit.widths)
        self.out = nn.Linear(fit.context_width, 1)
        self.w = nn.ParameterList(
            torch.randn(a, b) * 2 / a for a, b in zip(dims, dims[1:], strict=False)
        )
        self.f = nn.ParameterList(torch.randn(free, w) * 0.1 for w in fit.widths)
        self.s = nn.ParameterList(torch.randn(a) / a for a in dims)
        self.limits = [
            tuple(torch.tensor(limit, dtype=torch.float32) for limit in limits(width))
            for width in fit.widths
        ]
        with torch.no_grad():
            for film, width in zip(self.films, fit.widths, strict=True):
                film.weight.mul_(0.3)
                film.bias[:width] = 0
                film.bias[width:] = torch.randn(width) * 0.7

    def context(self, numbers_: Tensor, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gates and shifts of the layers, and the offset, of each context."""
        hidden = nn.functional.silu(self.c1(torch.cat([numbers_, tokens @ self.tok], 1)))
        hidden = nn.functional.silu(self.c2(hidden))
        return [film(hidden) for film in self.films], self.out(hidden)

    def forward(self, z: Tensor, free: Tensor, numbers_: Tensor, tokens: Tensor) -> Tensor:
        """log2 of time, [contexts, rows], from [contexts, rows, columns] and [contexts, columns]."""
        films, out = self.context(numbers_, tokens)
        total = z @ self.s[0].abs() + out
        hidden = z
        for layer, film in enumerate(films):
            width = self.widths[layer]
            gate, shift = film[:, None, :width].clamp(-3, 3).exp(), film[:, None, width:]
            hidden = hidden @ self.w[layer].abs() * gate + shift + free @ self.f[layer]
            low, high = self.limits[layer]
            hidden = torch.minimum(torch.maximum(hidden, low), high)
            total = total + hidden @ self.s[layer + 1].abs()
        return total

    def loss(self, z: Tensor, free: Tensor, numbers_: Tensor, tokens: Tensor, y: Tensor) -> Tensor:
        """Mean Huber loss in units of its bend."""
        found = self(z, free, numbers_, tokens)
        return nn.functional.huber_loss(found, y, delta=HUBER) / HUBER


def train(
    contexts: Sequence[Context],
    index: NDArray[np.intp],
    features: Features,
    time_us: NDArray[np.float64],
    rows: NDArray[np.intp],
    fit: Fit,
) -> Net:
    """A network trained on some rows."""
    torch.manual_seed(fit.seed)
    rng = np.random.default_rng(fit.seed)
    order = rows[np.argsort(index[rows], kind="stable")]
    starts = np.searchsorted(index[order], np.arange(len(contexts) + 1))
    counts = np.diff(starts)
    rising = features.rising[order]
    mean, spread, most = rising.mean(0), rising.std(0) + 1e-3, rising.max(0)
    y = np.log2(time_us[order]) - settled(features.bound_us[order])
    offset = y.mean()
    z = torch.tensor((rising - mean) / spread, dtype=torch.float32)
    free = torch.tensor(features.free[order], dtype=torch.float32)
    target = torch.tensor(y - offset, dtype=torch.float32)
    vocabulary, tokens = vocabulary_of(contexts, counts)
    table = np.array([numbers(context) for context in contexts])
    centre, scale = table[counts > 0].mean(0), table[counts > 0].std(0) + 0.05
    sheet = torch.tensor(np.clip((table - centre) / scale, -3, 3), dtype=torch.float32)
    net = Trained(z.shape[1], free.shape[1], sheet.shape[1], len(vocabulary), fit)
    torch.compiler.reset()  # it compiles one function a few times only, then no more
    loss_of = torch.compile(net.loss, dynamic=False)
    optimizer, schedule = _optimizer(net, fit)
    chance = counts.astype(float) ** fit.power
    chance /= chance.sum()
    for _ in range(fit.steps):
        chosen = rng.choice(len(contexts), CONTEXTS, p=chance)
        picks = (rng.random((CONTEXTS, fit.rows)) * counts[chosen][:, None]).astype(int)
        batch = torch.from_numpy(starts[chosen][:, None] + picks)
        kept = tokens[chosen] * (torch.rand(CONTEXTS, len(vocabulary)) > fit.token_drop)
        noisy = sheet[chosen] + fit.number_noise * torch.randn(CONTEXTS, sheet.shape[1])
        loss = loss_of(z[batch], free[batch], noisy, kept, target[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    arrays = {name: p.detach().double().numpy() for name, p in net.named_parameters()}
    extras = {"mean": mean, "spread": spread, "most": most, "offset": np.array([offset]),
              "centre": centre, "scale": scale}  # fmt: skip
    return fold(arrays, extras, vocabulary, len(fit.widths))


def vocabulary_of(
    contexts: Sequence[Context], counts: NDArray[np.intp]
) -> tuple[tuple[str, ...], Tensor]:
    """Tokens of the contexts that have rows, and which of them each context has."""
    seen = {token for c, n in zip(contexts, counts, strict=True) if n for token in c.tokens()}
    vocabulary = tuple(sorted(seen))
    table = [[float(token in c.tokens()) for token in vocabulary] for c in contexts]
    return vocabulary, torch.tensor(table, dtype=torch.float32)


def _optimizer(
    net: Trained, fit: Fit
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    named = [(name.split(".")[0], p) for name, p in net.named_parameters()]
    decayed = [p for name, p in named if name in ("c1", "c2", "films", "tok")]
    others = [p for name, p in named if name in ("w", "f", "s", "out")]
    groups = [{"params": decayed, "weight_decay": 1e-3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=fit.rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, fit.rate, total_steps=fit.steps, pct_start=0.08
    )
    return optimizer, schedule


def train_table(table: Table, rows: NDArray[np.intp], fit: Fit) -> Net:
    """A network for the rows of a table."""
    batch = table.batch
    return train(batch.contexts, batch.index, batch.features(), table.time_us, rows, fit)


def residuals(table: Table, *nets: Net) -> NDArray[np.float64]:
    """log2 of measured over estimated time, all rows; of several networks the mean."""
    batch = table.batch
    features = batch.features()
    found = [net.log2_us(features, net.films(batch.contexts), batch.index) for net in nets]
    return np.asarray(np.log2(table.time_us) - sum(found) / len(nets))


Held = dict[str, tuple[NDArray[np.bool_], NDArray[np.float64]]]


def hardness_of(table: Table, held: Held, net: Net) -> tuple[NDArray[np.float64], ...]:
    """Coefficients of hardness, and how hard each row is."""
    features = table.batch.features()
    rows, values = held[CONFIG]
    hardness = fit_hardness(features, net, values, np.flatnonzero(rows))
    return hardness, np.exp2(place(features, net) @ hardness)


def quantiles_of(
    table: Table, case: str, rows: NDArray[np.bool_], scaled: NDArray[np.float64]
) -> tuple[float, float]:
    """q05 and q95 of a case; devices count alike where it is about devices."""
    weights = _alike(table, rows) if case in (SIBLING, FAR) else None
    return quantile_pair(scaled[rows], weights)


def fit_intervals(table: Table, held: Held, net: Net) -> Intervals:
    """Hardness and quantiles from residuals of held-out rows, by case."""
    features = table.batch.features()
    hardness, scale = hardness_of(table, held, net)
    cases = {
        case: quantiles_of(table, case, rows, values / scale)
        for case, (rows, values) in held.items()
    }
    if LARGE in cases:
        cases[LARGE] = _wider(cases[LARGE])
    for fallback, case in ((CONFIG, LARGE), (CONFIG, SIBLING), (SIBLING, FAR)):
        cases.setdefault(case, tuple(2 * q for q in cases[fallback]))
    seen = {}
    bound = np.log2(features.bound_us)
    for number, context in enumerate(table.batch.contexts):
        own = table.batch.index == number
        seen[key(context)] = (context.device.name, float(bound[own].max()))
        for case, name in ((CONFIG, key(context)), (LARGE, larger(context))):
            if case in held:
                rows, values = held[case]
                if (rows & own).sum() >= LEAST_ROWS:
                    pair = quantile_pair((values / scale)[rows & own])
                    cases[name] = _wider(pair) if case == LARGE else pair
    devices = {c.device.name: c.device for c in table.batch.contexts}
    return Intervals(hardness, cases, seen, devices)


def _wider(pair: tuple[float, float]) -> tuple[float, float]:
    return WIDER * pair[0], WIDER * pair[1]


def _alike(table: Table, rows: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Weights of rows under which their devices count alike."""
    names, device = np.unique([c.device.name for c in table.batch.contexts], return_inverse=True)
    of_row = device[table.batch.index[rows]]
    return np.asarray(1.0 / np.bincount(of_row, minlength=len(names))[of_row])


#: steps of a network for one mode of timing, as a share of the others'
SPECIAL = 0.7
#: how much wider intervals of larger sizes are than their quantiles: few sizes are that large, so their
#: errors go together, and quantiles of half of them hold 75 % of the others
WIDER = 1.4
#: rows below which a context takes the quantiles of its family
LEAST_ROWS = 60


def clusters_of(table: Table) -> list[list[str]]:
    """Devices of a table, siblings together."""
    out: list[list[Datasheet]] = []
    for sheet in {c.device.name: c.device for c in table.batch.contexts}.values():
        home = [group for group in out if any(distance(sheet, d) < SIBLING_DISTANCE for d in group)]
        for group in home:
            out.remove(group)
        out.append([sheet, *(d for group in home for d in group)])
    return [[sheet.name for sheet in group] for group in out]


def on_devices(table: Table, names: Sequence[str]) -> NDArray[np.bool_]:
    """Rows on some devices."""
    return np.array([c.device.name in names for c in table.batch.contexts])[table.batch.index]


@dataclass(frozen=True)
class Plan:
    """Networks of a table.

    Attributes:
        steps: of a final network.
        members: final networks, averaged.
        held: networks without the unseen configurations and large shapes, averaged.
        folds: networks without some of the devices; together they leave out each device once.
        special: a mode of timing that has a final network, and one for unseen configurations, of its
            own: with all modes in one the error is a seventh higher.
    """

    steps: int
    members: int
    held: int
    folds: int
    special: str = ""


PLANS = {
    "gemm": Plan(20000, 1, 1, 4, "cudagraph"), "attention": Plan(20000, 1, 1, 3), "moe": Plan(8000, 1, 1, 3),
    "eltwise": Plan(4000, 1, 1, 3), "conv": Plan(2500, 1, 1, 3),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One table in training: networks are kept in a folder, so that a run can stop and go on."""

    name: str
    table: Table
    folder: Path
    plan: Plan

    def net(self, label: str, rows: NDArray[np.bool_], seed: int, share: float) -> Net:
        """The network of that label, trained unless it is there; `share` of the full steps."""
        path = self.folder / f"{self.name}.{label}.{seed}.net"
        if path.exists():
            return pickle.loads(path.read_bytes())  # type: ignore[no-any-return]
        start = time.perf_counter()
        fit = Fit(steps=max(int(self.plan.steps * share), 60), seed=seed)
        net = train_table(self.table, np.flatnonzero(rows), fit)
        partial = path.with_suffix(".partial")
        partial.write_bytes(pickle.dumps(net))
        partial.replace(path)
        self.say(f"{path.stem} in {time.perf_counter() - start:.0f} s")
        return net

    def say(self, text: str) -> None:
        """Progress."""
        print(f"{self.name}: {text}", flush=True)

    def final(self) -> tuple[Net, ...]:
        """The networks that ship, trained on all rows."""
        every = np.ones(len(self.table), bool)
        nets = [self.net("final", every, seed, 1.0) for seed in range(self.plan.members)]
        if self.plan.special:
            own = self.specially()
            nets += [
                self.for_timing(self.net(f"final-{self.plan.special}", own, seed, SPECIAL))
                for seed in range(self.plan.members)
            ]
        return tuple(nets)

    def specially(self) -> NDArray[np.bool_]:
        """Rows of the mode of timing with networks of its own."""
        mode = [c.timing == self.plan.special for c in self.table.batch.contexts]
        return np.array(mode)[self.table.batch.index]

    def for_timing(self, net: Net) -> Net:
        """The network, marked as one of the special mode."""
        contexts = self.table.batch.contexts
        devices = {c.device.name for c in contexts if c.timing == self.plan.special}
        return replace(net, timing=self.plan.special, devices=tuple(sorted(devices)))

    def without_shapes(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_], tuple[Net, ...]]:
        """Unseen configurations, larger shapes, and the networks without both."""
        config, large = splits.config(self.table), splits.large(self.table)
        kept = ~(config | large)
        nets = [self.net("config", kept, seed, 0.75) for seed in range(self.plan.held)]
        if self.plan.special:
            label = f"config-{self.plan.special}"
            nets.append(self.for_timing(self.net(label, kept & self.specially(), 0, SPECIAL)))
        return config & ~large, large, tuple(nets)

    def without_siblings(self) -> tuple[list[str], Net | None]:
        """One device of each cluster of several, and the network that has the others."""
        names = [min(group) for group in clusters_of(self.table) if len(group) > 1]
        if not names:
            return names, None
        return names, self.net("sibling", ~on_devices(self.table, names), 0, 0.4)

    def without_clusters(self) -> list[tuple[list[list[str]], Net]]:
        """Clusters of devices that are left out at a time, and the network without them."""
        groups = clusters_of(self.table)
        order = sorted(groups, key=lambda g: -on_devices(self.table, g).sum())
        out = []
        for part in range(min(self.plan.folds, len(order) - 1)):
            away = order[part :: self.plan.folds]
            gone = on_devices(self.table, [name for group in away for name in group])
            out.append((away, self.net(f"far{part}", ~gone, 0, 0.3)))
        return out

    def held_out(self) -> Held:
        """Residuals of rows that the networks did not see, by case: rows, and values on all rows."""
        table, out = self.table, {}
        config, large, nets = self.without_shapes()
        values = residuals(table, *(net for net in nets if not net.timing))
        if self.plan.special:
            own = self.specially()
            values[own] = residuals(table, *(net for net in nets if net.timing))[own]
        out[CONFIG], out[LARGE] = (config, values), (large, values)
        names, net = self.without_siblings()
        if net is not None:
            out[SIBLING] = on_devices(table, names), residuals(table, net)
        far, values = np.zeros(len(table), bool), np.zeros(len(table))
        for away, net in self.without_clusters():
            gone = on_devices(table, [name for group in away for name in group])
            values[gone] = residuals(table, net)[gone]
            far |= gone
        if far.any():
            out[FAR] = far, values
        for case, (rows, values) in out.items():
            error = np.abs(np.exp2(-values[rows]) - 1) * 100
            self.say(
                f"{case}: {rows.sum()} rows, MAPE {error.mean():.1f}, median {np.median(error):.1f}"
            )
        return out


def main() -> None:
    """Train the named tables and put the result into the weights file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tables", default=",".join(FILES))
    parser.add_argument("--steps", type=int, help="of a network; without, as shipped")
    parser.add_argument("--work", type=Path, required=True, help="folder for networks; goes on there")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(exist_ok=True)
    for name in args.tables.split(","):
        table = read_table(args.data, name)
        if table is None:
            continue
        work = Work(name, table, args.work, planned(name, args.steps))
        held, nets = work.held_out(), work.final()
        known = read_model(args.out) if args.out.exists() else Model({}, {})
        families = {**known.families, FILES[name]: Family(nets, fit_intervals(table, held, nets[0]))}
        plans = {table: vars(plan) for table, plan in PLANS.items()}
        write_model(args.out, families, {"data_sha256": digest(args.data), "plans": plans})


def planned(name: str, steps: int | None) -> Plan:
    """How a table is trained; `steps` replaces the shipped number."""
    return PLANS[name] if steps is None else replace(PLANS[name], steps=steps)


WEIGHTS = Path(__file__).resolve().parents[1] / "costmodel" / "weights" / "kernels.safetensors"

if __name__ == "__main__":
    main()
