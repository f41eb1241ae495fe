"""Where key-encryption keys may be kept besides a file: HashiCorp Vault and AWS KMS."""
