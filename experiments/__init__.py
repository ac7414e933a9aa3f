"""How a person runs ATLAS: short absl binaries without logic of their own."""
