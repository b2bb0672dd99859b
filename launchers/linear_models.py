"""Linear and nearest-neighbour models on TF-IDF, by other tools, with this trainer's data and metrics.

pip install scikit-learn omikuji==0.5.2
python launchers/linear_models.py data/SID-GND-EN knn omikuji
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.datasets import dump_svmlight_file
from sklearn.feature_extraction.text import TfidfVectorizer

from xmc_trainer.data import open_source
from xmc_trainer.metrics import RankingMetrics, inverse_propensity

K = 5
Matrix = csr_matrix  # float32, rows of length 1: [texts, words]; bool: [texts, labels]


def knn(x: Matrix, y: Matrix, x_test: Matrix) -> np.ndarray:
    """Add the labels of the 20 most similar training texts, weighted by cosine."""
    best = []
    for start in range(0, x_test.shape[0], 256):
        similar = (x_test[start : start + 256] @ x.T).toarray()
        rows = np.argpartition(-similar, 20)[:, :20]
        weights = np.take_along_axis(similar, rows, 1)
        offsets = np.arange(0, rows.size + 1, 20)
        scores = csr_matrix((weights.ravel(), rows.ravel(), offsets), (len(rows), x.shape[0])) @ y
        best.append(np.argsort(-scores.toarray(), axis=1, kind="stable")[:, :K])
    return np.concatenate(best)


def omikuji_model(x: Matrix, y: Matrix) -> Any:
    from omikuji import Model

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.txt")
        dump_svmlight_file(x, y, str(rows), multilabel=True)
        file = Path(folder, "train.txt")
        file.write_text(f"{x.shape[0]} {x.shape[1]} {y.shape[1]}\n{rows.read_text()}")
        return Model.train_on_data(str(file), Model.default_hyper_param())


def omikuji(x: Matrix, y: Matrix, x_test: Matrix) -> np.ndarray:
    """Train the tool's default, three Parabel-like trees."""
    model = omikuji_model(x, y)
    best = np.full((x_test.shape[0], K), -1)
    for number, row in enumerate(x_test):
        found = model.predict(list(zip(row.indices.tolist(), row.data.tolist())), top_k=K)
        best[number, : len(found)] = [label for label, _ in found]
    return best


MODELS: dict[str, Callable[[Matrix, Matrix, Matrix], np.ndarray]] = {"knn": knn, "omikuji": omikuji}


class Data(NamedTuple):
    """Texts, and for each the numbers of its labels; those of the test set are below `known`, as in a training's log."""

    texts: list[str]
    labels: csr_matrix  # bool [texts, known]
    test_texts: list[str]
    test_labels: list[list[int]]


def read(source: str) -> Data:
    contents = open_source(source, Path(source)).read()
    (train, train_labels), (test, test_labels) = (
        zip(*((row.text, row.labels) for row in rows)) for rows in (contents.train(), contents.test())
    )
    known = len(contents.labels)
    offsets = np.cumsum([0, *map(len, train_labels)])
    labels = list(itertools.chain.from_iterable(train_labels))
    y = csr_matrix((np.ones(len(labels), bool), labels, offsets), (len(train), known))
    return Data(list(train), y, list(test), [[label for label in row if label < known] for row in test_labels])


def figures_of(best: np.ndarray, data: Data) -> dict[str, float]:
    """Return the metrics of the K best labels of each test text, int [texts, K]. Texts without a label are left out."""
    counts = np.array([len(row) for row in data.test_labels])
    kept = counts > 0
    metrics = RankingMetrics(inverse_propensity(np.asarray(data.labels.sum(0)).ravel(), len(data.texts), 0.55, 1.5))
    metrics.add(best[kept], np.array(list(itertools.chain.from_iterable(data.test_labels))), counts[kept])
    return metrics.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="as data.source")
    parser.add_argument("models", nargs="+", choices=MODELS)
    arguments = parser.parse_args()
    data = read(arguments.source)
    vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)
    x, x_test = vectorizer.fit_transform(data.texts), vectorizer.transform(data.test_texts)
    for name in arguments.models:
        start = time.process_time()
        best = MODELS[name](x, data.labels, x_test)
        seconds = time.process_time() - start
        figures = figures_of(best, data)
        said = "  ".join(f"{each} {100 * figures[each]:.2f}" for each in ("P@1", "P@5", "PSP@1", "PSP@5"))
        print(f"{name:8} {said}  {seconds:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
