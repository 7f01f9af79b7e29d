"""How is a network found? Spaces, objectives, strategies (no torch), and the study that asks, measures and records."""
