"""Launches of the CUDA kernels in csrc/cuda, by one of two routes.

`_sk_cuda.so` is built from them where nvcc was found. Where it is missing, NVRTC compiles the same
sources at first use, through CuPy, for the GPU at hand; the result is cached in the user's cache
folder by the sources, the architecture and NVRTC's version, and compiled anew where what lies there
is damaged or others could have written it. Either way

    function("sk_spmm_gather_bf16_d4", x.device.index)(
        (columns, splits), 256, smem_bytes, current_stream(x.device.index), x, n
    )

launches. After its first call on a device (a warm-up) a launch allocates nothing on the GPU and
waits for nothing, so a CUDA graph can capture it.
"""

import ctypes
import hashlib
import struct
import threading
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch

from ...files import read_cached, write_cached
from ..operands import native

PACKAGE = Path(__file__).parents[2]
LIBRARY = PACKAGE / "_sk_cuda.so"
# In a wheel, and in a checkout.
SOURCE_FOLDERS = (PACKAGE / "csrc" / "cuda", PACKAGE.parent / "csrc" / "cuda")
EVERY_KERNEL_SMEM_BYTES = 48 * 1024  # what needs no raised limit
NVRTC_OPTIONS = ("-std=c++17",)

# (grid x, grid y, block, smem_bytes, stream, *arguments): a launch on the current device.
Start = Callable[..., None]


class Launcher:
    """A kernel on a device. `launcher(grid, block, smem_bytes, stream, *arguments)` launches it.

    grid is (x, y), block a number of threads, stream a handle. The arguments are tensors or their
    addresses, None for a null pointer, and ints of 32 bits, as many as the kernel has parameters.
    RuntimeError names the kernel and CUDA's error.
    """

    def __init__(self, device: int, start: Start):
        self.device = device
        self.start = start

    def __call__(
        self,
        grid: tuple[int, int],
        block: int,
        smem_bytes: int,
        stream: int,
        *arguments: torch.Tensor | int | None,
    ) -> None:
        if torch.cuda.current_device() == self.device:
            self.start(*grid, block, smem_bytes, stream, *arguments)
        else:
            with torch.cuda.device(self.device):
                self.start(*grid, block, smem_bytes, stream, *arguments)


class Collected:
    """Start of a kernel that wants the address of an array of addresses, of its arguments."""

    def __init__(
        self,
        name: str,
        start: Callable[[int, int, int, int, int, int], None],
        signature: str | None = None,
        enter: Callable[[], None] | None = None,
    ):
        """`enter` is called in each thread before its first launch. Where the signature is not
        known, the first launch tells the number of arguments."""
        self.name = name
        self._start = start
        self._signature = signature
        self._enter = enter
        self._arguments: _Arguments | None = None

    def __call__(
        self, grid_x: int, grid_y: int, block: int, smem_bytes: int, stream: int, *given
    ) -> None:
        if self._arguments is None:
            signature = "?" * len(given) if self._signature is None else self._signature
            self._arguments = _Arguments(signature, self._enter)
        arguments = self._arguments
        numbers = [t.data_ptr() if isinstance(t, torch.Tensor) else t or 0 for t in given]
        try:
            arguments.pack(arguments.values, 0, *numbers)
        except struct.error as error:
            raise TypeError(
                f"{self.name}: expected {len(arguments.signature)} arguments, "
                f"'{arguments.signature}' (P a tensor, an address or None, i an int32), got {given}"
            ) from error
        self._start(grid_x, grid_y, block, smem_bytes, stream, arguments.address)


class _Arguments(threading.local):
    """Where the arguments of a launch stand, and the array of their addresses; one per thread.

    Each has 8 bytes. A kernel reads as many of them as its parameter has: the first, and the low
    ones of a number, on every machine with a GPU.
    """

    KINDS = {"P": "Q", "i": "i4x", "?": "q"}  # ?: either, where the signature is not known

    def __init__(self, signature: str, enter: Callable[[], None] | None):
        if enter:
            enter()
        self.signature = signature
        self.pack = struct.Struct("<" + "".join(self.KINDS[kind] for kind in signature)).pack_into
        self.values = ctypes.create_string_buffer(8 * max(1, len(signature)))
        first = ctypes.addressof(self.values)
        self.addresses = (ctypes.c_void_p * len(signature))(
            *(first + 8 * i for i in range(len(signature)))
        )
        self.address = ctypes.addressof(self.addresses)


