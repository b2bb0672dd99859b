"""The configuration: typed sections, one YAML a data set, `key=value` overrides, and every check that needs no data.

The vocabulary is Spartex's (NeurIPS 2024): a complete configuration file of that system loads unchanged. The tree is
built once, by `load_config`, and read by builders only; the head, its kernels and the data code take plain arguments.

Checks live in `__post_init__`: they run when OmegaConf turns the merged tree into objects, before any work, and each
message names the field to change.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from xmc_trainer.errors import UserError
from xmc_trainer.schedules import SCHEDULES


def option(default: Any, help: str) -> Any:
    """A dataclass field with its one-line description, which `xmc-trainer settings` lists."""
    metadata = {"help": help}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r}: choose one of {', '.join(allowed)}")


def _at_least(name: str, value: float | None, lowest: float) -> None:
    if value is not None and not value >= lowest:  # so that nan is refused too
        raise UserError(f"{name}={value}: must be at least {lowest}")


def _share(name: str, value: float, below_one: bool = False) -> None:
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise UserError(f"{name}={value}: must be in [0, 1{')' if below_one else ']'}")


@dataclass
class EnvironmentConfig:
    running_env: str = option("guest", "key of `environment.env2path` that stands in for a missing `dataset_path`")
    env2path: dict[str, str] = option({"guest": "./data"}, "root folder of the data sets on each machine of yours")
    device: str = option("auto", "auto, cuda or cpu; auto takes the GPU if there is one")
    cuda_device_id: int = option(0, "GPU of a run without a launcher; launchers give each process its own")

    def __post_init__(self) -> None:
        _one_of("environment.device", self.device, ("auto", "cuda", "cpu"))
        _at_least("environment.cuda_device_id", self.cuda_device_id, 0)

    def device_name(self) -> str:
        """cpu or cuda:N, of a single process; whether there is such a GPU is torch's to say."""
        import torch  # takes seconds to import: settings that are wrong do not wait for it

        on_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return f"cuda:{self.cuda_device_id}" if on_gpu else "cpu"


@dataclass
class DataConfig:
    dataset: str = option(MISSING, "name of the data set; keys the shipped YAML files")
    folder: str | None = option(None, "folder under `dataset_path`; default: the shipped one, else `data.dataset`")
    is_lf_data: bool = option(False, "label-feature layout (raw_text/trn.json ...) instead of raw text files")
    hf_source: str | None = option(
        None, "instead of both layouts: folder with <split>.parquet or <split>.jsonl, saved data set, or hub id"
    )
    hf_train_split: str = option("train", "split (or file, for .parquet and .jsonl folders) to train on")
    hf_test_split: str = option("test", "split to evaluate on")
    text_column: str = option("text", "column of `data.hf_source` with the text")
    label_column: str = option("labels", "column of `data.hf_source` with the list of labels (names or ids)")
    label_text_file: str | None = option(
        None, "raw layout: file `label<TAB>text` in the folder, for readable predictions"
    )
    test_split: str = option("test", "raw layout: the files to evaluate on, such as dev for dev_raw_texts.txt, dev_labels.txt")
    augment_label_data: bool = option(
        False, "add each label's text as a training instance of that label (LF data, or raw with label_text_file)"
    )
    use_filter_eval: bool = option(False, "leave the pairs of raw_text/filter_labels_test.txt out of the ranking (LF data)")
    num_labels: int | None = option(None, "number of labels; default: what the data say; a contradiction is refused")
    max_len: int = option(128, "longest text, in tokens, special tokens included; the rest is cut off")
    num_workers: int = option(2, "data loader processes a rank")
    batch_size: int = option(
        64, "texts over all ranks together; an optimizer step trains on batch_size x training.optimization.grad_accum_step of them"
    )
    micro_batches: str = option(
        "auto",
        "into how many equal parts a step's texts are cut, one after the other, to save memory; every cut trains the same. auto: as "
        "few as fit the GPU's memory; without a GPU grad_accum_step",
    )
    test_batch_size: int = option(256, "texts an evaluation batch over all ranks together")
    train_sample: int | None = option(None, "train on this many texts, drawn by `training.seed` (from label texts, too, with augment_label_data); every label stays")
    length_grouped: bool = option(True, "batches of texts of similar length, in random order: less padding")
    cache_dir: str = option("~/.cache/xmc_trainer", "where tokenised data sets are kept, by content")

    @property
    def evaluated_split(self) -> str:
        """What the test set is called in the data."""
        return self.test_split if self.hf_source is None else self.hf_test_split

    def __post_init__(self) -> None:
        for name in ("num_labels", "batch_size", "test_batch_size", "train_sample"):
            _at_least(f"data.{name}", getattr(self, name), 1)
        _at_least("data.max_len", self.max_len, 3)
        if self.micro_batches != "auto" and not (self.micro_batches.isdecimal() and int(self.micro_batches) > 0):
            raise UserError(f"data.micro_batches={self.micro_batches}: auto, or a number of parts")
        _at_least("data.num_workers", self.num_workers, 0)
        if self.is_lf_data and self.hf_source:
            raise UserError("data.hf_source: clear it or set data.is_lf_data=false; a run reads one source")
        if self.label_text_file and (self.is_lf_data or self.hf_source):
            raise UserError("data.label_text_file: of the raw layout only; label-feature data bring their labels' texts")
        if self.use_filter_eval and not self.is_lf_data:
            raise UserError("data.use_filter_eval=true: needs label-feature data (data.is_lf_data=true)")
        if self.augment_label_data and not (self.is_lf_data or self.label_text_file):
            raise UserError("data.augment_label_data=true: needs the labels' texts: data.is_lf_data=true or data.label_text_file")
        if self.test_split != "test" and (self.is_lf_data or self.hf_source):
            instead = "set data.hf_test_split" if self.hf_source else "label-feature data have one test set, raw_text/tst.json in data.folder"
            raise UserError(f"data.test_split: of the raw layout only; {instead}")


