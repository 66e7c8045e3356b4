"""Where the kernels' tests run: compiled on a GPU, interpreted without one."""

import pytest
import torch
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
