"""The daemon as a process: background, log, signals, its end, service manager, its own files.

It may import linux/, settings.py and exitcodes.py, but neither trio nor pyfuse3; it knows neither
files of the source nor FUSE.
"""
