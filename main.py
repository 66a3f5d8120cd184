"""Train Strip-MLP, or any timm model, with the published recipe.

    python main.py --cfg configs/<leaf>.yaml --data-path <folder>
    torchrun --nproc_per_node 8 main.py --cfg configs/<leaf>.yaml --data-path <folder>

Read ``train`` for the order of a run, ``train_one_epoch`` for the loop, ``accumulate_gradients`` for the loss.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import main_eval
from utils.assembly import build_session, build_training, load_starting_point, log_data, plan_updates
from utils.checkpoint import BEST
from utils.config import parse
from utils.rehearsal import rehearse
from utils.runtime import StopRequest, phase, start_run, torch_random_state
from utils.session import Batch, Objective, Session, located_errors, update_groups
from utils.training import (
    EvalResult,
    Progress,
    RunningMeans,
    TrainState,
    UpdateTimer,
    averaged_batchnorm,
    epoch_row,
    evaluate,
    poison_nonfinite,
    record_epoch,
    trim_metrics,
)

logger = logging.getLogger(__name__)


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Command line: train, or with ``--eval`` and ``--throughput`` what ``main_eval.py`` does."""
    args, config = parse(argv, "Train Strip-MLP, or any timm model, with the published recipe.")
    if config.EVAL_MODE or config.THROUGHPUT_MODE:
        main_eval.run(args, config)
        return
    stop = StopRequest(config.TRAIN.MAX_RUN_MINUTES, config.TRAIN.SAVE_MINUTES)
    with stop, start_run(config) as run, build_session(config, run, stop, update=update) as session:
        train(session, allow_change=args.allow_change)
    if stop.exit_code:
        raise SystemExit(stop.exit_code)


def train(session: Session, *, allow_change: Sequence[str] = ()) -> None:
    """Run the epochs that are left, from wherever the run starts.

    Args:
        session: what surrounds the training state.
        allow_change: keys of the recipe that may differ from the checkpoint's (``--allow-change KEY``).
    """
    log_data(session)
    model, state = build_training(session)
    costs = None
    if session.budget.seconds and not session.config.TRAIN.UPDATES:
        costs = rehearse(model, state, session, train_one_epoch=train_one_epoch, validate=validate)
    load_starting_point(state, session, allow_change)
    if costs is not None:
        session = plan_updates(state, session, costs)
    config, run, progress = session.config, session.run, state.progress
    run.write_recipe(config)
    if run.is_main:
        if session.held_out is not None:
            session.held_out.write(run.output_dir)
        trim_metrics(run.output_dir / "metrics.jsonl", progress.epoch)
    session.check_free_space(state)
    session.watcher.start(progress.global_step, session.metadata["config"])
    session.stop.begin_training()
    while progress.epoch < session.epochs:
        with located_errors(session, state):
            row = train_one_epoch(model, state, session)
            finished = not session.stop.agreed and finish_epoch(state, session, row)
            if not finished:
                preempt(state, session)
                return
    session.store.finish()
    logger.info(
        "done: best top-1 %.2f %% after epoch %d; checkpoints, metrics.jsonl and curves.png in %s",
        progress.best_acc1,
        progress.best_epoch,
        run.output_dir,
    )
    run.write_status("completed", step=progress.global_step, epoch=progress.epoch, best_acc1=progress.best_acc1)


@phase("training")
def train_one_epoch(model: DistributedDataParallel, state: TrainState, session: Session) -> dict[str, Any]:
    """Train on what is left of the epoch in progress; return its figures for ``metrics.jsonl``.

    Ends early, between two updates, when the processes agree to stop: then ``session.stop.agreed`` says why.
    """
    config, run, progress = session.config, session.run, state.progress
    timer = UpdateTimer(run.device)
    session.loader.sampler.set_progress(progress.epoch, progress.samples_seen)
    if progress.samples_seen == 0:
        state.means = RunningMeans(run.device)
    model.train()
    for group in timer.fetched(update_groups(session, state)):
        lr = state.learning_rate
        loss, grad_norm, skipped = update(model, state, group, session)

        images = len(group) * config.DATA.BATCH_SIZE * run.world_size
        progress.global_step += 1
        progress.samples_seen += images
        session.set_learning_rate(state)
        if state.ema is not None:
            state.ema.update(state.model, step=progress.global_step)
        state.means.add(loss, grad_norm, skipped)
        timer.update_done(images)
        if session.after_update(state, timer, lr=lr):
            break
    session.check_finite(state)
    return epoch_row(state.means, timer, device=run.device)


