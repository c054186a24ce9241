"""Find and load the kernels that were built with the package, and call them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import sysconfig
from ctypes import POINTER, byref, c_char_p, c_int32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from dynamo_serve.native import structs
from dynamo_serve.native.structs import Type

FOLDER = Path(os.environ.get("DSERVE_KERNELS_FOLDER", Path(__file__).parent))  # sanitizers
NUM_SETS = 4  # amx, avx512_bf16, avx512, avx2


class NativeUnavailable(Exception):
    """The kernels cannot be used here; the message says why."""


@cache
def _library() -> ctypes.CDLL:
    """The shared library beside this file. Raises `NativeUnavailable`."""
    found = FOLDER / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not found.exists():
        raise NativeUnavailable(
            "the native kernels were not built (no C++ compiler?); install the package again"
        )
    if not _is_whole(found):
        raise NativeUnavailable(f"{found.name} is broken; install the package again")
    try:
        library = ctypes.CDLL(str(found))
    except OSError as error:
        reason = f"{found.name} cannot be loaded: {error}; install the package again"
        raise NativeUnavailable(reason) from error
    if not _is_current(library):
        raise NativeUnavailable(f"{found.name} was built from other sources; install again")
    _declare(library)
    sizes = [ctypes.sizeof(struct) for struct in structs.ALL]
    assert sizes == [library.ds_struct_size(which) for which in range(len(sizes))]
    return library


def _is_whole(library: Path) -> bool:
    """Whether an ELF file reaches as far as its header says: loading a shorter one kills us."""
    header = library.read_bytes()[:64]
    if header[:5] != b"\x7fELF\x02":
        return True  # not ours to judge: the loader says what is wrong with it
    if len(header) < 64:
        return False
    (sections,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return bool(library.stat().st_size >= sections + size * count)


def _is_current(library: ctypes.CDLL) -> bool:
    """Whether `library` was built from the sources beside us; a wheel has none to compare with."""
    sources = sorted((Path(__file__).parent / "src").glob("*.*"))
    if not sources:
        return True
    try:
        library.ds_version.restype = c_char_p
        built_from = library.ds_version().decode()
    except AttributeError:
        return False
    whole = b"".join(source.read_bytes() for source in sources)
    return bool(built_from == hashlib.sha256(whole).hexdigest())


def _declare(library: ctypes.CDLL) -> None:
    pointer, number = c_void_p, c_int32
    for name, result, arguments in (
        ("ds_kernels", pointer, (number,)),
        ("ds_kernels_name", c_char_p, (number,)),
        ("ds_set_threads", None, (number,)),
        ("ds_allocate", pointer, (c_uint64,)),
        ("ds_release", None, (pointer,)),
        ("ds_packed_bytes", c_uint64, (pointer, number, number, number)),
        ("ds_pack", None, (pointer, pointer, pointer, pointer, *(number,) * 5)),
        ("ds_forward", None, (pointer, POINTER(structs.Model), POINTER(structs.Step))),
        ("ds_attend", None, (pointer, *map(POINTER, _ATTEND))),
        ("ds_linear", None, (pointer, POINTER(structs.Linear), pointer, pointer, number)),
        ("ds_struct_size", number, (number,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


_ATTEND = (structs.Attention, structs.Step, structs.Queries)


class Kernels:
    """The kernels of one instruction set."""

    def __init__(self, name: str, handle: int) -> None:
        self.name = name
        self._handle = handle
        self._library = _library()

    def set_threads(self, count: int) -> None:
        """For the whole process; `count` includes the thread that calls."""
        self._library.ds_set_threads(count)

    def packed_bytes(self, outputs: int, inputs: int, kind: Type) -> int:
        return int(self._library.ds_packed_bytes(self._handle, outputs, inputs, kind))

    def pack(
        self,
        to: int,
        scales: int | None,
        rows: int,
        row_type: Type,
        shape: tuple[int, int],
        kind: Type,
        gated: bool,
    ) -> None:
        """Pack `rows` [outputs, inputs] to the address `to`."""
        self._library.ds_pack(self._handle, to, scales, rows, row_type, *shape, kind, gated)

    def forward(self, model: structs.Model, step: structs.Step) -> None:
        self._library.ds_forward(self._handle, byref(model), byref(step))

    def attend(
        self, attention: structs.Attention, step: structs.Step, queries: structs.Queries
    ) -> None:
        self._library.ds_attend(self._handle, byref(attention), byref(step), byref(queries))

    def linear(self, linear: structs.Linear, x: int, y: int, tokens: int) -> None:
        self._library.ds_linear(self._handle, byref(linear), x, y, tokens)


class Memory:
    """A block on huge pages where the system has them; freed with the object."""

    def __init__(self, num_bytes: int) -> None:
        self._library = _library()
        self.address = int(self._library.ds_allocate(max(num_bytes, 1)))
        self.num_bytes = num_bytes

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._library.ds_release(self.address)


def available() -> dict[str, Kernels]:
    """Every set that this processor runs, best first. Raises `NativeUnavailable` without any."""
    library = _library()
    found = {}
    for i in range(NUM_SETS):
        handle = library.ds_kernels(i)
        if handle:
            name = library.ds_kernels_name(i).decode()
            found[name] = Kernels(name, handle)
    if not found:
        raise NativeUnavailable("this processor has not even AVX2")
    return found


def choose(wish: str) -> Kernels:
    """The set named `wish`, or the best for auto. Raises `NativeUnavailable`."""
    if wish == "torch":
        raise NativeUnavailable("engine.kernels is torch")
    found = available()
    if wish == "auto":
        return next(iter(found.values()))
    if wish not in found:
        raise NativeUnavailable(f"this processor runs {', '.join(found)}, but not {wish}")
    return found[wish]
