"""Metrics: formulas on timelines, the report made of them, and how it is written, shown and sent."""
