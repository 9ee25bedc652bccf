"""Plots of the result files: one figure per question, in a palette that colour-blind readers can tell apart."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

plt.switch_backend("Agg")  # draws without a display
plt.rcParams["font.size"] = 9

Row = dict[str, Any]
# Okabe and Ito's palette; ours are blue, peers are not
STYLE: dict[str, tuple[str, str, str]] = {
    "fisher": ("ours, by Fisher information", "#0072B2", "*"),
    "element": ("ours, at random", "#0072B2", "o"),
    "rows": ("ours, rows", "#56B4E9", "s"),
    "columns": ("ours, columns", "#56B4E9", "D"),
    "block16": ("ours, 16 x 16 blocks", "#56B4E9", "X"),
    "full": ("full fine-tuning", "#000000", ""),
    "authors": ("authors' masked AdamW", "#D55E00", "v"),
    "lora_r8": ("LoRA r8", "#E69F00", "^"),
    "lora_r16": ("LoRA r16", "#E69F00", "P"),
    "shira": ("SHiRA", "#009E73", "<"),
    "supertuning": ("Super-Tuning", "#CC79A7", ">"),
}
WIDTH = {"bert": "BERT-base width", "gpt2": "GPT-2 width", "llama": "Llama, 1B class"}


def step_figure(rows: Sequence[Row]) -> Figure:
    """Draw the time of a step against the density, with its spread, one panel for each model and batch."""
    settings = list(dict.fromkeys((row["architecture"], row["rows"], row["tokens"]) for row in rows))
    figure, panels = _panels(len(settings))
    for axes, (architecture, count, tokens) in zip(panels, settings, strict=True):
        here = [r for r in rows if (r["architecture"], r["rows"], r["tokens"]) == (architecture, count, tokens)]
        axes.axhline(1, color="black", linewidth=1, label=STYLE["full"][0])
        for method in [name for name in STYLE if name != "full"]:
            measured = sorted((row for row in here if row["method"] == method), key=lambda row: row["density"])
            if measured:
                points = [(100 * row["density"], row["to_full"]) for row in measured]
                _line(axes, method, points, dashed=method in ("element", "authors", "lora_r8"))
                axes.vlines(
                    [x for x, _ in points],
                    [row["to_full_low"] for row in measured],
                    [row["to_full_high"] for row in measured],
                    color=STYLE[method][1],
                    linewidth=0.7,
                )
        _density_axis(axes)
        axes.set_ylabel("step time / full fine-tuning's\n(median and quartiles)", fontsize=8)
        axes.set_title(f"{WIDTH[architecture]}, {count} x {tokens} tokens", fontsize=9)
    return _with_legend(figure, panels)


def memory_figure(rows: Sequence[Row]) -> Figure:
    """Draw the peak memory of each method's whole run, and what the imported libraries take of it."""
    figure, axes = plt.subplots(figsize=(7, 0.36 * len(rows) + 0.9), layout="constrained")
    ordered = sorted(rows, key=lambda row: -row["peak_mib"])
    style = STYLE | {"element": ("ours, single weights", "", "")}
    labels = [style[row["method"]][0] + (f", {100 * row['density']:g} %" if row["density"] else "") for row in ordered]
    colours = ["#0072B2" if row["method"] in ("element", "rows", "columns") else "#999999" for row in ordered]
    axes.barh(labels, [row["peak_mib"] for row in ordered], color=colours)
    imports = max(row["imports_mib"] for row in ordered)
    if imports:  # on a GPU they are not counted
        axes.barh(labels, imports, color="white", alpha=0.5)
        axes.annotate("libraries", (imports / 2, labels[-1]), ha="center", va="center", fontsize=8)
    for row, label in zip(ordered, labels, strict=True):
        axes.annotate(
            f"{row['peak_mib']:.0f}", (row["peak_mib"], label), (3, 0), textcoords="offset points", va="center"
        )
    axes.set_xlim(0, 1.1 * ordered[0]["peak_mib"])
    axes.set_xlabel("peak memory of build, select and train, MiB")
    _plain(axes)
    axes.grid(axis="y", visible=False)
    return figure


