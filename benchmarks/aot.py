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
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from collections.abc import Iterator

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes per block
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for one architecture.

    Attributes:
        name: of the kernel function.
        architecture: 80, 90 or 100.
        constants: its constexpr arguments.
        warps, stages: of the launch.
        registers: per thread.
        spill_bytes: stored and loaded per thread because registers ran out.
        shared_bytes: per block.
        instructions: how often each machine instruction occurs, with its modifiers.
    """

    name: str
    architecture: int
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: Counter[str]

    def has(self, instruction: str) -> bool:
        """Whether an instruction whose name starts like this occurs (``LDG.E.128``)."""
        return self.count(instruction) > 0

    def count(self, instruction: str) -> int:
        """Number of instructions that start like this."""
        return sum(n for name, n in self.instructions.items() if name.startswith(instruction))


class _OnlyATarget:
    """As much of a Triton driver as compiling takes."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton's caches are per device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiled_for(architecture: int) -> Iterator[list[Compiled]]:
    """Inside the block every launch on CPU tensors compiles for ``architecture`` and is listed."""
    found: list[Compiled] = []
    launch, before = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled = _read(kernel, architecture)
        if compiled not in found:
            found.append(compiled)
        return kernel

    driver.set_active(_OnlyATarget(architecture))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = launch
        driver._active = before


def _read(kernel: Any, architecture: int) -> Compiled:
    meta = kernel.metadata
    usage = _resources(kernel.asm["cubin"])
    source = kernel.src
    names = source.fn.arg_names
    constants = {
        names[path[0]]: value
        for path, value in source.constants.items()
        if len(path) == 1 and names[path[0]].isupper()
    }
    ptxas = _ptxas(kernel.asm["ptx"], architecture)
    return Compiled(
        meta.name,
        architecture,
        constants,
        meta.num_warps,
        meta.num_stages,
        usage["REG"],
        sum(map(int, re.findall(r"(\d+) bytes spill", ptxas))),
        meta.shared,
        _instructions(kernel.asm["cubin"]),
    )


def _tool(name: str, *arguments: str, suffix: str, content: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"kernel.{suffix}"
        path.write_bytes(content)
        done = subprocess.run(
            [str(_TOOLS / name), *arguments, str(path)],
            capture_output=True,
            text=True,
            cwd=folder,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _ptxas(ptx: str, architecture: int) -> str:
    # Triton brings two assemblers, and which knows a kernel's PTX changes with its version.
    programs = ["ptxas", "ptxas-blackwell"]
    # The architecture-specific features (wgmma, tcgen05) that Triton compiles with.
    name = f"sm_{architecture}" + ("a" if architecture >= 90 else "")
    arguments = ("-v", f"--gpu-name={name}")
    for program in reversed(programs) if architecture >= 100 else programs:
        try:
            return _tool(program, *arguments, suffix="ptx", content=ptx.encode())
        except RuntimeError as error:
            if "Unsupported .version" not in str(error):
                raise
    raise RuntimeError(f"none of {', '.join(programs)} knows this PTX version")


def _resources(cubin: bytes) -> dict[str, int]:
    text = _tool("cuobjdump", "--dump-resource-usage", suffix="cubin", content=cubin)
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}


def _instructions(cubin: bytes) -> Counter[str]:
    text = _tool("cuobjdump", "-sass", suffix="cubin", content=cubin)
    return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)", text))
