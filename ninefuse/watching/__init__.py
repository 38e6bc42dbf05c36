"""What is seen of a running daemon: reports, counters as published, traces.

It may import what it looks at, fuse/ and all below, but not pyfuse3; only serve.py imports it.
"""
