"""What the drivers (executor.py) make calls with: workers, shares, io_uring, patience, counters.

It builds on calls.py alone; it knows neither operations nor FUSE.
"""
