"""Hold what every other package uses: errors, files, optional dependencies."""
