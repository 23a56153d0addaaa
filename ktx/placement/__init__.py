"""Placement of modules on devices: a memory model, workspaces, and the solver."""
