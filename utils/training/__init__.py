"""What trains and is measured: optimizer, schedule, losses, precision, evaluation, records."""

from utils.training.batchnorm import averaged_batchnorm, batchnorm_buffers
from utils.training.distillation import Teacher
from utils.training.evaluation import EvalResult, class_scores, evaluate, measure_throughput
from utils.training.guard import NonFiniteGuard, poison_nonfinite
from utils.training.losses import build_criterion, class_weights
from utils.training.lr_scheduler import build_scheduler, global_batch_size, scaled_learning_rates
from utils.training.meters import Pace, RunningMeans, UpdateTimer, peak_memory_mib
from utils.training.optimizer import build_optimizer, is_fused, kept_state
from utils.training.parallel import check_compiler, compile_and_warm_up, compile_model, wrap_for_training
from utils.training.pictures import draw_batch, shown_channels
from utils.training.planning import (
    Costs,
    TimeBudget,
    batch_choices,
    largest_fitting,
    log_batch,
    plan_length,
    small_enough,
)
from utils.training.precision import Precision, build_precision
from utils.training.real_labels import RealAccuracy, read_real_labels
from utils.training.records import (
    curves_figure,
    epoch_row,
    log_updates,
    metrics_rows,
    record_epoch,
    trim_metrics,
)
from utils.training.robustness import (
    ALEXNET_ERRORS,
    SEVERITIES,
    check_corruption_folders,
    corruption_summary,
    corruption_table,
)
from utils.training.state import Progress, TrainState
from utils.training.watching import Watcher

__all__ = [
    "ALEXNET_ERRORS",
    "averaged_batchnorm",
    "batch_choices",
    "batchnorm_buffers",
    "build_criterion",
    "check_corruption_folders",
    "class_scores",
    "class_weights",
    "build_optimizer",
    "build_precision",
    "build_scheduler",
    "check_compiler",
    "compile_and_warm_up",
    "compile_model",
    "Costs",
    "corruption_summary",
    "corruption_table",
    "curves_figure",
    "draw_batch",
    "epoch_row",
    "EvalResult",
    "evaluate",
    "global_batch_size",
    "is_fused",
    "kept_state",
    "largest_fitting",
    "log_batch",
    "log_updates",
    "measure_throughput",
    "metrics_rows",
    "NonFiniteGuard",
    "Pace",
    "peak_memory_mib",
    "plan_length",
    "poison_nonfinite",
    "Precision",
    "Progress",
    "read_real_labels",
    "RealAccuracy",
    "record_epoch",
    "RunningMeans",
    "scaled_learning_rates",
    "SEVERITIES",
    "shown_channels",
    "small_enough",
    "Teacher",
    "TrainState",
    "TimeBudget",
    "trim_metrics",
    "UpdateTimer",
    "Watcher",
    "wrap_for_training",
]
