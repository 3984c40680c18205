"""The two routes to the CUDA kernels, as far as they go without a GPU; with one, both launch."""

import ctypes
import re
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sparsekern.kernels.cuda import library as cuda_library
from sparsekern.kernels.cuda.library import LibraryRoute, NvrtcRoute, arch_of, source_of
from sparsekern.testing import interleaved_times

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "csrc" / "cuda"
TOY = Path(__file__).parents[2] / "cuda" / "toy.cu"

# A library with the C interface and no CUDA in it: it keeps what it was asked to launch.
RECORDER = """
#include <stdint.h>
#include <string.h>
static int64_t asked[9];
static char names[][16] = {"sk_toy_f32", "sk_toy_i32"};
const int64_t* recorded(void) { return asked; }
const char* sk_kernel(unsigned i) { return i < 2 ? names[i] : 0; }
const char* sk_signature(const char* name) { return strncmp(name, "sk_toy_", 7) ? 0 : "PPii"; }
const char* sk_error(int code) { return "it is not to be"; }
int sk_launch(const char* name, unsigned x, unsigned y, unsigned block, unsigned smem, void* stream,
              void** args) {
  if (block == 0) return 9;
  int64_t now[9] = {x, y, block, smem, (intptr_t)stream, *(intptr_t*)args[0], *(intptr_t*)args[1],
                    *(int32_t*)args[2], *(int32_t*)args[3]};
  memcpy(asked, now, sizeof now);
  return 0;
}
"""


@pytest.fixture(autouse=True)
def fresh_route(monkeypatch, tmp_path):
    """The route is looked for anew, and compiled kernels are cached in a folder of the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (cuda_library.route, cuda_library.function):
        cached.cache_clear()
    yield
    for cached in (cuda_library.route, cuda_library.function):
        cached.cache_clear()


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """A process with the recording library for a CUDA library, and its record of a launch."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    path = tmp_path / "_sk_cuda.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=RECORDER, text=True, check=True)
    monkeypatch.setattr(cuda_library, "LIBRARY", path)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    recorded = ctypes.CDLL(str(path)).recorded
    recorded.restype = ctypes.POINTER(ctypes.c_int64 * 9)
    return lambda: list(recorded().contents)


def hide_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)


def test_a_launch_reaches_the_library(recorder):
    assert cuda_library.refusal() is None
    launch = cuda_library.function("sk_toy_f32", 0)
    launch((5, 6), 256, 65536, 2**63, 2**47 + 16, 2**63 + 1, -7, 2**31 - 1)
    grid_and_block, stream, arguments = [5, 6, 256, 65536], -(2**63), [2**47 + 16, 1 - 2**63]
    assert recorder() == [*grid_and_block, stream, *arguments, -7, 2**31 - 1]
    assert cuda_library.function("sk_toy_f32", 0) is launch
    assert str(cuda_library.route()) == "built with nvcc, 2 kernels"


def test_a_launch_makes_the_device_current(recorder, monkeypatch):
    devices, current = [], [0]

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, current[0] = current[0], self.index
            devices.append(self.index)

        def __exit__(self, *_):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    cuda_library.function("sk_toy_f32", 3)((1, 1), 32, 0, 0, 1, 2, 3, 4)
    assert devices == [3] and current == [0] and recorder()[5:] == [1, 2, 3, 4]


def test_what_a_launch_refuses(recorder):
    launch = cuda_library.function("sk_toy_f32", 0)
    for wrong in ((1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, 2**31), (-1, 2, 3, 4), (1, 2, 3, 4.0)):
        with pytest.raises(TypeError, match="sk_toy_f32: expected 4 arguments, 'PPii'"):
            launch((1, 1), 32, 0, 0, *wrong)
    with pytest.raises(RuntimeError, match=r"^sk_toy_f32: it is not to be \(CUDA error 9\)$"):
        launch((1, 1), 0, 0, 0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="expected one of sk_toy_f32, sk_toy_i32, got sk_other"):
        cuda_library.function("sk_other", 0)


def test_a_launch_takes_tensors(recorder):
    class Sub(torch.Tensor):
        pass

    plain, view = torch.zeros(4), torch.zeros(9)[2:]
    parameter, sub = torch.nn.Parameter(plain), torch.zeros(2).as_subclass(Sub)
    for a, b in ((plain, view), (parameter, sub), (None, torch.zeros(0))):
        launch = cuda_library.function("sk_toy_f32", 0)
        launch((1, 1), 32, 0, 0, a, b, 3, 4)
        assert recorder()[5:] == [0 if t is None else t.data_ptr() for t in (a, b)] + [3, 4]


def test_threads_do_not_share_arguments():
    """Where C++ does not collect them."""
    addresses = []
    start = cuda_library.Collected("sk_toy_f32", lambda *args: addresses.append(args[-1]), "PPii")
    start(1, 1, 32, 0, 0, 1, 2, 3, 4)
    mine = start._arguments.address
    thread = threading.Thread(target=lambda: start(1, 1, 32, 0, 0, 5, 6, 7, 8))
    thread.start()
    thread.join()
    assert addresses[0] == mine != addresses[1]


