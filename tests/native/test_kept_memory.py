"""Memory of large results, kept between calls: it serves again once nobody holds it, and never before."""

import itertools
import os
import threading

import conv1x1_cases
import conv1x1_checks
import numpy as np
import pytest
import torch

import fusedres
from fusedres import models
from fusedres.ops.native import functions, kept_memory, library

pytestmark = pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")

X = torch.zeros(2, 8, 64, 64)  # of which results are taken that are alike


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """An own one, which keeps results of any size."""
    found = kept_memory.KeptMemory()
    monkeypatch.setattr(kept_memory, "KEPT", found)
    monkeypatch.setattr(kept_memory, "LARGE", 0)
    return found


def take(channels=8):
    y = kept_memory.take(X, channels, 64, 64)
    assert y is not None and y.is_contiguous(memory_format=torch.channels_last)
    assert y.shape == (2, channels, 64, 64) and y.dtype == X.dtype and y._base is None
    assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
    return y


def test_memory_serves_again_once_it_is_dropped():
    first = take()
    address = first.data_ptr()
    del first
    assert take().data_ptr() == address


HOLDERS = {
    "the tensor": lambda y: y,
    "a view": lambda y: y[1:, 3],
    "a detached one": lambda y: y.detach(),
    "its data": lambda y: y.data,
    "its storage": lambda y: y.untyped_storage(),
    "an array": lambda y: y.numpy(),
    "a view of an array": lambda y: y.numpy()[0, :2],
    "a capsule": lambda y: torch.utils.dlpack.to_dlpack(y),
    "an array of a capsule": lambda y: np.from_dlpack(y),
    "a graph": lambda y: (y * torch.ones(1, requires_grad=True)).grad_fn,
    "another type": lambda y: y.view(torch.int32),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_not_given_away_while_somebody_holds_it(holder):
    y = take()
    address = y.data_ptr()
    held = HOLDERS[holder](y)
    del y
    taken = [take() for _ in range(3)]
    assert address not in [t.data_ptr() for t in taken]
    del held
    assert take().data_ptr() == address


def test_memory_that_somebody_changed_is_not_given_away():
    resized, shared = take(), take()
    resized.untyped_storage().resize_(0)
    shared.share_memory_()
    # both are still kept, so that no new one has their number
    changed = {t.untyped_storage()._cdata for t in (resized, shared)}
    del resized, shared
    taken = [take() for _ in range(3)]
    assert not changed & {t.untyped_storage()._cdata for t in taken}
    assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in taken)
    assert not any(t.is_shared() for t in taken)


def test_a_result_can_be_resized_as_any_other():
    y = take()
    y.resize_(4, 8, 64, 64)
    assert y.shape[0] == 4


def test_sizes_do_not_mix():
    small, address = take(channels=4), take().data_ptr()
    del small
    assert take(channels=8).data_ptr() == address
    assert take(channels=4).untyped_storage().nbytes() == 2 * 4 * 64 * 64 * 4


