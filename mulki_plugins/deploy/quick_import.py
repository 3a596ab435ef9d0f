"""Imports torch and open_clip in about two seconds of CPU time: without torch's compiler, which a prediction never uses.

Nor, for most architectures, does it use timm. What an architecture needs is in the file that describes it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mulki_plugins.deploy.source import CONFIG, Source
from mulki_plugins.libraries import import_libraries
from mulki_plugins.models.check import TINY
from mulki_plugins.registry.builtin import open_clip_folder

_COMPILER = "torch._dynamo"
_TINY = Path(__file__).parents[1] / "models" / "tiny" / "mulki-tiny.json"
_UNUSED = ("wandb",)
"""Packages that timm imports if they are installed, and that only its training uses."""


def import_open_clip(architecture: str | None = None) -> None:
    """Import torch and open_clip. MulkiError if one of them cannot be imported.

    torchvision and timm import the compiler's package to ask it one question and to mark functions that it should leave
    alone. Both get the answers "no" and "unchanged" from a stand-in, which is gone afterwards: a later import gets the
    compiler itself. architecture: open_clip's description of the only model that will be loaded, see `architecture_of`; with
    None, timm is imported in any case.
    """
    import_libraries("torch")
    if "open_clip" in sys.modules or "torchvision" in sys.modules or _COMPILER in sys.modules:
        import_libraries("open_clip")
        return
    try:
        with _stand_ins(timm=architecture is None or '"timm_' in architecture):
            import_libraries("open_clip")
    except Exception:  # another version asks for more than the stand-in answers
        for name in [name for name in sys.modules if name.partition(".")[0] in ("open_clip", "torchvision", "timm")]:
            del sys.modules[name]
        import_libraries("open_clip")


def architecture_of(source: Source) -> str | None:
    """The description of a model's architecture as open_clip reads it; None if another package builds the model."""
    folder, name = open_clip_folder(), source.recipe.model.name if source.recipe else ""
    path = _TINY if name == TINY else folder / "model_configs" / f"{name}.json" if folder else None
    if source.exported:
        path = source.folder / CONFIG
    try:
        return path.read_text("utf-8") if path else None
    except (OSError, ValueError):
        return None


def _stand_ins(*, timm: bool) -> Any:
    compiler, answers = types.ModuleType(_COMPILER), types.ModuleType(f"{_COMPILER}.utils")
    vars(answers).update(is_compile_supported=lambda device: False)
    vars(compiler).update(disable=_unchanged, utils=answers, __path__=[])
    unused = _UNUSED if timm else (*_UNUSED, "timm")
    absent = dict.fromkeys((name for name in unused if name not in sys.modules), None)
    return _replaced({_COMPILER: compiler, f"{_COMPILER}.utils": answers, **absent})


@contextmanager
def _replaced(modules: dict[str, Any]) -> Iterator[None]:
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def _unchanged(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Callable[..., Any]:
    """In the place of the compiler's decorator `disable`, with and without arguments."""
    return function if function is not None else lambda decorated: decorated
