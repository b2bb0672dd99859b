"""Plan memory, disk and time of a training before anything is loaded.

xmc-trainer plan dataset=amazon3m                              # 1, 2, 4 and 8 GPUs, every ZeRO stage
xmc-trainer plan dataset=amazon3m --gpus 2 --gpu-gib 80 model.ffi.weight_dtype=bfloat16
xmc-trainer plan dataset=amazon3m --gpus 1 --chart cost.svg         # memory and time over labels and fan-in; needs matplotlib
xmc-trainer plan dataset=mine.yaml --texts 500000 --test-texts 50000 --tokens 80 --positives 4
xmc-trainer plan dataset=amazon3m --gpus 2 --offload              # with ds_configs/zero2_offload.json and zero3_offload.json

It takes the settings of a training. It reads only the encoder's config.json and no data. Sizes of published data sets are built in;
give those of others. Times are scaled from the CSV files of xmc-trainer bench. To use rates of your own machine, run
`xmc-trainer bench train --csv train.csv` and `bench head --csv head.csv`, and give --rates train.csv head.csv.
`xmc_trainer.plan` documents the formula of every term.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

_RATES = Path(__file__).parents[2] / "docs" / "results"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs="+", metavar="key=value", help="settings of a training; dataset=... is required"
    )
    parser.add_argument("--gpus", type=int, help="plan only for this number of GPUs (default: 1, 2, 4 and 8)")
    parser.add_argument("--gpu-gib", type=float, help="memory of a GPU in GiB (default: this machine's, or 80)")
    parser.add_argument(
        "--offload", action="store_true", help="plan ds_configs/zero2_offload.json and zero3_offload.json"
    )
    parser.add_argument("--cores", type=int, help="CPU cores for tokenising (default: this machine's, at most 16)")
    parser.add_argument("--texts", type=int, help="training texts (default: the published number)")
    parser.add_argument("--test-texts", type=int)
    parser.add_argument("--tokens", type=float, help="mean tokens per text, after truncation to data.max_len")
    parser.add_argument("--positives", type=float, help="mean labels per text")
    parser.add_argument("--rates", nargs="+", type=Path, metavar="CSV", help="measured rates (default: docs/results)")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", help="draw memory and time over the number of labels and the fan-in"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_intermixed_args()


def main() -> None:
    options = parse()
    from xmc_trainer.builders.recipe import require_applied
    from xmc_trainer.config import load_config
    from xmc_trainer.errors import UserError

    for name in ("gpus", "gpu_gib", "cores", "texts", "test_texts", "tokens", "positives"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1e10:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be above 0 and below 1e10")
    config = load_config(options.settings)
    require_applied(config)
    for path in options.rates or ():
        if not path.is_file():
            raise UserError(f"--rates={path}: no such file; name a CSV file of xmc-trainer bench or prepare")
    if options.chart is not None:
        from xmc_trainer.commands.report import require_picture

        require_picture(options.chart, "--chart")
    if options.chart is not None:
        chart(config, options)
        return
    found = report(config, options)
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines_of(found)), flush=True)


def report(config: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Collect everything that is printed, as JSON values in bytes and seconds."""
    import torch

    from xmc_trainer import plan

    rates = plan.Rates.read(options.rates if options.rates is not None else sorted(_RATES.glob("*.csv")))
    encoder, facts = plan.EncoderPlan.of(config), _facts(config, options)
    here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    gpu_bytes = int(options.gpu_gib * plan.GIB) if options.gpu_gib else here or 80 * plan.GIB
    cores = options.cores or min(16, len(os.sched_getaffinity(0)))
    rows = []
    for gpus in [options.gpus] if options.gpus else [1, 2, 4, 8]:
        for stage in (2, 3) if options.offload else plan.STAGES:
            row: dict[str, Any] = {
                "gpus": gpus,
                "stage": plan.stage_name(stage) + " offload" * options.offload,
                "refused": plan.refusal(config, gpus, stage),
            }
            if row["refused"] is None:
                memory = plan.memory_of(config, encoder, facts, gpus, stage, gpu_bytes, offload=options.offload)
                phases = plan.phases_of(config, encoder, facts, gpus, stage, rates, cores)
                row |= {
                    "micro_batches": memory.parts, "terms": memory.terms, "peak": memory.peak, "device": memory.device,
                    "fits": memory.device <= gpu_bytes, "host": plan.host_terms(config, encoder, facts, gpus, stage, options.offload),
                    "phases": [vars(phase) for phase in phases],
                }  # fmt: skip
            rows.append(row)
    index = config.model.ffi.index_from_texts or config.model.ffi.weight_init == "centroid"
    return {
        "dataset": config.data.dataset, "texts": facts.texts, "test_texts": facts.test_texts, "labels": facts.labels,
        "tokens_a_text": facts.tokens, "labels_a_text": facts.positives, "encoder_parameters": encoder.trained + encoder.fixed,
        "features": encoder.features, "activations_traced": encoder.traced, "texts_a_step": config.texts_a_step, "precision": config.training.amp.mixed_precision,
        "gpu_bytes": gpu_bytes, "cores": cores,
        "disk": {
            "token cache": plan.token_cache_bytes(facts),
            "features of texts, per process, for the first index": 2 * facts.texts * encoder.features if index else 0,
            "checkpoint": plan.checkpoint_bytes(config, encoder, facts),
            "saved model": plan.model_bytes(config, encoder, facts, 1),
        },
        "checkpoints_kept": config.training.checkpoints_kept,
        "plans": rows,
    }  # fmt: skip


