"""The FUSE side: sessions, what each callback does, the device, mounting.

It builds on ops/, tree/, linux/ and executor.py; nothing but serve.py and watching/ builds on it.
"""