def test_why_there_is_no_route(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_library, "LIBRARY", tmp_path / "_sk_cuda.so")
    hide_cupy(monkeypatch)
    reason = "the CUDA library is not built and CuPy is not installed"
    assert cuda_library.refusal() == reason
    with pytest.raises(RuntimeError, match=f"^sk_toy_f32: {reason}$"):
        cuda_library.function("sk_toy_f32", 0)

    (tmp_path / "_sk_cuda.so").write_text("not a library")
    cuda_library.route.cache_clear()
    assert cuda_library.refusal().startswith("the CUDA library does not load (")
    assert cuda_library.refusal().endswith(") and CuPy is not installed")


def test_without_sources_cupy_does_not_help(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_library, "LIBRARY", tmp_path / "_sk_cuda.so")
    monkeypatch.setattr(cuda_library, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda_library, "SOURCE_FOLDERS", (tmp_path / "nowhere",))
    reason = "the CUDA library is not built and its sources are not installed"
    assert cuda_library.refusal() == reason

    monkeypatch.setattr(cuda_library, "SOURCE_FOLDERS", (SOURCES,))
    hide_cupy(monkeypatch)  # it is found, and does not import
    cuda_library.route.cache_clear()
    assert "is not built and CuPy does not give NVRTC: " in cuda_library.refusal()


def test_the_sources_are_found_in_the_checkout():
    assert SOURCES in cuda_library.SOURCE_FOLDERS and (SOURCES / "launch.cuh").exists()


def test_a_kernel_names_its_file(tmp_path):
    for name in ("spmm.cu", "spmm_gather.cu", "launch.cu", "spmm_gather.cuh"):
        (tmp_path / name).touch()
    assert source_of("sk_spmm_gather_bf16", tmp_path).name == "spmm_gather.cu"
    assert source_of("sk_spmm_tensor_bf16", tmp_path).name == "spmm.cu"
    with pytest.raises(ValueError, match="no CUDA source has sk_sddmm_f32"):
        source_of("sk_sddmm_f32", tmp_path)


