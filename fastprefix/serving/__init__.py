"""Prefixes in the engines that serve models: :mod:`fastprefix.serving.vllm` is the plugin for vLLM, and
:mod:`fastprefix.serving.continuous_batching` is for transformers' own engine.

Importing this package needs no engine.
"""
