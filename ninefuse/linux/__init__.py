"""What Linux is asked beyond the os module: system calls, credentials, mounts.

It may import of ninefuse what stands below it (settings.py, exitcodes.py), but neither trio nor
pyfuse3.
"""
