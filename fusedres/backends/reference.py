"""Every raw op in plain PyTorch: the specification, the fallback and the oracle of the tests.

The shortest code that is right, on any device, dtype and memory format, float64 included. Maths and shapes
are in `fusedres.raw_ops`. Callers: `fusedres.dispatch` and the tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.raw_ops import BatchNormGrads, BatchNormVectors, Conv1x1Output, GramGrads, accumulation_dtype

NO_GRADIENT = 255  # pooling index of a window whose maximum is not positive


def bit_weights(device: torch.device) -> Tensor:
    """[1, 2, ... 128], uint8, made on the device: a copy from the host cannot be captured in a CUDA graph."""
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)


def pack_mask(keep: Tensor) -> Tensor:
    """Boolean [N, C, H, W] -> uint8 [ceil(numel/8)], bit i of byte j = element 8j+i in NHWC order."""
    bits = keep.permute(0, 2, 3, 1).reshape(-1).to(torch.uint8)
    bits = F.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (bits * bit_weights(keep.device)).sum(1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The inverse of `pack_mask`: boolean, with the logical shape of `like` [N, C, H, W]."""
    n, c, h, w = like.shape
    bits = (mask[:, None] & bit_weights(mask.device)) != 0
    return bits.reshape(-1)[: like.numel()].view(n, h, w, c).permute(0, 3, 1, 2)


def per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]  # [C] -> [C, 1, 1], against [N, C, H, W]


