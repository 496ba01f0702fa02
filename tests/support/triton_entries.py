"""Every Triton kernel with every tile entry and set of optional arguments: what is compiled ahead of time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton

from fusedres.triton_kernels import (
    bn_add_relu_backward_input,
    bn_add_relu_backward_reduce,
    bn_add_relu_forward,
    bn_relu_maxpool,
    bn_stats,
    bn_vectors,
    conv1x1_backward_input,
    conv1x1_backward_weight,
    conv1x1_forward,
    conv1x1_gram_backward_input,
    gram,
    gram_backward_coefficients,
    gram_output_stats,
    merge,
    relu_backward,
    tiles,
    wgmma,
)

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# of kernels without tensor cores, and of rows that are not aligned
FIRST_OF_THEIR_KIND = (80, 90, 100)
# activations, vectors, merged sums, bytes, sizes; a channel count that a kernel specialises on is a multiple of 16
KINDS = {"A": "*bf16", "F": "*fp32", "D": "*fp64", "U": "*u8", "I": "i32"}
# the tiles of activations and weights that one step of a product loads
OPERANDS = {
    "conv1x1_forward": ("BM BK", "BK BN"),
    "conv1x1_gram_backward_input": ("BM BK", "BK BN", "BK BN"),
    "conv1x1_backward_input": ("BM BK", "BM BK", "BK BN"),
    "conv1x1_backward_weight": ("BK BM", "BK BN"),
    "gram": ("BK BN", "BK BN"),
}


@dataclass(frozen=True)
class Entry:
    """One kernel with one set of compile-time arguments; every argument in neither mapping is None."""

    id: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    product: bool = False
    copies: int = (
        0  # asynchronous ones of 16 bytes that a thread makes at least: of every operand, for each stage
    )
    architectures: tuple[int, ...] = FIRST_OF_THEIR_KIND

    def hash(self) -> str:
        """Of the kernel's source, of every jitted function it calls, and of this entry."""
        sources: dict[str, str] = {}

        def collect(function: Any) -> None:
            if function.src in sources.values():
                return
            sources[function.__name__] = function.src
            for name in re.findall(r"\w+", function.src):
                callee = function.fn.__globals__.get(name)
                if isinstance(callee, triton.JITFunction):
                    collect(callee)

        collect(self.kernel)
        waits = [wgmma.waits_on(capability) for capability in range(8, 13)]
        rest = (self.id, self.signature, self.constants, self.warps, self.stages, waits)
        return hashlib.sha256(repr((sorted(sources.items()), rest)).encode()).hexdigest()[:16]


def types(**groups: str) -> dict[str, str]:
    """types(A="x y") -> {"x": "*bf16", "y": "*bf16"}."""
    return {name: KINDS[kind] for kind, names in groups.items() for name in names.split()}


