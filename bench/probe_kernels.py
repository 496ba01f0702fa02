"""First 1x1 convolutions with fused prologue and epilogue, in Triton, to hold against cuDNN.

    python bench/probe_kernels.py CAPABILITY     compiles both for sm_<CAPABILITY>, no GPU needed, prints JSON

Rows P = N*H*W of NHWC tensors; channel counts are constexpr, else ptxas serialises the wgmma pipeline.
Statistics leave as one partial a tile, float32, without atomics.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Rows, output channels and inner channels of a tile; warps and pipeline stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


TILES = (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3))


@triton.jit
def conv1x1_forward_kernel(
    x, w, y, side, in_scale, in_shift, tile_sum, tile_square, P,
    CIN: tl.constexpr, COUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [P, COUT] = a W^T, a = relu(in_scale*x + in_shift) [P, CIN], kept in `side`; W [COUT, CIN]."""
    tile = tl.program_id(0) // (COUT // BN)
    column = tl.program_id(0) % (COUT // BN)
    rows = tile.to(tl.int64) * BM + tl.arange(0, BM)
    channels = column * BN + tl.arange(0, BN)
    first = column + tl.zeros((1, 1), tl.int32) == 0  # a tensor: the interpreter cannot mask by a scalar
    inner = tl.arange(0, BK)
    inside = (rows < P)[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, CIN, BK):
        at = rows[:, None] * CIN + (k + inner)[None, :]
        c = tl.load(x + at, mask=inside, other=0.0)  # [BM, BK]
        weight = tl.load(w + channels[None, :] * CIN + (k + inner)[:, None])  # [BK, BN]
        scale = tl.load(in_scale + k + inner)
        shift = tl.load(in_shift + k + inner)
        a = c.to(tl.float32) * scale[None, :] + shift[None, :]
        a = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype.element_ty)
        tl.store(side + at, a, mask=inside & first)
        acc = tl.dot(a, weight, acc)
    out = acc.to(y.dtype.element_ty)
    tl.store(y + rows[:, None] * COUT + channels[None, :], out, mask=inside)
    rounded = tl.where(inside, out.to(tl.float32), 0.0)
    tl.store(tile_sum + tile * COUT + channels, tl.sum(rounded, 0))
    tl.store(tile_square + tile * COUT + channels, tl.sum(rounded * rounded, 0))


