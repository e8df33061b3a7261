"""Cartridges: trained prefixes that stand for documents (Eyuboglu et al. 2025, arXiv:2506.06266).

``matching`` is the closed form that training starts from, and ``targets`` the loss; both are functions of tensors.
``reading`` makes a model read a whole text, ``start`` fits a start to it, ``self_study`` samples conversations.
``preparation`` does these in turn, ``trainer`` trains, ``measure`` and the report compare, and ``run`` is all of it.
"""

from fastprefix.cartridges.config import CartridgeConfig
from fastprefix.cartridges.report import Report
from fastprefix.cartridges.run import train_cartridge
from fastprefix.cartridges.start import attention_matching

__all__ = ["CartridgeConfig", "Report", "attention_matching", "train_cartridge"]
