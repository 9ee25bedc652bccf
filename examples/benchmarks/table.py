"""The README's tables: one for each question, ours beside every peer, the peers that are ahead in bold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
PEERS = {
    "full": "full",
    "authors": "authors' code",
    "lora_r8": "LoRA r8",
    "shira": "SHiRA",
    "supertuning": "Super-Tuning",
    "numpy": "numpy.partition",
}
INDEX_BYTES = {"shira": 8.0, "supertuning": 4.0}  # two int32, one int32 for each trained weight
WIDTHS = {"bert": "BERT-base", "gpt2": "GPT-2", "llama": "Llama 1B"}


@dataclass(frozen=True)
class Line:
    """One line: what is measured, and everybody's value. Less is better."""

    what: str
    ours: float
    peers: dict[str, float]
    digits: int = 2

    def ahead(self) -> list[str]:
        """Return the peers that are better than ours by what is printed."""
        return [
            name for name, value in self.peers.items() if round(value, self.digits) < round(self.ours, self.digits)
        ]

    def markdown(self, peers: Sequence[str]) -> str:
        """Return the line of a table that has a column for each of `peers`."""
        cells = [self._text(self.ours)]
        for name in peers:
            text = self._text(self.peers[name]) if name in self.peers else "–"
            cells.append(f"**{text} ahead**" if name in self.ahead() else text)
        return "| " + " | ".join([self.what, *cells]) + " |"

    def _text(self, value: float) -> str:
        return f"{value:,.{self.digits}f}"


Tables = dict[str, list[Line]]  # by their titles


