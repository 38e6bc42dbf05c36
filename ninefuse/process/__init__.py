"""The daemon as a process: background, log, signals, service manager, its own files.

It builds on linux/, exitcodes.py and settings.py; it knows neither files nor FUSE.
"""
