"""Plan a training before anything is loaded: GPU memory, host memory, disk and time, each term from one formula.

Symbols: P trained parameters of the encoder, U frozen ones (a pooler, or all but the adapters of LoRA), w bytes per weight (2 under DeepSpeed with fp16 or bf16, else
4), s optimizer states per parameter (Adam 2, SGD 1), N GPUs, B texts per step, b texts of a GPU's micro-batch, d features.

GPU memory of a process, in bytes that the allocator counts (`torch.cuda.max_memory_allocated`):

    weights             w (P + U). ZeRO 3: w (P + U) / N, and w (P + U) more while layers are gathered, but at most w 1e9 (DeepSpeed's
                        stage3_max_live_parameters). Offloaded: what is gathered alone
    optimizer           ZeRO 1, 2, 3: (4 + 4 s) P / N for float32 weights and states. ZeRO 0 with 16-bit weights: (4 + 4 s) P.
                        Without DeepSpeed: 4 s P (the weights themselves are float32). Offloaded: 0
    gradients           kept between micro-batches: w P. ZeRO 2: w P / N. ZeRO 3: w P / N and a bucket of 5e8 numbers
                        (DeepSpeed's reduce_bucket_size); offloaded, the bucket alone. With one micro-batch per step none are kept during the forward pass.
                        CUDA graphs write to one more flat gradient, w P
    activations         what autograd saves for b texts of `data.max_len` tokens, measured by a forward pass on fake tensors. A BERT
                        with h features saves about 34 h bytes per token and layer in 16 bits, 42 h under autocast (an attention
                        kernel saves queries, keys, values and output). A model that fails on fake tensors counts as a BERT of
                        its size. Autocast adds 16-bit copies of the weights. A compiled encoder keeps the share k of it
                        (`compiling._KEPT`), one with gradient_checkpointing nothing, of the rest each layer's input, and the values of
                        one layer, which its backward pass computes again
    head                the buffers of `FixedFanInHead`, counted on the meta device, and what kernels cache of the index
    head, working       workspace of the kernel that `kernels.dispatch` chooses; see `working_bytes`
    exchange            features, labels and float32 feature gradients of all GPUs; see `exchange_bytes`

The peak is the larger of two moments: the head's step, when all activations are in memory, and the end of the backward pass, when
none are, but two copies of the encoder's gradient (per parameter, and flat). A compiled encoder's passes are CUDA graphs, whose
memory holds the activations all the time; then the second moment has these and the engine's float32 gradient.

Outside the allocator a process takes CONTEXT bytes (CUDA, NCCL), and fragmentation wastes a share of SLACK. Both are assumptions.

Times are scaled from measured rates; see `Rates`. A phase without a measured rate has no time.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, is_initialized
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AttentionInterface

from xmc_trainer.builders.encoder import text_encoder_of
from xmc_trainer.config import SETTINGS, Config
from xmc_trainer.data.generated import PUBLISHED, Shape
from xmc_trainer.encoder import compiling
from xmc_trainer.encoder.adapters import is_adapter
from xmc_trainer.encoder.loading import backbone_without_weights
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.engine.micro_batches import BYTES_A_PARAMETER, SPARED, fewest_parts
from xmc_trainer.errors import UserError, naming
from xmc_trainer.head import AdamW, FixedFanInHead, RowwiseRMSprop
from xmc_trainer.head.optimizers import optimizer_named
from xmc_trainer.kernels.arguments import step_workspace
from xmc_trainer.kernels.dispatch import STEPS, Problem, choose
from xmc_trainer.parallel import Ranks

GIB = 1 << 30
STAGES = (None, 0, 1, 2, 3)  # None: without DeepSpeed
CONTEXT = 1 << 30  # bytes of a process outside torch's allocator: CUDA, NCCL (assumed)
SLACK = 0.05  # share of memory lost to fragmentation (assumed)
_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size
_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
_MULTIPROCESSORS = 132  # of an H100 or H200
_STATES = {"adamw": 2, "adam": 2, "sgd": 1}
_LABELS_A_CLUSTER = 64  # as `xmc-trainer clusters` makes them


# The encoder ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderPlan:
    """The encoder's sizes, from its config.json.

    Attributes:
        groups: trained parameters of each optimizer group, which are the lengths of the engine's flat tensors.
        tensors: trained parameters, and entries of a saved model's file.
        fixed: frozen parameters.
        adapters: trained parameters that a saved model has merged into others.
        features: d.
        matrices: parameters of trained, and of frozen matrices that every token is multiplied with. Not embeddings and poolers.
        layers, hidden: layers and hidden size of the backbone.
        text_bytes: bytes that autograd saves per text of `tokens` tokens.
        cast_bytes: bytes that it saves once, independent of the texts.
        traced: whether these two were measured; otherwise they are those of a BERT of this size.
    """

    groups: tuple[int, ...]
    tensors: tuple[int, int]
    fixed: int
    adapters: int
    features: int
    matrices: tuple[int, int]
    layers: int
    hidden: int
    tokens: int
    text_bytes: dict[bool, int]  # key: whether the weights have 16 bits (DeepSpeed); otherwise float32 or autocast
    cast_bytes: dict[bool, int]
    traced: bool

    @property
    def trained(self) -> int:
        return sum(self.groups)

    def flops(self, texts: float, tokens: float, *, backward: bool = True) -> float:
        """Count the operations of a pass over `texts` texts of `tokens` tokens: 2 per weight and token, 4 T h per layer for attention.

        The backward pass takes as many for the gradients of inputs, and again as many for those of trained weights and of attention.
        """
        trained, frozen = self.matrices
        attention = 4 * self.layers * self.hidden * tokens
        passes = (3, 2) if backward else (1, 1)
        return texts * tokens * (passes[0] * (2 * trained + attention) + passes[1] * 2 * frozen)

    @classmethod
    def of(cls, config: Config) -> EncoderPlan:
        """Measure the encoder of a configuration. Raises UserError if its config.json cannot be loaded."""
        amp, tokens = config.training.amp.enabled, config.data.max_len
        text_bytes, cast_bytes, traced = {}, {}, True
        for sixteen in (True, False) if amp else (False,):
            dtype = torch.bfloat16 if sixteen else torch.float32
            encoder = encoder_without_weights(config, dtype)
            autocast = amp and not sixteen
            try:
                text_bytes[sixteen], cast_bytes[sixteen] = saved_bytes(encoder, tokens, autocast=autocast)
            except RuntimeError:  # fake tensors have no values to branch on, and some models do not run in 16 bits
                text_bytes[sixteen], cast_bytes[sixteen] = _closed_form(encoder, tokens, autocast), 0
                traced = False
        named = dict(encoder.named_parameters())
        groups = encoder.parameter_groups(0.0, 0.0, 0.0)
        embeddings = {id(m.weight) for m in encoder.modules() if isinstance(m, torch.nn.Embedding)}
        matrices = [
            p for name, p in named.items() if p.dim() > 1 and id(p) not in embeddings and ".pooler." not in name
        ]
        shape = encoder.backbone.config
        return cls(
            groups=tuple(sum(p.numel() for p in group["params"]) for group in groups),
            tensors=(
                sum(len(group["params"]) for group in groups),
                sum(not is_adapter(name) for name in encoder.state_dict()),
            ),
            fixed=sum(p.numel() for p in named.values() if not p.requires_grad),
            adapters=sum(p.numel() for name, p in named.items() if is_adapter(name)),
            features=encoder.out_features,
            matrices=(
                sum(p.numel() for p in matrices if p.requires_grad),
                sum(p.numel() for p in matrices if not p.requires_grad),
            ),
            layers=shape.num_hidden_layers,
            hidden=shape.hidden_size,
            tokens=tokens,
            text_bytes=text_bytes,
            cast_bytes=cast_bytes,
            traced=traced,
        )


@naming(SETTINGS)
def encoder_without_weights(config: Config, dtype: torch.dtype) -> TextEncoder:
    """Build the encoder of a configuration from fake tensors. Raises UserError like `load_backbone`."""
    chosen = config.model.encoder
    with FakeTensorMode() as mode:
        backbone = backbone_without_weights(
            chosen.encoder_model, dtype=dtype, trust_remote_code=chosen.trust_remote_code
        )
    encoder = text_encoder_of(config, backbone)  # outside of the mode, because peft cannot make fake tensors
    for module in encoder.modules():  # the adapters and the penultimate layer
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, FakeTensor):
                with mode:
                    fake = torch.empty(parameter.shape, dtype=dtype)
                module.register_parameter(name, torch.nn.Parameter(fake, parameter.requires_grad))
    config.check_fan_in(encoder.out_features)
    return encoder


class _Attention(torch.autograd.Function):
    """Saves what a fused attention kernel saves: queries, keys, values, output, and a float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        texts, heads, tokens, width = query.shape
        out = query.new_empty(texts, tokens, heads, width)
        ctx.save_for_backward(query, key, value, out, query.new_empty(texts, heads, tokens, dtype=torch.float32))
        return out


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **more: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value), None


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout as on a GPU, which saves a mask of one byte per element."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


