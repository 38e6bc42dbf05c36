"""Real 9P clients of ninefuse-serve: Linux's own in a guest under QEMU, and one on the host.

image.py makes what a guest is booted from, with init.sh and agent.py in it; machine.py boots it
and asks it to run what is in mounts.py and programs.py. exports.py and conftest.py have a server's
directory mounted there, for the test_guest_*.py. ddbench.py (`make guest-bench`) and socketbench.py
(`make socket-bench`) compare servers, with what benches.py has for both.
"""
