"""`derm-cds reports`: print what is published, as JSON or as tables for a document, and have the PMS told of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
import json
from typing import Any

from cluster.commands import actions_of
from cluster.commands.records import ask, record
from serve_app.domain.errors import InvalidSetting
from serve_app.pms.client import PmsClient
from serve_app.records.pool import Pool
from serve_app.records.reports import ReportKind, ReportStore, Snapshot
from serve_app.reports.publication import Reports
from serve_app.settings import Settings, load_settings


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `reports`."""
    action = actions_of(parser)
    show = action("show", _show, "print a report of a month that is over")
    show.add_argument("kind", choices=[ReportKind.SUMMARY.value, ReportKind.PERFORMANCE.value])
    show.add_argument("--period", metavar="YYYY-MM", help="which month (default: the last one)")
    show.add_argument("--markdown", action="store_true", help="tables, for a document")
    action("push", _push, "have the PMS told at once of the last month's reports")


def _show(arguments: argparse.Namespace) -> None:
    settings, kind, period = load_settings(), ReportKind(arguments.kind), arguments.period

    async def find(pool: Pool) -> Snapshot:
        client = _client(settings)
        try:
            return await Reports(store=ReportStore(pool), client=client).report(kind, period)
        finally:
            if client is not None:
                await client.close()

    report = ask(arguments.home, find)
    detail: dict[str, object] = {"report": kind, "period": report.period, "report_id": str(report.report_id)}
    record(arguments.home, "view_statistics", detail)
    answer = report.answer()
    print("\n".join(markdown(answer)) if arguments.markdown else json.dumps(answer, indent=2))


def _push(arguments: argparse.Namespace) -> None:
    settings = load_settings()
    if not settings.pms_reports:
        raise InvalidSetting("Reports are told to no PMS here: DERM_PMS_REPORTS is not set (docs/pms.md).")

    async def publish(pool: Pool) -> list[Snapshot]:
        client = _client(settings)
        try:
            return await Reports(store=ReportStore(pool), client=client, tells_pms=True).publish_due()
        finally:
            if client is not None:
                await client.close()

    made = ask(arguments.home, publish)
    record(arguments.home, "reports_push", {"reports": [str(each.report_id) for each in made]})
    print("\n".join(f"{each.kind} of {each.period}: {each.report_id}" for each in made))
    print("queued for the PMS, each once: `derm-cds outbox status`")


def _client(settings: Settings) -> PmsClient | None:
    if settings.pms_url is None:
        return None
    return PmsClient(settings.pms_url, token_file=settings.pms_token_file, ca_file=settings.pms_ca_file)


def markdown(report: dict[str, Any]) -> Iterator[str]:
    """Write a report as tables: a dash for what is hidden or undefined."""
    yield f"### {report['kind'].capitalize()} {report['period']} (report {report['report_id']}, made {report['made_at']})"
    yield ""
    tables = report["tables"]
    yield from _performance(tables["models"]) if report["kind"] == "performance" else _summary(tables)
    yield from (f"- {note}" for note in report["notes"])


def _summary(tables: dict[str, Any]) -> Iterator[str]:
    counted = {name: found for name, found in tables.items() if name not in {"lesion_outcomes", "adoption"}}
    counted |= {f"lesion outcomes: {kind}": found for kind, found in tables["lesion_outcomes"].items()}
    for name, found in counted.items():
        yield from _table([name.replace("_", " "), "n"], [[word, _plain(n)] for word, n in found.items()])
    adoption = tables["adoption"]
    told = _share(adoption["share"]) if adoption["told_by_pms"] else "the PMS does not tell"
    yield f"Encounters with a skin complaint that had an image assessed: {told}"
    yield ""


def _performance(models: Sequence[dict[str, Any]]) -> Iterator[str]:
    head = [
        *(
            "lesions",
            "with outcome",
            "melanoma: sensitivity",
            "malignant: sensitivity",
            "benign: specificity",
        ),
        "positive predictive value",
    ]
    for model in models:
        yield f"#### {model['model_id']}"
        yield ""
        for name, rows in {
            "": [model["all"]],
            "site": model["by_site"],
            "age": model["by_age_band"],
            "skin type": model["by_skin_type"],
        }.items():
            yield from _table([name or "group", *head], [_accuracy(row) for row in rows])
        yield from _table(
            ["intended before the answer", "lesions", "service refers", "service does not refer"],
            [
                [
                    row["intended"],
                    *(_plain(row[n]) for n in ("lesions", "service_refers", "service_does_not_refer")),
                ]
                for row in model["against_intention"]
            ],
        )
        low = model["low_risk_referrals"]
        yield f"Referrals of low-risk lesions that were intended and not made: {_share(low['avoided'])}"
        yield ""


def _accuracy(row: dict[str, Any]) -> list[str]:
    def sensitivity(what: str) -> str:
        found = row[what]
        if found["sensitivity"] is None and found["at_least"] is not None:
            return f"at least {found['at_least']:.1%} of {found['n']}"
        return _share(found["sensitivity"])

    known, share = row["with_outcome"], row["share_with_outcome"]
    return [
        row["group"] or "all",
        _plain(row["lesions"]),
        f"{_plain(known)} ({share:.1%})" if share is not None else _plain(known),
        sensitivity("melanoma"),
        sensitivity("malignant"),
        _share(row["benign"]["specificity"]),
        _share(row["positive_predictive_value"]),
    ]


def _share(share: dict[str, Any] | None) -> str:
    if share is None:
        return "-"
    return f"{share['value']:.1%} ({share['lower']:.1%} to {share['upper']:.1%}), n = {share['n']}"


def _plain(value: object) -> str:
    return "-" if value is None else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
