"""The tree of the source as clients know it: nodes, fids, qids, places, listings.

It may import linux/, process/, locks.py, calls.py and errors.py. A client is one of 9P (table.py)
or a kernel (kernel.py); of operations, FUSE's protocol, drivers and trio nothing here knows.
"""
