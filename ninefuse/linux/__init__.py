"""What Linux is asked beyond the os module: system calls, credentials, mounts.

It builds on nothing else of ninefuse but exitcodes.py.
"""
