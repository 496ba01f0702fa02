"""What a backend is: for each raw op it has, a function of the op's record, and why it does not take some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedres.ops.contract import RawOp

Function = Callable[[Any], Any]  # a record of one type -> its result
Reason = Callable[[Any], str | None]  # a record of one type -> a code of REASONS, or None: it is served

# one spelling for all backends; a code may carry a detail after its last underscore: dtype_float64, device_meta
REASONS: dict[str, str] = {
    "no_kernel": "the backend has no kernel for this op",
    "device": "tensors on this kind of device are not served",
    "no_code_for_device": "the native library holds no code for this GPU",
    "compute_capability_below_8": "the GPU is older than the Triton kernels' products",
    "triton_unusable": "no Triton kernel can be compiled and run on this GPU; a warning said why",
    "set_aside": "the kernel could not be compiled or loaded; a warning said why",
    "not_warm": "a CUDA graph is being captured, and no kernel was run on this GPU before",
    "product_not_measured": "on this GPU nobody has measured the product against the library's",
    "rocm": "the Triton kernels are written for NVIDIA's GPUs",
    "dtype": "activations of this dtype are not served",
    "mixed_dtypes": "the activations and weights of one call differ in dtype",
    "mixed_devices": "the tensors of one call are on different devices",
    "not_four_dimensional": "an activation is not [N, C, H, W]",
    "not_channels_last": "an activation is not dense in channels_last",
    "vector_not_float32": "a channel vector is not float32",
    "vector_not_dense": "a channel vector or mask is strided or expanded",
    "empty": "there are no elements",
    "no_channels": "there are no channels",
    "too_many_rows": "row numbers would pass 32 bits",
    "too_many_channels": "offsets inside a tile would pass 32 bits",
    "too_wide": "a line of the image has no room in the kernel's halo",
    "odd_channels": "products of bfloat16 take channels in pairs",
    "mask": "the kernel does not take this mask",
    "groups": "grouped convolutions are the library's",
    "not_pointwise": "the kernel is that of a 1x1 convolution without padding or groups",
    "stride_or_bias": "the kernel does not take this stride, or a bias",
    "no_prologue": "the kernel takes the activation itself, and no BN and ReLU before it",
    "in_training": "the kernel makes no mask and no prologue, and statistics of the convolution alone",
    "library_as_fast": "torch's own kernel was measured to be as fast at this size",
    "winograd_off": "FUSEDRES_WINOGRAD=0 leaves 3x3 convolutions to torch",
    "too_many_threads": "a thread's share would be too small",
    "float32_product": "products of float32 on a GPU are the library's",
    "bfloat16_interpreted": "Triton's interpreter multiplies bfloat16 wrongly",
}


@dataclass(frozen=True, eq=False)
class Backend:
    """One implementation of the raw ops.

    Args:
        name: what `backend=` and FUSEDRES_BACKEND call it.
        functions: by the type of its record, each op that it has. An op that is not here is not served.
        reasons: of those ops, the ones that are not served for every argument. A reason looks at shapes, dtypes,
            strides and devices only, never at values.
        is_plain: whether its functions are made of torch's own operations, which a caller may as well call itself.
    """

    name: str
    functions: Mapping[type, Function]
    reasons: Mapping[type, Reason] = field(default_factory=dict)
    is_plain: bool = False

    def reason(self, op: RawOp) -> str | None:
        """Why this backend does not serve the call, as a code; None: it serves it."""
        if type(op) not in self.functions:
            return "no_kernel"
        check = self.reasons.get(type(op))
        return None if check is None else check(op)

    def __call__(self, op: RawOp) -> Any:
        """The op's result, for a call that `reason` has nothing against."""
        return self.functions[type(op)](op)
