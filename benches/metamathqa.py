"""PEFT's comparison of methods on MetaMathQA with a cartridge, for which it has no row. Needs a GPU; it was not run.

    git clone https://github.com/huggingface/peft
    python -m benches.metamathqa peft/method_comparison/MetaMathQA --tokens 512 --fused
    python -m benches.metamathqa peft/method_comparison/MetaMathQA --tokens 512          # PEFT as it is

Llama 3.2 3B is trained and judged by PEFT's own script (``run.py``): 5,000 steps of 4 rows, then exact matches on
GSM8K, and a result file beside those of the other methods. What is added here is the experiment's folder, the start
from a text, and with ``--fused`` one call of ``fastprefix.patch``.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

# The text from which PEFT's best row of prefix tuning starts, so that both rows start alike.
TEXT = (
    "You are a helpful math assistant. Solve mathematical problems by thinking step by step. First, identify what the "
    "problem is asking. Then, break down the solution into clear logical steps. Show all your work and calculations. "
    "Finally, verify that your answer makes sense."
)


def experiment(folder: Path, tokens: int, rate: float, fused: bool) -> Path:
    """Write an experiment's two files, and return its folder, relative to the comparison's."""
    path = Path("experiments", "cartridge", f"llama-3.2-3B-tokens{tokens}-lr_{rate}{'-fastprefix' if fused else ''}")
    (folder / path).mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "CARTRIDGE",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": tokens,
        "num_frozen_tokens": 1,
    }
    (folder / path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    training = {"optimizer_kwargs": {"lr": rate}}
    (folder / path / "training_params.json").write_text(json.dumps(training, indent=2) + "\n")
    return path


def started(model: Any, tokens: int, fused: bool) -> Any:
    """A PEFT model whose cartridge has the keys and values of the text, repeated until there are enough tokens."""
    import torch
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
    from transformers import AutoTokenizer

    base = model.get_base_model()
    ids = AutoTokenizer.from_pretrained(base.config._name_or_path)(TEXT)["input_ids"]
    row = torch.tensor([(ids * -(-tokens // len(ids)))[:tokens]], device=model.device)
    with torch.no_grad():
        cache = base(input_ids=row, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, num_virtual_tokens=tokens)
    if fused:
        import fastprefix

        fastprefix.patch(model)
    return model


def main() -> None:
    """Write the experiment and run PEFT's script on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="method_comparison/MetaMathQA of a checkout of PEFT")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--fused", action="store_true", help="through fastprefix.patch")
    parser.add_argument("--only-write", action="store_true", help="write the experiment's files and stop")
    options = parser.parse_args()
    script = options.folder / "run.py"
    if not script.is_file():
        parser.error(f"folder: got {options.folder}, which has no run.py, expected PEFT's method_comparison/MetaMathQA")
    path = experiment(options.folder, options.tokens, options.lr, options.fused)
    print(options.folder / path)
    if options.only_write:
        return
    import torch

    if not torch.cuda.is_available():
        parser.error("device: got no GPU, expected one: 5,000 steps of a model of 3 billion parameters")
    os.chdir(options.folder)
    sys.path.insert(0, os.getcwd())
    import utils

    made = utils.get_model
    utils.get_model = lambda **given: started(made(**given), options.tokens, options.fused)
    sys.argv = [script.name, "--verbose", str(path)]
    runpy.run_path(script.name, run_name="__main__")


if __name__ == "__main__":
    main()
