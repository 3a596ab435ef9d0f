"""The check `growth`: what a plugin holds must not grow from step to step or from task to task."""

from __future__ import annotations

import functools
import gc
import itertools
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen
from PIL import Image
from torch import Tensor, nn

from mulki_plugins.recipe.schema import TaskBudget
from mulki_plugins.testing.laboratory import Laboratory
from mulki_plugins.testing.process import preserved_state
from mulki_plugins.testing.small import LARGEST, SIZE, WIDTH
from mulki_plugins.testing.subject import Fault, author_classes
from mulki_plugins.testing.trial import BATCH
from mulki_plugins.training.strategy import ContinualTemplate

STEPS = 9
BEGINNING = 4
"""The steps of the first two tasks: what the plugin holds may rise until they have ended."""
MEASURED = (2, 5, 8)
"""The steps of the third task after which the plugin is measured."""
KEEP_LITTLE = (
    "keep a fixed amount, or at most a few numbers for each class; a plugin that keeps images declares keeps_images, and one "
    "that keeps statistics of weights returns them from state_dict by the weights' names"
)


def growth(lab: Laboratory) -> None:
    """Trains four tasks and compares what the plugin holds after each, and within the third."""
    keeps_images = lab.subject.declared("keeps_images")
    with preserved_state():
        setup = lab.setup(iterations=STEPS)
        setup.per_task = {task.name: TaskBudget(iterations=BEGINNING) for task in setup.stream.tasks[:2]}
        benchmark, stack = setup.benchmark(), lab.stack()
        trial = setup.trial(stack.plugins, adapters=stack.adapters)
        beside = [
            trial, benchmark, benchmark.train_stream, benchmark.test_stream,
            *(plugin for plugin in stack.plugins if plugin is not stack.subject),
        ]  # fmt: skip
        holdings = Holdings.of(stack.subject, lab.modules, beside, [trial.strategy, trial.model])
        images = _RetainedImages(holdings)
        adds = lab.subject.kind == "adapter" or lab.subject.declared("adds_parameters")
        parameters = len(list(trial.model.parameters()))
        after: list[Size] = []
        within: list[Size] = []
        hooks: list[int] = []

        def measure_within(strategy: ContinualTemplate) -> None:
            if trial.task == 3 and trial.steps_in_task in MEASURED:
                within.append(measure(holdings))
            if trial.steps_in_task == 3:
                images.check()

        trial.after_step = measure_within
        for task in range(4):
            lab.train(trial, benchmark, [task], tested=[0])
            trial.drop_weights()
            after.append(measure(holdings) - statistics_of_weights(stack.subject, trial.model))
            hooks.append(hooks_on(trial.model))
            images.task_ended()
    more, rise = _least_growth(after[1:]), _least_growth(within)
    if rise.graph > 0 or more.graph > 0:
        raise Fault(
            "it keeps each step's autograd graph, and so all its tensors", "keep `loss.detach()` or `float(loss)`"
        )
    if not keeps_images:
        if more.data > 4 * LARGEST * WIDTH * 4:
            raise Fault(f"it holds about {more.data:,} bytes more after each task", KEEP_LITTLE)
        if more.items > 8:
            raise Fault(f"it holds about {more.items} entries more after each task", KEEP_LITTLE)
        if rise.data > (MEASURED[1] - MEASURED[0]) * BATCH * SIZE * SIZE * 3 // 2:
            raise Fault(
                f"it holds about {rise.data:,} bytes more after each {MEASURED[0]} steps of a task", KEEP_LITTLE
            )
        if images.retained:
            fix = "declare keeps_images, or drop the images when the task ends"
            raise Fault("it keeps a task's images while the next one is trained", fix)
    if len(list(trial.model.parameters())) != parameters and not adds:
        raise Fault("it adds weights to the model", "register it with adds_parameters=True")
    if hooks[3] > hooks[2] > hooks[1] and not adds:
        raise Fault("it adds a hook to the model in every task and removes none", "remove it in after_training_exp")


