"""Mixed precision: bits for each matrix, by a size or KL target or by a recipe."""
