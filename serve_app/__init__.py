"""The product as the PMS sees it: vocabulary, records, security and the HTTP interface."""
