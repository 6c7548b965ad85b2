"""Which backend and which ISA variant runs, who decides, and what a refusal says."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels import backends, decode, encode_topk, gpu, use_backend
from sae_kernels.backends import cpu, gluon
from sae_kernels.errors import BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)


def chosen(argument: str | None = None) -> str:
    """The backend that would run select_topk."""
    module = backends.implementation("select_topk", CPU, torch.float32, argument)
    return module.__name__.rsplit(".", 1)[1]


def test_precedence_is_argument_context_environment_automatic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen() == "cpu"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert chosen() == "reference"
    with use_backend("cpu"):
        assert chosen() == "cpu"
        assert chosen("reference") == "reference"
        with use_backend("reference"):
            assert chosen() == "reference"
        assert chosen() == "cpu"
    assert chosen() == "reference"


def test_the_context_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert chosen() == "cpu"


def test_the_choice_reaches_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    # A wrong ISA makes any use of the host kernels an error, so a pass without one never met them.
    monkeypatch.setenv(cpu.ISA_VARIABLE, "none")
    W, W_dec = torch.randn(2, 9, 4).unbind()
    x = torch.randn(3, 4, requires_grad=True)
    leaves = (x, W.requires_grad_(), W_dec.requires_grad_())
    codes = encode_topk(*leaves[:2], None, 2, backend="reference")
    out = decode(codes, W_dec, backend="reference")
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(bool(grad.any()) for grad in grads)
    codes = encode_topk(*leaves[:2], None, 2, backend="reference")
    with pytest.raises(ValueError, match=cpu.ISA_VARIABLE):
        decode(codes, W_dec)


@pytest.mark.parametrize("name", ["cdua", "CPU", "refrence", "select_topk", "cpu,trition", "cpu,"])
def test_an_unknown_name_is_refused_with_its_origin(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ", ".join(backends.NAMES)
    with pytest.raises(ValueError, match=rf"backend argument: expected .*{names} .*, got '{name}'"):
        chosen(name)
    with pytest.raises(ValueError, match=rf"use_backend\(\): expected .*, got '{name}'"):
        use_backend(name).__enter__()
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, name)
    with pytest.raises(ValueError, match=rf"{backends.ENVIRONMENT_VARIABLE}: .* got '{name}'"):
        encode_topk(torch.eye(2), torch.eye(2), None, 1)


def test_an_explicit_choice_never_falls_back() -> None:
    gpu = torch.device("cuda:0")
    automatic = backends.implementation("select_topk", gpu, torch.float32, None)
    assert automatic.__name__.endswith(".reference")
    with pytest.raises(BackendUnavailableError) as error:
        backends.implementation("select_topk", gpu, torch.float32, "cpu")
    message = str(error.value)
    start = "select_topk on cuda:0 in torch.float32 cannot run on cpu (the backend argument); "
    assert message.startswith(start)
    assert "cpu: tensors are on cuda:0, its kernels run on the CPU" in message
    assert "reference: available" in message
    assert isinstance(error.value, NotImplementedError)


def test_a_choice_of_several_takes_the_first_that_can() -> None:
    assert chosen("triton, cpu") == "cpu"
    assert chosen("reference,cpu") == "reference"
    with pytest.raises(BackendUnavailableError, match="cannot run on triton,gluon"):
        chosen("triton,gluon")


@pytest.mark.parametrize(
    ("primitive", "order"),
    [
        ("select_topk", ["cpu", "triton", "cuda", "gluon", "reference"]),
        ("transpose_codes", ["cuda", "cpu", "triton", "gluon", "reference"]),
        ("decode", ["cpu", "triton", "cuda", "gluon", "reference"]),
    ],
)
def test_the_automatic_choice_takes_the_first_in_order_that_can(
    primitive: str, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the first of two of these orders is written in it")
    found = backends.candidates(primitive, CPU, torch.bfloat16)
    assert [candidate.backend for candidate in found] == order
    for module in backends._BACKENDS.values():
        monkeypatch.setattr(module, "reason", lambda *_: None)
    gpus = [name for name in order if name != "cpu"]
    monkeypatch.setattr(backends._BACKENDS["cpu"], "reason", lambda *_: "it is a GPU")
    first = next(name for name in gpus if backends._written(primitive, name))
    ran = backends.implementation(primitive, CPU, torch.bfloat16, None)
    assert ran.__name__.endswith(f"{primitive}.{first}")


def test_every_candidate_has_a_reason_or_none() -> None:
    reasons = dict(backends.candidates("decode", CPU, torch.bfloat16))
    assert (reasons.pop("cpu"), reasons.pop("reference")) == (None, None)
    assert all(reasons.values())
    assert "in Triton's interpreter: TRITON_INTERPRET=1" in str(reasons["triton"])
    reasons = dict(backends.candidates("decode", torch.device("cuda:1"), torch.float32))
    assert reasons["cpu"] == "tensors are on cuda:1, its kernels run on the CPU"
    reasons = dict(backends.candidates("decode", CPU, torch.float8_e4m3fn))
    assert reasons["cpu"] is not None
    assert reasons["cpu"].startswith("no kernel for torch.float8_e4m3fn")


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A GPU as torch would describe it, for what is said about GPUs that no test machine has."""
    facts: dict[str, Any] = {"capability": (9, 0), "triton": (3, 6)}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: facts["capability"])
    monkeypatch.setattr(gpu, "triton_version", lambda: facts["triton"])
    gpu.cuda_reason.cache_clear()
    yield facts
    gpu.cuda_reason.cache_clear()


