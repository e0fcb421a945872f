"""Devices for tests: those of tests/devices, and ggml's RPC backend.

`native/cmake/build_test_devices.sh` builds both; ``REASONALLOC_TEST_DEVICES`` names the folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from llama_cpp import llama_cpp as lib

FOLDER = os.environ.get("REASONALLOC_TEST_DEVICES", "")

#: Fields of llama_model_params for the CPU alone, without weights in a layout of its own: so it
#: computes with the functions that the test devices use.
ON_CPU = {"n_gpu_layers": 0, "use_extra_bufts": False}

needs_devices = pytest.mark.skipif(
    not FOLDER, reason="REASONALLOC_TEST_DEVICES names no folder of build_test_devices.sh"
)


def ggml(name: str, result: Any, *arguments: Any) -> Any:
    """Return a function of ggml, which libllama brings with it."""
    function = lib._lib[name]
    function.restype = result
    function.argtypes = arguments
    return function


def load(name: str) -> ctypes.CDLL:
    """Load a library of the folder."""
    return ctypes.CDLL(os.path.join(FOLDER, name))


def params_on(devices: Sequence[int], n_gpu_layers: int = 99, **more: Any) -> dict[str, Any]:
    """Fields of llama_model_params for a model on devices (ggml_backend_dev_t) in equal parts."""
    table = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
    params = {"n_gpu_layers": n_gpu_layers, "use_extra_bufts": False, **more}
    # the address is kept with its table, which llama.cpp reads when the model is loaded
    return {**params, "devices": ctypes.cast(table, ctypes.c_void_p)}


class TestDevices:
    """The devices of tests/devices."""

    __test__ = False

    def __init__(self) -> None:
        self._lib = load("libreasonalloc-test-devices.so")
        self._lib.ggml_backend_init.restype = ctypes.c_void_p
        self.reg = self._lib.ggml_backend_init()
        get = ggml("ggml_backend_reg_dev_get", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self.all = [get(self.reg, i) for i in range(4)]

    def on(self, n: int, **more: Any) -> dict[str, Any]:
        """Fields of llama_model_params for the first n of them."""
        return params_on(self.all[:n], **more)

    def counts(self, device: int) -> tuple[int, int]:
        """Graphs and nodes that a device has computed."""
        n_nodes = ctypes.c_int64()
        self._lib.test_device_counts.restype = ctypes.c_int64
        return self._lib.test_device_counts(device, ctypes.byref(n_nodes)), n_nodes.value

    def buffers(self, device: int) -> list[int]:
        """Bytes of each buffer that a device holds, oldest first."""
        sizes = (ctypes.c_size_t * 64)()
        self._lib.test_device_buffers.restype = ctypes.c_size_t
        n = self._lib.test_device_buffers(device, sizes, ctypes.c_size_t(64))
        return list(sizes[:n])

    @contextlib.contextmanager
    def _with_rules(self, number: int) -> Iterator[None]:
        self._lib.test_device_rules(number)
        try:
            yield
        finally:
            self._lib.test_device_rules(0)

    def as_cuda(self) -> contextlib.AbstractContextManager[None]:
        """Refuse inside the block what CUDA has no kernel for."""
        return self._with_rules(1)

    def as_metal(self) -> contextlib.AbstractContextManager[None]:
        """Refuse inside the block sums of columns, which Metal has not."""
        return self._with_rules(2)

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        """Let llama.cpp find them inside the block, as it finds the GPUs of a machine."""
        ggml("ggml_backend_register", None, ctypes.c_void_p)(self.reg)
        try:
            yield
        finally:
            ggml("ggml_backend_unload", None, ctypes.c_void_p)(self.reg)