class LibraryRoute:
    """`_sk_cuda.so`. OSError if it does not load."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self._launch = self._library.sk_launch
        self._launch.argtypes = (
            ctypes.c_char_p,
            *(ctypes.c_uint,) * 4,
            *(ctypes.c_void_p,) * 2,
        )
        self._library.sk_kernel.argtypes = (ctypes.c_uint,)
        self._library.sk_signature.argtypes = (ctypes.c_char_p,)
        for text in ("sk_kernel", "sk_signature", "sk_error"):
            getattr(self._library, text).restype = ctypes.c_char_p

    def kernels(self) -> list[str]:
        names = iter(range(2**32))
        return [name.decode() for name in iter(lambda: self._library.sk_kernel(next(names)), None)]

    def launcher(self, name: str, device: int) -> Launcher:
        encoded, launch, text_of = name.encode(), self._launch, self._library.sk_error
        signature = self._library.sk_signature(encoded)
        if signature is None:
            raise ValueError(f"kernel: expected one of {', '.join(self.kernels())}, got {name}")
        if native:
            functions = (ctypes.cast(f, ctypes.c_void_p).value for f in (launch, text_of))
            return Launcher(device, native.launcher(*functions, name, signature.decode()))

        def start(grid_x, grid_y, block, smem_bytes, stream, args):
            code = launch(encoded, grid_x, grid_y, block, smem_bytes, stream, args)
            if code:
                raise RuntimeError(f"{name}: {text_of(code).decode()} (CUDA error {code})")

        return Launcher(device, Collected(name, start, signature.decode()))

    def __str__(self) -> str:
        return f"built with nvcc, {len(self.kernels())} kernels"


class NvrtcRoute:
    """The sources in `folder`, compiled through CuPy. ImportError or RuntimeError without it."""

    def __init__(self, folder: Path):
        import cupy
        from cupy.cuda import driver, nvrtc, runtime

        self.folder = folder
        self.version = ".".join(map(str, nvrtc.getVersion()))
        self._cupy, self._driver, self._nvrtc, self._runtime = cupy, driver, nvrtc, runtime
        self._modules: dict[tuple[Path, int], int] = {}

    def launcher(self, name: str, device: int) -> Launcher:
        driver = self._driver
        with torch.cuda.device(device):
            module = self._module(source_of(name, self.folder), device)
            try:
                kernel = driver.moduleGetFunction(module, name)
            except driver.CUDADriverError as error:
                raise ValueError(f"kernel: {name} is not in the CUDA sources ({error})") from error
        limit_bytes = EVERY_KERNEL_SMEM_BYTES

        def start(grid_x, grid_y, block, smem_bytes, stream, args):
            nonlocal limit_bytes
            try:
                if smem_bytes > limit_bytes:
                    attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    driver.funcSetAttribute(kernel, attribute, smem_bytes)
                    limit_bytes = smem_bytes
                driver.launchKernel(
                    kernel, grid_x, grid_y, 1, block, 1, 1, smem_bytes, stream, args, 0
                )
            except driver.CUDADriverError as error:
                raise RuntimeError(f"{name}: {error}") from error

        # The driver wants a current context, and torch may have made none in this thread.
        enter = partial(self._runtime.setDevice, device)
        return Launcher(device, Collected(name, start, enter=enter))

    def _module(self, source: Path, device: int) -> int:
        if (source, device) not in self._modules:
            self._runtime.setDevice(device)  # makes the context that loading needs
            cubin = self.cubin(source, arch_of(torch.cuda.get_device_capability(device)))
            self._modules[source, device] = self._driver.moduleLoadData(cubin)
        return self._modules[source, device]

    def cubin(self, source: Path, arch: str) -> bytes:
        """The machine code of a source file, from the cache or compiled."""
        name = f"{source.stem}-{arch}-{self._key(arch)}.cubin"
        if cached := read_cached(name):
            return cached
        cubin = self._compile(source, arch)
        try:
            write_cached(name, cubin)
        except OSError as error:
            warnings.warn(f"CUDA kernels were compiled and not cached: {error}", stacklevel=2)
        return cubin

    def _compile(self, source: Path, arch: str) -> bytes:
        nvrtc = self._nvrtc
        includes = (self.folder, *_toolkit_includes(self._cupy))
        options = (*NVRTC_OPTIONS, f"-arch={arch}", *(f"-I{folder}" for folder in includes))
        program = nvrtc.createProgram(source.read_text(), str(source), (), ())
        try:
            nvrtc.compileProgram(program, options)
            return nvrtc.getCUBIN(program)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(
                f"{source.name}: NVRTC {self.version} does not compile it for {arch}: {error}\n"
                + nvrtc.getProgramLog(program)
            ) from error
        finally:
            nvrtc.destroyProgram(program)

    def _key(self, arch: str) -> str:
        parts = [self.version, *NVRTC_OPTIONS]
        for path in sorted(self.folder.glob("*.cu*")):
            parts += [path.name, path.read_text()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"through CuPy {self._cupy.__version__}, NVRTC {self.version}"


def refusal() -> str | None:
    """Why no CUDA kernel can run here, in words for the kernel table; None if they can."""
    found = route()
    return found if isinstance(found, str) else None


@cache
def route() -> LibraryRoute | NvrtcRoute | str:
    """The way to the kernels, or the reason why there is none."""
    missing = "the CUDA library is not built"
    if LIBRARY.exists():
        try:
            return LibraryRoute(LIBRARY)
        except OSError as error:
            missing = f"the CUDA library does not load ({error})"
    if find_spec("cupy") is None:
        return f"{missing} and CuPy is not installed"
    folder = next((folder for folder in SOURCE_FOLDERS if folder.is_dir()), None)
    if folder is None:
        return f"{missing} and its sources are not installed"
    try:
        return NvrtcRoute(folder)
    except (ImportError, RuntimeError) as error:
        # One line: the search for a library lists every folder.
        reason = str(error).strip().partition("\n")[0]
        return f"{missing} and CuPy does not give NVRTC: {reason}"


@cache
def function(name: str, device: int) -> Launcher:
    """The kernel of that name, on the GPU of that index. RuntimeError where `refusal` has a
    reason, ValueError for a name that no source has."""
    found = route()
    if isinstance(found, str):
        raise RuntimeError(f"{name}: {found}")
    return found.launcher(name, device)


def start(
    name: str,
    grid: int,
    block: int,
    smem_bytes: int,
    tensors: tuple[torch.Tensor | None, ...],
    *sizes: int,
) -> None:
    """Launch a kernel on torch's current stream: its arguments are the tensors and the sizes."""
    device = tensors[0].device.index  # type: ignore[union-attr]  # the first is no None
    function(name, device)(
        (grid, 1),
        block,
        smem_bytes,
        current_stream(device),
        *tensors,
        *sizes,
    )


