"""Imports torch and open_clip in about two seconds of CPU time: without torch's compiler, which a prediction never uses."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mulki_plugins.libraries import import_libraries

_COMPILER = "torch._dynamo"
_UNUSED = ("wandb",)
"""Packages that timm imports if they are installed, and that only its training uses."""


def import_open_clip() -> None:
    """Import torch and open_clip. MulkiError if one of them cannot be imported.

    torchvision and timm import the compiler's package to ask it one question and to mark functions that it should leave
    alone. Both get the answers "no" and "unchanged" from a stand-in, which is gone afterwards: a later import gets the
    compiler itself.
    """
    import_libraries("torch")
    if "open_clip" in sys.modules or "torchvision" in sys.modules or _COMPILER in sys.modules:
        import_libraries("open_clip")
        return
    try:
        with _stand_ins():
            import_libraries("open_clip")
    except Exception:  # another version asks for more than the stand-in answers
        for name in [name for name in sys.modules if name.partition(".")[0] in ("open_clip", "torchvision", "timm")]:
            del sys.modules[name]
        import_libraries("open_clip")


@contextmanager
def _stand_ins() -> Iterator[None]:
    compiler, answers = types.ModuleType(_COMPILER), types.ModuleType(f"{_COMPILER}.utils")
    answers.is_compile_supported = lambda device: False  # type: ignore[attr-defined]  # a stand-in module
    compiler.disable = _unchanged  # type: ignore[attr-defined]  # as above
    compiler.utils = answers  # type: ignore[attr-defined]  # as above
    compiler.__path__ = []
    replaced: dict[str, Any] = {_COMPILER: compiler, f"{_COMPILER}.utils": answers}
    replaced |= {name: None for name in _UNUSED if name not in sys.modules}
    sys.modules.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del sys.modules[name]


def _unchanged(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Callable[..., Any]:
    """In the place of the compiler's decorator `disable`, with and without arguments."""
    return function if function is not None else lambda decorated: decorated
