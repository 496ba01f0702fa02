"""A patched module's class passes for its own, and making it runs no code of the user's."""

from __future__ import annotations

import abc
import copy
import inspect
import pickle

import pytest
import torch
from block_forms import ran_as
from same_model import assert_same_step, images, pair
from spellings import InPlaceAdd
from torch import nn

import fusedres
from fusedres.models import BasicBlock, resnet18
from fusedres.patching import install

REGISTRY: dict[str, type] = {}


class Registered(InPlaceAdd):
    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        REGISTRY[cls.__name__] = cls


class InRegistry(Registered):
    pass


class Kinded(InPlaceAdd):
    def __init_subclass__(cls, *, kind, **keywords):
        super().__init_subclass__(**keywords)
        cls.kind = kind


class OfKind(Kinded, kind="residual"):
    pass


class Final(InPlaceAdd):
    def __init_subclass__(cls, **keywords):
        raise TypeError("Final is final")


class Meta(type):
    def __new__(mcs, name, bases, namespace, *, width):
        made = super().__new__(mcs, name, bases, namespace)
        REGISTRY[f"{name} of {width}"] = made
        return made

    def __init__(cls, name, bases, namespace, *, width):
        super().__init__(name, bases, namespace)
        cls.width = width


class WithKeyword(InPlaceAdd, metaclass=Meta, width=16):
    pass


class Abstract(InPlaceAdd, abc.ABC):
    pass


DEMANDING = [InRegistry, OfKind, Final, WithKeyword, Abstract]


@pytest.mark.parametrize("build", DEMANDING)
def test_classes_that_act_when_subclassed(build):
    before = dict(REGISTRY)
    plain, fused = pair(build)
    assert before == REGISTRY and type(fused).__name__ == build.__name__
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert fusedres.is_patched(twin) and isinstance(twin, build)
    assert type(fusedres.unpatch(fused)) is build and before == REGISTRY


class Unwilling(InPlaceAdd):
    """A class whose instances have a layout of their own, which no subclass made later shares."""

    @property
    def __class__(self):
        return InPlaceAdd


def test_a_class_that_answers_for_itself_is_left_alone():
    model = nn.Sequential(InPlaceAdd(), Unwilling())
    fusedres.patch(model, recipe="separate")
    codes = [block.code for block in fusedres.report(model).blocks]
    assert codes[0] is None and codes[1].startswith("class_resists")
    model(images().float())
    assert type(model[1]) is Unwilling


def test_an_error_while_installing_leaves_the_model_as_it_was(monkeypatch):
    model = nn.Sequential(InPlaceAdd(), InPlaceAdd(), InPlaceAdd())
    fusedres.patch(model, recipe="gram", exclude="1")
    before = [dict(vars(m)) for m in model]
    right, calls = install.install, []

    def failing(block, state):
        calls.append(block)
        if len(calls) == 3:
            raise RuntimeError("planted")
        right(block, state)

    monkeypatch.setattr(install, "install", failing)
    with pytest.raises(RuntimeError, match="planted"):
        fusedres.patch(model, recipe="separate")
    assert [dict(vars(m)) for m in model] == before
    assert [fusedres.is_patched(m) for m in model] == [True, False, True]


def test_the_class_is_as_the_base_to_who_asks():
    plain, fused = InPlaceAdd(), fusedres.patch(InPlaceAdd(), recipe="separate")
    cls = type(fused)
    assert fused.__class__ is InPlaceAdd and cls == InPlaceAdd and InPlaceAdd == cls
    assert {InPlaceAdd: 1}[cls] == 1 and {cls: 1}[InPlaceAdd] == 1 and cls in (nn.Conv2d, InPlaceAdd)
    assert isinstance(plain, cls) and issubclass(InPlaceAdd, cls) and not isinstance(nn.ReLU(), cls)
    assert cls != BasicBlock and cls != nn.Module
    assert inspect.signature(cls) == inspect.signature(InPlaceAdd)
    assert pickle.loads(pickle.dumps(cls)) is InPlaceAdd


@pytest.mark.parametrize("unpatched_after", [False, True])
def test_another_module_made_from_the_class(unpatched_after):
    """As copies for an average or a target network are made."""
    plain, fused = pair(InPlaceAdd)
    twin = type(fused)().double()
    assert type(twin) is InPlaceAdd
    twin.load_state_dict(fused.state_dict())
    if unpatched_after:
        fusedres.unpatch(fused)
    assert_same_step(plain, twin)


def test_another_model_made_from_the_class_of_one_with_a_stem():
    model = fusedres.patch(resnet18(num_classes=3), recipe="separate")
    twin = type(model)(BasicBlock, [2, 2, 2, 2], num_classes=3)
    twin.load_state_dict(model.state_dict())
    assert not fusedres.is_patched(twin)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(twin.eval()(x), fusedres.unpatch(model).eval()(x))


def test_the_method_of_the_class_called_with_another_module():
    plain, fused = pair(InPlaceAdd)
    x = images()
    assert torch.equal(type(fused).forward(plain, x), InPlaceAdd.forward(copy.deepcopy(plain), x))

    class Wider(InPlaceAdd):
        def forward(self, x):
            return super().forward(x) + 1

    other = fusedres.patch(InPlaceAdd().double(), recipe="separate")
    wider = Wider().double()
    wider.load_state_dict(other.state_dict())
    assert torch.equal(type(other).forward(wider, x), InPlaceAdd.forward(copy.deepcopy(wider), x))


