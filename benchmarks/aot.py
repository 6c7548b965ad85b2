"""Compiles Triton kernels for GPUs that are not there and reads what came out.

The real launchers run on CPU tensors: Triton's driver is replaced by one that only names an
architecture, and every launch stops after its compilation. So what is checked is what a user's call
compiles, with the specialisation (alignment, divisibility) and the tile of that architecture.
Values in the outputs mean nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes per block
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for one architecture."""

    name: str
    constants: dict[str, Any]  # its constexpr arguments
    warps: int
    stages: int
    registers: int  # per thread
    spill_bytes: int  # stored and loaded per thread because registers ran out
    shared_bytes: int  # per block
    instructions: Counter[str]  # how often each occurs, with its modifiers

    def has(self, instruction: str) -> bool:
        """Whether an instruction whose name starts like this occurs (``LDG.E.128``)."""
        return any(name.startswith(instruction) for name in self.instructions)


def _only_a_target(architecture: int) -> SimpleNamespace:
    """As much of a Triton driver as compiling takes."""
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_current_device=lambda: architecture,  # Triton's caches are per device
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )


@contextlib.contextmanager
def compiled_for(architecture: int) -> Iterator[list[Compiled]]:
    """Inside the block every launch on CPU tensors compiles for ``architecture`` and is listed."""
    found: list[Compiled] = []

    def note(kernel: Any) -> None:
        compiled = _read(kernel, architecture)
        if compiled not in found:
            found.append(compiled)

    with only_compiling(architecture, note):
        yield found


@contextlib.contextmanager
def only_compiling(architecture: int, note: Callable[[Any], None]) -> Iterator[None]:
    """Inside the block launches on CPU tensors end after their compilation, which is noted."""
    launch, before = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        note(kernel)
        return kernel

    driver.set_active(_only_a_target(architecture))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = launch
        driver._active = before


def _read(kernel: Any, architecture: int) -> Compiled:
    meta, cubin, names = kernel.metadata, kernel.asm["cubin"], kernel.src.fn.arg_names
    paths = {names[path[0]]: v for path, v in kernel.src.constants.items() if len(path) == 1}
    usage = _tool("cuobjdump", "--dump-resource-usage", suffix="cubin", content=cubin)
    code = _tool("cuobjdump", "-sass", suffix="cubin", content=cubin)
    ptxas = _ptxas(kernel.asm["ptx"], architecture)
    return Compiled(
        meta.name,
        {name: value for name, value in paths.items() if name.isupper()},
        meta.num_warps,
        meta.num_stages,
        int(re.findall(r"REG:(\d+)", usage)[-1]),
        sum(map(int, re.findall(r"(\d+) bytes spill", ptxas))),
        meta.shared,
        Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)", code)),
    )


def _tool(name: str, *arguments: str, suffix: str, content: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"kernel.{suffix}"
        path.write_bytes(content)
        command = [str(_TOOLS / name), *arguments, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _ptxas(ptx: str, architecture: int) -> str:
    # Triton brings two assemblers, and which knows a kernel's PTX changes with its version.
    programs = ["ptxas", "ptxas-blackwell"][:: -1 if architecture >= 100 else 1]
    # The architecture-specific features (wgmma, tcgen05) that Triton compiles with.
    name = f"sm_{architecture}" + ("a" if architecture >= 90 else "")
    arguments = ("-v", f"--gpu-name={name}")
    for program in programs:
        try:
            return _tool(program, *arguments, suffix="ptx", content=ptx.encode())
        except RuntimeError as error:
            if "Unsupported .version" not in str(error):
                raise
    raise RuntimeError(f"none of {', '.join(programs)} knows this PTX version")
