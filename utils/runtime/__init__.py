"""The process that a run lives in: launch, devices, logging, signals, files, random streams."""
