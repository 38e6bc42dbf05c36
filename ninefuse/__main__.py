"""``python -m ninefuse``: the same as the command ``ninefuse``."""

import sys

from ninefuse.command.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
