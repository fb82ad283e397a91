"""The gate as a fixture of pytest."""
