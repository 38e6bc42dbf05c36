"""Threading models of the user's own: ``--model MODULE:CLASS``, checked before anything is mounted.

What a class must have is told by the class that it is to extend, so nothing of the drivers is
imported here; docs/new-model.md says it in words.

Locks touched: none.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any


def make(model: str, threads: int, base: type[Any]) -> Any:
    """Import a class, check that it can be a threading model, and call it.

    Args:
        model: the module and the name of the class, as ``package.module:Class``.
        threads: what the class is called with.
        base: what it has to extend. What is abstract there is to be there.

    Returns:
        An instance of the class, and so of base.

    Raises:
        ValueError: there is no such class, or it lacks something, or cannot be called. The text
            is one for the user, without the name of the model.
    """
    module, _, name = model.partition(":")
    found = _imported(module, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name} is no subclass of ninefuse.executor.{base.__name__}")
    _check(found, base)
    try:
        made = found(threads)
    except Exception as error:
        raise ValueError(f"{name}({threads}) fails: {_said(error)}") from error
    try:
        made.statistics()
    except Exception as error:
        reason = f"{name}.statistics() fails: {_said(error)}"
        raise ValueError(f"{reason}: have __init__ call super().__init__()") from error
    return made


def _imported(module: str, name: str) -> object:
    try:
        found: object = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # a module does what it likes while it is imported
        raise ValueError(f"{module} cannot be imported: {_said(error)}") from error
    return found


def _check(found: type[Any], base: type[Any]) -> None:
    name = found.__name__
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    for method in sorted(getattr(base, "__abstractmethods__", ())):
        if inspect.iscoroutinefunction(getattr(found, method)):
            raise ValueError(f"{name}.{method} is a coroutine: begin it with def")
    label = getattr(found, "model", None)
    if not (isinstance(label, str) and label):
        raise ValueError(f"{name} lacks model, its name for the log and for ninefuse-stat")
    # Which takes something else.
    if found.__init__ is base.__init__:
        raise ValueError(f"{name} lacks __init__(self, threads)")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
