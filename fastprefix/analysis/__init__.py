"""What a prefix does in a model: where attention goes, what is added to it, what each slot is for.

Each function takes a model with a prefix and a batch, and returns a small frozen dataclass with ``to_dict()`` for JSON
and ``plot()`` for a figure. None holds an attention matrix ``[B, H, S, P + T]``.
"""

from fastprefix.analysis.attention import RelativeAttention, relative_attention
from fastprefix.analysis.bias import BiasDecomposition, bias_decomposition
from fastprefix.analysis.mass import PrefixMass, prefix_mass
from fastprefix.analysis.priors import PromptPlace, SlotMap, prompt_place, slot_map
from fastprefix.analysis.slots import SlotGeometry, SlotMass, slot_geometry, slot_mass
from fastprefix.analysis.tokens import Nearest, nearest
from fastprefix.analysis.trajectories import Activations, activations

__all__ = [
    "Activations",
    "BiasDecomposition",
    "Nearest",
    "PrefixMass",
    "PromptPlace",
    "RelativeAttention",
    "SlotGeometry",
    "SlotMap",
    "SlotMass",
    "activations",
    "bias_decomposition",
    "nearest",
    "prefix_mass",
    "prompt_place",
    "relative_attention",
    "slot_geometry",
    "slot_map",
    "slot_mass",
]
