"""The command line: options, their manual, checks before mounting, mount(8)'s helper.

It builds on process/ and linux/, and on serve.py once the checks are done.
"""
