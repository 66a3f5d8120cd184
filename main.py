"""Train Strip-MLP, or any timm model, with the published recipe.

    python main.py --cfg configs/<leaf>.yaml --data-path <folder>
    torchrun --nproc_per_node 8 main.py --cfg configs/<leaf>.yaml --data-path <folder>

Read `train` for the order of a run, `train_one_epoch` for the loop, `accumulate_gradients` for the step.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import main_eval
from data import build_batch_transform, build_train_loader, build_val_loader, check_data
from models import accelerate, build_model, from_published
from utils.checkpoint import (
    BEST,
    LAST,
    CheckpointStore,
    capture,
    check_continuation,
    checkpoint_facts,
    load_weights,
    read_training_state,
    restore,
    starting_point,
    write_dump,
)
from utils.config import parse
from utils.errors import NonFiniteError
from utils.runtime import Run, StopRequest, start_run, torch_random_state
from utils.session import Session, located_errors, update_groups
from utils.training import (
    DataWatch,
    EvalResult,
    EvaluationStopped,
    NonFiniteGuard,
    Progress,
    RunningMeans,
    StepTimer,
    TrainState,
    averaged_batchnorm,
    bring_up,
    build_criterion,
    build_optimizer,
    build_precision,
    build_scheduler,
    epoch_row,
    evaluate,
    global_batch_size,
    log_step,
    poison_nonfinite,
    record_epoch,
    scaled_learning_rates,
    trim_metrics,
    wrap_for_training,
)

logger = logging.getLogger(__name__)

SLOW_SAVE_SECONDS = 20


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Command line: train, or with ``--eval`` and ``--throughput`` what ``main_eval.py`` does."""
    args, config = parse(argv, "Train Strip-MLP, or any timm model, with the published recipe.")
    if config.EVAL_MODE or config.THROUGHPUT_MODE:
        main_eval.run(args, config)
        return
    stop = StopRequest(config.TRAIN.MAX_RUN_MINUTES, config.TRAIN.SAVE_MINUTES)
    with start_run(config) as run, stop:
        run.write_status("running")
        try:
            with build_session(config, run, stop) as session:
                train(session, allow_change=args.allow_change)
        except BaseException as error:
            run.write_failure(error)
            raise


def train(session: Session, *, allow_change: Sequence[str] = ()) -> None:
    """Run the epochs that are left, from wherever the run starts."""
    config, run = session.config, session.run
    model, state = build_training(session)
    start(state, session, allow_change)
    if run.is_main:
        trim_metrics(run.output_dir / "metrics.jsonl", state.progress.epoch)
    while state.progress.epoch < config.TRAIN.EPOCHS:
        with located_errors(session, state):
            row = train_one_epoch(model, state, session)
            if not session.stop.agreed:
                finish_epoch(state, session, row)
        if session.stop.agreed:
            path = save(state, session)
            same = config.TRAIN.AUTO_RESUME and not config.MODEL.RESUME
            logger.warning(
                "stopped: %s. Continue with %s; the state is in %s",
                session.stop.agreed,
                "the same command" if same else f"--resume {path}",
                path,
            )
            run.write_status(
                "preempted",
                reason=session.stop.agreed,
                step=state.progress.global_step,
                epoch=state.progress.epoch,
                checkpoint=path.name,
            )
            return
    progress = state.progress
    logger.info(
        "done: best top-1 %.2f %% after epoch %d; checkpoints, metrics.jsonl and curves.png in %s",
        progress.best_acc1,
        progress.best_epoch,
        run.output_dir,
    )
    run.write_status("completed", step=progress.global_step, epoch=progress.epoch, best_acc1=progress.best_acc1)


def build_session(config, run: Run, stop: StopRequest) -> Session:
    """Build everything around the model. Problems of the data are found here, before the model is made."""
    loader = build_train_loader(config, device=run.device)
    val_loader = build_val_loader(config, device=run.device)
    check_data(config, loader.dataset, val_loader.dataset)
    transform = build_batch_transform(config, is_train=True, device=run.device, rank=run.rank)
    logger.info(
        "data: %s, %d training and %d validation samples in %d classes",
        config.DATA.DATASET,
        len(loader.dataset),
        len(val_loader.dataset),
        len(loader.dataset.classes),
    )
    return Session(
        config=config,
        run=run,
        precision=build_precision(config, run.device),
        loader=loader,
        val_loader=val_loader,
        transform=transform,
        val_transform=build_batch_transform(config, is_train=False, device=run.device, rank=run.rank),
        criterion=build_criterion(config, soft_targets=transform.mixes),
        store=CheckpointStore(run.output_dir, config.TRAIN.SAVE_KEEP),
        stop=stop,
        facts=checkpoint_facts(config, loader.dataset.classes, len(loader.dataset)),
    )


