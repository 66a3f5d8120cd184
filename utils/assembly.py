"""Put a run together before its first update: the data, the session, the model and what trains it."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from data import (
    ImageDataset,
    ImageLoader,
    build_batch_transform,
    build_train_loader,
    build_val_loader,
    check_data,
    check_transform,
    data_facts,
    describe_classes,
    held_out_images,
)
from models import accelerate, build_model, check_model, fit_weights, from_published, frozen_parts
from utils.checkpoint import (
    CheckpointStore,
    checkpoint_metadata,
    kept_plan,
    load_teacher,
    load_weights,
    resolve_source,
    sha256,
    starting_point,
    warn_held_out,
    warn_preprocessing,
    weight_options,
)
from utils.config import dump_config, read_duration, short_of_updates
from utils.rehearsal import group_of_one, noise_batches, plan_batch
from utils.runtime import SAME_FILES, Run, StopRequest, on_main_process, phase, require_agreement
from utils.session import Batch, Objective, Session
from utils.training import (
    Costs,
    NonFiniteGuard,
    RunningMeans,
    TimeBudget,
    TrainState,
    Watcher,
    batch_choices,
    build_criterion,
    build_optimizer,
    build_precision,
    build_scheduler,
    check_compiler,
    class_weights,
    compile_and_warm_up,
    global_batch_size,
    plan_length,
    scaled_learning_rates,
    wrap_for_training,
)

logger = logging.getLogger(__name__)

Update = Callable[[DistributedDataParallel, TrainState, list[Batch], Objective], Any]  # ``main.update``


@phase("reading the data")
def build_session(config: CfgNode, run: Run, stop: StopRequest, *, update: Update) -> Session:
    """Build everything around the model. Problems with settings and data are found here, before the model is built.

    Args:
        config: the configuration as given.
        run: its processes and its folder.
        stop: hears requests to stop.
        update: does an optimizer update (``main.update``), to try which batch fits the memory.
    """
    least = batch_choices(config, run.world_size)[-1]
    return assemble_session(config, run, stop, *check_and_load(least, run.device), update=update)


def check_and_load(
    config: CfgNode,
    device: torch.device,
    *,
    world_size: int | None = None,
    part: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> tuple[ImageLoader | None, ImageLoader | None]:
    """Check settings and data, which takes no measuring; return the loaders of training and validation.

    Args:
        config: the configuration.
        device: where the run computes.
        world_size: number of processes to check for; None: of this run.
        part: context for a part of the checks. tools/preflight.py goes on after an error; what could not be loaded is
            None then.
    """
    loader = val_loader = None
    with part("transform"):
        check_transform(config)
    with part("model"):
        check_model(config, device)
    with part("compiler"):
        check_compiler(config, device)
    with part("training images"):
        loader = build_train_loader(config, device=device)
    with part("validation images"):
        val_loader = build_val_loader(config, device=device)
    with part("classes and batch"):
        datasets = [each if each is None else each.dataset for each in (loader, val_loader)]
        check_data(config, *datasets, world_size=world_size)
    return loader, val_loader


def assemble_session(
    config: CfgNode, run: Run, stop: StopRequest, loader: ImageLoader, val_loader: ImageLoader, *, update: Update
) -> Session:
    """Put together what surrounds the model, with loaders that have been checked, and plan the batch if asked to."""
    dataset, val_dataset = loader.dataset, val_loader.dataset
    held_out = held_out_images(config, val_dataset)
    metadata = checkpoint_metadata(config, dataset.classes, len(dataset), held_out and held_out.digest)
    objective = build_objective(config, run, metadata, dataset)
    if objective.teacher is not None:
        metadata["teacher"] = objective.teacher.digest
    require_agreement(
        lambda: {
            **data_facts(config, train=dataset, val=val_dataset),
            "weights of the teacher": metadata.get("teacher"),
        },
        remedy=SAME_FILES,
    )
    store = CheckpointStore(run.output_dir, config.TRAIN.SAVE_KEEP)
    kept = kept_plan(config, store, run.world_size, restarted=run.restarted)
    two_updates = partial(try_updates, objective=objective, run=run, num_classes=len(dataset.classes), update=update)
    needed = partial(check_model, device=run.device)
    planned = plan_batch(config, kept, run, len(dataset), needed=needed, two_updates=two_updates)
    if config.TRAIN.GLOBAL_BATCH:
        loader = build_train_loader(planned, device=run.device, dataset=dataset)
        val_loader = build_val_loader(planned, device=run.device, dataset=val_dataset)
    session = Session(
        **vars(objective),
        run=run,
        loader=loader,
        val_loader=val_loader,
        val_transform=build_batch_transform(config, is_train=False, device=run.device, rank=run.rank),
        held_out=held_out,
        store=store,
        stop=stop,
        watcher=Watcher(config.LOGGER, run.output_dir, is_main=run.is_main),
        metadata=metadata,
        budget=TimeBudget(read_duration(config.TRAIN.TIME_BUDGET), stop.started),
    )
    return session if planned is config and not config.TRAIN.UPDATES else with_config(session, planned)


def build_objective(config: CfgNode, run: Run, metadata: dict[str, Any], dataset: ImageDataset) -> Objective:
    """Build what turns a batch of any size into a loss."""
    num_classes = len(dataset.classes)
    transform = build_batch_transform(config, is_train=True, device=run.device, rank=run.rank, num_classes=num_classes)
    weights = class_weights(config, dataset.targets, num_classes)
    return Objective(
        config=config,
        precision=build_precision(config, run.device),
        transform=transform,
        criterion=build_criterion(config, soft_targets=transform.mixes, weights=weights).to(run.device),
        teacher=load_teacher(config, run.device, metadata, build=build_model, remap=from_published),
    )


def try_updates(config: CfgNode, objective: Objective, run: Run, num_classes: int, *, update: Update) -> None:
    """Build what trains with the batch of ``config`` and do two updates on random images, on this process alone."""
    objective = replace(objective, config=config)
    with group_of_one(run.rank) as group:
        model, state = build_state(objective, run, num_classes, updates_per_epoch=100, group=group)
        for _ in range(2):
            update(model, state, noise_batches(config, num_classes, count=min(2, objective.accumulation)), objective)
            state.progress.global_step += 1
            if state.ema is not None:
                state.ema.update(state.model, step=state.progress.global_step)


def plan_updates(state: TrainState, session: Session, costs: Costs) -> Session:
    """Return the session of a run that fills its time budget, and give ``state`` its schedule. Collective."""
    done, per_epoch = session.updates_done(state.progress), session.updates_per_epoch
    config = on_main_process(lambda: plan_length(session.config, costs, session.budget, per_epoch, done=done))
    session = with_config(session, config)
    lrs = scaled_learning_rates(config, session.run.world_size)
    state.scheduler = build_scheduler(config, state.optimizer, lrs, session.schedule_epoch)
    session.set_learning_rate(state)
    return session


def with_config(session: Session, config: CfgNode) -> Session:
    """Return the session under a configuration that was planned; all that depends on the length of the run follows."""
    session = replace(session, config=config, metadata={**session.metadata, "config": dump_config(config)})
    return replace(
        session,
        transform=build_batch_transform(
            config,
            is_train=True,
            device=session.run.device,
            rank=session.run.rank,
            num_classes=len(session.metadata["classes"]),
            epochs=session.total_updates / session.updates_per_epoch,
        ),
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


@phase("building the model")
def build_training(session: Session) -> tuple[DistributedDataParallel, TrainState]:
    """Build the model, its distributed wrapper and what trains it; the state holds the bare model."""
    config, run = session.config, session.run
    model, state = build_state(session, run, len(session.metadata["classes"]), session.schedule_epoch)
    logger.info(
        "update: %d images (%d x %d process(es) x %d), %d updates per epoch, learning rate %g",
        global_batch_size(config, run.world_size),
        config.DATA.BATCH_SIZE,
        run.world_size,
        session.accumulation,
        session.updates_per_epoch,
        scaled_learning_rates(config, run.world_size).base,
    )
    return model, state


def build_state(
    objective: Objective, run: Run, num_classes: int, updates_per_epoch: float, group: ProcessGroup | None = None
) -> tuple[DistributedDataParallel, TrainState]:
    """Build what ``build_training`` returns, for the processes of a group (None: all)."""
    config, precision = objective.config, objective.precision
    model = build_model(config, num_classes).to(run.device)
    model = accelerate(model, run.device, lean=config.TRAIN.LEAN)
    ddp_model = wrap_for_training(
        model, run.device, sync_bn=config.TRAIN.SYNC_BN, grad_compression=config.TRAIN.GRAD_COMPRESSION, group=group
    )
    lrs = scaled_learning_rates(config, run.world_size)
    optimizer = build_optimizer(config, model, lrs.base)
    scheduler = build_scheduler(config, optimizer, lrs, updates_per_epoch)
    ema = None
    if config.TRAIN.EMA_DECAY > 0:
        ema = ModelEmaV3(model, decay=config.TRAIN.EMA_DECAY, use_warmup=config.TRAIN.EMA_WARMUP)
    parameters = sum(p.numel() for p in model.parameters())
    logger.info("model: %s, %s parameters, %s", config.MODEL.NAME, f"{parameters:,}", precision.description)
    if config.TRAIN.FREEZE != "none":
        logger.info("frozen, TRAIN.FREEZE %s: %s", config.TRAIN.FREEZE, ", ".join(frozen_parts(model)))
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


@phase("loading the starting point")
def load_starting_point(state: TrainState, session: Session, allow_change: Sequence[str]) -> None:
    """Fill the state: from ``--resume``, else the run's own newest checkpoint, else ``--pretrained``, else nothing."""
    config = session.config
    path = starting_point(config, session.store, restarted=session.run.restarted)
    if path is not None:
        session.resume(state, path, allow_change)
        if config.MODEL.PRETRAINED:
            logger.info("--pretrained %s is not read: the run goes on from a checkpoint", config.MODEL.PRETRAINED)
    elif config.MODEL.PRETRAINED:
        source = resolve_source(config.MODEL.PRETRAINED)
        require_agreement(lambda: {"MODEL.PRETRAINED (SHA-256)": sha256(source)}, remedy=SAME_FILES)
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
