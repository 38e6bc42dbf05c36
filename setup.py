"""The extensions, where this machine can build them; all else is in setup.cfg.

They are optional. Without liburing's headers or pkg-config, ninefuse is built without
ninefuse.driving._ring, and does its input and output on threads. Without a compiler or Cython it
is also built without ninefuse.linux._rights, _statx and _transfer and ninefuse.tree._known, and
does what these do in Python, and without those of ninefuse.fuse, and is served by pyfuse3's
session.
"""

from __future__ import annotations

import subprocess

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIBURING = "liburing >= 2.3"


def pkg_config(*options: str) -> list[str] | None:
    """What pkg-config says of liburing; None if there is none, or an older one."""
    try:
        done = subprocess.run(
            ["pkg-config", *options, LIBURING], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.split() if done.returncode == 0 else None


def extensions() -> list[Extension]:
    """The extensions as C; none without Cython."""
    try:
        from Cython.Build import cythonize
    except ImportError:
        return []
    wanted = [
        Extension("ninefuse.fuse._ahead", ["ninefuse/fuse/_ahead.pyx"]),
        Extension("ninefuse.fuse._message", ["ninefuse/fuse/_message.pyx"]),
        Extension("ninefuse.fuse._plain", ["ninefuse/fuse/_plain.pyx"]),
        Extension("ninefuse.fuse._role", ["ninefuse/fuse/_role.pyx"]),
        Extension("ninefuse.fuse._wire", ["ninefuse/fuse/_wire.pyx"]),
        Extension("ninefuse.linux._rights", ["ninefuse/linux/_rights.pyx"]),
        Extension("ninefuse.linux._statx", ["ninefuse/linux/_statx.pyx"]),
        Extension("ninefuse.linux._transfer", ["ninefuse/linux/_transfer.pyx"]),
        Extension("ninefuse.tree._known", ["ninefuse/tree/_known.pyx"]),
    ]
    compiler, linker = pkg_config("--cflags"), pkg_config("--libs")
    if compiler is not None and linker is not None:
        ring = Extension(
            "ninefuse.driving._ring",
            ["ninefuse/driving/_ring.pyx"],
            extra_compile_args=compiler,
            extra_link_args=linker,
        )
        wanted.append(ring)
    translated: list[Extension] = cythonize(wanted, build_dir="build", quiet=True)
    for extension in translated:
        extension.optional = True  # which Cython does not pass on
    return translated


class BuildExtension(build_ext):
    """Takes a compiler that is not there for one that fails, which optional extensions survive."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension."""
        try:
            super().build_extension(ext)
        except OSError as error:
            raise CompileError(str(error)) from error


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
