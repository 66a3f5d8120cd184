"""Count the kernels that inductor would generate for a GPU, on a machine without one.

The graphs are cut and partitioned as ``torch.compile`` does it. Instead of generating code, each graph is lowered for
fake tensors of a GPU that has the properties of an H100, and inductor's scheduler fuses its operations. This uses
internals of PyTorch; it was written for torch 2.15.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx, ir
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

_LIMITS = {
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}
_H100 = DeviceProperties(type="cuda", index=0, multi_processor_count=132, cc=90, major=9, **_LIMITS)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let inductor find the properties of an H100, and Triton."""
    seen = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100", gcnArchName="", **_LIMITS)
    with (
        mock.patch.object(DeviceProperties, "create", return_value=_H100),
        mock.patch("torch.cuda.get_device_properties", return_value=seen),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
    ):
        yield


def counting_backend(add: Callable[[int, int], None]) -> Callable[[fx.GraphModule, Sequence[Tensor]], Any]:
    """Return a backend for ``torch.compile`` that calls ``add`` with the kernels and bytes of each graph that runs.

    The graphs themselves run operation by operation, as the tensors that they are given: fake ones, for example.
    """

    def count(graph: fx.GraphModule, inputs: Sequence[Any], *, is_backward: bool = False, **how: Any) -> Any:
        kernels, moved = _schedule(graph, inputs, is_backward, bool(how.get("is_inference")))
        run = graph.forward

        def counted(*args: Any) -> Any:
            add(kernels, moved)
            return run(*args)

        return make_boxed_func(counted)

    return lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=count)


def _schedule(graph: fx.GraphModule, inputs: Sequence[Any], is_backward: bool, is_inference: bool) -> tuple[int, int]:
    """Return the kernels of a graph on a GPU, and the bytes that they read and write, each buffer once a kernel."""
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        if node.target is torch.ops.aten.view.default:  # memory order may differ there
            node.target = torch.ops.aten.reshape.default
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(pretended_gpu())
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            inputs = [_on_gpu(x) if isinstance(x, Tensor) else x for x in inputs]
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(torch.no_grad())
        FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*inputs)
        compile_fx.record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=is_inference)
        lowered = GraphLowering(graph, example_inputs=inputs, is_backward=is_backward, is_inference=is_inference)
        for context in (
            V.set_debug_handler(DebugContext()),
            V.set_graph_handler(lowered),
            V.set_extern_kernel_nodes([]),
        ):
            stack.enter_context(context)
        lowered.run(*inputs)
        lowered._update_scheduler()
        kernels = sum(
            not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, ir.MultiOutput)
            for node in lowered.scheduler.nodes
        )
        return kernels, lowered.count_bytes()[0]


def _on_gpu(x: Tensor) -> Tensor:
    return torch.empty_strided(
        tuple(map(int, x.shape)), tuple(map(int, x.stride())), dtype=x.dtype, device=torch.device("cuda", 0)
    )
