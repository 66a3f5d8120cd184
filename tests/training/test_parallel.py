"""The distributed wrapper, in one process."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from utils.training import wrap_for_training


@pytest.fixture
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)
    dist.destroy_process_group()


class _ContiguousGradient(torch.autograd.Function):
    """The identity; the gradient has the strides that cuDNN gives it for a map of one position."""

    @staticmethod
    def forward(_ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad.as_strided(grad.shape, (grad.shape[1], 1, 1, 1))


class _Conv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _ContiguousGradient.apply(self.weight), self.bias)


@pytest.mark.usefixtures("_process_group")
def test_gradients_that_differ_in_strides_without_meaning_are_no_warning() -> None:
    model = wrap_for_training(_Conv(4, 6, 1), torch.device("cpu"))
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    with warnings.catch_warnings(record=True) as caught:
        model(x).square().sum().backward()
    assert not caught
    weight, bias = (p.grad.clone() for p in model.parameters())
    plain = nn.Conv2d(4, 6, 1)
    plain.load_state_dict(model.module.state_dict())
    plain(x).square().sum().backward()
    torch.testing.assert_close((weight, bias), (plain.weight.grad, plain.bias.grad))