def affine(c: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(per_channel(shift), c.to(scale.dtype), per_channel(scale))


def activation(c: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """a = relu(scale*c + shift), rounded to c's dtype. [N, C, H, W]"""
    return torch.relu(affine(c, scale, shift).to(c.dtype))


def rows_by_channels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # [N, C, H, W] -> [P, C]


def weight_matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1).double().contiguous()  # [Cout, Cin, 1, 1] -> W [Cout, Cin] in float64


def masked_gradient(
    dy: Tensor, c: Tensor, vectors: BatchNormVectors, mask: Tensor | None, relu: bool
) -> Tensor:
    """dz, see `RawOps.bn_add_relu_backward_reduce`. [N, C, H, W]"""
    if mask is not None:
        return torch.where(unpack_mask(mask, dy), dy, 0)
    if relu:
        return torch.where(affine(c, vectors.scale, vectors.shift).to(c.dtype) <= 0, 0, dy)
    return dy


def apply_coefficients(dz: Tensor, c: Tensor, grads: BatchNormGrads, mean: Tensor | None = None) -> Tensor:
    """dc = A*dz + B*c + K, rounded to c's dtype. [N, C, H, W]

    With mean [C] as A*dz + B*(c - mean) - A*dbias/P, the same in exact arithmetic: B*c + K cancels where the mean
    is large against the deviation.
    """
    dc = dz.to(grads.A.dtype) * per_channel(grads.A)
    if grads.B is not None and mean is not None:
        centered = c.to(mean.dtype) - per_channel(mean)
        rows = c.shape[0] * c.shape[2] * c.shape[3]
        dc = dc + affine(centered, grads.B, -grads.A * grads.dbias / max(rows, 1))
    elif grads.B is not None and grads.K is not None:
        dc = dc + affine(c, grads.B, grads.K)
    return torch.empty_like(c).copy_(dc)


def sums(dz: Tensor, c: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    dz = dz.to(mean.dtype)
    return dz.sum((0, 2, 3)), (dz * (c.to(mean.dtype) - per_channel(mean))).sum((0, 2, 3))


class ReferenceOps:
    """`RawOps` in plain PyTorch."""

    name = "reference"

    def supports(self, op: str, *args: object, **kwargs: object) -> str | None:
        return None

    def bn_stats(self, c):
        c = c.to(accumulation_dtype(c.dtype))
        var, mean = torch.var_mean(c, (0, 2, 3), correction=0)
        # one infinity makes the variance NaN and the mean infinite; Welford's updates lose the latter in inf - inf
        return torch.where(mean.isnan(), c.mean((0, 2, 3)), mean), var

    def bn_scale_shift(self, mean, var, weight, bias, eps):
        invstd = (var.double() + eps).rsqrt()
        scale = (invstd.clone() if weight is None else weight.double() * invstd).to(mean.dtype)
        shift = -mean.double() * scale.double()
        shift = shift if bias is None else shift + bias.double()
        return BatchNormVectors(mean, var, invstd.to(mean.dtype), scale, shift.to(mean.dtype))

    def bn_add_relu_forward(
        self,
        c,
        scale,
        shift,
        residual=None,
        residual_scale=None,
        residual_shift=None,
        relu=True,
        save_mask=False,
        reuse_c=False,
    ):
        z = affine(c, scale, shift)
        if residual_scale is not None:
            z = z + affine(residual, residual_scale, residual_shift)
        elif residual is not None:
            z = z + residual
        z = z.to(c.dtype)
        y = torch.relu(z) if relu else z
        return y, pack_mask(~(y <= 0)) if save_mask else None

    def bn_add_relu_backward_reduce(
        self, dy, c, vectors, mask=None, relu=True, shortcut_c=None, shortcut_mean=None
    ):
        dz = masked_gradient(dy, c, vectors, mask, relu)
        sum_dz, sum_dz_centered = sums(dz, c, vectors.mean)
        if shortcut_c is None:
            return sum_dz, sum_dz_centered, None
        return sum_dz, sum_dz_centered, sums(dz, shortcut_c, shortcut_mean)[1]

    def bn_backward_coefficients(self, sum_dz, sum_dz_centered, vectors, rows, training):
        invstd, A = vectors.invstd, vectors.scale
        dweight = invstd * sum_dz_centered
        if not training:
            return BatchNormGrads(dweight, sum_dz, A, None, None)
        B = (-A.double() * invstd.double() ** 2 * sum_dz_centered.double() / rows).to(A.dtype)
        K = -A.double() * sum_dz.double() / rows - B.double() * vectors.mean.double()
        return BatchNormGrads(dweight, sum_dz, A, B, K.to(A.dtype))

    def bn_add_relu_backward_input(
        self,
        dy,
        c,
        vectors,
        grads,
        mask=None,
        relu=True,
        shortcut_c=None,
        shortcut_grads=None,
        save_dz=False,
        reuse_dy=False,
        reuse_c=False,
    ):
        dz = masked_gradient(dy, c, vectors, mask, relu)
        dc = apply_coefficients(dz, c, grads, vectors.mean)
        if shortcut_c is not None:
            return dc, apply_coefficients(dz, shortcut_c, shortcut_grads)
        # a copy: without a mask dz may be dy itself, and no output shares storage with an argument
        return dc, torch.empty_like(c).copy_(dz) if save_dz else None

    def relu_backward(self, dy, mask):
        return torch.empty_like(dy).copy_(torch.where(unpack_mask(mask, dy), dy, 0))

    def bn_relu_maxpool_forward(self, c, scale, shift, kernel_size, stride, padding, save_indices=True):
        a = activation(c, scale, shift)
        if not save_indices:
            return F.max_pool2d(a, kernel_size, stride, padding), None
        y, flat = F.max_pool2d(a, kernel_size, stride, padding, return_indices=True)
        width = c.shape[3]
        top = torch.arange(y.shape[2], device=c.device)[:, None] * stride - padding
        left = torch.arange(y.shape[3], device=c.device) * stride - padding
        place = (flat // width - top) * kernel_size + (flat % width - left)
        return y, torch.where(y <= 0, NO_GRADIENT, place).to(torch.uint8)

    def _unpool(self, dy, indices, c, kernel_size, stride, padding):
        """dz [N, C, H, W] in the accumulation dtype: each window's dy lands on its maximum."""
        acc = accumulation_dtype(c.dtype)
        top = torch.arange(dy.shape[2], device=c.device)[:, None] * stride - padding
        left = torch.arange(dy.shape[3], device=c.device) * stride - padding
        place = indices.long()
        flat = (top + place // kernel_size) * c.shape[3] + left + place % kernel_size
        passes = place != NO_GRADIENT
        dz = torch.zeros(c.shape, dtype=acc, device=c.device).flatten(2)
        dz.scatter_add_(
            2, torch.where(passes, flat, 0).flatten(2), torch.where(passes, dy.to(acc), 0).flatten(2)
        )
        return dz.view(c.shape)

    def bn_relu_maxpool_backward_reduce(self, dy, indices, c, vectors, kernel_size, stride, padding):
        return sums(self._unpool(dy, indices, c, kernel_size, stride, padding), c, vectors.mean)

    def bn_relu_maxpool_backward_input(self, dy, indices, c, grads, kernel_size, stride, padding):
        return apply_coefficients(self._unpool(dy, indices, c, kernel_size, stride, padding), c, grads)

    def conv1x1_forward(
        self,
        x,
        weight,
        bias=None,
        stride=1,
        in_scale=None,
        in_shift=None,
        scale=None,
        shift=None,
        residual=None,
        residual_scale=None,
        residual_shift=None,
        relu=False,
        save_mask=False,
        save_stats=False,
    ):
        acc = accumulation_dtype(x.dtype)
        a = x if in_scale is None else activation(x, in_scale, in_shift)
        conv = F.conv2d(a.to(acc), weight.to(acc), None if bias is None else bias.to(acc), stride)
        if scale is None:
            scale, shift = conv.new_ones(conv.shape[1]), conv.new_zeros(conv.shape[1])
        z, _ = self.bn_add_relu_forward(
            conv,
            scale,
            shift,
            None if residual is None else residual.to(acc),
            residual_scale,
            residual_shift,
            relu=False,
        )
        y = torch.relu(z.to(x.dtype)) if relu else z.to(x.dtype)
        mean, var = self.bn_stats(y) if save_stats else (None, None)
        return Conv1x1Output(y, pack_mask(~(y <= 0)) if save_mask else None, mean, var)

    def gram(self, c, scale, shift):
        a = rows_by_channels(activation(c, scale, shift)).double()  # [P, Cin]
        m = a.mean(0)
        centered = a - m
        upper = (centered.t() @ centered / a.shape[0]).triu()
        return m.to(scale.dtype), (upper + upper.triu(1).t()).to(scale.dtype)

    def gram_output_stats(self, weight, bias, m, S):
        w = weight_matrix(weight)
        mean = w @ m.double()
        mean = mean if bias is None else mean + bias.double()
        var = ((w @ S.double()) * w).sum(1).clamp_(min=0)
        return mean.to(m.dtype), var.to(m.dtype), m.to(weight.dtype, copy=True).to(m.dtype)

    def gram_backward_coefficients(self, r, sum_dz, weight, bias, vectors, rows, m=None, S=None, center=None):
        w, r, sum_dz64 = weight_matrix(weight), r.double(), sum_dz.double()
        if m is None:
            level = -vectors.mean.double() if bias is None else bias.double() - vectors.mean.double()
            centered = (r * w).sum(1) + level * sum_dz64
        else:
            rest = m.double() - center.double()
            r = r - torch.outer(sum_dz64, rest)
            centered = (r * w).sum(1)
        acc, training = sum_dz.dtype, m is not None
        grads = self.bn_backward_coefficients(sum_dz, centered.to(acc), vectors, rows, training)
        A = grads.A.double()[:, None]
        dW, weight_dz = A * r, A * w
        if m is None:
            return GramGrads(grads.dweight, dW.to(acc), weight_dz.to(acc), None, None)
        B = grads.B.double()[:, None]
        dW = dW + B * (w @ (S.double() * rows))
        weight_a = w.t() @ (B * w)
        offset = -(sum_dz64 / rows) @ weight_dz - rest @ weight_a
        return GramGrads(grads.dweight, dW.to(acc), weight_dz.to(acc), weight_a.to(acc), offset.to(acc))

    def conv1x1_backward_weight(self, dy, mask, c, scale, shift, center=None):
        dz = dy if mask is None else self.relu_backward(dy, mask)
        dz = rows_by_channels(dz).to(scale.dtype)  # [P, Cout]
        a = rows_by_channels(activation(c, scale, shift)).to(scale.dtype)  # [P, Cin]
        return dz.t() @ (a if center is None else a - center), dz.sum(0)

    def conv1x1_gram_backward_input(
        self, dy, mask, c, vectors, weight_dz, weight_a=None, center=None, offset=None
    ):
        n, _, h, w = c.shape
        acc = vectors.scale.dtype
        dz = dy if mask is None else self.relu_backward(dy, mask)
        a = rows_by_channels(activation(c, vectors.scale, vectors.shift)).to(acc)  # [P, Cin]
        da = rows_by_channels(dz).to(acc) @ weight_dz  # [P, Cin]
        if weight_a is not None:
            da = da + (a - center) @ weight_a + offset
        dz_below = torch.where(a <= 0, 0, da).view(n, h, w, c.shape[1]).permute(0, 3, 1, 2)
        dz_below = torch.empty_like(c).copy_(dz_below)
        return dz_below, *sums(dz_below, c, vectors.mean)

    def conv1x1_backward_input(
        self, dy, c, vectors, grads, weight, relu=True, shortcut_dy=None, shortcut_mask=None
    ):
        acc = vectors.scale.dtype
        dc = apply_coefficients(masked_gradient(dy, c, vectors, None, relu), c, grads, vectors.mean)
        dx = F.conv_transpose2d(dc.to(acc), weight.to(acc))  # dc W, [N, Cin, H, W]
        if shortcut_dy is not None:
            if shortcut_mask is not None:
                shortcut_dy = self.relu_backward(shortcut_dy, shortcut_mask)
            dx = dx + shortcut_dy
        return dx.to(c.dtype), dc

    def conv_backward_weight(self, dy, x, kernel_size, stride, padding, dilation, groups):
        weight = x.new_empty((dy.shape[1], x.shape[1] // groups, *kernel_size))  # only its shape is read
        window = stride, padding, dilation, False, (0, 0), groups
        _, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *window, [False, True, False])
        like_x = torch.empty_like(x).is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if like_x else torch.contiguous_format
        return dw.to(accumulation_dtype(x.dtype)).contiguous(memory_format=layout)

    def conv_backward_input(
        self,
        dy,
        x,
        weight,
        stride,
        padding,
        dilation,
        groups,
        shortcut_dy=None,
        shortcut_mask=None,
        reuse_shortcut=False,
    ):
        window = stride, padding, dilation, False, (0, 0), groups
        dx, _, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *window, [True, False, False])
        if shortcut_dy is None:
            return dx
        if shortcut_mask is not None:
            return dx.add_(self.relu_backward(shortcut_dy, shortcut_mask))
        return shortcut_dy.add_(dx) if reuse_shortcut else dx.add_(shortcut_dy)