def file_size_figure(rows: Sequence[Row]) -> Figure:
    """Draw the file's bytes per trained weight against the density, beside the limit for unstructured positions."""
    children = {
        "shira": STYLE["shira"],
        "supertuning": STYLE["supertuning"],
        "magnitude": ("ours, unstructured positions", "#0072B2", "o"),
        "fisher": ("ours, Fisher child", "#56B4E9", "s"),
        "seeded random": ("ours, seeded random child", "#56B4E9", "D"),
    }
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for child, style in children.items():
        points = sorted((100 * row["density"], row["bytes_each"]) for row in rows if row["child"] == child)
        _line(axes, child, points, style=style)
    limits = sorted((100 * row["density"], row["limit"]) for row in rows if row["child"] == "magnitude")
    axes.plot(*zip(*limits, strict=True), color="black", linestyle=":", label="entropy of the positions + 4 bytes")
    axes.set_ylim(bottom=0)
    _density_axis(axes)
    axes.set_ylabel("bytes on disk a trained weight, float32")
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    return figure


def inference_figure(rows: Sequence[Row]) -> Figure:
    """Draw the time of a forward pass of each case, relative to the base's, over the number of tokens."""
    cases: dict[tuple[str, float | None], tuple[str, str, str]] = {
        ("element merged", 0.01): ("ours, merged", "#000000", "*"),
        ("element", 0.01): ("ours, 1 %", "#0072B2", "o"),
        ("element", 0.1): ("ours, 10 %", "#56B4E9", "s"),
        ("lora_r8", None): STYLE["lora_r8"],
        ("shira", 0.01): ("SHiRA, 1 %", *STYLE["shira"][1:]),
        ("supertuning", 0.01): ("Super-Tuning, 1 %", *STYLE["supertuning"][1:]),
    }
    shapes = list(dict.fromkeys((row["rows"], row["tokens"]) for row in rows))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(1, color="black", linewidth=1)
    for (case, density), style in cases.items():
        points = [
            (shapes.index((row["rows"], row["tokens"])), row["to_base"])
            for row in rows
            if (row["case"], row["density"]) == (case, density)
        ]
        _line(axes, case, points, style=style)
    axes.set_xticks(range(len(shapes)), [f"{count} x {tokens}" for count, tokens in shapes])
    axes.set_xlabel("tokens in the batch (rows x length)")
    axes.set_ylabel("forward time / the base's")
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(0.95, axes.get_ylim()[0]))
    ticks = [tick for tick in (0.5, 1, 1.2, 1.6, 2, 3, 5, 8, 12) if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    _plain(axes)
    axes.legend(fontsize=8, frameon=False)
    return figure


FIGURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "step": step_figure,
    "memory": memory_figure,
    "file_size": file_size_figure,
    "inference": inference_figure,
}


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a small PNG: 64 colours are enough for lines, and a third of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def _line(
    axes: Axes,
    name: str,
    points: Sequence[tuple[float, float]],
    *,
    style: tuple[str, str, str] | None = None,
    dashed: bool = False,
) -> None:
    label, colour, marker = style or STYLE[name]
    line = "none" if name in ("columns", "block16", "lora_r16") else "--" if dashed else "-"
    x, y = zip(*points, strict=True)
    axes.plot(x, y, linestyle=line, color=colour, marker=marker, markersize=5, linewidth=1.3, label=label)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(2, count)
    lines = -(-count // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4.4 * columns, 3.0 * lines + 0.7), squeeze=False)
    figure.set_layout_engine("constrained")
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def _with_legend(figure: Figure, panels: Sequence[Axes]) -> Figure:
    labels = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _density_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xlim(0.08, 38)
    ticks = (0.1, 1, 3, 10, 30)
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("density")
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
