"""The settings of a run: typed sections with help texts, domains and every check that needs no data.

The names are those of Spartex (NeurIPS 2024), whose configuration files load unchanged. `load_config` builds the tree
once, and only builders read it; the head, its kernels and the data code take plain arguments.

Checks run in `__post_init__`, before any work. Their messages name the setting to change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from xmc_trainer.config.fields import REQUIRED, Section, check_choice, option
from xmc_trainer.errors import UserError, shown
from xmc_trainer.schedules import SCHEDULES

# Domains: counts of steps, labels and texts; epochs; texts per batch; layer sizes; rates that fit in float32.
_COUNT, _EPOCHS, _BATCH, _WIDTH, _RATE = "[1, 2147483647]", "[1, 100000]", "[1, 1048576]", "[1, 65536]", "[0, 1e38]"


# Losses of `xmc_trainer.head.losses` -> meaning of training.optimization.loss_reduction=auto, which Spartex's published
# learning rates assume.
LOSS_REDUCTIONS = {"bce": "sum", "squared_hinge": "mean"}


def _check_folder(name: str, text: str | None) -> None:
    try:
        Path(text or "").expanduser()
    except RuntimeError:
        raise UserError(f"{name}={shown(text)}: has no home folder on this machine; write the full path") from None


def _check_name(name: str, text: str, reserved: re.Pattern[str] | None = None) -> None:
    """Raise UserError unless `text` can name a folder in a run's folder.

    Args: reserved: matches the names of a run's own files.
    """
    is_reserved = reserved is not None and reserved.fullmatch(text)
    if "/" in text or text.startswith(".") or is_reserved:
        other = ", and not one that a run reserves, such as model, checkpoint or config.yaml" if is_reserved else ""
        raise UserError(
            f"{name}={shown(repr(text))}: must be a folder name without a slash or a leading dot{other}; choose another"
        )
    if len(text.encode()) > 200:
        raise UserError(f"{name}={shown(repr(text))}: is longer than 200 bytes, too long for a folder name; shorten it")


@dataclass
class EnvironmentConfig(Section, prefix="environment."):
    running_env: str = option("guest", "Key of `environment.env2path` to use if `dataset_path` is not set.")
    env2path: dict[str, str] = option({"guest": "./data"}, "Root folder of the data sets on each of your machines.")
    device: str = option("auto", "auto, cuda or cpu. auto uses a GPU if there is one.", choices=("auto", "cuda", "cpu"))
    cuda_device_id: int = option(
        0, "GPU of a run without a launcher; launchers assign one to each process.", "[0, 1023]"
    )
    timeout_minutes: float = option(
        10.0, "End the job when one of its processes has been silent for this long.", "[0.05, 1440]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for machine, folder in self.env2path.items():
            _check_folder(f"environment.env2path.{shown(machine)}", folder)

    @property
    def timeout(self) -> timedelta:
        return timedelta(minutes=self.timeout_minutes)

    def device_name(self) -> str:
        """Return the device of a single process, "cpu" or "cuda:N". Raises UserError if there is no such GPU."""
        import torch  # slow; errors in settings must not wait for it

        on_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        if on_gpu and self.cuda_device_id >= torch.cuda.device_count():
            number, remedy = torch.cuda.device_count(), "set environment.cuda_device_id, or environment.device=cpu"
            raise UserError(
                f"environment.cuda_device_id={self.cuda_device_id}: there are {number} usable GPUs, "
                f"numbered from 0; {remedy}"
            )
        return f"cuda:{self.cuda_device_id}" if on_gpu else "cpu"


@dataclass
class DataConfig(Section, prefix="data."):
    dataset: str = option(REQUIRED, "Name of the data set.")
    folder: str | None = option(
        None, "Data set folder below `dataset_path`; default: the shipped one, or `data.dataset`."
    )
    is_lf_data: bool = option(False, "Read the label-feature layout (raw_text/trn.json ...) instead of raw text files.")
    source: str | None = option(
        None,
        "Your data, recognised by what they are: a .csv, .tsv, .jsonl or .parquet file, a folder with such a file for each "
        "split, a folder in a layout of the Extreme Classification Repository, a folder of save_to_disk, or a Hugging Face hub id.",
    )
    train_split: str = option("train", "Rows of `data.source`: split, or file name without extension, to train on.")
    test_split: str = option(
        "test",
        "Split to evaluate on: dev reads dev_raw_texts.txt and dev_labels.txt of the raw layout, the split dev of rows, or what "
        "`data.dev_share` holds out.",
    )
    text_column: str = option("text", "Column of `data.source` that holds the text.")
    label_column: str = option("labels", "Column of `data.source` that holds the list of labels (names or ids).")
    label_separator: str = option(";", "Separator of the labels in a cell of a .csv or .tsv file.")
    test_share: float | None = option(
        None,
        "Hold out this share of the training split's texts as test set; default: 0.1 if data.source is all in one split, else "
        "`data.test_split` is read.",
        "(0, 1)",
    )
    dev_share: float | None = option(
        None,
        "Hold out this share of the training split's texts as dev set, which data.test_split=dev evaluates on.",
        "(0, 1)",
    )
    group_column: str | None = option(
        None, "Column of `data.source` whose equal values stay together where texts are held out, such as a customer."
    )
    stratify: bool = option(
        False,
        "Hold texts out by iterative stratification, so that each label has its share of texts in every part; default: by a hash "
        "of the text.",
    )
    label_text_file: str | None = option(
        None, "Raw layout: file of `label<TAB>text` lines in the data folder; makes predictions readable."
    )
    augment_label_data: bool = option(
        False,
        "Also train on each label's text, with that label as its target (LF data, or raw data with label_text_file).",
    )
    use_filter_eval: bool = option(
        False, "Exclude the pairs of raw_text/filter_labels_test.txt from the ranking (LF data)."
    )
    num_labels: int | None = option(
        None, "Number of labels; default: counted in the data. A different count in the data is an error.", _COUNT
    )
    max_len: int = option(
        128, "Maximum text length in tokens, special tokens included; longer texts are truncated.", "[3, 1000000]"
    )
    num_workers: int = option(2, "Data loader processes per rank.", "[0, 1024]")
    batch_size: int = option(
        64,
        "Texts per batch over all ranks; an optimizer step trains on batch_size x "
        "training.optimization.grad_accum_step texts.",
        _BATCH,
    )
    micro_batches: str = option(
        "auto",
        "Number of equal parts that a step is processed in, one at a time, to save memory; the result does "
        "not change. auto: the fewest that fit the GPU's memory, or grad_accum_step without a GPU.",
    )
    test_batch_size: int = option(256, "Texts per evaluation batch, over all ranks.", _BATCH)
    train_sample: int | None = option(
        None,
        "Train on this many texts, drawn with `training.seed` (with augment_label_data from the "
        "label texts too). All labels are kept.",
        _COUNT,
    )
    length_grouped: bool = option(True, "Batch texts of similar length, in random order, to reduce padding.")
    cache_dir: str = option("~/.cache/xmc_trainer", "Folder of the tokenised data sets, which are found by content.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_folder("data.cache_dir", self.cache_dir)
        if self.micro_batches != "auto" and not (
            re.fullmatch("[0-9]{1,7}", self.micro_batches) and int(self.micro_batches)
        ):
            raise UserError(
                f"data.micro_batches={shown(repr(self.micro_batches))}: must be auto or a whole number above 0"
            )
        held_out = {"test_share": self.test_share, "dev_share": self.dev_share}
        for name, value in held_out.items():
            if value is not None and not self.source:
                raise UserError(f"data.{name}: applies to data.source only; remove it")
        if sum(value or 0.0 for value in held_out.values()) >= 1:
            raise UserError("data.dev_share: leaves no texts to train on beside data.test_share; lower one of them")
        if self.test_share is not None and self.test_split not in ("test", "dev"):
            raise UserError("data.test_split: is not read if data.test_share is set; remove one of them")
        if self.group_column is not None and not self.source:
            raise UserError("data.group_column: applies to data.source only; remove it")
        if self.label_text_file and self.is_lf_data:
            raise UserError(
                "data.label_text_file: applies to the raw layout only; remove it (label-feature data contain texts)"
            )
        if not self.source:
            if self.use_filter_eval and not self.is_lf_data:
                raise UserError("data.use_filter_eval=true: needs label-feature data; set data.is_lf_data=true")
            if self.augment_label_data and not (self.is_lf_data or self.label_text_file):
                raise UserError(
                    "data.augment_label_data=true: needs label texts; set data.is_lf_data=true or data.label_text_file"
                )
            if self.test_split != "test" and self.is_lf_data:
                raise UserError(
                    "data.test_split: applies to the raw layout only; label-feature data have a single test set "
                    "(raw_text/tst.json); remove it"
                )


@dataclass
class EncoderConfig(Section, prefix="model.encoder."):
    encoder_model: str = option("bert-base-uncased", "Hugging Face model: hub id or folder.")
    encoder_tokenizer: str = option("${model.encoder.encoder_model}", "Hugging Face tokenizer: hub id or folder.")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with encoder_model or encoder_tokenizer. Code in a saved model is never run."
    )
    encoder_ftr_dim: int | None = option(None, "Hidden size of the encoder; checked against the model.", _WIDTH)
    pool_mode: str = option(
        "last_hidden_avg",
        "last_hidden_avg (mean over tokens), last_nhidden_conlast (first token of the last feature_layers layers; not for "
        "decoders), or last_token (last token of the last layer; for decoders).",
        choices=("last_hidden_avg", "last_nhidden_conlast", "last_token"),
    )
    feature_layers: int = option(1, "Number of layers that pool_mode=last_nhidden_conlast concatenates.", "[1, 1000]")
    bidirectional: bool = option(
        False, "Let each token of a decoder such as Qwen or Llama see the tokens after it, too, as in an encoder."
    )
    instruction: str = option(
        "", "Text put before every text, in training and in prediction. Its tokens count towards data.max_len."
    )
    embed_dropout: float = option(0.3, "Dropout on the pooled embedding.", "[0, 1)")
    attn_implementation: str = option(
        "auto",
        "How transformers computes attention while training: eager, sdpa, flash_attention_2 (needs a GPU, training.amp and the "
        "package flash-attn), or auto, which is transformers' choice on a GPU, and eager on a CPU.",
        choices=("auto", "eager", "sdpa", "flash_attention_2"),
    )
    use_torch_compile: str = option(
        "auto",
        "Compile the encoder with torch.compile, which delays the start by seconds: true, false or auto. "
        "auto compiles on a GPU, except under ZeRO 3, and trains uncompiled if compilation fails.",
        choices=("auto", "true", "false"),
    )
    gradient_checkpointing: bool = option(
        False,
        "Keep only each layer's input for the backward pass, which computes the layer again: less memory, a third more "
        "computation in the encoder.",
    )
    lora_rank: int = option(
        0,
        "Train adapters of this rank beside the encoder's frozen weights (LoRA; needs the package peft); 0: train all weights.",
        "[0, 4096]",
    )
    lora_alpha: int = option(16, "Adapters' products are multiplied by lora_alpha / lora_rank.", "[1, 1000000]")
    lora_dropout: float = option(0.0, "Dropout on the adapters' input.", "[0, 1)")
    lora_target: str = option(
        "all-linear",
        "Layers with adapters: all-linear, or ends of their names, separated by commas, such as q_proj,v_proj.",
    )
    use_ngame_encoder_weights: bool = option(False, "Initialise the encoder from ngame_checkpoint.")
    ngame_checkpoint: str | None = option(None, "Encoder state dict: a torch.save file, or .safetensors.")
    ngame_key_prefix: str = option(
        "",
        "Load only the entries of ngame_checkpoint with this prefix, which is removed. An entry unknown to "
        "the encoder is an error, unless it belongs to a pooler.",
    )

    def __post_init__(self) -> None:
        self.use_torch_compile = self.use_torch_compile.lower()  # YAML writes booleans as True and False, too
        super().__post_init__()
        if self.pool_mode != "last_nhidden_conlast" and self.feature_layers != 1:
            raise UserError(f"model.encoder.feature_layers: must be 1 with pool_mode={self.pool_mode}")
        for name, default in (("lora_alpha", 16), ("lora_dropout", 0.0), ("lora_target", "all-linear")):
            if not self.lora_rank and getattr(self, name) != default:
                raise UserError(
                    f"model.encoder.{name}={shown(getattr(self, name))}: has no effect with model.encoder.lora_rank=0; set that too"
                )
        if self.use_ngame_encoder_weights and not self.ngame_checkpoint:
            raise UserError(
                "model.encoder.use_ngame_encoder_weights=true: needs a file; set model.encoder.ngame_checkpoint"
            )


@dataclass
class PenultimateConfig(Section, prefix="model.penultimate."):
    use_penultimate_layer: bool = option(
        False, "Insert a linear layer, with its own learning rate, between encoder and head."
    )
    penultimate_size: int = option(4096, "Width of the penultimate layer, and so of the head's input.", _WIDTH)
    penultimate_activation: str = option("relu", "relu, gelu, tanh or none.", choices=("relu", "gelu", "tanh", "none"))


@dataclass
class FFIConfig(Section, prefix="model.ffi."):
    use_sparse_layer: bool = option(
        True,
        "true: fixed fan-in head. false: dense head, which ignores fan_in, index_init, pruning, growth and rewiring.",
    )
    fan_in: int = option(128, "Features that each label reads.", _WIDTH)
    group_size: int = option(1, "Number of consecutive labels that share an index row.", _BATCH)
    semantic_groups: bool = option(
        False,
        "Order the labels by the cluster file (auxiliary.group_y_group), so that groups hold similar labels.",
    )
    head_ratio: float = option(
        0.0,
        "Fraction of the labels, the most frequent ones, that read head_fan_in features; the others read fan_in.",
        "[0, 1)",
    )
    head_fan_in: int | None = option(None, "Features that each of the head_ratio labels reads; default: all.", _WIDTH)
    weight_dtype: str = option(
        "float32",
        "Dtype of the head's weights and optimizer state (except that of adamw_8bit): float32, or bfloat16 with "
        "stochastic rounding.",
        choices=("float32", "bfloat16"),
    )
    bias_init: str = option(
        "prior",
        "prior: the constant logit with the lowest loss at the mean share of positives. frequency: the same for "
        "each label's own share. zero: 0.",
        choices=("prior", "frequency", "zero"),
    )
    index_init: str = option(
        "random",
        "Initial features of a label. random: any. informed: those in which its training texts deviate most. "
        "discriminant: those that best separate its texts from the others, corrected for correlations "
        "between features.",
        choices=("random", "informed", "discriminant"),
    )
    discriminant_ridge: float = option(
        0.5,
        "Shrinkage of the feature correlations for index_init=discriminant; 1 ignores correlations, as informed does.",
        "(0, 1]",
    )
    weight_init: str = option(
        "random",
        "Initial weights: random, zero, or centroid (along the mean feature of the label's training texts).",
        choices=("random", "zero", "centroid"),
    )
    centroid_scale: float = option(
        0.5, "Norm of the weights for weight_init=centroid, with features scaled to unit deviation.", "(0, 1000]"
    )
    logit_adjustment: float = option(
        0.0,
        "At ranking, subtract this times log(label frequency / mean label frequency); higher values favour "
        "rare labels. Choose it on a dev split with xmc-trainer adjust.",
        "[0, 100]",
    )
    backend: str = option(
        "auto",
        "auto, triton (GPU), reference (PyTorch, CPU and GPU) or torch_sparse (PyG). auto uses triton where it runs.",
        choices=("auto", "triton", "reference", "torch_sparse"),
    )
    tile_labels: int | None = option(
        None,
        "Labels per tile of the backends without triton; limits their working memory. Default: 4096 on a "
        "CPU, 65536 on a GPU.",
        _COUNT,
    )
    prune_mode: str = option(
        "threshold",
        "threshold: prune weights with |w| below it. fraction: prune the smallest share of each row.",
        choices=("threshold", "fraction"),
    )
    rewire_threshold: float = option(0.01, "Initial threshold of prune_mode=threshold.", _RATE)
    rewire_fraction: float = option(0.15, "Initial share of prune_mode=fraction.", "[0, 1]")
    rewire_end_threshold: float = option(1e-4, "Final value of the scheduled threshold.", _RATE)
    growth_mode: str = option(
        "random",
        "random: draw new features uniformly from those that the row does not read. gradient: take those "
        "with the largest gradient.",
        choices=("random", "gradient"),
    )
    growth_batches: int = option(
        16, "Number of latest steps over which growth_mode=gradient sums the gradient.", "[1, 10000]"
    )
    growth_init_mode: str = option(
        "zero", "Value of grown weights: zero, or random like the initial ones.", choices=("zero", "random")
    )
    input_features: int | None = option(
        None, "Width of the head's input; checked against the encoder or the penultimate layer.", _WIDTH
    )
    output_features: int | None = option(None, "Number of labels; checked against the data.", _COUNT)
    rewire_interval: int = option(1000, "Optimizer steps between rewirings; 0 disables rewiring.", "[0, 2147483647]")
    use_rewire_scheduling: bool = option(
        True, "Decay by a cosine: the threshold to rewire_end_threshold, the fraction to 0."
    )
    rewire_end_epoch: float = option(0.66, "Fraction of the training after which rewiring stops.", "[0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_ratio and not self.use_sparse_layer:
            raise UserError(
                "model.ffi.head_ratio: has no effect on a dense head; set use_sparse_layer=true or head_ratio=0"
            )
        if self.head_fan_in is not None and not self.head_ratio:
            raise UserError(
                f"model.ffi.head_fan_in={self.head_fan_in}: has no effect with model.ffi.head_ratio=0; set that too"
            )
        if self.group_size > 1 and not self.use_sparse_layer:
            raise UserError(
                f"model.ffi.group_size={self.group_size}: a dense head has no index to share; set it to 1, or "
                "use_sparse_layer=true"
            )
        # Shipped and Spartex files never combine these, so such a setting was made on purpose and must not be ignored.
        if self.use_sparse_layer and self.growth_mode == "gradient" and self.rewire_interval == 0:
            raise UserError(
                "model.ffi.growth_mode=gradient: has no effect with model.ffi.rewire_interval=0; set that too"
            )
        for name, default, choice, needed in (
            ("discriminant_ridge", 0.5, "index_init", "discriminant"), ("centroid_scale", 0.5, "weight_init", "centroid"),
        ):  # fmt: skip
            if getattr(self, name) != default and getattr(self, choice) != needed:
                raise UserError(
                    f"model.ffi.{name}={getattr(self, name)}: has no effect without model.ffi.{choice}={needed}; set "
                    "that too"
                )

    @property
    def index_from_texts(self) -> bool:
        """Whether the initial index is computed from the training texts; always False for a dense head."""
        return self.use_sparse_layer and self.index_init != "random"


@dataclass
class AuxiliaryConfig(Section, prefix="model.auxiliary."):
    use_meta_branch: bool = option(False, "Also predict label clusters, with a dense head, early in training.")
    group_y_group: int = option(
        0,
        "Number n of the cluster file label_group<n>.safetensors in the data folder (see xmc-trainer clusters).",
        "[0, 2147483647]",
    )
    meta_cutoff_epoch: int = option(
        20, "Epoch at which the loss weight of the meta branch has decayed to 0, by a cosine.", _EPOCHS
    )
    auxloss_scaling: float = option(
        0.4, "Initial loss weight w of the meta branch; the label loss has weight 1 - w.", "[0, 1)"
    )


@dataclass
class ModelConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    penultimate: PenultimateConfig = field(default_factory=PenultimateConfig)
    ffi: FFIConfig = field(default_factory=FFIConfig)
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)


@dataclass
class AmpConfig(Section, prefix="training.amp."):
    enabled: bool = option(False, "Mixed precision for the encoder.")
    dtype: str = option("float16", "float16 or bfloat16.", choices=("float16", "bfloat16"))

    @property
    def mixed_precision(self) -> str:
        """accelerate's name of the precision: "no", "fp16" or "bf16"."""
        return {"float16": "fp16", "bfloat16": "bf16"}[self.dtype] if self.enabled else "no"


