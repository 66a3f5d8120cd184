"""The default configuration: every key, its published value and its meaning.

Keys and values are those of the published recipe; the keys under a comment "not in the published code" are ours,
and their defaults keep the published behaviour. What a value may be stands in ``utils.config.checks``.
"""

from collections.abc import Iterator
from typing import Any

from yacs.config import CfgNode


def default_config() -> CfgNode:
    """Return a new tree of all keys with their default values."""
    return CfgNode(
        {
            "DATA": _data(),
            "MODEL": _model(),
            "TRAIN": _train(),
            "AUG": _augmentation(),
            "TEST": {
                "CROP": True,  # evaluate the centre crop of the image scaled to 256/224 of IMG_SIZE; False: scale only
                # not in the published code
                "BATCH_SIZE": 0,  # images per process when evaluating; 0 = DATA.BATCH_SIZE
                "INTERVAL": 1,  # epochs between two evaluations; the last epoch is always evaluated
            },
            "AMP_OPT_LEVEL": "",  # published name of the precision: O0 = off, O1 and O2 = fp16; '' = TRAIN.AMP says it
            "OUTPUT": "",  # parent folder of all runs; '' = ./output; a run writes to OUTPUT/MODEL.NAME/TAG
            "TAG": "default",  # name of this run's folder, to keep runs of one config apart
            "SAVE_FREQ": 20,  # epochs between two checkpoints that are kept for good (ckpt_epoch_N.pth)
            "PRINT_FREQ": 100,  # updates between two log lines
            "SEED": 0,  # seed of the initial weights, of the order of the data and of the augmentation
            "EVAL_MODE": False,  # evaluate and stop
            "THROUGHPUT_MODE": False,  # measure the model's images per second and stop
        }
    )


def _data() -> dict[str, Any]:
    return {
        "BATCH_SIZE": 64,  # images per process and forward pass
        "DATA_PATH": "",  # folder with train/ and val/, or where CIFAR lies
        "DATASET": "imagenet",  # name of the data set
        "IMG_SIZE": 224,  # side of the square input, pixels
        "INTERPOLATION": "bicubic",  # filter that scales images
        "ZIP_MODE": False,  # read train.zip and val.zip instead of folders
        "CACHE_MODE": "part",  # with ZIP_MODE, images kept in memory: no, part (this process's share), full
        "PIN_MEMORY": True,  # page-locked batches, for faster copies to the GPU
        "NUM_WORKERS": -1,  # loader processes per process; -1 = its share of the usable cores (published: 8)
        # not in the published code
        "DOWNLOAD": True,  # fetch CIFAR-10/100 if DATA_PATH does not hold it
        "PIPELINE": "fast",  # fast: uint8 batches, finished on the device; reference: float batches as published
        "FAST_RESIZE": False,  # scale with torch instead of Pillow: faster, pixels differ slightly
        "VAL_CACHE": "",  # folder for the preprocessed validation images; '' = off
        "CACHE_DECODED": "off",  # ram: keep decoded uint8 images in memory (small data sets)
        "BAD_IMAGES": "error",  # an unreadable training image: error = stop, skip = replace it and count
        "LOADER_TIMEOUT": 600,  # seconds to wait for one batch before giving up; 0 = for ever
    }


def _model() -> dict[str, Any]:
    return {
        "TYPE": "strip_mlp_layer",  # strip_mlp_layer, or timm to train the baseline MODEL.TIMM_NAME
        "NAME": "strip_mlp",  # name of the config, part of the output folder
        "TIMM_NAME": "",  # model name in timm, for MODEL.TYPE timm (not in the published code)
        "PRETRAINED": "",  # checkpoint whose weights start the training
        "RESUME": "",  # checkpoint to continue from, or to evaluate
        "NUM_CLASSES": 1000,  # classes of the head
        "DROP": False,  # switch of DROP_RATE
        "DROP_RATE": 0.2,  # dropout before the head, probability; off as long as DROP is False
        "DROP_PATH_RATE": 0.1,  # stochastic depth, probability of dropping a residual branch
        "DROP_PATH_SCHEDULE": "constant",  # the same rate in each block, or linear from 0 (not in the published code)
        "ALPHA": 3,  # width of the channel mixing's hidden layer, in multiples of its input
        "PATCH_NORM": True,  # without effect in the published code and here, accepted for its config files
        "LABEL_SMOOTHING": 0.1,  # probability mass spread over all classes
        "STRIP_MLP": {
            "PATCH_SIZE": 4,  # side of a patch of the stem, pixels
            "IN_CHANS": 3,  # channels of the input image
            "EMBED_DIM": 80,  # channels of stage 1; each further stage doubles them
            "LAYERS": [2, 2, 6, 2],  # blocks of the four stages
            "NUM_PATCHES": 0,  # channel patches of the strip layer; 0 = published rule (not in the published code)
        },
    }


