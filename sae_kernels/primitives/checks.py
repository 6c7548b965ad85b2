"""Argument checks shared by the primitives: what was expected, what came, what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_BLOCKS = 64
OPERAND_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operand dtype's sums, values and biases are held."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_operand(dtype: torch.dtype) -> torch.dtype:
    """The dtype to which gradients are rounded as operands of products: never fp16.

    They are divided by the batch's whole variance and would vanish in it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def shape(
    name: str,
    tensor: torch.Tensor | None,
    expected: Sequence[int | str | torch.SymInt],
    meaning: str,
) -> None:
    """Raises ValueError unless the tensor has the shape; a string stands for any size."""
    if tensor is None or tensor.shape == tuple(expected):
        return
    fits = tensor.dim() == len(expected)
    if fits:  # no generator: this runs for every tensor of every call
        for size, wanted in zip(tensor.shape, expected, strict=True):
            if not (isinstance(wanted, str) or size == wanted):
                fits = False
    if not fits:
        text = ", ".join(str(e) for e in expected)
        raise ValueError(f"{name}: expected shape [{text}] ({meaning}), got {list(tensor.shape)}")


def dtype(name: str, tensor: torch.Tensor | None, allowed: Sequence[torch.dtype]) -> None:
    """Raises TypeError unless the tensor has one of the dtypes."""
    if tensor is not None and tensor.dtype not in allowed:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        came = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected {wanted}, got {came}; convert it with .to()")


