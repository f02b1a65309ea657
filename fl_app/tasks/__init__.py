"""Tasks, models, and how records are dealt out to clients."""
