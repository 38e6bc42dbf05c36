"""The tree of the source as clients know it: nodes, fids, qids, places, listings.

It builds on linux/ and on locks.py and calls.py; it knows neither FUSE nor trio nor any thread.
"""
