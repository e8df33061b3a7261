"""``fastprefix inspect``: one page about an adapter: what it is, what attention makes of it, and what it costs."""

from fastprefix.inspection.gather import Inspection, gather
from fastprefix.inspection.page import page
from fastprefix.inspection.texts import Sample, Texts, encode, own_samples, read_samples

__all__ = ["Inspection", "Sample", "Texts", "encode", "gather", "own_samples", "page", "read_samples"]