@dataclass
class OptimizationConfig(Section, prefix="training.optimization."):
    loss_fn: str = option("bce", f"{' or '.join(LOSS_REDUCTIONS)}, summed over labels.", choices=LOSS_REDUCTIONS)
    loss_reduction: str = option(
        "auto",
        "Reduction over texts: sum, mean, or auto "
        f"({', '.join(f'{reduction} for {loss}' for loss, reduction in LOSS_REDUCTIONS.items())}).",
        choices=("auto", "sum", "mean"),
    )
    encoder_optimizer: str = option(
        "adamw", "adamw, adam, or sgd (with momentum 0.9).", choices=("adamw", "adam", "sgd")
    )
    xmc_optimizer: str = option(
        "sgd",
        "Optimizer of the head: sgd (with xmc_momentum), adamw, adamw_8bit (one-byte states; meant for "
        "weight_dtype=bfloat16), or rowwise_rmsprop (one float of state per label).",
        choices=("sgd", "adamw", "adamw_8bit", "rowwise_rmsprop"),
    )
    xmc_momentum: float = option(
        0.9, "Momentum of xmc_optimizer=sgd; 0 is plain SGD without optimizer state.", "[0, 1)"
    )
    epochs: int = option(10, "Passes over the training set.", _EPOCHS)
    max_steps: int | None = option(
        None, "Stop after this many optimizer steps, if that is before the end of `epochs`.", _COUNT
    )
    dense_epochs: int = option(
        0,
        "Train this many epochs with a dense head, then keep each label's fan_in largest weights. "
        "No effect with use_sparse_layer=false.",
        "[0, 100000]",
    )
    grad_accum_step: int = option(
        1, "Batches per optimizer step; data.micro_batches splits them into micro-batches.", _BATCH
    )
    encoder_lr: float = option(2e-5, "Peak learning rate of the encoder.", _RATE)
    penultimate_lr: float = option(2e-4, "Peak learning rate of the penultimate layer.", _RATE)
    meta_lr: float = option(
        5e-4, "Peak learning rate of the meta branch's head, trained by AdamW on the encoder's schedule.", _RATE
    )
    lr: float = option(0.05, "Peak learning rate of the head.", _RATE)
    wd_encoder: float = option(0.01, "Weight decay of encoder and penultimate layer (except biases and norms).", _RATE)
    wd: float = option(1e-4, "Weight decay of the head's weights.", _RATE)
    lr_scheduler: str = option(
        "CosineScheduleWithWarmup",
        "Schedule of the encoder's and penultimate layer's rates: CosineScheduleWithWarmup, MultiStepLR or "
        "ReduceLROnPlateau.",
        choices=SCHEDULES,
    )
    lr_scheduler_xmc: str = option(
        "CosineScheduleWithWarmup", "Schedule of the head's rate; same choices as lr_scheduler.", choices=SCHEDULES
    )
    warmup_steps: int | None = option(
        None,
        "Optimizer steps of linear warm-up, for every schedule; default: a tenth of all steps, and at most 500.",
        "[0, 2147483647]",
    )
    lr_milestones: list[int] = option(
        [], "MultiStepLR: epochs after which the rate is multiplied by lr_gamma.", _EPOCHS
    )
    lr_gamma: float = option(0.1, "Factor of MultiStepLR and ReduceLROnPlateau.", "[0, 1]")
    lr_patience: int = option(
        5, "ReduceLROnPlateau: test evaluations without a better P@1 before the rate falls.", "[0, 100000]"
    )
    training_steps: int = option(1, "Computed at run time, as in Spartex; leave it at 1 (see max_steps).", _COUNT)
    max_grad_norm: float = option(0.0, "Clip the encoder's gradient to this norm; 0 disables clipping.", _RATE)

    def __post_init__(self) -> None:
        section = "training.optimization"
        if self.xmc_optimizer == "momentum":
            raise UserError(f"{section}.xmc_optimizer=momentum: write sgd, with {section}.xmc_momentum (default 0.9)")
        super().__post_init__()
        for name in ("lr_scheduler", "lr_scheduler_xmc"):
            if getattr(self, name) == "MultiStepLR" and not self.lr_milestones:
                raise UserError(f"{section}.{name}=MultiStepLR: needs epochs; list them in {section}.lr_milestones")
        if self.lr_milestones and "MultiStepLR" not in (self.lr_scheduler, self.lr_scheduler_xmc):
            raise UserError(
                f"{section}.lr_milestones: has no effect without MultiStepLR; set {section}.lr_scheduler or "
                "lr_scheduler_xmc to MultiStepLR"
            )
        if self.xmc_optimizer != "sgd" and self.xmc_momentum != 0.9:
            raise UserError(
                f"{section}.xmc_momentum={self.xmc_momentum}: has no effect without xmc_optimizer=sgd; set "
                "that, or leave this at 0.9"
            )
        if self.training_steps != 1:
            raise UserError(
                f"{section}.training_steps: is computed at run time; leave it at 1, and set max_steps to stop early"
            )

    @property
    def text_reduction(self) -> str:
        """`loss_reduction` with "auto" resolved."""
        return LOSS_REDUCTIONS[self.loss_fn] if self.loss_reduction == "auto" else self.loss_reduction


