"""Predict the labels of texts with a saved model.

    python launchers/predict.py outputs/wordnet/model texts.txt > predictions.jsonl
    echo "a small domesticated carnivore" | python launchers/predict.py outputs/wordnet/model
    torchrun --nproc_per_node 2 launchers/predict.py outputs/wordnet/model texts.txt    # the processes share the labels

Input: a text file with one text a line, JSON lines with a field "text" (the name ends in .jsonl or .json), or standard
input (one text a line), in UTF-8. An empty line is an empty text, predicted from no words. Output: JSON lines in UTF-8,
labels best first:

    {"text": ..., "labels": [{"id": ..., "text": ..., "score": ...}, ...]}
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from xmc_trainer.commands.cli import run
from xmc_trainer.errors import UserError
from xmc_trainer.files import replacing

if TYPE_CHECKING:
    from xmc_trainer.model import XMCModel
    from xmc_trainer.parallel import Ranks

# Texts read, predicted and written at a time: memory stays flat however long the input.
_CHUNK = 4096


def read_texts(path: str) -> Iterator[str]:
    """The texts of the input, with an error that names the line for one that is none. They are read as training files are."""
    from xmc_trainer.data.texts import check_unicode, decoded_lines, json_object

    name = "standard input" if path == "-" else path
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            for number, line in decoded_lines(file, name):
                text, where = line, f"{name}, line {number}"
                if path.endswith((".jsonl", ".json")):
                    text = json_object(line, where).get("text")
                    if not isinstance(text, str):
                        raise UserError(f'{where}: write an object with a string field "text"')
                    check_unicode(text, where)
                yield text
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None


def read_chunks(path: str, ranks: Ranks) -> Iterator[list[str]]:
    """What rank 0 reads, on every rank, a part at a time; a bad line ends them all."""
    texts = read_texts(path)
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
def opened(path: str) -> Iterator[TextIO]:
    """The output, in UTF-8. A plain file appears whole or not at all; a pipe or a device is written to as it is."""
    if path == "-":
        sys.stdout.reconfigure(encoding="utf-8")
        yield sys.stdout
    else:
        with replacing(Path(path)) as out:
            yield out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument("input", nargs="?", default="-", help="file with the texts; - (the default) is standard input")
    parser.add_argument("--output", default="-", help="file to write; - (the default) is standard output")
    parser.add_argument("-k", type=int, default=5, help="labels a text (default 5)")
    parser.add_argument("--batch_size", type=int, default=256, help="texts a batch (default 256)")
    parser.add_argument(
        "--device", help="cpu, cuda, or cuda:N for one of several GPUs; default: the GPU if there is one"
    )
    arguments = parser.parse_intermixed_args()
    for name in ("k", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{'-k' if name == 'k' else '--batch_size'}={getattr(arguments, name)}: must be at least 1")
    _check_streams(arguments.input, arguments.output)

    # Imported here, for torch and transformers take seconds: what stands above does not wait for them.
    from xmc_trainer.model import XMCModel, device_of
    from xmc_trainer.parallel import joined_ranks

    with joined_ranks(device_of(arguments.device)) as own_device:
        predict(XMCModel.load(arguments.model, own_device), arguments)


def _check_streams(source: str, output: str) -> None:
    """UserError for an output that cannot be written, or would replace the input."""
    if source == "-" and sys.stdin is None:
        raise UserError("standard input: is closed; name a file with the texts")
    if output == "-" and sys.stdout is None:
        raise UserError("standard output: is closed; name a file by --output")
    if output == "-":
        return
    try:
        path = Path(output)
        if not path.absolute().parent.is_dir():
            raise UserError(f"--output={output}: there is no such folder; make it first")
        if path.is_dir():
            raise UserError(f"--output={output}: is a folder; name a file in it")
        if source != "-" and path.is_file() and Path(source).is_file() and path.samefile(source):
            raise UserError(f"--output={output}: is the input file; name another")
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror}); name another file") from None


def predict(model: XMCModel, arguments: argparse.Namespace) -> None:
    """Rank 0 reads and writes, all ranks predict."""
    ranks = model.saved.head.ranks
    chunks = read_chunks(arguments.input, ranks)
    predictions = ((chunk, model.predict(chunk, arguments.k, arguments.batch_size)) for chunk in chunks)
    if ranks.rank:
        deque(predictions, maxlen=0)
        return
    first = next(predictions, None)  # before the output is opened: a bad input leaves no empty file behind
    if first is None:
        print(f"{'standard input' if arguments.input == '-' else arguments.input}: no texts", file=sys.stderr)
    try:
        with opened(arguments.output) as out:
            for texts, labels_of_texts in chain([first] if first else [], predictions):
                for text, labels in zip(texts, labels_of_texts, strict=True):
                    record = {"text": text, "labels": [label._asdict() for label in labels]}
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                out.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError) and arguments.output == "-":
            raise  # nobody reads on
        where = "standard output" if arguments.output == "-" else f"--output={arguments.output}"
        raise UserError(f"{where}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run(main)
