"""Makes Triton's interpreter three times as fast; imported by what runs under it, after TRITON_INTERPRET is set."""

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

_call, _patched = InterpretedFunction.__call__, set()
_np_dtype, _np_dtypes = interpreter._get_np_dtype, {}


def _call_patching_once(self, *args, **kwargs):
    """The interpreter patches triton.language again at each call of a device function, which takes half of its time.
    The kernel's launch has done it for what sees the same names, and of Triton's own functions one is enough."""
    if self.fn.__module__.startswith("vrm_kernels.") or self.fn.__module__ in _patched:
        return self.rewrite()(*args, **kwargs)
    _patched.add(self.fn.__module__)
    return _call(self, *args, **kwargs)


def _remembered_np_dtype(dtype):
    """The interpreter makes a table of all types each time that it asks for one."""
    if isinstance(dtype.scalar, tl.pointer_type):
        return _np_dtype(dtype)
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _np_dtype(dtype)
    return _np_dtypes[name]


InterpretedFunction.__call__ = _call_patching_once
interpreter._get_np_dtype = _remembered_np_dtype
# Every sum and product of 32-bit integers is computed in 64 bits as well and compared. No number here is that large;
# benchmarks/gpu/triton_faults.py looks for those that would be.
TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
