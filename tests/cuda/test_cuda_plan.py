"""Launch geometry: every element is visited once, whatever the size, and no index or grid overflows."""

import itertools

import cuda_host_build
import pytest

from fusedres.ops.native.products import WIDEST_LINE

pytestmark = pytest.mark.skipif(cuda_host_build.cuda_include() is None, reason="no CUDA headers here")

CHANNELS = (1, 3, 8, 17, 24, 64, 256, 1000, 2048, 8 * 251)


@pytest.fixture(scope="module")
def host():
    return cuda_host_build.load(cuda_host_build.build("plain"))


@pytest.mark.parametrize("multiprocessors", (1, 7, 132))
@pytest.mark.parametrize("channels", CHANNELS)
def test_packets_are_visited_once_and_channels_stay_fixed(host, channels, multiprocessors):
    for rows in (1, 5, 300):
        numel = rows * channels
        plan = host.plan_packets(numel, channels, 2, True, multiprocessors)
        visited = []
        for block in range(plan.blocks):
            for thread in range(plan.threads):
                first = plan.first(block, thread)
                mine = [plan.backwards(step) for step in range(first, plan.packets, plan.stride())]
                visited += mine
                if plan.fixed_channels:
                    assert len({plan.first_channel(packet) for packet in mine}) <= 1
            if plan.first(block, 0) >= plan.packets:
                break
        assert sorted(visited) == list(range(-(-numel // 8)))
        assert not plan.fixed_channels or channels % 8 == 0


@pytest.mark.parametrize("vector", (1, 8))
@pytest.mark.parametrize("channels", CHANNELS)
def test_tiles_visit_every_row_and_channel_once(host, channels, vector):
    if channels % vector:
        return
    for rows in (0, 1, 5, 300):
        plan = host.plan_tiles(rows, channels, vector, 2, 2, 7)
        first_rows = [
            plan.first_row(g, t) for g in range(plan.groups) for t in range(0, plan.threads(), plan.lanes)
        ]
        visited = [r for first in first_rows for r in range(first, rows, plan.row_stride())]
        assert sorted(visited) == list(range(rows))
        assert [plan.rows_of_thread(f) for f in first_rows] == [
            len(range(f, rows, plan.row_stride())) for f in first_rows
        ]
        starts = [plan.first_channel(c, lane) for c in range(plan.chunks) for lane in range(plan.lanes)]
        assert [s for s in starts if s < channels] == list(range(0, channels, vector))


HUGE = [(2**31 + 5, 1), (2**28 + 1, 8), (2**22, 2048), (3 * 2**33, 64), (5, 2**31), (2**36, 24)]


@pytest.mark.parametrize(("rows", "channels"), HUGE)
def test_beyond_two_to_the_31_elements(host, rows, channels):
    numel = rows * channels
    for aligned in (True, False):
        plan = host.plan_packets(numel, channels, 4, aligned, 132)
        assert plan.packets == -(-numel // 8) and 0 < plan.blocks < 2**31 and 0 < plan.threads <= 1024
        steps = (plan.packets - 1) // plan.stride()
        last = plan.first(
            (plan.packets - 1) % plan.stride() // plan.threads, (plan.packets - 1) % plan.threads
        )
        assert last + steps * plan.stride() == plan.packets - 1 and plan.backwards(plan.packets - 1) == 0
        if plan.fixed_channels:
            assert plan.stride() * 8 % channels == 0
    for vector in (1, 8):
        if channels % vector:
            continue
        plan = host.plan_tiles(rows, channels, vector, 2, 2, 132)
        assert 0 < plan.chunks < 2**31 and 0 < plan.groups <= 65535 and 0 < plan.threads() <= 1024
        assert plan.chunks * plan.lanes * vector >= channels > plan.first_channel(plan.chunks - 1, 0)
        per_thread = [plan.rows_of_thread(plan.first_row(g, 0)) for g in (0, plan.groups - 1)]
        assert 0 <= per_thread[0] - per_thread[1] <= 1
        total = plan.rows_of_thread(plan.first_row(0, 0)) * plan.row_stride()
        assert total >= rows > total - plan.row_stride()


@pytest.mark.parametrize(
    ("rows", "channels"), [(256 * 56 * 56, 256), (256 * 56 * 56, 64), (256 * 7 * 7, 2048)]
)
def test_partials_are_at_most_five_percent_of_the_tensor(host, rows, channels):
    plan = host.plan_tiles(rows, channels, 8, 4, 2, 132)
    assert plan.workspace_bytes(17) <= 0.05 * rows * channels * 2
    assert plan.chunks * plan.groups >= 132, "a multiprocessor without work"


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (127, 128), (128, 129), (5000, 64), (0, 8), (2**36, 2048)]
)
@pytest.mark.parametrize("multiprocessors", (1, 7, 132))
def test_products_have_every_tile_once(host, rows, columns, multiprocessors):
    plan = host.plan_product(rows, columns, 72, multiprocessors)
    assert plan.column_tiles == -(-columns // 128) and plan.row_tiles == -(-rows // 128)
    assert 1 <= plan.groups <= max(1, min(plan.row_tiles, 65535)) and plan.steps() == 3
    of_groups = [plan.rows_of_group(group) for group in range(plan.groups)]
    assert sum(of_groups) == rows and all(of_groups) == (rows > 0)
    if rows < 10**4:
        for group, found in enumerate(of_groups):
            assert found == sum(plan.rows_of_tile(t) for t in range(group, plan.row_tiles, plan.groups))


def test_partial_results_of_products_do_not_overlap(host):
    plan = host.plan_product(5000, 300, 64, 7)
    places = [plan.partial_of(c, g) for c in range(plan.column_tiles) for g in range(plan.groups)]
    assert sorted(places) == list(range(0, 256 * len(places), 256))
    assert plan.workspace_bytes() == 256 + 8 * 256 * len(places)


@pytest.mark.parametrize("upper", (False, True))
@pytest.mark.parametrize(("left", "right"), [(1, 1), (64, 64), (129, 300), (2048, 512)])
@pytest.mark.parametrize("rows", (0, 1, 257, 100_000, 2**36 + 3))
def test_products_over_rows_have_every_tile_and_row_once(host, rows, left, right, upper):
    right = left if upper else right
    plan = host.plan_rows(rows, left, right, upper, 132)
    sides = -(-left // 128), -(-right // 128)
    expected = [(i, j) for i in range(sides[0]) for j in range(i if upper else 0, sides[1])]
    assert [plan.place(tile) for tile in range(plan.tiles)] == expected
    assert 1 <= plan.splits <= 65535 and plan.rows_of_split % 32 == 0
    firsts = [plan.first_row(split) for split in range(plan.splits)]
    assert sum(plan.rows_from(first) for first in firsts) == rows
    assert all(plan.rows_from(first) > 0 for first in firsts) == (rows > 0)
    products = [plan.products_of(split) for split in range(plan.splits + 1)]
    assert plan.sums_of(plan.splits) <= products[0] and products[0] % 4 == 0
    assert {b - a for a, b in itertools.pairwise(products)} == {left * right}
    assert plan.floats() == products[-1]


@pytest.mark.parametrize("channels", (1, 2048, 2**20, 2**26))
def test_places_within_a_split_fit_32_bits(host, channels):
    for rows in (1, 4096, 2**38 // channels):
        plan = host.plan_rows(rows, 8, channels, False, 132)
        assert 32 <= plan.rows_of_split <= (2**32 - 1) // channels and 1 <= plan.splits <= 65535
        assert sum(plan.rows_from(plan.first_row(split)) for split in range(plan.splits)) == rows


def test_partial_products_are_at_most_five_percent_of_narrow_activations(host):
    rows, cout, cin = 256 * 56 * 56, 256, 64
    plan = host.plan_rows(rows, cout, cin, False, 132)
    assert plan.floats() * 4 <= 0.05 * rows * (cout + cin) * 2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (7, 7), (3, 30), (4, 31), (2, 126)])
def test_every_tap_inside_the_image_finds_its_position_in_the_halo(host, height, width):
    rows = 3 * height * width
    plan = host.plan_halo(height, width, rows)
    for first in range(0, rows, 128):
        of_x = [0 <= plan.first_row(first) + place < rows for place in range(plan.places())]
        assert of_x == [plan.begin(first) <= place < plan.end(first) for place in range(plan.places())]
        h, w = first // width % height, first % width
        for row in range(min(128, rows - first)):
            bits = plan.taps_inside(h, w, row)
            for tap in range(9):
                line, column = (
                    (first + row) // width % height + tap // 3 - 1,
                    (first + row) % width + tap % 3 - 1,
                )
                assert bits >> tap & 1 == (0 <= line < height and 0 <= column < width)
                place = plan.place_of(row, tap // 3, tap % 3)
                assert 0 <= place < plan.places()
                there = first + row + (tap // 3 - 1) * width + tap % 3 - 1
                assert plan.first_row(first) + place == there
                assert not bits >> tap & 1 or 0 <= there < rows
        assert plan.place_of(127, 2, 2) == plan.places() - 1


def test_halos_have_room_beside_the_place_of_zeros(host):
    for width in range(1, WIDEST_LINE + 1):
        plan = host.plan_halo(5, width, 5 * width)
        firsts = [plan.first_place(step) for step in range(3)]
        assert firsts == ([0, 192, 0] if plan.halves == 2 else [0, 0, 0])
        assert max(firsts) + plan.places() < host.halo_places and host.halo_fits(width)
        assert plan.places() <= 192 or plan.halves == 1
    assert host.plan_halo(5, 30, 150).halves == 2 and host.plan_halo(5, 31, 155).halves == 1
    assert not host.halo_fits(WIDEST_LINE + 1)