def _train() -> dict[str, Any]:
    return {
        "EPOCHS": 300,  # passes over the training set
        "WARMUP_EPOCHS": 20,  # epochs in which the rate rises linearly from WARMUP_LR
        "WEIGHT_DECAY": 0.05,  # decoupled decay; none on biases and one-dimensional parameters
        "BASE_LR": 5e-4,  # learning rate at the end of warm-up
        "WARMUP_LR": 5e-7,  # learning rate of the first update
        "MIN_LR": 5e-6,  # learning rate at the end of the cosine
        "CLIP_GRAD": 5.0,  # largest norm of the gradient; 0 = no clipping
        "AUTO_RESUME": True,  # continue from the output folder's last good checkpoint
        "ACCUMULATION_STEPS": 0,  # forward passes per update; 0 and 1 = no accumulation
        "USE_CHECKPOINT": False,  # recompute activations in the backward pass: less memory, more time
        "LR_SCHEDULER": {
            "NAME": "cosine",  # shape of the decay: cosine, linear, step
            "DECAY_EPOCHS": 30,  # epochs between two steps of the step schedule
            "DECAY_RATE": 0.1,  # factor of one step
            "WARMUP_PREFIX": False,  # count the decay from the end of warm-up (not in the published code)
        },
        "OPTIMIZER": {
            "NAME": "adamw",  # adamw, or sgd with Nesterov momentum
            "EPS": 1e-8,  # AdamW's epsilon
            "BETAS": (0.9, 0.999),  # AdamW's decay of the two moments
            "MOMENTUM": 0.9,  # SGD's momentum
        },
        # not in the published code
        "LR_SCALING": "none",  # multiply the three rates by (images per update / 512): none, linear, sqrt
        "AMP": "off",  # mixed precision: off, bf16, fp16
        "EMA_DECAY": 0.0,  # decay of the moving average of the weights, per update; 0 = no average
        "EMA_WARMUP": True,  # let the average's decay rise slowly at the start
        "SYNC_BN": False,  # batch statistics over all processes
        "COMPILE": False,  # torch.compile
        "TF32": False,  # TF32 products on NVIDIA GPUs; False = full float32
        "SAVE_STEPS": 0,  # updates between two saves within an epoch; 0 = none
        "SAVE_MINUTES": 0.0,  # minutes between two saves within an epoch; 0 = none
        "SAVE_KEEP": 2,  # newest resumable checkpoints to keep, best and milestones apart
        "MAX_RUN_MINUTES": 0.0,  # save and stop after so many minutes; 0 = no limit
        "MAX_NONFINITE": 20,  # non-finite updates in a row that stop the run
        "DIST_TIMEOUT": 1800,  # seconds to wait for the other processes before giving up
    }


def _augmentation() -> dict[str, Any]:
    return {
        "COLOR_JITTER": 0.4,  # strength of colour jitter; used where AUTO_AUGMENT is off
        "AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",  # timm's policy string; '' or none = off
        "REPROB": 0.25,  # probability of random erasing
        "REMODE": "pixel",  # what an erased rectangle holds: const, rand, pixel
        "RECOUNT": 1,  # rectangles per erased image
        "MIXUP": 0.8,  # alpha of mixup's Beta distribution; 0 = off
        "CUTMIX": 1.0,  # alpha of cutmix's Beta distribution; 0 = off
        "CUTMIX_MINMAX": None,  # (least, largest) side of the cutmix rectangle as a share of the image, or None
        "MIXUP_PROB": 1.0,  # probability of mixing a batch at all
        "MIXUP_SWITCH_PROB": 0.5,  # probability of cutmix rather than mixup where both are on
        "MIXUP_MODE": "batch",  # one mixing ratio per batch, pair or elem
        # not in the published code; the values are timm's own, which the published run used
        "HFLIP": 0.5,  # probability of mirroring left and right
        "SCALE": (0.08, 1.0),  # share of the image's area that the training crop covers, least and largest
        "RATIO": (0.75, 1.3333333333333333),  # width / height of the training crop, least and largest
    }


def flatten(config: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return ``{'SECTION.KEY': value}`` of all leaves, in the order of the tree."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, CfgNode):
            leaves.update(flatten(value, f"{prefix}{name}."))
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def sections(config: CfgNode, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all sections."""
    for name, value in config.items():
        if isinstance(value, CfgNode):
            yield f"{prefix}{name}"
            yield from sections(value, f"{prefix}{name}.")


def set_key(config: CfgNode, key: str, value: Any) -> None:
    """Set the value at a dotted key of a tree that is not frozen."""
    *parents, leaf = key.split(".")
    for name in parents:
        config = config[name]
    config[leaf] = value
