"""`quire models`: which architectures run, and what of each was compared with Hugging Face."""

import argparse
import json
import sys


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="Rows of architecture, road, verified and features."
    )


def main(args: argparse.Namespace) -> int:
    from quire.models.catalog import rows

    found = rows()
    if args.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    width = max(len(row["architecture"]) for row in found)
    for row in found:
        state = "verified" if row["verified"] else "unverified"
        words = f"{row['architecture']:{width}}  {row['road']:12}  {state}  {', '.join(row['features'])}"
        sys.stdout.write(words.rstrip() + "\n")
    return 0
