"""Count what a network executes, without running it: kernels, bytes, activations kept, waits of the host.

Nothing is computed: tensors are PyTorch's fake ones, which know their shape, type and device alone. So the path that a
GPU takes can be counted on any machine, in seconds, and the same code always gives the same figures. What counts:

- kernels: calls of operations that read or write memory; a view is none. (A backward convolution is one call.)
- bytes: each input of a kernel read once, each output written once, with expanded inputs at their true size.
- kept: what autograd keeps from the forward to the backward pass, each storage once, parameters and buffers aside.
- waits: results that the host reads, and copies between host and device; each makes the host wait for a GPU.

A training step is forward pass, cross-entropy and backward pass, without DropPath and optimizer; a forward pass is not
the first one. ``--compiled`` also counts the kernels and bytes of compiled code as inductor schedules it for a GPU, and
what it keeps.
"""

import contextlib
import math
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import gpu_path
from tools.bench.candidates import PRECISIONS, Candidate, Setting, autocast, build_network, in_form
from tools.bench.report import Report, Table
from tools.bench.scheduled import counting_backend
from utils.training import compile_model

MB = 1e6
_READ_BY_HOST = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"})


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.set_defaults(device=torch.device("cuda"))
    parser.add_argument("models", nargs="+", metavar="MODEL", help="NAME[:FORM][:PRECISION], see benchmark.py --help")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="default: fp32")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--img-size", type=int, default=224, metavar="PIXELS", help="default: 224")
    parser.add_argument(
        "--by", nargs="+", default=[], choices=("operation", "part"), help="also break the figures down"
    )
    parser.add_argument(
        "--depth", type=int, default=4, metavar="N", help="levels of module names in a part (default: 4)"
    )
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="rows of a breakdown (default: 20)")
    parser.add_argument("--compiled", action=BooleanOptionalAction, default=False, help="also count compiled code")
    parser.add_argument(
        "--memory-budget", type=float, default=1.0, metavar="X", help="of --compiled: as TRAIN.MEMORY_BUDGET"
    )
    parser.add_argument(
        "--combo-kernels",
        action=BooleanOptionalAction,
        default=False,
        help="of --compiled: let inductor merge small kernels (torch._inductor.config.combo_kernels)",
    )


def run(args: Namespace, report: Report) -> None:
    """Report a table of all networks, and for each the breakdowns that were asked for."""
    rows, breakdowns = [], []
    for candidate in (Candidate.parse(text, precision=args.precision) for text in args.models):
        setting = Setting("train", args.batch, args.img_size, args.device, channels_last=True)
        row: dict[str, Any] = {"label": candidate.label}
        for mode in ("infer",) if candidate.form.startswith("inference") else ("train", "infer"):
            counts = count(candidate, setting, mode)
            row |= {f"{mode} {key}": value for key, value in counts.per_image(args.batch).items()}
            breakdowns += [_breakdown(candidate, mode, counts, by, args) for by in args.by]
            if args.compiled:
                with torch._inductor.config.patch(combo_kernels=args.combo_kernels):
                    compiled = count_compiled(candidate, setting, mode, counts, budget=args.memory_budget)
                row |= {f"compiled {mode} {key}": value for key, value in compiled.per_image(args.batch).items()}
        rows.append(row)
    title = (
        f"counts on {args.device.type}, batch {args.batch}, {args.img_size} x {args.img_size}, {args.precision}; "
        "kernels and waits per step, MB per image"
    )
    wanted = ("kernels", "MB", "kept", "waits")
    tables = [Table(title, _columns("", wanted), rows, {"batch": args.batch})]
    if args.compiled:
        title = f"the same, compiled for a GPU by inductor, TRAIN.MEMORY_BUDGET {args.memory_budget:g}"
        title += ", combo kernels" if args.combo_kernels else ""
        tables.append(Table(title, _columns("compiled ", wanted[:3]), rows, {"batch": args.batch}))
    for table in (*tables, *breakdowns):
        report.add(table)


def _columns(kind: str, wanted: Sequence[str]) -> list[tuple[str, str]]:
    """Return the headings and keys of a table's columns."""
    keys = [f"{mode} {key}" for mode in ("train", "infer") for key in wanted if (mode, key) != ("infer", "kept")]
    return [("", "label"), *((key.replace("kept", "kept MB"), kind + key) for key in keys)]


