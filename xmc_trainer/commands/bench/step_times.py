"""Whole training steps and their parts: the work of `xmc-trainer bench train`."""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from xmc_trainer.builders.encoder import encoder_of, longest_batch
from xmc_trainer.builders.training import Inputs, build_trainer, load_inputs
from xmc_trainer.config import Config
from xmc_trainer.data import Corpus, Ragged
from xmc_trainer.data.generated import Shape, block
from xmc_trainer.encoder.flat import FlatEncoder
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.engine.accelerator import engine_name
from xmc_trainer.hooks import Hook
from xmc_trainer.hooks.schedule import ScheduleHook

if TYPE_CHECKING:
    from xmc_trainer.trainer import Trainer

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_PARTS = ("data", "forward", "head", "backward", "engine")


def measure(config: Config, options: argparse.Namespace, warm: int, counted: int, generated: bool) -> None:
    """Measure and print a training, and append its row to --csv.

    Args:
        options: of `xmc-trainer bench train`.
        warm, counted: steps before the timed ones, and after them, in which the host's waits are counted.
        generated: generate data and encoder in place of those that `config` names.
    """
    start = time.perf_counter()
    load = (lambda *_: generate(config, options)) if generated else load_inputs
    trainer = build_trainer(config, deepspeed_config=options.deepspeed_config, load=load)
    bench = Bench(trainer, options.positives, "generated" if generated else "real", counted)
    row = bench.describe() | {"start_s": round(time.perf_counter() - start, 1)}
    say = print if trainer.accelerator.is_main_process else lambda line: None
    say(
        f"{row['device']}, {row['ranks']} processes, {row['engine']}, {row['precision']}; torch {row['torch']}; {row['data']} data of "
        f"{row['labels']:,} labels; ready after {row['start_s']:.0f} s\n{row['texts_a_step']} texts per step in {row['micro_batches']} micro-batches of "
        f"up to {row['tokens']} tokens, encoder {'compiled' if row['compiled'] else 'not compiled'}"
    )
    row |= bench.steps(warm, options.steps)
    parts = ", ".join(f"{part} {row[f'{part}_ms']:.2f}" for part in _PARTS)
    waits = (
        f"; the host waits {row['host_waits']:g} times per step; peak {row['peak_gib']:.2f} GiB"
        if "peak_gib" in row
        else ""
    )
    say(
        f"{row['texts_s']:10,.0f} texts/s{row['ms']:10.2f} ms per step: {parts}\n"
        f"waiting for data {100 * row['data_ms'] / row['ms']:.1f} %{waits}"
    )
    row |= bench.alone()
    say(
        f"head alone {row['head_alone_ms']:.2f} ms, its exchange {row['exchange_ms']:.2f} ms\n"
        f"encoder's step, {row['rows']} x {row['width']} tokens per process: {row['encoder_ms']:.2f} ms"
    )
    if not options.no_floor:
        row |= bench.floor(row["rows"], row["width"])
        row["ratio"] = round(row["encoder_ms"] / row["floor_ms"], 3)
        say(f"the same in plain torch {row['floor_ms']:.2f} ms: {row['ratio']:.2f} x")
    if trainer.accelerator.is_main_process:
        write(row, options.csv)
    trainer.close()


def write(row: dict[str, Any], path: Path) -> None:
    """Append a row to a CSV file, with the efficiency relative to the file's last row of one process, if there is one."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    same = ("dataset", "engine", "precision", "texts_a_step")
    alone = [
        old
        for old in [*rows, row]
        if str(old["ranks"]) == "1" and all(str(old[name]) == str(row[name]) for name in same)
    ]
    if alone:
        row = row | {"efficiency": round(row["texts_s"] / row["ranks"] / float(alone[-1]["texts_s"]), 3)}
        print(f"{100 * row['efficiency']:.0f} % of {row['ranks']} times one process's texts/s")
    rows.append(row)
    with path.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, dict.fromkeys(name for each in rows for name in each))
        writer.writeheader()
        writer.writerows(rows)
    print(f"added to {path}", flush=True)


class _Timed(Hook):
    """Times `count` steps after `warm` warm-up steps, then counts the host's waits in `counted` ones."""

    def __init__(self, warm: int, count: int, counted: int) -> None:
        self.warm, self.count, self.counted = warm, count, counted
        self.row: dict[str, Any] = {}
        self._profile: Any = None

    def on_step_begin(self, trainer: Trainer) -> None:
        clock, gpu = trainer.records.clock, trainer.device.type == "cuda"
        if trainer.state.step == self.warm:
            synchronize(trainer)
            clock.read()
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            self._begin = time.perf_counter()
        elif trainer.state.step == self.warm + self.count:
            synchronize(trainer)
            seconds, parts = time.perf_counter() - self._begin, clock.read()
            texts = self.count * trainer.config.texts_a_step
            self.row = {"ms": round(1000 * seconds / self.count, 3), "texts_s": round(texts / seconds, 1)}
            self.row |= {f"{part}_ms": round(parts.get(part, 0.0) / self.count, 3) for part in _PARTS}
            if gpu:
                self.row["peak_gib"] = round(
                    (torch.cuda.max_memory_allocated() + trainer.encoder_step.captured_bytes) / 2**30, 3
                )
                self._profile = torch.profiler.profile(activities=list(torch.profiler.supported_activities()))
                self._profile.__enter__()

    def stop(self) -> None:
        """Finish the profile. Call it after the last step."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            waits = sum(event.count for event in self._profile.key_averages() if event.key in _WAITS)
            # Ending the profiler waits once.
            self.row["host_waits"] = max(0, waits - 1) / self.counted


def synchronize(trainer: Trainer) -> None:
    """Wait for all ranks and for this rank's GPU."""
    trainer.ranks.barrier()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


