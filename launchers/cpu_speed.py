"""Predict the five best labels of test texts on one CPU thread: CPU milliseconds a text, peak memory, P@1 and P@5.

python launchers/cpu_speed.py data/SID-GND-EN xmc_trainer outputs/sidgnd/model
python launchers/cpu_speed.py data/SID-GND-EN onnx exported/onnx/model.onnx
python launchers/cpu_speed.py data/SID-GND-EN onnx exported/onnx/model.int8.onnx
pip install omikuji==0.5.2 scikit-learn
python launchers/cpu_speed.py data/SID-GND-EN omikuji            # trains it first, in another process
pip install libpecos "scipy<1.14" "numpy<2" "pyarrow<19" scikit-learn xxhash    # in an environment of its own
PYTHONPATH=. python launchers/cpu_speed.py data/SID-GND-EN pecos

--save FILE.npy keeps the five best labels; --compare FILE.npy says how far they agree with earlier ones.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import pickle
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from linear_models import Data, K, figures_of, omikuji_model, read
from sklearn.feature_extraction.text import TfidfVectorizer

Predict = Callable[[list[str]], np.ndarray]  # texts -> numbers of their K best labels, best first, int [texts, K]


def xmc_trainer(folder: str) -> Predict:
    from xmc_trainer.model import XMCModel

    model = XMCModel.load(folder, "cpu")
    return lambda texts: model.topk(texts, K)[1]


def onnx(file: str, max_len: int) -> Predict:
    """Args: file: of `xmc-trainer export --format onnx -k 5`, beside the folder of the tokenizer."""
    import onnxruntime
    from transformers import AutoTokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options)
    tokenizer = AutoTokenizer.from_pretrained(Path(file).parent / "tokenizer")

    def predict(texts: list[str]) -> np.ndarray:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_len, return_tensors="np")
        inputs = {name: tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        return session.run(["labels"], inputs)[0]

    return predict


def train_omikuji(folder: Path, x: Any, y: Any) -> None:
    omikuji_model(x, y).save(str(folder / "model"))


def omikuji(folder: Path) -> Callable[[Any], list[list[int]]]:
    from omikuji import Model

    model = Model.load(str(folder / "model"))

    def predict(x: Any) -> list[list[int]]:
        rows = (list(zip(row.indices.tolist(), row.data.tolist())) for row in x)
        return [[label for label, _ in model.predict(row, top_k=K)] for row in rows]

    return predict


def train_pecos(folder: Path, x: Any, y: Any) -> None:
    """XR-Linear with its defaults; the label tree is built from PIFA embeddings."""
    from pecos.xmc import Indexer, LabelEmbeddingFactory
    from pecos.xmc.xlinear.model import XLinearModel

    y = y.astype(np.float32)
    clusters = Indexer.gen(LabelEmbeddingFactory.create(y, x, method="pifa"))
    XLinearModel.train(x, y, C=clusters).save(str(folder / "model"))


def pecos(folder: Path) -> Callable[[Any], list[list[int]]]:
    from pecos.xmc.xlinear.model import XLinearModel

    model = XLinearModel.load(str(folder / "model"), is_predict_only=True)

    def predict(x: Any) -> list[list[int]]:
        found = model.predict(x, only_topk=K, threads=1)
        return [row.indices[np.argsort(-row.data)].tolist() for row in found]

    return predict


LINEAR = {"omikuji": (train_omikuji, omikuji), "pecos": (train_pecos, pecos)}


def train(name: str, source: str, folder: Path) -> Data:
    """Train a linear model on TF-IDF; return the data."""
    data = read(source)
    if name in LINEAR:
        vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)
        LINEAR[name][0](folder, vectorizer.fit_transform(data.texts), data.labels)
        (folder / "words").write_bytes(pickle.dumps(vectorizer))
    return data._replace(texts=[""] * len(data.texts))  # only their number is needed


def predictor(options: argparse.Namespace, folder: Path) -> Predict:
    name = options.tool
    if name == "xmc_trainer":
        return xmc_trainer(options.model)
    if name == "onnx":
        return onnx(options.model, options.max_len)
    vectorizer, best = pickle.loads((folder / "words").read_bytes()), LINEAR[name][1](folder)

    def predict(texts: list[str]) -> np.ndarray:
        rows = best(vectorizer.transform(texts))
        return np.array([(row + [-1] * K)[:K] for row in rows])

    return predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="as data.source")
    parser.add_argument("tool", choices=["xmc_trainer", "onnx", *LINEAR])
    parser.add_argument("model", nargs="?", help="folder of a saved model, or .onnx file")
    parser.add_argument("--max-len", type=int, default=128, help="onnx: data.max_len of the model (default 128)")
    parser.add_argument("--texts", type=int, help="test texts, from the first (default: all)")
    parser.add_argument("--save", metavar="FILE.npy")
    parser.add_argument("--compare", metavar="FILE.npy")
    options = parser.parse_args()
    if (options.model is None) != (options.tool in LINEAR):
        parser.error("name the model of xmc_trainer or onnx; omikuji and pecos are trained here")
    with tempfile.TemporaryDirectory() as folder:
        # Another process reads the data and trains, so that its memory does not count.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            data = pool.submit(train, options.tool, options.source, Path(folder)).result()
        data = data._replace(test_texts=data.test_texts[: options.texts], test_labels=data.test_labels[: options.texts])
        predict, texts = predictor(options, Path(folder)), data.test_texts
    predict(texts[:2])
    times = []
    for size, few in ((1, texts[:300]), (256, texts)):
        start = time.process_time()
        best = np.concatenate([predict(few[first : first + size]) for first in range(0, len(few), size)])
        times.append(1000 * (time.process_time() - start) / len(few))
    peak, figures = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, figures_of(best, data)
    print(
        f"{options.tool} {options.model or ''}: {times[0]:.2f} CPU ms a text alone, {times[1]:.2f} in batches of 256; peak {peak:.0f} MiB; "
        f"P@1 {100 * figures['P@1']:.2f}, P@5 {100 * figures['P@5']:.2f}; {len(texts)} texts"
    )
    if options.compare:
        other = np.load(options.compare)
        shared = np.mean([len({*a} & {*b}) for a, b in zip(best.tolist(), other.tolist())])
        equal = np.mean([{*a} == {*b} for a, b in zip(best.tolist(), other.tolist())])
        print(
            f"best label equal for {100 * np.mean(best[:, 0] == other[:, 0]):.2f} % of the texts; of the five best {shared:.3f} shared "
            f"on average, all for {100 * equal:.2f} %"
        )
    if options.save:
        np.save(options.save, best)


if __name__ == "__main__":
    main()
