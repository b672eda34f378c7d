"""Makes Triton's interpreter twice as fast; imported by what runs under it, after TRITON_INTERPRET is set."""

from triton.runtime.interpreter import InterpretedFunction

_call, _patched = InterpretedFunction.__call__, set()


def _call_patching_once(self, *args, **kwargs):
    """The interpreter patches triton.language again at each call of a device function, which takes half of its time.
    The kernel's launch has done it for what sees the same names, and of Triton's own functions one is enough."""
    if self.fn.__module__.startswith("vrm_kernels.") or self.fn.__module__ in _patched:
        return self.rewrite()(*args, **kwargs)
    _patched.add(self.fn.__module__)
    return _call(self, *args, **kwargs)


InterpretedFunction.__call__ = _call_patching_once
