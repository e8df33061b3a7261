"""Adapter files: written atomically, read with errors that name path and field, kept on disk until needed.

* A save writes its files into ``.fastprefix-save/`` next to the old ones, flushes them, commits by renaming
  ``commit.json`` there, then moves them into place (``atomic_folder``). A lock that dies with its process keeps two
  saves of one folder apart.
* A committed save that was killed is completed by the next save or load. In a folder that cannot be written, ``load``
  reads each file where it lies. A reader whom a save overtakes reads again. Files that were never committed are
  thrown away by the next save.
* PEFT reads the folder alone. Up to the commit it finds the old adapter; after it, the old or the new weights with a
  configuration that is the same for both. Where the configuration differs ``adapter_config.json`` is removed first
  and comes last, so that in between PEFT says that there is no adapter. It never sees a mixture.
* ``load`` holds every size that a configuration claims against the files before it makes anything of that size
  (``saved_adapter``), and attaches only when everything fits. ``save`` refuses numbers that are not finite too: what
  cannot be loaded must not replace what can. Tensors that belong neither to a prefix nor to a module of its
  ``modules_to_save`` are refused, as they would be lost.
"""
