"""Which modules go on which device: a memory model, workspaces, and the solver."""
