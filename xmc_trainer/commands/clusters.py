"""`xmc-trainer clusters`: compute label clusters with an encoder, or import Spartex's file.

xmc-trainer clusters dataset=sidgnd dataset_path=./data model.encoder.encoder_model=data/minilm
xmc-trainer clusters dataset=sidgnd dataset_path=./data --import-npy label_group0.npy

`label_clusters` does the work. It imports torch and the engine, and mistakes are found before that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from xmc_trainer.builders.inputs import require_data, require_encoder, require_tokenizer
from xmc_trainer.commands.cli import USAGE
from xmc_trainer.config import Config, load_config
from xmc_trainer.errors import UserError


def _output(config: Config, chosen: Path | None) -> Path:
    """Return the output file. Raises UserError now, before the work, if it cannot be written."""
    path = chosen or config.cluster_file
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file with --output")
    try:
        if chosen is None and config.data.source:
            # The data are elsewhere; this folder holds only the clusters.
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.is_dir():
            remedy = (
                "set dataset_path or data.folder" if chosen is None else "create it, or name another file with --output"
            )
            raise UserError(f"{path.parent}: no such folder; {remedy}")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file with --output") from None
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings of the training that will use the clusters"
    )
    parser.add_argument(
        "--clusters", type=int, help="number of clusters; default: the power of two that gives about 64 labels each"
    )
    parser.add_argument(
        "--features",
        choices=("texts", "labels"),
        default="texts",
        help="source of a label's vector: its training texts or its own text",
    )
    parser.add_argument(
        "--output", type=Path, help="output file; default: label_group<group_y_group>.safetensors in the data folder"
    )
    parser.add_argument("--import-npy", type=Path, metavar="FILE", help="convert Spartex's file instead of clustering")
    parser.add_argument(
        "--npy-order",
        choices=("sorted", "ours"),
        help="meaning of numbers in the --import-npy file: positions in the sorted label names (Spartex and LightXML, "
        "raw text data), or in data order (default for data.is_lf_data)",
    )
    options = parser.parse_intermixed_args()
    config = load_config(options.settings)
    if options.npy_order and not options.import_npy:
        raise UserError("--npy-order: has no effect without --import-npy; add that, or remove this")
    if options.import_npy and (options.clusters or options.features == "labels"):
        raise UserError("--import-npy: cannot be combined with --clusters or --features; remove those")
    output = _output(config, options.output)
    require_data(config)
    if options.import_npy:
        require_tokenizer(config)
    else:
        require_encoder(config)
    from xmc_trainer.builders.recipe import configured
    from xmc_trainer.commands import label_clusters

    config, _ = configured(options.settings)

    report: dict[str, Any] = {}
    if options.import_npy:
        order = options.npy_order or ("ours" if config.data.is_lf_data else None)
        clusters, ids, report["read_as"] = label_clusters.imported(config, options.import_npy, order)
    else:
        clusters, ids = label_clusters.compute(config, options.clusters, options.features)
    clusters.save(output, ids)
    sizes = np.diff(clusters.offsets)
    report |= {"labels": len(clusters.order), "clusters": len(sizes)}
    report |= {"smallest": int(sizes.min()), "largest": int(sizes.max())}
    print(json.dumps(report))
    print(f"written to {output}")
