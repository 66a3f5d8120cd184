"""All keys of the configuration, one row per key. Everything else about a key is derived from its row.

The rows give the default tree, the types, the allowed values, the flags of the command line with ``--help``, the keys
that have no effect, the deviations from the published recipe, and docs/CONFIG.md. To add a key, add a row and write
the page again: ``python -m utils.config.reference > docs/CONFIG.md``.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from yacs.config import CfgNode

from utils.config.facts import CROP_RATIO, DATASETS, IMAGENET_MEAN, IMAGENET_STD, mixes
from utils.config.suggest import did_you_mean
from utils.config.values import convert, in_interval, is_list, is_null, read_duration


@dataclass(frozen=True)
class Idle:
    """A condition under which a key has no effect, in words and as a function of the configuration."""

    reason: str
    applies: Callable[[CfgNode], bool]


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
        name: dotted name.
        default: the published value; where ``ours``, the value that keeps the published behaviour.
        help: what it means.
        allowed: for text, the known names, separated by ``|``. For numbers, an interval for each of them; ``[`` and
            ``]`` include the end, ``(`` and ``)`` exclude it. Empty: any value of the default's type.
        affects: ``"weights"``: can change the trained weights. ``"result"``: changes the reported accuracy, but may
            differ when a run is resumed. ``"nothing"``: a place, a name, or how often something is saved or logged.
        idle_when: when the key has no effect.
        flag: its flag on the command line and the placeholder of the value, such as ``--seed N``. Without a
            placeholder, the flag sets a switch to True, or takes one of the known names.
        ours: the key is not in the published code.
        is_path: ``~`` and ``$VARIABLE`` are replaced in a value that comes from a file or the command line.
        like: a value of another type than the default's that the key takes too.
        any_length: the key takes a list of any length.
    """

    name: str
    default: Any
    help: str
    allowed: str = ""
    affects: Literal["weights", "result", "nothing"] = "weights"
    idle_when: Idle | None = None
    flag: str = ""
    ours: bool = False
    is_path: bool = False
    like: Any = None
    any_length: bool = False

    @property
    def choices(self) -> tuple[str, ...]:
        """The known values of a text key; empty where any text is allowed."""
        return tuple(self.allowed.split("|")) if self.allowed and isinstance(self.default, str) else ()

    def read(self, value: Any) -> Any:
        """Return ``value`` (text, a list of texts, or a value of the right type) as the type of this key.

        Raises:
            ValueError: with the reason alone, for example "'ten' is not a whole number".
        """
        if self.default is None and is_null(value):
            return None
        other = self.like is not None and (self.default is None or is_list(value))
        return convert(value, self.like if other else self.default, self.choices, any_length=self.any_length)

    def in_range(self, value: Any) -> bool:
        """Return whether a number, or each number of a list, lies in the interval of this key."""
        if self.choices or not self.allowed or value is None:
            return True
        numbers = value if isinstance(value, (list, tuple)) else [value]
        return all(in_interval(number, self.allowed) for number in numbers)

    def idle(self, config: CfgNode) -> bool:
        """Return whether this key has no effect in ``config``."""
        return self.idle_when is not None and self.idle_when.applies(config)


def value_of(config: CfgNode, name: str) -> Any:
    """Return the value of the key with a dotted name."""
    return reduce(getattr, name.split("."), config)


def when(name: str, value: Any) -> Idle:
    """Return the condition that a key has a value."""
    return Idle(f"{name} is {value}", lambda config: value_of(config, name) == value)


def unless(name: str, value: Any) -> Idle:
    """Return the condition that a key has another value."""
    return Idle(f"{name} is not {value}", lambda config: value_of(config, name) != value)