def _least_growth(sizes: Sequence[Size]) -> Size:
    """The smallest growth between neighbours, for each kind of thing."""
    rises = [after - before for before, after in itertools.pairwise(sizes)]
    return Size(*(min(getattr(size, name) for size in rises) for name in ("data", "items", "graph")))


class _RetainedImages:
    """Images that a plugin still holds some steps into the next task."""

    def __init__(self, holdings: Holdings) -> None:
        self.holdings = holdings
        self.given = {id(each): each for each in held_images(holdings, SIZE)}
        """Images from the plugin's creation, such as reference images."""
        self.ended: list[object] = []
        self.retained = False

    def task_ended(self) -> None:
        self.ended = [each for each in held_images(self.holdings, SIZE) if id(each) not in self.given]

    def check(self) -> None:
        earlier = {id(each) for each in self.ended}
        self.retained = self.retained or any(id(each) in earlier for each in held_images(self.holdings, SIZE))


_LEAVES = (type, types.ModuleType, types.BuiltinFunctionType, int, float, complex, bool, type(None))
_TEXTS = frozenset((str, bytes, bytearray))
_CONTAINERS = frozenset((dict, list, tuple, set, frozenset, deque))
"""Types without attributes: what most of the objects are."""


@frozen
class Size:
    """How much a plugin holds.

    data: bytes of tensors, arrays, images and texts; items: entries of containers, and other objects; graph: autograd operations.
    """

    data: int = 0
    items: int = 0
    graph: int = 0

    def __sub__(self, other: Size) -> Size:
        return Size(self.data - other.data, self.items - other.items, self.graph - other.graph)


@frozen(eq=False)
class Holdings:
    """Everything reachable from a plugin, its classes and the modules that define them.

    modules: the author's. beside: objects that belong to others; the search stops there. hosts: objects such as the strategy
    and the model, of which only new attributes count.
    """

    plugin: object
    modules: set[str]
    beside: list[object]
    hosts: list[tuple[object, set[str]]]

    @classmethod
    def of(cls, plugin: object, modules: set[str], beside: Iterable[object], hosts: Iterable[object]) -> Holdings:
        return cls(plugin, modules, [*beside, *hosts], [(host, set(vars(host))) for host in hosts])

    def roots(self) -> list[object]:
        classes = [_names_of(kind) for kind in author_classes(self.plugin, self.modules)]
        modules = [_names_of(sys.modules[name]) for name in self.modules]
        hosted = [{n: v for n, v in vars(host).items() if n not in known} for host, known in self.hosts]
        return [self.plugin, *classes, *modules, *hosted]

    def objects(self) -> Iterator[Any]:
        """Every object that the plugin holds, once."""
        seen = {id(each) for each in self.beside}
        kept: list[object] = []  # keeps ids unique
        waiting = self.roots()
        while waiting:
            each = waiting.pop()
            if isinstance(each, type):
                if each.__module__ not in self.modules:
                    continue
                each = _names_of(each)
            if isinstance(each, _LEAVES) or id(each) in seen:
                continue
            seen.add(id(each))
            kept.append(each)
            yield each
            if type(each) in _TEXTS:
                continue
            if isinstance(each, Mapping):
                waiting += [*each.keys(), *each.values()]
            elif isinstance(each, (list, tuple, set, frozenset, deque)):
                waiting += each
            if type(each) not in _CONTAINERS:
                waiting += _parts(each, self.modules)


def measure(holdings: Holdings) -> Size:
    """The size of what a plugin holds."""
    storages: set[int] = set()
    nodes: set[Any] = set()
    data = items = 0
    for each in holdings.objects():
        if type(each) in _TEXTS:
            data += len(each)
        elif isinstance(each, Tensor):
            storage = each.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                data += storage.nbytes()
            _gather_graph(each.grad_fn, nodes)
        elif isinstance(each, np.ndarray):
            base = each if each.base is None else each.base
            if id(base) not in storages:
                storages.add(id(base))
                data += each.nbytes
        elif isinstance(each, Image.Image):
            data += each.width * each.height * len(each.getbands())
        elif isinstance(each, (str, bytes, bytearray)):
            data += len(each)
        elif isinstance(each, (Mapping, list, tuple, set, frozenset, deque)):
            items += len(each)
        elif not isinstance(each, (types.FunctionType, types.MethodType)):
            items += 1
    return Size(data, items, len(nodes))


