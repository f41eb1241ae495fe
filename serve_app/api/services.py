"""What the routes work with, made once a process."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.preprocess.decode import UploadLimits
from serve_app.api.admission import AdmissionGate
from serve_app.api.door import Door
from serve_app.api.emergency_limits import EmergencyLimits
from serve_app.api.eraser import Eraser
from serve_app.api.invariants import InvariantWatch
from serve_app.api.live_model import LiveModelWatch
from serve_app.api.pms import PmsTies
from serve_app.api.replayer import Replayer
from serve_app.api.sealing import Sealer
from serve_app.api.searcher import Searcher
from serve_app.api.triage import Triage
from serve_app.records.access import AccessStore
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool
from serve_app.security.keystore import KeyStore


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
    door: Door
    access: AccessStore
    emergency_limits: EmergencyLimits
