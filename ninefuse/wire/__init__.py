"""9P2000.L over sockets: the messages, their bytes, conversations, the server.

It knows the operations and whatever runs them, but nothing of FUSE.
"""