@dataclass
class EncoderConfig:
    encoder_model: str = option("bert-base-uncased", "Hugging Face model: hub id or folder")
    encoder_tokenizer: str = option("${model.encoder.encoder_model}", "Hugging Face tokenizer: hub id or folder")
    encoder_ftr_dim: int | None = option(None, "hidden size of the encoder; checked against the model")
    pool_mode: str = option("last_hidden_avg", "last_hidden_avg, or last_nhidden_conlast (first token, last n layers)")
    feature_layers: int = option(1, "n of last_nhidden_conlast")
    embed_dropout: float = option(0.3, "dropout on the pooled embedding")
    use_torch_compile: str = option(
        "auto", "compile the encoder (torch.compile; seconds at the start): true, false, or auto: on a GPU, but not under ZeRO 3, and only if it can be"
    )
    use_ngame_encoder_weights: bool = option(False, "start the encoder from the weights in ngame_checkpoint")
    ngame_checkpoint: str | None = option(None, "state dict of an encoder: a file of torch.save, or .safetensors")
    ngame_key_prefix: str = option(
        "",
        "the encoder's entries of that file start with this, which is stripped; one that the encoder lacks is refused, but "
        "poolers",
    )

    def __post_init__(self) -> None:
        self.use_torch_compile = self.use_torch_compile.lower()  # YAML's booleans come as True and False
        _one_of("model.encoder.use_torch_compile", self.use_torch_compile, ("auto", "true", "false"))
        _one_of("model.encoder.pool_mode", self.pool_mode, ("last_hidden_avg", "last_nhidden_conlast"))
        _at_least("model.encoder.feature_layers", self.feature_layers, 1)
        _share("model.encoder.embed_dropout", self.embed_dropout, below_one=True)
        if self.pool_mode == "last_hidden_avg" and self.feature_layers != 1:
            raise UserError("model.encoder.feature_layers: must be 1 with pool_mode=last_hidden_avg")
        if self.use_ngame_encoder_weights and not self.ngame_checkpoint:
            raise UserError("model.encoder.use_ngame_encoder_weights=true: name the file in model.encoder.ngame_checkpoint")


@dataclass
class PenultimateConfig:
    use_penultimate_layer: bool = option(False, "a linear layer between encoder and head, with its own learning rate")
    penultimate_size: int = option(4096, "its width: the d that the head reads")
    penultimate_activation: str = option("relu", "relu, gelu, tanh or none")

    def __post_init__(self) -> None:
        _at_least("model.penultimate.penultimate_size", self.penultimate_size, 1)
        if self.penultimate_size > 1 << 16:
            raise UserError(f"model.penultimate.penultimate_size={self.penultimate_size}: at most 65536")
        _one_of(
            "model.penultimate.penultimate_activation", self.penultimate_activation, ("relu", "gelu", "tanh", "none")
        )


