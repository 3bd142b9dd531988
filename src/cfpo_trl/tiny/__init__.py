"""A character-level model that learns in minutes on a CPU: what the demos, studies, benchmarks and tests train."""