def build_training(session: Session) -> tuple[DistributedDataParallel, TrainState]:
    """Build the model, its distributed wrapper and what trains it; the state holds the bare model."""
    config, run = session.config, session.run
    model = accelerate(build_model(config).to(run.device), run.device)
    ddp_model = wrap_for_training(model, run.device, sync_bn=config.TRAIN.SYNC_BN)
    lrs = scaled_learning_rates(config, run.world_size)
    optimizer = build_optimizer(config, model, lrs.base)
    scheduler = build_scheduler(config, optimizer, lrs, session.updates_per_epoch)
    ema = None
    if config.TRAIN.EMA_DECAY > 0:
        ema = ModelEmaV3(model, decay=config.TRAIN.EMA_DECAY, use_warmup=config.TRAIN.EMA_WARMUP)
    logger.info(
        "model: %s, %s parameters, %s",
        config.MODEL.NAME,
        f"{sum(p.numel() for p in model.parameters()):,}",
        session.precision.description,
    )
    logger.info(
        "update: %d images (%d x %d process(es) x %d), %d updates an epoch, learning rate %g",
        global_batch_size(config, run.world_size),
        config.DATA.BATCH_SIZE,
        run.world_size,
        session.accumulation,
        session.updates_per_epoch,
        lrs.base,
    )
    guard = NonFiniteGuard(model, run.device, config.TRAIN.MAX_NONFINITE)
    state = TrainState(model, optimizer, scheduler, session.precision.scaler, guard, RunningMeans(run.device), ema)
    bring_up(
        ddp_model,
        config,
        averaged=ema.module if ema is not None else None,
        device=run.device,
        world_size=run.world_size,
        autocast=session.precision.autocast,
    )
    return ddp_model, state


def start(state: TrainState, session: Session, allow_change: Sequence[str]) -> None:
    """Fill the state: explicit --resume, else the run's own newest checkpoint, else --pretrained, else scratch."""
    config = session.config
    path = starting_point(config, session.store)
    if path is not None:
        payload = read_training_state(path)
        check_continuation(config, session.facts, payload, path, allow_change)
        restore(state, payload, path)
        done = session.updates_done(state.progress)
        if done:
            state.scheduler.step_update(done - 1)
        progress = state.progress
        if config.MODEL.PRETRAINED:
            logger.info("--pretrained %s is not read: the run goes on from a checkpoint", config.MODEL.PRETRAINED)
        logger.info(
            "resumed from %s: epoch %d, update %d, best top-1 %.2f %%",
            path,
            progress.epoch,
            progress.global_step,
            progress.best_acc1,
        )
    elif config.MODEL.PRETRAINED:
        load_weights(state.model, config.MODEL.PRETRAINED, remap=from_published, prefer_ema=True, replace_head=True)
        if state.ema is not None:
            state.ema.set(state.model)
    else:
        logger.info("starting from scratch, seed %d", config.SEED)
    session.store.set_aside_beyond(state.progress.global_step)


def train_one_epoch(model: DistributedDataParallel, state: TrainState, session: Session) -> dict[str, Any]:
    """Train on what is left of the epoch in progress; return its row for metrics.jsonl.

    Returns early, between two updates, when the processes agree to stop.
    """
    config, progress, timer = session.config, state.progress, StepTimer(session.run.device)
    watch = DataWatch(config, session.loader.num_workers)
    session.loader.sampler.set_progress(progress.epoch, progress.samples_seen)
    if progress.samples_seen == 0:
        state.means = RunningMeans(session.run.device)
    model.train()
    for group in timer.fetched(update_groups(session, state)):
        lr = state.optimizer.param_groups[0]["lr"]
        state.guard.begin(update_record(progress, group))
        loss = accumulate_gradients(model, group, state, session)
        state.scaler.unscale_(state.optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), config.TRAIN.CLIP_GRAD or math.inf)
        skipped = state.guard.finish(state.optimizer, state.scaler, grad_norm, loss)
        state.optimizer.zero_grad()

        images = len(group) * config.DATA.BATCH_SIZE * session.run.world_size
        progress.global_step += 1
        progress.samples_seen += images
        done = session.updates_done(progress)
        state.scheduler.step_update(done - 1)
        if state.ema is not None:
            state.ema.update(state.model, step=progress.global_step)
        state.means.add(loss, grad_norm, skipped)
        timer.step_done(images)

        if session.check_due(done):
            check_finite(state, session)
        if session.log_due(done):
            log_step(
                session.where(progress),
                state.means,
                timer,
                lr=lr,
                left=session.updates_left(progress),
                device=session.run.device,
            )
        if session.stop.poll():
            break
        due = config.TRAIN.SAVE_STEPS and progress.global_step % config.TRAIN.SAVE_STEPS == 0
        if (due or session.stop.save_due) and not state.guard.last_skipped():
            save(state, session)
    check_finite(state, session)
    row = epoch_row(state.means, timer, device=session.run.device)
    watch.report(row["data_wait"], row["seconds"])
    return row