class Bench:
    """Times steps of a training that writes no files.

    Args:
        positives: labels per text when the head is timed alone.
        data: "generated" or "real".
        counted: steps in which the host's waits are counted.
    """

    def __init__(self, trainer: Trainer, positives: int, data: str, counted: int) -> None:
        self.trainer, self.positives, self.data, self.counted = trainer, positives, data, counted
        self.gpu = trainer.device.type == "cuda"
        self.longest = longest_batch(trainer.corpus)
        batches = trainer.batches
        self.rows = -(-batches.texts_a_step // batches.micro_batches // trainer.ranks.size)  # of a rank's micro-batch

    def describe(self) -> dict[str, Any]:
        """Return the columns that describe machine, engine and data."""
        import deepspeed
        import transformers

        trainer = self.trainer
        return {
            "device": torch.cuda.get_device_name() if self.gpu else f"CPU, {torch.get_num_threads()} threads a process",
            "ranks": trainer.ranks.size, "engine": engine_name(trainer.accelerator), "precision": trainer.config.training.amp.mixed_precision,
            "torch": torch.__version__, "deepspeed": deepspeed.__version__, "transformers": transformers.__version__,
            "dataset": trainer.config.data.dataset, "data": self.data,
            "labels": trainer.corpus.num_labels, "texts_a_step": trainer.config.texts_a_step, "micro_batches": trainer.batches.micro_batches,
            "tokens": self.longest, "compiled": trainer.compiled,
        }  # fmt: skip

    def steps(self, warm: int, count: int) -> dict[str, Any]:
        """Time `count` steps after `warm` warm-up steps."""
        trainer, timed = self.trainer, _Timed(warm, count, self.counted)
        trainer.records.seconds = math.inf  # never read losses, because that reads the clock as well
        trainer.hooks = [*(hook for hook in trainer.hooks if isinstance(hook, ScheduleHook)), timed]
        # The engine starts where the backward pass ends. Under ZeRO 3, where both interleave, nothing is marked.
        module = trainer.accelerator.unwrap_model(trainer.encoder)
        flat = list(module.flat) if isinstance(module, FlatEncoder) else []
        marks = [parameter.register_hook(lambda grad: trainer.records.clock.mark("backward")) for parameter in flat]
        trainer.dispatch("on_train_start")
        trainer.train_epoch()
        timed.stop()
        for mark in marks:
            mark.remove()
        return timed.row

    def alone(self) -> dict[str, Any]:
        """Time the parts on their own, on a batch of the median length."""
        trainer, rows, micro_batches = self.trainer, self.rows, self.trainer.batches.micro_batches
        width = min(-(-int(np.median(trainer.corpus.lengths("train"))) // 8) * 8, self.longest)
        ids, mask = self._texts(rows, width)

        def encoder_step() -> None:
            for _ in range(micro_batches):
                with trainer.accelerator.accumulate(trainer.encoder):
                    trainer.accelerator.backward(trainer.encoder(ids, mask).float().square().mean())
                    trainer.optimizer.step()
                    trainer.optimizer.zero_grad()

        positives, ranks = self.positives, trainer.ranks
        counts = torch.full((rows,), positives, dtype=torch.int32, device=trainer.device)
        labels = torch.randint(trainer.corpus.num_labels, (rows * positives,), dtype=torch.int32, device=trainer.device)
        sizes = [rows] * ranks.size, [len(labels)] * ranks.size
        features = torch.randn(rows, trainer.encoder_module.out_features, device=trainer.device, requires_grad=True)
        sent = features.detach().to(trainer.head.parts()[0][1].product_dtype)

        def head_step() -> None:
            for micro in range(micro_batches):
                last = micro == micro_batches - 1
                trainer.head(
                    features,
                    labels,
                    counts,
                    end_of_step=last,
                    texts_in_step=trainer.config.texts_a_step,
                    rank_sizes=sizes,
                )

        def exchange() -> None:
            gathered, _, _ = ranks.gather_rows_of([sent, labels, counts], [sizes[0], sizes[1], sizes[0]])
            ranks.scatter_sum_rows(gathered.float(), sizes[0])
            ranks.sum(torch.zeros((), device=trainer.device))

        times = {"encoder_ms": encoder_step, "head_alone_ms": head_step, "exchange_ms": exchange}
        return {"rows": rows, "width": width} | {
            name: round(self._milliseconds(work), 3) for name, work in times.items()
        }

    def floor(self, rows: int, width: int) -> dict[str, Any]:
        """Time a step of the same encoder without an engine, in ms, on micro-batches of this size."""
        trainer, micro_batches = self.trainer, self.trainer.batches.micro_batches
        amp, backbone = trainer.config.training.amp, trainer.encoder_module.backbone
        encoder = TextEncoder(type(backbone)(backbone.config), pool_mode=trainer.config.model.encoder.pool_mode)
        if getattr(encoder.backbone, "pooler", None) is not None:
            encoder.backbone.pooler.requires_grad_(False)
        encoder = encoder.to(trainer.device, getattr(torch, amp.dtype) if amp.enabled else torch.float32).train()
        optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], 1e-5, fused=True)
        ids, mask = self._texts(rows, width)
        if self.gpu:
            encoder.compile(dynamic=False, mode="reduce-overhead")

        def step() -> None:
            for _ in range(micro_batches):
                torch.compiler.cudagraph_mark_step_begin()
                encoder(ids, mask).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        # Plain torch at its fastest: `compile_encoder` has set that activations are recomputed.
        with torch._functorch.config.patch(activation_memory_budget=1.0):
            return {"floor_ms": round(self._milliseconds(step), 3)}

    def _texts(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        vocabulary = self.trainer.encoder_module.backbone.config.vocab_size
        ids = torch.randint(5, vocabulary, (rows, width), device=self.trainer.device)
        return ids, torch.ones_like(ids)

    def _milliseconds(self, work: Callable[[], Any], repeat: int = 20) -> float:
        """Return the mean time of a call when calls are queued one after the other."""
        for _ in range(4):
            work()
        synchronize(self.trainer)
        begin = time.perf_counter()
        for _ in range(repeat):
            work()
        if self.gpu:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - begin) / repeat


def generate(config: Config, options: argparse.Namespace) -> Inputs:
    """Build a backbone with random weights, and random texts and labels."""
    hidden = config.model.encoder.encoder_ftr_dim or 768
    layout = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=4 * hidden,
    )
    backbone = BertModel(layout, add_pooling_layer=False)
    encoder = encoder_of(config, backbone)
    labels = config.data.num_labels
    assert labels is not None  # refused above
    texts = max(options.texts, -(-labels // options.positives))
    mean = options.tokens * math.exp(Shape.deviation**2 / 2)  # of a lognormal distribution with this median
    bounds = (8, config.data.max_len)
    shape = Shape(texts, 0, labels, options.positives, mean, bounds=bounds, vocabulary=29_995)
    blocks = [block(shape, "train", number, config.training.seed) for number in range(shape.blocks("train"))]
    lengths = np.concatenate([np.diff(made.words.offsets) for made in blocks]).astype(np.int32)
    columns = {
        "input_ids": _lists([made.words for made in blocks], 5),  # ids above the special tokens
        "labels": _lists([made.labels for made in blocks]),
        "length": lengths,
    }
    train = Dataset(pyarrow.table(columns))
    names = Dataset(pyarrow.table({"id": np.arange(labels).astype(str), "text": np.full(labels, "")}))
    corpus = Corpus(train, train.select(range(min(texts, 1000))), names, None, "generated", texts)
    tokenizer = cast(PreTrainedTokenizerBase, SimpleNamespace(pad_token_id=0))  # a benchmark reads no more of it
    return Inputs(tokenizer, encoder, corpus)


def _lists(parts: list[Ragged], add: int = 0) -> pyarrow.ListArray:
    """Join the rows of all parts into an int32 Arrow list array, with `add` added to each number."""
    values = np.concatenate([part.ids for part in parts]) + add
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pyarrow.ListArray.from_arrays(
        pyarrow.array(offsets.astype(np.int32)), pyarrow.array(values.astype(np.int32))
    )
