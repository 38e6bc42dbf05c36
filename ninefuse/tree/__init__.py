"""The tree of the source as clients know it: nodes, fids, qids, places, listings.

It builds on linux/ and on locks.py, calls.py and errors.py. A client is one of 9P (table.py) or
a kernel (kernel.py); of FUSE's protocol, of trio and of threads nothing here knows.
"""
