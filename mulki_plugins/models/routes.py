"""Routes through a model: which of an adapter's routes the towers take, and which one each image chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mulki_plugins.errors import MulkiError
from mulki_plugins.models.adapter import NO_ROUTE, Adapter, RoutedAdapter, plain_name

Route = int | None
"""A route of the model's routed adapter; None if it is switched off."""


class Routes:
    """The routes of a model: one, None, unless one of its adapters is a `RoutedAdapter`.

    MulkiError if such an adapter is not alone, or if weights learn that are not its own.

    own: the names of the weights that the model has without adapters.
    """

    def __init__(self, clip: nn.Module, adapters: Sequence[Adapter], own: set[str]) -> None:
        routed = [adapter for adapter in adapters if isinstance(adapter, RoutedAdapter)]
        if routed:
            chooses = f"the adapter {type(routed[0]).__name__} chooses by the features of the model as it was loaded"
            if len(adapters) > 1:
                raise MulkiError(f"{chooses}, and another adapter would change them", "use it alone")
            if any(p.requires_grad for name, p in clip.named_parameters() if plain_name(name) in own):
                raise MulkiError(f"{chooses}, so the model's own weights must not learn", "set model.train=adapters")
        self.clip = clip
        self.adapter = routed[0] if routed else None
        self.tasks: set[int] = set()
        """The tasks that have begun, as `ClipClassifier.before_task` notes."""
        self._stack: list[Route] = []

    @contextmanager
    def taking(self, route: Route) -> Iterator[None]:
        """Let the towers take a route within a `with` block; outside of all blocks the adapter is switched off."""
        if self.adapter is None:
            yield
            return
        self._stack.append(route)
        self.adapter.use(self.clip, route)
        try:
            yield
        finally:
            self._stack.pop()
            self.adapter.use(self.clip, self.current)

    def own(self, task: int) -> Route:
        """The route that a task takes in training; None before it has begun."""
        return self.adapter.own_route(task) if self.adapter is not None and task in self.tasks else None

    @property
    def current(self) -> Route:
        """The route that the towers take now."""
        return self._stack[-1] if self._stack else None

    def of_texts(self, task: int) -> Route:
        """The route that a task's sentences take now: that of the `taking` block, or without one the task's own."""
        return self._stack[-1] if self._stack else self.own(task)

    def choose(self, z: Tensor) -> list[Route]:
        """The route of each image by its features [B, d], with the adapter switched off."""
        if self.adapter is None or not self.tasks:
            return [None] * len(z)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            chosen = self.adapter.route(self.clip, z.detach()).tolist()
        return [None if route == NO_ROUTE else int(route) for route in chosen]

    def encode(self, encode: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, list[Route]]:
        """Features [B, d] of images [B, ...], each by the route that it chooses; and these routes, if there are any."""
        if self.adapter is None:
            return encode(x), []
        with self.taking(None):
            z = encode(x)
        routes = self.choose(z)
        for route, rows in rows_of(routes, x.device).items():
            if route is not None:
                with self.taking(route):
                    z = z.index_copy(0, rows, encode(x[rows]))
        return z, routes

    def encode_by_task(self, encode: Callable[[Tensor], Tensor], x: Tensor, labels: Sequence[int]) -> Tensor:
        """Features [B, d] of images, each by the route of its task, as in training."""
        if self.adapter is None:
            return encode(x)
        rows = rows_of([self.own(label) for label in labels], x.device)
        if len(rows) == 1:
            with self.taking(next(iter(rows))):
                return encode(x)
        parts = []
        for route, each in rows.items():
            with self.taking(route):
                parts.append(encode(x[each]))
        order = torch.cat(list(rows.values()))
        return torch.cat(parts)[order.argsort()]

    def select(self, routes: Sequence[Route], logits: Callable[[], Tensor]) -> Tensor:
        """Logits [B, C] of images by their routes.

        logits: returns those of the whole batch by the current route, so that the last digits depend on no other image.
        """
        if self.adapter is None:
            return logits()
        result: Tensor | None = None
        for route, rows in rows_of(routes, self._device).items():
            with self.taking(route):
                whole = logits()
            result = whole if result is None else result.index_copy(0, rows, whole[rows])
        assert result is not None, "a batch has images"
        return result

    @property
    def _device(self) -> torch.device:
        return next(self.clip.parameters()).device


def rows_of(routes: Sequence[Route], device: torch.device) -> dict[Route, Tensor]:
    """The rows of each route, on a device, in the order in which the routes first occur."""
    rows: dict[Route, list[int]] = {}
    for row, route in enumerate(routes):
        rows.setdefault(route, []).append(row)
    return {route: torch.tensor(each, device=device) for route, each in rows.items()}