def update(
    model: DistributedDataParallel, state: TrainState, group: list[Batch], objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Do one optimizer update on its micro-batches; return (mean loss, gradient norm, whether it was skipped).

    All three are on the device: nothing in here waits for it.
    """
    state.guard.begin(update_record(state.progress, group))
    loss = accumulate_gradients(model, group, state.progress, objective)
    state.scaler.unscale_(state.optimizer)
    grad_norm = clip_grad_norm_(model.parameters(), objective.config.TRAIN.CLIP_GRAD or math.inf)
    skipped = state.guard.step_unless_nonfinite(state.optimizer, state.scaler, grad_norm, loss)
    state.optimizer.zero_grad()
    return loss, grad_norm, skipped


def accumulate_gradients(
    model: DistributedDataParallel, group: list[Batch], progress: Progress, objective: Objective
) -> Tensor:
    """Run forward and backward over the micro-batches of one update; return its mean loss, a number on the device.

    Gradients are summed over the micro-batches, each loss divided by their number, and reduced over the processes once,
    with the last one.

    Args:
        model: the wrapped model.
        group: the micro-batches.
        progress: before the update.
        objective: batch transform, loss and precision.
    """
    losses = []
    for number, (images, targets, indices) in enumerate(group):
        images, targets = objective.transform(
            images,
            targets,
            indices,
            epoch=progress.epoch,
            update=progress.global_step * objective.accumulation + number,
        )
        last = number == len(group) - 1
        with nullcontext() if last else model.no_sync():
            with objective.precision.autocast():
                loss = objective.loss(model(images), targets, images) / len(group)
            objective.precision.scaler.scale(poison_nonfinite(loss)).backward()
        losses.append(loss.detach())
    return sum(losses)


def update_record(progress: Progress, group: list[Batch]) -> dict[str, Any]:
    """Return what is needed to repeat the update that is about to be done."""
    return {
        "step": progress.global_step,
        "epoch": progress.epoch,
        "indices": [indices for _, _, indices in group],
        "rng": torch_random_state(),
    }


@phase("finishing the epoch")
def finish_epoch(state: TrainState, session: Session, row: dict[str, Any]) -> bool:
    """Evaluate, remember the best, report and save.

    Returns:
        False if the processes agreed to stop during the evaluation; the epoch is still in progress then.
    """
    config, progress = session.config, state.progress
    epoch = progress.epoch + 1
    result = None
    if epoch % config.TEST.INTERVAL == 0 or epoch == session.epochs:
        result = validate(state, session)
        if result is None:
            return False
    is_best = result is not None and result.acc1 > progress.best_acc1
    if is_best:
        progress.best_acc1, progress.best_epoch = result.acc1, epoch
    progress.epoch, progress.samples_seen = epoch, 0
    bad_images = session.count_bad_images()
    if session.run.is_main:  # before saving: a restart in between repeats the evaluation and drops this row
        row = {
            "epoch": epoch,
            "step": progress.global_step,
            "lr": state.learning_rate,
            **row,
            "skipped": state.guard.reported,
            "bad_images": bad_images,
            "best_acc1": progress.best_acc1,
        }
        row = record_epoch(session.run.output_dir, row, result)
        session.watcher.figures("epoch", row, progress.global_step)
        session.watcher.histogram(progress.global_step)
    milestone = (f"ckpt_epoch_{epoch}.pth",) if epoch % config.SAVE_FREQ == 0 or epoch == session.epochs else ()
    session.save(state, (*((BEST,) if is_best else ()), *milestone), background=True)
    return True


@phase("evaluating")
def validate(state: TrainState, session: Session) -> EvalResult | None:
    """Evaluate the model, or its averaged weights if there are any, on the whole validation set; None after a stop."""
    model = state.eval_model
    # if the model is compiled: run a last, smaller batch as it is rather than compile again
    with averaged_batchnorm(model), torch.compiler.set_stance("eager_on_recompile"):
        return evaluate(
            model,
            session.val_loader,
            device=session.run.device,
            autocast=session.precision.autocast,
            batch_transform=session.val_transform,
            should_stop=session.stop.poll,
            flip=session.config.TEST.FLIP,
            observe=session.watcher.observe,
        )


def preempt(state: TrainState, session: Session) -> None:
    """Save the state of a run that is asked to stop, and say how to continue it."""
    config, reason = session.config, session.stop.agreed
    path = session.save(state)
    same = config.TRAIN.AUTO_RESUME and not config.MODEL.RESUME
    command = "the same command" if same else f"--resume {path}"
    logger.warning("stopped: %s. Continue with %s; the state is in %s", reason, command, path)
    progress = state.progress
    session.run.write_status(
        "preempted", reason=reason, step=progress.global_step, epoch=progress.epoch, checkpoint=path.name
    )


if __name__ == "__main__":
    main()
