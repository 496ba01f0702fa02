"""The host build of the CUDA kernels, called with records as a backend is: a method for each op of csrc/cuda."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fusedres.ops.contract import (
    BatchNormGrads,
    BatchNormVectors,
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    BnAddReluForward,
    BnBackwardCoefficients,
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolBackwardReduce,
    BnReluMaxpoolForward,
    BnScaleShift,
    BnStats,
    Conv1x1BackwardInput,
    Conv1x1BackwardWeight,
    Conv1x1Forward,
    Conv1x1GramBackwardInput,
    Conv3x3BackwardInput,
    Conv3x3Forward,
    ConvOutput,
    Gram,
    GramBackwardCoefficients,
    GramGrads,
    GramOutputStats,
    RawOp,
    ReluBackward,
    op_name,
)

DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
CHANNELS_LAST = torch.channels_last


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=CHANNELS_LAST)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class HostCudaOps:
    """
    Args:
        module: a host build, from `cuda_host_build.load`.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __call__(self, op: RawOp) -> Any:
        return getattr(self, op_name(type(op)))(op)

    def _args(self, struct: str, **fields: Any) -> Any:
        args = getattr(self.module, struct)()
        for name, value in fields.items():
            setattr(args, name, address(value) if value is None or isinstance(value, Tensor) else value)
        return args

    def _shape(self, c: Tensor) -> Any:
        n, channels, h, w = c.shape
        return self._args("Shape", dtype=self._dtype(c), rows=n * h * w, channels=channels)

    def _dtype(self, c: Tensor) -> Any:
        return getattr(self.module.Dtype, DTYPES[c.dtype])

    def _parameter(self, p: Tensor | None) -> Any:
        dtype = self.module.Dtype.float32 if p is None else self._dtype(p)
        return self._args("Parameter", data=p, dtype=dtype)

    def _pooling(self, c: Tensor, kernel_size: int, stride: int, padding: int) -> Any:
        n, channels, h, w = c.shape
        sizes = {"batch": n, "channels": channels, "height": h, "width": w}
        window = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        return self.module.Pooling(dtype=self._dtype(c), **sizes, **window)

    def _launch(self, op: str, args: Any, *workspace: Any) -> None:
        error = getattr(self.module, op)(args, *workspace)
        assert error == 0, f"{op}: CUDA error {error}"

    def _reduce(self, op: str, args: Any, shape: Any, outputs: tuple[Tensor | None, ...]) -> None:
        """Launches twice: in a workspace of just the size asked for, full of rubbish, and in what is left."""
        size = getattr(self.module, f"{op}_workspace")(shape)
        memory = torch.full((size,), 0xA5, dtype=torch.uint8)
        workspace = self._args("Workspace", data=memory, bytes=size, zero_bytes=0)
        self._launch(op, args, workspace)  # which says what it has left at zero
        for output in outputs:
            if output is not None:
                output.fill_(float("nan"))
        self._launch(op, args, workspace)

    # ---------------------------------------------------------------- batch normalisation

    def bn_stats(self, op: BnStats) -> tuple[Tensor, Tensor]:
        c = dense(op.c)
        mean, var = (torch.empty(c.shape[1]) for _ in range(2))
        shape = self._shape(c)
        self._reduce(
            "bn_stats", self._args("BnStats", shape=shape, c=c, mean=mean, var=var), shape, (mean, var)
        )
        return mean, var

    def _scale_shift(self, mean, var, weight, bias, eps) -> tuple[Any, BatchNormVectors]:
        invstd, scale, shift = (torch.empty_like(mean) for _ in range(3))
        parameters = {"weight": self._parameter(weight), "bias": self._parameter(bias), "eps": eps}
        outputs = {"invstd": invstd, "scale": scale, "shift": shift}
        args = self._args("BnScaleShift", channels=len(mean), mean=mean, var=var, **parameters, **outputs)
        return args, BatchNormVectors(mean, var, invstd, scale, shift)

    def bn_scale_shift(self, op: BnScaleShift) -> BatchNormVectors:
        args, vectors = self._scale_shift(*op)
        self._launch("bn_scale_shift", args)
        return vectors

    def bn_stats_scale_shift(self, c, weight, bias, eps) -> BatchNormVectors:
        """`bn_stats` and `bn_scale_shift` in one launch."""
        c = dense(c)
        mean, var = (torch.empty(c.shape[1]) for _ in range(2))
        fold, vectors = self._scale_shift(mean, var, weight, bias, eps)
        shape = self._shape(c)
        args = self._args("BnStats", shape=shape, c=c, mean=mean, var=var, scale_shift=fold)
        self._reduce("bn_stats", args, shape, vectors)
        return vectors

    def bn_add_relu_forward(self, op: BnAddReluForward) -> tuple[Tensor, Tensor | None]:
        c, scale, shift, residual, residual_scale, residual_shift, relu, save_mask, _ = op
        c, residual = dense(c), dense(residual)
        y = torch.empty_like(c)
        mask = torch.empty(-(-c.numel() // 8), dtype=torch.uint8) if save_mask else None
        side = {"residual": residual, "residual_scale": residual_scale, "residual_shift": residual_shift}
        main = {"shape": self._shape(c), "c": c, "scale": scale, "shift": shift, "relu": relu}
        self._launch("bn_add_relu_forward", self._args("BnAddReluForward", **main, **side, y=y, mask=mask))
        return y, mask

    def _coefficients(self, sum_dz, centered, vectors, rows, training) -> tuple[Any, BatchNormGrads]:
        dweight = torch.empty_like(sum_dz)
        B, K = (torch.empty_like(sum_dz) if training else None for _ in range(2))
        forward = {"mean": vectors.mean, "invstd": vectors.invstd, "scale": vectors.scale}
        sums = {"sum_dz": sum_dz, "sum_dz_centered": centered, "rows": rows, "channels": len(sum_dz)}
        args = self._args("BnBackwardCoefficients", **sums, **forward, dweight=dweight, B=B, K=K)
        return args, BatchNormGrads(dweight, sum_dz, vectors.scale, B, K)

    def bn_backward_coefficients(self, op: BnBackwardCoefficients) -> BatchNormGrads:
        args, grads = self._coefficients(*op)
        self._launch("bn_backward_coefficients", args)
        return grads

    def _backward_reduce(self, dy, c, vectors, mask, relu, shortcut_c, shortcut_mean, **folded):
        dy, c, shortcut_c = dense(dy), dense(c), dense(shortcut_c)
        sum_dz, centered = (torch.empty(c.shape[1]) for _ in range(2))
        side = None if shortcut_c is None else torch.empty(c.shape[1])
        shape = self._shape(c)
        inputs = {"dy": dy, "c": c, "mask": mask, "relu": relu, "shortcut_c": shortcut_c, "shape": shape}
        needed = {"mean": vectors.mean, "scale": vectors.scale, "shift": vectors.shift}
        made = {"sum_dz": sum_dz, "sum_dz_centered": centered, "shortcut_sum": side}
        struct = "BnAddReluBackwardReduce"
        args = self._args(struct, **inputs, **needed, **made, shortcut_mean=shortcut_mean, **folded)
        self._reduce("bn_add_relu_backward_reduce", args, shape, (sum_dz, centered, side))
        return sum_dz, centered, side

    def bn_add_relu_backward_reduce(
        self, op: BnAddReluBackwardReduce
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return self._backward_reduce(*op)

    def bn_add_relu_backward_reduce_coefficients(
        self, dy, c, vectors, mask, rows, shortcut_c=None, shortcut_vectors=None
    ) -> tuple[BatchNormGrads, BatchNormGrads | None]:
        """`bn_add_relu_backward_reduce` and `bn_backward_coefficients` (of both BNs) in one launch."""
        zero = torch.zeros(c.shape[1])  # the struct's sums are not looked at
        args, grads = self._coefficients(zero, zero, vectors, rows, True)
        folded, side = {"coefficients": args}, None
        if shortcut_c is not None:
            folded["shortcut_coefficients"], side = self._coefficients(
                zero, zero, shortcut_vectors, rows, True
            )
        shortcut_mean = None if shortcut_c is None else shortcut_vectors.mean
        sums = self._backward_reduce(dy, c, vectors, mask, True, shortcut_c, shortcut_mean, **folded)
        return grads._replace(dbias=sums[0]), None if side is None else side._replace(dbias=sums[0])

    def bn_add_relu_backward_input(self, op: BnAddReluBackwardInput) -> tuple[Tensor, Tensor | None]:
        dy, c, vectors, grads, mask, relu, shortcut_c, shortcut_grads, save_dz, _, _ = op
        dy, c, shortcut_c = dense(dy), dense(c), dense(shortcut_c)
        dc = torch.empty_like(c)
        dresidual = torch.empty_like(c) if save_dz or shortcut_c is not None else None
        inputs = {"dy": dy, "c": c, "mask": mask, "relu": relu, "shortcut_c": shortcut_c}
        needed = {"scale": vectors.scale, "shift": vectors.shift, "grads": self._grads(grads)}
        made = {"dc": dc, "dresidual": dresidual, "shortcut_grads": self._grads(shortcut_grads)}
        struct = "BnAddReluBackwardInput"
        self._launch(
            "bn_add_relu_backward_input", self._args(struct, shape=self._shape(c), **inputs, **needed, **made)
        )
        return dc, dresidual

    def _grads(self, grads: BatchNormGrads | None) -> Any:
        if grads is None:
            return self._args("Coefficients")
        return self._args("Coefficients", A=grads.A, B=grads.B, K=grads.K)

    def relu_backward(self, op: ReluBackward) -> Tensor:
        dy, mask = dense(op.dy), op.mask
        dz = torch.empty_like(dy)
        args = self._args("ReluBackward", dtype=self._dtype(dy), numel=dy.numel(), dy=dy, mask=mask, dz=dz)
        self._launch("relu_backward", args)
        return dz

    # ---------------------------------------------------------------- stem

    def bn_relu_maxpool_forward(self, op: BnReluMaxpoolForward) -> tuple[Tensor, Tensor | None]:
        c, scale, shift, kernel_size, stride, padding, save_indices = op
        c = dense(c)
        n, channels, h, w = c.shape
        shape = (n, channels, *((size + 2 * padding - kernel_size) // stride + 1 for size in (h, w)))
        y = torch.empty(shape, dtype=c.dtype, memory_format=CHANNELS_LAST)
        indices = torch.empty(shape, dtype=torch.uint8, memory_format=CHANNELS_LAST)
        pooling = self._pooling(c, kernel_size, stride, padding)
        vectors = {"scale": scale, "shift": shift}
        args = self._args("BnReluMaxpoolForward", pooling=pooling, c=c, **vectors, y=y, indices=indices)
        self._launch("bn_relu_maxpool_forward", args)
        return y, indices if save_indices else None

    def bn_relu_maxpool_backward_reduce(self, op: BnReluMaxpoolBackwardReduce) -> tuple[Tensor, Tensor]:
        dy, indices, c, vectors, kernel_size, stride, padding = op
        dy, indices, c = dense(dy), dense(indices), dense(c)
        sum_dz, centered = (torch.empty(c.shape[1]) for _ in range(2))
        pooling = self._pooling(c, kernel_size, stride, padding)
        inputs = {"pooling": pooling, "dy": dy, "indices": indices, "c": c, "mean": vectors.mean}
        args = self._args("BnReluMaxpoolBackwardReduce", **inputs, sum_dz=sum_dz, sum_dz_centered=centered)
        self._reduce("bn_relu_maxpool_backward_reduce", args, pooling, (sum_dz, centered))
        return sum_dz, centered

    def bn_relu_maxpool_backward_input(self, op: BnReluMaxpoolBackwardInput) -> Tensor:
        dy, indices, c, grads, kernel_size, stride, padding = op
        dy, indices, c = dense(dy), dense(indices), dense(c)
        dc = torch.empty_like(c)
        inputs = {
            "pooling": self._pooling(c, kernel_size, stride, padding),
            "dy": dy,
            "indices": indices,
            "c": c,
        }
        args = self._args("BnReluMaxpoolBackwardInput", **inputs, grads=self._grads(grads), dc=dc)
        self._launch("bn_relu_maxpool_backward_input", args)
        return dc

    # ---------------------------------------------------------------- convolutions

    def conv1x1_forward(self, op: Conv1x1Forward) -> ConvOutput:
        return self._conv_forward("conv1x1_forward", op)

    def conv3x3_forward(self, op: Conv3x3Forward) -> ConvOutput:
        return self._conv_forward("conv3x3_forward", op)

    def _conv_forward(self, name: str, op: Conv1x1Forward | Conv3x3Forward) -> ConvOutput:
        x, weight, residual = dense(op.x), dense(op.weight), dense(op.residual)
        n, cin, height, width = x.shape
        cout, _, kernel, _ = weight.shape
        sides = [(side - 1) // op.stride + 1 for side in (height, width)]
        y = torch.empty((n, cout, *sides), dtype=x.dtype, memory_format=CHANNELS_LAST)
        mask = torch.empty(-(-y.numel() // 8), dtype=torch.uint8) if op.save_mask else None
        mean, var = (torch.empty(cout) if op.save_stats else None for _ in range(2))
        given = op._asdict() | {"x": x, "weight": weight, "residual": residual}
        args = self._args(
            "ConvForward",
            **{
                name: given[name]
                for name in given
                if name not in ("stride", "save_mask", "save_stats", "groups")
            },
            dtype=self._dtype(x),
            rows=n * sides[0] * sides[1],
            in_channels=cin,
            out_channels=cout,
            height=self.module.ConvAxis(height, sides[0], kernel, op.stride),
            width=self.module.ConvAxis(width, sides[1], kernel, op.stride),
            y=y,
            mask=mask,
            mean=mean,
            var=var,
        )
        self._reduce(name, args, args, (y, mean, var))
        return ConvOutput(y, mask, mean, var)

    def conv1x1_backward_input(self, op: Conv1x1BackwardInput) -> tuple[Tensor, Tensor]:
        dy, c, weight, shortcut_dy = (dense(t) for t in (op.dy, op.c, op.weight, op.shortcut_dy))
        n, cout, height, width = c.shape
        cin = weight.shape[1]
        dx = torch.empty((n, cin, height, width), dtype=c.dtype, memory_format=CHANNELS_LAST)
        dc = torch.empty_like(c)
        given = {"dy": dy, "c": c, "weight": weight, "shortcut_dy": shortcut_dy, "mask": op.shortcut_mask}
        vectors = {"scale": op.vectors.scale, "shift": op.vectors.shift, "grads": self._grads(op.grads)}
        sizes = {"rows": n * height * width, "in_channels": cin, "out_channels": cout}
        fields = {**given, **vectors, **sizes, "dtype": self._dtype(c), "relu": op.relu, "dx": dx, "dc": dc}
        self._launch("conv1x1_backward_input", self._args("Conv1x1BackwardInput", **fields))
        return dx, dc

    def conv3x3_backward_input(self, op: Conv3x3BackwardInput) -> tuple[Tensor, Tensor | None]:
        dy, c, weight, shortcut_dy = (dense(t) for t in (op.dy, op.c, op.weight, op.shortcut_dy))
        n, cin, height, width = op.x.shape
        dx = torch.empty((n, cin, height, width), dtype=dy.dtype, memory_format=CHANNELS_LAST)
        dc = None if c is None else torch.empty_like(c)
        given = {"dy": dy, "c": c, "weight": weight, "shortcut_dy": shortcut_dy, "mask": op.shortcut_mask}
        vectors = {} if op.vectors is None else {"scale": op.vectors.scale, "shift": op.vectors.shift}
        sizes = {"rows": n * height * width, "in_channels": cin, "out_channels": dy.shape[1]}
        sides = {"height": height, "width": width, "relu": op.relu and c is not None}
        made = {"grads": self._grads(op.grads), "dtype": self._dtype(dy), "dx": dx, "dc": dc}
        fields = {**given, **vectors, **sizes, **sides, **made}
        self._launch("conv3x3_backward_input", self._args("Conv3x3BnBackwardInput", **fields))
        return dx, dc

    def conv1x1_backward_weight(self, op: Conv1x1BackwardWeight) -> tuple[Tensor, Tensor]:
        dy, c = dense(op.dy), dense(op.c)
        n, cin, height, width = c.shape
        cout = dy.shape[1]
        r, dbias = torch.empty(cout, cin), torch.empty(cout)
        given = op._asdict() | {"dy": dy, "c": c}
        sizes = {"rows": n * height * width, "in_channels": cin, "out_channels": cout}
        args = self._args("Conv1x1BackwardWeight", **given, **sizes, dtype=self._dtype(c), r=r, dbias=dbias)
        self._reduce("conv1x1_backward_weight", args, args, (r, dbias))
        return r, dbias

    def gram(self, op: Gram) -> tuple[Tensor, Tensor]:
        c = dense(op.c)
        n, channels, height, width = c.shape
        m, S = torch.empty(channels), torch.empty(channels, channels)
        sizes = {"rows": n * height * width, "channels": channels, "dtype": self._dtype(c)}
        args = self._args("Gram", **sizes, c=c, scale=op.scale, shift=op.shift, m=m, S=S)
        self._reduce("gram", args, args, (m, S))
        return m, S

    def gram_output_stats(self, op: GramOutputStats) -> tuple[Tensor, Tensor, Tensor]:
        weight = dense(op.weight)
        cout, cin = weight.shape[:2]
        mean, var, center = torch.empty(cout), torch.empty(cout), torch.empty(cin)
        given = op._asdict() | {"weight": weight, "mean": mean, "var": var, "center": center}
        sizes = {"in_channels": cin, "out_channels": cout, "dtype": self._dtype(weight)}
        args = self._args("GramOutputStats", **given, **sizes)
        self._reduce("gram_output_stats", args, args, (mean, var, center))
        return mean, var, center

    def gram_backward_coefficients(self, op: GramBackwardCoefficients) -> GramGrads:
        weight, v = dense(op.weight), op.vectors
        cout, cin = weight.shape[:2]
        grads = GramGrads(torch.empty(cout), torch.empty(cout, cin), torch.empty(cout, cin), None, None)
        if op.m is not None:
            grads = grads._replace(weight_a=torch.empty(cin, cin), offset=torch.empty(cin))
        given = {name: value for name, value in op._asdict().items() if name != "vectors"}
        vectors = {"mean": v.mean, "invstd": v.invstd, "scale": v.scale}
        sizes = {"in_channels": cin, "out_channels": cout, "dtype": self._dtype(weight)}
        fields = {**given, "weight": weight, **vectors, **sizes, **grads._asdict()}
        args = self._args("GramBackwardCoefficients", **fields)
        self._reduce("gram_backward_coefficients", args, args, grads)
        return grads

    def conv1x1_gram_backward_input(self, op: Conv1x1GramBackwardInput) -> tuple[Tensor, Tensor, Tensor]:
        dy, c, v = dense(op.dy), dense(op.c), op.vectors
        n, cin, height, width = c.shape
        dz_below, sums = torch.empty_like(c), tuple(torch.empty(cin) for _ in range(2))
        given = {name: value for name, value in op._asdict().items() if name != "vectors"}
        vectors = {"mean": v.mean, "scale": v.scale, "shift": v.shift}
        sizes = {"rows": n * height * width, "in_channels": cin, "out_channels": dy.shape[1]}
        made = {"dz_below": dz_below, "sum_dz": sums[0], "sum_dz_centered": sums[1]}
        fields = {**given, "dy": dy, "c": c, **vectors, **sizes, "dtype": self._dtype(c), **made}
        args = self._args("Conv1x1GramBackwardInput", **fields)
        self._reduce("conv1x1_gram_backward_input", args, args, (dz_below, *sums))
        return dz_below, *sums
