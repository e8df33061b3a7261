"""``python -m fastprefix.cli`` is the ``fastprefix`` command."""

import sys

from fastprefix.cli import main

if __name__ == "__main__":
    sys.exit(main())
