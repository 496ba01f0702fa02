"""What the kernels do to single elements: activation, gradient mask, packed bits."""

import triton
import triton.language as tl


@triton.jit
def relu(z):
    """max(z, 0) that keeps NaN, as torch's does."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_vector(vector, i, size):
    """Elements i of a channel vector as a row [1, C], 0 beyond its end."""
    return tl.load(vector + i, mask=i < size, other=0.0)[None, :]


@triton.jit
def affine(c, scale, shift, i, size):
    """`scale*c + shift` in float32: c [R, C], elements i of two channel vectors."""
    return tl.fma(c.to(tl.float32), load_vector(scale, i, size), load_vector(shift, i, size))


@triton.jit
def activation(c, scale, shift, i, size):
    """`relu(scale*c + shift)`, rounded to c's dtype: c [R, C], elements i of two channel vectors."""
    return relu(affine(c, scale, shift, i, size)).to(c.dtype)


@triton.jit
def select_by_mask(dy, mask, element, valid):
    """`dz = where(bit, dy, 0)`; `element` counts from the element of bit 0 of `mask`'s first byte."""
    byte = tl.load(mask + (element >> 3), mask=valid, other=0)
    return tl.where(((byte >> (element & 7).to(tl.uint8)) & 1) != 0, dy, 0.0).to(dy.dtype)


@triton.jit
def select_in_tile(dy, mask, row, first, valid, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`dz = where(bit, dy, 0)` of a tile dy [ROWS, COLUMNS].

    Its rows are `row` [ROWS, 1], of C channels each, counted from the one whose channel 0 is bit 0 of `mask`'s first
    byte; those not `valid` [ROWS, 1] are not read. Its columns start at channel `first`, a multiple of 8.
    """
    if C % 8 == 0:
        # one byte for 8 neighbours: a byte for each element would be 8 loads and 8 addresses for one
        column = first // 8 + tl.arange(0, COLUMNS // 8)[None, :]
        byte = tl.load(mask + row * (C // 8) + column, mask=valid & (column < C // 8), other=0)
        bits = (byte[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
        dz = tl.where(bits.reshape(ROWS, COLUMNS) != 0, dy, 0.0).to(dy.dtype)
    else:
        column = first + tl.arange(0, COLUMNS)[None, :]
        dz = select_by_mask(dy, mask, row * C + column, valid & (column < C))
    return dz


@triton.jit
def masked_gradient(dy, c, mask, element, valid, scale, shift, i, size):
    """dz of tiles dy and c [R, C]: by `mask` if given, else by the activation if `scale` is, else dy."""
    if mask is not None:
        dz = select_by_mask(dy, mask, element, valid)
    elif scale is not None:
        dz = tl.where(activation(c, scale, shift, i, size) <= 0, 0.0, dy).to(dy.dtype)
    else:
        dz = dy
    return dz


@triton.jit
def pack_bits(y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bits `not (y <= 0)` of a tile [ROWS, COLUMNS] as bytes [ROWS, COLUMNS // 8], lowest bit first."""
    bits = tl.where(y <= 0, 0, 1).reshape(ROWS, COLUMNS // 8, 8)
    weights = (1 << tl.arange(0, 8))[None, None, :]
    return tl.sum(bits * weights, 2).to(tl.uint8)


@triton.jit
def column_sums(x, ROWS: tl.constexpr):
    """Sums [C] of the columns of x [ROWS, C] in two steps, so that no float32 sum has more than ROWS/16 or 16 terms.

    First over every 16th row, which mostly lie in one thread: the other way round threads exchange every sum of 16.
    """
    groups = x.reshape(ROWS // 16, 16, x.shape[1])
    return tl.sum(tl.sum(groups, 0), 0)


@triton.jit
def tile_moments(y, valid, count, ROWS: tl.constexpr):
    """Mean in float64 and M2 = sum (y - mean)^2 of the columns of y [ROWS, C], over its `count` valid rows.

    The corrected two-pass algorithm (Chan, Golub & LeVeque 1983): what the deviations sum to is the error of
    the float32 mean, which would otherwise enter the variance between tiles. Where y comes from memory rather than
    out of a product, a thread has fewer columns.
    """
    y = tl.where(valid[:, None], y.to(tl.float32), 0.0)
    share = 1.0 / count
    mean = column_sums(y, ROWS) * share
    deviation = tl.where(valid[:, None], y - mean[None, :], 0.0)
    error = column_sums(deviation, ROWS)
    m2 = column_sums(deviation * deviation, ROWS) - error * error * share
    return mean.to(tl.float64) + (error * share).to(tl.float64), m2
