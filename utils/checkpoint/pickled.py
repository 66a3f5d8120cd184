"""Pickles of tensors and plain types, read without Python's or PyTorch's unpickler.

The few opcodes that such a pickle needs are interpreted here. Nothing that a file names is imported or called: a name
is looked up in a table of our own functions, and what is not in it is refused. Tensors come back as ``TensorSpec``;
whoever reads their bytes checks them first. Time and memory are bounded by the number of opcodes.
"""

import collections
import io
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

MAX_BYTES = 2**26  # of a pickle; that of a model with 10,000 tensors has 2 MB
MAX_OPCODES = 3_000_000
_MAX_KEY = 1000  # characters
_KEYS = (str, int, bool, type(None), bytes)  # a tuple of tuples could take for ever to hash


class PickleFault(ValueError):
    """The pickle is damaged, or more than tensors and plain types."""


@dataclass(frozen=True)
class StorageSpec:
    """Where a tensor's bytes are: ``key`` in the file, ``numel`` elements of ``dtype`` (None: bytes of any type)."""

    key: str
    dtype: torch.dtype | None
    numel: int

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.numel * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the file describes it; ``contiguous`` tells that it is its whole storage, in order."""

    storage: StorageSpec
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        count = 1
        for n in self.size:
            count *= n
        return count

    @property
    def contiguous(self) -> bool:
        """Return whether the bytes of the storage are the tensor's, in their order."""
        expected, whole = 1, self.numel * self.dtype.itemsize == self.storage.nbytes
        for n, step in zip(reversed(self.size), reversed(self.stride), strict=True):
            if n != 1 and step != expected:
                return False
            expected *= n
        return whole and self.offset == 0


@dataclass(eq=False)
class Unknown:
    """What stands for a class or function that the file names and this project does not know, or for its result.

    Attributes:
        name: its dotted name in the file.
        items: what the file puts into it where it is filled as a mapping.
    """

    name: str
    items: dict[Any, Any] = field(default_factory=dict)


def _tensor(storage: StorageSpec, offset: int, size: tuple, stride: tuple, *_: Any) -> TensorSpec:
    if not isinstance(storage, StorageSpec) or storage.dtype is None:
        raise PickleFault("a tensor without a typed storage")
    return _checked(TensorSpec(storage, storage.dtype, offset, tuple(size), tuple(stride)))


def _tensor_of_bytes(storage: StorageSpec, offset: int, size: tuple, stride: tuple, *rest: Any) -> TensorSpec:
    dtype = rest[2]
    if not isinstance(storage, StorageSpec) or not isinstance(dtype, torch.dtype):
        raise PickleFault("a tensor without a storage or type")
    return _checked(TensorSpec(storage, dtype, offset, tuple(size), tuple(stride)))


def _checked(spec: TensorSpec) -> TensorSpec:
    """Return ``spec`` if it lies within its storage."""
    numbers = (spec.offset, *spec.size, *spec.stride)
    if any(type(n) is not int or not 0 <= n < 2**48 for n in numbers) or len(spec.size) != len(spec.stride):
        raise PickleFault(f"a tensor of shape {list(spec.size)} and strides {list(spec.stride)}")
    if len(spec.size) > 16 or spec.numel >= 2**48:
        raise PickleFault(f"a tensor of {len(spec.size)} dimensions and {spec.numel} elements")
    end = spec.offset + 1 + sum((n - 1) * step for n, step in zip(spec.size, spec.stride, strict=True))
    if spec.numel and end * spec.dtype.itemsize > spec.storage.nbytes:
        raise PickleFault(f"a tensor of shape {list(spec.size)} on {spec.storage.nbytes} bytes")
    return spec


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _mapping(pairs: Any = ()) -> collections.OrderedDict:
    result: collections.OrderedDict = collections.OrderedDict()
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        _set_items(result, [key, value])
    return result


def _set(items: Any = ()) -> set:
    if not isinstance(items, (list, tuple)) or any(type(item) not in _KEYS for item in items):
        raise PickleFault("a set of other things than plain values")
    return set(items)