@dataclass
class FFIConfig:
    use_sparse_layer: bool = option(
        True, "fixed fan-in head; false: dense head, for which fan_in, index_init, pruning, growth and rewiring mean nothing"
    )
    fan_in: int = option(128, "features that a label reads")
    group_size: int = option(1, "consecutive labels that share one index row")
    semantic_groups: bool = option(
        False, "put the labels in the order of the cluster file (auxiliary.group_y_group): a group's labels are neighbours"
    )
    head_ratio: float = option(0.0, "share of the labels, the most frequent ones, that read head_fan_in features; the others fan_in")
    head_fan_in: int | None = option(None, "features that each of these labels reads; default: all")
    weight_dtype: str = option(
        "float32", "head weights and, but for adamw_8bit, optimizer state: float32, or bfloat16 (stochastic rounding)"
    )
    bias_init: str = option(
        "prior", "prior: the best constant for the share of positives in the data; frequency: the same of each label; or zero"
    )
    index_init: str = option(
        "random",
        "first features of a label: random; informed: those on which its training texts stand out most; or discriminant: "
        "those that tell them from the other texts best, the features' correlations considered",
    )
    discriminant_ridge: float = option(
        0.5, "of discriminant: what the correlations are shrunk by, 0 to 1; 1: not considered, as informed"
    )
    weight_init: str = option("random", "first weights: random, zero, or centroid: along the mean of the label's training texts")
    centroid_scale: float = option(0.5, "length of the weights of weight_init=centroid, for features of deviation 1")
    logit_adjustment: float = option(
        0.0,
        "taken off a label's score: this times log(its training texts / an average label's): rare labels are found more often; "
        "what it does to P@1 xmc-trainer adjust says, on a dev split",
    )
    backend: str = option(
        "auto", "auto, triton (GPU), reference (plain torch, CPU and GPU) or torch_sparse (PyG's); auto: triton where it runs"
    )
    tile_labels: int | None = option(
        None, "labels a tile of the backends without triton: bounds its working memory; default 4096 on a CPU, 65536 on a GPU"
    )
    prune_mode: str = option("threshold", "threshold (|w| below it) or fraction (the smallest share of each row)")
    rewire_threshold: float = option(0.01, "threshold of prune_mode=threshold")
    rewire_fraction: float = option(0.15, "share of prune_mode=fraction")
    rewire_end_threshold: float = option(1e-4, "where the scheduled threshold ends")
    growth_mode: str = option(
        "random", "random: uniform over the features that the row does not read; gradient: those of the largest gradient"
    )
    growth_batches: int = option(16, "of growth_mode=gradient: latest steps over which the gradient is summed")
    growth_init_mode: str = option("zero", "grown weights start at zero, or at random like the first ones")
    input_features: int | None = option(None, "d; checked against the encoder or the penultimate layer")
    output_features: int | None = option(None, "number of labels; checked against the data")
    rewire_interval: int = option(1000, "optimizer steps between two rewirings; 0: never")
    use_rewire_scheduling: bool = option(True, "cosine decay: threshold to rewire_end_threshold, fraction to 0")
    rewire_end_epoch: float = option(0.66, "share of the training after which the connectivity is frozen")

    def __post_init__(self) -> None:
        for name in ("fan_in", "group_size", "tile_labels"):
            _at_least(f"model.ffi.{name}", getattr(self, name), 1)
        for name in ("rewire_interval", "rewire_threshold", "rewire_end_threshold"):
            _at_least(f"model.ffi.{name}", getattr(self, name), 0)
        _share("model.ffi.rewire_fraction", self.rewire_fraction)
        _share("model.ffi.head_ratio", self.head_ratio, below_one=True)
        if self.head_ratio and not self.use_sparse_layer:
            raise UserError("model.ffi.head_ratio: without meaning for a dense head; set use_sparse_layer=true or head_ratio=0")
        _at_least("model.ffi.head_fan_in", self.head_fan_in, 1)
        if self.head_fan_in is not None and not self.head_ratio:
            raise UserError(f"model.ffi.head_fan_in={self.head_fan_in}: of the labels of model.ffi.head_ratio, which is 0; set that too")
        if self.group_size > 1 and not self.use_sparse_layer:
            raise UserError(
                f"model.ffi.group_size={self.group_size}: a dense head has no index to share; set it to 1, or "
                "use_sparse_layer=true"
            )
        _share("model.ffi.rewire_end_epoch", self.rewire_end_epoch)
        _one_of("model.ffi.weight_dtype", self.weight_dtype, ("float32", "bfloat16"))
        _one_of("model.ffi.bias_init", self.bias_init, ("prior", "frequency", "zero"))
        _one_of("model.ffi.index_init", self.index_init, ("random", "informed", "discriminant"))
        if not 0 < self.discriminant_ridge <= 1:
            raise UserError(f"model.ffi.discriminant_ridge={self.discriminant_ridge}: must be above 0 and at most 1")
        _one_of("model.ffi.weight_init", self.weight_init, ("random", "zero", "centroid"))
        if not self.centroid_scale > 0:
            raise UserError(f"model.ffi.centroid_scale={self.centroid_scale}: must be above 0")
        _at_least("model.ffi.logit_adjustment", self.logit_adjustment, 0)
        _one_of("model.ffi.backend", self.backend, ("auto", "triton", "reference", "torch_sparse"))
        _one_of("model.ffi.prune_mode", self.prune_mode, ("threshold", "fraction"))
        _one_of("model.ffi.growth_mode", self.growth_mode, ("random", "gradient"))
        _at_least("model.ffi.growth_batches", self.growth_batches, 1)
        _one_of("model.ffi.growth_init_mode", self.growth_init_mode, ("zero", "random"))
        # What the shipped files and Spartex's never say together: whoever says it means something by it.
        if self.use_sparse_layer and self.growth_mode == "gradient" and self.rewire_interval == 0:
            raise UserError("model.ffi.growth_mode=gradient: nothing grows with model.ffi.rewire_interval=0; set that too")
        for name, default, choice, needed in (
            ("discriminant_ridge", 0.5, "index_init", "discriminant"), ("centroid_scale", 0.5, "weight_init", "centroid"),
        ):  # fmt: skip
            if getattr(self, name) != default and getattr(self, choice) != needed:
                raise UserError(f"model.ffi.{name}={getattr(self, name)}: of model.ffi.{choice}={needed}; set that too")


    @property
    def index_from_texts(self) -> bool:
        """Whether the training texts decide the first index; a dense head has none."""
        return self.use_sparse_layer and self.index_init != "random"


