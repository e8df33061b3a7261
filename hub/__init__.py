"""The operator as a kernel for Hugging Face's Kernel Hub: the files that a build needs beyond the package's own.

``python -m hub.assemble OUT`` puts both together; nothing of the package is kept here a second time.
"""
