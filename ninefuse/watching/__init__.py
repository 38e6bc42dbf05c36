"""What is seen of a running daemon: reports, counters as published, traces.

It builds on all that it looks at; nothing but serve.py builds on it.
"""
