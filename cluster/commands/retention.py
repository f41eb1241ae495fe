"""`derm-cds hold` and `derm-cds retention`: what must not be erased, and erasing what is past its time."""

from __future__ import annotations

import argparse
from contextlib import closing
from datetime import UTC, datetime
from uuid import UUID

from cluster.commands import actions_of
from cluster.commands.access import TIME, instant, patient_id
from cluster.commands.records import ask_as_owner, record
from cluster.key_backups import existing_keystore
from serve_app.audit.events import os_account
from serve_app.domain.errors import Conflict
from serve_app.erasure.eraser import Eraser
from serve_app.erasure.sweeping import erase_expired, read_pause
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import open_key_provider
from serve_app.records.erasures import ErasureStore, Held, HoldStore
from serve_app.records.pool import Pool
from serve_app.records.retention import RetentionStore
from serve_app.settings import NodeFiles, load_settings


def define(name: str, parser: argparse.ArgumentParser) -> None:
    """Define `hold` or `retention`."""
    action = actions_of(parser)
    if name == "hold":
        begin = action("set", _set, "let nobody erase a patient's, a lesion's or one image")
        what = begin.add_mutually_exclusive_group(required=True)
        what.add_argument("--patient", type=patient_id, help="the PMS's id: all images, those to come too")
        what.add_argument("--lesion", type=UUID, help="all images of it, those to come too")
        what.add_argument("--image", type=UUID)
        begin.add_argument("--reason", required=True, help="a case number, no names; up to 200 characters")
        release = action("release", _release, "take a hold out of force")
        release.add_argument("hold", type=UUID, help="its id, as `hold list` says it")
        listed = action("list", _list, "list the holds in force")
        listed.add_argument("--all", action="store_true", help="those that were released, too")
        return
    close = action("close", _close, "close a patient's record: its images' retention begins")
    close.add_argument("patient", type=patient_id, help="the PMS's id of the patient")
    close.add_argument("--at", type=instant, help=f"{TIME} it was closed (default: now)")
    action("reopen", _reopen, "open a closed record again").add_argument("patient")
    action("resume", _resume, "have it go on after a restore that could not carry holds and the like over")
    run = action("run", _run, "erase the images past their retention, but for held ones")
    run.add_argument("--days", type=int, help="days after the record was closed ($DERM_RETENTION_DAYS)")
    sure = run.add_mutually_exclusive_group(required=True)
    sure.add_argument("--dry-run", action="store_true", help="only say how many there are")
    sure.add_argument("--yes", action="store_true", help="erase them: there is no way back")


def _set(arguments: argparse.Namespace) -> None:
    held = Held(patient_id=arguments.patient, lesion_id=arguments.lesion, image_id=arguments.image)
    hold_id = ask_as_owner(
        arguments.home, lambda pool: HoldStore(pool).set(held, reason=arguments.reason, actor=os_account())
    )
    print(f"{hold_id} is in force")


def _release(arguments: argparse.Namespace) -> None:
    ask_as_owner(arguments.home, lambda pool: HoldStore(pool).release(arguments.hold, actor=os_account()))
    print(f"{arguments.hold} is released")


def _list(arguments: argparse.Namespace) -> None:
    holds = ask_as_owner(arguments.home, lambda pool: HoldStore(pool).find(released=arguments.all))
    for hold in holds:
        held = {"patient": hold.patient_id, "lesion": hold.lesion_id, "image": hold.image_id}
        on = next(f"{kind} {value}" for kind, value in held.items() if value is not None)
        since = f"{hold.set_at:%Y-%m-%d} by {hold.set_by}"
        until = f", released {hold.released_at:%Y-%m-%d} by {hold.released_by}" if hold.released_at else ""
        print(f"{hold.hold_id} {on}: {hold.reason} (set {since}{until})")


def _close(arguments: argparse.Namespace) -> None:
    patient, closed_at = arguments.patient, arguments.at or datetime.now(UTC)
    ask_as_owner(
        arguments.home,
        lambda pool: RetentionStore(pool).close(patient, closed_at=closed_at, actor=os_account()),
    )
    print(f"the record of {patient} is closed as of {closed_at.isoformat()}")


def _reopen(arguments: argparse.Namespace) -> None:
    ask_as_owner(
        arguments.home, lambda pool: RetentionStore(pool).reopen(arguments.patient, actor=os_account())
    )
    print(f"the record of {arguments.patient} is open")


def _resume(arguments: argparse.Namespace) -> None:
    paused = NodeFiles(arguments.home).retention_paused
    if (reason := read_pause(paused)) is None:
        raise Conflict("Retention does not wait here.")
    record(arguments.home, "retention_resume", {"paused": reason})
    paused.unlink()
    print(f"retention goes on; it had waited {reason}")


def _run(arguments: argparse.Namespace) -> None:
    settings = load_settings()
    days = settings.retention_days if arguments.days is None else arguments.days
    if days is None:
        raise Conflict("Nothing expires: set DERM_RETENTION_DAYS, or give --days.")
    if days < 0:
        raise Conflict("--days: 0 or more.")
    counted = ask_as_owner(arguments.home, lambda pool: RetentionStore(pool).count(days=days))
    print(
        f"{counted.closed} closed records; {counted.expired} images are more than {days} days past, "
        f"{counted.held} of them under a legal hold"
    )
    if arguments.dry_run:
        return
    if reason := read_pause(settings.files.retention_paused):
        raise Conflict(f"Nothing is erased by its age {reason}: `derm-cds retention resume` first.")
    with closing(KeyStore(existing_keystore(settings.home), open_key_provider(settings))) as keys:

        async def erase(pool: Pool) -> int:
            eraser = Eraser(
                ErasureStore(pool), keys, tells_pms=settings.pms_deliver, tells_fhir=settings.pms_fhir
            )
            erased = await erase_expired(RetentionStore(pool), eraser, days=days, actor=os_account())
            await eraser.finish_accepted(older_than_s=0)
            return erased

        print(f"{ask_as_owner(arguments.home, erase)} images erased")
