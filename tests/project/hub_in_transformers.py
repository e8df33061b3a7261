"""A model that takes its attention from a Hub build of the operator, in a process of its own.

``LOCAL_KERNELS`` names the build. transformers takes a range of versions of the package ``kernels``; where the one that
is installed lies outside of it, this process calls it the least version of that range.
"""

from __future__ import annotations

import copy
import importlib.metadata as metadata

import torch
from packaging.version import parse
from transformers.utils import import_utils

ATTENTION = "org/fastprefix@v0:attention_forward"
found = metadata.version


def version(name: str) -> str:
    least, most = import_utils.KERNELS_MIN_VERSION, import_utils.KERNELS_MAX_VERSION
    own = found(name)
    return own if name != "kernels" or parse(least) <= parse(own) < parse(most) else least


def main() -> None:
    metadata.version = version
    import_utils.is_kernels_available.cache_clear()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, pad_token_id=0, **sizes)
    eager, ours = (LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation="eager") for _ in range(2))
    ours.load_state_dict(eager.state_dict())
    ours.set_attn_implementation(ATTENTION, allow_all_kernels=True)
    eager, ours = eager.eval(), ours.eval()
    # In fp32: in fp64 transformers' own mask overflows, and its left-padded rows are nan.
    assert (eager.config._attn_implementation, ours.config._attn_implementation) == ("eager", ATTENTION)
    ids = torch.randint(1, 64, (2, 9))
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    for mask in (None, padded):
        given = {} if mask is None else {"attention_mask": mask}
        with torch.no_grad():
            seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            torch.testing.assert_close(ours(ids, **given).logits[seen], eager(ids, **given).logits[seen])
        want, got = (model.generate(ids, max_new_tokens=6, do_sample=False, **given) for model in (eager, ours))
        assert torch.equal(want, got)
    try:
        ours.generate(ids, max_new_tokens=6, cache_implementation="static")
    except ValueError as error:
        assert "static cache that is not full" in str(error)  # nobody says how full it is
    else:
        raise AssertionError("a static cache that is not full was read as if it were")
    static = {"attention_mask": padded, "max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(*(model.generate(ids, **static) for model in (eager, ours)))
    print("equal")


if __name__ == "__main__":
    main()
