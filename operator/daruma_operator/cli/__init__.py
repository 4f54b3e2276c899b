"""The command line: `daruma run`, `daruma export`, `daruma bench`."""
