"""ninefuse: a directory mounted over FUSE, with every callback a sequence of 9P operations.

Importing this package imports nothing else: setuptools reads the version from here without
pyfuse3 or trio, and the command line answers before either is loaded.
"""

__version__ = "0.2.0"