def saved_bytes(encoder: TextEncoder, tokens: int, *, autocast: bool = False) -> tuple[int, int]:
    """Measure what autograd saves in a forward pass on texts of `tokens` tokens. Returns (bytes per text, fixed bytes).

    Args:
        encoder: as `encoder_without_weights` returns it.
        autocast: run under autocast to bfloat16.
    Raises RuntimeError if the encoder does not run on fake tensors.
    """
    backbone = encoder.backbone
    if getattr(backbone, "_supports_sdpa", False):
        AttentionInterface.register("planned", _attention)
        backbone.set_attn_implementation("planned")
    encoder.train()
    own = {parameter.untyped_storage()._cdata for parameter in encoder.parameters()}
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.disabled = True  # it logs a traceback for each operation that fails
    try:
        found = [_saved(encoder, texts, tokens, own, autocast) for texts in (2, 4)]
    finally:
        log.disabled = False
    a_text = (found[1] - found[0]) // 2
    return a_text, found[0] - 2 * a_text


def _closed_form(encoder: TextEncoder, tokens: int, autocast: bool) -> int:
    """Estimate the bytes per text as those of a BERT of this size that stores its attention weights."""
    shape, wide = encoder.backbone.config, next(encoder.parameters()).dtype == torch.float32
    a_feature, a_score = (42, 5) if autocast else (66, 9) if wide else (34, 5)
    return (
        shape.num_hidden_layers
        * tokens
        * (a_feature * shape.hidden_size + a_score * shape.num_attention_heads * tokens)
    )