def test_a_class_statement_with_the_class_as_base():
    fused = fusedres.patch(InPlaceAdd().double(), recipe="separate")

    class Added(type(fused)):
        def forward(self, x):
            return super().forward(x) + 1

    assert Added.__mro__[1] is InPlaceAdd
    x, added = images(), Added().double()
    added.load_state_dict(fused.state_dict())
    assert torch.equal(added(x), InPlaceAdd.forward(copy.deepcopy(added), x) + 1)


class AsksClass(InPlaceAdd):
    def forward(self, x):
        return super().forward(x) if type(self) is AsksClass else x


class AsksDunderClass(InPlaceAdd):
    def forward(self, x):
        return super().forward(x) if self.__class__ is AsksDunderClass else x


class AsksByTable(InPlaceAdd):
    def forward(self, x):
        return super().forward(x) if type(self) in (AsksByTable,) else x


class SuperOfType(InPlaceAdd):
    def forward(self, x):
        return super(type(self), self).forward(x)


class SuperOfClass(InPlaceAdd):
    def forward(self, x):
        return super(self.__class__, self).forward(x)


class TrainsBySuperOfClass(InPlaceAdd):
    def train(self, mode=True):
        return super(self.__class__, self).train(mode)


class TrainsBySuperOfType(InPlaceAdd):
    def train(self, mode=True):
        return super(type(self), self).train(mode)


def decorated(method):
    return lambda self, *args: method(self, *args)


class TrainsDecorated(InPlaceAdd):
    @decorated
    def train(self, mode=True):
        return super(type(self), self).train(mode)


class TrainsByBases(InPlaceAdd):
    def train(self, mode=True):
        return type(self).__bases__[0].train(self, mode)


class TrainsByMro(InPlaceAdd):
    def train(self, mode=True):
        return type(self).__mro__[1].train(self, mode)


class TrainsByCallOfMro(InPlaceAdd):
    def train(self, mode=True):
        return type(self).mro()[1].train(self, mode)


class TrainsIfItself(InPlaceAdd):
    def train(self, mode=True):
        super().train(mode)
        if type(self) is TrainsIfItself:
            self.bn1.eval()
        return self


class MadeBySuperOfType(InPlaceAdd):
    def __init__(self):
        super(type(self), self).__init__()


class NamesItself(InPlaceAdd):
    """type() and a plain super() side by side ask nothing of the class."""

    def extra_repr(self):
        return f"{type(self).__name__}: {super().extra_repr()}"


@pytest.mark.parametrize(
    ("build", "fuses"),
    [
        (AsksClass, False),
        (AsksDunderClass, False),
        (AsksByTable, True),
        (SuperOfType, False),
        (SuperOfClass, False),
        (TrainsBySuperOfClass, True),
        (TrainsBySuperOfType, False),
        (TrainsDecorated, False),
        (TrainsByBases, True),
        (TrainsByMro, False),
        (TrainsByCallOfMro, False),
        (TrainsIfItself, False),
        (MadeBySuperOfType, True),
        (NamesItself, True),
    ],
)
@pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")
def test_forwards_that_ask_for_their_class(build, fuses):
    plain = build().double()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    plain.train(), fused.train()
    assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code == (None if fuses else "asks_own_class")
    x = images()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), plain(x), rtol=1e-10, atol=1e-12)
    assert repr(fused) == repr(plain)


def test_another_tool_puts_its_class_over_a_patched_one():
    """As parametrizations and fully_shard do: the patch stays on top, and unpatch leaves the tool's class."""
    plain, fused = pair(InPlaceAdd)
    cls = fused.__class__
    other = type("Swapped", (cls,), {})
    fused.__class__ = other
    assert type(fused).__name__ == "Swapped" and isinstance(fused, other) and fused.__class__ is other
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")
    fused.__class__ = cls
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")
    fused.__class__ = other
    assert type(fusedres.unpatch(fused)) is other

    fused = fusedres.patch(fused, recipe="separate")
    replaced = type("Replaced", (InPlaceAdd,), {"forward": lambda self, x: x + 1})
    fused.__class__ = replaced
    assert type(fused) is replaced and not fusedres.is_patched(fused)
    assert torch.equal(fused(images()), images() + 1)


def test_a_pickle_is_loaded_with_weights_only(tmp_path):
    """What a user allows for the plain model is enough for the patched one."""
    plain, fused = pair(InPlaceAdd, "gram")
    torch.save(fused, tmp_path / "patched.pt")
    torch.save(plain, tmp_path / "plain.pt")
    classes = [InPlaceAdd, nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    with torch.serialization.safe_globals(classes):
        torch.load(tmp_path / "plain.pt", weights_only=True)
        loaded = torch.load(tmp_path / "patched.pt", weights_only=True)
    assert fusedres.is_patched(loaded)
    assert_same_step(plain, loaded)
    assert fusedres.report(loaded).blocks[0].recipe == "gram"


def test_a_pickle_whose_class_changed_since_runs_as_unpatched(monkeypatch):
    fused = fusedres.patch(InPlaceAdd().double(), recipe="separate")
    data = pickle.dumps(fused)
    monkeypatch.setattr(InPlaceAdd, "forward", lambda self, x: torch.sigmoid(self.bn1(self.conv1(x))))
    with pytest.warns(UserWarning, match="pickled while patched"):
        loaded = pickle.loads(data)
    assert type(loaded) is InPlaceAdd and not fusedres.is_patched(loaded)
    loaded(images())
