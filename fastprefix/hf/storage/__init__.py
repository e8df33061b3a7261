"""Adapter files: written atomically, read with errors that name path and field, kept on disk until needed."""
