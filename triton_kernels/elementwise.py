"""What the kernels do to single elements: activation, gradient mask, packed bits."""

import triton
import triton.language as tl


@triton.jit
def relu(z):
    """max(z, 0) that keeps NaN, as torch's does."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_shift_relu(c, scale, shift):
    """The activation `relu(scale*c + shift)`, rounded to c's dtype: c [R, C], scale and shift [C]."""
    z = tl.fma(c.to(tl.float32), scale[None, :], shift[None, :])
    return relu(z).to(c.dtype)


@triton.jit
def select_by_mask(dy, mask, element, valid):
    """`dz = where(bit, dy, 0)`; `element` is dy's place, counted from the element of bit 0 of `mask`'s first byte."""
    byte = tl.load(mask + (element >> 3), mask=valid, other=0)
    return tl.where(((byte >> (element & 7).to(tl.uint8)) & 1) != 0, dy, 0.0).to(dy.dtype)


@triton.jit
def masked_gradient(dy, c, mask, element, valid, scale, shift):
    """dz of tiles dy and c [R, C]: by `mask` if given, else by the sign of the activation if `scale` is, else dy."""
    if mask is not None:
        return select_by_mask(dy, mask, element, valid)
    if scale is not None:
        return tl.where(scale_shift_relu(c, scale, shift) <= 0, 0.0, dy).to(dy.dtype)
    return dy


@triton.jit
def load_vector(vector, i, size):
    """Elements i of a channel vector, 0 beyond its end; None where there is none."""
    if vector is None:
        return None
    return tl.load(vector + i, mask=i < size, other=0.0)


@triton.jit
def pack_bits(y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bits `not (y <= 0)` of a tile [ROWS, COLUMNS] as bytes [ROWS, COLUMNS // 8], lowest bit first."""
    bits = tl.where(y <= 0, 0, 1).reshape(ROWS, COLUMNS // 8, 8)
    weights = (1 << tl.arange(0, 8))[None, None, :]
    return tl.sum(bits * weights, 2).to(tl.uint8)


@triton.jit
def tile_moments(y, valid, count):
    """Mean and M2 = sum (y - mean)^2 of a tile's columns: y [R, C], valid [R], count = number of valid rows.

    The corrected two-pass algorithm (Chan, Golub & LeVeque 1983): what the deviations sum to is the mean's own error.
    """
    y = tl.where(valid[:, None], y.to(tl.float32), 0.0)
    mean = tl.sum(y, 0) / count
    deviation = tl.where(valid[:, None], y - mean[None, :], 0.0)
    error = tl.sum(deviation, 0)
    return mean + error / count, tl.sum(deviation * deviation, 0) - error * error / count
