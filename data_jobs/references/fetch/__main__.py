"""Reference images into a folder that the embed job reads.

From the ISIC Archive's API, its bucket in AWS Open Data, or a folder. An interrupted fetch, run again with the
same options, goes on. Exit status: 0 all there, 1 some images failed (failures.csv) or the fetch could not go
on, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
import signal
import sys

from data_jobs.references.catalogue import Licence, parse_licences
from data_jobs.references.fetch.eligibility import Eligibility
from data_jobs.references.fetch.http import Http, Pace
from data_jobs.references.fetch.job import Outcome, fetch, summary
from data_jobs.references.fetch.selection import Selection
from data_jobs.references.fetch.sources import (
    ARCHIVE_BASE,
    BUCKET_BASE,
    HOSTS,
    QUERY,
    Archive,
    Bucket,
    Folder,
    Source,
)
from serve_app.domain.errors import DermError, InvalidField


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.source == "folder" and options.folder is None:
        parser.error("--source folder needs --folder, where the images are")
    try:
        outcome = _fetch(options)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run this again with the same options to go on\n")
        return 130
    except (DermError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("\n".join(summary(outcome)) + "\n")
    return 1 if outcome.failures else 0


def _fetch(options: argparse.Namespace) -> Outcome:
    pace = Pace()
    excluded = options.exclude.read_text(encoding="utf-8").split() if options.exclude else []
    eligibility = Eligibility(options.licence, options.unconfirmed, frozenset(excluded))
    selection = Selection(options.count, options.seed, options.minimum, options.several_per_lesion)
    base = options.url or (ARCHIVE_BASE if options.source == "archive" else BUCKET_BASE)
    hosts, most = [*HOSTS, *options.allow_host], int(options.max_gb * 1e9)
    with Http(base, pace, connections=options.threads + 1, hosts=hosts, max_total_bytes=most) as http:
        if options.source == "folder":
            if options.folder.resolve() == options.output.resolve():
                raise InvalidField(f"{options.output} can not be both --folder and --output.")
            source: Source = Folder(options.folder)
        elif options.source == "bucket":
            source = Bucket(http, base=base)
        else:
            source = Archive(http, base=base, query=options.query, collections=options.collections)
        say = partial(print, file=sys.stderr, flush=True)
        return fetch(source, options.output, selection, eligibility, pace, threads=options.threads, say=say)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_jobs.references.fetch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--source", choices=("archive", "bucket", "folder"), required=True)
    add("--output", type=Path, required=True, help="the folder to fill, new or of an earlier fetch")
    add("--count", type=_positive, required=True, metavar="N", help="how many images are wanted")
    licences = "licences to take (default: %(default)s)"
    add("--licence", type=_licences, default="cc-0,cc-by,cc-by-nc", help=licences)
    add("--seed", type=int, default=0, help="another seed chooses other images (default: %(default)s)")
    add("--minimum", type=int, metavar="M", help="of each diagnosis, where there are so many (default: N/40)")
    add("--several-per-lesion", action="store_true", help="take more than one image of a lesion")
    add("--unconfirmed", action="store_true", help="take images whose diagnosis nobody confirmed, too")
    excluded = "isic_ids, lesion_ids or patient_ids to leave out, one a line"
    add("--exclude", type=Path, metavar="FILE", help=excluded)
    add("--threads", type=_positive, default=8, help="images fetched at once (default: %(default)s)")
    add("--folder", type=Path, help="folder: where the images are")
    add("--query", default=QUERY, help="archive: search (default: %(default)s)")
    add("--collections", default="", help="archive: ids of the collections to search, comma-separated")
    add("--url", help="archive, bucket: another base URL, such as a mirror's; it ends in /")
    allowed = f"a further host, with its subdomains, that answers may lead to by HTTPS ({', '.join(HOSTS)})"
    add("--allow-host", action="append", default=[], metavar="HOST", help=allowed)
    most = "the most that one run downloads, listing and failed attempts included (default: %(default)s)"
    add("--max-gb", type=float, default=200.0, metavar="GB", help=most)
    return parser


def _licences(text: str) -> frozenset[Licence]:
    try:
        return parse_licences(text)
    except InvalidField as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


if __name__ == "__main__":
    # What stops a container stops the fetch as Ctrl-C does: it leaves a folder to go on with. Said of both: a shell starts
    # what runs in the background with SIGINT ignored, and Python then leaves it so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
