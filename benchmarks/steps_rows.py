"""Published training steps as models and plans: reads `e2e_train.csv.gz` of a data folder.

Rows say sizes (vTrain) or a model's name; the named models' sizes are those that their authors
published. llm-foundry and Megatron-Bridge publish throughput: their step times are computed from
it, since the tables' own were rounded once more.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from weft.costmodel.datasheet import Datasheet, datasheets
from weft.costmodel.training_step import Fabric
from weft.costmodel.transformer import Experts, TrainingPlan, Transformer

#: vocabulary of Megatron's GPT, padded (vTrain, Megatron-LM)
_GPT_VOCAB = 51200


def _mpt(layers: int, hidden: int, heads: int) -> Transformer:
    return Transformer(layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50368)


def _gpt(layers: int, hidden: int, heads: int) -> Transformer:
    return Transformer(layers, hidden, heads, heads, hidden // heads, 4 * hidden, _GPT_VOCAB)


def _llama(layers: int, hidden: int, heads: int, ffn: int) -> Transformer:
    return Transformer(layers, hidden, heads, 8, 128, ffn, 128256, gated=True)


def _moe(
    layers: int,
    hidden: int,
    heads: tuple[int, int, int],
    vocab: int,
    experts: Experts,
    ffn: int = 0,
) -> Transformer:
    count, kv, dim = heads
    return Transformer(layers, hidden, count, kv, dim, ffn, vocab, gated=True, experts=experts)


#: sizes by model cards and papers
MODELS: Mapping[str, Transformer] = {
    "MPT-125m": _mpt(12, 768, 12),
    "MPT-350m": _mpt(24, 1024, 16),
    "MPT-760m": _mpt(24, 1536, 12),
    "MPT-1b": _mpt(24, 2048, 16),
    "MPT-3b": _mpt(32, 2560, 20),
    "MPT-7b": _mpt(32, 4096, 32),
    "MPT-13b": _mpt(40, 5120, 40),
    "MPT-30b": _mpt(48, 7168, 56),
    "MPT-70b": _mpt(80, 8192, 64),
    "gpt3-175B": _gpt(96, 12288, 96),
    "megatron-22B": _gpt(48, 6144, 64),
    "turing-530B": _gpt(105, 20480, 128),
    "megatron-1T": _gpt(128, 25600, 160),
    "LLAMA3_8B": _llama(32, 4096, 32, 14336),
    "LLAMA3_70B": _llama(80, 8192, 64, 28672),
    "LLAMA3.1_405B": _llama(126, 16384, 128, 53248),
    "Mixtral_8x7B": _moe(32, 4096, (32, 8, 128), 32000, Experts(8, 2, 14336)),
    "Mixtral_8x22B": _moe(56, 6144, (48, 8, 128), 32768, Experts(8, 2, 16384)),
    "Qwen3_30B_a3B": _moe(48, 2048, (32, 4, 128), 151936, Experts(128, 8, 768)),
    "Qwen3_235B_a22B": _moe(94, 4096, (64, 4, 128), 151936, Experts(128, 8, 1536)),
    "GPT OSS 20B": _moe(24, 2880, (64, 8, 64), 201088, Experts(32, 4, 2880)),
    "GPT OSS 120B": _moe(36, 2880, (64, 8, 64), 201088, Experts(128, 4, 2880)),
    "DeepSeekV3": _moe(
        61, 7168, (128, 128, 128), 129280, Experts(256, 8, 2048, 2048, dense_layers=3), ffn=18432
    ),
}
_SAME = {
    "Llama3-8B": "LLAMA3_8B", "Llama3-70B": "LLAMA3_70B", "Llama3-405B": "LLAMA3.1_405B",
    "LLAMA3_405B": "LLAMA3.1_405B", "DeepSeek_V3": "DeepSeekV3",
}  # fmt: skip
#: source of a row -> training framework whose profile predicts it
_SOFTWARE = {
    "vtrain": "megatron",
    "megatron-seqsel-table5(via calculon)": "megatron",
    "llm-foundry": "llm-foundry",
    "megatron-bridge": "megatron-bridge",
    "megatron-lm": "megatron-bridge",
}
_FORMATS = {
    "FP16": "f16", "BF16": "bf16", "AMP_BF16": "bf16", "AMP_FP8": "f8", "FP8": "f8", "MXFP8": "f8",
    "NVFP4": "f4",
}  # fmt: skip
#: NIC per GPU in GB/s and direction: 4 HDR cards of 8 GPUs and more; 400 Gbit/s since Hopper
_NIC_GBS = {8: 25.0, 9: 50.0, 10: 50.0}


@dataclass(frozen=True)
class Step:
    """A measured step: what ran, where, and for how long."""

    source: str
    split: str
    label: str
    software: str
    model: Transformer
    plan: TrainingPlan
    device: Datasheet
    fabric: Fabric
    time_ms: float

    @property
    def group(self) -> str:
        """The published table that the row belongs to."""
        return f"{self.source} {self.split}".strip()


def _number(row: Mapping[str, str], name: str, absent: float) -> float:
    text = row.get(name) or ""
    return float(text) if text else absent


def read_steps(folder: Path) -> tuple[list[Step], dict[str, int]]:
    """(steps, number of rows left out per reason) of a folder's `e2e_train.csv.gz`."""
    links = {
        row["name"]: float(row["nvlink_gbs_per_dir"] or 0) or float(row["pcie_gbs_per_dir"] or 16)
        for row in csv.DictReader((folder / "devices.csv").open(encoding="utf-8"))
    }
    steps: list[Step] = []
    left: dict[str, int] = {}
    for row in _rows(folder):
        found = _step(row, links)
        if isinstance(found, Step):
            steps.append(found)
        else:
            left[found] = left.get(found, 0) + 1
    return steps, left