def products() -> Iterator[Entry]:
    forward = conv1x1_forward.conv1x1_forward_kernel
    sizes = "P H W H_OUT W_OUT"
    identity = types(A="x weight residual y", F="in_scale in_shift scale shift", U="mask", I=sizes)
    forms = {
        "stats": types(A="x weight y", D="tile_mean", F="tile_m2", I=sizes),
        "prologue_stats": types(A="x weight y", D="tile_mean", F="in_scale in_shift tile_m2", I=sizes),
        "prologue_identity_mask": identity,
        "prologue_projection_mask": {**identity, **types(F="residual_scale residual_shift")},
    }
    for tile in tiles.CONV1X1_FORWARD:
        for form, signature in forms.items():
            for stride in (1, 2) if form == "stats" else (1,):
                constants = {"CIN": 256, "COUT": 8 * tile.bn, "STRIDE": stride, "RELU": "mask" in form}
                yield product(f"{form}_stride{stride}", forward, signature, constants, tile)

    below = conv1x1_gram_backward_input.conv1x1_gram_backward_input_kernel
    frozen = types(A="dy c weight_dz dz_below", F="mean scale shift offset tile_sums", U="mask", I="P")
    training = {**frozen, **types(A="weight_a")}
    for tile in tiles.CONV1X1_GRAM_BACKWARD_INPUT:
        constants = {"CIN": tile.bn if tile.bn < 128 else 256, "COUT": 1024, "TERMS": 2}
        yield product("training", below, training, constants, tile)
        yield product("frozen", below, frozen, constants, tile)

    backward = conv1x1_backward_input.conv1x1_backward_input_kernel
    plain = types(A="dy c weight dx dc", F="scale shift A B K", I="P")
    projection = {**plain, **types(A="shortcut_dy")}
    joined = {**projection, **types(U="shortcut_mask")}
    for tile in tiles.CONV1X1_BACKWARD_INPUT:
        constants = {"CIN": 256 if tile.bn == 128 else tile.bn, "COUT": 256}
        yield product("plain", backward, plain, constants, tile)
        yield product("projection", backward, projection, constants, tile)
        yield product("identity_mask", backward, joined, constants, tile)
    without = set(types(A="c dc", F="scale shift A B K"))
    for tile in tiles.CONV1X1_PLAIN_BACKWARD_INPUT:
        constants = {"CIN": 8 * tile.bn, "COUT": 256}
        for form, signature in {"plain": plain, "projection": projection, "identity_mask": joined}.items():
            given = {name: kind for name, kind in signature.items() if name not in without}
            yield product(f"{form}_of_dc", backward, given, constants, tile)

    weight = conv1x1_backward_weight.conv1x1_backward_weight_kernel
    mask = types(A="dy c", F="scale shift partial_r partial_dbias", U="mask", I="P ROWS")
    pivot = {**mask, **types(F="pivot")}
    for tile in tiles.CONV1X1_BACKWARD_WEIGHT:
        cin = 256 if tile.bm == 128 else 64
        constants = {"CIN": cin, "COUT": 4 * cin}
        yield product("mask", weight, mask, constants, tile)
        yield product("mask_pivot", weight, pivot, constants, tile)

    signature = types(A="c", F="scale shift reference partial_products partial_sums", I="P")
    for tile in tiles.GRAM:
        constants = {"CIN": 4 * tile.bn, "ROWS": tiles.gram_rows(4 * tile.bn, tile.bn)}
        yield product("", gram.gram_kernel, signature, constants, tile)


def unaligned_products() -> Iterator[Entry]:
    """With one channel more: the entries that `tiles` chooses there. Copies of 2 bytes are not asynchronous."""
    for entry in products():
        more = {name: entry.constants[name] + 1 for name in ("CIN", "COUT") if name in entry.constants}
        widest = 32 if entry.id.startswith("conv1x1_backward_weight") else 64
        if entry.constants["BN"] == widest:
            constants = {**entry.constants, **more}
            label, few = f"{entry.id}-odd", FIRST_OF_THEIR_KIND
            yield replace(entry, id=label, constants=constants, copies=0, architectures=few)


