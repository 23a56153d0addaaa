"""Fused steps: several modules computed by one kernel call."""
