"""The target model: made from a package, or frozen for training and evaluation."""
