"""What a job would take before it is started: memory, seconds and where scaling ends (`slidegrad plan`)."""
