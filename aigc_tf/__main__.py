"""Entry point of `python -m aigc_tf`, the same as `aigc-tf`."""

import sys

from .cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
