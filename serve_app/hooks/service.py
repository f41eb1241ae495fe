"""What CDS Hooks are answered with: the cards of one patient, for one clinician, from what is on record."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.access.rules import Action, Principal, RequestedAction, Role, may
from serve_app.audit.events import EHR
from serve_app.hooks.cards import MAX_CARDS, Card, card_id, write_cards
from serve_app.hooks.clients import Caller, HookClients
from serve_app.records.hooks import GivenFeedback, HookStore, Meant
from serve_app.records.lesions import LesionStore
from serve_app.settings import HookSettings

HOOK, SERVICE_ID = "patient-view", "derm-open-demands"
#: What is called, below the base URL.
SERVICE_PATH = f"/cds-services/{SERVICE_ID}"
FEEDBACK_PATH = f"{SERVICE_PATH}/feedback"

#: As discovery tells it: no FHIR data is asked for, so there is no prefetch, and no 412.
SERVICE = {
    "hook": HOOK,
    "id": SERVICE_ID,
    "title": "Open demands of skin lesions",
    "description": "What dermoscopic images of this patient demand and no clinician has answered, and overdue follow-ups; "
    "decision support, not a diagnosis",
    "usageRequirements": "The user and the patient must be known to the service, and the patient in the user's care.",
}


def principal_of(client: str) -> Principal:
    """An EHR itself, as far as nobody else is known: it may do nothing for a patient."""
    return Principal(f"{EHR}{client}", frozenset())


class HookService:
    """Answers the EHRs that are configured."""

    def __init__(self, settings: HookSettings, store: HookStore, records: LesionStore) -> None:
        self._settings, self._store, self._records = settings, store, records
        self.clients = HookClients(settings, SERVICE_PATH, FEEDBACK_PATH)

    async def take(self, caller: Caller) -> bool:
        """Take the token that an EHR came with; False when it was taken before."""
        return await self._store.take_token(caller.name, caller.token_id)

    async def forget_tokens(self) -> None:
        """Let go of tokens that have long expired."""
        await self._store.forget_tokens()

    async def cards(
        self, caller: Caller, requested: RequestedAction, *, user: str, patient: str, hook_instance: str
    ) -> list[Card]:
        """The cards for a user and a patient as the EHR names them, and the one event of it.

        None for whoever may not read of that patient, as for one without any: unknown user, unknown patient and no care
        are the same statements, of the same answer. The user is a clinician by being mapped, and looks as one.
        """
        meant = await self._store.identify(caller.name, user=user, patient=patient)
        patient_id = patient if caller.client.patient_ids == "same" else meant.patient_id
        if meant.subject is not None:
            roles = frozenset[str]() if meant.revoked else frozenset({Role.CLINICIAN.value})
            requested.principal = Principal(meant.subject, roles)
        access = await self._records.access(requested.actor, patient_id or "")
        decision = may(requested.principal, Action.READ, assigned=access.assigned, emergency=access.emergency)
        requested.patient_id, requested.emergency = patient_id, decision.emergency
        allowed = bool(decision) and patient_id is not None
        found = await self._store.due(patient_id if allowed else None)
        detail: dict[str, object] = {"client": caller.name, "user": user, "patient": patient}
        if not allowed:
            detail["reason"] = _why(meant, patient_id) or decision.reason
        event = requested.event(
            "success" if allowed else "denied", hook=HOOK, hook_instance=hook_instance, **detail
        )
        shown = [(card_id(caller.name, due), due) for due in found[:MAX_CARDS]]
        await self._store.show(caller.name, shown, event=event)
        return write_cards(caller.name, caller.client, found, source_url=self._settings.source_url)

    async def hear(self, caller: Caller, requested: RequestedAction, given: Sequence[GivenFeedback]) -> None:
        """Record what became of cards; NotFound where one is none of this EHR's."""
        event = requested.event("success", client=caller.name)
        await self._store.add_feedback(caller.name, given, event=event)


def _why(meant: Meant, patient_id: str | None) -> str | None:
    if meant.revoked:
        return "revoked"
    return "unknown_user" if meant.subject is None else "unknown_patient" if patient_id is None else None
