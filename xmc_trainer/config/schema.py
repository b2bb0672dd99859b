"""The configuration: typed sections, one YAML a data set, `key=value` overrides, and every check that needs no data.

The vocabulary is Spartex's (NeurIPS 2024): a complete configuration file of that system loads unchanged. The tree is
built once, by `load_config`, and read by builders only; the head, its kernels and the data code take plain arguments.

Checks live in `__post_init__`: they run when the objects are made, before any work, and each message names the field to
change. Every number has a domain beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from xmc_trainer.config.fields import (
    REQUIRED,
    Section,
    option,
)
from xmc_trainer.errors import UserError, shown
from xmc_trainer.schedules import SCHEDULES

# Counts of steps, labels and texts; of epochs; of texts in a batch; sizes of layers; rates, which float32 must hold.
_COUNT, _EPOCHS, _BATCH, _WIDTH, _RATE = "[1, 2147483647]", "[1, 100000]", "[1, 1048576]", "[1, 65536]", "[0, 1e38]"


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={shown(repr(value))}: choose one of {', '.join(allowed)}")


def _check_folder(name: str, text: str | None) -> None:
    try:
        Path(text or "").expanduser()
    except RuntimeError:
        raise UserError(f"{name}={shown(text)}: nobody here has a home of that name; write the whole path") from None


def _check_name(name: str, text: str, taken: re.Pattern[str] | None = None) -> None:
    """UserError unless a folder can be made under that name, and a run does not use it otherwise (`taken`)."""
    used = taken is not None and taken.fullmatch(text)
    if "/" in text or text.startswith(".") or used:
        other = ", and none that a run uses otherwise, such as model, checkpoint or config.yaml" if used else ""
        raise UserError(
            f"{name}={shown(repr(text))}: must be a plain name that does not begin with a dot{other}; it becomes a folder"
        )
    if len(text.encode()) > 200:
        raise UserError(f"{name}={shown(repr(text))}: at most 200 bytes, file systems take no longer names")


@dataclass
class EnvironmentConfig(Section, prefix="environment."):
    running_env: str = option("guest", "key of `environment.env2path` that stands in for a missing `dataset_path`")
    env2path: dict[str, str] = option({"guest": "./data"}, "root folder of the data sets on each machine of yours")
    device: str = option("auto", "auto, cuda or cpu; auto takes the GPU if there is one")
    cuda_device_id: int = option(0, "GPU of a run without a launcher; launchers give each process its own", "[0, 1023]")
    timeout_minutes: float = option(
        10.0, "end the job when one of its processes has given no sign of life for this long", "[0.05, 1440]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("environment.device", self.device, ("auto", "cuda", "cpu"))
        for machine, folder in self.env2path.items():
            _check_folder(f"environment.env2path.{shown(machine)}", folder)

    @property
    def timeout(self) -> timedelta:
        return timedelta(minutes=self.timeout_minutes)

    def device_name(self) -> str:
        """cpu or cuda:N, of a single process. UserError where there is no such GPU."""
        import torch  # takes seconds to import: settings that are wrong do not wait for it

        on_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        if on_gpu and self.cuda_device_id >= torch.cuda.device_count():
            number, remedy = torch.cuda.device_count(), "set environment.cuda_device_id, or environment.device=cpu"
            raise UserError(
                f"environment.cuda_device_id={self.cuda_device_id}: there are {number} usable GPUs, numbered from 0; {remedy}"
            )
        return f"cuda:{self.cuda_device_id}" if on_gpu else "cpu"


@dataclass
class DataConfig(Section, prefix="data."):
    dataset: str = option(REQUIRED, "name of the data set; keys the shipped YAML files")
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
    test_split: str = option(
        "test", "raw layout: the files to evaluate on, such as dev for dev_raw_texts.txt, dev_labels.txt"
    )
    augment_label_data: bool = option(
        False, "add each label's text as a training instance of that label (LF data, or raw with label_text_file)"
    )
    use_filter_eval: bool = option(
        False, "leave the pairs of raw_text/filter_labels_test.txt out of the ranking (LF data)"
    )
    num_labels: int | None = option(
        None, "number of labels; default: what the data say; a contradiction is refused", _COUNT
    )
    max_len: int = option(128, "longest text, in tokens, special tokens included; the rest is cut off", "[3, 1000000]")
    num_workers: int = option(2, "data loader processes a rank", "[0, 1024]")
    batch_size: int = option(
        64,
        "texts over all ranks together; an optimizer step trains on batch_size x training.optimization.grad_accum_step of them",
        _BATCH,
    )
    micro_batches: str = option(
        "auto",
        "into how many equal parts a step's texts are cut, one after the other, to save memory; every cut trains the same. auto: as "
        "few as fit the GPU's memory; without a GPU grad_accum_step",
    )
    test_batch_size: int = option(256, "texts an evaluation batch over all ranks together", _BATCH)
    train_sample: int | None = option(
        None,
        "train on this many texts, drawn by `training.seed` (from label texts, too, with augment_label_data); every label stays",
        _COUNT,
    )
    length_grouped: bool = option(True, "batches of texts of similar length, in random order: less padding")
    cache_dir: str = option("~/.cache/xmc_trainer", "where tokenised data sets are kept, by content")

    @property
    def evaluated_split(self) -> str:
        """What the test set is called in the data."""
        return self.test_split if self.hf_source is None else self.hf_test_split

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_folder("data.cache_dir", self.cache_dir)
        if self.micro_batches != "auto" and not (
            re.fullmatch("[0-9]{1,7}", self.micro_batches) and int(self.micro_batches)
        ):
            raise UserError(f"data.micro_batches={shown(repr(self.micro_batches))}: must be auto, or a number of parts")
        if self.is_lf_data and self.hf_source:
            raise UserError("data.hf_source: clear it or set data.is_lf_data=false; a run reads one source")
        if self.label_text_file and (self.is_lf_data or self.hf_source):
            raise UserError(
                "data.label_text_file: of the raw layout only; label-feature data bring their labels' texts"
            )
        if self.use_filter_eval and not self.is_lf_data:
            raise UserError("data.use_filter_eval=true: needs label-feature data (data.is_lf_data=true)")
        if self.augment_label_data and not (self.is_lf_data or self.label_text_file):
            raise UserError(
                "data.augment_label_data=true: needs the labels' texts: data.is_lf_data=true or data.label_text_file"
            )
        if self.test_split != "test" and (self.is_lf_data or self.hf_source):
            instead = (
                "set data.hf_test_split"
                if self.hf_source
                else "label-feature data have one test set, raw_text/tst.json in data.folder"
            )
            raise UserError(f"data.test_split: of the raw layout only; {instead}")


@dataclass
class EncoderConfig(Section, prefix="model.encoder."):
    encoder_model: str = option("bert-base-uncased", "Hugging Face model: hub id or folder")
    encoder_tokenizer: str = option("${model.encoder.encoder_model}", "Hugging Face tokenizer: hub id or folder")
    trust_remote_code: bool = option(
        False, "run the Python code that encoder_model or encoder_tokenizer brings; a saved model's is never run"
    )
    encoder_ftr_dim: int | None = option(None, "hidden size of the encoder; checked against the model", _WIDTH)
    pool_mode: str = option("last_hidden_avg", "last_hidden_avg, or last_nhidden_conlast (first token, last n layers)")
    feature_layers: int = option(1, "n of last_nhidden_conlast", "[1, 1000]")
    embed_dropout: float = option(0.3, "dropout on the pooled embedding", "[0, 1)")
    use_torch_compile: str = option(
        "auto",
        "compile the encoder (torch.compile; seconds at the start): true, false, or auto: on a GPU, but not under ZeRO 3, and only if it can be",
    )
    use_ngame_encoder_weights: bool = option(False, "start the encoder from the weights in ngame_checkpoint")
    ngame_checkpoint: str | None = option(None, "state dict of an encoder: a file of torch.save, or .safetensors")
    ngame_key_prefix: str = option(
        "",
        "the encoder's entries of that file start with this, which is stripped; one that the encoder lacks is refused, but "
        "poolers",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.use_torch_compile = self.use_torch_compile.lower()  # YAML's truth values come as True and False, too
        _one_of("model.encoder.use_torch_compile", self.use_torch_compile, ("auto", "true", "false"))
        _one_of("model.encoder.pool_mode", self.pool_mode, ("last_hidden_avg", "last_nhidden_conlast"))
        if self.pool_mode == "last_hidden_avg" and self.feature_layers != 1:
            raise UserError("model.encoder.feature_layers: must be 1 with pool_mode=last_hidden_avg")
        if self.use_ngame_encoder_weights and not self.ngame_checkpoint:
            raise UserError(
                "model.encoder.use_ngame_encoder_weights=true: name the file in model.encoder.ngame_checkpoint"
            )


@dataclass
class PenultimateConfig(Section, prefix="model.penultimate."):
    use_penultimate_layer: bool = option(False, "a linear layer between encoder and head, with its own learning rate")
    penultimate_size: int = option(4096, "its width: the d that the head reads", _WIDTH)
    penultimate_activation: str = option("relu", "relu, gelu, tanh or none")

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(
            "model.penultimate.penultimate_activation", self.penultimate_activation, ("relu", "gelu", "tanh", "none")
        )


@dataclass
class FFIConfig(Section, prefix="model.ffi."):
    use_sparse_layer: bool = option(
        True,
        "fixed fan-in head; false: dense head, for which fan_in, index_init, pruning, growth and rewiring mean nothing",
    )
    fan_in: int = option(128, "features that a label reads", _WIDTH)
    group_size: int = option(1, "consecutive labels that share one index row", _BATCH)
    semantic_groups: bool = option(
        False,
        "put the labels in the order of the cluster file (auxiliary.group_y_group): a group's labels are neighbours",
    )
    head_ratio: float = option(
        0.0, "share of the labels, the most frequent ones, that read head_fan_in features; the others fan_in", "[0, 1)"
    )
    head_fan_in: int | None = option(None, "features that each of these labels reads; default: all", _WIDTH)
    weight_dtype: str = option(
        "float32", "head weights and, but for adamw_8bit, optimizer state: float32, or bfloat16 (stochastic rounding)"
    )
    bias_init: str = option(
        "prior",
        "prior: the best constant for the share of positives in the data; frequency: the same of each label; or zero",
    )
    index_init: str = option(
        "random",
        "first features of a label: random; informed: those on which its training texts stand out most; or discriminant: "
        "those that tell them from the other texts best, the features' correlations considered",
    )
    discriminant_ridge: float = option(
        0.5,
        "of discriminant: what the correlations are shrunk by, 0 to 1; 1: not considered, as informed",
        "(0, 1]",
    )
    weight_init: str = option(
        "random", "first weights: random, zero, or centroid: along the mean of the label's training texts"
    )
    centroid_scale: float = option(
        0.5, "length of the weights of weight_init=centroid, for features of deviation 1", "(0, 1000]"
    )
    logit_adjustment: float = option(
        0.0,
        "taken off a label's score: this times log(its training texts / an average label's): rare labels are found more often; "
        "what it does to P@1 xmc-trainer adjust says, on a dev split",
        "[0, 100]",
    )
    backend: str = option(
        "auto",
        "auto, triton (GPU), reference (plain torch, CPU and GPU) or torch_sparse (PyG's); auto: triton where it runs",
    )
    tile_labels: int | None = option(
        None,
        "labels a tile of the backends without triton: bounds its working memory; default 4096 on a CPU, 65536 on a GPU",
        _COUNT,
    )
    prune_mode: str = option("threshold", "threshold (|w| below it) or fraction (the smallest share of each row)")
    rewire_threshold: float = option(0.01, "threshold of prune_mode=threshold", _RATE)
    rewire_fraction: float = option(0.15, "share of prune_mode=fraction", "[0, 1]")
    rewire_end_threshold: float = option(1e-4, "where the scheduled threshold ends", _RATE)
    growth_mode: str = option(
        "random",
        "random: uniform over the features that the row does not read; gradient: those of the largest gradient",
    )
    growth_batches: int = option(
        16, "of growth_mode=gradient: latest steps over which the gradient is summed", "[1, 10000]"
    )
    growth_init_mode: str = option("zero", "grown weights start at zero, or at random like the first ones")
    input_features: int | None = option(None, "d; checked against the encoder or the penultimate layer", _WIDTH)
    output_features: int | None = option(None, "number of labels; checked against the data", _COUNT)
    rewire_interval: int = option(1000, "optimizer steps between two rewirings; 0: never", "[0, 2147483647]")
    use_rewire_scheduling: bool = option(True, "cosine decay: threshold to rewire_end_threshold, fraction to 0")
    rewire_end_epoch: float = option(0.66, "share of the training after which the connectivity is frozen", "[0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_ratio and not self.use_sparse_layer:
            raise UserError(
                "model.ffi.head_ratio: without meaning for a dense head; set use_sparse_layer=true or head_ratio=0"
            )
        if self.head_fan_in is not None and not self.head_ratio:
            raise UserError(
                f"model.ffi.head_fan_in={self.head_fan_in}: of the labels of model.ffi.head_ratio, which is 0; set that too"
            )
        if self.group_size > 1 and not self.use_sparse_layer:
            raise UserError(
                f"model.ffi.group_size={self.group_size}: a dense head has no index to share; set it to 1, or "
                "use_sparse_layer=true"
            )
        _one_of("model.ffi.weight_dtype", self.weight_dtype, ("float32", "bfloat16"))
        _one_of("model.ffi.bias_init", self.bias_init, ("prior", "frequency", "zero"))
        _one_of("model.ffi.index_init", self.index_init, ("random", "informed", "discriminant"))
        _one_of("model.ffi.weight_init", self.weight_init, ("random", "zero", "centroid"))
        _one_of("model.ffi.backend", self.backend, ("auto", "triton", "reference", "torch_sparse"))
        _one_of("model.ffi.prune_mode", self.prune_mode, ("threshold", "fraction"))
        _one_of("model.ffi.growth_mode", self.growth_mode, ("random", "gradient"))
        _one_of("model.ffi.growth_init_mode", self.growth_init_mode, ("zero", "random"))
        # What the shipped files and Spartex's never say together: whoever says it means something by it.
        if self.use_sparse_layer and self.growth_mode == "gradient" and self.rewire_interval == 0:
            raise UserError(
                "model.ffi.growth_mode=gradient: nothing grows with model.ffi.rewire_interval=0; set that too"
            )
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
class AuxiliaryConfig(Section, prefix="model.auxiliary."):
    use_meta_branch: bool = option(False, "also predict the labels' clusters, by a dense head of their own, at first")
    group_y_group: int = option(
        0, "n of the data folder's cluster file label_group<n>.safetensors (xmc-trainer clusters)", "[0, 2147483647]"
    )
    meta_cutoff_epoch: int = option(
        20, "epoch at which the weight of the meta branch has decayed to 0, by a cosine", _EPOCHS
    )
    auxloss_scaling: float = option(
        0.4, "first weight of the meta branch's loss; the labels' loss has the rest of 1", "[0, 1)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()


@dataclass
class ModelConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    penultimate: PenultimateConfig = field(default_factory=PenultimateConfig)
    ffi: FFIConfig = field(default_factory=FFIConfig)
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)


@dataclass
class AmpConfig(Section, prefix="training.amp."):
    enabled: bool = option(False, "mixed precision for the encoder")
    dtype: str = option("float16", "float16 or bfloat16")

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("training.amp.dtype", self.dtype, ("float16", "bfloat16"))

    @property
    def mixed_precision(self) -> str:
        """accelerate's name: "no", "fp16" or "bf16"."""
        return {"float16": "fp16", "bfloat16": "bf16"}[self.dtype] if self.enabled else "no"


