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
from collections.abc import Callable, Sequence
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
from weft.costmodel.kernel_features import SETTLED_US, Features
from weft.costmodel.kernel_interval import (
    CONFIG,
    FAR,
    LARGE,
    SIBLING,
    SIBLING_DISTANCE,
    Intervals,
    fit_hardness,
    key,
    place,
    quantile_pair,
)
from weft.costmodel.kernel_model import Family, Model, read_model, write_model
from weft.costmodel.kernel_net import Net, act, fold
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
    token_drop: float = 0.05
    number_noise: float = 0.05
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

    def forward(self, z: Tensor, free: Tensor, films: list[Tensor], out: Tensor) -> Tensor:
        """log2 of time, [contexts, rows], from [contexts, rows, columns]."""
        total = z @ self.s[0].abs() + out
        hidden = z
        for layer, film in enumerate(films):
            width = self.widths[layer]
            gate, shift = film[:, None, :width].clamp(-3, 3).exp(), film[:, None, width:]
            hidden = act(hidden @ self.w[layer].abs() * gate + shift + free @ self.f[layer], torch)
            total = total + hidden @ self.s[layer + 1].abs()
        return total


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
    extra = np.log2(np.maximum(features.bound_us / SETTLED_US, 1.0))
    y = np.log2(time_us) - extra
    mean, spread = features.rising[rows].mean(0), features.rising[rows].std(0) + 1e-3
    most, offset = features.rising[rows].max(0), y[rows].mean()
    z = torch.tensor((np.minimum(features.rising, most) - mean) / spread, dtype=torch.float32)
    free = torch.tensor(features.free, dtype=torch.float32)
    target = torch.tensor(y - offset, dtype=torch.float32)
    seen = np.unique(index[rows])
    vocabulary = sorted({token for i in seen for token in contexts[i].tokens()})
    tokens = torch.zeros(len(contexts), len(vocabulary))
    for i, context in enumerate(contexts):
        for token in context.tokens():
            if token in vocabulary:
                tokens[i, vocabulary.index(token)] = 1
    table = np.array([numbers(context) for context in contexts])
    centre, scale = table[seen].mean(0), table[seen].std(0) + 0.05
    sheet = torch.tensor(np.clip((table - centre) / scale, -3, 3), dtype=torch.float32)
    net = Trained(z.shape[1], free.shape[1], sheet.shape[1], len(vocabulary), fit)
    decayed = [
        p for n, p in net.named_parameters() if n.split(".")[0] in ("c1", "c2", "films", "tok")
    ]
    others = [p for n, p in net.named_parameters() if n.split(".")[0] in ("w", "f", "s", "out")]
    groups = [{"params": decayed, "weight_decay": 1e-3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=fit.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, fit.rate, total_steps=fit.steps, pct_start=0.08
    )
    order = rows[np.argsort(index[rows], kind="stable")]
    starts = np.searchsorted(index[order], np.arange(len(contexts) + 1))
    counts = np.diff(starts)
    chance = counts.astype(float) ** fit.power
    chance /= chance.sum()
    for _ in range(fit.steps):
        chosen = rng.choice(len(contexts), CONTEXTS, p=chance)
        picks = (rng.random((CONTEXTS, fit.rows)) * counts[chosen][:, None]).astype(int)
        batch = order[starts[chosen][:, None] + picks]
        kept = tokens[chosen] * (torch.rand(CONTEXTS, len(vocabulary)) > fit.token_drop)
        noisy = sheet[chosen] + fit.number_noise * torch.randn(CONTEXTS, sheet.shape[1])
        films, out = net.context(noisy, kept)
        loss = nn.functional.huber_loss(
            net(z[batch], free[batch], films, out), target[batch], delta=HUBER
        )
        optimizer.zero_grad()
        (loss / HUBER).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    arrays = {name: p.detach().double().numpy() for name, p in net.named_parameters()}
    extras = {"mean": mean, "spread": spread, "most": most, "offset": np.array([offset]),
              "centre": centre, "scale": scale}  # fmt: skip
    return fold(arrays, extras, tuple(vocabulary), len(fit.widths))


def train_table(table: Table, rows: NDArray[np.intp], fit: Fit) -> Net:
    """A network for the rows of a table."""
    batch = table.batch
    return train(batch.contexts, batch.index, batch.features(), table.time_us, rows, fit)


def residuals(table: Table, net: Net) -> NDArray[np.float64]:
    """log2 of measured over estimated time, all rows."""
    batch = table.batch
    return np.log2(table.time_us) - net.log2_us(
        batch.features(), net.films(batch.contexts), batch.index
    )


def fit_intervals(
    table: Table, held: dict[str, tuple[NDArray[np.bool_], NDArray[np.float64]]], net: Net
) -> Intervals:
    """Hardness and quantiles from residuals of held-out rows, by case."""
    features = table.batch.features()
    config_rows, config_residuals = held[CONFIG]
    hardness = fit_hardness(features, net, config_residuals, np.flatnonzero(config_rows))
    scale = np.exp2(place(features, net) @ hardness)
    cases = {}
    for case, (rows, values) in held.items():
        cases[case] = quantile_pair((values / scale)[rows])
    for fallback, case in ((CONFIG, LARGE), (CONFIG, SIBLING), (SIBLING, FAR)):
        cases.setdefault(case, tuple(2 * q for q in cases[fallback]))
    seen = {}
    bound = np.log2(features.bound_us)
    for number, context in enumerate(table.batch.contexts):
        rows = table.batch.index == number
        seen[key(context)] = (context.device.name, float(bound[rows].max()))
        rows &= config_rows
        if rows.sum() >= LEAST_ROWS:
            cases[key(context)] = quantile_pair((config_residuals / scale)[rows])
    devices = {c.device.name: c.device for c in table.batch.contexts}
    return Intervals(hardness, cases, seen, devices)


def tightened(table: Table, family: Family) -> Family:
    """Intervals of known contexts, as much narrower as the ensemble is better than the one short
    network whose held-out residuals set them.

    Networks err nearly as much on rows of training as on unseen configurations (attention: 11.2 and
    11.7 %), so intervals that hold IN_TRAINING of the former hold 90 % of the latter.
    """
    shift = np.log2(table.time_us) - family.log2_us(table.batch)
    below, above = family.intervals.offsets(table.batch, family.members[0])
    reach = np.where(shift < 0, -shift / np.maximum(below, 1e-6), shift / np.maximum(above, 1e-6))
    factor = min(float(np.quantile(reach, IN_TRAINING)), 1.0)
    cases = {
        case: (low, high) if case in (LARGE, SIBLING, FAR) else (factor * low, factor * high)
        for case, (low, high) in family.intervals.cases.items()
    }
    return Family(family.members, replace(family.intervals, cases=cases))


#: share of the rows of training inside their intervals
IN_TRAINING = 0.912
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


def held_out(
    table: Table, fit: Fit, folds: int, say: Callable[[str], None]
) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.float64]]]:
    """Residuals of rows that the network did not see, by case: rows, and values on all rows."""
    out = {}
    config, large = splits.config(table), splits.large(table)
    net = train_table(
        table, np.flatnonzero(~(config | large)), replace(fit, steps=fit.steps * 2 // 3)
    )
    values = residuals(table, net)
    out[CONFIG], out[LARGE] = (config & ~large, values), (large, values)
    groups = clusters_of(table)
    short = replace(fit, steps=fit.steps // 2)
    pairs = [min(g) for g in groups if len(g) > 1]
    if pairs:
        gone = on_devices(table, pairs)
        out[SIBLING] = gone, residuals(table, train_table(table, np.flatnonzero(~gone), short))
    order = sorted(groups, key=lambda g: -on_devices(table, g).sum())
    far, values = np.zeros(len(table), bool), np.zeros(len(table))
    for part in range(min(folds, len(order) - 1)):
        gone = on_devices(table, [name for group in order[part::folds] for name in group])
        values[gone] = residuals(table, train_table(table, np.flatnonzero(~gone), short))[gone]
        far |= gone
    if far.any():
        out[FAR] = far, values
    for case, (rows, values) in out.items():
        error = np.abs(np.exp2(-values[rows]) - 1) * 100
        say(f"{case}: {rows.sum()} rows, MAPE {error.mean():.1f}, median {np.median(error):.1f}")
    return out


def main() -> None:
    """Run the stages for the named tables and put the result into the weights file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tables", default=",".join(FILES))
    parser.add_argument("--stages", default="held,final,write")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the first member")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--work", type=Path, required=True, help="folder for what stages hand on")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(exist_ok=True)
    for name in args.tables.split(","):
        table = read_table(args.data, name)
        if table is None:
            continue
        start = time.perf_counter()

        def say(text: str, name: str = name, start: float = start) -> None:
            print(f"{name} {time.perf_counter() - start:.0f} s: {text}", flush=True)

        stages = args.stages.split(",")
        if "held" in stages:
            held = held_out(table, Fit(steps=args.steps), args.folds, say)
            with (args.work / f"{name}.held").open("wb") as stream:
                pickle.dump(held, stream)
        if "final" in stages:
            every = np.arange(len(table))
            nets = tuple(
                train_table(table, every, Fit(steps=args.steps, seed=s))
                for s in range(args.seed, args.seed + args.members)
            )
            error = np.abs(np.exp2(-residuals(table, nets[0])) - 1) * 100
            say(
                f"final: MAPE {error.mean():.1f}, median {np.median(error):.1f} of one member on its own rows"
            )
            with (args.work / f"{name}.nets").open("wb") as stream:
                pickle.dump(nets, stream)
        if "write" in stages:
            with (args.work / f"{name}.held").open("rb") as stream:
                held = pickle.load(stream)
            with (args.work / f"{name}.nets").open("rb") as stream:
                nets = pickle.load(stream)
            known = read_model(args.out) if args.out.exists() else Model({}, {})
            families = {
                **known.families,
                FILES[name]: tightened(table, Family(nets, fit_intervals(table, held, nets[0]))),
            }
            args.out.parent.mkdir(exist_ok=True)
            write_model(args.out, families, {"data_sha256": digest(args.data), "steps": args.steps})


WEIGHTS = Path(__file__).resolve().parents[1] / "costmodel" / "weights" / "kernels.safetensors"

if __name__ == "__main__":
    main()
