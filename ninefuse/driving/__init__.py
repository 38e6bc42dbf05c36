"""What the drivers (executor.py) make calls with: workers, shares, io_uring, patience, counters.

It may import calls.py, locks.py and process/, but neither ops/, tree/ nor executor.py, nor pyfuse3
or trio: it knows no operation.
"""
