"""Writes down what a function runs on tensors: torch's operators and the package's own, and Triton's kernels.

What depends on values, or on tensors that are no inputs, is not to be recorded; `Recorder.problem` says what it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.recording import code
from fusedres.recording.code import NONE, Kind, Opcode, Result, Step, UnrecordableError, Word
from fusedres.recording.merging import Argument, Call, Return, merged

aten = torch.ops.aten
EMPTY = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
}
ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
COPIES = {aten._to_copy.default, aten.clone.default}
OWN = "fusedres_native::"
DIRECTLY, DIRECT = "direct ", {"aten::convolution", "aten::convolution_backward"}  # csrc/front/torch_calls.h
POINTER, CONSTANT = "*", "constexpr"
WORDS = {"i32": Word.INT32, "u32": Word.INT32, "i64": Word.INT64, "u64": Word.INT64, "fp32": Word.FLOAT}
IMPLEMENTATIONS: set[str] = getattr(
    torch.library, "_impls", set()
)  # those from Python: operator and key of each
LISTS = {"List[int]": Kind.INTS, "List[bool]": Kind.BOOLS}


@cache
def is_composite(name: str) -> bool:
    """Whether torch makes this operator of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


@cache
def is_torchs(implementations: int) -> bool:
    """Whether no implementation of a convolution was registered from Python; implementations: how many there are."""
    operators = tuple(name.replace("::", "/") + "/" for name in DIRECT)
    others = (
        each for each in IMPLEMENTATIONS if not each.endswith("/Meta")
    )  # torch's own for shapes, among others
    return not any(each.startswith(operators) for each in others)


def convolutions_are_torchs() -> bool:
    """Whether nobody has put a kernel of his own in the place of torch's convolutions, so far as Python knows."""
    return is_torchs(len(IMPLEMENTATIONS))


def is_called_directly(name: str, device: str) -> bool:
    """Whether a replay asks torch's C functions for this operator, past the dispatcher."""
    has_another = torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())
    return name in DIRECT and not has_another and convolutions_are_torchs()