@dataclass
class AuxiliaryConfig:
    use_meta_branch: bool = option(False, "also predict the labels' clusters, by a dense head of their own, at first")
    group_y_group: int = option(0, "n of the data folder's cluster file label_group<n>.safetensors (xmc-trainer clusters)")
    meta_cutoff_epoch: int = option(20, "epoch at which the weight of the meta branch has decayed to 0, by a cosine")
    auxloss_scaling: float = option(0.4, "first weight of the meta branch's loss; the labels' loss has the rest of 1")

    def __post_init__(self) -> None:
        _at_least("model.auxiliary.group_y_group", self.group_y_group, 0)
        _at_least("model.auxiliary.meta_cutoff_epoch", self.meta_cutoff_epoch, 1)
        _share("model.auxiliary.auxloss_scaling", self.auxloss_scaling, below_one=True)


@dataclass
class ModelConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    penultimate: PenultimateConfig = field(default_factory=PenultimateConfig)
    ffi: FFIConfig = field(default_factory=FFIConfig)
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)


@dataclass
class AmpConfig:
    enabled: bool = option(False, "mixed precision for the encoder")
    dtype: str = option("float16", "float16 or bfloat16")

    def __post_init__(self) -> None:
        _one_of("training.amp.dtype", self.dtype, ("float16", "bfloat16"))

    @property
    def mixed_precision(self) -> str:
        """accelerate's name: "no", "fp16" or "bf16"."""
        return {"float16": "fp16", "bfloat16": "bf16"}[self.dtype] if self.enabled else "no"


