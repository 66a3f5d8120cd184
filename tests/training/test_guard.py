"""A non-finite update is skipped without a trace, counted, and ends the run after too many in a row."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from utils.errors import NonFiniteError
from utils.training.batchnorm import BufferBackup, batchnorm_buffers
from utils.training.guard import NonFiniteGuard, poison_nonfinite

CPU = torch.device("cpu")
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
}


class Training:
    """A model with BatchNorm and what trains it, as main.py does."""

    def __init__(self, optimizer: str = "adamw", *, limit: int = 3, scaled: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        self.guard = NonFiniteGuard(self.model, CPU, limit)
        self.number = 0

    def update(self, value: float = 0.0) -> bool:
        """One update on random images, with ``value`` added to one pixel; return whether it was skipped."""
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(self.number))
        images[0, 0, 0, 0] += value
        self.number += 1
        self.guard.begin({"step": self.number})
        self.scaler.scale(poison_nonfinite(self.model(images).square().mean())).backward()
        self.scaler.unscale_(self.optimizer)
        skipped = self.guard.step_unless_nonfinite(
            self.optimizer, self.scaler, clip_grad_norm_(self.model.parameters(), 5.0)
        )
        self.optimizer.zero_grad()
        return bool(skipped)

    def snapshot(self) -> tuple:
        return copy.deepcopy((dict(self.model.state_dict()), self.optimizer.state_dict()))


def same(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("value", (float("inf"), float("nan"), -float("inf")))
def test_skipped_update_leaves_no_trace(optimizer, value):
    training = Training(optimizer)
    assert not training.update()
    before = training.snapshot()
    assert training.update(value)
    assert same(training.snapshot(), before)
    assert not training.update()
    assert not same(training.snapshot(), before)
    assert all(torch.isfinite(tensor).all() for tensor in training.model.state_dict().values())


def test_one_bad_update_does_not_change_the_others():
    """The run ends in the bits of one that never met the bad batch."""
    with_bad, without = Training(), Training()
    for training in (with_bad, without):
        training.update()
    with_bad.update(float("inf"))
    for training in (with_bad, without):
        training.number = 5
        training.update()
    assert same(with_bad.snapshot(), without.snapshot())


def test_the_scale_of_float16_goes_down_and_the_update_is_skipped():
    training = Training(scaled=True)
    training.update()
    before = training.snapshot()
    assert training.update(float("inf"))
    assert same(training.snapshot(), before)
    assert training.scaler.get_scale() == 512.0


def test_finite_gradients_of_an_infinite_norm_are_skipped():
    training = Training()
    training.update()
    before = training.snapshot()
    training.guard.begin({})
    for parameter in training.model.parameters():
        parameter.grad = torch.full_like(parameter, 3e38)
    norm = clip_grad_norm_(training.model.parameters(), 5.0)
    assert training.guard.step_unless_nonfinite(training.optimizer, training.scaler, norm)
    assert same(training.snapshot(), before)


def test_counted_reported_and_stopped(caplog):
    training = Training(limit=3)
    nan = float("nan")
    for value in (nan, nan, 0.0, nan, nan):
        training.update(value)
    with caplog.at_level(logging.WARNING):
        assert training.guard.check("epoch 1") == 4
        assert training.guard.check("epoch 1") == 4
    assert training.guard.last_skipped()
    assert caplog.text.count("epoch 1: loss or gradient is not finite; 4 update(s) skipped, 4 so far, 2 in a row") == 1
    assert training.guard.state_dict() == {"skipped": 4, "in_a_row": 2}
    other = Training(limit=3)
    other.guard.load_state_dict(training.guard.state_dict())
    other.update(nan)
    with pytest.raises(NonFiniteError, match=r"epoch 2: .* in 3 updates in a row \(TRAIN.MAX_NONFINITE is 3\)"):
        other.guard.check("epoch 2")


def test_records_of_the_newest_updates():
    training = Training(limit=2)
    for _ in range(7):
        training.update()
    assert [record["step"] for record in training.guard.history] == [4, 5, 6, 7]


@pytest.mark.parametrize("loss", (float("inf"), float("nan"), -float("inf")))
def test_infinite_loss_has_no_harmless_gradient(loss):
    weight = torch.ones(3, requires_grad=True)
    infinite = (weight * 0.0).sum() + loss  # its own gradient is zero
    poison_nonfinite(infinite).backward()
    assert torch.isnan(weight.grad).all()


def test_finite_loss_is_unchanged():
    weight = torch.tensor([0.3, 0.7], requires_grad=True)
    loss = weight.square().sum()
    assert poison_nonfinite(loss).item() == loss.item()
    poison_nonfinite(loss).backward()
    assert torch.equal(weight.grad, 2 * weight)


def test_batchnorm_buffers_by_name():
    inner = nn.Sequential(nn.BatchNorm2d(2))
    model = nn.Sequential(nn.Conv2d(1, 1, 1), inner, nn.LayerNorm(3), nn.BatchNorm1d(1, affine=False))
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert list(batchnorm_buffers(model)) == [f"{prefix}.{name}" for prefix in ("1.0", "3") for name in buffers]
    assert batchnorm_buffers(nn.Linear(2, 2)) == {}


def test_backup_of_mixed_types_and_none():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor(7), torch.tensor([[3.0]])]
    backup = BufferBackup(tensors)
    backup.save()
    for tensor in tensors:
        tensor.mul_(5)
    backup.restore_where(torch.tensor(False))
    assert tensors[1].item() == 35
    backup.restore_where(torch.tensor(True))
    assert (tensors[0].tolist(), tensors[1].item(), tensors[2].tolist()) == ([1.0, 2.0], 7, [[3.0]])
    empty = BufferBackup([])
    empty.save()
    empty.restore_where(torch.tensor(True))
