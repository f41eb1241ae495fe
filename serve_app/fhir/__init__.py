"""From the service's own terms to HL7 FHIR R4."""
