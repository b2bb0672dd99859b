"""Write a saved model in forms that other software reads.

xmc-trainer export outputs/mine/model mine-st --format sentence-transformers
xmc-trainer export outputs/mine/model mine-head --format scipy
xmc-trainer export outputs/mine/model mine-head --format torch
xmc-trainer export outputs/mine/model mine-onnx --format onnx -k 10 --int8      # pip install 'xmc_trainer[export]'

sentence-transformers  the encoder; SentenceTransformer("mine-st").encode(texts) gives the features
scipy                  the head: weight.npz (CSR, float32 [labels, features]) and bias.npy;
                       logits = features @ weight.T + bias
torch                  the head: head.safetensors and head.py, which needs torch and safetensors alone
onnx                   all but the tokenizer, which lies beside it: model.onnx takes input_ids and attention_mask, int64
                       [texts, tokens], padded on the right, and returns scores, float32 [texts, k], and labels, int64
                       [texts, k]

labels.parquet names the labels, in the order of the head's rows. Scores of torch and onnx are probabilities for a model
trained with bce. A calibration of `xmc-trainer calibrate` is not exported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from xmc_trainer.checkpoint.folder import verify_file
from xmc_trainer.checkpoint.model_manifest import facts_of_model
from xmc_trainer.errors import UserError, reason
from xmc_trainer.files import require_new_folder, writing

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_matrix

    from xmc_trainer.checkpoint.saved_model import SavedModel

# penultimate_activation -> the name that sentence-transformers knows it by
_ACTIVATIONS = {
    "relu": "torch.nn.modules.activation.ReLU",
    "gelu": "torch.nn.modules.activation.GELU",
    "tanh": "torch.nn.modules.activation.Tanh",
    "none": "torch.nn.modules.linear.Identity",
}


# pool_mode -> the name that sentence-transformers knows it by
_POOLINGS = {
    "last_nhidden_conlast": "cls_token",
    "last_hidden_avg": "mean_tokens",
    "last_token": "lasttoken",
}


def write_sentence_transformers(saved: SavedModel, out: Path) -> None:
    """Write the encoder as a folder of sentence-transformers, which has no pooling of several layers."""
    from safetensors.torch import save_file

    from xmc_trainer.data.texts import instruction_of

    encoder = saved.encoder
    if hasattr(encoder.backbone, "attention_type"):  # BigBird's, which `load_backbone` sets
        encoder.backbone.config.attention_type = encoder.backbone.attention_type
    encoder.backbone.save_pretrained(out)
    _save_tokenizer(saved, out)
    modules = ["", "1_Pooling"]
    hidden = encoder.pooled_features
    _write_json(out / "sentence_bert_config.json", {"max_seq_length": saved.max_len, "do_lower_case": False})
    (out / "1_Pooling").mkdir()
    pooling = {f"pooling_mode_{name}": mode == encoder.pool_mode for mode, name in _POOLINGS.items()}
    _write_json(out / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden} | pooling)
    if encoder.penultimate is not None:
        modules.append("2_Dense")
        (out / "2_Dense").mkdir()
        layer: dict[str, object] = {"in_features": hidden, "out_features": encoder.out_features, "bias": True}
        layer["activation_function"] = _ACTIVATIONS[encoder.penultimate_activation]
        _write_json(out / "2_Dense" / "config.json", layer)
        linear = encoder.penultimate[0].state_dict()
        save_file({f"linear.{name}": value for name, value in linear.items()}, out / "2_Dense" / "model.safetensors")
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(zip(modules, ("Transformer", "Pooling", "Dense")))
    ]
    _write_json(out / "modules.json", listed)
    if instruction := instruction_of(saved.tokenizer):
        _write_json(
            out / "config_sentence_transformers.json",
            {"prompts": {"instruction": instruction}, "default_prompt_name": "instruction"},
        )


def write_scipy(saved: SavedModel, out: Path) -> None:
    """Write the head as a CSR matrix and its biases."""
    import numpy as np
    import scipy.sparse

    weight, bias = sparse_head(saved)
    scipy.sparse.save_npz(out / "weight.npz", weight)
    np.save(out / "bias.npy", bias.numpy())


def sparse_head(saved: SavedModel) -> tuple[csr_matrix, torch.Tensor]:
    """Return the head's weights, float32 [L, d], and biases, float32 [L]."""
    import numpy as np
    import scipy.sparse
    import torch

    rows, biases = [], []
    for _, part in saved.head.parts():
        labels, fan_in = part.weight.shape
        index = torch.arange(fan_in).expand(1, -1) if part.index is None else part.index
        group = torch.arange(labels) // (labels if part.index is None else part.group_size)
        columns, offsets = index[group].to(torch.int32).numpy().ravel(), np.arange(labels + 1) * fan_in
        shape = (labels, part.in_features)
        rows.append(scipy.sparse.csr_matrix((part.weight.float().numpy().ravel(), columns, offsets), shape))
        biases.append(torch.zeros(labels) if part.ranking_bias is None else part.ranking_bias)
    return scipy.sparse.vstack(rows, format="csr"), torch.cat(biases)