@pytest.fixture(scope="module")
def toy_library(tmp_path_factory) -> Path:
    """launch.cu and the toy kernels, built as CMake builds the library."""
    nvcc = shutil.which("nvcc") or pytest.skip("no nvcc")
    path = tmp_path_factory.mktemp("toy") / "_sk_cuda.so"
    flags = ["-std=c++17", "-arch=sm_80", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    sources = [str(SOURCES / "launch.cu"), str(TOY)]
    subprocess.run([nvcc, *flags, f"-I{SOURCES}", *sources, "-o", str(path)], check=True)
    return path


def test_the_table_of_a_built_library(toy_library, monkeypatch):
    route = LibraryRoute(toy_library)
    assert sorted(route.kernels()) == ["sk_toy_f32", "sk_toy_i32"]
    launch = route.launcher("sk_toy_f32", 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(TypeError, match="sk_toy_f32: expected 4 arguments, 'PPii'"):
        launch((1, 1), 32, 0, 0, 1, 2, 3)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"^sk_toy_f32: .+ \(CUDA error \d+\)$"):
            launch((1, 1), 32, 0, 0, 1, 2, 3, 4)


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built")
def test_every_kernel_of_the_library_has_its_file():
    """Else the NVRTC route would not find it."""
    for kernel in LibraryRoute(cuda_library.LIBRARY).kernels():
        assert source_of(kernel, SOURCES).exists()


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built")
def test_no_kernel_spills_registers():
    """Nor indexes them at run time: either puts them in local memory."""
    tool = shutil.which("cuobjdump") or tritons_cuobjdump()
    command = [tool, "--dump-resource-usage", str(cuda_library.LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.findall(r"Function (sk_\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert {name for name, *_ in used} == set(LibraryRoute(cuda_library.LIBRARY).kernels())
    assert not [row for row in used if row[2:] != ("0", "0")]


def tritons_cuobjdump() -> str:
    triton = find_spec("triton")
    folder = Path(triton.origin).parent if triton else Path()
    return shutil.which("cuobjdump", path=folder / "backends/nvidia/bin") or pytest.skip(
        "no cuobjdump"
    )


@pytest.fixture
def toy_folder(tmp_path) -> Path:
    """The toy's sources as NVRTC finds those of the package."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    for path in (TOY, SOURCES / "launch.cuh"):
        shutil.copy(path, folder)
    return folder


def nvrtc_route(folder: Path) -> NvrtcRoute:
    try:
        return NvrtcRoute(folder)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no CuPy with NVRTC: {str(error).strip().partition(chr(10))[0]}")


def test_nvrtc_compiles_every_source(monkeypatch):
    """On no GPU: the second compiler of these files must not rot. To machine code for one GPU: the
    assembler is that of nvcc. For the other, what NVRTC itself may refuse."""
    route = nvrtc_route(SOURCES)
    kernels = [path for path in SOURCES.glob("*.cu") if "__global__" in path.read_text()]
    for source in kernels:
        assert route.cubin(source, arch_of((9, 0))).startswith(b"\x7fELF")
    front_end = (*cuda_library.NVRTC_OPTIONS, "--fdevice-syntax-only")
    monkeypatch.setattr(cuda_library, "NVRTC_OPTIONS", front_end)
    for source in kernels:
        route.cubin(source, "sm_80")


def test_compiled_kernels_are_cached_by_what_they_come_from(toy_folder, tmp_path, monkeypatch):
    route = nvrtc_route(toy_folder)
    source, cache = toy_folder / TOY.name, tmp_path / "cache" / "sparsekern"
    cubin = route.cubin(source, "sm_90")
    assert b"sk_toy_f32" in cubin and b"sk_toy_i32" in cubin
    (cached,) = cache.iterdir()
    assert cached.name.startswith("toy-sm_90-") and cached.read_bytes().endswith(cubin)

    with monkeypatch.context() as patch:
        patch.setattr(NvrtcRoute, "_compile", lambda *_: pytest.fail("compiled again"))
        assert nvrtc_route(toy_folder).cubin(source, "sm_90") == cubin
    (toy_folder / "launch.cuh").open("a").write("// a header changed\n")
    route.cubin(source, "sm_90")
    route.cubin(source, "sm_80")
    assert len(list(cache.iterdir())) == 3


def test_a_source_that_does_not_compile_says_where(toy_folder):
    source = toy_folder / TOY.name
    source.write_text("\nnonsense\n")
    with pytest.raises(RuntimeError, match=r"(?s)^toy.cu: NVRTC .* sm_90: .*toy.cu\(2\): error"):
        nvrtc_route(toy_folder).cubin(source, "sm_90")


def test_a_cache_that_cannot_be_written_is_a_warning(toy_folder, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="CUDA kernels were compiled and not cached: "):
        assert nvrtc_route(toy_folder).cubin(toy_folder / TOY.name, "sm_90")


# With a GPU


@pytest.fixture(params=["nvcc", "nvrtc"])
def gpu_route(request, toy_folder):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if request.param == "nvrtc":
        return nvrtc_route(toy_folder)
    return LibraryRoute(request.getfixturevalue("toy_library"))


def check_toy(launch, n: int = 1000, smem_bytes: int = 1024) -> None:
    device = launch.device
    x, y = torch.randn(n, device=device), torch.full((n + 1,), torch.nan, device=device)
    stream = cuda_library.current_stream(device)
    launch((-(-n // 256), 1), 256, smem_bytes, stream, x.data_ptr(), y.data_ptr(), 3, n)
    want = x + 3 * torch.arange(n, device=device)
    torch.testing.assert_close(y[:n], want, rtol=0, atol=0)
    assert y[n].isnan()


@pytest.mark.gpu
@pytest.mark.sanitize
def test_both_routes_launch(gpu_route):
    launch = gpu_route.launcher("sk_toy_f32", torch.cuda.device_count() - 1)
    check_toy(launch)
    check_toy(launch, smem_bytes=96 * 1024)  # more than every kernel may have
    check_toy(launch)
    thread_error = []

    def in_thread():
        try:
            check_toy(launch)
        except BaseException as error:
            thread_error.append(error)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert not thread_error


@pytest.mark.gpu
def test_launches_are_captured_on_torchs_stream(gpu_route):
    launch = gpu_route.launcher("sk_toy_f32", 0)
    check_toy(launch)
    x, y = torch.randn(256, device=0), torch.empty(256, device=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = cuda_library.current_stream(0)
        assert stream == torch.cuda.current_stream().cuda_stream != 0
        launch((1, 1), 256, 1024, stream, x.data_ptr(), y.data_ptr(), 2, 256)
    x.fill_(1)
    graph.replay()
    torch.testing.assert_close(y, 1 + 2 * torch.arange(256.0, device=0), rtol=0, atol=0)


@pytest.mark.gpu
def test_too_much_shared_memory_is_an_error_and_nothing_more(gpu_route):
    launch = gpu_route.launcher("sk_toy_f32", 0)
    with pytest.raises(RuntimeError, match="^sk_toy_f32: "):
        check_toy(launch, smem_bytes=2**30)
    check_toy(launch)


@pytest.mark.gpu
def test_an_unknown_kernel_is_named(gpu_route):
    with pytest.raises(ValueError, match="kernel: .*sk_toy_f64"):
        gpu_route.launcher("sk_toy_f64", 0)


@pytest.mark.gpu
def test_a_launch_takes_no_longer_than_three_of_torch(gpu_route):
    """The fastest of many, in turn: a ratio, so that it holds on any machine."""
    launch = gpu_route.launcher("sk_toy_f32", 0)
    check_toy(launch)
    x, stream = torch.zeros(256, device=0), cuda_library.current_stream(0)

    def ours():
        launch((1, 1), 256, 1024, stream, x.data_ptr(), x.data_ptr(), 0, 256)

    seconds = interleaved_times({"ours": ours, "torch": lambda: x.add_(0)}, rounds=40)
    assert min(seconds["ours"]) < 3 * min(seconds["torch"])
