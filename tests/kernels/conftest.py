"""Where the kernels' tests run: compiled on a GPU, interpreted without one."""

from dataclasses import replace

import pytest
import torch
from triton.language import core
from triton.runtime import interpreter


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def _a_launch_replaces_a_module_s_functions_once():
    """
    The interpreter replaces triton.language's functions in each launch, and again in every call of a jitted function in
    it, which took a third of these tests' time. Here it does so once for each module whose functions are called.
    """
    replace, launched = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done = set()

    def once(function):
        if id(function.__globals__) in done:
            return interpreter._LangPatchScope()
        done.add(id(function.__globals__))
        return replace(function)

    def launch(self, *arguments, **options):
        done.clear()
        return launched(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _what_an_operation_does_not_change_is_found_once():
    """
    For each operation the interpreter makes and checks the types of its operands and result anew, and computes whether
    integers overflow, which nothing reads without its debug mode: together more than half of what was left. Here what a
    type or a tensor has by its element and shape is kept, and no overflow computed.
    """
    builder = interpreter.interpreter_builder
    make_type, make_tensor, numpy_type = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    broadcast = interpreter.TritonSemantic.broadcast_impl_value
    types, tensors, numpy_types = {}, {}, {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, *(one.value if isinstance(one, core.constexpr) else one for one in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = {**vars(self), "key": key}
        vars(self).update(types[key])

    def tensor(self, handle, own):
        key = vars(own).get("key", own.name)
        if key not in tensors:
            make_tensor(self, handle, own)
            tensors[key] = {name: value for name, value in vars(self).items() if name != "handle"}
        vars(self).update(tensors[key], handle=handle)

    def broadcast_impl_value(self, lhs, rhs):
        shapes = [vars(one.type).get("key", ())[1:] for one in (lhs, rhs)]
        return (lhs, rhs) if shapes[0] == shapes[1] else broadcast(self, lhs, rhs)

    def get_np_dtype(own):
        name = own.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(own)
        return numpy_types[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        patch.setattr(core.block_type, "__init__", block_type)
        patch.setattr(core.tensor, "__init__", tensor)
        patch.setattr(interpreter.TritonSemantic, "broadcast_impl_value", broadcast_impl_value)
        patch.setattr(interpreter, "_get_np_dtype", get_np_dtype)
        yield
