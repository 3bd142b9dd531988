"""What a run needs around its trainer: recipe, data, model, output folder, signals, launcher."""
