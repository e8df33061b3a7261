"""Measuring whole models: training steps with a prefix by several methods, generation, and bytes saved for backward."""
