"""The tree of the source as clients know it: nodes, fids, qids, places, listings.

It may import linux/, locks.py and calls.py; it knows neither operations nor FUSE nor drivers, and
neither trio nor pyfuse3.
"""
