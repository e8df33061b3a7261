"""``patch``: PEFT's models, whose prefixes and prompts are read where PEFT keeps them.

* The class of a PeftModel changes, not its attributes: it can be copied and pickled, and ``unpatch`` is exact. The
  installation is in the base model, which therefore reads the active adapter also when somebody unwraps it.
* PEFT's soft prompts return logits for the prompt's positions. The prompt then runs through the whole model, head
  included, and its ``[1, P, V]`` are put in front of every row's: a copy of logits, of which nothing is saved for
  backward. A generation that may outgrow a sliding window is left to PEFT.
* An encoder-decoder's soft prompts are its encoder's, and its logits the decoder's own. A new prefix has
  ``num_transformer_submodules`` 3: its slots of cross-attention, which PEFT drops, are read. A prefix that PEFT has
  trained keeps 2, as those slots have the random numbers of their start.
* Under ADAPTION_PROMPT the content stays with the attention and the masks that the model had: with gates at zero, the
  same bits. What is saved is PEFT's second query projection, its prompt for each row and its second ``o_proj``, whose
  bias, if it has one, PEFT adds twice.
* ``init_weights="zero"`` is replaced by N(0, 0.02^2): rows that start equal stay equal.
"""