@dataclass
class OptimizationConfig:
    loss_fn: str = option("bce", "bce or squared_hinge, summed over labels")
    loss_reduction: str = option("auto", "how texts are combined: sum, mean, or auto (bce: sum, squared_hinge: mean)")
    encoder_optimizer: str = option("adamw", "adamw, adam, or sgd (with momentum 0.9)")
    xmc_optimizer: str = option(
        "sgd", "optimizer of the head: sgd (with xmc_momentum), adamw, adamw_8bit (states of a byte; meant for weight_dtype=bfloat16), or rowwise_rmsprop (one float of state a label)"
    )
    xmc_momentum: float = option(0.9, "momentum of xmc_optimizer=sgd; 0 is plain SGD, without optimizer state")
    epochs: int = option(10, "passes over the training set")
    max_steps: int | None = option(None, "end after this many optimizer steps, if that comes before `epochs`")
    dense_epochs: int = option(
        0, "epochs with a dense head, which then keeps each label's fan_in largest weights; a dense head stays one"
    )
    grad_accum_step: int = option(1, "batches an optimizer step; how they are cut into micro-batches data.micro_batches says")
    encoder_lr: float = option(2e-5, "peak learning rate of the encoder")
    penultimate_lr: float = option(2e-4, "peak learning rate of the penultimate layer")
    meta_lr: float = option(5e-4, "peak learning rate of the meta branch's head, which AdamW trains on the encoder's schedule")
    lr: float = option(0.05, "peak learning rate of the head")
    wd_encoder: float = option(0.01, "weight decay of encoder and penultimate layer (not on biases and norms)")
    wd: float = option(1e-4, "weight decay of the head's weights")
    lr_scheduler: str = option(
        "CosineScheduleWithWarmup",
        "of encoder and penultimate layer: CosineScheduleWithWarmup, MultiStepLR or ReduceLROnPlateau",
    )
    lr_scheduler_xmc: str = option("CosineScheduleWithWarmup", "of the head: one of the same")
    warmup_steps: int = option(500, "optimizer steps of linear warm-up, of every schedule")
    lr_milestones: list[int] = option([], "of MultiStepLR: epochs after which the rate is multiplied by lr_gamma")
    lr_gamma: float = option(0.1, "factor of MultiStepLR and ReduceLROnPlateau")
    lr_patience: int = option(5, "of ReduceLROnPlateau: test evaluations without a better P@1 before the rate falls")
    training_steps: int = option(1, "computed at run time, as in the seed; leave it at 1 (see max_steps)")
    max_grad_norm: float = option(0.0, "clip the encoder's gradient to this norm; 0: no clipping")

    def __post_init__(self) -> None:
        section = "training.optimization"
        _one_of(f"{section}.loss_fn", self.loss_fn, ("bce", "squared_hinge"))
        _one_of(f"{section}.loss_reduction", self.loss_reduction, ("auto", "sum", "mean"))
        _one_of(f"{section}.encoder_optimizer", self.encoder_optimizer, ("adamw", "adam", "sgd"))
        if self.xmc_optimizer == "momentum":
            raise UserError(
                f"{section}.xmc_optimizer=momentum: write sgd and set {section}.xmc_momentum (0.9 by default)"
            )
        _one_of(f"{section}.xmc_optimizer", self.xmc_optimizer, ("sgd", "adamw", "adamw_8bit", "rowwise_rmsprop"))
        for name in ("lr_scheduler", "lr_scheduler_xmc"):
            _one_of(f"{section}.{name}", getattr(self, name), tuple(SCHEDULES))
            if getattr(self, name) == "MultiStepLR" and not self.lr_milestones:
                raise UserError(f"{section}.{name}=MultiStepLR: list the epochs in {section}.lr_milestones")
        if self.lr_milestones and "MultiStepLR" not in (self.lr_scheduler, self.lr_scheduler_xmc):
            raise UserError(
                f"{section}.lr_milestones: no schedule reads them; set {section}.lr_scheduler or lr_scheduler_xmc to "
                "MultiStepLR"
            )
        for epoch in self.lr_milestones:
            _at_least(f"{section}.lr_milestones", epoch, 1)
        _share(f"{section}.lr_gamma", self.lr_gamma)
        _at_least(f"{section}.lr_patience", self.lr_patience, 0)
        _at_least(f"{section}.dense_epochs", self.dense_epochs, 0)
        for name in ("epochs", "max_steps", "grad_accum_step"):
            _at_least(f"{section}.{name}", getattr(self, name), 1)
        for name in ("encoder_lr", "penultimate_lr", "meta_lr", "lr", "wd_encoder", "wd", "warmup_steps", "max_grad_norm"):
            _at_least(f"{section}.{name}", getattr(self, name), 0)
        _share(f"{section}.xmc_momentum", self.xmc_momentum, below_one=True)
        if self.xmc_optimizer != "sgd" and self.xmc_momentum != 0.9:
            raise UserError(
                f"{section}.xmc_momentum={self.xmc_momentum}: of xmc_optimizer=sgd; set that, or leave it at 0.9"
            )
        if self.training_steps != 1:
            raise UserError(
                f"{section}.training_steps: is computed at run time, leave it at 1; to end early set max_steps"
            )

    @property
    def text_reduction(self) -> str:
        """`loss_reduction` with "auto" resolved: the seed's published learning rates assume these."""
        if self.loss_reduction != "auto":
            return self.loss_reduction
        return "sum" if self.loss_fn == "bce" else "mean"