@triton.jit
def conv1x1_backward_input_kernel(
    dz, c, w, dc, skip, below, dx, A, B, K, scale, shift, mean, tile_sum, tile_centered, P,
    CIN: tl.constexpr, COUT: tl.constexpr, SKIP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """dx [P, CIN] = dc W with dc = A*dz + B*c + K [P, COUT], stored; W [COUT, CIN].

    SKIP: adds the shortcut's gradient. Otherwise goes through the ReLU below, with its BN's sums.
    """
    tile = tl.program_id(0) // (CIN // BN)
    column = tl.program_id(0) % (CIN // BN)
    rows = tile.to(tl.int64) * BM + tl.arange(0, BM)
    channels = column * BN + tl.arange(0, BN)
    first = column + tl.zeros((1, 1), tl.int32) == 0  # a tensor: the interpreter cannot mask by a scalar
    inner = tl.arange(0, BK)
    inside = (rows < P)[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, COUT, BK):
        at = rows[:, None] * COUT + (k + inner)[None, :]
        g = tl.load(dz + at, mask=inside, other=0.0).to(tl.float32)  # [BM, BK]
        raw = tl.load(c + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(w + (k + inner)[:, None] * CIN + channels[None, :])  # [BK, BN]
        a = tl.load(A + k + inner)
        b = tl.load(B + k + inner)
        offset = tl.load(K + k + inner)
        g = (g * a[None, :] + (raw * b[None, :] + offset[None, :])).to(dz.dtype.element_ty)
        tl.store(dc + at, g, mask=inside & first)
        acc = tl.dot(g, weight, acc)
    at = rows[:, None] * CIN + channels[None, :]
    if SKIP:
        acc += tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=inside)
    else:
        raw = tl.load(below + at, mask=inside, other=0.0).to(tl.float32)
        a = raw * tl.load(scale + channels)[None, :] + tl.load(shift + channels)[None, :]
        stopped = a.to(dx.dtype.element_ty) <= 0
        out = tl.where(stopped | (rows >= P)[:, None], 0.0, acc).to(dx.dtype.element_ty)
        tl.store(dx + at, out, mask=inside)
        rounded = out.to(tl.float32)
        centered = raw - tl.load(mean + channels)[None, :]
        tl.store(tile_sum + tile * CIN + channels, tl.sum(rounded, 0))
        tl.store(tile_centered + tile * CIN + channels, tl.sum(rounded * centered, 0))


def partials(rows: int, tile: Tile, channels: int, like: Tensor) -> list[Tensor]:
    shape = (triton.cdiv(rows, tile.rows), channels)
    return [like.new_empty(shape, dtype=torch.float32) for _ in range(2)]


def fits(tile: Tile, columns: int, inner: int) -> bool:
    """Whether channel counts are whole multiples of the tile's."""
    return columns % tile.columns == 0 and inner % tile.inner == 0


def conv1x1_forward(x: Tensor, w: Tensor, in_scale: Tensor, in_shift: Tensor, tile: Tile) -> list[Tensor]:
    """y [P, COUT], a [P, CIN] and the tiles' sums and sums of squares, from x [P, CIN], w [COUT, CIN]."""
    (p, cin), cout = x.shape, w.shape[0]
    y, side = x.new_empty(p, cout), torch.empty_like(x)
    sums = partials(p, tile, cout, x)
    grid = (triton.cdiv(p, tile.rows) * (cout // tile.columns),)
    conv1x1_forward_kernel[grid](
        x, w, y, side, in_scale, in_shift, *sums, p,
        cin, cout, tile.rows, tile.columns, tile.inner, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return [y, side, *sums]


def conv1x1_backward_input(
    dz: Tensor,
    c: Tensor,
    w: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor],
    skip: Tensor | None,
    below: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor],
    tile: Tile,
) -> list[Tensor]:
    """dx [P, CIN], dc [P, COUT] and, without `skip`, the tiles' two sums; dz, c [P, COUT], below [P, CIN]."""
    (p, cout), cin = dz.shape, w.shape[1]
    dx, dc = dz.new_empty(p, cin), torch.empty_like(dz)
    sums = partials(p, tile, cin, dz)
    grid = (triton.cdiv(p, tile.rows) * (cin // tile.columns),)
    conv1x1_backward_input_kernel[grid](
        dz, c, w, dc, below if skip is None else skip, below, dx, *coefficients, *vectors, *sums, p,
        cin, cout, skip is not None, tile.rows, tile.columns, tile.inner,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return [dx, dc] if skip is not None else [dx, dc, *sums]


def compile_ahead(kernel, constants: dict[str, object], tile: Tile, capability: int) -> dict[str, object]:
    """Registers, spills, shared memory and warnings of ptxas for bfloat16 tensors on sm_<capability>."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, "BM": tile.rows, "BN": tile.columns, "BK": tile.inner}
    vectors = {"in_scale", "in_shift", "scale", "shift", "mean", "A", "B", "K"}
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "P":
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if name in vectors or name.startswith("tile_") else "*bf16"
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {**ptxas(compiled.asm["ptx"]), "shared_bytes": compiled.metadata.shared}


def ptxas(ptx: str) -> dict[str, object]:
    """Assembles PTX and reads the resource report."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None, "PTX names no target"
    binaries = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        for name in ("ptxas", "ptxas-blackwell"):  # newer PTX needs the second
            command = [
                binaries / name,
                "-v",
                f"--gpu-name={target[1]}",
                source,
                "-o",
                f"{folder}/kernel.cubin",
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        done.check_returncode()
    said = done.stdout + done.stderr
    spills = re.findall(r"(\d+) bytes spill", said)
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[-1]),
        "spill_bytes": sum(map(int, spills)),
        "serialized": len(re.findall(r"C75\d\d", said)),
        "wgmma": ptx.count("wgmma.mma_async"),
    }


def main() -> None:
    capability = int(sys.argv[1])
    found = {}
    for cin, cout in ((64, 256), (1024, 256)):
        for tile in TILES:
            if fits(tile, cout, cin):
                constants = {"CIN": cin, "COUT": cout}
                name = f"{cin}-{cout}/{'x'.join(map(str, tile[:3]))}"
                found[f"forward/{name}"] = compile_ahead(conv1x1_forward_kernel, constants, tile, capability)
            if fits(tile, cin, cout):
                constants = {"CIN": cin, "COUT": cout, "SKIP": cin > cout}
                found[f"backward_input/{name}"] = compile_ahead(
                    conv1x1_backward_input_kernel, constants, tile, capability
                )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
