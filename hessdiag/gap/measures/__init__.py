"""The built-in measures of sharpness, flatness, norms and noise, one family a file."""
