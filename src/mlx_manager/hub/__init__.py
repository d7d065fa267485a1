"""Models on this machine: where they lie, and what their files say. Loads nothing and asks nobody on the network."""
