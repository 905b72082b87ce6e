"""What one serving process keeps: its snapshot of the registry, its registration, its lease and its clocks."""