def test_what_is_too_much_or_long_unused_is_given_up(kept, monkeypatch):
    size = X.numel() * 4
    monkeypatch.setattr(kept_memory, "most_bytes", lambda: 3 * size)
    held = [take() for _ in range(3)]
    assert kept_memory.take(X, 8, 64, 64) is None
    del held
    monkeypatch.setattr(kept_memory, "WINDOW", 4)
    for _ in range(4):
        take()
    assert kept_memory.take(X, 16, 64, 64) is not None
    assert [k.size // size for k in kept.storages] == [2, 1]
    assert kept.most_held == 2 * size  # of four, one more than there was room for; half of it, a window later


def test_no_more_is_kept_than_a_little_beside_what_was_held_at_once(kept, monkeypatch):
    size = X.numel() * 4
    monkeypatch.setattr(kept_memory, "SPARE", 2 * size)
    held = [take() for _ in range(4)]
    del held
    for channels in range(9, 30):  # of another size each time
        take(channels)
        assert sum(k.size for k in kept.storages) <= 6 * size
        assert len(kept.storages) > 1 or channels > 24


@pytest.mark.parametrize(
    ("limit", "processes", "most"), [("max\n", "", None), ("4096\n", "", 1024), ("4096\n", "2", 512)]
)
def test_a_part_of_the_machines_or_the_containers_memory_may_be_kept(
    limit, processes, most, monkeypatch, tmp_path
):
    file = tmp_path / "memory.max"
    file.write_text(limit)
    monkeypatch.setattr(kept_memory, "LIMITS", (tmp_path / "none", file))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    kept_memory.most_bytes.cache_clear()
    try:
        found = kept_memory.most_bytes()
        assert found == most if most is not None else found > 2**20
    finally:
        kept_memory.most_bytes.cache_clear()


def test_a_default_device_does_not_matter():
    kept_memory.holders_of_free.cache_clear()
    with torch.device("meta"):
        assert take().is_cpu


def test_where_an_allocation_fails_what_is_free_goes_first(kept, monkeypatch):
    held, make = take(), kept_memory.make
    take(4)

    def made(size):
        if any(k.size != size and k.is_free() for k in kept.storages):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return make(size)

    monkeypatch.setattr(kept_memory, "make", made)
    take(16)
    assert sorted(k.size for k in kept.storages) == [held.numel() * 4, held.numel() * 8]


def test_a_child_does_not_hold_what_is_free(kept):
    """Its pages would be those of the parent once more, as soon as one of the two writes."""
    held = take()
    take(4)
    with kept.lock:  # another thread has it: nothing goes, and the child has a lock of its own
        child = os.fork()
        if child == 0:
            os._exit(0 if kept.lock.acquire(blocking=False) else 1)
    assert os.waitpid(child, 0)[1] == 0 and len(kept.storages) == 2
    child = os.fork()
    if child == 0:
        os._exit(len(kept.storages))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert [k.size for k in kept.storages] == [held.numel() * 4]


def test_threads_share_what_is_free_and_nothing_else():
    seen, errors = [], []

    def work(number):
        for _ in range(200):
            y = kept_memory.take(X, 8, 64, 64)
            if y is None:  # another thread is taking one
                continue
            y.fill_(number)
            if not bool((y == number).all()):
                errors.append(number)
            seen.append(y.data_ptr())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and len(set(seen)) <= 8


def test_who_cannot_have_the_lock_does_without(kept):
    """A finaliser within, or the child of a fork while another thread was within."""
    with kept.lock:
        assert kept_memory.take(X, 8, 64, 64) is None
    take()


def test_nothing_is_kept_where_it_is_switched_off_or_torch_does_not_count(kept, monkeypatch):
    take()
    monkeypatch.setenv(kept_memory.ENVIRONMENT_VARIABLE, "0")
    assert kept_memory.take(X, 8, 64, 64) is None and not kept.storages
    monkeypatch.delenv(kept_memory.ENVIRONMENT_VARIABLE)
    take()
    try:
        numbers = itertools.count()
        for count in (None, lambda storage: next(numbers)):
            kept_memory.holders_of_free.cache_clear()
            monkeypatch.setattr(kept_memory, "use_count", count)
            assert kept_memory.take(X, 8, 64, 64) is None
    finally:
        kept_memory.holders_of_free.cache_clear()


def test_small_results_and_those_of_other_types_are_not_kept(monkeypatch):
    monkeypatch.setattr(kept_memory, "LARGE", X.numel() * 4)
    assert kept_memory.take(X, 8, 64, 64) is None
    monkeypatch.setattr(kept_memory, "LARGE", 0)
    assert kept_memory.take(torch.nn.Parameter(X), 8, 64, 64) is None


@pytest.mark.parametrize("form", ["projection", "affine", "stride2_projection"])
def test_products_into_kept_memory(form, kept):
    case = conv1x1_cases.ConvCase("large", (2, 530, 15, 17), cout=150, form=form, dtype=torch.float32)
    conv1x1_checks.CHECKS["conv1x1_forward"](functions.backend(), case)
    assert kept.results > 0


@pytest.mark.parametrize("recipe", ["separate", "prologue"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_patched_model_gives_results_that_stay(name, recipe, kept):
    torch.manual_seed(0)
    model = getattr(models, name)().eval().to(memory_format=torch.channels_last)
    images = [torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    outputs = []
    fusedres.patch(model, recipe=recipe)
    model.layer2.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        given = [model(x) for x in images]
        held, copies = list(outputs), [y.clone() for y in outputs]
        again = [model(x) for x in images]
    assert kept.results > 0
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


@pytest.mark.parametrize("recipe", ["separate", "prologue"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_patched_model_trains_as_in_new_memory(name, recipe, kept, monkeypatch):
    images = torch.randn(3, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    runs = []
    for on in ("1", "0"):
        monkeypatch.setenv(kept_memory.ENVIRONMENT_VARIABLE, on)
        torch.manual_seed(0)
        model = getattr(models, name)(num_classes=10).to(memory_format=torch.channels_last)
        fusedres.patch(model, recipe=recipe)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        held, copies = [], []
        model.layer1.register_forward_hook(lambda module, args, output, held=held: held.append(output))
        for x in images:
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            held.append(x.grad)
            copies += [t.detach().clone() for t in held[-2:]]
        assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
        runs.append([*copies, *(p.detach() for p in model.parameters())])
    assert kept.results > 0
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