@pytest.mark.parametrize(
    ("fact", "value", "asked", "said"),
    [
        (
            "capability",
            (7, 5),
            "triton",
            "Some GPU has compute capability 7.5; the kernels need 8.",
        ),
        ("capability", (7, 5), "cuda", "Some GPU has compute capability 7.5; the kernels need 8."),
        ("capability", (8, 0), "gluon", "Some GPU is no Hopper GPU"),
        ("triton", None, "triton", "Triton is not installed: `pip install triton`"),
        ("triton", (3, 5), "triton", "Triton 3.5 is older than 3.6: install a newer"),
        (
            "triton",
            (3, 7),
            "gluon",
            "Gluon differs between versions .*: checked with 3.6, found 3.7",
        ),
    ],
)
def test_what_a_gpu_or_its_triton_lacks_is_named(
    fact: str, value: Any, asked: str, said: str, pretended_gpu: dict[str, Any]
) -> None:
    pretended_gpu[fact] = value
    where = torch.device("cuda", 0)
    reason = dict(backends.candidates("select_topk", where, torch.bfloat16))[asked]
    assert reason is not None
    assert re.match(said, reason), reason


def test_a_gpu_that_lacks_nothing_runs_the_triton_and_gluon_kernels(
    pretended_gpu: dict[str, Any],
) -> None:
    where = torch.device("cuda", 0)
    reasons = dict(backends.candidates("select_topk", where, torch.bfloat16))
    assert (reasons["triton"], reasons["gluon"]) == (None, None)
    assert gluon.reason(where, torch.float32) is not None


def test_out_of_memory_names_the_primitive_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    module = backends.implementation("select_topk", CPU, torch.float32, "cpu")
    monkeypatch.setattr(module, "run", full)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"select_topk: cpu is out of memory; take fewer .*9 GiB"
    ):
        encode_topk(torch.eye(2), torch.eye(2), None, 1)


def test_the_fastest_variant_runs_unless_a_lower_one_is_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cpu.isa() == cpu.supported_isas()[0]
    assert cpu.supported_isas()[-1] == "portable"
    for isa in cpu.supported_isas():
        monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
        assert cpu.isa() == isa
    monkeypatch.setenv(cpu.ISA_VARIABLE, "")
    assert cpu.isa() == cpu.supported_isas()[0]


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "scalar"])
def test_an_unknown_variant_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ISA_VARIABLE, name)
    expected = rf"{cpu.ISA_VARIABLE}: expected one of .*portable on this machine, got '{name}'"
    with pytest.raises(ValueError, match=expected):
        encode_topk(torch.eye(2), torch.eye(2), None, 1)


def test_the_module_itself_refuses_an_unknown_variant() -> None:
    with pytest.raises(ValueError, match="no kernels for the ISA 'avx1024'"):
        cpu.module().select_topk_workspace("avx1024")


BLOCKED = """
import sys
sys.modules["sae_kernels._C"] = None
import torch, sae_kernels
codes = sae_kernels.encode_topk(torch.eye(3), torch.eye(3), None, 1)
assert codes.indices.tolist() == [[0], [1], [2]]
try:
    sae_kernels.encode_topk(torch.eye(3), torch.eye(3), None, 1, backend="cpu")
except sae_kernels.errors.BackendUnavailableError as error:
    assert "cpu: the compiled module sae_kernels._C cannot be loaded" in str(error), error
    assert "pip install ." in str(error), error
else:
    raise SystemExit("ran on a backend that is not there")
"""


def test_the_package_works_without_the_compiled_module() -> None:
    subprocess.run([sys.executable, "-c", BLOCKED], check=True, timeout=120)
