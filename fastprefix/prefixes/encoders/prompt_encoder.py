"""``PromptEncoder``: the network from whose output P-tuning makes a soft prompt (Liu et al. 2021, 2103.10385)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from fastprefix.prefixes.encoders.projection import Projection

EncoderKind = Literal["mlp", "lstm"]
ENCODER_KINDS: tuple[EncoderKind, ...] = ("mlp", "lstm")


class InputEmbedding(nn.Module):
    """The encoder's trained input, ``weight [P, d]``, initialised as that of ``nn.Embedding``."""

    def __init__(self, num_virtual_tokens: int, token_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_virtual_tokens, token_dim))


class BidirectionalLSTM(nn.Module):
    """The parameters, their names and the initialisation of a bidirectional ``nn.LSTM``, but not a subclass of it.

    ``torch.compile`` cannot trace a module of that class, and dynamic quantisation replaces it.
    """

    def __init__(self, inputs: int, hidden: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.num_layers, self.dropout = hidden, num_layers, dropout
        self.names = []
        for name, parameter in nn.LSTM(inputs, hidden, num_layers, bidirectional=True).named_parameters():
            self.names.append(name)
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """``[P, inputs]`` to ``[P, 2 * hidden]``; in training mode with dropout between the layers."""
        state = x.new_zeros(2 * self.num_layers, 1, self.hidden)
        weights = [getattr(self, name) for name in self.names]
        options = True, self.num_layers, self.dropout, self.training, True, False
        # PyTorch has another LSTM for CPUs without gradients, which rounds differently. A prompt has to be the same in
        # training, in use and baked.
        with torch.enable_grad():
            output = torch.lstm(x[:, None], (state, state), weights, *options)[0][:, 0]
        return output if torch.is_grad_enabled() else output.detach()


class PromptEncoder(nn.Module):
    """``[P, d] -> MLP`` or ``[P, d] -> bidirectional LSTM -> MLP``; the output ``[P, d]`` is the soft prompt.

    Layers and names of parameters are those of PEFT's ``PromptEncoder``, so that a state dict fits both.

    Attributes:
        embedding: the trained input, ``weight [P, d]``.
        lstm_head: ``[P, d] -> [P, 2 * hidden]``, of ``"lstm"`` alone.
        mlp_head: three linear layers ``d, hidden, hidden, d`` or, after an LSTM, two: ``2 * hidden, 2 * hidden, d``.
    """

    def __init__(
        self, kind: EncoderKind, num_virtual_tokens: int, token_dim: int, hidden: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = InputEmbedding(num_virtual_tokens, token_dim)
        widths = [token_dim, hidden, hidden, token_dim]
        if kind == "lstm":
            self.lstm_head = BidirectionalLSTM(token_dim, hidden, num_layers, dropout)
            widths = [2 * hidden, 2 * hidden, token_dim]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [Projection(inputs, outputs), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def forward(self) -> Tensor:
        """The soft prompt ``[P, d]``."""
        return self.mlp_head(self._input())

    @torch.no_grad()
    def without_dropout(self) -> Tensor:
        """The soft prompt ``[P, d]`` as it is in eval mode, without a gradient."""
        training = self.training
        try:
            return self.eval()()
        finally:
            self.train(training)

    @torch.no_grad()
    def fit(self, embeddings: Tensor) -> float:
        """Fit the output to embeddings ``[P, d]``, by least squares for the last layer.

        Returns:
            The remaining error, relative to the embeddings (Frobenius norms).
        """
        training = self.training
        self.eval()
        hidden = self.mlp_head[:-1](self._input())
        self.train(training)
        last = self.mlp_head[-1]
        assert isinstance(last, Projection)
        return last.fit(hidden, embeddings)

    def _input(self) -> Tensor:
        embedding = self.embedding.weight
        return self.lstm_head(embedding) if self.kind == "lstm" else embedding
