"""Models named on the command line: presets, Hugging Face configs, functions of a file."""
