"""Three validators that complement each other: each accepts what another rejects (docs/fhir.md).

fhir.resources knows the elements and their types, HL7's JSON schema the required codes, Medplum's the invariants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
import json
from pathlib import Path
import shutil
import subprocess
from typing import Any

from fhir.resources.R4B import get_fhir_model_class as construct
import jsonschema_rs

_FOLDER = Path(__file__).parent / "medplum"
DEFINITIONS = _FOLDER / "node_modules" / "@medplum" / "definitions" / "dist" / "fhir" / "r4"
#: All that a report may hold; another would be a defect.
KINDS = (
    *("Bundle", "DiagnosticReport", "Observation", "RiskAssessment", "BodyStructure", "Media", "Device"),
    *("Provenance", "ServiceRequest", "OperationOutcome"),
)
_MISSING = "scripts/test installs it with `npm ci`; node 20.19 or newer is needed"


class Validators:
    """All three; what they read is read once. To be closed."""

    def __init__(self) -> None:
        assert shutil.which("node"), f"node is missing: {_MISSING}"
        assert DEFINITIONS.exists(), f"{_FOLDER}/node_modules is missing: {_MISSING}"
        self._node = subprocess.Popen(
            ["node", "validate.mjs"],  # noqa: S607 - whichever node the machine has
            cwd=_FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process."""
        self._node.communicate(timeout=10)

    def findings(self, resources: Iterable[dict[str, Any]]) -> list[str]:
        """Whatever any of the three has against a Bundle with what is in it, or against another resource."""
        return [
            text
            for each in resources
            for text in (*self.by_models(each), *self.by_schema(each), *self.by_invariants(each))
        ]

    def by_models(self, bundle: dict[str, Any]) -> Iterator[str]:
        """fhir.resources R4B; it reads the Bundle with all that is in it."""
        try:
            construct(bundle["resourceType"]).model_validate(bundle)
        except ValueError as error:
            yield f"fhir.resources: {error}"

    @cached_property
    def _schemas(self) -> Mapping[str, jsonschema_rs.Draft6Validator]:
        whole = json.loads((DEFINITIONS / "fhir.schema.json").read_text(encoding="utf-8"))
        # Of a resource in another any would do, each tried in turn: they are looked at one by one instead.
        definitions = whole["definitions"] | {"ResourceList": {"required": ["resourceType"]}}
        schemas = {kind: {"$ref": f"#/definitions/{kind}", "definitions": definitions} for kind in KINDS}
        return {kind: jsonschema_rs.Draft6Validator(schema) for kind, schema in schemas.items()}

    def by_schema(self, bundle: dict[str, Any]) -> Iterator[str]:
        """HL7's own JSON schema (draft 6) of R4 4.0.1; R4B is the same in all that we emit."""
        for resource in (bundle, *(entry["resource"] for entry in bundle.get("entry", ()))):
            for error in self._schemas[resource["resourceType"]].iter_errors(resource):
                yield f"fhir.schema.json {resource['resourceType']}: {error.message[:200]}"

    def by_invariants(self, bundle: dict[str, Any]) -> list[str]:
        """Medplum's validateResource, by one process for all."""
        assert self._node.stdin is not None
        assert self._node.stdout is not None
        self._node.stdin.write(f"{json.dumps(bundle)}\n")
        self._node.stdin.flush()
        answer = self._node.stdout.readline()
        assert answer, f"node ended with {self._node.wait()}"
        found: list[str] = json.loads(answer)
        return found
