"""The library of CUDA kernels: ``build`` compiles it from ``kernels/cuda`` and ``csrc/cuda``, ``library`` loads it.

It is plain C++ with operators on torch's stable ABI, so that one file serves every torch from 2.11 on and every
Python. An install builds it where it finds nvcc and a torch with CUDA. Elsewhere it is built in the cache folder when
the backend ``cuda`` is first asked for by name, or ``fastprefix verify`` runs.
"""
