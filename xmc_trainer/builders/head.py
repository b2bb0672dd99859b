"""Build the heads that a configuration asks for: over labels and, for the meta branch, over label clusters."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xmc_trainer.builders.data import frequent_labels
from xmc_trainer.builders.encoder import in_precision_of
from xmc_trainer.config import Config
from xmc_trainer.data import Corpus
from xmc_trainer.encoder.text_encoder import TextEncoder
from xmc_trainer.engine.accelerator import whole_weights
from xmc_trainer.errors import UserError
from xmc_trainer.head import FixedFanInHead, Head, SplitHead
from xmc_trainer.head.cluster_branch import MetaBranch
from xmc_trainer.head.losses import starting_bias
from xmc_trainer.head.optimizers import optimizer_named
from xmc_trainer.kernels.dispatch import select_backend
from xmc_trainer.labels.features import LabelSums, encode_training_texts, whitener
from xmc_trainer.parallel import Ranks


def require_backend(config: Config, device: torch.device) -> None:
    """Raise UserError if the head's kernels cannot run on the device."""
    try:
        select_backend(config.model.ffi.backend, device)
    except ValueError as error:
        raise UserError(f"model.ffi.{error}") from None


def head_of(config: Config, features: int, corpus: Corpus, ranks: Ranks, device: torch.device) -> Head:
    """Build the head over the labels of `corpus`, in their order. Raises UserError if settings contradict the data."""
    ffi, optimization = config.model.ffi, config.training.optimization
    labels = corpus.num_labels
    if ffi.output_features not in (None, labels):
        raise UserError(
            f"model.ffi.output_features={ffi.output_features}: the data have {labels} labels; set that, or null"
        )
    frequent = frequent_labels(config, labels)
    if -(-(labels - frequent) // ffi.group_size) < ranks.size:
        raise UserError(
            f"model.ffi.group_size={ffi.group_size}: leaves fewer groups of labels than processes; lower it, or start fewer processes"
        )
    if ffi.head_ratio and frequent < ranks.size:
        raise UserError(
            f"model.ffi.head_ratio={ffi.head_ratio}: means {frequent} labels, fewer than processes; raise it, set it to 0, or start fewer processes"
        )
    counts = corpus.label_counts()
    shift = torch.from_numpy(ffi.logit_adjustment * corpus.log_frequency()) if ffi.logit_adjustment else None
    optimizer = optimizer_named(optimization.xmc_optimizer, optimization.xmc_momentum)
    common = _common_arguments(config, ranks, device)

    def layer(fan_in: int | None, group_size: int, labels: slice, **more: Any) -> FixedFanInHead:
        return FixedFanInHead(
            features,
            len(counts[labels]),
            fan_in=fan_in,
            group_size=group_size,
            first_bias=first_bias(config, counts[labels], corpus.texts),
            zero_weights=ffi.weight_init == "zero",
            logit_shift=None if shift is None else shift[labels],
            optimizer=optimizer,
            lr=optimization.lr,
            weight_dtype=getattr(torch, ffi.weight_dtype),
            growth_batches=ffi.growth_batches if ffi.growth_mode == "gradient" else 0,
            **common | more,
        )

    fan_in = ffi.fan_in if ffi.use_sparse_layer and not optimization.dense_epochs else None
    if not ffi.head_ratio:
        return layer(fan_in, ffi.group_size, slice(None))
    # Both layers number their labels from 0; another seed gives them different random numbers.
    seed = (config.training.seed + 1) % (1 << 32)
    return SplitHead(
        layer(ffi.head_fan_in, 1, slice(frequent), seed=seed), layer(fan_in, ffi.group_size, slice(frequent, None))
    )


def start_head_from_texts(
    config: Config,
    head: Head,
    encoder: TextEncoder,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    rows: np.ndarray | None,
    device: torch.device,
    progress: bool,
) -> None:
    """Set the head's first index and weights from the training texts, if the configuration asks for that.

    Args:
        encoder: not yet prepared by the engine.
        rows: int64, the training texts to use; None for all.
    """
    ffi = config.model.ffi
    if not ffi.index_from_texts and ffi.weight_init != "centroid":
        return
    encoder = encoder.to(device).eval()
    with tempfile.TemporaryDirectory(prefix="xmc_trainer.") as folder:
        with whole_weights(encoder):
            features = encode_training_texts(
                in_precision_of(config, encoder, device),
                corpus,
                Path(folder) / "texts.npy",
                width=encoder.out_features,
                batch_size=config.data.test_batch_size,
                pad_token_id=tokenizer.pad_token_id,
                workers=config.data.num_workers,
                device=device,
                rows=rows,
                ranks=head.ranks,
                progress=progress,
            )
        of_labels = LabelSums(features, corpus.train_labels(), corpus.num_labels, rows, device)
        mean_d, deviation_d = of_labels.moments()

        whitener_dd = None
        if ffi.index_from_texts and ffi.index_init == "discriminant":
            whitener_dd = whitener(of_labels.correlations(), ffi.discriminant_ridge)

        def texts_of(labels: range) -> tuple[Tensor, Tensor]:
            sums, counts = of_labels.sums(labels)
            inverse = torch.where(deviation_d > 0, 1 / deviation_d, 0.0)
            return (sums - counts[:, None] * mean_d) * inverse, counts

        head.start_from_texts(
            texts_of,
            index=ffi.index_from_texts,
            whitener_dd=whitener_dd,
            centroid_scale=ffi.centroid_scale if ffi.weight_init == "centroid" else 0.0,
            mean_d=mean_d,
            deviation_d=deviation_d,
        )
    encoder.train()


def meta_branch_of(
    config: Config,
    features: int,
    corpus: Corpus,
    cluster_of: np.ndarray,
    steps_per_epoch: int,
    ranks: Ranks,
    device: torch.device,
) -> MetaBranch:
    """Build the meta branch over label clusters. Raises UserError if there are fewer clusters than processes.

    Args:
        cluster_of: int32 [L], the cluster of each label.
    """
    auxiliary = config.model.auxiliary
    clusters = int(cluster_of.max()) + 1
    if clusters < ranks.size:
        raise UserError(
            f"{config.cluster_file}: has fewer clusters ({clusters}) than there are processes; start fewer processes"
        )
    labels = corpus.train_labels()
    pairs = np.repeat(np.arange(len(labels.offsets) - 1) * clusters, np.diff(labels.offsets)) + cluster_of[labels.ids]
    counts = np.bincount(np.unique(pairs) % clusters, minlength=clusters)
    return MetaBranch.build(
        features,
        cluster_of,
        scaling=auxiliary.auxloss_scaling,
        last_step=auxiliary.meta_cutoff_epoch * steps_per_epoch,
        first_bias=first_bias(config, counts, corpus.texts),
        lr=config.training.optimization.meta_lr,
        **_common_arguments(config, ranks, device),
    )


def first_bias(config: Config, counts: np.ndarray, texts: int) -> Tensor:
    """Return the initial bias of each output, float32. `counts`: how many of the `texts` texts have it as a positive."""
    return starting_bias(
        config.training.optimization.loss_fn, config.model.ffi.bias_init, torch.from_numpy(counts), texts
    )


def _common_arguments(config: Config, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Return the arguments that the heads of labels and meta branch share."""
    ffi, optimization = config.model.ffi, config.training.optimization
    return {
        "loss": optimization.loss_fn,
        "text_reduction": optimization.text_reduction,
        "weight_decay": optimization.wd,
        "product_dtype": torch.bfloat16 if config.training.amp.enabled else torch.float32,
        "seed": config.training.seed,
        "tile_labels": ffi.tile_labels,
        "backend": ffi.backend,
        "ranks": ranks,
        "device": device,
    }
