"""What the service does as a whole, in fixed tables without patients: summary, performance, drift."""