def _rows(folder: Path) -> Iterator[dict[str, str]]:
    with gzip.open(folder / "e2e_train.csv.gz", "rt", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _step(row: Mapping[str, str], links: Mapping[str, float]) -> Step | str:
    """The step of a row, or why there is none."""
    source, device = row["source"], datasheets().get(row["device"])
    software = _SOFTWARE.get(source)
    if software is None:
        return f"{source}: not a distributed training step"
    model = _model(row)
    if model is None:
        return f"{row['model']}: sizes are not published or no transformer"
    precision = _FORMATS.get(row["precision"].upper())
    if device is None or precision is None:
        return f"{row['device']} {row['precision']}: no such device or format"
    plan = TrainingPlan(
        gpus=int(_number(row, "gpus", 1)),
        seq=int(_number(row, "seq", 1)),
        micro_batch=int(_number(row, "mbs", 1)),
        global_batch=int(_number(row, "gbs", 1)),
        gpus_per_node=int(_number(row, "gpus_per_node", 8)),
        tp=int(_number(row, "tp", 1)),
        pp=int(_number(row, "pp", 1)),
        cp=int(_number(row, "cp", 1)),
        ep=int(_number(row, "ep", 1)),
        vp=int(_number(row, "vp", 1)),
        fsdp=row.get("fsdp", "") not in ("", "0"),
        sequence_parallel=software == "megatron-bridge" or "SP" in row["recompute"],
        precision=precision,
        recompute=(row["recompute"] or "none").split("+")[0],
    )
    nic = _NIC_GBS.get(int(device.cc), 25.0)
    fabric = Fabric(links[row["device"]] * 1e9, nic * 1e9)
    split = row.get("split") or (row["ver"] if source == "vtrain" else "")
    label = f"{row['model']} on {plan.gpus} {row['device']} tp{plan.tp} pp{plan.pp} {row['ver']}"
    return Step(source, split, label, software, model, plan, device, fabric, _time_ms(row, plan))


def _time_ms(row: Mapping[str, str], plan: TrainingPlan) -> float:
    rate = _number(row, "tokens_s_gpu", 0.0)
    if rate:
        return plan.global_batch * plan.seq / (rate * plan.gpus) * 1e3
    return float(row["step_time_ms"])


def _model(row: Mapping[str, str]) -> Transformer | None:
    if row.get("hidden") and row.get("layers") and row.get("heads"):
        sizes = (int(float(row[name])) for name in ("layers", "hidden", "heads"))
        return _gpt(*sizes)
    return MODELS.get(_SAME.get(row["model"], row["model"]))
