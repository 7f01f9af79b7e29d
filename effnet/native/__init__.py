"""Is there a compiler here, and what does it make of our C++? Built on first use, cached, and never required.

`library()` gives the compiled `kernels.cpp` (the operators of a step) or None, `picture_library()` the compiled
`pixels.cpp` (those of a training view); `ops` and `pixels` ask and have a plain twin for every one of them. A file is
compiled for this very processor (`-march=native`), so the cache is keyed by source, compiler, flags and processor.
`EFFNET_NATIVE=0` switches both off. `why_not()` says in words why there is none.

The functions of the libraries take addresses; what may be passed is checked in `ops` and `pixels`.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# no -ffast-math: sums keep their order, and a NaN in a loss must stay one
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
MORE_FLAGS = {"pixels": ("-ffp-contract=off",)}  # Pillow rounds products before it adds them, and so do we
# p an address, i an int, l a long, f a float
FUNCTIONS = {
    "kernels": (
        ("depthwise_forward", "ipppp" + "iii"),
        ("depthwise_backward", "ipppppp" + "iii"),
        ("moments", "ippp" + "iiii"),
        ("norm_forward", "iippppp" + "iiii"),
        ("norm_backward", "iipppppppppp" + "iiii"),
        ("gate_forward", "ippp" + "iiii"),
        ("gate_backward", "ippppp" + "iiii"),
        ("rmsprop", "pipi"),
    ),
    "pixels": (
        ("resize", "pliippppii"),
        ("look_up", "pppl"),
        ("histogram", "plp"),
        ("luma_sum", "plp"),
        ("fade", "pplf"),
        ("sharpen", "ppiif"),
        ("move", "ppiipp"),
    ),
}
_reason = ""


def library() -> ctypes.CDLL | None:
    """The compiled kernels of a step, built first where they are not in the cache (about eight seconds, once)."""
    return _switched("kernels")


def picture_library() -> ctypes.CDLL | None:
    """The compiled operators on uint8 pictures, built first where they are not in the cache (a few seconds, once)."""
    return _switched("pixels")


def _switched(name: str) -> ctypes.CDLL | None:
    if sys.platform != "linux" or os.environ.get("EFFNET_NATIVE", "1") == "0":
        return None  # read each time, so that it can be switched while running
    return _library(name)


def why_not() -> str:
    """Why `library()` is None, for `effnet plan` and bug reports; empty where it is there."""
    if sys.platform != "linux":
        return f"built on Linux only, this is {sys.platform}"
    if os.environ.get("EFFNET_NATIVE", "1") == "0":
        return "switched off by EFFNET_NATIVE=0"
    return "" if _library("kernels") is not None else _reason


@functools.cache
def _library(name: str) -> ctypes.CDLL | None:
    global _reason
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        _reason = "no C++ compiler: neither $CXX nor g++ nor clang++ is on the PATH"
        return None
    try:
        source, flags = HERE / f"{name}.cpp", (*FLAGS, *MORE_FLAGS.get(name, ()))
        path = cache_folder() / f"{name}-{_key(compiler, source, flags)}.so"
        if not path.exists():
            _build([compiler, *flags, str(source)], path)
        return _typed(ctypes.CDLL(str(path)), name)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        _reason = f"{compiler} could not build it: {output.strip().splitlines()[-1] if output.strip() else error!r}"
        return None


def cache_folder() -> Path:
    """Where compiled kernels and latency tables are kept: $EFFNET_CACHE, or `effnet` in the user's cache folder."""
    if os.environ.get("EFFNET_CACHE"):
        return Path(os.environ["EFFNET_CACHE"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "effnet"
    usual = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(usual) if usual else Path.home() / ".cache") / "effnet"


def _key(compiler: str, source: Path, flags: tuple[str, ...]) -> str:
    """What the binary depends on: source, flags, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    parts = (source.read_bytes(), " ".join(flags).encode(), version, platform.machine().encode(), _processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """The first processor's name and instruction sets."""
    known = processor()
    return "\n".join(known.get(field, "") for field in ("model name", "flags", "Features", "CPU part")).encode()


@functools.cache
def processor() -> dict[str, str]:
    """What Linux says of the first processor (`model name`, `flags` or `Features`, ...); empty on other systems."""
    listed = Path("/proc/cpuinfo")
    if not listed.exists():
        return {}
    lines = listed.read_text().split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _build(command: list[str], path: Path) -> None:
    """Compiles to a temporary file and renames it, so that two processes at once both end with a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=True, timeout=300)
        os.replace(built, path)


def _typed(library: ctypes.CDLL, name: str) -> ctypes.CDLL:
    """Declares the arguments."""
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_long, "f": ctypes.c_float}
    for function_name, arguments in FUNCTIONS[name]:
        function = getattr(library, f"effnet_{function_name}")
        function.argtypes = [kinds[letter] for letter in arguments]
        function.restype = ctypes.c_int
    return library


@functools.cache
def keep_freed_memory() -> bool:
    """Tells the C library to keep large freed blocks for the next allocation, and to have them in huge pages.

    A training step allocates and frees maps of tens of megabytes; glibc maps and unmaps each, and the kernel clears
    every page anew. Measured 2026-11-22: writing a new map of 77 MB took 45 ms, and 10 ms with the memory kept. In a
    virtual machine, whose tables are dear to walk, a step of V2-S takes about a tenth less in huge pages, where the
    kernel gives them to who asks (docs/training-speed.md): the heap is grown once by half of the machine's memory,
    untouched, and the kernel is asked. What is freed stays with the process until it ends. True where it worked (glibc
    only).
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    trim_threshold, mmap_max = -1, -4  # the numbers of M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h; -1: never
    kept = bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, -1))
    if kept:
        _in_huge_pages(libc, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return kept


def _in_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Grows the heap by `size` bytes of addresses, and advises huge pages for them; without effect where it cannot."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    address = libc.malloc(size)
    if address is None:
        return
    page, huge = 2 << 20, 14  # bytes of a huge page on x86-64; MADV_HUGEPAGE of mman.h
    start = -(-address // page) * page
    libc.madvise(start, (address + size - start) // page * page, huge)
    libc.free(address)
