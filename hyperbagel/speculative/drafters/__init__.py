"""The drafters. Each has one definition, which training and serving share."""
