"""The commands of `millrace`, one file each. Imported only when they are called."""
