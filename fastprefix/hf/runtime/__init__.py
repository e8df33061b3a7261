"""What happens in a forward of an attached model: which prefix each row reads, and the hooks that hand it over.

* One pre-hook, on the innermost module that takes the main input, makes the :class:`ForwardContext` and shifts the
  content's positions. Without given position ids a causal model counts real tokens, as ``generate`` does.
* An active prefix is asked for by each layer itself. Banks, soft prompts and PEFT's adapters are computed once per
  forward and handed to the slots. With an MLP all layers' keys and values are computed at once; under gradient
  checkpointing each layer computes its own, so that recomputation is exact in both modes.
* A prompt runs through the module around all layers, inside that module's own pre-hook (``prompt_prefill``). The
  attention function captures its keys and values with their graph, and they become the rows' prefix. Nothing is known
  of the model, so its rotary or learned positions, MLA and windows are its own.
* The hidden state of a prompt's last token predicts a row's first one. Where a loss asks for it, it is put in front
  of the rows for the head, and taken out of the logits again (``lm_head_hooks``). A bidirectional model whose head
  pools one place of its text gets the concatenated prompt's hidden states too, as in PEFT (``pooled_head``).
* In an encoder-decoder a soft prompt is concatenated to the encoder's rows, and the decoder's mask over the encoder's
  states becomes as much longer. The states that the decoder is given have to be made with that prompt.
* ``exactness`` says why a prompt has to be concatenated instead of shared. It is never concatenated into a cache,
  where it would be content ever after: a text that outgrows a sliding window with a cache raises.
* A generation computes prompts and banks once. They are kept with the cache object, under the names and the versions
  of the parameters, and never under gradients (``prompt_kv_cache``).
* A cache object carries what was read when it was made, and every forward is held to that (``cache_origin``).
* A layer is recomputed with the prefix that its forward read, whichever is active by then (``checkpointing``).
  Reentrant checkpointing would run backward through a prompt's graph once a layer: there layers read leaves instead,
  and ``checkpointing.Bridge``, in front of the first layer, hands over what they collected when all of them are done.
  The prompt's own pass is checkpointed in the non-reentrant mode, and is not in the reentrant one, which has no
  graph.
* What a forward reads is kept in the model, so a lock serialises its threads, by hooks around all others
  (``forward_lock``). A block's choice applies to the thread that opened it. Another thread's forward raises, as
  waiting for a block that itself waits for the thread would hang. If an interrupt aborts a forward before its hooks
  release the lock, the next waiting thread inspects the owner's stack and takes the lock over.
* While a prefix is active every forward checks that nobody has set another attention implementation.
"""
