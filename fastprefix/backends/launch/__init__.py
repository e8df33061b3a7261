"""From torch tensors to Triton launches: arguments, tiles, grids. Importing a module in here imports Triton."""
