"""What every room uses: errors, paths, files, timing. Imports nothing else of ours."""
