"""What a model is: its attention layers, the modules around them, where its weights are and what wraps it.

* One forward of a few tokens shows which modules dispatch, in order and with their real shapes: those are the layers
  that can carry a prefix. There must be as many calls as the config has layers, less those of a kind without
  attention (states, convolutions, experts). Modules that are called twice share one prefix.
* An encoder-decoder is two stacks. Calls of its decoder over another number of keys than its tokens are the
  cross-attention.
* Outer modules may make masks and positions for the module that holds the layers. ``outer_modules`` remembers what
  they were given, as a finished mask no longer tells which tokens are padding.
* Whether a model's first tokens see the last is compared with and without fastprefix (``causality``): a model that
  combines masks with its own would lose the causality that ours leave to the layer, and is refused.
* Whether a model predicts the next token is told by its loss: a label of the first token counts for nothing, one of
  the last does (``next_token_loss``). The name of a class says nothing about it.
* Weights that accelerate offloads are read through its hooks. A prefix that it takes along is taken back, as tensors
  that are made anew for every forward cannot be trained (``offload``).
* FSDP2 gathers a layer's prefix with the layer and the MLP with the root, before our hooks run. What would read other
  layers' shards ahead of them (banks, prompts that run through the layers twice) is refused (``dtensor``), and so is
  attaching to such a model, where every process would draw a prefix of its own.
* In a tensor-parallel model (``tp_plan``) a layer calls its attention with this process's heads. Shapes of layers are
  those of all processes, and ``prefixes/head_shards.py`` gives each process its part of a prefix.
"""