@dataclass
class EvaluationConfig(Section, prefix="training.evaluation."):
    train_evaluate: bool = option(False, "Also evaluate on the training set (on as many texts as the test set has).")
    train_evaluate_every: int = option(10, "Epochs between evaluations on the training set.", _EPOCHS)
    test_evaluate_every: int = option(
        1,
        "Epochs between evaluations on the test set; the last epoch is always evaluated.",
        _EPOCHS,
    )
    A: float = option(0.55, "Constant A of the propensity model.", "[0, 10]")
    B: float = option(1.5, "Constant B of the propensity model.", "[0.001, 1000]")
    eval_psp: bool = option(True, "Report PSP@k and PSnDCG@k.")
    early_stop_patience: int = option(
        0,
        "Stop after this many test evaluations without a better early_stop_metric; 0 disables it.",
        "[0, 100000]",
    )
    early_stop_delta: float = option(
        5e-5, "A value is better if it exceeds the best by more than this (metrics range from 0 to 1).", "[0, 10]"
    )
    early_stop_metric: str = option("P@3", "P@1, P@3, P@5, or another metric of the test evaluation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("P", "nDCG", "R", "PSP", "PSnDCG") if self.eval_psp else ("P", "nDCG", "R")
        names = tuple(f"{kind}@{k}" for kind in kinds for k in (1, 3, 5))
        check_choice("training.evaluation.early_stop_metric", self.early_stop_metric, names)


TRACKERS = ("wandb", "tensorboard", "mlflow")


@dataclass
class VerboseConfig(Section, prefix="training.verbose."):
    show_iter: bool = option(False, "Print the loss every print_iter steps, besides the progress bar.")
    print_iter: int = option(2000, "Optimizer steps between printed lines.", _COUNT)
    tracker: str = option(
        "none", "Also log to none, wandb (Weights & Biases), tensorboard or mlflow.", choices=("none", *TRACKERS)
    )
    use_wandb: bool = option(False, "Same as tracker=wandb.")
    wandb_runname: str = option("none", "Run name in Weights & Biases or MLflow; none lets them choose.")
    logging: bool = option(True, "Write log.jsonl: one line per optimizer step and evaluation.")
    log_fname: str = option("run", "Name of the run, and of its folder in `output_dir`.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("training.verbose.log_fname", self.log_fname)
        if self.use_wandb and self.tracker not in ("none", "wandb"):
            raise UserError(f"training.verbose.use_wandb=true: contradicts tracker={self.tracker}; set one of them")

    @property
    def chosen_tracker(self) -> str | None:
        """The tracker's name, one of TRACKERS."""
        return "wandb" if self.use_wandb else self.tracker if self.tracker != "none" else None


# Names in a run's folder besides training.checkpoint_file, including temporary ones during writes and removals.
_RUN_FILES = re.compile(
    r"\..*|model|(checkpoint|replaced)(-\d+)?|config\.yaml|log\.jsonl|run\.log|split\.npz|figures\.json|wandb|tensorboard|"
    r".*\.(partial|old|removed)",
    re.DOTALL,
)


@dataclass
class TrainingConfig(Section, prefix="training."):
    seed: int = option(42, "Seed of all random numbers.", "[0, 4294967295]")
    amp: AmpConfig = field(default_factory=AmpConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    verbose: VerboseConfig = field(default_factory=VerboseConfig)
    use_checkpoint: bool = option(
        False, "Also keep the model with the best test P@1, in <run folder>/<checkpoint_file>."
    )
    checkpoint_file: str = option("best", "Folder name of the best model.")
    best_p1: float = option(0.0, "P@1 (0 to 1) that the best model must exceed to be kept.", "[0, 1]")
    checkpoint_interval: int = option(
        1000,
        "Optimizer steps between training checkpoints, which are removed when the training ends; 0 disables "
        "this interval.",
        "[0, 2147483647]",
    )
    checkpoint_minutes: float = option(
        10.0,
        "Minutes between training checkpoints, if that is sooner than checkpoint_interval; 0 disables this "
        "interval. With both at 0, a signal writes no checkpoint either.",
        "[0, 525600]",
    )
    checkpoints_kept: int = option(
        1,
        "Number of latest training checkpoints to keep until the training ends; the best model is kept separately.",
        "[1, 1000]",
    )
    resume: bool = option(False, "Continue from the run's checkpoint, or start from the beginning if there is none.")
    overwrite: bool = option(
        False,
        "Replace an earlier run of the same name, which is otherwise an error. It is removed when this run "
        "has finished.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("training.checkpoint_file", self.checkpoint_file, _RUN_FILES)


@dataclass
class Config(Section):
    dataset: str = option(REQUIRED, "Name of a shipped data set, or path of a YAML file.")
    recipe: str = option(
        "none",
        "Choose the settings that you leave open: auto (by data, encoder and machine), spartex, or none (the defaults in this "
        "list). train, prepare, clusters and XMCClassifier apply it.",
        choices=("auto", "spartex", "none"),
    )
    dataset_path: str | None = option(None, "Folder that contains the data set folders.")
    log_fname: str | None = option(None, "Short for training.verbose.log_fname.")
    output_dir: str = option("./outputs", "Folder in which run folders are created.")
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
                f"environment.running_env={env.running_env!r}: is not a key of environment.env2path; add it there, or "
                "set dataset_path=FOLDER"
            )
        if self.model.encoder.attn_implementation == "flash_attention_2" and not self.training.amp.enabled:
            raise UserError(
                "model.encoder.attn_implementation=flash_attention_2: computes in 16 bits only; set training.amp.enabled=true, or "
                "attn_implementation=auto"
            )
        if ffi.use_sparse_layer and opt.dense_epochs >= opt.epochs:
            raise UserError(
                f"training.optimization.dense_epochs={opt.dense_epochs}: must be below epochs={opt.epochs}, or the "
                "head never becomes sparse; for a dense head set model.ffi.use_sparse_layer=false"
            )
        if opt.dense_epochs and ffi.index_from_texts:
            raise UserError(
                f"model.ffi.index_init={ffi.index_init}: has no effect with training.optimization.dense_epochs, where "
                "the dense weights choose the index; set index_init=random or dense_epochs=0"
            )
        if ffi.head_ratio and opt.dense_epochs:
            raise UserError(
                "training.optimization.dense_epochs: cannot be combined with model.ffi.head_ratio; set one of them to 0"
            )
        if ffi.semantic_groups and not (ffi.use_sparse_layer and ffi.group_size > 1):
            raise UserError(
                "model.ffi.semantic_groups=true: needs labels that share index rows; set model.ffi.group_size above 1"
            )
        d, known = ffi.input_features, self._known_features()
        if d is not None and known is not None and d != known:
            raise UserError(
                f"model.ffi.input_features={d}: the layer below outputs {known} features; correct or remove it"
            )
        if features := d or known:
            self.check_fan_in(features)
        if self.data.micro_batches != "auto" and self.texts_a_step % int(self.data.micro_batches):
            raise UserError(
                f"data.micro_batches={self.data.micro_batches}: does not divide the {self.texts_a_step} texts of a "
                "step (data.batch_size x training.optimization.grad_accum_step); choose a divisor, or auto"
            )
        n, labels = ffi.output_features, self.data.num_labels
        if n is not None and labels is not None and n != labels:
            raise UserError(f"model.ffi.output_features={n}: contradicts data.num_labels={labels}; correct one of them")

    @property
    def texts_a_step(self) -> int:
        """Number of texts in an optimizer step, over all ranks."""
        return self.data.batch_size * self.training.optimization.grad_accum_step

    def check_fan_in(self, features: int) -> None:
        """Raise UserError if a label would read more than `features` features."""
        ffi = self.model.ffi
        for name in ("fan_in", "head_fan_in"):
            if ffi.use_sparse_layer and (getattr(ffi, name) or 0) > features:
                raise UserError(
                    f"model.ffi.{name}={getattr(ffi, name)}: there are only {features} features to read; lower it"
                )

    def _known_features(self) -> int | None:
        if self.model.penultimate.use_penultimate_layer:
            return self.model.penultimate.penultimate_size
        encoder = self.model.encoder
        return encoder.encoder_ftr_dim and encoder.encoder_ftr_dim * encoder.feature_layers

    @property
    def data_folder(self) -> Path:
        """Folder of the data set, in `dataset_path` or else in the folder of `environment.running_env`."""
        root = (
            self.dataset_path
            if self.dataset_path is not None
            else self.environment.env2path[self.environment.running_env]
        )
        return Path(root).expanduser() / (self.data.folder or self.data.dataset)

    @property
    def data_name(self) -> str:
        """The data as messages call them: `data.source` or the data folder."""
        return self.data.source or str(self.data_folder)

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