@dataclass
class OptimizationConfig(Section, prefix="training.optimization."):
    loss_fn: str = option("bce", "bce or squared_hinge, summed over labels")
    loss_reduction: str = option("auto", "how texts are combined: sum, mean, or auto (bce: sum, squared_hinge: mean)")
    encoder_optimizer: str = option("adamw", "adamw, adam, or sgd (with momentum 0.9)")
    xmc_optimizer: str = option(
        "sgd",
        "optimizer of the head: sgd (with xmc_momentum), adamw, adamw_8bit (states of a byte; meant for weight_dtype=bfloat16), or rowwise_rmsprop (one float of state a label)",
    )
    xmc_momentum: float = option(
        0.9, "momentum of xmc_optimizer=sgd; 0 is plain SGD, without optimizer state", "[0, 1)"
    )
    epochs: int = option(10, "passes over the training set", _EPOCHS)
    max_steps: int | None = option(None, "end after this many optimizer steps, if that comes before `epochs`", _COUNT)
    dense_epochs: int = option(
        0,
        "epochs with a dense head, which then keeps each label's fan_in largest weights; a dense head stays one",
        "[0, 100000]",
    )
    grad_accum_step: int = option(
        1, "batches an optimizer step; data.micro_batches says how they are cut into micro-batches", _BATCH
    )
    encoder_lr: float = option(2e-5, "peak learning rate of the encoder", _RATE)
    penultimate_lr: float = option(2e-4, "peak learning rate of the penultimate layer", _RATE)
    meta_lr: float = option(
        5e-4, "peak learning rate of the meta branch's head, which AdamW trains on the encoder's schedule", _RATE
    )
    lr: float = option(0.05, "peak learning rate of the head", _RATE)
    wd_encoder: float = option(0.01, "weight decay of encoder and penultimate layer (not on biases and norms)", _RATE)
    wd: float = option(1e-4, "weight decay of the head's weights", _RATE)
    lr_scheduler: str = option(
        "CosineScheduleWithWarmup",
        "of encoder and penultimate layer: CosineScheduleWithWarmup, MultiStepLR or ReduceLROnPlateau",
    )
    lr_scheduler_xmc: str = option("CosineScheduleWithWarmup", "of the head: one of the same")
    warmup_steps: int = option(500, "optimizer steps of linear warm-up, of every schedule", "[0, 2147483647]")
    lr_milestones: list[int] = option(
        [], "of MultiStepLR: epochs after which the rate is multiplied by lr_gamma", _EPOCHS
    )
    lr_gamma: float = option(0.1, "factor of MultiStepLR and ReduceLROnPlateau", "[0, 1]")
    lr_patience: int = option(
        5, "of ReduceLROnPlateau: test evaluations without a better P@1 before the rate falls", "[0, 100000]"
    )
    training_steps: int = option(1, "computed at run time, as in the seed; leave it at 1 (see max_steps)", _COUNT)
    max_grad_norm: float = option(0.0, "clip the encoder's gradient to this norm; 0: no clipping", _RATE)

    def __post_init__(self) -> None:
        super().__post_init__()
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
class EvaluationConfig(Section, prefix="training.evaluation."):
    train_evaluate: bool = option(False, "evaluate on (a test-sized part of) the training set too")
    train_evaluate_every: int = option(10, "epochs between two evaluations on the training set", _EPOCHS)
    test_evaluate_every: int = option(
        1,
        "epochs between two evaluations on the test set; the last epoch is always evaluated",
        _EPOCHS,
    )
    A: float = option(0.55, "propensity constant", "[0, 10]")
    B: float = option(1.5, "propensity constant", "[0.001, 1000]")
    eval_psp: bool = option(True, "report PSP@k and PSnDCG@k")
    early_stop_patience: int = option(
        0,
        "end the training after this many test evaluations without a better early_stop_metric; 0: never",
        "[0, 100000]",
    )
    early_stop_delta: float = option(
        5e-5, "what counts as better: more than this above the best (metrics are 0 to 1)", "[0, 10]"
    )
    early_stop_metric: str = option("P@3", "P@1, P@3, P@5, or another metric of the test evaluation")

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("P", "nDCG", "R", "PSP", "PSnDCG") if self.eval_psp else ("P", "nDCG", "R")
        names = tuple(f"{kind}@{k}" for kind in kinds for k in (1, 3, 5))
        _one_of("training.evaluation.early_stop_metric", self.early_stop_metric, names)