def _encoded(text: str, encoding: str = "") -> bytes:
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise PickleFault(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_FUNCTIONS: dict[str, Any] = {
    "collections.OrderedDict": _mapping,
    "builtins.set": _set,
    "builtins.complex": complex,
    "_codecs.encode": _encoded,
    "torch.Size": tuple,
    "torch.device": lambda *words: ":".join(map(str, words)),
    "torch.storage.UntypedStorage": StorageSpec("", None, 0),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    **{f"torch.{name}Storage": StorageSpec("", dtype, 0) for name, dtype in _STORAGES.items()},
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}

_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINSTRING",
    "SHORT_BINSTRING",
    "BINBYTES",
    "SHORT_BINBYTES",
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Reader:
    """Reads pickles.

    Args:
        known: further names and what is called in their place, ``{'module.name': function}``.

    Attributes:
        unknown: the names that were found and not known; their values came back as ``Unknown``.
        storages: what the pickle says about each storage, by its key.
    """

    def __init__(self, known: Mapping[str, Any]) -> None:
        self._functions = {**_FUNCTIONS, **known}
        self.unknown: set[str] = set()
        self.storages: dict[str, StorageSpec] = {}
        self._count = 0

    def read(self, file: io.BytesIO) -> Any:
        """Return the next value in ``file``, which stands after it then.

        Raises:
            PickleFault: damaged, too large, or not of tensors and plain types.
        """
        try:
            return self._run(file)
        except PickleFault:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise PickleFault(f"its pickle is damaged: {str(error)[:100] or type(error).__name__}") from error

    def _run(self, file: io.BytesIO) -> Any:
        self._stack, self._marks, self._memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(file):
            self._count += 1
            if self._count > MAX_OPCODES:
                raise PickleFault(f"its pickle has more than {MAX_OPCODES:,} opcodes")
            name = opcode.name
            if name in _LITERALS:
                self._stack.append(argument)
            elif name in _NEW:
                self._stack.append(_NEW[name]())
            elif name in ("BINPUT", "LONG_BINPUT"):
                self._memo[argument] = self._stack[-1]
            elif name == "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[argument])
            elif name == "MARK":
                self._marks.append(len(self._stack))
            elif name in _TUPLES:
                self._stack.append(tuple(self._pop(_TUPLES[name])))
            elif name not in ("PROTO", "FRAME", "STOP"):
                self._build(name, argument)
        return self._stack.pop()

    def _build(self, name: str, argument: Any) -> None:
        """Do an opcode that puts things together."""
        if name == "TUPLE":
            self._stack.append(tuple(self._above_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(1) if name == "APPEND" else self._above_mark()
            if type(self._stack[-1]) not in (list, Unknown):
                raise PickleFault("it appends to what is not a list")
            if type(self._stack[-1]) is list:
                self._stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._above_mark()
            target = self._stack[-1]
            _set_items(target.items if isinstance(target, Unknown) else target, items)
        elif name == "GLOBAL":
            self._stack.append(self._find(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            self._stack.append(self._find(*self._pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self._pop(2)
            self._stack.append(self._call(function, arguments))
        elif name == "BUILD":
            self._set_state(*self._pop(1))
        elif name == "BINPERSID":
            self._stack.append(self._storage(*self._pop(1)))
        else:
            raise PickleFault(f"its pickle holds the opcode {name}, which tensors and plain types do not need")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) - (self._marks[-1] if self._marks else 0) < count:
            raise PickleFault("its pickle is damaged: values are missing")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _above_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _find(self, module: str, name: str) -> Any:
        # protocol 2 names things as Python 2 did: commands.getoutput is subprocess.getoutput
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = ascii(f"{module}.{name}")[1:-1][:200]
        if full not in self._functions:
            self.unknown.add(full)
            return Unknown(full)
        return self._functions[full]

    def _call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Unknown):
            return Unknown(function.name)
        if not callable(function) or type(arguments) is not tuple:
            raise PickleFault("it calls what is not a function")
        for argument in arguments:  # functions copy: a long argument that is passed again and again has its price
            self._count += len(argument) // (64 if isinstance(argument, (str, bytes)) else 1) if _sized(argument) else 0
        return function(*arguments)

    def _set_state(self, state: Any) -> None:
        target = self._stack[-1]
        if hasattr(target, "__setstate__") and not isinstance(target, (Unknown, dict, type)):
            target.__setstate__(state)
        elif not isinstance(target, (Unknown, dict)):  # the attributes of a dict, such as _metadata, are of no use
            raise PickleFault(f"it sets attributes of a {type(target).__name__}")

    def _storage(self, pid: Any) -> StorageSpec:
        """Return the storage behind ('storage', type, key, location, number of elements, view)."""
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            raise PickleFault("its pickle refers to what is not a tensor's storage")
        kind, key, _, numel = pid[1:5]
        if (
            not isinstance(kind, StorageSpec)
            or type(key) is not str
            or type(numel) is not int
            or not 0 <= numel < 2**48
        ):
            raise PickleFault("a storage without type, key or size")
        storage = StorageSpec(key, kind.dtype, numel)
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise PickleFault(f"storage {key!r} has two sizes")
        return storage


def _sized(value: Any) -> bool:
    return isinstance(value, (str, bytes, list, tuple, dict))


def _set_items(target: Any, items: list[Any]) -> None:
    """Put the keys and values that follow each other in ``items`` into a dict."""
    if not isinstance(target, dict):
        raise PickleFault("it sets items of what is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in _KEYS or (type(key) is int and abs(key) >= 2**48):
            raise PickleFault(f"a key is a {type(key).__name__}, not text")
        if isinstance(key, (str, bytes)) and len(key) > _MAX_KEY:
            raise PickleFault(f"a key has {len(key):,} characters")
        if isinstance(key, str) and not key.isprintable():  # it would break the lines of messages
            raise PickleFault(f"the key {ascii(key)[:60]} has characters that cannot be printed")
        target[key] = value
