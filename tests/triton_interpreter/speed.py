"""The interpreter patches triton.language again on every call of a device function; once per launch is enough."""

from triton.runtime import interpreter


def install() -> None:
    if getattr(interpreter, "_patches_once", False):
        return
    interpreter._patches_once = True
    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_patching_once(self, *args, **kwargs):
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    def call(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launch_patching_once
    interpreter.InterpretedFunction.__call__ = call