def same_device(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless all tensors are on one device."""
    first = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            break
    else:
        return
    present = {name: t.device for name, t in tensors.items() if t is not None}
    where = ", ".join(f"{name} on {device}" for name, device in present.items())
    raise ValueError(f"expected all tensors on one device, got {where}; move them with .to()")


def indices(name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError unless the tensor holds int32 indices."""
    dtype(name, tensor, (torch.int32,))


def as_wide_as(x: torch.Tensor, W: torch.Tensor, name: str) -> None:
    """Raises ValueError unless x is [..., D] and W, of this name, [F, D]."""
    if x.dim() < 1 or x.shape[-1] != W.shape[1]:
        raise ValueError(
            f"x: expected shape [..., {W.shape[1]}] (as wide as {name}), got {list(x.shape)}"
        )


def encoder(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, **per_latent: torch.Tensor | None
) -> None:
    """Raises for tokens, weights and vectors [F] that do not fit together as an encoder."""
    shape("x", x, ["B", "D"], "tokens by d_in")
    shape("W", W, ["F", x.shape[1]], "latents first, as wide as x")
    dtype("x", x, OPERAND_DTYPES)
    dtype("W", W, (x.dtype,))
    for name, vector in {"b": b, **per_latent}.items():
        shape(name, vector, [W.shape[0]], "one per latent")
        dtype(name, vector, (accumulator(x.dtype),))
    same_device(x=x, W=W, b=b, **per_latent)
    if x.shape[1] == 0:
        raise ValueError(f"x: expected at least one input (D >= 1), got shape {list(x.shape)}")


def narrow_shape(n_latents: int, width: int) -> list[int]:
    """The shape of rows in 8 bits: D numbers, zeros up to whole 32, four fp32 numbers."""
    return [n_latents, -(-width // 32) * 32 + 16]


def narrow(rows: torch.Tensor | None, W: torch.Tensor) -> None:
    """Raises unless the rows can be an encoder's in 8 bits."""
    if rows is not None:
        shape("narrow", rows, narrow_shape(*W.shape), "narrowed(W)")
        dtype("narrow", rows, (torch.int8,))
        same_device(W=W, narrow=rows)


def count(name: str, value: int, least: int = 0) -> None:
    """Raises ValueError unless a value is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def latents(given: Sequence[int] | torch.Tensor, n_latents: int) -> torch.Tensor:
    """Checks a list of latents from 0 to n_latents - 1; returns it as int64 [n].

    Raises:
        TypeError: not a list of integers.
        ValueError: an index outside [0, n_latents).
    """
    chosen = torch.as_tensor(given)
    chosen = chosen.long() if chosen.numel() == 0 else chosen
    if chosen.dim() != 1 or chosen.dtype in (torch.bool, *OPERAND_DTYPES):
        raise TypeError(
            f"latents: expected a list of whole numbers, got {chosen.dtype} of shape "
            f"{list(chosen.shape)}; of a mask give mask.nonzero().flatten()"
        )
    wrong = chosen[(chosen < 0) | (chosen >= n_latents)]
    if wrong.numel():
        raise ValueError(
            f"latents: expected numbers from 0 to {n_latents - 1} (n_latents - 1), got "
            f"{int(wrong[0])}"
        )
    return chosen.long()


def latents_in_range(
    indices: torch.Tensor, n_latents: int, name: str = "codes", lowest: int = 0
) -> None:
    """Raises IndexError that names the first index outside [lowest, n_latents)."""
    wrong = indices[(indices < lowest) | (indices >= n_latents)]
    if wrong.numel():
        raise IndexError(
            f"{name}: expected latent indices in [{lowest}, {n_latents}), "
            f"got {int(wrong.flatten()[0])}"
        )


def blocks(n: int, n_latents: int) -> None:
    """Raises ValueError unless so many equal blocks of latents can be summed up."""
    if not 1 <= n <= _MOST_BLOCKS or n_latents % n:
        raise ValueError(
            f"blocks: expected 1 to {_MOST_BLOCKS}, a divisor of n_latents = {n_latents}, got {n}"
        )


def groups_split_latents(group_ends: torch.Tensor | None, n_latents: int) -> None:
    """Raises ValueError unless the ends ascend from 0 to n_latents."""
    if group_ends is None:
        return
    ends = group_ends.tolist()
    if not ends or ends[0] < 0 or ends[-1] != n_latents or ends != sorted(ends):
        raise ValueError(
            f"group_ends: expected ascending latent numbers, the last being {n_latents}, got {ends}"
        )


def offsets_split_entries(
    offsets: torch.Tensor | None, n_entries: int, name: str = "offsets"
) -> None:
    """Raises ValueError unless the offsets of ragged codes ascend from 0 to at most n_entries."""
    if offsets is None:
        return
    first, last = int(offsets[0]), int(offsets[-1])
    falling = (offsets[1:] < offsets[:-1]).nonzero()
    if first != 0 or last > n_entries or falling.numel():
        where = f", falling at token {int(falling[0])}" if falling.numel() else ""
        raise ValueError(
            f"{name}: expected ascending numbers from 0 to at most the {n_entries} entries, got "
            f"{first} to {last}{where}"
        )


def routes(tokens: torch.Tensor, starts: torch.Tensor) -> None:
    """Raises ValueError unless every token is listed once and the starts split the list."""
    n = tokens.shape[0]
    offsets_split_entries(starts, n, "starts")
    seen = torch.zeros(n, dtype=torch.bool, device=tokens.device)
    seen[tokens[(tokens >= 0) & (tokens < n)].long()] = True
    if int(starts[-1]) != n or not bool(seen.all()):
        raise ValueError(
            f"tokens: expected each of the {n} tokens once, and starts that end with {n}; got "
            f"{int(seen.sum())} different ones and an end of {int(starts[-1])}"
        )


def codes(
    values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor, offsets: torch.Tensor | None
) -> None:
    """Raises for codes and a decoder that do not belong together."""
    shape("W_dec", W, ["F", "D"], "latents first")
    shape("indices", indices, list(values.shape), "one latent per value")
    entries("values", values, offsets)
    dtype("W_dec", W, OPERAND_DTYPES)
    dtype("values", values, (accumulator(W.dtype),))
    dtype("indices", indices, (torch.int32,))
    same_device(values=values, indices=indices, W_dec=W, offsets=offsets)


def entries(name: str, tensor: torch.Tensor, offsets: torch.Tensor | None) -> None:
    """Raises for entries of codes that are neither [B, K] nor [N] with offsets."""
    if offsets is None:
        shape(name, tensor, ["B", "K"], "tokens by kept entries")
        return
    shape(name, tensor, ["N"], "the entries of all tokens, with offsets")
    shape("offsets", offsets, ["B + 1"], "where each token's entries start")
    indices("offsets", offsets)
    if offsets.shape[0] == 0:
        raise ValueError("offsets: expected shape [B + 1], got [0]; no token still has one offset")


def group_ends(ends: torch.Tensor | None) -> None:
    """Raises for group ends that are not a vector of int32."""
    if ends is not None:
        shape("group_ends", ends, ["G"], "the latent at which each group ends")
        indices("group_ends", ends)


def n_tokens(entries: torch.Tensor, offsets: torch.Tensor | None) -> int:
    """Number of tokens of codes: B of [B, K] entries, or of ragged ones with offsets [B + 1]."""
    return entries.shape[0] if offsets is None else offsets.shape[0] - 1
