"""`python -m keras_proxynorm.export` is the command line of this package."""

import sys

from keras_proxynorm.export.command_line import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