def find(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """Return the only row with these values, None if there is none."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows have {wanted}; one was expected")
    return found[0] if found else None


def peers_of(
    rows: Sequence[Row], value: str, *, density: float, key: str = "method", **wanted: Any
) -> dict[str, float]:
    """Return a value of every peer, at this density or, for those without one, at none."""
    result = {}
    for name in PEERS:
        row = find(rows, **{key: name}, density=density, **wanted) or find(rows, **{key: name}, density=None, **wanted)
        if row is not None:
            result[name] = row[value]
    return result


KINDS = {
    "fisher": "of the weights, by Fisher information",
    "element": "of the weights, at random",
    "element:torch": "of the weights, at random, without the extension",
    "rows": "of the rows, at random",
    "columns": "of the columns, at random",
}


def step_tables(rows: Sequence[Row]) -> Tables:
    """Return one table for each model and batch."""
    tables: Tables = {}
    settings = dict.fromkeys((row["architecture"], row["rows"], row["tokens"]) for row in rows)
    for position, (architecture, count, tokens) in enumerate(settings):
        here = [r for r in rows if (r["architecture"], r["rows"], r["tokens"]) == (architecture, count, tokens)]
        title = f"Training step, {WIDTHS[architecture]} width, {count} x {tokens} tokens; full fine-tuning = 1"
        lines = tables.setdefault(title, [])
        densities = dict.fromkeys(row["density"] for row in here)
        for density in densities if position == 0 else [d for d in densities if d in (0.1, 0.01)]:
            peers = peers_of(here, "to_full", density=density)
            for method, kind in KINDS.items():
                ours = find(here, method=method, density=density)
                if ours is not None and (method in ("fisher", "element", "element:torch") or position == 0):
                    lines.append(Line(f"{100 * density:g} % {kind}", ours["to_full"], peers))
    return tables


def memory_lines(rows: Sequence[Row]) -> list[Line]:
    lines = []
    for method in ("element", "rows", "columns"):
        for ours in [row for row in rows if row["method"] == method]:
            peers = peers_of(rows, "peak_mib", density=ours["density"])
            what = f"{100 * ours['density']:g} % {KINDS[method]}"
            lines.append(Line(what, ours["peak_mib"], peers, digits=0))
    return lines


def switch_lines(rows: Sequence[Row]) -> list[Line]:
    density = next(row for row in rows if row["method"] == "element")["density"]
    seconds = {name: 1000 * value for name, value in peers_of(rows, "seconds", density=density).items()}
    changed = peers_of(rows, "base_entries_changed", density=density)
    lines = []
    for method in ("element", "element:torch", "rows"):
        ours = find(rows, method=method, density=density)
        if ours is not None:
            lines.append(Line(f"ms, {100 * density:g} % {KINDS[method]}", 1000 * ours["seconds"], seconds, digits=0))
    changes = max(row["base_entries_changed"] for row in rows if row["method"] not in PEERS)
    what = "base weights that are not what they were after the last unmerge"
    return [*lines, Line(what, changes, changed, digits=0)]


def inference_lines(rows: Sequence[Row]) -> list[Line]:
    lines = []
    for shape in dict.fromkeys((row["rows"], row["tokens"]) for row in rows):
        here = [row for row in rows if (row["rows"], row["tokens"]) == shape]
        merged = find(here, case="element merged")
        lora = find(here, case="lora_r8 merged")
        unmerged = find(here, case="element", density=0.01)
        name = f"{shape[0]} x {shape[1]} tokens"
        if merged and lora:
            lines.append(Line(f"merged, {name}", merged["to_base"], {"lora_r8": lora["to_base"]}))
        if unmerged:
            peers = peers_of(here, "to_base", density=0.01, key="case")
            lines.append(Line(f"unmerged, {name}, 1 %", unmerged["to_base"], peers))
    return lines


def file_size_lines(rows: Sequence[Row]) -> list[Line]:
    lines = []
    for density in (0.1, 0.01):
        for child, kind in (("magnitude", "unstructured"), ("fisher", "Fisher child")):
            ours = find(rows, child=child, density=density)
            if ours is not None:
                peers = peers_of(rows, "bytes_each", density=density, key="child")
                what = f"{100 * density:g} %, {kind}"
                lines.append(Line(what, ours["bytes_each"], peers))
    return lines


def index_size_lines(rows: Sequence[Row]) -> list[Line]:
    chosen = [find(rows, shape=rows[0]["shape"], density=density) for density in (0.1, 0.01, 0.001)]
    return [_index_line(row, row["ours"], "random child") for row in chosen if row is not None]


def fisher_index_size_lines(rows: Sequence[Row]) -> list[Line]:
    return [_index_line(row, row["chosen"], "real Fisher child") for row in rows]


def selection_lines(rows: Sequence[Row]) -> list[Line]:
    lines = []
    for row in [row for row in rows if row["method"] == "ours" and row["kind"] == "normal"]:
        peers = {}
        for name, method in (("authors", "numpy.percentile (authors)"), ("numpy", "numpy.partition")):
            peer = find(rows, method=method, kind="normal", density=row["density"])
            if peer is not None:
                peers[name] = peer["to_kthvalue"]
        what = f"{row['scores'] / 1e6:g} M scores, {100 * row['density']:g} %"
        lines.append(Line(what, row["to_kthvalue"], peers))
    return lines


def fisher_lines(rows: Sequence[Row]) -> list[Line]:
    lines = []
    for row in [row for row in rows if row["method"] == "ours"]:
        batch = find(rows, method="batch squared (authors)", architecture=row["architecture"])
        peers, share = {}, ""
        if batch is not None:
            peers = {"authors": batch["to_plain"]}
            share = f" (the authors' finds {batch['share_of_exact_top_10']:.0%} of the exact top 10 %)"
        what = f"{WIDTHS[row['architecture']]} width{share}"
        lines.append(Line(what, row["to_plain"], peers))
    return lines


def _index_line(row: Row, ours: float, child: str) -> Line:
    what = f"{child}, {100 * row['density']:g} % (entropy {row['entropy']:.3f})"
    return Line(what, ours, INDEX_BYTES, digits=3)


def _titled(title: str, lines: Callable[[Sequence[Row]], list[Line]]) -> Callable[[Sequence[Row]], Tables]:
    return lambda rows: {title: lines(rows)}


TABLES: dict[str, Callable[[Sequence[Row]], Tables]] = {
    "step": step_tables,
    "memory": _titled("Peak memory of a whole run, MiB", memory_lines),
    "switch": _titled("Replacing one merged adapter by another", switch_lines),
    "inference": _titled("Time of a forward pass, the base alone = 1", inference_lines),
    "file_size": _titled("Bytes on disk for each trained weight, float32", file_size_lines),
    "index_size": _titled("Bytes of the positions for each trained weight, random children", index_size_lines),
    "fisher_index_size": _titled("The same, children of a real encoder", fisher_index_size_lines),
    "selection": _titled("Time to find the threshold of many scores, torch.kthvalue = 1", selection_lines),
    "fisher": _titled("Time of the Fisher pass, forward + backward = 1", fisher_lines),
}


def table(title: str, lines: Sequence[Line]) -> str:
    """Return the lines of one question as markdown, with a column for every peer that has a number."""
    peers = [name for name in PEERS if any(name in line.peers for line in lines)]
    return "\n".join(
        [
            f"| {title} | ours | " + " | ".join(PEERS[name] for name in peers) + " |",
            "| --- |" + " ---: |" * (1 + len(peers)),
            *(line.markdown(peers) for line in lines),
        ]
    )


def tables(results: dict[str, dict[str, Any]], *, suffix: str = "") -> str:
    """Return the tables of one device, with the machine and versions above them."""
    here = {name: results[name + suffix] for name in TABLES if name + suffix in results}
    parts = {title: lines for name, result in here.items() for title, lines in TABLES[name](result["rows"]).items()}
    everything = [line for lines in parts.values() for line in lines]
    behind = sum(bool(line.ahead()) for line in everything)
    return "\n\n".join(
        [
            machine([result["environment"] for result in here.values()]),
            "Less is better everywhere; – : not measured, or does not apply. "
            f"In {behind} of {len(everything)} lines a peer is **ahead** of ours.",
            *(table(title, lines) for title, lines in parts.items() if lines),
        ]
    )


def machine(environments: Sequence[Row]) -> str:
    """Return where the numbers come from; more than one commit or machine is told."""

    def values(key: str) -> str:
        return ", ".join(str(value) for value in dict.fromkeys(e[key] for e in environments) if value is not None)

    commits = ", ".join(dict.fromkeys(str(e["commit"])[:7] + "+" * bool(e["package_modified"]) for e in environments))
    versions = ", ".join(f"{package} {values(package)}" for package in ("torch", "peft", "transformers"))
    threads = " or ".join(values("threads").split(", "))  # coding is timed on one
    extension = "" if all(e.get("extension") for e in environments) else ", not all with the C extension"
    where = f"{values('gpu') or values('cpu')}, {threads} threads{extension}"
    return f"{where}; {versions}; commit {commits}; {values('date')}; seed {values('seed')}."


def readme_block(results: dict[str, dict[str, Any]]) -> str:
    """Return everything between the README's markers: the tables of each device, and the plots."""
    folder = "examples/benchmarks/results"
    texts = {
        "step": "Step time over density, relative to full fine-tuning",
        "memory": "Peak memory of a whole run",
        "file_size": "Bytes on disk a trained weight, over density",
        "inference": "Forward time of merged and unmerged adapters, relative to the base",
    }
    parts = []
    for suffix in ("", "_cuda"):
        images = {name + suffix: text for name, text in texts.items() if name + suffix in results}
        if images:
            parts.append(tables(results, suffix=suffix))
            parts += [f"![{text}]({folder}/{name}.png)" for name, text in images.items()]
    return "\n\n".join(parts)
