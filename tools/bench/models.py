"""Tables of model speed: candidates against baselines in one setting."""

from collections.abc import Sequence
from typing import Any

import torch

from tools.bench.candidates import Candidate, Setting, Workload, build_workload
from tools.bench.floor import floor_seconds, measure_roof, work_of
from tools.bench.report import Table
from tools.bench.timing import Spread, Stopwatch, gpu_peak, measure_paired, paired_ratio, resident_growth

MIB = 2**20


def model_table(
    candidates: Sequence[Candidate],
    baselines: Sequence[Candidate],
    setting: Setting,
    *,
    stopwatch: Stopwatch,
    rounds: int,
    min_seconds: float,
    memory: bool = False,
) -> Table:
    """Measure all contestants in one setting, interleaved.

    Args:
        candidates: what is asked about.
        baselines: what it is compared with; measured alike.
        setting: mode, batch, image size, device.
        stopwatch: the clock.
        rounds, min_seconds: number and length of the measurements of each.
        memory: also measure memory: the growth of the resident size of a fresh process over two calls, or on a GPU
            the peak of what is allocated for weights, optimizer and one call.
    """
    contestants = list(dict.fromkeys([*candidates, *baselines]))
    workloads, peaks = _prepare(contestants, setting, memory=memory)
    times = dict(
        zip(
            contestants,
            measure_paired([w.run for w in workloads], stopwatch, rounds=rounds, min_seconds=min_seconds),
            strict=True,
        )
    )
    roofs = {p: measure_roof(setting.device, p) for p in {c.precision for c in contestants}}
    rows = []
    for contestant, peak in zip(contestants, peaks, strict=True):
        row = _row(contestant, times, [b for b in baselines if b != contestant], setting)
        floor = floor_seconds(
            work_of(contestant.name, setting.img_size),
            roofs[contestant.precision],
            train=setting.mode == "train",
            batch=setting.batch,
            precision=contestant.precision,
        )
        row["floor_images_per_second"] = setting.batch / floor
        row["floor_share"] = f"{100 * floor / Spread.of(times[contestant]).median:.0f} %"
        row["memory_mib"] = None if peak is None else round(peak / MIB)
        rows.append(row)
    memory_heading = "peak MiB" if setting.device.type == "cuda" else "growth MiB"
    columns = [
        ("", "label"),
        ("images/s", "images_per_second"),
        ("min - max", "images_per_second_spread"),
        ("ms", "milliseconds"),
        *((f"x {b.label}", f"ratio {b.label}") for b in baselines),
        ("floor images/s", "floor_images_per_second"),
        ("of floor", "floor_share"),
        *([(memory_heading, "memory_mib")] if memory else []),
    ]
    return Table(
        _title(setting, stopwatch, rounds),
        columns,
        rows,
        notes=[_roof_note(p, r) for p, r in roofs.items()],
        facts={"mode": setting.mode, "batch": setting.batch, "img_size": setting.img_size},
    )


def _prepare(
    contestants: Sequence[Candidate], setting: Setting, *, memory: bool
) -> tuple[list[Workload], list[int | None]]:
    """Build the contestants; measure the memory of each, before any timing."""
    workloads, peaks = [], []
    on_gpu = setting.device.type == "cuda"
    for contestant in contestants:
        before = torch.cuda.memory_allocated() if on_gpu else 0
        workloads.append(build_workload(contestant, setting))
        if not memory:
            peaks.append(None)
        elif on_gpu:
            peaks.append(gpu_peak(workloads[-1].run, before))
        else:
            peaks.append(resident_growth(contestant, setting, torch.get_num_threads()))
    return workloads, peaks


def _row(
    contestant: Candidate, times: dict[Candidate, list[float]], baselines: Sequence[Candidate], setting: Setting
) -> dict[str, Any]:
    own = Spread.of(times[contestant])
    row = {
        "label": contestant.label,
        "name": contestant.name,
        "form": contestant.form,
        "precision": contestant.precision,
        "images_per_second": setting.batch / own.median,
        "images_per_second_spread": f"{setting.batch / own.high:.3g} - {setting.batch / own.low:.3g}",
        "milliseconds": 1000 * own.median,
        "seconds": times[contestant],
    }
    for baseline in baselines:
        ratio = paired_ratio(times[contestant], times[baseline])
        row[f"ratio {baseline.label}"] = f"{ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f})"
    return row


def _title(setting: Setting, stopwatch: Stopwatch, rounds: int) -> str:
    what = "training step" if setting.mode == "train" else "inference"
    order = "channels_last" if setting.channels_last else "contiguous"
    return (
        f"{what}, batch {setting.batch}, {setting.img_size} x {setting.img_size}, {order} images, fp32 unless "
        f"said, {torch.get_num_threads()} thread(s), {stopwatch.clock}, {rounds} interleaved rounds"
    )


def _roof_note(precision: str, roof: Any) -> str:
    return (
        f"{precision}: matrix product {roof.flops / 1e9:,.0f} GFLOP/s, copy {roof.bytes / 1e9:,.0f} GB/s, measured "
        "here; the floor is the longer of arithmetic and memory traffic (tools/bench/floor.py)"
    )
