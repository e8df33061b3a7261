"""``make demo``: train a prefix on a real model, load it in PEFT, and compare a training step with PEFT's."""

from fastprefix.demo.run import run

__all__ = ["run"]
