"""The native kernels: built where a C++ compiler for x86-64 exists, left out elsewhere.

Everything else about the package is in pyproject.toml. The sources choose their instruction sets
themselves (one file each), so that one build runs on any x86-64 processor.
"""

import platform
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("dynamo_serve/native/src")

# What the package compares with the sources that it finds beside the built library.
version = sha256(b"".join(source.read_bytes() for source in sorted(SOURCES.glob("*.*"))))

kernels = Extension(
    "dynamo_serve.native._kernels",
    sources=sorted(map(str, SOURCES.glob("*.cpp"))),
    depends=sorted(map(str, [*SOURCES.glob("*.inl"), *SOURCES.glob("*.h")])),
    # gcc 12 warns of its own headers (uninitialized) and of vectors in arguments of inlined code.
    extra_compile_args=["-std=c++17", "-O3", "-Wno-psabi", "-Wno-maybe-uninitialized"],
    define_macros=[("DS_VERSION", f'"{version.hexdigest()}"')],
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)

setup(ext_modules=[kernels] if platform.machine() in ("x86_64", "AMD64") else [])
