"""What every Triton kernel takes of a GPU, for each architecture from sm_80 to sm_120, by ahead-of-time compilation.

The table `triton_resources.json` is checked in. Rows whose source changed are compiled again;
FUSEDRES_RECOMPILE=1 compiles all of them. A row that differs from the table fails:
`python tests/support/triton_resources.py` writes it anew.
"""

import os

import pytest

pytest.importorskip("triton")

import triton
from triton_entries import ARCHITECTURES, entries
from triton_resources import compile_entry, read_table

from fusedres.triton_kernels import conv1x1_backward_weight, elementwise, gram, tiles

# of a program, in KiB
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
ENTRIES = {entry.id: entry for entry in entries()}
ROWS = [(entry.id, architecture) for entry in ENTRIES.values() for architecture in entry.architectures]
TABLE = read_table()
# over many rows, of values whose mean is taken off afterwards
SUMS_OF_PRODUCTS = (conv1x1_backward_weight.conv1x1_backward_weight_kernel, gram.gram_kernel)


def row_of(version, entry_id, architecture):
    key = f"{entry_id} sm_{architecture}"
    assert key in TABLE[version], f"{key} is not in the table: python tests/support/triton_resources.py"
    return TABLE[version][key]


def test_two_versions_of_triton_are_in_the_table():
    assert "3.6.0" in TABLE and len(TABLE) >= 2
    for version, rows in TABLE.items():
        expected = {f"{entry_id} sm_{architecture}" for entry_id, architecture in ROWS}
        assert set(rows) == expected, f"rows of Triton {version} are not those of the kernels"


@pytest.mark.parametrize("version", TABLE)
@pytest.mark.parametrize(("entry_id", "architecture"), ROWS)
def test_row(version, entry_id, architecture):
    entry, row = ENTRIES[entry_id], row_of(version, entry_id, architecture)
    assert row["hash"] == entry.hash(), (
        f"the source changed: run tests/support/triton_resources.py with Triton {version}"
    )
    assert row["spills"] == 0
    assert row["warnings"] == []
    assert row["registers"] <= 255
    assert row["shared"] <= SHARED_LIMIT[architecture] * 1024
    assert row["registers"] * 32 * entry.warps <= 65536 and row["instructions"] > 0
    if entry.product:
        rows = entry.constants.get("BM", entry.constants["BN"])  # wgmma has 64 at least
        assert row["wgmma" if architecture == 90 and rows >= 64 else "mma"] > 0, "no tensor core instruction"
        assert row["async_copies"] >= entry.copies, "loads of an operand are not asynchronous"
        if entry.kernel in SUMS_OF_PRODUCTS:
            assert row["rounded_sums"] > 0, "the compiler folded the sum over steps into the product"
        assert row["overwritten_operands"] == 0, "registers are written while a product still reads them"


@pytest.mark.skipif(triton.__version__ not in TABLE, reason=f"no rows of Triton {triton.__version__}")
def test_changed_rows_compile_to_what_the_table_says():
    """Where no source changed, one small kernel and each product are, to show that the table is the compiler's."""
    last = {entry.kernel: entry.id for entry in ENTRIES.values() if entry.copies}  # of each product
    compiled_anyway = {("bn_stats", architecture) for architecture in ARCHITECTURES}
    # every second architecture in turn, for time's sake
    compiled_anyway |= {
        (entry_id, architecture)
        for place, entry_id in enumerate(last.values())
        for architecture in ARCHITECTURES[place % 2 :: 2]
    }
    recompile_all = os.environ.get("FUSEDRES_RECOMPILE") == "1"
    for entry_id, architecture in ROWS:
        entry, row = ENTRIES[entry_id], row_of(triton.__version__, entry_id, architecture)
        if recompile_all or row["hash"] != entry.hash() or (entry_id, architecture) in compiled_anyway:
            assert compile_entry(entry, architecture) == row, f"{entry_id} sm_{architecture}"