def accumulate_gradients(
    model: DistributedDataParallel, group: list[tuple[Tensor, Tensor, Tensor]], state: TrainState, session: Session
) -> Tensor:
    """Forward and backward over the micro-batches of one update; return its mean loss, a number on the device.

    Gradients are summed over the micro-batches, each loss divided by their number, and reduced over the processes
    once, with the last one.
    """
    total = torch.zeros((), device=session.run.device)
    for number, (images, targets, indices) in enumerate(group):
        images, targets = session.transform(
            images,
            targets,
            indices,
            epoch=state.progress.epoch,
            update=state.progress.global_step * session.accumulation + number,
        )
        last = number == len(group) - 1
        with nullcontext() if last else model.no_sync():
            with session.precision.autocast():
                loss = session.criterion(model(images), targets) / len(group)
            state.scaler.scale(poison_nonfinite(loss)).backward()
        total += loss.detach()
    return total


def update_record(progress: Progress, group: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
    """What is needed to repeat the update that is about to be done."""
    return {
        "step": progress.global_step,
        "epoch": progress.epoch,
        "indices": [indices for _, _, indices in group],
        "rng": torch_random_state(),
    }


def check_finite(state: TrainState, session: Session) -> None:
    """Report skipped updates; stop the run after too many in a row, with a dump from which the last can be repeated."""
    try:
        state.guard.check(session.where(state.progress))
    except NonFiniteError as error:
        folder = session.run.output_dir
        path = write_dump(state, session.facts, folder, session.loader.dataset.sample_name)
        last = folder / LAST
        raise NonFiniteError(
            f"{error}. The last good checkpoint is {last if last.exists() else 'none yet'}; "
            f"repeat the update with: python tools/replay.py {path}"
        ) from None


def finish_epoch(state: TrainState, session: Session, row: dict[str, Any]) -> None:
    """Evaluate, remember the best, save and report. A stop during the evaluation leaves the epoch in progress."""
    config, progress = session.config, state.progress
    epoch = progress.epoch + 1
    result = None
    if epoch % config.TEST.INTERVAL == 0 or epoch == config.TRAIN.EPOCHS:
        try:
            result = validate(state, session)
        except EvaluationStopped:
            return
    is_best = result is not None and result.acc1 > progress.best_acc1
    if is_best:
        progress.best_acc1, progress.best_epoch = result.acc1, epoch
    progress.epoch, progress.samples_seen = epoch, 0
    bad_images = session.count_bad_images()
    if session.run.is_main:  # before saving: a restart in between repeats the evaluation and drops this row
        row = {
            "epoch": epoch,
            "step": progress.global_step,
            "lr": state.optimizer.param_groups[0]["lr"],
            **row,
            "skipped": state.guard.reported,
            "bad_images": bad_images,
            "best_acc1": progress.best_acc1,
        }
        record_epoch(session.run.output_dir, row, result)
    milestone = (f"ckpt_epoch_{epoch}.pth",) if epoch % config.SAVE_FREQ == 0 or epoch == config.TRAIN.EPOCHS else ()
    save(state, session, (*((BEST,) if is_best else ()), *milestone))


def validate(state: TrainState, session: Session) -> EvalResult:
    """Evaluate the model, or its averaged weights if there are any, on the whole validation set."""
    model = state.eval_model
    # a compiled model: a last, smaller batch is no reason to compile again
    with averaged_batchnorm(model), torch.compiler.set_stance("eager_on_recompile"):
        return evaluate(
            model,
            session.val_loader,
            device=session.run.device,
            autocast=session.precision.autocast,
            batch_transform=session.val_transform,
            should_stop=session.stop.poll,
        )


def save(state: TrainState, session: Session, names: tuple[str, ...] = ()) -> Path:
    """Write the state as the newest checkpoint and under ``names``. Collective."""
    started = time.monotonic()
    path = session.store.save(capture(state, session.facts), names)
    session.stop.saved()
    seconds = time.monotonic() - started
    logger.info("saved %s (%.1f s)", ", ".join((path.name, *names)), seconds)
    if seconds > SLOW_SAVE_SECONDS:
        logger.warning(
            "saving took %.0f s; torchrun kills a stopped run after 30 s unless told otherwise "
            "(--shutdown-timeout), so write to a faster disk or ask for the stop earlier",
            seconds,
        )
    return path


if __name__ == "__main__":
    main()
