"""Predict the labels of texts with a saved model.

    xmc-trainer predict outputs/wordnet/model texts.txt > predictions.jsonl
    echo "a small domesticated carnivore" | xmc-trainer predict outputs/wordnet/model
    xmc-trainer predict outputs/wordnet/model texts.txt -k 20 --threshold 0.3
    xmc-trainer predict outputs/wordnet/model products.csv --text-column title --output scores.npz
    torchrun --nproc_per_node 2 launchers/predict.py outputs/wordnet/model texts.txt    # the processes share the labels

Input, in UTF-8: a .csv, .tsv, .jsonl, .json or .parquet file with a column or field of texts (--text-column), or any other
file or standard input with one text per line. An empty line is an empty text. The extension of --output, or --format,
chooses the format; standard output, or a file without an extension, is jsonl:

    jsonl      {"text": ..., "labels": [{"id": ..., "text": ..., "score": ...}, ...]} on each line, best labels first
    tsv, csv   a row for each predicted label: row (number of the text, from 1), rank, label, label_text, score, text
    npz        a sparse matrix of scores for scipy.sparse.load_npz: texts x labels, labels as in the model's labels.parquet
    parquet    the columns text and labels, as in jsonl
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from xmc_trainer.checkpoint.model_manifest import facts_of_model
from xmc_trainer.commands.prediction_files import (
    EXTENSIONS,
    Writer,
    has_columns,
    read_texts,
    require_thresholds,
    threshold,
)
from xmc_trainer.errors import UserError
from xmc_trainer.files import replacing, require_writable

if TYPE_CHECKING:
    from xmc_trainer.model import XMCModel
    from xmc_trainer.parallel import Ranks

# Texts per chunk; memory use does not grow with the input.
_CHUNK = 4096


def read_chunks(path: str, text_column: str, ranks: Ranks) -> Iterator[list[str]]:
    """Yield the texts that rank 0 reads, in chunks, on every rank. A faulty line raises UserError on all of them."""
    texts = read_texts(path, text_column)
    while True:
        chunk: list[str] | UserError = []
        if ranks.rank == 0:
            try:
                chunk = list(islice(texts, _CHUNK))
            except UserError as error:
                chunk = error
        chunk = ranks.broadcast(chunk)
        if isinstance(chunk, UserError):
            raise chunk
        if not chunk:
            return
        yield chunk


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """Open the output. A regular file is replaced atomically at the end; pipes and devices are written to."""
    if path == "-":
        yield sys.stdout.buffer
    else:
        with replacing(Path(path)) as out:
            yield cast(IO[bytes], out.buffer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument("input", nargs="?", default="-", help="file with the texts; - (the default) is standard input")
    parser.add_argument("--output", default="-", help="file to write; - (the default) is standard output")
    parser.add_argument(
        "--format",
        choices=sorted({*EXTENSIONS.values()}),
        help="format of the output; default: by its extension",
    )
    parser.add_argument("--text-column", default="text", help="column or field of the texts (default text)")
    parser.add_argument("-k", type=int, default=5, help="labels per text (default 5)")
    parser.add_argument(
        "--threshold",
        type=threshold,
        help="of the -k best labels only those that score at least this; `fitted`: what xmc-trainer calibrate has stored",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="texts per batch (default 256)")
    parser.add_argument("--device", help="cpu, cuda, or cuda:N for one of several GPUs; default: a GPU if there is one")
    arguments = parser.parse_intermixed_args()
    _check(arguments)

    # torch and transformers import slowly; the checks above do not wait for them.
    from xmc_trainer.model import XMCModel, device_of
    from xmc_trainer.parallel import joined_ranks

    with joined_ranks(device_of(arguments.device)) as own_device:
        predict(XMCModel.load(arguments.model, own_device), arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Raise UserError for mistakes in the arguments: numbers, device, streams, model, thresholds."""
    for name, value in (("-k", arguments.k), ("--batch_size", arguments.batch_size)):
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    if arguments.device and not re.fullmatch(r"cpu|cuda(:\d+)?", arguments.device):
        raise UserError(
            f"--device={arguments.device}: is not valid; choose cpu, cuda, or a GPU by its number, such as cuda:1"
        )
    source, output = arguments.input, arguments.output
    if source == "-" and sys.stdin is None:
        raise UserError("standard input: is closed; name a file with the texts")
    if output == "-" and sys.stdout is None:
        raise UserError("standard output: is closed; name a file with --output")
    if output != "-":
        if os.path.isfile(output) and os.path.isfile(source) and os.path.samefile(source, output):
            raise UserError(f"--output={output}: is the input file; name another")
        require_writable(Path(output), "--output", () if arguments.format else EXTENSIONS)
    facts = facts_of_model(Path(arguments.model))
    if arguments.k > facts.labels:
        raise UserError(f"-k={arguments.k}: the model has {facts.labels} labels; lower it")
    require_thresholds(Path(arguments.model), facts, arguments.threshold)
    if arguments.text_column != "text" and not has_columns(source):
        name = "standard input" if source == "-" else source
        raise UserError(
            f"--text-column={arguments.text_column}: {name} has one text per line and no columns; leave it out"
        )
    if source != "-" and "RANK" not in os.environ:  # of several ranks only the first reads it
        if not os.path.exists(source):
            raise UserError(f"{source}: cannot be read ({os.strerror(errno.ENOENT)}); name another file")
        if os.path.isfile(source):  # reading a pipe would take texts out of it
            next(read_texts(source, arguments.text_column), None)


def predict(model: XMCModel, arguments: argparse.Namespace) -> None:
    """Predict the input's labels on all ranks; rank 0 reads and writes."""
    ranks = model.saved.head.ranks
    chunks = read_chunks(arguments.input, arguments.text_column, ranks)
    predictions = ((chunk, *model.topk(chunk, arguments.k, arguments.batch_size)) for chunk in chunks)
    if ranks.rank:
        deque(predictions, maxlen=0)
        return
    first = next(predictions, None)  # before the output is opened, so that a faulty input leaves no empty file
    if first is None:
        print(f"{'standard input' if arguments.input == '-' else arguments.input}: no texts", file=sys.stderr)
    form = arguments.format or EXTENSIONS.get(Path(arguments.output).suffix, "jsonl")
    try:
        with opened(arguments.output) as out, Writer(out, form, model) as writer:
            for texts, scores, labels in chain([first] if first else [], predictions):
                writer.write(texts, scores, labels, model.saved.chosen(scores, labels, arguments.threshold))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and arguments.output == "-":
            raise  # the reader has closed the pipe
        where = "standard output" if arguments.output == "-" else f"--output={arguments.output}"
        raise UserError(f"{where}: cannot be written ({error.strerror}); name another file") from None
