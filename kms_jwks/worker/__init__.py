"""What one serving process keeps: its snapshot of the registry, its registration, its signing lease and its clocks."""
