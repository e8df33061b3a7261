"""The operator as a kernel for Hugging Face's Kernel Hub: what a build needs beyond the package's own files.

``python -m hub.assemble OUT`` puts both together; nothing of the package is kept here a second time.
"""