@dataclass
class EvaluationConfig:
    train_evaluate: bool = option(False, "evaluate on (a test-sized part of) the training set too")
    train_evaluate_every: int = option(10, "epochs between two evaluations on the training set")
    test_evaluate_every: int = option(
        1, "epochs between two evaluations on the test set; the last epoch is always evaluated"
    )
    A: float = option(0.55, "propensity constant")
    B: float = option(1.5, "propensity constant")
    eval_psp: bool = option(True, "report PSP@k and PSnDCG@k")
    early_stop_patience: int = option(
        0, "end the training after this many test evaluations without a better early_stop_metric; 0: never"
    )
    early_stop_delta: float = option(5e-5, "what counts as better: more than this above the best (metrics are 0 to 1)")
    early_stop_metric: str = option("P@3", "P@1, P@3, P@5, or another metric of the test evaluation")

    def __post_init__(self) -> None:
        for name in ("train_evaluate_every", "test_evaluate_every"):
            _at_least(f"training.evaluation.{name}", getattr(self, name), 1)
        _at_least("training.evaluation.B", self.B, 0)
        _at_least("training.evaluation.early_stop_patience", self.early_stop_patience, 0)
        _at_least("training.evaluation.early_stop_delta", self.early_stop_delta, 0)
        kinds = ("P", "nDCG", "R", "PSP", "PSnDCG") if self.eval_psp else ("P", "nDCG", "R")
        names = tuple(f"{kind}@{k}" for kind in kinds for k in (1, 3, 5))
        _one_of("training.evaluation.early_stop_metric", self.early_stop_metric, names)


@dataclass
class VerboseConfig:
    show_iter: bool = option(False, "print the loss every print_iter steps, beside the progress bar")
    print_iter: int = option(2000, "optimizer steps between two printed lines")
    use_wandb: bool = option(False, "also log to Weights & Biases")
    wandb_runname: str = option("none", "name of the run there")
    logging: bool = option(True, "write log.jsonl: a line for every optimizer step and evaluation")
    log_fname: str = option("run", "name of the run: its folder under `output_dir`")

    def __post_init__(self) -> None:
        _at_least("training.verbose.print_iter", self.print_iter, 1)
        if not self.log_fname or "/" in self.log_fname or self.log_fname.startswith("."):
            raise UserError(
                f"training.verbose.log_fname={self.log_fname!r}: a plain name, it becomes a folder of output_dir"
            )


# What a run's folder holds beside training.checkpoint_file, and what stands there while a model is written.
_RUN_FILES = (
    "model", "model.partial", "model.old", "checkpoint", "checkpoint.partial", "checkpoint.old", "config.yaml", "log.jsonl", "wandb",
)  # fmt: skip


