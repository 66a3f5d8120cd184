"""The parts of tools/preflight.py: what it checks, measures, predicts and reports."""
