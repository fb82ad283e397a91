"""The spectrum along training: measured checkpoint by checkpoint, drawn and told."""