@dataclass
class TrainingConfig:
    seed: int = option(42, "of everything random")
    amp: AmpConfig = field(default_factory=AmpConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    verbose: VerboseConfig = field(default_factory=VerboseConfig)
    use_checkpoint: bool = option(
        False, "also keep the model with the best test P@1, in <run folder>/<checkpoint_file>"
    )
    checkpoint_file: str = option("best", "folder name of that model")
    best_p1: float = option(0.0, "P@1 (0 to 1) that a model must exceed to be kept")
    checkpoint_interval: int = option(
        1000, "optimizer steps between two checkpoints of the training, of which the last is kept until its end; 0: never"
    )
    resume: bool = option(False, "go on from the run's checkpoint; from the beginning where there is none")

    def __post_init__(self) -> None:
        _at_least("training.checkpoint_interval", self.checkpoint_interval, 0)
        _at_least("training.seed", self.seed, 0)
        if self.seed >= 1 << 32:
            raise UserError(f"training.seed={self.seed}: must be below 2^32")
        _share("training.best_p1", self.best_p1)
        if not self.checkpoint_file or "/" in self.checkpoint_file or self.checkpoint_file in (".", "..", *_RUN_FILES):
            raise UserError(
                f"training.checkpoint_file={self.checkpoint_file!r}: a plain name for a folder, other than "
                f"{', '.join(_RUN_FILES)}"
            )


@dataclass
class Config:
    dataset: str = option(MISSING, "name of a shipped data set, or a YAML file of yours")
    dataset_path: str | None = option(None, "folder that holds the data sets' folders")
    log_fname: str | None = option(None, "short for training.verbose.log_fname")
    output_dir: str = option("./outputs", "where run folders are made")
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        ffi, opt, env = self.model.ffi, self.training.optimization, self.environment
        if self.dataset_path is None and env.running_env not in env.env2path:
            raise UserError(
                f"environment.running_env={env.running_env!r} is not a key of environment.env2path; add it there or give "
                "dataset_path=FOLDER"
            )
        if ffi.use_sparse_layer and opt.dense_epochs >= opt.epochs:
            raise UserError(
                f"training.optimization.dense_epochs={opt.dense_epochs}: must be below epochs={opt.epochs}, or the head "
                "never becomes sparse; for a dense head set model.ffi.use_sparse_layer=false"
            )
        if opt.dense_epochs and ffi.index_from_texts:
            raise UserError(
                f"model.ffi.index_init={ffi.index_init}: with training.optimization.dense_epochs the dense weights decide; "
                "set one of them back"
            )
        if ffi.head_ratio and opt.dense_epochs:
            raise UserError("training.optimization.dense_epochs: not together with model.ffi.head_ratio; set one of them to 0")
        if ffi.semantic_groups and not (ffi.use_sparse_layer and ffi.group_size > 1):
            raise UserError("model.ffi.semantic_groups=true: needs labels that share an index row; set model.ffi.group_size")
        d, known = ffi.input_features, self._known_features()
        if d is not None and known is not None and d != known:
            raise UserError(f"model.ffi.input_features={d}: the layer below gives {known} features")
        if d or known:
            self.check_fan_in(d or known)
        if self.data.micro_batches != "auto" and self.texts_a_step % int(self.data.micro_batches):
            raise UserError(
                f"data.micro_batches={self.data.micro_batches}: does not divide the {self.texts_a_step} texts of a step "
                "(data.batch_size x training.optimization.grad_accum_step)"
            )
        n, labels = ffi.output_features, self.data.num_labels
        if n is not None and labels is not None and n != labels:
            raise UserError(f"model.ffi.output_features={n} contradicts data.num_labels={labels}")

    @property
    def texts_a_step(self) -> int:
        """Of an optimizer step, over all ranks."""
        return self.data.batch_size * self.training.optimization.grad_accum_step

    def check_fan_in(self, features: int) -> None:
        """UserError where a label is to read more features than there are."""
        ffi = self.model.ffi
        for name in ("fan_in", "head_fan_in"):
            if ffi.use_sparse_layer and (getattr(ffi, name) or 0) > features:
                raise UserError(f"model.ffi.{name}={getattr(ffi, name)}: there are only {features} features to read")

    def _known_features(self) -> int | None:
        if self.model.penultimate.use_penultimate_layer:
            return self.model.penultimate.penultimate_size
        encoder = self.model.encoder
        return encoder.encoder_ftr_dim and encoder.encoder_ftr_dim * encoder.feature_layers

    @property
    def data_folder(self) -> Path:
        """`dataset_path` (or the running environment's) joined with the data set's folder."""
        root = (
            self.dataset_path
            if self.dataset_path is not None
            else self.environment.env2path[self.environment.running_env]
        )
        return Path(root).expanduser() / (self.data.folder or self.data.dataset)

    @property
    def needs_clusters(self) -> bool:
        """Whether the training reads `cluster_file`."""
        return self.model.ffi.semantic_groups or self.model.auxiliary.use_meta_branch

    @property
    def cluster_file(self) -> Path:
        return self.data_folder / f"label_group{self.model.auxiliary.group_y_group}.safetensors"

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir).expanduser() / self.training.verbose.log_fname


# What may be another than in training, by how it begins.
MODEL_SETTINGS = ("dataset_path", "data.", "environment.", "training.evaluation.")


def shipped_configs() -> dict[str, Any]:
    """name -> resource of every data set YAML in the package."""
    folder = resources.files("xmc_trainer") / "configs"
    return {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}


