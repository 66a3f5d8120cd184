"""What survives a crash: the training state in files, and weights from elsewhere."""

from utils.checkpoint.capture import FORMAT_VERSION, capture, read_training_state, restore
from utils.checkpoint.dump import write_dump
from utils.checkpoint.files import METADATA_KEY, WEIGHTS_FILE, resolve_source, sha256
from utils.checkpoint.resume import (
    check_classes,
    check_continuation,
    check_held_out,
    checkpoint_metadata,
    class_columns,
    class_names,
    kept_plan,
    named_classes,
    preprocessing,
    starting_point,
    stored_classes,
    stored_config,
    warn_held_out,
    warn_preprocessing,
)
from utils.checkpoint.room import Room
from utils.checkpoint.store import BEST, LAST, CheckpointStore
from utils.checkpoint.teacher import load_teacher
from utils.checkpoint.weights import load_weights, weight_options

__all__ = [
    "BEST",
    "capture",
    "check_classes",
    "check_continuation",
    "check_held_out",
    "checkpoint_metadata",
    "class_columns",
    "class_names",
    "CheckpointStore",
    "FORMAT_VERSION",
    "kept_plan",
    "LAST",
    "load_teacher",
    "load_weights",
    "METADATA_KEY",
    "named_classes",
    "preprocessing",
    "read_training_state",
    "resolve_source",
    "restore",
    "Room",
    "sha256",
    "starting_point",
    "stored_classes",
    "stored_config",
    "warn_held_out",
    "warn_preprocessing",
    "weight_options",
    "WEIGHTS_FILE",
    "write_dump",
]
