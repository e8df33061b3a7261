"""Models as fp64 functions: where their code casts to fp32 the sweep keeps fp64, and 1e-6 tells right from wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CASTS = {Tensor.to, Tensor.type, Tensor.softmax, torch.softmax, torch.nn.functional.softmax, torch.log_softmax}
_CASTS |= {Tensor.log_softmax, torch.nn.functional.log_softmax, Tensor.sum, torch.sum, Tensor.mean, torch.mean}
_CASTS |= {Tensor.cumsum, torch.cumsum}


class Fp64(TorchFunctionMode):
    """Casts of fp64 tensors to fp32 are none, and new tensors asked for in fp32 are fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            # An integer's too: it goes on to meet numbers in fp64.
            return args[0].double()
        if func in _CASTS:
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)
