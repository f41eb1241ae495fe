"""What the routes work with, made once a process."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.preprocess.decode import UploadLimits
from serve_app.access.rules import EmergencyLimits
from serve_app.erasure.eraser import Eraser
from serve_app.http.access import Authenticator
from serve_app.http.admission import AdmissionGate
from serve_app.keys.keystore import KeyStore
from serve_app.lesions.live_model import LiveModelWatch
from serve_app.lesions.replay import Replayer
from serve_app.lesions.similar import Searcher
from serve_app.lesions.triage import Triage
from serve_app.pms.delivery import PmsTies
from serve_app.records.access import AccessStore
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool
from serve_app.worker import InvariantWatch, Sealer


@dataclass(frozen=True, slots=True)
class Services:
    """The parts behind the interface."""

    pool: Pool
    records: LesionStore
    keys: KeyStore
    live: LiveModelWatch
    invariants: InvariantWatch
    sealer: Sealer
    triage: Triage
    replayer: Replayer
    searcher: Searcher
    eraser: Eraser
    pms: PmsTies
    admission: AdmissionGate
    limits: UploadLimits
    authenticator: Authenticator
    access: AccessStore
    emergency_limits: EmergencyLimits
