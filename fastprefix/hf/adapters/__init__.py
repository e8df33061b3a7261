"""What users attach to a model: building, placing and choosing prefixes, and blocks that choose for a batch.

* A prefix's layers are children of the attention modules and its MLP is one of the module around all layers, so that
  trainers that unwrap, optimizers, checkpoints and copies find the parameters. The cache holds content only.
* ``attach`` ends with the model's own forward, from its outermost module, with a mask and without one
  (``trial_forward``). What fails with a prefix and runs without one is refused then, and not when training begins.
* Modules trained with a prefix (``modules_to_save``) are copies that stand in the model while the prefix is active.
  The originals and the copies of other prefixes are kept in a child of the model, and a mixed batch gives each row
  its own (``modules_per_row``).
* Continuous batching is refused where it is entered: what its thread raises only reaches a log.
"""
