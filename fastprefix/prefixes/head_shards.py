"""Prefixes of tensor-parallel models: each process has the keys and values of its own attention heads.

Parameters are DTensors over the model's mesh, whose shapes are those of the whole prefix. What belongs to heads is
sharded over them, and its gradient needs no sum: a head's queries are in the same process. MLPs and prompts are whole
in every process. The heads that an MLP makes for other processes are cut off by a redistribution, and the backward of
that brings the gradients of all heads to every process, so that all compute the same gradient of the MLP.

Optimizers, ``clip_grad_norm_`` and distributed checkpoints see which numbers a process has of which whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.prefixes.gate import Gate
from fastprefix.prefixes.kv import PrefixLayer
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class HeadShards(NamedTuple):
    """How the attention heads of a model's layers are spread over processes."""

    mesh: DeviceMesh  # one-dimensional
    sharded: tuple[bool, ...]  # for each attention layer, whether each process has only some of its heads

    def gathered(self, x: Tensor, layer: int) -> Tensor:
        """``[H_kv, ...]`` of all processes from the ``[H_kv / n, ...]`` that each of them has in a layer."""
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(x, self.mesh, [Shard(0)]).full_tensor() if self.sharded[layer] else x

    def distribute(self, prefix: Prefix | SoftPrompt) -> None:
        """Give each process its part of a whole prefix. The numbers are those of the mesh's first process.

        Raises:
            ValueError: an encoder has dropout, which every process would draw by itself.
        """
        from torch.distributed.tensor import Replicate, Shard

        if isinstance(prefix, SoftPrompt):
            if prefix.config.encoder_dropout:
                expected = "0.0 in a tensor-parallel model, whose processes would drop different units"
                raise fail("encoder_dropout", prefix.config.encoder_dropout, expected)
            for p in prefix.table.parameters():
                torch.distributed.broadcast(p.detach(), group=self.mesh.get_group(), group_src=0)
            return
        for layer, index in zip(prefix.layers, prefix.layer_indices, strict=True):
            assert isinstance(layer, PrefixLayer)
            layer.placement = Shard(0) if self.sharded[index] else Replicate()
            for module in layer.modules():
                self._place(module, layer.placement)
        if prefix.encoder is not None:
            for module in prefix.encoder.modules():
                self._place(module, Replicate())

    @torch.no_grad()
    def _place(self, module: nn.Module, of_heads: Any) -> None:
        """Replace a module's own parameters and buffers by DTensors; ``of_heads``: where those of heads are."""
        from torch.distributed.tensor import Replicate, distribute_tensor

        for name, p in module._parameters.items():
            if p is not None:
                for_all = name == "prompt" or (isinstance(module, Gate) and module.kind == "scalar")
                made = distribute_tensor(whole(p).detach(), self.mesh, [Replicate() if for_all else of_heads])
                module._parameters[name] = nn.Parameter(made, requires_grad=p.requires_grad)
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = distribute_tensor(whole(x), self.mesh, [of_heads])


def whole(x: Tensor) -> Tensor:
    """All of a tensor of which each process has a part; any other tensor as it is. Every process has to call this."""
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found