@dataclass
class VerboseConfig(Section, prefix="training.verbose."):
    show_iter: bool = option(False, "print the loss every print_iter steps, beside the progress bar")
    print_iter: int = option(2000, "optimizer steps between two printed lines", _COUNT)
    use_wandb: bool = option(False, "also log to Weights & Biases")
    wandb_runname: str = option("none", "name of the run there")
    logging: bool = option(True, "write log.jsonl: a line for every optimizer step and evaluation")
    log_fname: str = option("run", "name of the run: its folder under `output_dir`")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("training.verbose.log_fname", self.log_fname)


# What a run's folder holds beside training.checkpoint_file, and what stands there while folders are written and removed.
_RUN_FILES = re.compile(
    r"\..*|model|(checkpoint|replaced)(-\d+)?|config\.yaml|log\.jsonl|figures\.json|wandb|.*\.(partial|old|removed)",
    re.DOTALL,
)


@dataclass
class TrainingConfig(Section, prefix="training."):
    seed: int = option(42, "of everything random", "[0, 4294967295]")
    amp: AmpConfig = field(default_factory=AmpConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    verbose: VerboseConfig = field(default_factory=VerboseConfig)
    use_checkpoint: bool = option(
        False, "also keep the model with the best test P@1, in <run folder>/<checkpoint_file>"
    )
    checkpoint_file: str = option("best", "folder name of that model")
    best_p1: float = option(0.0, "P@1 (0 to 1) that a model must exceed to be kept", "[0, 1]")
    checkpoint_interval: int = option(
        1000,
        "optimizer steps between two checkpoints of the training, which are removed at its end; 0: not by steps",
        "[0, 2147483647]",
    )
    checkpoint_minutes: float = option(
        10.0,
        "minutes between two checkpoints, whichever comes first; 0: not by time. With both at 0 a signal leaves none either",
        "[0, 525600]",
    )
    checkpoints_kept: int = option(
        1,
        "how many of the last checkpoints are kept until the training ends; the best model is kept apart",
        "[1, 1000]",
    )
    resume: bool = option(False, "go on from the run's checkpoint; from the beginning where there is none")
    overwrite: bool = option(
        False,
        "replace the earlier run of that name, which otherwise is refused; it is removed once this one is finished",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("training.checkpoint_file", self.checkpoint_file, _RUN_FILES)


@dataclass
class Config(Section):
    dataset: str = option(REQUIRED, "name of a shipped data set, or a YAML file of yours")
    dataset_path: str | None = option(None, "folder that holds the data sets' folders")
    log_fname: str | None = option(None, "short for training.verbose.log_fname")
    output_dir: str = option("./outputs", "where run folders are made")
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_folder("dataset_path", self.dataset_path)
        _check_folder("output_dir", self.output_dir)
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
            raise UserError(
                "training.optimization.dense_epochs: not together with model.ffi.head_ratio; set one of them to 0"
            )
        if ffi.semantic_groups and not (ffi.use_sparse_layer and ffi.group_size > 1):
            raise UserError(
                "model.ffi.semantic_groups=true: needs labels that share an index row; set model.ffi.group_size"
            )
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