def _read_yaml(dataset: str) -> Any:
    shipped = shipped_configs()
    if dataset in shipped:
        text = shipped[dataset].read_text(encoding="utf-8")
    elif dataset.endswith((".yaml", ".yml")):
        try:
            text = Path(dataset).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"dataset={dataset}: {error.strerror}") from None
    else:
        raise UserError(
            f"dataset={dataset}: no such data set; shipped are {', '.join(sorted(shipped))}; or name a .yaml file"
        )
    # Spartex mounts this file under the key `dataset`, and its interpolations say so.
    try:
        tree = OmegaConf.create(text.replace("${dataset.", "${"))
    except YAMLError as error:
        raise UserError(f"dataset={dataset}: not YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(tree):
        raise UserError(f"dataset={dataset}: must hold sections such as data, model and training")
    return tree


def _check_spelling(word: str) -> None:
    """Refuse what is no `key=value`; hydra's spellings, which users of Spartex know, with the right one."""
    plain = word.lstrip("+")
    if word.startswith("~"):
        key = word[1:].partition("=")[0]
        raise UserError(f"argument {word!r}: settings cannot be removed; write {key}=null, or leave it at its default")
    if plain.startswith("dataset."):
        plain = plain.removeprefix("dataset.")
    if plain != word:
        raise UserError(f"argument {word!r}: write {plain}")
    if "=" not in word:
        raise UserError(f"argument {word!r}: write key=value, for example model.ffi.fan_in=64")


@cache
def _defaults() -> DictConfig:
    """To be merged with others only, which copies it: made from the classes it takes longer than all the rest of `load_config`."""
    return OmegaConf.structured(Config)


def load_config(overrides: list[str]) -> Config:
    """The configuration of a run, from the command line's `key=value` words.

    `dataset=` names the YAML to start from, the others are dotted overrides of single fields.
    Raises UserError with the field to change: unknown keys, wrong types, impossible combinations.
    """
    for word in overrides:
        _check_spelling(word)
    try:
        command_line = OmegaConf.from_dotlist(overrides)
        dataset = command_line.get("dataset")
        if not isinstance(dataset, str):
            raise UserError(
                f"dataset=NAME is missing; shipped are {', '.join(sorted(shipped_configs()))}; or name a .yaml file"
            )
        tree = OmegaConf.merge(_defaults(), _read_yaml(dataset), command_line)
        if tree.log_fname is not None:
            tree.training.verbose.log_fname = tree.log_fname
        if OmegaConf.is_missing(tree.data, "dataset"):
            tree.data.dataset = Path(dataset).stem
        if tree.data.folder is None and tree.data.dataset in shipped_configs():
            tree.data.folder = _read_yaml(tree.data.dataset).data.get("folder")
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        meant = [name for name, *_ in describe() if isinstance(error, ConfigKeyError) and name.split(".")[-1] == key.split(".")[-1]]
        hint = f"; write {' or '.join(meant)}" if meant else ""
        raise UserError(f"{key}{': ' if key else ''}{str(error).splitlines()[0]}{hint}") from None


def config_of_model(folder: Path, overrides: list[str]) -> Config:
    """The configuration that a saved model's folder holds, and of `MODEL_SETTINGS` what is said of them now. UserError for any other."""
    for word in overrides:
        if not word.startswith(MODEL_SETTINGS):
            raise UserError(f"{word}: a saved model can be given only {', '.join(MODEL_SETTINGS)} settings")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder / 'config.yaml'}: missing; name the folder of a saved model")
    return load_config([f"dataset={folder / 'config.yaml'}", *overrides])


def to_yaml(config: Any) -> str:
    """A resolved configuration section as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def describe(section: Any = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, default, description) of every setting under a section."""
    rows = []
    for item in dataclasses.fields(section):
        if "help" in item.metadata:
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            rows.append((prefix + item.name, str(default), item.metadata["help"]))
        else:
            rows += describe(item.default_factory, f"{prefix}{item.name}.")
    return rows


def markdown_table() -> str:
    """The README's table of settings."""
    rows = [f"| `{name}` | `{default}` | {text.replace('|', chr(92) + '|')} |" for name, default, text in describe()]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description="Every setting of a training: dotted name, default, meaning.")
    parser.add_argument("--markdown", action="store_true", help="as the README's table")
    if parser.parse_args().markdown:
        print(markdown_table())
    else:
        print("\n".join(f"{name} = {default}\n    {text}" for name, default, text in describe()))
