"""``make demo``: train a prefix on a real model, take it over into PEFT, and measure a step against PEFT's."""

from fastprefix.demo.run import run

__all__ = ["run"]