NO_PATCH_NORM = Idle("the network has no norm after the patch embedding, as published", lambda config: True)
AUTO_AUGMENT_ON = Idle("AUG.AUTO_AUGMENT takes its place", lambda config: config.AUG.AUTO_AUGMENT not in ("", "none"))
MIXING_OFF = Idle("mixup and cutmix are off", lambda config: not mixes(config))
TIMM = when("MODEL.TYPE", "timm")
NO_CGSMM = Idle(
    "MODEL.TYPE is timm or MODEL.STRIP_MLP.TOKEN_MIXING is lsmm",
    lambda config: config.MODEL.TYPE == "timm" or config.MODEL.STRIP_MLP.TOKEN_MIXING == "lsmm",
)
NO_TEACHER = when("TRAIN.DISTILL.KIND", "none")
PLANNED_BATCH = Idle(
    "it follows from TRAIN.GLOBAL_BATCH",
    lambda config: config.TRAIN.GLOBAL_BATCH > 0 and not (config.EVAL_MODE or config.THROUGHPUT_MODE),
)
PLANNED_LENGTH = Idle("it follows from TRAIN.TIME_BUDGET", lambda config: read_duration(config.TRAIN.TIME_BUDGET) > 0)
OWN_OPTIMIZER = Idle(
    "TRAIN.OPTIMIZER.NAME is adamw or sgd", lambda config: config.TRAIN.OPTIMIZER.NAME in ("adamw", "sgd")
)
# Those of timm that the tests train, interrupt and resume; adamw and sgd are PyTorch's.
OPTIMIZERS = (
    "adamw|sgd|adabelief|adam|adamp|adan|adopt|adoptw|lamb|lambc|laprop|larc|lars|lion|madgrad|mars|muon|nadam|nadamw|"
    "novograd|radam|rmsprop|rmsproptf|sgdp|sgdw"
)
NOT_COMPILED = when("TRAIN.COMPILE", False)

