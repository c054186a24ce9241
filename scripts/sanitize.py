"""Build the native kernels with ASan and UBSan and run their tests on that build.

AMX is emulated in it: its kernels are tested on any processor with AVX-512 and bfloat16, and the
sanitizers, which do not know the instructions, see what tiles read and write.

The sanitizer's runtime has to be in the process before anything else, hence the preload; leaks
are not looked for, because Python and torch keep memory until the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "dynamo_serve" / "native" / "src"
BUILD = ROOT / "build" / "sanitized"
COMPILE = [
    *("g++", "-std=c++17", "-O1", "-g", "-fPIC", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *("-Wno-psabi", "-Wno-maybe-uninitialized"),
    *("-DDS_TILES_ARE_EMULATED", "-include", str(ROOT / "tests" / "native" / "tiles.h")),
]


def compile_one(source: Path) -> Path:
    target = BUILD / f"{source.stem}.o"
    version = sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.*"))))
    define = f'-DDS_VERSION="{version.hexdigest()}"'
    subprocess.run([*COMPILE, define, "-c", str(source), "-o", str(target)], check=True)
    return target


def main() -> int:
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        objects = list(workers.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
    library = BUILD / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = [*COMPILE, "-shared", "-pthread", "-o", str(library), *map(str, objects)]
    subprocess.run(link, check=True)
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DSERVE_KERNELS_FOLDER": str(BUILD),
    }
    # Tests skip sets that do not run here: with a library that does not load that would be all.
    loads = "from dynamo_serve.native.library import available; assert available()"
    subprocess.run([sys.executable, "-c", loads], cwd=ROOT, env=environment, check=True)
    tests = [sys.executable, "-m", "pytest", "tests/native"]
    return subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
