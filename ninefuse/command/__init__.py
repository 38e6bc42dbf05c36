"""The command line: options, their texts, the checks before mounting, mount(8)'s helper.

It stands at the top: it may import all but bench/ and stats/, and serve.py late, once the checks
are done. Nothing imports it.
"""
