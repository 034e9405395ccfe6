"""What every other part uses: errors, files, optional dependencies."""
