"""Training data from JSON lines: prompt/completion pairs, chats and plain text."""

from fastprefix.data.batches import IGNORE_INDEX, Row, collator
from fastprefix.data.kinds import Data, read_data
from fastprefix.data.pairs import encode_pairs, load_pairs, read_pairs

__all__ = ["IGNORE_INDEX", "Data", "Row", "collator", "encode_pairs", "load_pairs", "read_data", "read_pairs"]
