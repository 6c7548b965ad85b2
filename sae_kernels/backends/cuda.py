"""Backend cuda: the CUDA C++ kernels, compiled ahead of time by nvcc or at first use by NVRTC.

Builds with nvcc have them in ``sae_kernels._C``; elsewhere CuPy compiles the same sources with
NVRTC at first use. A launch is the same on both: a kernel's name, grid, block, bytes of shared
memory, and the arguments as 64-bit words, which every kernel parameter is.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels import gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# int32: primitives of indices alone.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32)
_DEFAULT_SHARED_BYTES = 48 << 10  # per block, unless a kernel opts in to more
_PACKAGE = Path(__file__).parent.parent


class Route(NamedTuple):
    """A way to launch the kernels: compiled ahead of time or at run time.

    Attributes:
        name: for messages.
        launch: called with a kernel's name, device index, grid, block, bytes of shared memory and
            the arguments.
    """

    name: str
    launch: Callable[[str, int, int, int, int, Sequence[int]], None]


def reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the CUDA C++ kernels cannot run a call, or None."""
    if device.type != "cuda":
        return f"tensors are on {device}, its kernels run on NVIDIA GPUs"
    if dtype not in _DTYPES:
        return f"no kernel for {dtype}, only for float32, bfloat16 and float16"
    old = gpu.cuda_reason(device)
    if old is not None:
        return old
    found = _route(device)
    return found if isinstance(found, str) else None


def launch(
    kernel: str, grid: int, block: int, shared: int, *arguments: torch.Tensor | int | None
) -> None:
    """Launches a kernel on torch's current stream; None stands for a null pointer."""
    words = [a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments]
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    found = _route(device)
    if isinstance(found, str):
        raise RuntimeError(f"{kernel} cannot run: {found}")
    found.launch(kernel, device.index, grid, block, shared, words)


def route(device: torch.device | None = None) -> str:
    """The name of the route in use, or the reason why there is none.

    Without a device it is about this installation alone.
    """
    found = _route(device)
    return found if isinstance(found, str) else found.name


@functools.cache
def _route(device: torch.device | None) -> Route | str:
    ahead = _ahead_of_time(device)
    if isinstance(ahead, Route):
        return ahead
    at_run_time = _at_run_time()
    return at_run_time if isinstance(at_run_time, Route) else f"{ahead}; {at_run_time}"


def _ahead_of_time(device: torch.device | None) -> Route | str:
    try:
        from sae_kernels import _C
    except ImportError as error:
        return f"sae_kernels._C cannot be loaded ({error}); build it by `pip install .`"
    if not hasattr(_C, "cuda_launch"):
        return "sae_kernels._C was built without nvcc: build it again with nvcc in the PATH"
    if device is not None:
        wrong = _C.cuda_reason(device.index or 0)
        if wrong is not None:
            return wrong

    def launch(
        kernel: str, device: int, grid: int, block: int, shared: int, words: Sequence[int]
    ) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        _C.cuda_launch(kernel, device, grid, block, shared, stream, words)

    return Route(f"ahead of time ({_C.build_info()['cuda_archs']})", launch)


def _at_run_time() -> Route | str:
    wanted = "`pip install cupy-cuda13x` (cupy-cuda12x where torch.version.cuda is 12)"
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy, which compiles them at first use, is not installed: {wanted}"
    try:
        import cupy

        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        return f"CuPy cannot compile them ({str(error).splitlines()[0]}): it needs CUDA's NVRTC"
    if not hasattr(cupy.cuda.Stream, "from_external"):
        return f"CuPy {cupy.__version__} is older than 14: {wanted}"
    if sources() is None:
        return "CuPy is there but not the kernels' sources: install sae_kernels again"
    return Route(f"NVRTC by CuPy {cupy.__version__}", _launch_by_cupy)


def _launch_by_cupy(
    kernel: str, device: int, grid: int, block: int, shared: int, words: Sequence[int]
) -> None:
    import cupy

    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(device))
    with cupy.cuda.Device(device), stream:
        function = _compiled_by_cupy(device).get_function(kernel)
        if shared > _DEFAULT_SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = shared
        function((grid,), (block,), tuple(words), shared_mem=shared)


@functools.cache
def _compiled_by_cupy(device: int) -> Any:
    import cupy

    folder = sources()
    assert folder is not None
    return cupy.RawModule(code=translation_unit(folder), options=("-std=c++17", f"-I{folder}"))


def translation_unit(folder: Path) -> str:
    """One source text that includes all kernels, for NVRTC."""
    # CuPy caches by this text; the digest makes it change with the included files.
    files = sorted(folder.iterdir())
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
    includes = [f'#include "{path.name}"' for path in files if path.suffix == ".cu"]
    return "\n".join([f"// {digest}", *includes])


def sources() -> Path | None:
    """The folder of the kernels' sources, in an installed package or in the repository, or None."""
    folders = (_PACKAGE / "cuda_sources", _PACKAGE.parent / "csrc" / "cuda")
    return next((folder for folder in folders if folder.is_dir()), None)
