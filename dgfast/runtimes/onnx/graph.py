"""An ONNX graph while it is written: shared subexpressions, folded constants and no reshape or transpose twice.

Operations are recorded in order. One that was recorded before is not recorded again, one of constants is computed at
once, and what nobody reads is left out at the end: so the table of operations (`operations`) may write down each one
plainly, and look through what stands before it.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dgfast.runtimes.onnx.values import NUMPY, Array, Batch, Dim, Record, Shape, Value, broadcast, number


class OnnxGraph:
    """Records operations of ONNX's default domain, opset 18 or newer, and those of `fused` if asked to.

    Attributes:
        records: the operations in order; constants: arrays by name.
        normalised: what a table entry wants to find again, by the name of a value.
        products: factors and result of every batched matrix product, by the name of the result.
        operands: what `binary` recorded, the operation and both arguments, by the name of the result.
        statistics: names of the matrix products that are sums over an image, see `values.STATISTIC`.
    """

    def __init__(self, rank_4: bool = False, fused: bool = False, double: bool = False) -> None:
        """
        Args:
            double: keep double precision; else it becomes single: samplers compute noise levels in it, and engines have
                no use for it.
            rank_4: keep images in four dimensions throughout, as TensorRT must have them.
            fused: take operators that ONNX Runtime's CUDA provider alone has, see `fused`.
        """
        self.rank_4, self.fused, self.double = rank_4, fused, double
        self.records: list[Record] = []
        self.constants: dict[str, Array] = {}
        self.inputs: list[Value] = []
        self.normalised: dict[str, Any] = {}
        self.products: dict[str, tuple[Value, Value, Value]] = {}
        self.operands: dict[str, tuple[str, Value, Value]] = {}
        self.statistics: set[str] = set()
        self._known: dict[Any, tuple[Value, ...]] = {}
        self._source: dict[str, tuple[str, Value]] = {}  # result of a reshape, transpose or expand -> kind, its input
        self._affine: dict[str, tuple[Value, Value, Value | None]] = {}  # y = scale x + shift -> x, scale, shift
        self._digests: dict[Any, Value] = {}

    # Values -----------------------------------------------------------------------------------------------------------
    def input(self, name: str, shape: Shape, dtype: Any) -> Value:
        value = Value(name, shape, dtype)
        self.inputs.append(value)
        return value

    def constant(self, array: Any, dtype: Any = None) -> Value:
        """An array as a value; the same array twice is the same value."""
        held = np.array(array, dtype=dtype, order="C")
        if held.dtype == np.float64 and not self.double:
            held = held.astype(np.float32)
        key = held.shape, held.dtype.str, hashlib.blake2b(held.tobytes()).digest()
        if key not in self._digests:
            value = Value(f"constant_{len(self.constants)}", held.shape, held.dtype.type)
            self.constants[value.name], self._digests[key] = held, value
        return self._digests[key]

    def array(self, value: Value) -> Array | None:
        """The array of a constant."""
        return self.constants.get(value.name)

    def kind(self, dtype: torch.dtype) -> Any:
        """The numpy type that tensors of this type have in the file.

        Raises:
            KeyError: there is none.
        """
        kind = NUMPY[dtype]
        return np.float32 if kind is np.float64 and not self.double else kind

    @property
    def wide(self) -> Any:
        """The type in which means, and what follows from them, are computed."""
        return np.float64 if self.double else np.float32

    def emit(
        self, op: str, inputs: Sequence[Value | None], shapes: Sequence[Shape], dtypes: Sequence[Any] | Any,
        **attributes: Any,
    ) -> tuple[Value, ...]:  # fmt: skip
        """Record an operation, unless it was recorded before; its results."""
        names = tuple("" if x is None else x.name for x in inputs)
        key = op, names, repr(sorted(attributes.items()))
        if key not in self._known:
            types = dtypes if isinstance(dtypes, list) else [dtypes] * len(shapes)
            first = len(self._known)
            values = tuple(
                Value(f"{op}_{first}" + (f"_{i}" if i else ""), shape, dtype)
                for i, (shape, dtype) in enumerate(zip(shapes, types, strict=True))
            )
            self.records.append(Record(op, names, [v.name for v in values], attributes))
            self._known[key] = values
        return self._known[key]

    def unary(self, op: str, x: Value, dtype: Any = None, **attributes: Any) -> Value:
        return self.emit(op, [x], [x.shape], dtype or x.dtype, **attributes)[0]

    def cast(self, x: Value, dtype: Any) -> Value:
        if x.dtype == dtype:
            return x
        array = self.array(x)
        if array is not None:
            return self.constant(array.astype(dtype))
        return self.emit("Cast", [x], [x.shape], dtype, to=np.dtype(dtype))[0]

    # Arithmetic -------------------------------------------------------------------------------------------------------
    def binary(self, op: str, a: Value, b: Value, dtype: Any = None) -> Value:
        """An operation of two tensors of one type that broadcasts."""
        shape = broadcast(a.shape, b.shape)
        one, other = (self._unexpanded(x) for x in (a, b))
        if broadcast(one.shape, b.shape) == shape:
            a = one
        if broadcast(a.shape, other.shape) == shape:
            b = other
        left, right = self.array(a), self.array(b)
        if left is not None and right is not None:
            return self.constant(_FOLDED[op](left, right))
        result = self.emit(op, [a, b], [shape], dtype or a.dtype)[0]
        self.operands[result.name] = op, a, b
        return result

    def add(self, a: Value, b: Value) -> Value:
        return self._combine("Add", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        return self._combine("Mul", a, b)

    def affine(self, x: Value, scale: Value, shift: Value | None = None) -> Value:
        """scale x + shift, the latter one number a sample and channel, [B or 1, C or 1, 1, ...]."""
        scaled = self.binary("Mul", x, scale)
        y = scaled if shift is None else self.binary("Add", scaled, shift)
        self._affine[y.name] = x, scale, shift
        return y

    def affine_parts(self, y: Value) -> tuple[Value, Value, Value | None] | None:
        """x, scale and shift of a y that is scale x + shift."""
        return self._affine.get(y.name)

    def _combine(self, op: str, a: Value, b: Value) -> Value:
        """An affine map of an affine map of an image is computed as one."""
        for y, c in ((a, b), (b, a)):
            if not (_is_image(y) and _is_per_channel(c, y) and y.dtype == c.dtype):
                continue
            x, scale, shift = self._affine.get(y.name, (y, None, None))
            if op == "Add" and scale is not None:
                return self.affine(x, scale, c if shift is None else self.binary("Add", shift, c))
            if op == "Mul":
                moved = None if shift is None else self.binary("Mul", shift, c)
                return self.affine(x, c if scale is None else self.binary("Mul", scale, c), moved)
        return self.binary(op, a, b)

    def reduce(self, op: str, x: Value, axes: Sequence[int], keepdims: bool) -> Value:
        axes = sorted(axis % len(x.shape) for axis in axes)
        kept: Shape = tuple(1 if i in axes else d for i, d in enumerate(x.shape))
        shape = kept if keepdims else tuple(d for i, d in enumerate(x.shape) if i not in axes)
        return self.emit(op, [x, self.constant(axes, np.int64)], [shape], x.dtype, keepdims=int(keepdims))[0]

    # Layout -----------------------------------------------------------------------------------------------------------
    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        """`x` in another shape, taken from where its own shape came from."""
        shape = tuple(shape)
        kind, source = self._source.get(x.name, ("", x))
        if kind == "Reshape":
            x = source
        if x.shape == shape:
            return x
        array = self.array(x)
        if array is not None:
            return self.constant(array.reshape([number(d) for d in shape]))
        y = self.emit("Reshape", [x, self.sizes(shape, open_size=True)], [shape], x.dtype)[0]
        self._source[y.name] = "Reshape", x
        return y

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        array = self.array(x)
        if array is not None:
            return self.constant(array.transpose(order))
        kind, source = self._source.get(x.name, ("", x))
        if kind.startswith("Transpose"):
            inner = [int(i) for i in kind.split()[1:]]
            x, order = source, [inner[i] for i in order]
        shape = tuple(x.shape[i] for i in order)
        if list(order) == list(range(len(order))):
            return x
        moved = [i for i in order if x.shape[i] != 1]
        if moved == sorted(moved):  # only sizes of 1 change places
            return self.reshape(x, shape)
        y = self.emit("Transpose", [x], [shape], x.dtype, perm=list(order))[0]
        self._source[y.name] = f"Transpose {' '.join(map(str, order))}", x
        return y

    def expand(self, x: Value, shape: Sequence[Dim]) -> Value:
        shape = tuple(shape)
        if x.shape == shape:
            return x
        y = self.emit("Expand", [x, self.sizes(shape)], [shape], x.dtype)[0]
        self._source[y.name] = "Expand", x
        return y

    def sizes(self, shape: Sequence[Dim], open_size: bool = False) -> Value:
        """A shape as a tensor. `open_size`: one unknown size may be written as -1."""
        unknown = [d for d in shape if isinstance(d, Batch)]
        if len(unknown) <= open_size:
            return self.constant([-1 if isinstance(d, Batch) else d for d in shape], np.int64)
        open_input = next(x for x in self.inputs if x.shape[:1] == (Batch(1),))
        batch = self.emit("Shape", [open_input], [(1,)], np.int64, start=0, end=1)[0]
        parts = [
            self.binary("Mul", batch, self.constant([d.times], np.int64)) if isinstance(d, Batch) else
            self.constant([d], np.int64) for d in shape
        ]  # fmt: skip
        return self.emit("Concat", parts, [(len(shape),)], np.int64, axis=0)[0]

    def source(self, x: Value, kind: str) -> Value | None:
        """What `x` is a reshape (a "Reshape") of."""
        operation, source = self._source.get(x.name, ("", x))
        return source if operation == kind else None

    def _unexpanded(self, x: Value) -> Value:
        return self.source(x, "Expand") or x

    def live(self, outputs: Sequence[Value]) -> tuple[list[Record], list[str]]:
        """The operations, and names of the constants, that the outputs depend on."""
        needed, records = {value.name for value in outputs}, []
        for record in reversed(self.records):
            if not needed & set(record.outputs):
                continue
            while record.op in _OPTIONAL_RESULTS and record.outputs[-1] not in needed:
                record.outputs.pop()
            records.append(record)
            needed |= set(record.inputs)
        return records[::-1], [name for name in self.constants if name in needed]


_OPTIONAL_RESULTS = {"LayerNormalization", "MaxPool", "SkipGroupNorm"}
"""Operations that may leave out their last results where nobody reads them."""

_FOLDED = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power, "Max": np.maximum,
    "Min": np.minimum, "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor, "Equal": np.equal,
    "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal,
}  # fmt: skip


def _is_image(x: Value) -> bool:
    return len(x.shape) == 4 and x.shape[2:] != (1, 1)


def _is_per_channel(c: Value, image: Value) -> bool:
    """Whether c has one number a channel, or a sample and channel; scalars are left to plain arithmetic."""
    return len(c.shape) == 4 and c.shape[2:] == (1, 1) and c.shape[1] == image.shape[1]