class Recorder(TorchDispatchMode):
    """A dispatch mode that records; `launched` is to be told of Triton's launches.

    Args:
        inputs: the tensors that will be others in every replay.
        flags_are_constant: whether what the package's ops say of their results, as whether they are finite, is always
            the same, as it is on a GPU, where nobody waits to read it.

    Raises:
        UnrecordableError: one of them is given twice.
    """

    def __init__(self, inputs: Sequence[Tensor], flags_are_constant: bool = False) -> None:
        super().__init__()
        self._flags_are_constant = flags_are_constant
        self.steps: list[Step] = []
        self.operators: dict[str, int] = {}
        self.problem: str | None = None
        self.mutated: dict[int, int] = {}  # inputs, and before how many steps they were first written into
        self._slots: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._bases: dict[int, int] = {}  # of a view's slot, that of the tensor whose storage it is
        # how often torch's own operators wrote into an input: they tell autograd of it
        self.told: dict[int, int] = {}
        self.kernels: list[Any] = []  # Triton's, as they were loaded
        # how many steps there were with the newest call, and that call
        self._last: tuple[int, Call | None] = 0, None
        self._inputs, self._next = list(inputs), 0
        self._device = inputs[0].device.type if inputs else "cpu"
        if len({id(t) for t in inputs}) < len(inputs):
            raise UnrecordableError("an input that is given twice")
        for t in self._inputs:
            self._made(t)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import Dynamo for it, which takes seconds; nothing records while Dynamo traces."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # in inference mode none was taken apart yet
        if func.namespace == "aten" and is_composite(func.name()):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if self.problem is None:
            try:
                self._note(func, args, kwargs, out)
            except UnrecordableError as error:
                self.problem = f"{func}: {error}"
        return out

    def launched(self, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Notes one launch of a Triton kernel."""
        if self.problem is not None:
            return
        try:
            self._note_launch(compiled, grid, arguments)
        except UnrecordableError as error:
            self.problem = f"a Triton kernel: {error}"

    def slot(self, t: Tensor | None) -> int:
        """Raises UnrecordableError where the tensor is neither an input nor made by a step."""
        if t is None:
            return NONE
        known, slot = self._slots.get(id(t), (None, NONE))
        if known is None or known() is not t:
            raise UnrecordableError("a tensor that is kept elsewhere")
        return slot

    def finished(self, outputs: Sequence[Tensor | None]) -> tuple[Tensor, str, list[int], int]:
        """The words and the operators' names, the slot of each output, and the first step that writes into an input.

        Raises:
            UnrecordableError: what ran cannot be recorded.
        """
        if self.problem is not None:
            raise UnrecordableError(self.problem)
        slots = [self.slot(t) for t in outputs]
        made = sorted({s for s in slots if s >= len(self._inputs)})
        steps = code.with_frees(self.steps, set(made), len(self._inputs))
        taken = [i for i, step in enumerate(steps) if step.opcode is not Opcode.FREE]
        first = taken[min(self.mutated.values())] if self.mutated else len(steps)
        words = code.encoded(self._next, self._inputs, steps, slots, made)
        return words, "\n".join(self.operators), slots, first

    def _made(self, t: Tensor) -> int:
        slot, self._next = self._next, self._next + 1
        self._slots[id(t)] = weakref.ref(t), slot
        return slot

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        schema = func._schema
        if func in EMPTY or func in ZEROS:
            made = self._made(out)
            self.steps.append(code.allocate(made, out))
            if func in ZEROS:
                self._call("aten::zero_", [(Kind.TENSOR, False, made)], [(NONE, Result.TENSOR)], (made,), ())
        elif func in COPIES:
            source, made = self.slot(args[0]), self._made(out)
            if out.device != args[0].device:
                raise UnrecordableError("a copy to another device")
            self.steps += [code.allocate(made, out), code.copy(made, source)]
        elif func is aten.copy_.default:
            self._write(args[0], True)
            self.steps.append(code.copy(self.slot(args[0]), self.slot(args[1])))
        elif func is aten.add_.Tensor:
            self._note_add(*args, **kwargs)
        elif any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            if not isinstance(out, Tensor):
                raise UnrecordableError("several views at once")
            base, made = self.slot(args[0]), self._made(out)
            self._bases[made] = self._bases.get(base, base)
            self.steps.append(code.view(made, base, out, args[0]))
        else:
            self._note_call(func, args, kwargs, out)

    def _note_add(self, t: Tensor, other: Tensor, alpha: float = 1) -> None:
        """The sum is another tensor, which t stands for from now on: nothing else may lie in its storage."""
        left, right = self.slot(t), self.slot(other)
        is_alone = left >= len(self._inputs) and left not in self._bases and left not in self._bases.values()
        if not is_alone or alpha != 1 or other.dtype is not t.dtype or other.stride() != t.stride():
            raise UnrecordableError("a sum in place that is no plain one")
        self.steps.append(code.add(self._made(t), left, right))

    def _note_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnrecordableError("random numbers")
        arguments, read = [], []
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            arguments.append(self._argument(str(argument.type), value))
            tensors = [value] if isinstance(value, Tensor) else value if isinstance(value, list) else ()
            for t in tensors:
                if isinstance(t, Tensor):
                    read.append(self.slot(t))
                    if argument.alias_info is not None and argument.alias_info.is_write:
                        self._write(t, not func._schema.name.startswith(OWN))
        results = out if isinstance(out, (tuple, list)) else (out,) if func._schema.returns else ()
        returns, made = [], []
        for result, declared in zip(results, func._schema.returns, strict=True):
            if type(result) is bool and self._flags_are_constant and func._schema.name.startswith(OWN):
                returns.append((NONE, Result.NUMBER))
                continue
            if result is not None and not isinstance(result, Tensor):
                raise UnrecordableError(f"a result that is a {type(result).__name__}")
            in_place = declared.alias_info is not None
            slot = NONE if result is None or in_place else self._made(result)
            is_optional = str(declared.type).startswith("Optional")
            returns.append((slot, Result.OPTIONAL_TENSOR if is_optional else Result.TENSOR))
            made += [slot] if slot != NONE else []
        if len({result for _, result in returns}) > 1 and not func._schema.name.startswith(OWN):
            raise UnrecordableError("results of which some are optional")  # see csrc/front/device_ops.h
        name = func._schema.name + ("." + func._schema.overload_name if func._schema.overload_name else "")
        self._call(name, arguments, returns, tuple(read), tuple(made))

    def _call(
        self,
        name: str,
        arguments: list[Argument],
        returns: list[Return],
        read: tuple[int, ...],
        made: tuple[int, ...],
    ) -> None:
        call = Call(name, arguments, returns)
        before, last = self._last
        if last is not None and before == len(self.steps) and (both := merged(last, call)) is not None:
            call, step = both, self.steps.pop()
            read = (*step.read, *(slot for slot in read if slot not in step.written))
            made = step.written + made
        called = DIRECTLY + call.name if is_called_directly(call.name, self._device) else call.name
        words = [self.operators.setdefault(called, len(self.operators)), len(call.arguments)]
        for kind, optional, value in call.arguments:
            words += [kind, int(optional), *(value if isinstance(value, tuple) else (value,))]
        words.append(len(call.returns))
        for slot, result in call.returns:
            words += [slot, result]
        self.steps.append(Step(Opcode.CALL, tuple(words), read, made))
        self._last = len(self.steps), call

    def _argument(self, declared: str, value: Any) -> tuple[Kind, bool, Any]:
        optional = declared.startswith("Optional[")
        plain = declared.removeprefix("Optional[").removesuffix("]") if optional else declared
        if value is None:
            return Kind.NONE, optional, 0
        if isinstance(value, Tensor) and plain == "Tensor":
            return Kind.TENSOR, optional, self.slot(value)
        if plain == "List[Tensor]" and all(isinstance(t, Tensor) for t in value):
            return Kind.TENSORS, optional, code.listed(map(self.slot, value))
        if plain == "List[float]":
            return Kind.FLOATS, optional, code.listed(map(code.bits, value))
        if plain in LISTS and all(type(v) in (int, bool) for v in value):
            return LISTS[plain], optional, code.listed(value)
        if plain == "bool" and type(value) is bool:
            return Kind.BOOL, optional, int(value)
        if plain == "int" and type(value) is int:
            return Kind.INT, optional, value
        if plain == "float" and type(value) in (int, float):
            return Kind.FLOAT, optional, code.bits(float(value))
        raise UnrecordableError(f"an argument of the type {declared}")

    def _write(self, t: Tensor, by_torch: bool) -> None:
        slot = self.slot(t)
        base = self._bases.get(slot, slot)
        if base < len(self._inputs):
            self.mutated.setdefault(base, len(self.steps))
            self.told[base] = self.told.get(base, 0) + by_torch

    def _note_launch(self, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        metadata = compiled.metadata
        unusual = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
        if metadata.num_ctas != 1 or any(getattr(metadata, name, 0) for name in unusual):
            raise UnrecordableError("it is launched in a way of its own")
        words, read = [], []
        for name, declared in compiled.src.signature.items():
            value = arguments.get(name)
            if declared == CONSTANT:
                continue
            if declared.startswith(POINTER) and isinstance(value, Tensor):
                read.append(self.slot(value))
                words += [Word.POINTER, read[-1]]
            elif declared in WORDS and isinstance(value, (int, float)):
                word = WORDS[declared]
                words += [word, code.float32_bits(value) if word is Word.FLOAT else int(value)]
            else:
                raise UnrecordableError(f"a parameter of the type {declared}")
        sizes = (*grid, 1, 1)[:3]
        self.kernels.append(compiled)
        launch = compiled.function, *sizes, metadata.num_warps * 32, metadata.shared, len(words) // 2
        self.steps.append(Step(Opcode.LAUNCH, (*launch, *words), tuple(read)))
