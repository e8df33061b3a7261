"""Soft prompts that stand inside the rows' text: after what is given, or at a marker token.

What such a prompt's tokens compute depends on the text in front of them, so they run with every row.

* ``places.py`` finds where the prompt stands in each row, and refuses calls in which that is not known.
* ``rows.py`` puts the prompt's embeddings into the rows of a forward, with their masks and positions, and takes its
  places out of the output. One place is left: the state of the prompt's last token, which predicts the text after the
  prompt, stands where the marker was, or in place of the last token in front of the prompt, which predicts none.
* A cache holds the prompt as part of its rows. Where it stands is kept with the cache object, and the masks and
  positions of later forwards, which know only the text, are extended by it.
"""
