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
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from yacs.config import CfgNode

import main_eval
from data import (
    build_batch_transform,
    build_train_loader,
    build_val_loader,
    check_data,
    check_transform,
    describe_classes,
    held_out_images,
)
from models import accelerate, build_model, check_model, fit_weights, from_published, frozen_parts
from utils.checkpoint import (
    BEST,
    CheckpointStore,
    checkpoint_metadata,
    load_teacher,
    load_weights,
    starting_point,
    warn_held_out,
    warn_preprocessing,
    weight_options,
)
from utils.config import parse, short_of_updates
from utils.runtime import Run, StopRequest, start_run, torch_random_state
from utils.session import Batch, Objective, Session, located_errors, update_groups
from utils.training import (
    EvalResult,
    NonFiniteGuard,
    Progress,
    RunningMeans,
    TrainState,
    UpdateTimer,
    Watcher,
    averaged_batchnorm,
    build_criterion,
    build_optimizer,
    build_precision,
    build_scheduler,
    check_compiler,
    class_weights,
    compile_and_warm_up,
    epoch_row,
    evaluate,
    global_batch_size,
    poison_nonfinite,
    record_epoch,
    scaled_learning_rates,
    trim_metrics,
    wrap_for_training,
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
    with stop, start_run(config) as run, build_session(config, run, stop) as session:
        train(session, allow_change=args.allow_change)
    if stop.exit_code:
        raise SystemExit(stop.exit_code)


def train(session: Session, *, allow_change: Sequence[str] = ()) -> None:
    """Run the epochs that are left, from wherever the run starts.

    Args:
        session: what surrounds the training state.
        allow_change: keys of the recipe that may differ from the checkpoint's (``--allow-change KEY``).
    """
    config, run = session.config, session.run
    log_data(session)
    model, state = build_training(session)
    load_starting_point(state, session, allow_change)
    progress = state.progress
    run.write_recipe(config)
    if run.is_main:
        if session.held_out is not None:
            session.held_out.write(run.output_dir)
        trim_metrics(run.output_dir / "metrics.jsonl", progress.epoch)
    session.check_free_space(state)
    session.watcher.start(progress.global_step, session.metadata["config"])
    session.stop.begin_training()
    while progress.epoch < config.TRAIN.EPOCHS:
        with located_errors(session, state):
            row = train_one_epoch(model, state, session)
            finished = not session.stop.agreed and finish_epoch(state, session, row)
        if not finished:
            preempt(state, session)
            return
    logger.info(
        "done: best top-1 %.2f %% after epoch %d; checkpoints, metrics.jsonl and curves.png in %s",
        progress.best_acc1,
        progress.best_epoch,
        run.output_dir,
    )
    run.write_status("completed", step=progress.global_step, epoch=progress.epoch, best_acc1=progress.best_acc1)


def build_session(config: CfgNode, run: Run, stop: StopRequest) -> Session:
    """Build everything around the model. Problems with settings and data are found here, before the model is built."""
    check_transform(config)
    check_model(config, run.device)
    check_compiler(config, run.device)
    loader = build_train_loader(config, device=run.device)
    val_loader = build_val_loader(config, device=run.device)
    check_data(config, loader.dataset, val_loader.dataset)
    dataset, num_classes = loader.dataset, len(loader.dataset.classes)
    transform = build_batch_transform(config, is_train=True, device=run.device, rank=run.rank, num_classes=num_classes)
    weights = class_weights(config, dataset.targets, num_classes)
    held_out = held_out_images(config, val_loader.dataset)
    metadata = checkpoint_metadata(config, dataset.classes, len(dataset), held_out and held_out.digest)
    teacher = load_teacher(config, run.device, metadata, build=build_model, remap=from_published)
    return Session(
        config=config,
        run=run,
        precision=build_precision(config, run.device),
        loader=loader,
        val_loader=val_loader,
        transform=transform,
        val_transform=build_batch_transform(config, is_train=False, device=run.device, rank=run.rank),
        criterion=build_criterion(config, soft_targets=transform.mixes, weights=weights).to(run.device),
        teacher=teacher,
        held_out=held_out,
        store=CheckpointStore(run.output_dir, config.TRAIN.SAVE_KEEP),
        stop=stop,
        watcher=Watcher(config.LOGGER, run.output_dir, is_main=run.is_main),
        metadata=metadata if teacher is None else {**metadata, "teacher": teacher.digest},
    )


def log_data(session: Session) -> None:
    """Log the size of the data and of its classes, and warn where the recipe is made for far more images."""
    config, dataset = session.config, session.loader.dataset
    logger.info(
        "data: %s, %d training and %d validation samples in %d classes%s%s",
        config.DATA.DATASET,
        len(dataset),
        len(session.val_loader.dataset),
        len(dataset.classes),
        "" if config.MODEL.NUM_CLASSES else " (MODEL.NUM_CLASSES 0: the head has as many outputs)",
        f"; held out by DATA.HOLDOUT {config.DATA.HOLDOUT:g}" if config.DATA.HOLDOUT else "",
    )
    logger.info("training images of each class: %s", describe_classes(dataset))
    warning = short_of_updates(config, len(dataset), session.updates_per_epoch)
    if warning:
        logger.warning("%s", warning)


def build_training(session: Session) -> tuple[DistributedDataParallel, TrainState]:
    """Build the model, its distributed wrapper and what trains it; the state holds the bare model."""
    config, run, precision = session.config, session.run, session.precision
    model = build_model(config, len(session.metadata["classes"])).to(run.device)
    model = accelerate(model, run.device, lean=config.TRAIN.LEAN)
    ddp_model = wrap_for_training(model, run.device, sync_bn=config.TRAIN.SYNC_BN)
    lrs = scaled_learning_rates(config, run.world_size)
    optimizer = build_optimizer(config, model, lrs.base)
    scheduler = build_scheduler(config, optimizer, lrs, session.updates_per_epoch)
    ema = None
    if config.TRAIN.EMA_DECAY > 0:
        ema = ModelEmaV3(model, decay=config.TRAIN.EMA_DECAY, use_warmup=config.TRAIN.EMA_WARMUP)
    parameters = sum(p.numel() for p in model.parameters())
    logger.info("model: %s, %s parameters, %s", config.MODEL.NAME, f"{parameters:,}", precision.description)
    if config.TRAIN.FREEZE != "none":
        logger.info("frozen, TRAIN.FREEZE %s: %s", config.TRAIN.FREEZE, ", ".join(frozen_parts(model)))
    logger.info(
        "update: %d images (%d x %d process(es) x %d), %d updates per epoch, learning rate %g",
        global_batch_size(config, run.world_size),
        config.DATA.BATCH_SIZE,
        run.world_size,
        session.accumulation,
        session.updates_per_epoch,
        lrs.base,
    )
    guard = NonFiniteGuard(model, run.device, config.TRAIN.MAX_NONFINITE)
    state = TrainState(model, optimizer, scheduler, precision.scaler, guard, RunningMeans(run.device), ema)
    compile_and_warm_up(
        ddp_model,
        config,
        averaged=ema.module if ema is not None else None,
        device=run.device,
        world_size=run.world_size,
        autocast=precision.autocast,
    )
    return ddp_model, state


def load_starting_point(state: TrainState, session: Session, allow_change: Sequence[str]) -> None:
    """Fill the state: from ``--resume``, else the run's own newest checkpoint, else ``--pretrained``, else nothing."""
    config = session.config
    path = starting_point(config, session.store)
    if path is not None:
        session.resume(state, path, allow_change)
        if config.MODEL.PRETRAINED:
            logger.info("--pretrained %s is not read: the run goes on from a checkpoint", config.MODEL.PRETRAINED)
    elif config.MODEL.PRETRAINED:
        _, metadata = load_weights(
            state.model,
            config.MODEL.PRETRAINED,
            remap=from_published,
            fit=fit_weights,
            prefer_ema=True,
            replace_head=True,
            classes=session.metadata["classes"],
            **weight_options(config),
        )
        warn_preprocessing(config, metadata, config.MODEL.PRETRAINED, state.model)
        warn_held_out(session.metadata.get("held_out"), metadata, config.MODEL.PRETRAINED)
        if state.ema is not None:
            state.ema.set(state.model)
    else:
        logger.info("starting from scratch, seed %d", config.SEED)
    session.store.set_aside_beyond(state.progress.global_step)


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
        state.guard.begin(update_record(progress, group))
        loss = accumulate_gradients(model, group, progress, session)
        state.scaler.unscale_(state.optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), config.TRAIN.CLIP_GRAD or math.inf)
        skipped = state.guard.step_unless_nonfinite(state.optimizer, state.scaler, grad_norm, loss)
        state.optimizer.zero_grad()

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


def finish_epoch(state: TrainState, session: Session, row: dict[str, Any]) -> bool:
    """Evaluate, remember the best, report and save.

    Returns:
        False if the processes agreed to stop during the evaluation; the epoch is still in progress then.
    """
    config, progress = session.config, state.progress
    epoch = progress.epoch + 1
    result = None
    if epoch % config.TEST.INTERVAL == 0 or epoch == config.TRAIN.EPOCHS:
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
    milestone = (f"ckpt_epoch_{epoch}.pth",) if epoch % config.SAVE_FREQ == 0 or epoch == config.TRAIN.EPOCHS else ()
    session.save(state, (*((BEST,) if is_best else ()), *milestone))
    return True


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
