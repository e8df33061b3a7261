"""``fastprefix._triton`` in a checkout: the kernels of the folder ``kernels/triton`` of the same checkout.

Python looks for ``fastprefix._triton.<name>`` in this module's ``__path__``. Without this file an editable install of
another checkout would answer, and its kernels would run under the launch code of this one. A wheel holds the kernels
in the folder ``fastprefix/_triton/``, which Python prefers to a file of the same name.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_KERNELS = _PACKAGE.parent / "kernels" / "triton"

if not (_KERNELS / "__init__.py").is_file():
    raise ImportError(
        f"fastprefix: the Triton kernels are missing: got nothing at {_KERNELS}, expected the folder kernels/triton of"
        f" the checkout that {_PACKAGE} belongs to. Copy both folders, or install the package"
    )

__path__ = [str(_KERNELS)]
