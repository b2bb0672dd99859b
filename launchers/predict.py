"""Predict the labels of texts with a saved model.

    python launchers/predict.py outputs/wordnet/model texts.txt > predictions.jsonl
    echo "a small domesticated carnivore" | python launchers/predict.py outputs/wordnet/model
    torchrun --nproc_per_node 2 launchers/predict.py outputs/wordnet/model texts.txt    # the processes share the labels

Input: a text file with one text a line, JSON lines with a field "text" (the name ends in .jsonl or .json), or standard
input (one text a line). Output: JSON lines, labels best first:

    {"text": ..., "labels": [{"id": ..., "text": ..., "score": ...}, ...]}
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from xmc_trainer.cli import run
from xmc_trainer.errors import UserError

if TYPE_CHECKING:
    from xmc_trainer.model import XMCModel
    from xmc_trainer.parallel import Ranks

# Texts read, predicted and written at a time: memory stays flat however long the input.
_CHUNK = 4096


def read_texts(path: str) -> Iterator[str]:
    """The texts of the input, with an error that names the line for one that is none."""
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield _text_of(line, f"{'standard input' if path == '-' else path}, line {number}", path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _text_of(line: bytes, where: str, path: str) -> str:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
        if path.endswith((".jsonl", ".json")):
            record = json.loads(text)
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise UserError(f'{where}: write an object with a string field "text"')
            text = record["text"]
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8; convert the file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg})") from None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character; correct the text") from None
    if not text.strip():
        raise UserError(f"{where}: the text is empty; remove the line")
    return text


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument("input", nargs="?", default="-", help="file with the texts; - (the default) is standard input")
    parser.add_argument("--output", default="-", help="file to write; - (the default) is standard output")
    parser.add_argument("-k", type=int, default=5, help="labels a text (default 5)")
    parser.add_argument("--batch_size", type=int, default=256, help="texts a batch (default 256)")
    parser.add_argument("--device", help="cuda or cpu; default: the GPU if there is one")
    arguments = parser.parse_intermixed_args()
    for name in ("k", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{'-k' if name == 'k' else '--batch_size'}={getattr(arguments, name)}: must be at least 1")
    if arguments.output != "-" and Path(arguments.output).resolve() == Path(arguments.input).resolve():
        raise UserError(f"--output={arguments.output}: is the input file; name another")
    if arguments.output != "-" and not Path(arguments.output).absolute().parent.is_dir():
        raise UserError(f"--output={arguments.output}: there is no such folder; make it first")

    import torch

    from xmc_trainer.model import XMCModel
    from xmc_trainer.parallel import joined_ranks

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with joined_ranks(device) as own_device:
        predict(XMCModel.load(arguments.model, own_device), arguments)


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
    partial = Path(f"{arguments.output}.partial")
    try:
        with sys.stdout if arguments.output == "-" else partial.open("w", encoding="utf-8") as out:
            while first is not None:
                for text, labels in zip(*first):
                    record = {"text": text, "labels": [label._asdict() for label in labels]}
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                first = next(predictions, None)
        if arguments.output != "-":
            partial.replace(arguments.output)  # whole, or not at all
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