@dataclass
class Counts:
    """What one step executed.

    Attributes:
        kernels, moved: calls and bytes, by (operation, part of the network).
        kept: bytes kept for the backward pass, by part of the network.
        waits: times that the host had to wait, by operation.
    """

    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def per_image(self, batch: int) -> dict[str, float]:
        """Return the totals: kernels and waits of the step, megabytes per image."""
        return {
            "kernels": self.kernels.total(),
            "MB": round(self.moved.total() / MB / batch, 1),
            "kept": round(self.kept.total() / MB / batch, 1),
            "waits": self.waits.total(),
        }


def count(candidate: Candidate, setting: Setting, mode: str) -> Counts:
    """Count one training step (``mode`` ``"train"``) or one forward pass (``"infer"``) of a candidate.

    Raises:
        ValueError: the form does not exist without a compiler or a GPU.
    """
    if candidate.form.endswith(("compiled", "graphed")):
        raise ValueError(f"{candidate.label}: only what runs operation by operation can be counted; see --compiled")
    network = in_form(_without_drop_path(build_network(candidate, setting.img_size)), candidate, setting, mode=mode)
    with _path_of(setting.device), FakeTensorMode():
        return _count(_fake(network), candidate, setting, mode)


def _path_of(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which our networks take the path of ``device``; PyTorch can fake a CPU's tensors anywhere."""
    return contextlib.nullcontext() if device.type == "cpu" else gpu_path()


def _count(network: nn.Module, candidate: Candidate, setting: Setting, mode: str) -> Counts:
    images, cpu = torch.empty(setting.batch, 3, setting.img_size, setting.img_size), torch.device("cpu")
    images = images.contiguous(memory_format=torch.channels_last if setting.channels_last else torch.contiguous_format)
    targets = torch.empty(setting.batch, dtype=torch.int64)
    parts = _Parts(network)
    if mode == "infer":
        for counts in (Counts(), Counts()):  # the first call may bring weights into another form
            with torch.no_grad(), autocast(candidate.precision, cpu), parts, _Counting(counts, parts.part):
                network(images)
        return counts
    counts = Counts()
    keeping = _keeping(network, lambda size: counts.kept.update({parts.part(): size}))
    with parts, _Counting(counts, parts.part):
        with keeping, autocast(candidate.precision, cpu):
            loss = F.cross_entropy(network(images), targets)
        loss.backward()
    return counts


class _Parts(TorchFunctionMode):
    """Knows which part of a network is at work, in the forward and in the backward pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in network.named_modules()}
        self._stack: list[str] = []

    def __enter__(self) -> "_Parts":
        hooks = register_module_forward_pre_hook(self._start), register_module_forward_hook(self._end)
        self._hooks = hooks  # global ones: modules with hooks of their own would not be taken for plain
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def _start(self, module: nn.Module, _inputs: Any) -> None:
        words = self._names.get(module, "").split(".")
        self._stack.append(".".join("*" if word.isdigit() else word for word in words))

    def _end(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._mark(output)  # also what came from an autograd function, whose calls are not seen
        self._stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._mark(result)
        return result

    def _mark(self, result: Any) -> None:
        """Note for all nodes of the backward graph that led to ``result`` and have no part yet whose they are."""
        if self._stack:
            nodes = [x.grad_fn for x in tree_leaves(result) if isinstance(x, Tensor) and x.grad_fn is not None]
            while nodes:
                node = nodes.pop()
                if "part" not in node.metadata:
                    node.metadata["part"] = self._stack[-1]
                    nodes += [following for following, _ in node.next_functions if following is not None]

    def part(self) -> str:
        """Return the name of the innermost module at work, numbers as ``*``; empty outside all modules."""
        node = torch._C._current_autograd_node()
        return node.metadata.get("part", "") if node is not None else self._stack[-1] if self._stack else ""


class _Counting(TorchDispatchMode):
    """Adds every operation to ``counts``."""

    def __init__(self, counts: Counts, part: Callable[[], str]) -> None:
        super().__init__()
        self._counts, self._part = counts, part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _READ_BY_HOST:
            self._counts.waits[name] += 1
        if name == "_local_scalar_dense":
            return 1  # a fake tensor has no value
        result = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if len({x.device.type for x in (*inputs, *outputs) if x.dim() > 0}) > 1:
            self._counts.waits[name] += 1
        moved = _moved(func, args, kwargs, inputs, outputs)
        if moved:
            key = (name, self._part())
            self._counts.kernels[key] += 1
            self._counts.moved[key] += moved
        return result


def _moved(func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Return the bytes that a call reads and writes, 0 if it only makes a view or reserves memory."""
    written, only_written = [], []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            (only_written if argument.is_out else written).extend(
                x for x in tree_leaves(value) if isinstance(x, Tensor)
            )
    known = {_storage(x) for x in inputs}
    written += only_written + [x for x in outputs if _storage(x) not in known]
    if not written or func.overloadpacket.__name__.startswith(("empty", "new_empty")):
        return 0
    skipped = {id(x) for x in only_written}
    read = {(_storage(x), x.storage_offset(), x.shape): x for x in inputs if id(x) not in skipped}
    return sum(map(_size, read.values())) + sum(map(_size, written))


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _size(x: Tensor) -> int:
    """Return the bytes of a tensor in memory: an axis along which it was expanded is there once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * x.element_size()


@contextlib.contextmanager
def _keeping(network: nn.Module, add: Callable[[int], None]) -> Iterator[None]:
    """Call ``add`` with the bytes of each storage that autograd keeps, those of the network's own tensors aside."""
    seen = {_storage(x) for x in (*network.parameters(), *network.buffers())}

    def pack(x: Tensor) -> Tensor:
        storage = _storage(x)
        if storage not in seen:
            seen.add(storage)
            add(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield


def count_compiled(candidate: Candidate, setting: Setting, mode: str, eager: Counts, *, budget: float = 1.0) -> Counts:
    """Count a training step or a forward pass of the compiled network, as inductor schedules it for a GPU.

    Args:
        candidate, setting, mode: as for ``count``.
        eager: its result; what stays outside compiled code is taken from it.
        budget: as ``TRAIN.MEMORY_BUDGET``.
    """
    network = in_form(_without_drop_path(build_network(candidate, setting.img_size)), candidate, setting, mode=mode)
    counts = Counts()
    if hasattr(network, "compile_blocks"):
        outside = [key for key in eager.kernels if not key[1].startswith("stages.")]
        for key in outside:
            counts.kernels[key], counts.moved[key] = eager.kernels[key], eager.moved[key]

    def add(kernels: int, moved: int) -> None:
        counts.kernels["compiled", ""] += kernels
        counts.moved["compiled", ""] += moved

    torch._dynamo.reset()
    with config.patch(activation_memory_budget=budget), _path_of(setting.device), FakeTensorMode():
        network = _fake(network)
        compile_model(network, backend=counting_backend(add))
        images = torch.empty(setting.batch, 3, setting.img_size, setting.img_size)
        images = images.to(memory_format=torch.channels_last)
        keeping = _keeping(network, lambda size: counts.kept.update({"": size}))
        with torch.set_grad_enabled(mode == "train"), keeping, autocast(candidate.precision, images.device):
            scores = network(images)
        if mode == "train":
            scores.backward(torch.empty_like(scores))
    torch._dynamo.reset()
    return counts


def _without_drop_path(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return network


def _fake(network: nn.Module) -> nn.Module:
    """Replace the tensors of a network by fake ones, in place; must run within a ``FakeTensorMode``."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_empty(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _empty(buffer)
    return network


def _empty(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)


def _breakdown(candidate: Candidate, mode: str, counts: Counts, by: str, args: Namespace) -> Table:
    """Return a table of the largest operations or parts, by bytes."""

    def group(key: tuple[str, str]) -> str:
        return key[0] if by == "operation" else ".".join(key[1].split(".")[: args.depth]) or "(outside)"

    kernels, moved, kept = Counter(), Counter(), Counter()
    for key, number in counts.kernels.items():
        kernels[group(key)] += number
        moved[group(key)] += counts.moved[key]
    for part, size in counts.kept.items():
        kept[group(("", part))] += size
    rows = [
        {
            "label": label,
            "kernels": kernels[label],
            "MB": round(size / MB / args.batch, 1),
            "kept": round(kept[label] / MB / args.batch, 1),
        }
        for label, size in moved.most_common(args.rows)
    ]
    columns = [("", "label"), ("kernels", "kernels"), ("MB", "MB")]
    return Table(
        f"{candidate.label}, {mode}, by {by}",
        [*columns, ("kept MB", "kept")] if by == "part" and mode == "train" else columns,
        rows,
    )