# A table: each row is one line, or two where it is long.
# fmt: off
_ROWS = (
    Key("DATA.BATCH_SIZE", 64, "images per process and forward pass",
        "[1, 65536]", idle_when=PLANNED_BATCH, flag="--batch-size N"),
    Key("DATA.DATA_PATH", "", "folder of the data set: with train/ and val/, or where the CIFAR files are; of shards, "
        "also an address", affects="nothing", flag="--data-path DIR", is_path=True),
    Key("DATA.DATASET", "imagenet", "name of the data set", "|".join(DATASETS), flag="--dataset NAME"),
    Key("DATA.TIMM_OPTIONS", "", "arguments of timm's create_dataset, such as input_key='img', val_split='test'; "
        "known: train_split, val_split, class_map, input_key, target_key",
        idle_when=Idle("DATA.DATASET is not timm:NAME", lambda config: not config.DATA.DATASET.startswith("timm:")),
        ours=True),
    Key("DATA.HOLDOUT", 0.0, "share of each class of the training images that is held out for validation, where there "
        "is no validation set; 0 = off", "[0, 1)", ours=True),
    Key("DATA.TRAIN_SHARE", 1.0, "share of each class of the training images that is trained on, chosen by SEED; 1 = "
        "all", "(0, 1]", ours=True),
    Key("DATA.SAMPLER", "shuffle", "order of an epoch: every image once, or each class equally often",
        "shuffle|balanced", ours=True),
    Key("DATA.IMG_SIZE", 224, "side of the square input, pixels; or (height, width)", "[1, 16384]", like=(0, 0)),
    Key("DATA.MEAN", IMAGENET_MEAN, "mean of each channel, or one for all; pixels are from 0 to 1. Where images have "
        "other than 3 channels, ImageNet's values are averaged", "[-1000, 1000]", ours=True, any_length=True),
    Key("DATA.STD", IMAGENET_STD, "standard deviation of each channel, or one for all, treated likewise",
        "(0, 1000]", ours=True, any_length=True),
    Key("DATA.INTERPOLATION", "bicubic", "filter that scales images", "bicubic|bilinear|lanczos|nearest"),
    Key("DATA.ZIP_MODE", False, "read train.zip and val.zip instead of folders", affects="nothing", flag="--zip"),
    Key("DATA.CACHE_MODE", "part", "images of the archives kept in memory: none, the share of this process, or all",
        "no|part|full", affects="nothing", idle_when=when("DATA.ZIP_MODE", False), flag="--cache-mode"),
    Key("DATA.CLASS_ORDER", "text", "which class is 0, 1, ...: names as text, numbers, or as in DATA_PATH/classes.txt",
        "text|numeric|file", ours=True),
    Key("DATA.PIN_MEMORY", True, "page-locked batches, for faster copies to the GPU", affects="nothing"),
    Key("DATA.NUM_WORKERS", -1, "loader processes per process; -1 = its share of the usable cores (published: 8)",
        "[-1, 1024]", affects="nothing", flag="--num-workers N"),
    Key("DATA.DOWNLOAD", True, "fetch CIFAR-10/100 if DATA.DATA_PATH does not hold it", affects="nothing", ours=True),
    Key("DATA.PIPELINE", "fast", "fast: uint8 batches, finished on the device; reference: float batches as published",
        "fast|reference", ours=True),
    Key("DATA.FAST_RESIZE", False, "scale with torch, large JPEG files while decoding: faster, other rounding",
        ours=True),
    Key("DATA.VAL_CACHE", "", "folder for the preprocessed validation images; empty = off",
        affects="nothing", ours=True, is_path=True),
    Key("DATA.CACHE_DECODED", "off", "ram: keep decoded uint8 images in memory (small data sets)",
        "off|ram", affects="nothing", ours=True),
    Key("DATA.BAD_IMAGES", "error", "an unreadable training image: error = stop; skip = replace and count it",
        "error|skip", ours=True),
    Key("DATA.LOADER_TIMEOUT", 600, "seconds to wait for one batch before giving up; 0 = no limit",
        "[0, 31536000]", affects="nothing", ours=True),

    Key("MODEL.TYPE", "strip_mlp_layer", "strip_mlp_layer, or timm to train the baseline MODEL.TIMM_NAME",
        "strip_mlp_layer|timm"),
    Key("MODEL.NAME", "strip_mlp", "name of the config, part of the output folder", affects="nothing"),
    Key("MODEL.TIMM_NAME", "", "model name in timm, for MODEL.TYPE timm",
        idle_when=unless("MODEL.TYPE", "timm"), ours=True),
    Key("MODEL.TIMM_KWARGS", "", "further arguments of the timm model, NAME=VALUE with spaces between, such as "
        "'depth=12 embed_dim=192'", idle_when=unless("MODEL.TYPE", "timm"), ours=True),
    Key("MODEL.PRETRAINED", "", "checkpoint whose weights start the training",
        affects="result", flag="--pretrained FILE", is_path=True),
    Key("MODEL.RESUME", "", "checkpoint to continue from, or to evaluate",
        affects="nothing", flag="--resume FILE", is_path=True),
    Key("MODEL.WEIGHTS_KEY", "", "entry of a weight file that holds the weights, dotted; empty = the one that fits",
        affects="result", flag="--weights-key NAME", ours=True),
    Key("MODEL.STRIP_PREFIX", "", "prefix of the names in a weight file that is removed, other names are left out; "
        "empty = what all names share, if the rest fits", affects="result", flag="--strip-prefix PREFIX", ours=True),
    Key("MODEL.NUM_CLASSES", 1000, "classes of the head; 0 = as many as the data have", "[0, 100000000]"),
    Key("MODEL.DROP", False, "switch of MODEL.DROP_RATE"),
    Key("MODEL.DROP_RATE", 0.2, "dropout before the head, probability", "[0, 1)", idle_when=when("MODEL.DROP", False)),
    Key("MODEL.DROP_PATH_RATE", 0.1, "stochastic depth, probability of dropping a residual branch", "[0, 1)"),
    Key("MODEL.DROP_PATH_SCHEDULE", "constant", "the same rate in each block, or linear from 0",
        "constant|linear", idle_when=TIMM, ours=True),
    Key("MODEL.ALPHA", 3, "width of the channel mixing's hidden layer, in multiples of its input",
        "[1, 1000]", idle_when=TIMM),
    Key("MODEL.PATCH_NORM", True, "accepted because published config files hold it",
        affects="nothing", idle_when=NO_PATCH_NORM),
    Key("MODEL.HEAD_INIT_SCALE", 1.0, "factor on the initial weights of the head; small = start from an even guess",
        "(0, 1000]", ours=True),
    Key("MODEL.LABEL_SMOOTHING", 0.1, "probability mass spread over all classes", "[0, 1)"),
    Key("MODEL.STRIP_MLP.PATCH_SIZE", 4, "side of a patch of the stem, pixels", "[1, 1024]", idle_when=TIMM),
    Key("MODEL.STRIP_MLP.IN_CHANS", 3, "channels of the images: 3 = RGB, 1 = grey, others as they are stored",
        "[1, 1024]"),
    Key("MODEL.STRIP_MLP.EMBED_DIM", 80, "channels of stage 1; each further stage doubles them",
        "[1, 65536]", idle_when=TIMM),
    Key("MODEL.STRIP_MLP.LAYERS", [2, 2, 6, 2], "blocks of the four stages", "[1, 200]", idle_when=TIMM),
    Key("MODEL.STRIP_MLP.NUM_PATCHES", 0, "channel patches of the strip layer; 0 = published rule",
        "[0, 65536]", idle_when=NO_CGSMM, ours=True),
    Key("MODEL.STRIP_MLP.STRIP_WIDTH", 3, "rows that a token of the strip layer sees, odd; 1 = its own alone",
        "[1, 255]", idle_when=NO_CGSMM, ours=True),
    Key("MODEL.STRIP_MLP.TOKEN_MIXING", "both", "modules of the strip mixing block: both, or one alone while the other "
        "half of the channels passes unchanged", "both|cgsmm|lsmm", idle_when=TIMM, ours=True),
    Key("MODEL.STRIP_MLP.STAGE_SKIPS", True, "skips past stages by grouped convolution, as in the published code, not "
        "in the paper's figure", idle_when=TIMM, ours=True),

    Key("TRAIN.EPOCHS", 300, "passes over the training set", "[1, 1000000]", flag="--epochs N"),
    Key("TRAIN.UPDATES", 0, "updates of the whole run, to which the schedule is stretched; the last epoch may be cut "
        "short; 0 = TRAIN.EPOCHS epochs", "[0, 1000000000000]", idle_when=PLANNED_LENGTH, ours=True),
    Key("TRAIN.TIME_BUDGET", "0", "time for the whole run, such as 6h, 90m, 300s or 1h30m, from whose measured speed "
        "TRAIN.UPDATES follows (docs/PLANNING.md); 0 = off", flag="--time-budget TIME", ours=True),
    Key("TRAIN.WARMUP_EPOCHS", 20, "epochs in which the rate rises linearly from TRAIN.WARMUP_LR", "[0, 1000000]"),
    Key("TRAIN.WEIGHT_DECAY", 0.05, "decoupled decay; none on biases and one-dimensional parameters", "[0, 1000]"),
    Key("TRAIN.BASE_LR", 5e-4, "learning rate at the end of warm-up", "(0, 1e30]"),
    Key("TRAIN.WARMUP_LR", 5e-7, "learning rate of the first update",
        "[0, 1e30]", idle_when=when("TRAIN.WARMUP_EPOCHS", 0)),
    Key("TRAIN.MIN_LR", 5e-6, "learning rate at the end of the cosine",
        "[0, 1e30]", idle_when=unless("TRAIN.LR_SCHEDULER.NAME", "cosine")),
    Key("TRAIN.CLIP_GRAD", 5.0, "largest norm of the gradient; 0 = no clipping", "[0, 1000000000]"),
    Key("TRAIN.AUTO_RESUME", True, "continue from the last good checkpoint of the output folder", affects="nothing"),
    Key("TRAIN.ACCUMULATION_STEPS", 0, "forward passes per update; 0 and 1 = no accumulation",
        "[0, 1000000]", idle_when=PLANNED_BATCH, flag="--accumulation-steps N"),
    Key("TRAIN.GLOBAL_BATCH", 0, "images per update over all processes, from which batch size and accumulation follow: "
        "the largest batch that fits the memory (docs/PLANNING.md); 0 = off",
        "[0, 1000000]", flag="--global-batch N", ours=True),
    Key("TRAIN.USE_CHECKPOINT", False, "recompute activations in the backward pass: less memory, more time",
        affects="nothing", flag="--use-checkpoint"),
    Key("TRAIN.LR_SCHEDULER.NAME", "cosine", "shape of the decay", "cosine|linear|step"),
    Key("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 30, "epochs between two steps of the step schedule",
        "[1, 1000000]", idle_when=unless("TRAIN.LR_SCHEDULER.NAME", "step")),
    Key("TRAIN.LR_SCHEDULER.DECAY_RATE", 0.1, "factor of one step",
        "(0, 1]", idle_when=unless("TRAIN.LR_SCHEDULER.NAME", "step")),
    Key("TRAIN.LR_SCHEDULER.WARMUP_PREFIX", False, "count the decay from the end of warm-up, as linear always does",
        idle_when=when("TRAIN.LR_SCHEDULER.NAME", "linear"), ours=True),
    Key("TRAIN.OPTIMIZER.NAME", "adamw", "adamw, sgd with Nesterov momentum, or one of timm's", OPTIMIZERS),
    Key("TRAIN.OPTIMIZER.EPS", 1e-8, "epsilon of AdamW", "(0, 1]", idle_when=unless("TRAIN.OPTIMIZER.NAME", "adamw")),
    Key("TRAIN.OPTIMIZER.BETAS", (0.9, 0.999), "AdamW's decay of the two moments",
        "[0, 1)", idle_when=unless("TRAIN.OPTIMIZER.NAME", "adamw")),
    Key("TRAIN.OPTIMIZER.MOMENTUM", 0.9, "momentum of SGD", "[0, 1)", idle_when=unless("TRAIN.OPTIMIZER.NAME", "sgd")),
    Key("TRAIN.OPTIMIZER.OPTIONS", "", "arguments of timm's optimizer, such as eps=1e-8, caution=True; else its own",
        idle_when=OWN_OPTIMIZER, ours=True),
    Key("TRAIN.LAYER_DECAY", 1.0, "factor on the learning rate from a block to the one before it; 1 = the same in all",
        "(0, 1]", ours=True),
    Key("TRAIN.FREEZE", "none", "what keeps its weights, in evaluation mode: the stem, the stages up to N with it, or "
        "all but the classifier", "none|stem|stages1|stages2|stages3|stages4|head_only", ours=True),
    Key("TRAIN.CLASS_WEIGHTS", "none", "balanced: weigh each class in the loss by images / (classes * its images)",
        "none|balanced", ours=True),
    Key("TRAIN.LOSS.NAME", "ce", "cross-entropy over the classes, or binary cross-entropy of each class",
        "ce|bce", ours=True),
    Key("TRAIN.LOSS.BCE_THRESHOLD", 0.0, "a target above it counts as 1, any other as 0; 0 = targets as they are",
        "[0, 1)", idle_when=unless("TRAIN.LOSS.NAME", "bce"), ours=True),
    Key("TRAIN.LOSS.BCE_SUM", False, "sum over the classes instead of their mean",
        idle_when=unless("TRAIN.LOSS.NAME", "bce"), ours=True),
    Key("TRAIN.DISTILL.KIND", "none", "learn from a teacher: its scores (soft) or the class that it chooses (hard)",
        "none|soft|hard", ours=True),
    Key("TRAIN.DISTILL.TEACHER", "", "checkpoint of the teacher; compared by its weights when a run is resumed",
        affects="nothing", idle_when=NO_TEACHER, ours=True, is_path=True),
    Key("TRAIN.DISTILL.TIMM_NAME", "", "the teacher's name in timm, where its file is not ours; without a file, the "
        "released weights", idle_when=NO_TEACHER, ours=True),
    Key("TRAIN.DISTILL.WEIGHT", 0.5, "share of the teacher in the loss; the labels have the rest",
        "[0, 1]", idle_when=NO_TEACHER, ours=True),
    Key("TRAIN.DISTILL.TEMPERATURE", 1.0, "divides the scores of both before they are compared",
        "(0, 1000]", idle_when=unless("TRAIN.DISTILL.KIND", "soft"), ours=True),
    Key("TRAIN.LR_SCALING", "none", "multiply the three rates by (images per update / 512), or by its square root",
        "none|linear|sqrt", ours=True),
    Key("TRAIN.AMP", "off", "mixed precision; auto = bf16 where the device computes in it natively, else off",
        "off|auto|bf16|fp16", flag="--amp", ours=True),
    Key("TRAIN.EMA_DECAY", 0.0, "decay of the moving average of the weights, per update; 0 = no average",
        "[0, 1)", ours=True),
    Key("TRAIN.EMA_WARMUP", True, "let the decay of the average rise slowly at the start",
        idle_when=when("TRAIN.EMA_DECAY", 0), ours=True),
    Key("TRAIN.SYNC_BN", False, "batch statistics over all processes", ours=True),
    Key("TRAIN.GRAD_COMPRESSION", "none", "format in which several processes exchange their gradients: bf16 halves "
        "the bytes and rounds each process's share", "none|bf16", ours=True),
    Key("TRAIN.LEAN", "auto", "hand-written gradients, which keep less memory; auto: where they are faster (CPUs)",
        "auto|on|off", idle_when=TIMM, ours=True),
    Key("TRAIN.COMPILE", False, "torch.compile", flag="--compile", ours=True),
    Key("TRAIN.COMPILE_MODE", "default", "reduce-overhead: replay CUDA graphs, where the host is slower than the GPU",
        "default|reduce-overhead", idle_when=NOT_COMPILED, ours=True),
    Key("TRAIN.MEMORY_BUDGET", 1.0, "share of the activations that a compiled model keeps; the rest is recomputed",
        "[0, 1]", idle_when=NOT_COMPILED, ours=True),
    Key("TRAIN.TF32", False, "TF32 products on NVIDIA GPUs; False = full float32", ours=True),
    Key("TRAIN.SAVE_STEPS", 0, "updates between two saves within an epoch; 0 = none",
        "[0, inf)", affects="nothing", ours=True),
    Key("TRAIN.SAVE_MINUTES", 0.0, "minutes between two saves within an epoch; 0 = none",
        "[0, 10000000]", affects="nothing", ours=True),
    Key("TRAIN.SAVE_KEEP", 2, "newest resumable checkpoints to keep, besides best and milestones",
        "[2, inf)", affects="nothing", ours=True),  # with one file, a fault while it is replaced would lose the run
    Key("TRAIN.MAX_RUN_MINUTES", 0.0, "save and stop after this many minutes; 0 = no limit",
        "[0, 10000000]", affects="nothing", ours=True),
    Key("TRAIN.MAX_NONFINITE", 20, "non-finite updates in a row that stop the run",
        "[1, inf)", affects="nothing", ours=True),
    Key("TRAIN.DIST_TIMEOUT", 1800, "seconds to wait for the other processes before giving up",
        "[1, 31536000]", affects="nothing", ours=True),

    Key("AUG.COLOR_JITTER", 0.4, "strength of colour jitter", "[0, 100]", idle_when=AUTO_AUGMENT_ON),
    Key("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "timm's policy string; empty or none = off"),
    Key("AUG.REPROB", 0.25, "probability of random erasing", "[0, 1]"),
    Key("AUG.REMODE", "pixel", "content of an erased rectangle: the mean colour, one random colour, random pixels",
        "const|rand|pixel", idle_when=when("AUG.REPROB", 0)),
    Key("AUG.RECOUNT", 1, "largest number of rectangles per erased image",
        "[1, 1000]", idle_when=when("AUG.REPROB", 0)),
    Key("AUG.MIXUP", 0.8, "alpha of mixup's Beta distribution; 0 = off", "[0, 1000]"),
    Key("AUG.CUTMIX", 1.0, "alpha of cutmix's Beta distribution; 0 = off", "[0, 1000]"),
    Key("AUG.CUTMIX_MINMAX", None, "least and largest side of the cutmix rectangle, as a share of the image; or None",
        "(0, 1]", like=(0.0, 0.0)),
    Key("AUG.MIXUP_PROB", 1.0, "probability of mixing a batch at all", "[0, 1]", idle_when=MIXING_OFF),
    Key("AUG.MIXUP_SWITCH_PROB", 0.5, "probability of cutmix rather than mixup where both are on",
        "[0, 1]", idle_when=MIXING_OFF),
    Key("AUG.MIXUP_MODE", "batch", "images that share one mixing ratio: a batch, a pair, or none",
        "batch|pair|elem", idle_when=MIXING_OFF),
    Key("AUG.MIXUP_OFF_EPOCHS", 0, "epochs at the end of the run without mixup and cutmix",
        "[0, 1000000]", idle_when=MIXING_OFF, ours=True),
    Key("AUG.REPEATS", 1, "times an image comes in an epoch, augmented differently; an epoch has 1/N of the images",
        "[1, 1000]", ours=True),
    # timm's own values, which the published run used
    Key("AUG.HFLIP", 0.5, "probability of mirroring left and right", "[0, 1]", ours=True),
    Key("AUG.SCALE", (0.08, 1.0), "least and largest share of the image's area that the training crop covers",
        "(0, 1]", ours=True),
    Key("AUG.RATIO", (0.75, 1.3333333333333333), "least and largest width / height of the training crop",
        "(0, 1000]", ours=True),

    Key("TEST.CROP", True, "evaluate the centre crop of images scaled by TEST.CROP_RATIO; False = squash the image to "
        "DATA.IMG_SIZE", affects="result"),
    Key("TEST.CROP_RATIO", CROP_RATIO, "side of the centre crop, DATA.IMG_SIZE, as a share of the shorter side of "
        "the scaled image (timm's crop_pct); without effect up to 32 pixels", "[0.1, 1]",
        affects="result", idle_when=when("TEST.CROP", False), ours=True),
    Key("TEST.FLIP", False, "evaluate each image and its mirror image, and take the mean of their probabilities",
        affects="result", ours=True),
    Key("TEST.CLASS_NAMES", "", "names of the model's classes, to find those of the data set among them: a file with "
        "one name per line in the order of the scores; numbers = 0, 1, ...; empty = those in the checkpoint",
        affects="result", ours=True, is_path=True),
    Key("TEST.REAL_LABELS", "", "real.json of ImageNet-ReaL: also report the accuracy under its labels (main_eval.py)",
        affects="nothing", ours=True, is_path=True),
    Key("TEST.CORRUPTIONS", "", "folder CORRUPTION/SEVERITY/CLASS/IMAGE as ImageNet-C: evaluate it instead of the "
        "validation set (main_eval.py)", affects="nothing", ours=True, is_path=True),
    Key("TEST.BATCH_SIZE", 0, "images per process when evaluating; 0 = DATA.BATCH_SIZE",
        "[0, 65536]", affects="nothing", ours=True),
    Key("TEST.INTERVAL", 1, "epochs between two evaluations; the last epoch is always evaluated",
        "[1, inf)", affects="nothing", ours=True),

    Key("AMP_OPT_LEVEL", "", "published name of the precision: O0 = off, O1 and O2 = fp16; prefer --amp (TRAIN.AMP)",
        "|O0|O1|O2", affects="nothing", flag="--amp-opt-level"),
    Key("OUTPUT", "", "parent folder of all runs (empty = output); a run writes to OUTPUT/MODEL.NAME/TAG",
        affects="nothing", flag="--output DIR", is_path=True),
    Key("TAG", "default", "name of this run's folder, to keep runs of one config apart",
        affects="nothing", flag="--tag NAME"),
    Key("SAVE_FREQ", 20, "epochs between two checkpoints that are kept for good (ckpt_epoch_N.pth)",
        "[1, inf)", affects="nothing"),
    Key("PRINT_FREQ", 100, "updates between two log lines", "[1, inf)", affects="nothing"),
    Key("LOGGER", "none", "also write figures, the first batch and a histogram of the probabilities for TensorBoard "
        "(to RUN/tensorboard) or Weights & Biases", "none|tensorboard|wandb", affects="nothing", ours=True),
    Key("SEED", 0, "seed of the initial weights, of the order of the data and of the augmentation",
        "[0, 2147483648)", flag="--seed N"),
    Key("EVAL_MODE", False, "evaluate the checkpoint given with --resume, then stop", affects="nothing", flag="--eval"),
    Key("THROUGHPUT_MODE", False, "measure the model's images per second, then stop",
        affects="nothing", flag="--throughput"),
)
# fmt: on

KEYS = {row.name: row for row in _ROWS}  # in the order of the tree
_ALSO_EVALUATES = ("TRAIN.AMP", "TRAIN.TF32", "TRAIN.DIST_TIMEOUT")
SECTIONS = frozenset(name[:i] for name in KEYS for i, sign in enumerate(name) if sign == ".")


def default_config() -> CfgNode:
    """Return a new tree of all keys with their default values."""
    config = CfgNode()
    for key in KEYS.values():
        set_value(config, key.name, copy.copy(key.default))
    return config


def flatten(config: CfgNode) -> dict[str, Any]:
    """Return ``{'SECTION.KEY': value}`` of all keys, in the order of the tree."""
    return {name: value_of(config, name) for name in KEYS}


def set_value(config: CfgNode, name: str, value: Any) -> None:
    """Set the key with a dotted name in a tree that is not frozen."""
    *parents, leaf = name.split(".")
    for parent in parents:
        config = config.setdefault(parent, CfgNode())
    config[leaf] = value


def only_trains(name: str) -> bool:
    """Return whether only training reads a key, also one that is not known here."""
    return name.startswith(("TRAIN.", "AUG.")) and name not in _ALSO_EVALUATES


def with_values(config: CfgNode, values: Mapping[str, Any]) -> CfgNode:
    """Return a frozen copy of ``config`` with the values of some keys, by dotted name, replaced."""
    changed = config.clone()
    changed.defrost()
    for name, value in values.items():
        set_value(changed, name, value)
    changed.freeze()
    return changed


def require_known_key(name: str) -> None:
    """Raise a ValueError with the nearest known name if ``name`` is not a key of the configuration."""
    if name not in KEYS:
        raise ValueError(f"{name} is not a known key{did_you_mean(name, KEYS)}")
