"""Splits the time of a run into parts, by watching the methods that a run calls anyway."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal

Part = Literal[
    "loading", "student", "teachers", "losses and plugins", "backward", "optimizer", "logging", "checkpoint", "other"
]
PARTS: tuple[Part, ...] = (
    "loading", "student", "teachers", "losses and plugins", "backward", "optimizer", "logging", "checkpoint", "other",
)  # fmt: skip
"""In the order of a step. A call within a part belongs to its own part: a teacher's forward is not the plugin's."""


class Stopwatch:
    """Adds up the seconds of each part. Whatever runs within no part is `other`.

    wait: waits for the device. Its kernels run later than the calls that start them, so the split of a step is right only
    if each part ends with a wait (`waits`), and the step as a whole only without.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.waits = False
        self._wait, self._clock = wait, clock
        self._seconds: dict[Part, float] = defaultdict(float)
        self._parts: list[Part] = []
        self._since = clock()

    @contextlib.contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count the seconds of the block as this part's, except those of other parts within it."""
        self._switch()
        self._parts.append(name)
        try:
            yield
        finally:
            self._switch()
            self._parts.pop()

    def take(self) -> dict[Part, float]:
        """The seconds of each part since the last call."""
        self._switch()
        seconds, self._seconds = self._seconds, defaultdict(float)
        return {part: seconds[part] for part in PARTS}

    @property
    def current(self) -> Part:
        return self._parts[-1] if self._parts else "other"

    def _switch(self) -> None:
        if self.waits:
            self._wait()
        now = self._clock()
        self._seconds[self.current] += now - self._since
        self._since = now

    def watch(
        self, owner: type, name: str, part: Part | Callable[[Any], Part]
    ) -> contextlib.AbstractContextManager[None]:
        """Within a `with` block, count each call of this method. part: may depend on the object whose method it is.

        Does nothing if the class has no such method.
        """

        def around(method: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(method)
            def watched(this: Any, *args: Any, **kwargs: Any) -> Any:
                with self.part(part(this) if callable(part) else part):
                    return method(this, *args, **kwargs)

            return watched

        return replaced(owner, name, around)

    def watch_items(self, items: Iterator[Any], part: Part) -> Iterator[Any]:
        """The same items; the seconds until each one arrives belong to the part."""
        while True:
            with self.part(part):
                item = next(items, _END)
            if item is _END:
                return
            yield item


_END: Any = object()


@contextlib.contextmanager
def replaced(owner: type, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace a method by `around(method)` within the block, in the class that defines it: this one or one that it extends."""
    home = next((each for each in owner.__mro__ if name in vars(each)), None)
    if home is None:
        yield
        return
    method = vars(home)[name]
    setattr(home, name, around(method))
    try:
        yield
    finally:
        setattr(home, name, method)
