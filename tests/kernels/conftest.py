"""Triton's interpreter, twice as fast: a kernel patches `triton.language`, and so would each function that it calls, every time."""

from __future__ import annotations

from typing import Any

try:
    from triton.runtime import interpreter
except ImportError:  # the tests here are skipped
    pass
else:
    patched = set()  # modules, of which triton.language itself is patched by every kernel, and what is below it once

    def call(self: interpreter.InterpretedFunction, *arguments: Any, **options: Any) -> Any:
        if (module := self.fn.__module__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call