def current_stream(device: int) -> int:
    """The handle of torch's current stream on that GPU."""
    # torch.cuda.current_stream(device).cuda_stream, without making a Stream.
    return torch._C._cuda_getCurrentRawStream(device)


def surroundings() -> tuple[Callable | None, Callable, Callable]:
    """What tells the current device, if there are several, the stream of one, and whether a CUDA
    graph captures it."""
    return (
        torch._C._cuda_getDevice if torch.cuda.device_count() > 1 else None,
        torch._C._cuda_getCurrentRawStream,
        torch._C._cuda_isCurrentStreamCapturing,
    )


def source_of(kernel: str, folder: Path) -> Path:
    """The file of a kernel: `sk_spmm_gather_f16` is in spmm_gather.cu."""
    paths = [path for path in folder.glob("*.cu") if kernel.startswith(f"sk_{path.stem}_")]
    if not paths:
        raise ValueError(f"kernel: no CUDA source has {kernel}")
    return max(paths, key=lambda path: len(path.stem))


def arch_of(capability: tuple[int, int]) -> str:
    """Architecture to compile machine code for; sm_90a is Hopper with its warpgroups."""
    return "sm_90a" if capability == (9, 0) else "sm_{}{}".format(*capability)


def _toolkit_includes(cupy) -> list[Path]:
    """Folders with CUDA's own device headers (cuda_fp16.h): a toolkit's, or those of wheels."""
    roots = [Path(path) for path in [cupy.cuda.get_cuda_path()] if path]
    wheels = find_spec("nvidia")
    for folder in wheels.submodule_search_locations or () if wheels else ():
        roots += sorted(Path(folder).glob("*"))
    return [root / "include" for root in roots if (root / "include" / "cuda_fp16.h").exists()]
