"""What the audit log says, and the signed checkpoints that show where it was changed."""
