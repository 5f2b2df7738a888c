"""State-space layers: induction in Mamba, and what scans cost and lose."""
