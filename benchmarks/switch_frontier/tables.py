"""The results as Markdown, and the part of docs/switch.md that is made of them."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.study import DOCS, RESULTS, Record, commit, read
from sae_kernels.plotting.tables import markdown

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PAGE, PICTURES = DOCS / "switch.md", DOCS / "pictures"
PATTERN = "switch-frontier-*.jsonl"
BEGIN = "<!-- Written by `python -m benchmarks.switch_frontier --page` from here on -->"
END = "<!-- to here; do not edit -->"
TITLES = {
    "width": "Equal width: all experts together have as many latents as TopK",
    "flops": "Equal FLOPs: each expert has as many latents as TopK",
}
SHOWN = {
    "switch-frontier": "FVU on held-out tokens against L0",
    "switch-flops": "FVU of training batches against training FLOPs",
    "switch-seconds": "FVU of training batches against seconds of training",
}
"""Pictures and what is in them, in the order of the page."""
Shape = tuple[str, int, int]
"""Arm, experts and k."""


def by_shape(records: Iterable[Record]) -> dict[Shape, list[Record]]:
    """The runs that differ in their seed alone."""
    found: dict[Shape, list[Record]] = {}
    for record in records:
        found.setdefault((record["arm"], record["n_experts"], record["k"]), []).append(record)
    return found


def experts(records: Iterable[Record], arm: str) -> list[int]:
    """Numbers of experts that the SAEs of an arm have, ascending."""
    return sorted({record["n_experts"] for record in records if record["arm"] == arm})


def lines(records: Iterable[Record], arm: str) -> list[tuple[str, int]]:
    """Arm and experts of what is shown beside each other: TopK, then an arm."""
    return [("base", 1), *((arm, n) for n in experts(records, arm))]


def ks(records: Iterable[Record]) -> list[int]:
    """The k of the runs."""
    return sorted({record["k"] for record in records})


def mean(records: list[Record], name: str) -> float:
    """Over the seeds; NaN of none."""
    return statistics.fmean(r[name] for r in records) if records else float("nan")


def fvu_table(records: list[Record], arm: str) -> str:
    """FVU on held-out tokens by experts and k, and how much above TopK's it is.

    Example:
        >>> base = {"arm": "base", "n_experts": 1, "n_latents": 8, "k": 2, "fvu": 0.1}
        >>> ours = base | {"arm": "width", "n_experts": 4, "fvu": 0.105}
        >>> fvu_table([base, ours], "width").splitlines()[2:]
        ['| TopK | 8 | 0.1000 |', '| 4 experts | 8 | 0.1050 (+5.0 %) |']
    """
    found, columns = by_shape(records), ks(records)
    rows = []
    for one, n in lines(records, arm):
        cells, latents = [], 0
        for k in columns:
            runs, base = found.get((one, n, k), []), found.get(("base", 1, k), [])
            latents = runs[0]["n_latents"] if runs else latents
            value = mean(runs, "fvu")
            more = "" if one == "base" else f" ({100 * (value / mean(base, 'fvu') - 1):+.1f} %)"
            cells.append(f"{value:.4f}{more}" if runs else "")
        rows.append(["TopK" if one == "base" else f"{n} experts", f"{latents:,}", *cells])
    return markdown(["FVU", "F", *(f"k = {k}" for k in columns)], rows)


def cost_table(records: list[Record], k: int) -> str:
    """Costs of a step at one k, and how the experts share the work."""
    found, rows = by_shape(records), []
    for arm, words in {"base": "", "width": "width", "flops": "FLOPs"}.items():
        for n in experts(records, arm):
            if not (runs := found.get((arm, n, k), [])):
                continue
            load, effective = (mean(runs, name) for name in ("largest_load", "effective_experts"))
            rows.append(
                [
                    f"{n} experts, equal {words}" if words else "TopK",
                    f"{runs[0]['n_latents']:,}",
                    f"{mean(runs, 'flops') / runs[0]['steps'] / 1e9:.2f}",
                    f"{mean(runs, 'step_ms'):.1f}",
                    f"{mean(runs, 'seconds'):.1f}",
                    f"{100 * mean(runs, 'dead_fraction'):.1f} %",
                    *((f"{100 * load:.1f} %", f"{effective:.2f}") if words else ("", "")),
                ]
            )
    costs = ("GFLOP a step", "ms a step", "seconds in all")
    shares = ("dead on held-out tokens", "busiest expert", "effective experts")
    return markdown((f"k = {k}", "F", *costs, *shares), rows)


def section(path: Path) -> str:
    """One results file as Markdown."""
    facts, records = read(path)
    first, seeds = records[0], sorted({record["seed"] for record in records})
    blocks = [
        f"{first['steps']} steps of {first['batch_size']:,} tokens, learning rate {first['lr']:g}, "
        f"d_in {first['d_in']}, means over seeds {', '.join(map(str, seeds))}; FVU on held-out "
        f"tokens, in brackets against TopK's. {facts['cpu']}, ISA {facts['isa']}, "
        f"{facts['threads']} threads, torch {facts['torch']}, {commit(facts)}: "
        f"`{facts['command']}`"
    ]
    for arm, title in TITLES.items():
        if experts(records, arm):
            blocks += [f"{title}.", fvu_table(records, arm)]
    blocks.append(cost_table(records, shown_k(records)))
    return "\n\n".join(blocks)


def shown_k(records: list[Record]) -> int:
    """The k of pictures and costs: 32 where it is among the runs, else the largest."""
    found = ks(records)
    return 32 if 32 in found else found[-1]


def generated(results: Path, pictures: Path) -> str:
    """The text between the page's marks."""
    sections = [section(path) for path in sorted(results.glob(PATTERN))]
    shown = [
        f"![{alt}]({pictures.name}/{name}.png)\n\n{alt}; means and ranges over the seeds."
        for name, alt in SHOWN.items()
        if (pictures / f"{name}.png").exists()
    ]
    return "\n\n".join([*shown, *sections] or ["Not measured yet."])


def written(page: str, results: Path = RESULTS, pictures: Path = PICTURES) -> str:
    """The page with what is between its marks renewed.

    Raises:
        ValueError: the page has not both marks, once each and in order.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in head + tail:
        raise ValueError(f"{PAGE.name}: expected {BEGIN!r} and {END!r} after it, once each")
    return f"{head}{BEGIN}\n\n{generated(results, pictures)}\n\n{END}{tail}"
