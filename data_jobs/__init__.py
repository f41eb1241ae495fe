"""Jobs of the ML team: training, references, promotion. They run beside the service, never inside it."""
