"""The process that a run lives in: launch, devices, logging, signals, files, random streams."""

from utils.runtime.agreement import SAME_FILES, require_agreement
from utils.runtime.distributed import (
    all_reduce_sum,
    broadcast_object,
    gather_objects,
    get_local_world_size,
    get_rank,
    get_world_size,
    is_main_process,
    load_on_main_process,
    on_main_process,
)
from utils.runtime.failures import phase
from utils.runtime.files import atomic_file, free_bytes, link_or_copy, set_aside, side_file, write_text_atomic
from utils.runtime.hardware import available_memory, cpu_features, crowding_advice, describe_cpu, free_memory
from utils.runtime.launch import select_device
from utils.runtime.processes import once_per_machine, usable_cores
from utils.runtime.random_state import (
    integer_seed,
    random_state,
    seed_streams,
    seeded_streams,
    set_random_state,
    streams_restored,
    torch_random_state,
)
from utils.runtime.signals import JOB_SIGNALS, StopRequest
from utils.runtime.start import Run, start_run
from utils.runtime.text import printable

__all__ = [
    "all_reduce_sum",
    "atomic_file",
    "available_memory",
    "broadcast_object",
    "cpu_features",
    "crowding_advice",
    "describe_cpu",
    "free_bytes",
    "free_memory",
    "gather_objects",
    "get_local_world_size",
    "get_rank",
    "get_world_size",
    "integer_seed",
    "is_main_process",
    "JOB_SIGNALS",
    "link_or_copy",
    "load_on_main_process",
    "on_main_process",
    "once_per_machine",
    "phase",
    "printable",
    "random_state",
    "require_agreement",
    "Run",
    "SAME_FILES",
    "seed_streams",
    "seeded_streams",
    "select_device",
    "set_aside",
    "set_random_state",
    "side_file",
    "start_run",
    "StopRequest",
    "streams_restored",
    "torch_random_state",
    "usable_cores",
    "write_text_atomic",
]