def _saved(encoder: TextEncoder, texts: int, tokens: int, own: set[int], autocast: bool) -> int:
    saved: dict[int, Tensor] = {}  # by storage; holding the tensors keeps addresses unique

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            saved[storage] = tensor
        return tensor

    first = next(encoder.parameters())
    assert isinstance(first, FakeTensor)
    functional: Any = torch.nn.functional
    original, functional.dropout = functional.dropout, _dropout
    try:
        with (
            first.fake_mode,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            ids = torch.ones(texts, tokens, dtype=torch.int64)
            encoder(ids, ids.clone())
    finally:
        functional.dropout = original
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


# The head -------------------------------------------------------------------------------------------------------------


class _HeadShape(FixedFanInHead):
    """A head on the meta device, whose buffers are never filled."""

    def reset_parameters(self) -> None:
        pass


def heads_of(
    config: Config, features: int, labels: int, ranks: int, clusters: int | None = None
) -> list[FixedFanInHead]:
    """Build the heads of one of `ranks` processes on the meta device: one or two for the labels, then the meta branch's.

    Args:
        clusters: outputs of the meta branch; default: as many as `xmc-trainer clusters` makes.
    """
    ffi, optimization = config.model.ffi, config.training.optimization
    optimizer = optimizer_named(optimization.xmc_optimizer, optimization.xmc_momentum)
    one = Ranks()
    one.rank, one.size = ranks - 1, ranks  # the last rank's share is the largest

    def head(labels: int, fan_in: int | None, **more: Any) -> FixedFanInHead:
        common: dict[str, Any] = {
            "optimizer": optimizer, "weight_dtype": getattr(torch, ffi.weight_dtype),
            "logit_shift": torch.empty(labels, device="meta") if ffi.logit_adjustment else None,
        }  # fmt: skip
        return _HeadShape(
            features,
            labels,
            fan_in=fan_in,
            loss=optimization.loss_fn,
            product_dtype=torch.bfloat16 if config.training.amp.enabled else torch.float32,
            backend="reference",
            ranks=one,
            device="meta",
            **common | more,
        )

    fan_in = ffi.fan_in if ffi.use_sparse_layer and not optimization.dense_epochs else None
    frequent = round(ffi.head_ratio * labels)
    found = [head(labels - frequent, fan_in, group_size=ffi.group_size)]
    if frequent:
        found.insert(0, head(frequent, ffi.head_fan_in))
    if config.model.auxiliary.use_meta_branch:
        more = {"optimizer": AdamW(), "weight_dtype": torch.float32, "logit_shift": None}
        found.append(head(clusters or max(ranks, -(-labels // _LABELS_A_CLUSTER)), None, **more))
    return found


def head_bytes(heads: Iterable[FixedFanInHead]) -> int:
    """Add up the bytes of all buffers: weights, index, biases, optimizer state."""
    return sum(buffer.nbytes for head in heads for buffer in head.buffers())


def index_bytes(head: FixedFanInHead) -> int:
    """Count the bytes that kernels cache of an index: an int16 per row and 64 features (densify), a bit per row and feature (Triton's dense)."""
    index = head.tensors().index_RF
    if index is None:
        return 0
    rows, d, name = index.shape[0], head.in_features, _kernel(head).name
    return {"densify, CUDA": 2 * rows * -(-d // 64), "dense, Triton": 4 * rows * -(-d // 32)}.get(name, 0)


def _kernel(head: FixedFanInHead) -> Any:
    problem = Problem.of(head.tensors(), head.product_dtype)
    return choose(STEPS, problem._replace(cuda=True))


def working_bytes(head: FixedFanInHead, texts: int) -> int:
    """Count the workspace of a step over `texts` texts, for the kernel chosen on an H100 or H200.

    Every kernel keeps the features twice (row- and column-major) and their float32 gradient twice. It processes labels in chunks:

        group       48 MiB per chunk: positives' bits
        densify     256 MiB per chunk, or 0.2 of weights and index if that is more: slopes, bits, bias gradients, weight gradient;
                    and a feature gradient per lane of blocks
        dense       256 MiB per chunk, or 0.2 of weights and index if that is more: logits, slopes, bits, and copied rows or the
                    weight gradient; feature gradients per lane
    """
    labels, d, e = len(head.labels), head.in_features, head.product_dtype.itemsize
    kernel = _kernel(head)
    columns = -(-texts // kernel.texts) * kernel.texts
    tensors = head.tensors()
    fan_in = tensors.weight_LF.shape[1]
    common = columns * d * (2 * e + 2 * 4)
    if kernel.name.startswith("group"):
        return common + min(48 << 20, labels * (columns // 8))
    if kernel.name == "densify, CUDA":
        tiles = columns // 128
        a_label = (
            2 * columns
            + columns // 8
            + columns // 4
            + fan_in * (2 if tiles <= 8 else 4)
            + (4 * columns if d > 768 else 0)
        )
        blocks = -(-d // 256)
        together = max(1, min(4, tiles))
        lanes = max(1, _MULTIPROCESSORS // (together * blocks))
        return common + int(min(step_workspace(tensors), labels * a_label)) + lanes * columns * d * 4
    by_label = isinstance(head.optimizer, RowwiseRMSprop)
    copied = tensors.index_RF is not None or tensors.weight_LF.dtype != head.product_dtype
    one_pass = tensors.index_RF is None and not by_label and e == 2 and columns <= 128
    rows = (
        d * e if copied or not one_pass else 0
    )  # the copied rows, which their gradient overwrites, or the gradient alone
    a_label = columns * (4 + e) + columns // 8 + rows
    lanes = max(1, _MULTIPROCESSORS // -(-d // 128)) if one_pass else 1
    return common + int(min(step_workspace(tensors), labels * a_label)) + (lanes + 1) * columns * d * 4


def exchange_bytes(texts: int, ranks: int, features: int, positives: float, product_dtype: torch.dtype) -> int:
    """Count the bytes of a micro-batch's collectives: features and labels sent and received, and feature gradients.

    Args:
        texts: texts of the micro-batch over all ranks.
        positives: mean labels per text.
    """
    if ranks == 1:
        return 0
    a_text = features * product_dtype.itemsize + 4 * positives + 4
    gathered = texts * a_text * (1 / ranks + 2)  # sent; received and concatenated
    # Gradients of all texts, and this rank's share after the reduce-scatter.
    return int(gathered + texts * 4 * features * (1 + 1 / ranks))


# Memory of a process --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """Sizes of the data, known before they are read."""

    texts: int
    test_texts: int
    labels: int
    tokens: float  # mean per text, after truncation to data.max_len
    positives: float  # mean labels per text
    name_bytes: float = 7.0  # bytes of a label's id, and as many of its text

    @classmethod
    def of(cls, config: Config, shape: Shape | None = None, labels: int | None = None) -> Facts:
        """Take the sizes from a published shape and the configured number of labels. A word counts as a token.

        Raises UserError if the data set's size is unknown.
        """
        data = config.data
        shape = shape or PUBLISHED.get(data.dataset)
        labels = labels or data.num_labels or (None if shape is None else shape.labels)
        if shape is None or labels is None:
            raise UserError(
                f"data.dataset={data.dataset}: its size is not known; give --texts, --test-texts, --tokens and --positives, and "
                "set data.num_labels"
            )
        # The mean of a lognormal length truncated at m is mean Phi(a - deviation) + m (1 - Phi(a)), a = (log m - mu) / deviation.
        most, deviation = data.max_len - 2, shape.deviation
        a = (math.log(most / shape.words_a_text) + deviation**2 / 2) / deviation
        phi = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in (a - deviation, a)]
        tokens = 2 + shape.words_a_text * phi[0] + most * (1 - phi[1])
        name_bytes = len(str(labels - 1))
        return cls(shape.train_texts, shape.test_texts, labels, tokens, shape.labels_a_text, name_bytes)


@dataclass(frozen=True)
class Memory:
    """GPU memory of a process, in bytes: each term, and the peak."""

    gpus: int
    stage: int | None
    parts: int  # micro-batches per step
    terms: dict[str, int]
    peak: int

    @property
    def device(self) -> int:
        """GPU memory in use: the peak, fragmentation, and the CUDA context."""
        return int(self.peak * (1 + SLACK)) + CONTEXT


def stage_name(stage: int | None) -> str:
    return "no DeepSpeed" if stage is None else f"ZeRO {stage}"


def refusal(config: Config, gpus: int, stage: int | None) -> str | None:
    """Return why a training with these settings would not start; None if it would."""
    if stage is None and gpus > 1:
        return "one process only"
    if stage == 0 and config.training.amp.mixed_precision == "fp16":
        return "fp16 trains wrongly"
    if config.texts_a_step % gpus:
        return f"{config.texts_a_step} texts per step do not divide evenly"
    return None


def memory_of(
    config: Config,
    encoder: EncoderPlan,
    facts: Facts,
    gpus: int,
    stage: int | None,
    gpu_bytes: int,
    parts: int | None = None,
    offload: bool = False,
) -> Memory:
    """Compute the GPU memory of each of `gpus` processes.

    Args:
        offload: ZeRO 2 and 3: whether the optimizer's state, and under ZeRO 3 the parameters, are in host memory.
        gpu_bytes: memory of a GPU, which data.micro_batches=auto fits a step into.
        parts: micro-batches per step; default: as configured.
    """
    P, U, s = encoder.trained, encoder.fixed, _STATES[config.training.optimization.encoder_optimizer]
    amp = config.training.amp.enabled
    sixteen = amp and stage is not None
    w, share = 2 if sixteen else 4, gpus if stage in (1, 2, 3) else 1
    heads = heads_of(config, encoder.features, facts.labels, gpus)
    texts = config.texts_a_step
    product = heads[0].product_dtype
    head = head_bytes(heads) + sum(index_bytes(each) for each in heads)
    working = max(working_bytes(each, texts) for each in heads)
    if parts is None:
        if config.data.micro_batches != "auto":
            parts = int(config.data.micro_batches)
        else:
            free = int((1 - SPARED) * gpu_bytes) - CONTEXT - head - 4 * (P + U) - BYTES_A_PARAMETER * P
            # A training measures before the engine prepares the encoder: in float32 or under autocast.
            parts = fewest_parts(texts, gpus, encoder.text_bytes[False], free)
    largest = max(encoder.groups)
    kept = 0 if parts == 1 else w * P // (share if stage in (2, 3) else 1)
    compiled = stage != 3 and config.model.encoder.use_torch_compile != "false"
    a_text = encoder.text_bytes[sixteen]
    recompute = config.model.encoder.gradient_checkpointing
    if compiled or recompute:
        share_kept = 0.0 if recompute else compiling._KEPT
        inputs = encoder.layers * encoder.tokens * encoder.hidden * (2 if sixteen else 4)
        a_text = int(share_kept * a_text + (1 - share_kept) * inputs + a_text / encoder.layers)
    own = 0 if offload and stage == 3 else w * (P + U) // (gpus if stage == 3 else 1)
    states = 4 * s if stage is None or not sixteen and stage == 0 else 4 + 4 * s
    terms = {
        "weights": own + (w * min(P + U, _LIVE) if stage == 3 else 0),
        "optimizer": 0 if offload else states * P // share,
        "gradients": kept + compiled * w * P if stage != 3 else (0 if offload else w * P // gpus) + w * _BUCKET,
        "activations": -(-texts // (parts * gpus)) * a_text + encoder.cast_bytes[sixteen],
        "head": head,
        "head, working": working,
        "exchange": exchange_bytes(-(-texts // parts), gpus, encoder.features, facts.positives, product),
    }
    # Features of a step's micro-batches, and of the recent steps kept for growth by gradient.
    ffi = config.model.ffi
    steps = 1 + (ffi.growth_batches if ffi.growth_mode == "gradient" else 0)
    terms["head, working"] += int(steps * texts * (encoder.features * product.itemsize + 16 * facts.positives))
    static = terms["weights"] + terms["optimizer"] + terms["gradients"] + head
    in_head = static + terms["activations"] + terms["head, working"] + terms["exchange"]
    # A gradient per parameter, the flat one of the largest group, and under DeepSpeed its float32 copy.
    in_backward = static + (4 * P // share if stage is not None and not offload else 0)
    in_backward += terms["activations"] if compiled else 0 if stage == 3 else w * (P + largest)
    return Memory(gpus, stage, parts, terms, max(in_head, in_backward))


# Disk and host memory -------------------------------------------------------------------------------------------------

_HEADER = 130  # bytes per tensor of a safetensors header
_ROWS = 2000  # rows of a record batch in the token cache
_BATCH = 900  # bytes of a record batch besides its columns
# Bytes per label name while raw files are read: a string, and its entries in a set, a dict and two lists.
_NAME = 330


def token_cache_bytes(facts: Facts) -> int:
    """Count the bytes of the memory-mapped Arrow files: an int32 per token and positive, 12 bytes per text, two strings per label."""
    texts = facts.texts + facts.test_texts
    rows = texts * (12 + 4 * (facts.tokens + facts.positives)) + facts.labels * 2 * (facts.name_bytes + 4)
    batches = sum(-(-each // _ROWS) for each in (facts.texts, facts.test_texts, facts.labels))
    return int(rows) + batches * _BATCH


def checkpoint_bytes(config: Config, encoder: EncoderPlan, facts: Facts) -> int:
    """Count the bytes of a checkpoint: the encoder's float32 weights and states, the head's buffers, the recent steps."""
    s = _STATES[config.training.optimization.encoder_optimizer]
    heads = heads_of(config, encoder.features, facts.labels, 1)
    state = sum(value.nbytes for head in heads for value in head.state_dict().values())
    ffi = config.model.ffi
    recent = ffi.growth_batches if ffi.growth_mode == "gradient" else 0
    recent *= int(config.texts_a_step * (encoder.features * heads[0].product_dtype.itemsize + 16 * facts.positives))
    return (1 + s) * (4 * encoder.trained + _HEADER * encoder.tensors[0]) + state + recent


def model_bytes(config: Config, encoder: EncoderPlan, facts: Facts, stage: int | None) -> int:
    """Count the bytes of a saved model without its tokenizer: encoder in its precision, weights, index and bias of the head, label names."""
    w = 2 if config.training.amp.enabled and stage is not None else 4
    heads = heads_of(config, encoder.features, facts.labels, 1)[: 2 if config.model.ffi.head_ratio else 1]
    tensors = [head.tensors() for head in heads]
    kept = sum(t.nbytes for head in tensors for t in (head.weight_LF, head.index_RF, head.bias_L) if t is not None)
    names = int(facts.labels * facts.name_bytes * 2)
    return w * (encoder.trained - encoder.adapters + encoder.fixed) + _HEADER * encoder.tensors[1] + kept + names


def host_terms(
    config: Config, encoder: EncoderPlan, facts: Facts, gpus: int, stage: int | None = None, offload: bool = False
) -> dict[str, int]:
    """Count the host memory of rank 0 that grows with data and model, in bytes by term.

    The terms: label names while raw files are read; lengths, order and plan of an epoch's texts; counts and propensities of
    labels; a checkpoint's tensors while they are written. Python and its libraries are not included. What is offloaded: float32
    weights, gradients and states of this rank's share, and under ZeRO 3 the share of the weights.
    """
    s = _STATES[config.training.optimization.encoder_optimizer]
    heads = heads_of(config, encoder.features, facts.labels, gpus)
    shares = (8 + 4 * s) * encoder.trained
    if stage == 3:
        shares += (2 if config.training.amp.enabled else 4) * (encoder.trained + encoder.fixed)
    return ({"offloaded": shares // gpus} if offload else {}) | {
        "reading labels": int(facts.labels * (_NAME + facts.name_bytes)),
        "plan of an epoch": 4 * 8 * facts.texts,
        "label counts": 3 * 8 * facts.labels,
        "writing a checkpoint": (4 + 4 * s) * encoder.trained
        + sum(v.nbytes for head in heads for v in head.state_dict().values()),
    }


# Time -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Measured rates, from the CSV files of `xmc-trainer bench`. Of rows that fit equally well the last one counts: the newest.

    bench head     ms of the head's step and of ranking, by texts, fan-in, group size and optimizer
    bench train    ms of the encoder's step, by engine, precision and ranks. Its operations per second are used for other encoders
                   and lengths too. (Rows without `encoder_parameters` are of the default there, a BERT of 12 layers.)
    bench data     texts tokenised per second
    """

    head: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    train: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    data: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Rates:
        """Read CSV files. Other tables are ignored. Raises UserError for a file that cannot be read."""
        rates = cls()
        for path in paths:
            try:
                with path.open(newline="", encoding="utf-8") as lines:
                    rows = [(path.name, row) for row in csv.DictReader(lines)]
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read ({error}); name a CSV file of xmc-trainer bench") from None
            names = set(rows[0][1]) if rows else set()
            for needed, target in (
                ({"copy_gb_s", "group_size", "ms"}, rates.head), ({"encoder_ms", "width", "engine"}, rates.train),
                ({"tokenised_texts_s"}, rates.data),
            ):  # fmt: skip
                if needed <= names:
                    target += rows
        return rates

    def head_ms(self, head: FixedFanInHead, texts: int, *, rank: bool = False) -> tuple[float, str] | None:
        """Estimate the ms of the head's step, or of ranking, over `texts` texts. Returns (ms, source), or None without data.

        It scales the row with the same features, fan-in and group size and the nearest number of texts: in proportion to the
        labels, and to the texts if there are more than in the row.
        """
        name = {"momentum": "sgd"}.get(head.optimizer.name, head.optimizer.name)
        sparse = head.index is not None
        rows = [
            (source, row) for source, row in reversed(self.head)
            if int(row["features"]) == head.in_features
            and (row["fan_in"], row["group_size"]) == ((str(head.fan_in), str(head.group_size)) if sparse else ("", ""))
            and ("top" in row["what"] if rank else row["optimizer"] in (name, "sgd") and "plain torch" not in row["what"])
        ]  # fmt: skip
        if not rows:
            return None
        # Prefer the same optimizer. For another one, the bytes that it moves in addition are charged below.
        source, row = min(
            rows,
            key=lambda item: (item[1]["optimizer"] != name and not rank, abs(math.log(int(item[1]["batch"]) / texts))),
        )
        batch = int(row["batch"])
        ms = float(row["ms"]) * len(head.labels) / int(row["labels"]) * max(1.0, texts / batch)
        if not rank:
            tensors = head.tensors()
            moved = tensors.weight_LF.nbytes + sum(state.nbytes for state in tensors.weight_state)
            measured = tensors.weight_LF.numel() * (2 if row["weight_dtype"] == "bfloat16" else 4)
            measured *= 3 if row["optimizer"] == "adamw" else 1
            ms += max(0, moved - measured) * 2 / float(row["copy_gb_s"]) / 1e6
        return ms, f"{source}: {row['what']}, {batch} texts"

    def encoder_flops(
        self, gpus: int, stage: int | None, precision: str
    ) -> tuple[tuple[float, str], tuple[float, str]] | tuple[None, None]:
        """Estimate a GPU's operations per second from the nearest row. Returns two (rate, source), or (None, None) without data.

        The first rate is that of the encoder's step alone, the second that of whole steps without the head. The second includes
        waiting for data, other ranks and the host.
        """
        engine = "without DeepSpeed" if stage is None else f"DeepSpeed ZeRO {stage}"
        rows = [item for item in reversed(self.train) if item[1]["precision"] == precision and item[1]["encoder_ms"]]
        # Rates of ZeRO 3 do not apply to other engines, nor theirs to ZeRO 3.
        rows = [item for item in rows if (item[1]["engine"] == "DeepSpeed ZeRO 3") == (stage == 3)]
        if not rows:
            return None, None
        file, row = min(rows, key=lambda item: (abs(int(item[1]["ranks"]) - gpus), item[1]["engine"] != engine))
        width, ranks = int(row["width"]), int(row["ranks"])
        matrices = int(row.get("encoder_parameters") or 12 * 12 * 768 * 768)
        a_text = 3000 * width * (2 * matrices + 4 * 12 * 768 * width)
        alone = int(row["rows"]) * int(row["micro_batches"]) * a_text / float(row["encoder_ms"])
        whole = int(row["texts_a_step"]) / ranks * a_text / (float(row["ms"]) - float(row["head_ms"]))
        source = f"{file}: {ranks} ranks, {row['engine']}, {row['precision']}"
        return (alone, source), (whole, source)

    def tokenised(self) -> tuple[float, str] | None:
        """Return (texts per second and core, source); None without data."""
        rows = [item for item in self.data if item[1]["tokenised_texts_s"]]
        if not rows:
            return None
        source, row = rows[-1]
        return float(row["tokenised_texts_s"]) / int(row["cores"]), f"{source}: {row['device']}"


@dataclass(frozen=True)
class Phase:
    """A phase of a training: its seconds, None if nothing was measured, and the source of the rate."""

    name: str
    seconds: float | None
    source: str


def phases_of(
    config: Config, encoder: EncoderPlan, facts: Facts, gpus: int, stage: int | None, rates: Rates, cores: int
) -> list[Phase]:
    """Estimate the phases of a training, in order."""
    ffi, batch, steps = config.model.ffi, config.data.test_batch_size, -(-facts.texts // config.texts_a_step)
    heads = heads_of(config, encoder.features, facts.labels, gpus)
    alone, whole = rates.encoder_flops(gpus, stage, config.training.amp.mixed_precision)
    of_step = [rates.head_ms(head, config.texts_a_step) for head in heads]
    of_ranking = [rates.head_ms(head, batch, rank=True) for head in heads[: 2 if ffi.head_ratio else 1]]
    a_text = encoder.flops(1, facts.tokens, backward=False) / gpus  # a forward pass runs at the rate of training
    a_step = encoder.flops(config.texts_a_step / gpus, facts.tokens)

    def read(rate: float) -> float:
        return (facts.texts + facts.test_texts) / (rate * cores)

    def forward(rate: float) -> float:
        return facts.texts * a_text / rate

    def epoch(rate: float, *head_ms: float) -> float:
        return steps * (a_step / rate + sum(head_ms) / 1000)

    def head(*head_ms: float) -> float:
        return steps * sum(head_ms) / 1000

    def evaluation(rate: float, *head_ms: float) -> float:
        return facts.test_texts * a_text / rate + -(-facts.test_texts // batch) * sum(head_ms) / 1000

    found = [_phase("read and tokenise", read, rates.tokenised())]
    if ffi.index_from_texts or ffi.weight_init == "centroid":
        found.append(_phase("first index", forward, alone))
    return [
        *found,
        _phase("an epoch", epoch, whole, *of_step),
        _phase("of it the head", head, *of_step),
        _phase("an evaluation", evaluation, alone, *of_ranking),
    ]


def _phase(name: str, seconds: Callable[..., float], *rates: tuple[float, str] | None) -> Phase:
    """Apply `seconds` to the values of the rates. If one of them is None, the phase has no time."""
    measured = [rate for rate in rates if rate is not None]
    if len(measured) < len(rates):
        return Phase(name, None, "no measured rate")
    return Phase(name, seconds(*(value for value, _ in measured)), "; ".join(dict.fromkeys(s for _, s in measured)))


# Out of memory --------------------------------------------------------------------------------------------------------


def what_fits(config: Config, gpus: int, stage: int | None, gpu_bytes: int, parts: int | None = None) -> str:
    """Describe in one line what a training needs that ran out of GPU memory, and the first change of settings that fits.

    Args:
        parts: micro-batches per step of that training; None: as configured.
    """
    shape, labels = PUBLISHED.get(config.data.dataset), config.data.num_labels
    if labels is None and shape is None:
        return "raise data.micro_batches; with data.num_labels set, xmc-trainer plan shows what a step needs"
    encoder = EncoderPlan.of(config)
    # Memory depends on the longest texts only; the other sizes do not matter.
    facts = Facts.of(config, shape or Shape(1, 1, 1, 36, config.data.max_len))
    now = memory_of(config, encoder, facts, gpus, stage, gpu_bytes, parts)
    said = f"{gpus} GPU{'s' * (gpus > 1)}, {stage_name(stage)}, {now.parts} micro-batches: {now.device / GIB:.1f} GiB planned"
    for change, other in _changes(config, now.parts, gpus):
        needed = memory_of(other, encoder, facts, gpus, stage, gpu_bytes)
        # The failed training needed too much, whatever the plan says: require less than its planned peak.
        if needed.device < 0.95 * gpu_bytes and needed.peak < 0.9 * now.peak:
            return f"{said}; {change} needs {needed.device / GIB:.1f} GiB"
    return f"{said}; no change of micro-batches and head fits; use more GPUs, or GPUs with more memory"


def _changes(config: Config, parts: int, gpus: int) -> Iterator[tuple[str, Config]]:
    """Yield (settings as words, configuration) in order of falling memory; those with the same training result come first."""

    def with_parts(config: Config, number: int) -> Config:
        return replace(config, data=replace(config.data, micro_batches=str(number)))

    most = config.texts_a_step // gpus
    cuts = [number for number in range(parts + 1, most + 1) if config.texts_a_step % (number * gpus) == 0]
    yield from ((f"data.micro_batches={number}", with_parts(config, number)) for number in cuts)
    number = cuts[-1] if cuts else parts
    words = f"data.micro_batches={number} "
    ffi, optimization = config.model.ffi, config.training.optimization
    for states in ("adamw_8bit", "rowwise_rmsprop"):
        small = replace(optimization, xmc_optimizer=states, xmc_momentum=0.9)
        changed = replace(
            with_parts(config, number),
            model=replace(config.model, ffi=replace(ffi, weight_dtype="bfloat16")),
            training=replace(config.training, optimization=small),
        )
        yield f"{words}model.ffi.weight_dtype=bfloat16 training.optimization.xmc_optimizer={states}", changed


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Turn an out-of-memory error of the block into a UserError that says what would fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        stage = parts = None
        if is_initialized():
            plugin = AcceleratorState().deepspeed_plugin
            stage, parts = plugin and plugin.zero_stage, GradientState().num_steps
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        fits = what_fits(config, Ranks().size, stage, total, parts)
        raise UserError(f"out of GPU memory ({total / GIB:.1f} GiB): {fits}") from error
