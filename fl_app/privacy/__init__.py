"""What a run promises about privacy: nothing yet beyond the locality of records."""