def product(
    form: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], tile: tiles.GemmTile
) -> Entry:
    sizes = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "PRECISION": "tf32"}
    constants = {**constants, **{k: v for k, v in sizes.items() if k in kernel.arg_names}}
    name = kernel.__name__.removesuffix("_kernel")
    label = f"{name}-{form}-{tile.bm}x{tile.bn}x{tile.bk}w{tile.warps}s{tile.stages}"
    operands = OPERANDS[name][1:] if "_of_dc" in form else OPERANDS[name]
    second_loop = "weight_a" in signature and constants["CIN"] > tile.bk
    operands = operands * (2 if second_loop else 1)
    elements = [constants[m] * constants[n] for m, n in map(str.split, operands)]
    copies = tile.stages * sum(2 * count // (16 * 32 * tile.warps) for count in elements)
    return Entry(label, kernel, signature, constants, tile.warps, tile.stages, True, copies, ARCHITECTURES)


def elementwise() -> Iterator[Entry]:
    reduction = {"C": 256, "ROWS": tiles.REDUCTION_ROWS, "COLUMNS": tiles.REDUCTION_COLUMNS}
    warps = tiles.REDUCTION_WARPS
    stats = types(A="c", D="tile_mean", F="tile_m2", I="P")
    yield Entry("bn_stats", bn_stats.bn_stats_kernel, stats, reduction, warps)
    kernel = bn_add_relu_backward_reduce.bn_add_relu_backward_reduce_kernel
    relu = types(A="dy c", F="mean scale shift tile_sums", I="P")
    yield Entry("bn_add_relu_backward_reduce-relu", kernel, relu, {**reduction, "SUMS": 2}, warps)
    mask = types(A="dy c", F="mean tile_sums", U="mask", I="P")
    yield Entry("bn_add_relu_backward_reduce-mask", kernel, mask, {**reduction, "SUMS": 2}, warps)
    projection = {**mask, **types(A="shortcut_c", F="shortcut_mean")}
    sums = {**reduction, "SUMS": 3}
    yield Entry("bn_add_relu_backward_reduce-projection_mask", kernel, projection, sums, warps)

    for channels in (17, 256):
        width, rows, columns = tiles.elementwise_tile(channels)
        shape = {"C": channels, "WIDTH": width, "ROWS": rows, "COLUMNS": columns}
        for kernel, forms in (
            (bn_add_relu_forward.bn_add_relu_forward_kernel, elementwise_forward_forms()),
            (bn_add_relu_backward_input.bn_add_relu_backward_input_kernel, elementwise_backward_forms()),
        ):
            constants = {**shape, "RELU": True} if "RELU" in kernel.arg_names else shape
            for form, signature in forms.items():
                label = f"{kernel.__name__.removesuffix('_kernel')}-{form}-C{channels}"
                yield Entry(label, kernel, signature, constants, tiles.ELEMENTWISE_WARPS)

    pool = {"C": 64, "KERNEL": 3, "STRIDE": 2, "PADDING": 1}
    pool |= {"ROWS": tiles.POOL_ROWS, "COLUMNS": tiles.POOL_COLUMNS}
    sizes = "P H W H_OUT W_OUT"
    kernel = bn_relu_maxpool.bn_relu_maxpool_forward_kernel
    forward = types(A="c y", F="scale shift", U="indices", I=sizes)
    yield Entry("bn_relu_maxpool_forward", kernel, forward, pool, tiles.POOL_WARPS)
    kernel = bn_relu_maxpool.bn_relu_maxpool_backward_kernel
    sums = types(A="dy c", F="mean tile_sums", U="indices", I=sizes)
    yield Entry("bn_relu_maxpool_backward-reduce", kernel, sums, pool, tiles.POOL_WARPS)
    dc = types(A="dy c dc", F="A B K", U="indices", I=sizes)
    yield Entry("bn_relu_maxpool_backward-input", kernel, dc, pool, tiles.POOL_WARPS)


def elementwise_forward_forms() -> dict[str, dict[str, str]]:
    activation = types(A="c y", F="scale shift", I="N")
    identity = {**activation, **types(A="residual", U="mask")}
    projection = {**identity, **types(F="residual_scale residual_shift")}
    return {"activation": activation, "identity_mask": identity, "projection_mask": projection}


def elementwise_backward_forms() -> dict[str, dict[str, str]]:
    plain = types(A="dy c dc", F="A B K", I="N")
    mask = {**plain, **types(U="mask")}
    identity = {**mask, **types(A="dresidual")}
    projection = {**identity, **types(A="shortcut_c", F="shortcut_A shortcut_B shortcut_K")}
    relu = {**plain, **types(F="scale shift")}
    return {
        "plain": plain,
        "relu": relu,
        "mask": mask,
        "identity_mask": identity,
        "projection_mask": projection,
    }


def small() -> Iterator[Entry]:
    block = {"BLOCK": bn_vectors.BLOCK}
    scale_shift = types(F="mean var weight bias invstd scale shift", I="C")
    yield Entry("bn_scale_shift", bn_vectors.bn_scale_shift_kernel, scale_shift, {**block, "EPS": 1e-5})
    coefficients = types(F="sum_dz sum_dz_centered mean invstd scale dweight B K", I="P C")
    yield Entry("bn_backward_coefficients", bn_vectors.bn_backward_coefficients_kernel, coefficients, block)
    bytes_ = {"BYTES": relu_backward.BLOCK_BYTES}
    yield Entry("relu_mask", relu_backward.relu_mask_kernel, types(A="y", U="mask", I="N"), bytes_)
    elements = {"BLOCK": 8 * relu_backward.BLOCK_BYTES}
    yield Entry(
        "relu_backward", relu_backward.relu_backward_kernel, types(A="dy dz", U="mask", I="N"), elements
    )
    span = {"SPAN": tiles.MERGE_ROWS, "BT": merge.BLOCK_ROWS, "BC": merge.BLOCK_COLUMNS}
    sums = types(F="partials left right out", I="T W RIGHT")
    yield Entry("merge_sums-outer", merge.merge_sums_kernel, sums, {**span, "FINITE_LEFT": False})
    first = types(F="partials", D="out", I="T W RIGHT")
    yield Entry("merge_sums-first", merge.merge_sums_kernel, first, {**span, "FINITE_LEFT": False})
    moments = types(D="tile_mean out", F="tile_m2", I="T P C")
    yield Entry("merge_moments", merge.merge_moments_kernel, moments, {**span, "ROWS": tiles.STATISTICS_ROWS})
    finish = types(D="power_sums", F="mean var", I="T P C")
    rows = {"BT": merge.BLOCK_ROWS, "BC": merge.BLOCK_COLUMNS}
    yield Entry("finish_moments", merge.finish_moments_kernel, finish, rows)
    sample = {"SAMPLE": tiles.GRAM_SAMPLE, "BN": tiles.GRAM_SAMPLE_COLUMNS}
    reference = types(A="c", F="scale shift reference", I="P CIN")
    yield Entry("gram_reference", gram.gram_reference_kernel, reference, sample)
    pivot = types(A="c", F="scale shift center pivot rest", I="P CIN")
    yield Entry("conv1x1_pivot", conv1x1_backward_weight.pivot_kernel, pivot, {**sample, "COARSE": True})
    finish = types(D="products sums", F="reference m S", I="P CIN")
    yield Entry("gram_finish", gram.gram_finish_kernel, finish, {"BN": 64, "BLOCK": 128})


def algebra() -> Iterator[Entry]:
    """Of Cout x Cin weights, in float64."""
    by_rows = {"BM": tiles.ALGEBRA_ROWS[0], "BK": tiles.ALGEBRA_ROWS[1]}
    by_columns = {"BM": tiles.ALGEBRA_COLUMNS[0], "BN": tiles.ALGEBRA_COLUMNS[1]}
    stats = types(A="weight", D="products", F="m mean var center", I="CIN COUT")
    kernel = gram_output_stats.gram_output_stats_kernel
    yield Entry("gram_output_stats", kernel, stats, by_rows)
    yield Entry("gram_output_stats-bias", kernel, {**stats, **types(A="bias")}, by_rows)
    kernel = gram_backward_coefficients.gram_bn_backward_kernel
    common = types(F="r sum_dz invstd scale dweight weight_dz", A="weight", I="P CIN COUT")
    training = {**common, **types(F="m center B", D="wide sloped")}
    frozen = {**common, **types(F="mean dW")}
    yield Entry("gram_bn_backward-training", kernel, training, by_rows)
    yield Entry("gram_bn_backward-frozen", kernel, frozen, by_rows)
    yield Entry("gram_bn_backward-frozen_bias", kernel, {**frozen, **types(A="bias")}, by_rows)
    kernel = gram_backward_coefficients.gram_weight_gradient_kernel
    gradient = types(F="r sum_dz scale B m center dW", D="products", I="P CIN COUT")
    yield Entry("gram_weight_gradient", kernel, gradient, by_rows)
    kernel = gram_backward_coefficients.gram_offset_kernel
    offset = types(D="products", F="weight_dz sum_dz m center weight_a offset", I="P CIN COUT")
    yield Entry("gram_offset", kernel, offset, by_columns)
    kernel = conv1x1_gram_backward_input.split_weight_kernel
    alone = types(F="weight", A="terms", I="ROWS CIN SHARE")
    moving = {**alone, **types(F="center offset moved_offset")}
    yield Entry("split_weight", kernel, alone, by_columns)
    yield Entry("split_weight-offset", kernel, moving, by_columns)


def entries() -> list[Entry]:
    return [*products(), *unaligned_products(), *elementwise(), *small(), *algebra()]
