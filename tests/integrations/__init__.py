"""What other libraries do to a lifted model: a file each. Where a library is not installed its file skips, by name."""
