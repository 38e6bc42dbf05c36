# The commands of a checkout; `make` alone lists them. Each does its own set-up (tools/setup).
#
# Programs replace the shell (exec): make hands signals on to them and waits for their clean-up.

.PHONY: help soak conformance demo bench test test-fast test-pyfuse3 test-tools check pages clean
.PHONY: guest guest-bench socket-bench
.DEFAULT_GOAL := help

# Processes that run tests at the same time. Most tests wait for most of their time.
JOBS = 4
PYTEST = .venv/bin/python -m pytest
PRODUCT = $(PYTEST) --ignore=tests/tools
# What a mount does, whoever serves it.
PYFUSE3 = $(addprefix tests/test_mount_,names.py files.py attributes.py fallbacks.py likeness.py \
  command.py)

# What is compiled is kept (make clean removes it): a thousand daemons and each process of the tests
# would compile it again, which is half of their work.
unexport PYTHONDONTWRITEBYTECODE
# By way of the environment: the directories' names reach the program whatever is in it.
export SRC OUT PJDFSTEST

help:
	@echo 'make demo    mount a directory, copy and compare a tree, time parallel dd under each model'
	@echo '             SRC=/some/dir: on the file system of that directory'
	@echo 'make bench   measure each model beside the source and other file servers, 5 to 9 minutes'
	@echo '             FULL=1: more and longer runs, most of an hour; OUT=/some/dir: for results;'
	@echo '             SRC=/some/dir: on the file system of that directory'
	@echo 'make test    all tests of ninefuse, real mounts included: five minutes'
	@echo '             ARGS="-x -k rename": further arguments for pytest, here and below;'
	@echo '             JOBS=1: one test at a time'
	@echo 'make test-fast'
	@echo '             those of them that need no mount: one minute'
	@echo 'make test-pyfuse3'
	@echo '             tests of mounts under the session of pyfuse3, where test has our own: one minute'
	@echo 'make test-tools'
	@echo '             the tests of bench, demo, packaging, tools/setup, the pages and their examples'
	@echo 'make soak    the tests of long runs: a million files, power failures, kills, faults, random'
	@echo '             calls, locks, sanitizers; no io_uring; installing with every Python; the guest'
	@echo 'make guest   the 9P client of Linux, in a guest under QEMU, on what ninefuse-serve exports: three'
	@echo '             to five minutes without hardware virtualisation'
	@echo 'make guest-bench'
	@echo '             the experiment of 2010: parallel dd in the guest, by each model, diod and QEMU'
	@echo 'make socket-bench'
	@echo '             9P clients on the host over a Unix socket, beside diod; OUT=, SRC= as for bench'
	@echo 'make conformance PJDFSTEST=/some/dir'
	@echo '             pjdfstest, built there, on mounts of each model and engine; as root'
	@echo '             ARGS="--rows second --only chmod/*.t": further arguments'
	@echo 'make check   ruff check, ruff format --check, mypy --strict, lint-imports (which district imports'
	@echo '             which: setup.cfg), and the site of the pages in build/site, with dead links and'
	@echo '             blank pages as errors'
	@echo 'make pages   write anew what follows from the options: man pages, completions; and pictures'
	@echo 'make clean   remove .venv, caches and build leftovers'

demo:
	@tools/setup
	@exec .venv/bin/python -m ninefuse.bench.demo $(if $(SRC),--source "$$SRC")

bench:
	@tools/setup bench
	@exec .venv/bin/python -m ninefuse.bench.command $(if $(filter-out 0,$(FULL)),--full) \
	  $(if $(SRC),--source "$$SRC") $(if $(OUT),--out "$$OUT") $(ARGS)

# Last those that measure what others wait for, with nothing beside them.
test:
	@if ! [ -c /dev/fuse ] || ! ( : <>/dev/fuse ) 2>/dev/null; then \
	  echo 'make test: cannot open /dev/fuse: run "modprobe fuse" as root, or start the container' \
	    'with --device /dev/fuse --cap-add SYS_ADMIN' >&2; exit 1; fi
	@tools/setup
	@exec $(PRODUCT) -n $(JOBS) --dist worksteal -m 'not alone' $(ARGS)
	@exec $(PRODUCT) -m alone $(ARGS)

test-fast:
	@tools/setup
	@exec $(PRODUCT) -n $(JOBS) --dist worksteal -m 'not mount' $(ARGS)

test-pyfuse3:
	@tools/setup
	@exec env NINEFUSE_SESSION=pyfuse3 $(PRODUCT) -n $(JOBS) --dist worksteal $(PYFUSE3) $(ARGS)

test-tools:
	@tools/setup
	@exec $(PYTEST) -n $(JOBS) --dist worksteal tests/tools $(ARGS)

guest:
	@tools/setup guest
	@exec env NINEFUSE_GUEST=1 $(PYTEST) -o faulthandler_timeout=0 tests/guest $(ARGS)

guest-bench:
	@tools/setup guest
	@exec env PYTHONPATH=tests .venv/bin/python -m guest.ddbench \
	  $(if $(SRC),--source "$$SRC") $(if $(OUT),--out "$$OUT") $(ARGS)

socket-bench:
	@tools/setup guest
	@exec env PYTHONPATH=tests .venv/bin/python -m guest.socketbench \
	  $(if $(SRC),--source "$$SRC") $(if $(OUT),--out "$$OUT") $(ARGS)

soak:
	@tools/setup guest
	@env NINEFUSE_ENGINE=threads $(PYTEST) -k second tests/test_mount_*.py $(ARGS)
	@env NINEFUSE_SESSION=pyfuse3 $(PYTEST) tests/test_mount_*.py $(ARGS)
	@exec env NINEFUSE_SOAK=1 $(PYTEST) -s -o faulthandler_timeout=0 -o timeout=0 -m soak $(ARGS)

conformance:
	@tools/setup
	@exec .venv/bin/python tests/conformance.py $(if $(SRC),--source "$$SRC") $(ARGS) -- "$$PJDFSTEST"

check:
	@tools/setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy --strict
	.venv/bin/lint-imports --no-cache --no-logo
	.venv/bin/mkdocs build --strict

pages:
	@tools/setup
	@.venv/bin/python tools/pages.py
	@exec .venv/bin/python tools/pictures.py

clean:
	rm -rf .venv build dist ninefuse.egg-info ninefuse/*/_*.*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -xdev -name .git -prune -o -name __pycache__ -prune -exec rm -rf {} +
