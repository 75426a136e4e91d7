"""The pure core: columns in, columns out; time is an argument."""
