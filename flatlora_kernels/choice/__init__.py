"""Which backend and strategy a call uses: what was asked for, else what was measured, else what a model predicts."""
