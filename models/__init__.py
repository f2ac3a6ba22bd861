"""The PyTorch library: methods that make embedding spaces compatible. Knows no database, no gallery and no HTTP."""
