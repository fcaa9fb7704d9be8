"""Programs that people who work on the package run. None is installed."""
