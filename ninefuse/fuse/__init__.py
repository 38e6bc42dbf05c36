"""The FUSE side: sessions, what each callback does, the device, mounting.

It may import executor.py, ops/, tree/ and all below them, and pyfuse3 and trio; above it are only
watching/, serve.py and the command line.
"""
