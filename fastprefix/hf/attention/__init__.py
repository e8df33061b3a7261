"""What transformers calls in an attached model: the attention function, mask functions and position ids.

* The model gets copies of its configs (``config_copies``), on which ``attn_implementation`` is switched: two models
  built from one config object would otherwise switch each other.
* The mask function returns the cheapest form that says everything: nothing, padding ``[B, 1, 1, T]`` next to the
  layer's own causality, or a dense bool mask (a window that the text has outgrown, packing, static caches, overlays).
* Packed rows are told by position ids that jump. transformers looks for them only where there is no cache, so the
  cache is turned off; a mask that lets a document see the one before it raises.
* Decoders without position ids look positions up in an embedding table, which is asked again further on
  (``position_embeddings``).
* Llama 4's layers without rotary positions scale their queries by a position that they count themselves;
  ``query_scaling`` puts the missing factor into the layer's slot.
* Four classes that do not dispatch (GPT-J, CodeGen, GPT-Neo, Falcon) get one overridden method
  (``method_overrides``). The override is an attribute of the instance, so that it is copied and pickled with its
  layer.
"""