def statistics_of_weights(plugin: Any, model: nn.Module) -> Size:
    """What of a plugin's state stands under the names of weights or modules, such as bases and importances: that may grow."""
    names = {name for name, _ in (*model.named_parameters(), *model.named_modules()) if name}
    names |= {name.removeprefix("clip.") for name in names}

    def size(value: Any, inside: bool) -> Size:
        if isinstance(value, Tensor):
            return Size(data=value.nbytes) if inside else Size()
        if isinstance(value, Mapping):
            own = Size()
            if inside or any(key in names for key in value):
                own = Size(items=len(value), data=sum(len(key) for key in value if isinstance(key, str)))
            parts = [size(item, inside or key in names) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            own, parts = Size(items=len(value)) if inside else Size(), [size(item, inside) for item in value]
        else:
            return Size()
        return Size(own.data + sum(p.data for p in parts), own.items + sum(p.items for p in parts))

    return size(plugin.state_dict(), False) if hasattr(plugin, "state_dict") else Size()


def held_images(holdings: Holdings, size: int) -> list[object]:
    """Tensors, arrays and PIL images that a plugin holds and that look like RGB images of this size."""
    images: list[object] = []
    for each in holdings.objects():
        if type(each) in _TEXTS or type(each) in _CONTAINERS:
            continue
        if isinstance(each, (Tensor, np.ndarray)):
            shape = tuple(each.shape)
            if shape[-3:] in ((3, size, size), (size, size, 3)) or (
                len(shape) < 3 and shape[-1:] == (3 * size * size,)
            ):
                images.append(each)
        elif isinstance(each, Image.Image) and each.size == (size, size):
            images.append(each)
    return images


def _names_of(owner: object) -> dict[str, Any]:
    """The attributes of a class or module without Python's own."""
    return {name: value for name, value in vars(owner).items() if not (name.startswith("__") and name.endswith("__"))}


def _parts(each: Any, modules: set[str]) -> list[Any]:
    """What an object refers to: its attributes; for a function its closure, defaults and cache."""
    if isinstance(each, types.MethodType):
        return [each.__self__, each.__func__]
    if isinstance(each, (staticmethod, classmethod)):
        return [each.__func__]
    if isinstance(each, property):
        return [each.fget, each.fset]
    if isinstance(each, functools._lru_cache_wrapper):
        by_author = getattr(each, "__module__", None) in modules
        return [one for one in gc.get_referents(each) if not callable(one)] if by_author else []
    if isinstance(each, types.GeneratorType):
        return list(each.gi_frame.f_locals.values()) if each.gi_frame is not None else []
    if isinstance(each, types.FunctionType):
        parts = [cell.cell_contents for cell in each.__closure__ or () if _is_filled(cell)]
        if each.__module__ in modules:
            parts += [*(each.__defaults__ or ()), *(each.__kwdefaults__ or {}).values(), *vars(each).values()]
        return parts
    parts = list(vars(each).values()) if hasattr(each, "__dict__") else []
    for kind in type(each).__mro__:
        slots = vars(kind).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        parts += [
            getattr(each, name) for name in names if name not in ("__dict__", "__weakref__") and hasattr(each, name)
        ]
    return parts


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _gather_graph(node: Any, nodes: set[Any]) -> None:
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each is not None and each not in nodes:
            nodes.add(each)
            waiting += [following for following, _ in each.next_functions]


def hooks_on(model: nn.Module) -> int:
    """The number of hooks on a model's modules and parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return modules + sum(len(p._backward_hooks or ()) for p in model.parameters())