def write_torch(saved: SavedModel, out: Path) -> None:
    """Write the head as safetensors, and the module that reads them."""
    import torch
    from safetensors.torch import save_file

    from xmc_trainer.commands import exported_head

    parts = [part for _, part in saved.head.parts()]
    about = {"parts": str(len(parts)), "in_features": str(saved.head.in_features), "loss": saved.head.loss_name}
    tensors: dict[str, torch.Tensor] = {}
    for number, part in enumerate(parts):
        about[f"{number}.group_size"] = str(part.group_size)
        bias = torch.zeros(len(part.weight)) if part.ranking_bias is None else part.ranking_bias
        named = {"weight": part.weight, "bias": bias, "index": part.index}
        tensors |= {f"{number}.{name}": value.contiguous() for name, value in named.items() if value is not None}
    save_file(tensors, out / "head.safetensors", metadata=about)
    shutil.copy(exported_head.__file__, out / "head.py")


def write_onnx(saved: SavedModel, out: Path, k: int, int8: bool) -> None:
    """Write encoder, head and choice of the k best labels as an ONNX graph."""
    import torch

    weight, bias = sparse_head(saved)

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = saved.encoder
            self.linear = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            self.linear.weight = torch.nn.Parameter(torch.from_numpy(weight.toarray()))
            self.linear.bias = torch.nn.Parameter(bias)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scores, labels = self.linear(self.encoder(input_ids, attention_mask)).topk(k, dim=1)
            return scores.sigmoid() if saved.head.loss_name == "bce" else scores, labels

    tokens = min(8, saved.max_len)
    ids, mask = torch.ones(2, 2, tokens, dtype=torch.int64)
    mask[1, tokens // 2 :] = 0  # for a batch without padding, transformers leaves the mask out of the graph
    size = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens", max=saved.max_len)}
    whole = Whole().eval()
    with _quiet():
        try:
            torch.onnx.export(
                whole,
                (ids, mask),
                out / "model.onnx",
                input_names=["input_ids", "attention_mask"],
                output_names=["scores", "labels"],
                dynamic_shapes={"input_ids": size, "attention_mask": size},
                dynamo=True,
                external_data=sum(each.numel() for each in whole.parameters()) > 1 << 28,  # one file holds 2 GiB
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            kind, why = type(saved.encoder.backbone).__name__, error.__cause__ or error
            raise UserError(
                f"{saved.folder}: torch {torch.__version__} cannot write its encoder, {kind}, as ONNX ({reason(why)}); use another "
                "--format"
            ) from error
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(out / "model.onnx", out / "model.int8.onnx", weight_type=QuantType.QInt8)
    _save_tokenizer(saved, out / "tokenizer")


def _save_tokenizer(saved: SavedModel, out: Path) -> None:
    """Write a tokenizer that pads as the exported encoder needs it."""
    saved.tokenizer.padding_side = "right"
    if saved.tokenizer.pad_token is None:
        saved.tokenizer.pad_token = saved.tokenizer.convert_ids_to_tokens(0)  # the mask hides padding
    saved.tokenizer.save_pretrained(out)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' warnings, which users cannot act on."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check(model: Path, form: str, k: int | None) -> None:
    """Raise UserError if a model cannot be written in a format, or the format's packages are missing."""
    facts = facts_of_model(model)
    if form == "sentence-transformers":
        if facts.feature_layers > 1:
            raise UserError(
                f"{model}: concatenates {facts.feature_layers} layers, which sentence-transformers cannot; use --format onnx"
            )
        encoder = json.loads(verify_file(model, "encoder/config.json").read_bytes())
        if encoder.get("is_causal") is False:
            raise UserError(
                f"{model}: its decoder has bidirectional attention, which sentence-transformers would not keep; use --format onnx"
            )
        if (kind := (encoder.get("architectures") or [""])[0]).endswith("Encoder"):
            raise UserError(
                f"{model}: sentence-transformers cannot load its encoder, {kind}, without a decoder; use --format onnx"
            )
    if form == "onnx":
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"--format onnx: needs the package {missing[0]}; pip install 'xmc_trainer[export]'")
        if k is not None and not 1 <= k <= facts.labels:
            raise UserError(f"-k={k}: must be 1 to {facts.labels}, the number of labels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--format", required=True, choices=["sentence-transformers", "scipy", "torch", "onnx"])
    parser.add_argument("-k", type=int, help="onnx: labels per text (default 5)")
    parser.add_argument("--int8", action="store_true", help="onnx: write model.int8.onnx, with weights of 8 bits, too")
    options = parser.parse_args()
    if options.format != "onnx" and (options.k is not None or options.int8):
        parser.error("-k and --int8 apply to --format onnx only")
    require_new_folder(options.out)
    _check(options.model, options.format, options.k)

    from xmc_trainer.checkpoint.saved_model import load_model

    writers: dict[str, Callable[[SavedModel, Path], None]] = {
        "sentence-transformers": write_sentence_transformers,
        "scipy": write_scipy,
        "torch": write_torch,
        "onnx": lambda saved, out: write_onnx(saved, out, options.k or min(5, saved.head.num_labels), options.int8),
    }
    saved = load_model(options.model)
    with writing(options.out):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=f".{options.out.name}.") as partial:
            folder = Path(partial) / options.out.name
            folder.mkdir()
            writers[options.format](saved, folder)
            if options.format != "sentence-transformers":
                shutil.copy(options.model / "labels.parquet", folder)
            os.replace(folder, options.out)
    print(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")