def chart(config: Any, options: argparse.Namespace) -> None:
    """Draw GPU memory and time of an epoch over the number of labels, a line for each fan-in, for one GPU or --gpus.

    ZeRO 2. A dot is the newest measured training with as many texts per step: a row of `bench train`. A fan-in without a
    measured rate of its head has no line for the time.
    """
    import numpy as np

    from xmc_trainer import plan
    from xmc_trainer.commands.report import save_figure

    gpus, stage = options.gpus or 1, 2
    rates = plan.Rates.read(options.rates if options.rates is not None else sorted(_RATES.glob("*.csv")))
    encoder, facts = plan.EncoderPlan.of(config), _facts(config, options)
    counts, fan_in = np.geomspace(1e5, 8.6e6, 15).astype(int), config.model.ffi.fan_in

    measured = [
        row
        for _, row in rates.train
        if row["engine"] == "DeepSpeed ZeRO 2"
        and (int(row["ranks"]), int(row["texts_a_step"])) == (gpus, config.texts_a_step)
        and row["peak_gib"]
    ]

    def draw(panels: Any) -> None:
        for each in (fan_in // 2, fan_in, fan_in * 2):
            gib, minutes = [], []
            for labels in counts.tolist():
                ffi = replace(config.model.ffi, fan_in=each)
                other = replace(
                    config, model=replace(config.model, ffi=ffi), data=replace(config.data, num_labels=labels)
                )
                sized = replace(facts, labels=labels)
                gib.append(plan.memory_of(other, encoder, sized, gpus, stage, 1 << 50).peak / plan.GIB)
                phases = plan.phases_of(other, encoder, sized, gpus, stage, rates, options.cores or 16)
                minutes.append((next(p.seconds for p in phases if p.name == "an epoch") or np.nan) / 60)
            for panel, values in zip(panels, (gib, minutes)):
                panel.plot(counts / 1e6, values, label=f"fan-in {each}, planned")
        for row in measured[-1:]:  # the newest
            labels, epoch = int(row["labels"]) / 1e6, facts.texts / float(row["texts_s"]) / 60
            for panel, value in zip(panels, (float(row["peak_gib"]), epoch)):
                panel.plot([labels], [value], "k.", label=f"measured at commit {row.get('commit') or 'unknown'}")
        for panel, name in zip(panels, ("GiB of a GPU at the peak", "minutes of an epoch")):
            panel.set(xlabel="million labels", ylabel=name, ylim=(0, None))

    save_figure(options.chart, 2, draw)


def _facts(config: Any, options: argparse.Namespace) -> Any:
    from xmc_trainer.data.generated import Shape
    from xmc_trainer.plan import Facts

    told = (options.texts, options.test_texts, options.tokens, options.positives)
    shape = Shape(1, 1, config.data.num_labels or 1, 1.0, 1.0) if None not in told and config.data.num_labels else None
    names = ("texts", "test_texts", "tokens", "positives")
    given = {name: value for name, value in zip(names, told) if value is not None}
    return replace(Facts.of(config, shape), **given)


def lines_of(found: dict[str, Any]) -> list[str]:
    """Format the report: a table of GPU memory, then disk, and for each number of GPUs host memory and times of one plan."""
    gib = 1 << 30
    lines = [
        f"{found['dataset']}: {found['texts']:,} training and {found['test_texts']:,} test texts of {found['tokens_a_text']:.0f} tokens, "
        f"{found['labels']:,} labels, {found['labels_a_text']:.1f} per text",
        f"encoder of {found['encoder_parameters'] / 1e6:.1f} million parameters, {found['features']} features; "
        f"{found['texts_a_step']} texts per step; precision: {found['precision']}; GPUs of {found['gpu_bytes'] / gib:.0f} GiB",
    ]
    if not found["activations_traced"]:
        lines.append(
            "activations: this encoder cannot be measured without its weights, so a BERT of its size is planned"
        )
    lines.append("")
    terms = next((list(row["terms"]) for row in found["plans"] if row["refused"] is None), [])
    lines.append(
        "GiB of each GPU".ljust(22) + "parts".rjust(6) + "".join(name.rjust(max(9, len(name) + 2)) for name in terms)
        + "peak".rjust(8) + "with CUDA".rjust(11)
    )  # fmt: skip
    for row in found["plans"]:
        start = f"{row['gpus']} GPU{'s' * (row['gpus'] > 1)}, {row['stage']}".ljust(22)
        if row["refused"] is not None:
            lines.append(f"{start}      -  {row['refused']}")
            continue
        cells = "".join(f"{value / gib:.2f}".rjust(max(9, len(name) + 2)) for name, value in row["terms"].items())
        fits = "" if row["fits"] else "  does not fit"
        lines.append(
            f"{start}{row['micro_batches']:6d}{cells}{row['peak'] / gib:8.2f}{row['device'] / gib:11.2f}{fits}"
        )
    lines += ["", "disk, GiB"]
    lines += [f"  {name.ljust(52)}{value / gib:8.2f}" for name, value in found["disk"].items() if value]
    lines.append(f"  (checkpoints: {found['checkpoints_kept']} kept, and one while it is written)")
    for gpus in dict.fromkeys(row["gpus"] for row in found["plans"]):
        rows = [row for row in found["plans"] if row["gpus"] == gpus and row["refused"] is None]
        if not rows:
            continue
        # The simplest plan that fits: without DeepSpeed, or the lowest stage.
        row = next((row for row in rows if row["fits"]), rows[-1])
        lines += ["", f"{gpus} GPU{'s' * (gpus > 1)}, {row['stage']}: host memory of rank 0 without its libraries, GiB"]
        lines += [f"  {name.ljust(52)}{value / gib:8.2f}" for name, value in row["host"].items()]
        lines.append("time")
        lines += [
            f"  {phase['name'].ljust(20)}{_time(phase['seconds']):>10}  {phase['source']}" for phase in row["phases"]
        ]
    return lines


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