def test_a_row_follows_the_functions_that_its_kernel_calls():
    calls, does_not = ENTRIES["bn_add_relu_forward-projection_mask-C256"], ENTRIES["bn_stats"]
    before, source = (calls.hash(), does_not.hash()), elementwise.pack_bits.src
    elementwise.pack_bits._unsafe_update_src(source + "\n    # changed")
    try:
        assert calls.hash() != before[0] and does_not.hash() == before[1]
    finally:
        elementwise.pack_bits._unsafe_update_src(source)
    assert calls.hash() == before[0]


def tile_of(entry):
    """What the launcher chooses for the entry's channels."""
    cin, cout = entry.constants["CIN"], entry.constants.get("COUT", 0)
    chosen = {
        "conv1x1_forward": lambda: tiles.output_tile(tiles.CONV1X1_FORWARD, cout, cin),
        "conv1x1_gram_backward_input": lambda: tiles.output_tile(
            tiles.CONV1X1_GRAM_BACKWARD_INPUT, cin, cout
        ),
        "conv1x1_backward_input": lambda: tiles.output_tile(
            tiles.CONV1X1_PLAIN_BACKWARD_INPUT
            if tiles.dc_comes_first(cin, cout)
            else tiles.CONV1X1_BACKWARD_INPUT,
            cin,
            cout,
        ),
        "conv1x1_backward_weight": lambda: tiles.weight_tile(cout, cin),
        "gram": lambda: tiles.output_tile(tiles.GRAM, cin, cin),
    }
    return chosen[entry.kernel.__name__.removesuffix("_kernel")]()


ODD = [entry for entry in ENTRIES.values() if entry.id.endswith("-odd")]


@pytest.mark.parametrize("entry", ODD, ids=lambda entry: entry.id)
def test_rows_that_are_not_aligned_take_the_entries_compiled_for_them(entry):
    tile = tile_of(entry)
    found = {name: entry.constants.get(name) for name in ("BM", "BN", "BK")}
    expected = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk}
    assert found == expected if "BM" in entry.constants else (found["BN"], found["BK"]) == (tile.bn, tile.bk)
    assert (entry.warps, entry.stages) == (tile.warps, tile.stages)


def test_each_product_is_compiled_for_rows_that_are_not_aligned():
    assert {entry.kernel for entry in ODD} == {entry.kernel for entry in ENTRIES.values() if entry.product}
    assert tiles.aligned(64, 2048) and not tiles.aligned(64, 20) and not tiles.aligned(66, 64)


def test_statistics_tiles_do_not_depend_on_tuning():
    for table in (tiles.CONV1X1_FORWARD, tiles.CONV1X1_GRAM_BACKWARD_INPUT):
        assert {tile.bm for tile in table} == {tiles.STATISTICS_ROWS}
    assert tiles.STATISTICS_ROWS % 8 == tiles.REDUCTION_ROWS % 8 == 0


def test_partials_stay_small():
    for cin in (16, 24, 64, 128, 256, 512):
        bn = tiles.output_tile(tiles.GRAM, cin, cin).bn
        count = -(-cin // bn)
        partial = 4 * bn * bn * count * (count + 1) // 2
        assert partial <= 0.05 * 2 * cin * tiles.gram_rows(cin, bn)
        assert 4 * cin <= 0.07 * 2 * tiles.most_weight_rows(cin)


@pytest.mark.parametrize("batch", [256, 64, 8])
@pytest.mark.parametrize(("cin", "side"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_rows_of_the_weight_gradient(cin, side, batch):
    """ResNet-50's stages: at batch 256 two programs and more for each multiprocessor of an H100, of similar length."""
    cout, total = 4 * cin, batch * side * side
    tile, rows = tiles.weight_tile(cout, cin), tiles.weight_rows(cout, cin, total)
    splits = -(-total // rows)
    programs = splits * -(-cout // tile.bm) * -(-cin // tile.bn)
    assert rows % tile.bk == rows % 8 == 0 and rows <= tiles.most_weight_rows(cin)
    assert 4 * cin <= rows, "partials of more than half of dy's bytes"
    if batch == 256:
        assert programs >= 2 * 132
        assert splits * rows < 1.02 * total, "the last split has few rows"
